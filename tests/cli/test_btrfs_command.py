"""btrfs as change source, through the program, on a real file system."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cloudfs.source.btrfs.subvolume import below
from tests.cli.conftest import Machine
from tests.engine import btrfs
from tests.fuse.compare import assert_same

HOLDING = ".cloudfs-snapshots"


@pytest.fixture
def tree(volume: Path) -> Path:
    """A subvolume with a few files, and a subvolume within it."""
    tree = btrfs.subvolume(volume / "tree")
    (tree / "docs").mkdir()
    (tree / "docs" / "plan").write_bytes(os.urandom(3_000_000))
    for number in range(100):
        (tree / "docs" / f"{number}").write_text(f"{number}" * 100)
    btrfs.subvolume(tree / "docs" / "nested")
    (tree / "docs" / "nested" / "below").write_text("below")
    return tree


@pytest.fixture
def synced(machine: Machine, tree: Path, repo: str) -> Machine:
    """A machine that synced the subvolume once."""
    said = machine.run("policy", "create", "vol", "--source", tree, "--repo", repo).out
    assert "changes found by btrfs snapshots" in said
    machine.run("sync", "vol")
    return machine


def holding(tree: Path) -> list[str]:
    return sorted(os.listdir(tree / HOLDING))


def restored(machine: Machine, tree: Path) -> Path:
    """The last snapshot, as it comes back on the same file system."""
    out = tree.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    machine.run("restore", "vol", "--target", out)
    return out


def same(tree: Path, out: Path) -> None:
    """Both are alike, but for the snapshots at the top of the tree."""
    names = {name for name in os.listdir(tree) if name != HOLDING}
    assert names == set(os.listdir(out))
    for name in names:
        assert_same(tree / name, out / name)


def test_only_what_btrfs_tells_is_uploaded(synced: Machine, tree: Path) -> None:
    same(tree, restored(synced, tree))
    with (tree / "docs" / "plan").open("r+b") as file:
        file.seek(1_500_000)
        file.write(b"changed")
    (tree / "docs" / "nested" / "more").write_text("more")
    (tree / "docs" / "7").rename(tree / "seven")
    done = synced.run("sync", "vol", "--json").objects[-1]
    assert done["source"] == "btrfs"
    assert done["bytes_read"] < 300_000  # the block that changed, and small files
    same(tree, restored(synced, tree))
    assert len(holding(tree)) == 2  # one for each of the two subvolumes
    assert "unchanged" in synced.run("sync", "vol").out
    assert "btrfs" in synced.run("snapshots", "vol").out


def test_how_it_stands(synced: Machine, tree: Path) -> None:
    assert synced.source_state() == ("0 items", "btrfs, complete")
    (tree / "docs" / "7").write_text("changed")
    (tree / "docs" / "nested" / "more").write_text("more")
    os.sync()  # what was not written out yet is not counted
    assert synced.source_state() == (
        "3 items",
        "btrfs, complete",
    )  # with the directory of the new one
    found = synced.run("status", "--json").objects[0]
    assert (found["source_complete"], found["source_reason"]) == (True, None)
    assert (found["changes_since"], found["changes_unit"]) == (3, "item")
    assert "Snapshot 2" in synced.run("sync", "vol").out
    assert synced.source_state() == ("0 items", "btrfs, complete")
    btrfs.subvolume(tree / "other")
    reason = "btrfs, next sync scans: a subvolume came, went or moved"
    assert synced.source_state() == ("not known (scan)", reason)
    synced.run("sync", "vol")
    assert synced.source_state()[1] == "btrfs, complete"
    for name in holding(tree):
        btrfs.run("btrfs", "subvolume", "delete", tree / HOLDING / name)
    assert "is gone" in synced.source_state()[1]
    assert holding(tree) == []


def test_how_it_stands_with_another_machine(
    synced: Machine, other_machine: Machine, tree: Path, repo: str
) -> None:
    """Which synced since, so that this one's snapshot is none to count from."""
    other_machine.run("policy", "create", "vol", "--adopt", "--repo", repo)
    (tree / "docs" / "7").write_text("changed")
    other_machine.run("sync", "vol", "--force")
    assert "belongs to snapshot 1" in synced.source_state()[1]
    assert other_machine.source_state()[1] == "btrfs, complete"


def test_how_it_stands_without_root(synced: Machine) -> None:
    """Whoever cannot sync is still told of the last snapshot."""
    synced.run("policy", "set", "vol", "--snapshot", "btrfs")
    program = "import os; os.geteuid = lambda: 1; from cloudfs.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "status"],
        env=synced.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert re.search(r"  1, .* ago +not known +btrfs\n", done.stdout)
    assert "vol: btrfs snapshots need root" in done.stderr
    assert done.returncode == 1


def test_no_daemon_is_needed(synced: Machine) -> None:
    said = synced.fails(2, "watch", "vol")
    assert said == "vol finds what changed by btrfs snapshots and needs no daemon."


def test_the_btrfs_command_is_not_needed(synced: Machine, tree: Path, tmp_path: Path) -> None:
    """Nor is the one that is found believed."""
    fake = tmp_path / "bin" / "btrfs"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho rubbish\nexit 0\n")
    fake.chmod(0o755)
    synced.variables["PATH"] = str(fake.parent)
    (tree / "new").write_text("new")
    done = synced.run("sync", "vol", "--json")
    assert (done.err, done.objects[-1]["source"]) == ("", "btrfs")
    same(tree, restored(synced, tree))


def wait_for_a_snapshot(process: subprocess.Popen[str], tree: Path, kept: list[str]) -> None:
    """Until a sync has taken one, beside those that were kept."""
    deadline = time.monotonic() + 20
    while holding(tree) == kept and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_what_was_left_by_a_killed_sync_is_removed(synced: Machine, tree: Path) -> None:
    kept = holding(tree)
    (tree / "large").write_bytes(os.urandom(30_000_000))
    with synced.start("sync", "vol", "--workers", "1") as process:
        wait_for_a_snapshot(process, tree, kept)
        process.send_signal(signal.SIGKILL)
    assert len(holding(tree)) > len(kept)
    synced.run("sync", "vol")
    assert len(holding(tree)) == len(kept)


def test_a_base_that_is_gone_foreign_or_written_to_is_noticed(synced: Machine, tree: Path) -> None:
    base = tree / HOLDING / holding(tree)[0]
    btrfs.run("btrfs", "property", "set", "-ts", base, "ro", "false")
    (base / "docs" / "planted").write_text("not what was backed up")
    btrfs.run("btrfs", "property", "set", "-ts", base, "ro", "true")
    (tree / "new").write_text("new")
    done = synced.run("sync", "vol")
    assert "was written to" in done.err
    btrfs.run("btrfs", "subvolume", "delete", tree / HOLDING / holding(tree)[0])
    done = synced.run("sync", "vol")
    assert "is gone" in done.err
    assert "unchanged" in done.out
    base = tree / HOLDING / holding(tree)[0]
    btrfs.run("btrfs", "subvolume", "delete", base)
    btrfs.run("btrfs", "subvolume", "snapshot", "-r", tree, base)
    assert "is another one" in synced.run("sync", "vol").err


def test_a_subvolume_that_comes_or_goes(synced: Machine, tree: Path) -> None:
    btrfs.subvolume(tree / "other")
    (tree / "other" / "file").write_text("x")
    assert "came, went or moved" in synced.run("sync", "vol").err
    same(tree, restored(synced, tree))
    btrfs.run("btrfs", "subvolume", "delete", tree / "docs" / "nested")
    assert "came, went or moved" in synced.run("sync", "vol").err
    same(tree, restored(synced, tree))


def test_attributes_of_a_subvolume_within(synced: Machine, tree: Path) -> None:
    """No command of the stream of the one around it tells them."""
    (tree / "docs" / "nested").chmod(0o700)
    (tree / "docs" / "nested" / "more").write_text("more")
    done = synced.run("sync", "vol")
    assert done.err == ""
    same(tree, restored(synced, tree))
    (tree / "docs").rename(tree / "moved")
    assert "came, went or moved" in synced.run("sync", "vol").err
    same(tree, restored(synced, tree))


def test_another_subvolume_in_the_same_place(synced: Machine, tree: Path) -> None:
    """Its inodes have the numbers of those that were there, and are others."""
    nested = tree / "docs" / "nested"
    (nested / "below").write_bytes(os.urandom(1 << 20))
    synced.run("sync", "vol")
    btrfs.run("btrfs", "subvolume", "delete", nested)
    btrfs.subvolume(nested)
    with (nested / "below").open("wb") as file:  # a hole where the other had data
        file.truncate(1 << 20)
        file.seek(900_000)
        file.write(b"end")
    assert "took the place" in synced.run("sync", "vol").err
    same(tree, restored(synced, tree))


def test_equal_inode_numbers_in_two_subvolumes(synced: Machine, tree: Path) -> None:
    """What moved in one of them is not taken for what went from the other."""
    first, second = btrfs.subvolume(tree / "a"), btrfs.subvolume(tree / "b")
    for place in (first, second):
        (place / "old").write_bytes(os.urandom(1 << 20))
        os.utime(place / "old", ns=(1, 1))
    assert (first / "old").stat().st_ino == (second / "old").stat().st_ino
    synced.run("sync", "vol")
    (first / "old").unlink()
    (second / "old").rename(second / "new")
    assert synced.run("sync", "vol").err == ""
    same(tree, restored(synced, tree))


def test_what_is_no_subvolume_is_refused(machine: Machine, volume: Path, repo: str) -> None:
    (volume / "plain").mkdir()
    said = machine.fails(
        1, "policy", "create", "p", "--source", volume / "plain", "--repo", repo,
        "--snapshot", "btrfs",
    )  # fmt: skip
    assert "is no btrfs subvolume" in said


def test_a_full_file_system_is_scanned_instead(synced: Machine, tree: Path) -> None:
    """No room for a snapshot is no reason to have no backup."""
    shutil.rmtree(tree / HOLDING, ignore_errors=True)
    for name in holding(tree):
        btrfs.run("btrfs", "subvolume", "delete", tree / HOLDING / name)
    (tree / HOLDING).rmdir()
    (tree / HOLDING).write_text("in the way")
    (tree / "new").write_text("new")
    done = synced.run("sync", "vol")
    assert "the tree itself is scanned" in done.err
    assert "Snapshot 2" in done.out


def test_excluded_and_foreign_things_stay_out(machine: Machine, tree: Path, repo: str) -> None:
    machine.run(
        "policy", "create", "vol", "--source", tree, "--repo", repo, "--exclude", "nested/"
    )  # fmt: skip
    machine.run("sync", "vol")
    assert len(holding(tree)) == 1
    assert HOLDING not in machine.run("ls", "vol").out
    (tree / "docs" / "nested" / "more").write_text("more")
    assert "unchanged" in machine.run("sync", "vol").out
    found = machine.run("find", "vol").out
    assert "plan" in found
    assert "nested" not in found


@pytest.mark.parametrize("care", ["fsync", "flushoncommit"])
def test_no_record_n_plus_one_without_record_n(
    synced: Machine, tree: Path, tmp_path: Path, care: str
) -> None:
    """Writers never stop; each snapshot shows a prefix of what they wrote.

    Of what was only written, not flushed, btrfs itself keeps no order, unless it is mounted so.
    """
    if care == "flushoncommit":
        btrfs.run("mount", "-o", "remount,flushoncommit", tree.parent)
    script = tmp_path / "writer.py"
    script.write_text(WRITER)
    writers = [
        subprocess.Popen([sys.executable, script, tree, str(number), care]) for number in range(3)
    ]
    try:
        for _ in range(4):
            time.sleep(0.4)
            assert "Snapshot" in synced.run("sync", "vol").out
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    shown = synced.run("snapshots", "vol", "--json").objects
    assert [snapshot["source"] for snapshot in shown] == ["btrfs"] * 5
    for snapshot in shown[1:]:
        out = tmp_path / f"out{snapshot['number']}"
        synced.run("restore", f"vol@{snapshot['number']}", "--target", out)
        for number in range(3):
            check_prefix(out / f"w{number}")


WRITER = """
import os, sys
base = os.path.join(sys.argv[1], "w" + sys.argv[2])
os.makedirs(base)
record = 0
while True:
    record += 1
    path = os.path.join(base, "f%d" % (record % 7))
    with open(path, "ab", buffering=0) as file:
        file.write(b"%d\\n" % record)
        if sys.argv[3] == "fsync":
            os.fsync(file.fileno())
    os.rename(path, os.path.join(base, "g")); os.rename(os.path.join(base, "g"), path)
    if record % 50 == 0:
        os.rename(path, os.path.join(base, "done-%d" % record))
"""


def check_prefix(base: Path) -> None:
    """The records in all files of a writer are 1 to n, but for the one being written."""
    records: list[int] = []
    for path in base.iterdir():
        records.extend(int(line) for line in path.read_text().splitlines())
    assert sorted(records) == list(range(1, len(records) + 1))
    assert records


def snapshots_anywhere(tree: Path) -> list[bytes]:
    return [path for path in below(os.fsencode(tree)) if os.fsencode(HOLDING) in path]


@pytest.mark.parametrize("way", ["remove", "set", "by hand"])
def test_a_policy_without_btrfs_leaves_no_snapshot(synced: Machine, tree: Path, way: str) -> None:
    assert snapshots_anywhere(tree)
    file = synced.home / "config" / "vol.toml"
    if way == "remove":
        synced.run("policy", "remove", "vol", "--yes")
    elif way == "set":
        synced.run("policy", "set", "vol", "--tag", "other", "--snapshot", "btrfs")
        assert snapshots_anywhere(tree), "it goes by them still"
        synced.run("policy", "set", "vol", "--snapshot", "scan")
    else:
        text = file.read_text()
        file.write_text(f'snapshot = "scan"\n{text}')
        synced.run("sync", "vol", "--dry-run")
        assert snapshots_anywhere(tree), "a dry run changes nothing"
        synced.run("sync", "vol")
    assert not (tree / HOLDING).exists()
    if way != "remove":
        synced.run("sync", "vol", "--force")
        same(tree, restored(synced, tree))


@pytest.fixture
def other(volume: Path) -> Path:
    """Another subvolume."""
    other = btrfs.subvolume(volume / "other")
    (other / "file").write_text("other")
    return other


@pytest.mark.parametrize("way", ["set", "set with the repository", "by hand"])
def test_another_source_takes_the_snapshots_of_the_one_before(
    synced: Machine, tree: Path, other: Path, way: str, tmp_path: Path
) -> None:
    if way == "by hand":
        file = synced.home / "config" / "vol.toml"
        file.write_text(file.read_text().replace(str(tree), str(other)))
    else:
        repo = ("--repo", tmp_path / "second") if "repository" in way else ()
        synced.run("policy", "set", "vol", "--source", other, *repo)
        assert not (tree / HOLDING).exists()
    synced.run("sync", "vol")
    assert snapshots_anywhere(other)
    assert not (tree / HOLDING).exists()
    assert "unchanged" in synced.run("sync", "vol").out


def test_what_a_killed_sync_left_in_another_source_is_removed(
    machine: Machine, tree: Path, other: Path, repo: str
) -> None:
    """Though no sync of that one ever ended."""
    machine.run("policy", "create", "vol", "--source", tree, "--repo", repo)
    (tree / "large").write_bytes(os.urandom(30_000_000))
    with machine.start("sync", "vol", "--workers", "1") as process:
        while not (tree / HOLDING).exists() and process.poll() is None:
            time.sleep(0.001)
        wait_for_a_snapshot(process, tree, [])
        process.send_signal(signal.SIGKILL)
    assert snapshots_anywhere(tree)
    file = machine.home / "config" / "vol.toml"
    file.write_text(file.read_text().replace(str(tree), str(other)))
    machine.run("sync", "vol")
    assert not (tree / HOLDING).exists()
    machine.run("policy", "remove", "vol", "--yes")
    assert not snapshots_anywhere(other)


@pytest.mark.parametrize("way", ["sync", "remove", "scan"])
def test_the_snapshots_of_a_source_that_is_away_are_not_forgotten(
    machine: Machine, tree: Path, other: Path, repo: str, tmp_path: Path, way: str
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    btrfs.run("mount", "--bind", tree, place)
    try:
        machine.run("policy", "create", "vol", "--source", place, "--repo", repo)
        machine.run("sync", "vol")
    finally:
        btrfs.run("umount", place)
    said = machine.run("policy", "set", "vol", "--source", other).err
    assert f"{place}/{HOLDING} is not there, so the snapshots in it are left" in said
    assert machine.run("sync", "vol").err == ""
    assert snapshots_anywhere(tree)
    btrfs.run("mount", "--bind", tree, place)
    try:
        if way == "remove":
            machine.run("policy", "remove", "vol", "--yes")
        elif way == "scan":
            machine.run("policy", "set", "vol", "--snapshot", "scan")
        else:
            machine.run("sync", "vol")
    finally:
        btrfs.run("umount", place)
    assert not (tree / HOLDING).exists()
    assert bool(snapshots_anywhere(other)) == (way == "sync")


def test_a_source_that_is_not_mounted_is_told(
    machine: Machine, tree: Path, repo: str, tmp_path: Path
) -> None:
    """It counts as empty, as for any scan, but not without a word."""
    place = tmp_path / "place"
    place.mkdir()
    btrfs.run("mount", "--bind", tree, place)
    try:
        machine.run("policy", "create", "vol", "--source", place, "--repo", repo)
        machine.run("sync", "vol")
    finally:
        btrfs.run("umount", place)
    said = f"the last snapshot was taken by btrfs, but {place} is no subvolume now"
    assert said in machine.run("sync", "vol", "--dry-run").err
    assert said in machine.run("sync", "vol").err
    assert machine.run("sync", "vol").err == "", "that snapshot was taken by a scan"


def test_a_policy_is_not_removed_while_it_is_synced(synced: Machine, tree: Path) -> None:
    (tree / "large").write_bytes(os.urandom(30_000_000))
    kept = holding(tree)
    with synced.start("sync", "vol", "--workers", "1") as process:
        wait_for_a_snapshot(process, tree, kept)
        process.send_signal(signal.SIGSTOP)
        try:
            said = synced.fails(11, "policy", "remove", "vol", "--yes")
        finally:
            process.send_signal(signal.SIGCONT)
        assert "is being synced by this machine" in said
        assert process.wait(60) == 0
    synced.run("policy", "remove", "vol", "--yes")
    assert not snapshots_anywhere(tree)


def test_a_broken_policy_may_be_removed(synced: Machine, tree: Path) -> None:
    file = synced.home / "config" / "vol.toml"
    file.write_text("rubbish")
    said = synced.run("policy", "remove", "vol", "--yes").err
    assert "what its syncs may have held is left as it is" in said
    assert not file.exists()
