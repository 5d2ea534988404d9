"""The scenarios of tools/bench about small changes, as far as they can be tried in little time."""

from __future__ import annotations

import argparse
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

from benching import changed, data, options, trace
from benching.measure import Cost, Failed, Results
from benching.programs import Cloudfs, Restic
from benching.upgrade import ways
from benching.volumes import roomy

FILES = 10_000


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> options.Options:
    own = replace(options.chosen)
    monkeypatch.setattr(changed, "chosen", own)
    return own


def content(tree: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}


def test_sizes_and_names_are_read() -> None:
    assert options.sizes("1000000,10000") == (10_000, 1_000_000)
    assert options.some_of(options.SOURCES)("live,btrfs") == ("live", "btrfs")


@pytest.mark.parametrize("text", ["", "ten", "0", "-10000", "12345"])
def test_a_size_that_cannot_be_is_an_error(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="multiples"):
        options.sizes(text)


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="no zfs; there are btrfs, watch, live"):
        options.some_of(options.SOURCES)("btrfs,zfs")


def test_a_hundred_files_change_each_time(tmp_path: Path) -> None:
    changed.make(tmp_path, FILES)
    before = content(tmp_path)
    assert len(before) == FILES
    for _ in range(2):
        changed.change(tmp_path, FILES)
        after = content(tmp_path)
        touched = [path for path in before if after[path] != before[path]]
        assert len(touched) == changed.CHANGED
        assert len({path.parent for path in touched}) == changed.CHANGED
        assert {len(after[path]) for path in touched} == {changed.BLOCK}
        before = after


def test_as_many_directories_and_depths_change_in_a_large_tree() -> None:
    for files in (FILES, 100 * FILES):
        tops = files // changed.FILES_EACH // changed.CHANGED
        numbers = {i + 100 * (i * tops // 100) for i in range(100)}
        assert len(numbers) == 100
        assert max(numbers) < files // changed.FILES_EACH
        places = {changed.directory(Path(), number) for number in numbers}
        assert len({place.parent for place in places}) == 100


def test_texts_are_short_and_the_same_for_a_seed() -> None:
    words = data.licence_words()
    texts = [data.text(random.Random(seed), words) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert all(100 <= len(text) <= 1500 for text in texts)


def test_calls_on_the_tree_are_counted_and_others_are_not() -> None:
    lines = [
        '12 openat(AT_FDCWD</root>, "/v/btrfs/tree/a", O_RDONLY) = 3</v/btrfs/tree/a>\n',
        '12 pread64(3</v/btrfs/tree/a>, ""..., 4096, 0) = 4096\n',
        '12 newfstatat(4</v/btrfs>, "", {st_mode=S_IFDIR|0755, ...}, AT_EMPTY_PATH) = 0\n',
        '12 stat("/v/btrfs", {st_mode=S_IFDIR|0755, ...}) = 0\n',
        '12 read(5</v/btrfs2/other>, ""..., 4096) = 0\n',
        '12 openat(AT_FDCWD</root>, "/usr/lib/python3", O_RDONLY) = 3</usr/lib/python3>\n',
        "12 <... read resumed>) = 4096\n",
    ]
    assert trace.count(lines, "/v/btrfs") == 4


def test_calls_of_a_command_are_counted(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_text("x")
    counted = trace.calls(["cat", str(tree / "file")], dict(os.environ), [], tree, tmp_path)
    assert counted is not None
    assert counted >= 3
    assert list(tmp_path.iterdir()) == [tree]
    with pytest.raises(Failed, match="strace cat"):
        trace.calls(["cat", str(tree / "nothing")], dict(os.environ), [], tree, tmp_path)


def test_calls_are_left_out_where_there_is_no_strace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert trace.calls(["true"], {}, [], tmp_path, tmp_path) is None
    assert "strace is missing" in capsys.readouterr().err


def test_a_sync_that_went_another_way_is_no_result() -> None:
    changed.check({"source": "btrfs", "items_changed": 100}, "btrfs", 100)
    with pytest.raises(Failed, match="went by scan, not by btrfs"):
        changed.check({"source": "scan", "items_changed": 100}, "btrfs", 100)
    with pytest.raises(Failed, match="100 files were changed, and 99 were found"):
        changed.check({"source": "btrfs", "items_changed": 99}, "btrfs", 100)


def test_sources_share_a_file_system(chosen: options.Options) -> None:
    assert changed.on_kinds() == {"btrfs": ["btrfs"], "ext4": ["watch", "live"]}
    chosen.sources = ("live",)
    assert changed.on_kinds() == {"ext4": ["live"]}


def test_a_large_tree_is_compared_with_a_small_one(
    chosen: options.Options, capsys: pytest.CaptureFixture[str]
) -> None:
    results = Results()
    for what, wall_s, requests in (("10,000 files", 0.4, 10), ("1,000,000 files", 0.6, 11)):
        results.add("changed", f"watch, {what}: sync", "cloudfs", Cost(wall_s, 1, 0.1))
        results.number("changed", f"watch, {what}: requests", "cloudfs", requests)
    changed._growth("watch", results)
    results.print("changed")
    printed = " ".join(capsys.readouterr().out.split())
    assert "watch: sync, 1,000,000 files / 10,000 files cloudfs 1.5 asked ≤ 1.3: NO" in printed
    assert "requests, 1,000,000 files / 10,000 files cloudfs 1.1 asked ≤ 1.3: yes" in printed
    assert "bytes read" not in printed  # which was not measured


def test_how_many_times_faster_than_the_best_peer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = Results()
    changes = changed.Changes("changed", "tree", tmp_path, lambda: None, results)
    for program, wall_s in (("cloudfs", 0.4), ("restic", 15), ("kopia", 2.4)):
        results.add("changed", "btrfs, tree: sync", program, Cost(wall_s, 1, 0.1))
    changes.compare("btrfs", 5)
    results.print("changed")
    assert "cloudfs 6  asked ≥ 5: yes" in capsys.readouterr().out


def test_a_scan_by_cloudfs_is_no_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = ways(tmp_path, [Cloudfs(tmp_path), Restic(tmp_path, "restic", "/bin/true")])
    assert [program.name for program in found] == ["cloudfs", "cloudfs-scan"]
    results = Results()
    for program, wall_s in (("cloudfs", 2), ("cloudfs-scan", 1), ("restic", 8)):
        results.add("upgrade", "step", program, Cost(wall_s, 1, 0.1))
    results.print("upgrade")
    assert "best peer / cloudfs 4.00" in capsys.readouterr().out


def test_a_program_moves_with_all_that_is_its_own(tmp_path: Path) -> None:
    program = Cloudfs(tmp_path)
    moved = changed.moved_to(tmp_path / "elsewhere", program)
    assert moved.base == tmp_path / "elsewhere" / "cloudfs"
    assert program.base == tmp_path / "cloudfs"


def test_what_is_too_large_for_memory_goes_to_a_disk(tmp_path: Path) -> None:
    with roomy(tmp_path, 1 << 60) as place:
        assert place == tmp_path  # it is not in memory
    with roomy(Path("/dev/shm"), 1) as place:
        assert place == Path("/dev/shm")
    with roomy(Path("/dev/shm"), 1 << 60) as place:
        assert place.parent == Path("/var/tmp")
    assert not place.exists()
