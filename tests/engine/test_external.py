"""Changes told by commands: every snapshot is what the tree was, whatever they say."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as hs
from hypothesis.stateful import RuleBasedStateMachine, rule

from cloudfs.backup import packs
from cloudfs.backup.job import Interrupted, SyncResult
from cloudfs.core.changelist import merged
from cloudfs.source.external import command, told
from cloudfs.source.external.command import Commands
from cloudfs.source.filters import Filters
from tests.engine import snapshotter
from tests.engine.rig import ALL, Rig, contents_of_tree, difference
from tests.engine.test_machine import LEFT_OUT, Tree, change_at_random, hunt

WAYS = ("full", "plain", "tops", "lists", "inodes")
TOP = Path(__file__).parents[2]


def commands(base: Path) -> Commands:
    """Those of the made-up snapshotter."""
    program = (sys.executable, snapshotter.__file__, str(base))
    return Commands(
        snapshot=(*program, "snapshot"),
        changes=(*program, "changes"),
        release=(*program, "release"),
        timeout_s=60,
        environment={"PATH": os.environ["PATH"], "PYTHONPATH": str(TOP)},
    )


class Snapshotted(Tree):
    """The state machine of the engine on an ext4 with made-up snapshots."""

    def __init__(self) -> None:
        RuleBasedStateMachine.__init__(self)
        self.base = Path(tempfile.mkdtemp(prefix="cloudfs-external-", dir="/dev/shm"))
        tree = snapshotter.make(self.base / "fs")
        self.rig = Rig(self.base, [tree], max_pack_bytes=5000, source="external")
        self.rig.external = commands(self.base / "fs")
        self.models = {}
        self.reasons: list[str] = []

    @rule(way=hs.sampled_from(WAYS))
    def tell_in_another_way(self, way: str) -> None:
        (self.base / "fs" / "way").write_text(way)

    def take(self, force: bool) -> SyncResult:
        known = bool(self.models) and (self.base / "machines" / self.rig.machine).exists()
        result = self.rig.sync(force=force)
        if known and (self.base / "fs" / "way").read_text() == "full":
            # Of a file that has a further name where that is left out, it may not be told.
            doubts = [note for note in self.rig.notes if "not told nor on record" in note]
            assert self.rig.notes == ([] if self.left_out is ALL else doubts)
        self.reasons.extend(self.rig.notes)
        if result.snapshot is not None:
            assert result.snapshot.source == "external"
            assert result.snapshot.consistent
        return result

    def remove_all(self) -> None:
        left = list((self.base / "fs" / "snapshots").glob("*.img"))
        snapshotter.remove(self.base / "fs")
        shutil.rmtree(self.base)
        assert len(left) <= 1 + self.forgotten, "snapshots were left behind"

    forgotten = 0

    @rule()
    def lose_local_state(self) -> None:
        self.forgotten += 1
        self.rig.forget_local()


@pytest.fixture(autouse=True)
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that frames and packs end in the middle of these small trees too."""
    monkeypatch.setattr(packs, "FRAME_BYTES", 1000)


def test_snapshots_are_what_the_tree_was() -> None:
    hunt(6, 40, Snapshotted)


@pytest.mark.long
def test_snapshots_are_what_the_tree_was_for_long() -> None:
    hunt(500, 100, Snapshotted)


def hunt_densely(seeds: range) -> None:
    """Much happens between two syncs, and each is told in another way."""
    scans = 0
    for seed in seeds:
        choose = random.Random(seed)
        machine = Snapshotted()
        machine.begin(choose.choice(LEFT_OUT))
        for _ in range(15):
            change_at_random(machine, choose)
        machine.sync(force=False)
        for _ in range(8):
            machine.tell_in_another_way(choose.choice(WAYS))
            for _ in range(choose.randint(1, 12)):
                change_at_random(machine, choose)
            machine.sync(force=False)
        machine.teardown()
        scans += len(machine.reasons)
    assert scans <= len(seeds) // 2, "what was told was hardly ever gone by"


def test_much_happens_between_syncs() -> None:
    hunt_densely(range(3))


@pytest.mark.long
def test_much_happens_between_syncs_for_long() -> None:
    hunt_densely(range(100, 600))


# -- one thing at a time --------------------------------------------------------------------------


@pytest.fixture
def fs() -> Iterator[Path]:
    """A file system with made-up snapshots."""
    base = Path(tempfile.mkdtemp(prefix="cloudfs-external-", dir="/dev/shm"))
    snapshotter.make(base / "fs")
    yield base / "fs"
    snapshotter.remove(base / "fs")
    shutil.rmtree(base)


@pytest.fixture
def rig(fs: Path) -> Rig:
    """A tree on it that was backed up once."""
    tree = fs / "live" / "tree"
    (tree / "d" / "sub").mkdir(parents=True)
    for name in ("f", "g", "h"):
        (tree / "d" / name).write_bytes(os.urandom(10_000))
    (tree / "d" / "sub" / "k").write_bytes(os.urandom(10_000))
    given = commands(fs)
    scripts = {name: ("sh", str(fs / name)) for name in ("snapshot", "changes", "release")}
    given = msgspec.structs.replace(given, **scripts)
    rig = Rig(fs.parent, [tree], source="external", external=given)
    for name in scripts:
        script(rig, name, honest(rig, name))
    rig.sync()
    assert rig.notes == []
    return rig


def held(fs: Path) -> list[str]:
    """The snapshots that are there."""
    return sorted(path.stem for path in (fs / "snapshots").glob("*.img"))


def same(rig: Rig, number: int) -> None:
    assert not difference(rig.contents(number), contents_of_tree(rig.tree))


def lins(rig: Rig, number: int) -> dict[bytes, int]:
    """The LINs of a snapshot, by path."""
    history = rig.history()
    try:
        return {path: meta.lin for path, _, meta in history.view(number).walk()}
    finally:
        history.repository.local.close()


def honest(rig: Rig, name: str) -> str:
    """The script by which a command is what it should be."""
    fs = rig.base / "fs"
    return f'exec {sys.executable} {snapshotter.__file__} {fs} {name} "$@"'


def script(rig: Rig, name: str, text: str) -> None:
    """Let a command of the policy be this script from now on."""
    (rig.base / "fs" / name).write_text(text + "\n")


def tell(rig: Rig, *lines: str, then: str = "") -> None:
    """Let these lines be what is told of changes."""
    script(rig, "changes", "".join(f"printf '%s\\n' '{line}'\n" for line in lines) + then)


COMPLETE = '{"complete": true}'


def test_a_directory_that_moved_keeps_all_lins_and_changes_below_it_are_seen(rig: Rig) -> None:
    before = lins(rig, 1)
    tree = rig.tree
    (tree / "d").rename(tree / "e")
    with (tree / "e" / "f").open("r+b") as file:
        file.seek(5000)
        file.write(b"x")
    (tree / "e" / "g").rename(tree / "e" / "moved")
    (tree / "e" / "sub" / "new").write_text("new")
    result = rig.sync()
    assert rig.notes == []
    same(rig, 2)
    after = lins(rig, 2)
    for old, new in (("d", "e"), ("d/f", "e/f"), ("d/g", "e/moved"), ("d/sub/k", "e/sub/k")):
        assert before[f"/{old}".encode()] == after[f"/{new}".encode()]
    assert result.snapshot is not None
    # One block of f, the file that moved alone, the new one.
    assert result.snapshot.stats.bytes_read <= 4096 + 10_000 + 3


def test_only_what_is_told_is_looked_at(rig: Rig) -> None:
    (rig.tree / "d" / "f").write_bytes(b"changed")
    (rig.tree / "d" / "h").write_bytes(b"changed too")
    tell(rig, '{"path": "d/f", "kind": "changed"}', COMPLETE)
    rig.sync()
    assert rig.notes == []
    view = rig.contents(2)
    assert view[b"/d/f"][-1] == b"changed"  # type: ignore[index]
    assert len(view[b"/d/h"][-1]) == 10_000  # type: ignore[index]


def test_who_says_that_nothing_changed_is_believed(rig: Rig) -> None:
    """A source that lies is found out by --verify-source, and by nothing else."""
    (rig.tree / "d" / "f").write_bytes(b"changed")
    tell(rig, COMPLETE)
    assert rig.sync().snapshot is None
    assert rig.notes == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("name", '{"path": "cache/deep/name", "kind": "changed"}'),
        ("name", '{"path": "cache/deep/name", "kind": "created"}'),
        ("moved", '{"path": "cache/deep/moved", "kind": "renamed", "from": "cache/deep/name"}'),
    ],
)
def test_a_file_told_under_a_name_in_a_directory_that_is_left_out(
    rig: Rig, name: str, line: str
) -> None:
    rig.filters = Filters(("cache/",))
    place, file = rig.tree / "cache" / "deep", rig.tree / "d" / "f"
    place.mkdir(parents=True)
    (place / "both").write_text("out")
    os.link(place / "both", place / "ways")
    if "created" not in line:
        os.link(file, place / "name")
    rig.sync()
    file.write_bytes(b"changed")
    if "created" in line:
        os.link(file, place / "name")
    (place / "name").rename(place / name)
    tell(rig, line, '{"path": "cache/deep/both", "kind": "changed"}', COMPLETE)
    rig.sync()
    assert rig.notes == []
    found = contents_of_tree(rig.tree)
    assert rig.contents(rig.history().snapshots[-1].number)[b"/d/f"] == found[b"/d/f"]


CHANGED = '{"path": "d/f", "kind": "changed"}'
BAD_CHANGES = (
    ([CHANGED], "", 'ended before it had said {"complete": true}'),
    ([CHANGED, COMPLETE], "echo no such thing >&2; exit 3", "sh failed (no such thing)"),
    ([CHANGED, COMPLETE], "exit 3", "sh failed (exit code 3)"),
    ([CHANGED], "kill -9 $$", "sh failed (killed by SIGKILL)"),
    ([CHANGED], "kill -37 $$", "sh failed (killed by signal 37)"),
    (["hello"], "", "sh printed hello in line 1: that is no JSON"),
    (["[1]"], "", "in line 1: "),
    (['{"path": "d/f", "kind": "odd"}'], "", "invalid enum value"),
    (['{"path": "d/f"}'], "", "it has no kind"),
    (['{"kind": "changed"}'], "", "it has neither path nor lin"),
    (['{"path": "/etc", "kind": "changed"}', COMPLETE], "", "below the source"),
    (['{"path": "d/../../x", "kind": "changed"}', COMPLETE], "", '".." between slashes'),
    (['{"path": "d\\u0000", "kind": "changed"}', COMPLETE], "", "holds a NUL"),
    (['{"path": "d", "kind": "renamed"}', COMPLETE], "", 'renamed without "from"'),
    (['{"path": "d", "kind": "changed", "ranges": [[-1, 2]]}'], "", "a bad start"),
    ([COMPLETE, CHANGED], "", "went on after it had said that it was done"),
    (['{"complete": false, "reason": "snapshot was lost"}'], "", "(snapshot was lost)"),
    (["x" * 100], "head -c 2000000 /dev/zero", "in line 1"),
    ([CHANGED], "head -c 2000000 /dev/zero", "a line that is far too long"),
    (['{"path": "e", "kind": "renamed", "from": "d"}', COMPLETE], "", "e is no directory"),
    (['{"path": "d/f", "kind": "renamed", "from": "d"}', COMPLETE], "", "d/f is no directory"),
    (['{"lin": 999999, "kind": "created"}', COMPLETE], "", "inode 999999 is told new"),
)


def test_what_cannot_be_believed_is_scanned(fs: Path, rig: Rig) -> None:
    """Each of these says too little of what changed, or nothing at all."""
    for number, (lines, then, reason) in enumerate(BAD_CHANGES, 2):
        for name in ("f", "g"):
            (rig.tree / "d" / name).write_bytes(b"%d" % number)
        tell(rig, *lines, then=then)
        rig.sync()
        assert len(rig.notes) == 1, (lines, rig.notes)
        assert rig.notes[0].startswith("the snapshot is scanned: ")
        assert reason in rig.notes[0]
        same(rig, number)
        assert len(held(fs)) == 1


def test_what_says_too_much_is_sifted(rig: Rig) -> None:
    """Things told twice, in two ways, of nothing, or of a directory as if it were made anew."""
    (rig.tree / "d" / "f").write_bytes(b"changed")
    (rig.tree / "d" / "sub" / "k").write_bytes(b"changed too")
    tell(
        rig,
        CHANGED,
        CHANGED,
        '{"path": "d/f", "kind": "attributes"}',
        '{"path": "d/f", "kind": "changed", "ranges": [[0, 4]]}',
        '{"path": "no/where", "kind": "changed"}',
        '{"path": "no/where", "kind": "deleted"}',
        '{"path": "d/sub", "kind": "deleted"}',
        '{"path": "d/sub", "kind": "created"}',
        '{"path": "", "kind": "changed"}',
        COMPLETE,
    )
    rig.sync()
    assert rig.notes == []
    same(rig, 2)


def test_ranges_are_all_that_is_read(rig: Rig) -> None:
    with (rig.tree / "d" / "f").open("r+b") as file:
        file.seek(9000)
        file.write(b"there")
    tell(rig, '{"path": "d/f", "kind": "changed", "ranges": [[9000, 2], [9002, 3]]}', COMPLETE)
    result = rig.sync()
    assert rig.notes == []
    assert result.snapshot is not None
    assert result.snapshot.stats.bytes_read == 10_000 - 8192
    same(rig, 2)


Ranges = list[tuple[int, int]]


def lines_of(whose: dict[str, object], lines: list[Ranges]) -> list[bytes]:
    """Lines that tell of changed ranges: start and length of each."""
    told_of = [{**whose, "kind": "changed", "ranges": ranges} for ranges in lines]
    return [json.dumps(line).encode() for line in [*told_of, {"complete": True}]]


@given(hs.lists(hs.lists(hs.tuples(hs.integers(0, 60), hs.integers(0, 9)), max_size=6), min_size=1))
def test_ranges_in_any_order_and_lines_cover_the_same_bytes(lines: list[Ranges]) -> None:
    """Whoever looks for a byte in them goes by their being sorted and apart."""
    wanted = {at for ranges in lines for start, size in ranges for at in range(start, start + size)}
    by_path = told.read_told(lines_of({"path": "f"}, lines), "sh").data[b"f"]
    assert by_path is not None
    assert [at for start, end in by_path for at in range(start, end)] == sorted(wanted)
    assert told.read_told(lines_of({"lin": 7}, lines), "sh").inode_data[7] == by_path


@pytest.mark.parametrize("count", [told.MAX_RANGES, 3 * told.MAX_RANGES])
def test_a_line_for_each_range(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """What is joined is a few times what was told, and not its square."""
    joined: list[int] = []

    def counting(ranges: Ranges) -> Ranges:
        joined.append(len(ranges))
        return merged(ranges)

    monkeypatch.setattr(told, "merged", counting)
    lines: list[Ranges] = [[(at * 1000, 10)] for at in reversed(range(count))]
    found = told.read_told(lines_of({"path": "f"}, lines), "sh").data[b"f"]
    if count <= told.MAX_RANGES:
        assert found == [(at * 1000, at * 1000 + 10) for at in range(count)]
    else:
        assert found is None, "it is read whole"
    assert sum(joined) <= 3 * count


def test_ranges_that_are_not_in_order_are_all_read(rig: Rig) -> None:
    with (rig.tree / "d" / "f").open("r+b") as file:
        file.write(b"here")
        file.seek(9000)
        file.write(b"there")
    tell(rig, '{"path": "d/f", "kind": "changed", "ranges": [[9000, 5], [0, 4]]}', COMPLETE)
    rig.sync()
    assert rig.notes == []
    same(rig, 2)


def test_too_much_is_scanned(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told, "MAX_LINES", 1000)
    tell(rig, then=f"exec yes '{CHANGED}'")
    (rig.tree / "d" / "f").write_bytes(b"changed")
    rig.sync()
    assert "told more than 1,000 changes" in rig.notes[0]
    same(rig, 2)


BAD_SNAPSHOTS = (
    ("echo no room >&2; exit 1", "sh failed (no room)"),
    ("", "sh printed 0 lines"),
    ("echo /; echo /", "sh printed 2 lines"),
    ("echo relative", "sh printed relative, which is no absolute path"),
    ("echo /nowhere/to/be/found", "which cannot be read (no such file or directory)"),
    ("echo /etc/passwd", "which is no directory"),
    ('echo "$1"', "which is the source itself"),
    ('echo "$1/../tree/."', "which is the source itself"),
    ("""echo '{"id": 7}'""", "no JSON as it must be"),
    ("""echo '{"path'""", "no JSON as it must be"),
    ("""echo '{"path": "/etc", "id": "a\\u0000"}'""", "gave an id with a NUL"),
    ("""echo '{"path": "/etc", "id": "\\ud800"}'""", "no JSON as it must be"),
)


def test_where_there_is_no_snapshot_the_tree_is_scanned(fs: Path, rig: Rig) -> None:
    base = held(fs)
    script(rig, "snapshot", "exit 1")
    assert rig.sync().snapshot is None
    assert held(fs) == base, "nothing changed, so it can be counted from still"
    for number, (text, reason) in enumerate(BAD_SNAPSHOTS, 2):
        (rig.tree / "d" / "f").write_bytes(b"%d" % number)
        script(rig, "snapshot", text)
        result = rig.sync()
        assert result.snapshot is not None
        assert not result.snapshot.consistent
        assert len(rig.notes) == 1
        assert rig.notes[0].startswith("no snapshot could be taken, so the tree itself is scanned")
        assert reason in rig.notes[0]
        same(rig, number)
        assert held(fs) == [], "of no use any more"


def test_the_last_snapshot_given_again_is_none(fs: Path, rig: Rig) -> None:
    (name,) = held(fs)
    (rig.tree / "d" / "f").write_bytes(b"changed")
    script(rig, "snapshot", f"""echo '{{"path": "{fs}/snapshots/{name}/tree", "id": "{name}"}}'""")
    rig.sync()
    assert "that it has given before" in rig.notes[0]
    same(rig, 2)


def processes(fs: Path) -> list[str]:
    """The command lines of all processes that name the file system's directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().replace(b"\0", b" ").decode()
            if str(fs) in words:
                found.append(words)
    return found


HANG = "trap '' TERM; sh -c 'trap \"\" TERM; sleep 1000' {fs} & sleep 1000 & wait; wait"


@pytest.mark.parametrize("name", ["snapshot", "changes"])
def test_a_command_that_hangs_is_ended_with_all_that_it_started(
    fs: Path, rig: Rig, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_GRACE_S", 0.2)
    assert rig.external is not None
    rig.external = msgspec.structs.replace(rig.external, timeout_s=0.5)
    (rig.tree / "d" / "f").write_bytes(b"changed")
    script(rig, name, HANG.format(fs=fs))
    rig.sync()
    assert "was not done after 0.5 s" in rig.notes[0]
    assert processes(fs) == []
    same(rig, 2)


def test_what_a_command_leaves_running_is_not_waited_for(fs: Path, rig: Rig) -> None:
    (rig.tree / "d" / "f").write_bytes(b"changed")
    script(rig, "snapshot", "sleep 30 &\n" + honest(rig, "snapshot").removeprefix("exec "))
    rig.sync()
    assert rig.notes == []
    same(rig, 2)


def test_who_stops_the_sync_stops_the_command(
    fs: Path, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_GRACE_S", 0.2)
    base = held(fs)
    begun = fs / "begun"
    script(rig, "changes", f"touch {begun}; " + HANG.format(fs=fs))
    with pytest.raises(Interrupted, match="Snapshot 2 was not made"):
        rig.sync(stopped=begun.exists)
    assert processes(fs) == []
    assert held(fs) == base


def test_what_cannot_be_released_is_told_and_tried_again(fs: Path, rig: Rig) -> None:
    (rig.tree / "d" / "f").write_bytes(b"changed")
    script(rig, "release", "echo busy >&2; exit 1")
    rig.sync()
    assert len(rig.notes) == 1
    assert "could not be released: sh failed (busy)" in rig.notes[0]
    assert len(held(fs)) == 2
    script(rig, "release", honest(rig, "release"))
    rig.sync()
    assert rig.notes == []
    assert len(held(fs)) == 1


def test_a_sync_that_fails_or_is_a_rehearsal_keeps_its_base(fs: Path, rig: Rig) -> None:
    base = held(fs)
    (rig.tree / "d" / "f").write_bytes(b"changed")
    result = rig.sync(dry_run=True)
    assert result.changed == 1
    assert held(fs) == base
    with pytest.raises(Interrupted):
        rig.sync(stopped=(fs / "changes").exists)
    assert held(fs) == base
    rig.sync()
    assert rig.notes == []
    same(rig, 2)
    assert len(held(fs)) == 1
    assert held(fs) != base


def test_without_changes_each_snapshot_is_scanned_and_released(fs: Path, rig: Rig) -> None:
    assert rig.external is not None
    rig.external = msgspec.structs.replace(rig.external, changes=())
    (rig.tree / "d" / "f").write_bytes(b"changed")
    result = rig.sync()
    assert result.snapshot is not None
    assert result.snapshot.consistent
    assert rig.notes == []
    same(rig, 2)
    assert held(fs) == []


def test_a_base_of_other_commands_or_another_time_is_not_gone_by(fs: Path, rig: Rig) -> None:
    assert rig.external is not None
    rig.external = msgspec.structs.replace(
        rig.external, changes=("sh", str(fs / "changes"), "other")
    )
    rig.sync()
    assert "the policy's commands or sources are others" in rig.notes[0]
    before = rig.machine
    rig.machine = "two"
    (rig.tree / "d" / "f").write_bytes(b"changed")
    rig.repository.local.close()
    rig.__post_init__()
    rig.sync()
    rig.machine = before
    rig.repository.local.close()
    rig.__post_init__()
    (rig.tree / "d" / "g").write_bytes(b"changed")
    script(rig, "changes", honest(rig, "changes").replace('"$@"', '"$2" "$3" "$4"'))
    rig.sync()
    assert any("the local state was not that of the last snapshot" in n for n in rig.notes)
    same(rig, 3)


def test_copies_are_scanned(fs: Path, rig: Rig) -> None:
    """A snapshotter that copies gives its directories inodes of their own."""
    script(rig, "snapshot", f'mkdir -p {fs}/c && cp -al {fs}/live/tree {fs}/live/$2 &&'
        f' echo {fs}/live/$2')  # fmt: skip
    script(rig, "release", f'case $1 in {fs}/live/*) rm -r "$1";; esac')
    for number in (2, 3):
        (rig.tree / "d" / "g").unlink(missing_ok=True)
        (rig.tree / "d" / "g").write_bytes(b"%d" % number)
        rig.sync()
        assert "it is a copy" in rig.notes[0]
        assert lins(rig, 1)[b"/d/h"] == lins(rig, number)[b"/d/h"]
        assert rig.contents(number)[b"/d/g"][-1] == b"%d" % number  # type: ignore[index]


def test_several_sources(fs: Path) -> None:
    trees = [fs / "live" / "one", fs / "live" / "two"]
    for tree in trees:
        (tree / "d").mkdir(parents=True)
        (tree / "d" / "f").write_bytes(os.urandom(10_000))
    rig = Rig(fs.parent, trees, source="external", external=commands(fs))
    rig.sync()
    (trees[0] / "d").rename(trees[0] / "e")
    (trees[1] / "d" / "f").write_bytes(b"changed")
    rig.sync()
    assert rig.notes == []
    found = rig.contents(2)
    for tree in trees:
        for path, item in contents_of_tree(tree).items():
            if path != b"links":
                assert found[b"/%s%s" % (os.fsencode(tree.name), path)] == item
    assert len(held(fs)) == 2
    os.link(trees[1] / "d" / "f", trees[0] / "e" / "link")
    rig.sync()
    assert rig.notes == ["the snapshot is scanned: a file has names in several sources."]


def test_what_is_left_out_costs_nothing(fs: Path, rig: Rig) -> None:
    rig.filters = Filters(excludes=("/cache",))
    rig.sync()
    (rig.tree / "cache" / "deep").mkdir(parents=True)
    (rig.tree / "cache" / "deep" / "f").write_text("x")
    (rig.tree / "d" / "f").write_bytes(b"changed")
    rig.sync()
    assert rig.notes == []
    (rig.tree / "cache" / "deep" / "f").rename(rig.tree / "d" / "out")
    (rig.tree / "cache" / "deep").rename(rig.tree / "out")
    (rig.tree / "d" / "sub").rename(rig.tree / "cache" / "in")
    result = rig.sync()
    assert rig.notes == []
    expected = contents_of_tree(rig.tree)
    expected = {path: item for path, item in expected.items() if not path.startswith(b"/cache")}
    assert result.snapshot is not None
    assert not difference(rig.contents(result.snapshot.number), expected)


def test_files_of_several_names(rig: Rig) -> None:
    """A source need tell but one of the names that a file has, had or got."""
    tree = rig.tree
    os.link(tree / "d" / "f", tree / "d" / "sub" / "f2")
    tell(rig, '{"path": "d/sub/f2", "kind": "created"}', COMPLETE)
    rig.sync()
    same(rig, 2)
    (tree / "d" / "f").unlink()
    tell(rig, '{"path": "d/f", "kind": "deleted"}', COMPLETE)
    rig.sync()
    same(rig, 3)
    (tree / "new").mkdir()
    os.link(tree / "d" / "g", tree / "new" / "g2")
    tell(rig, '{"path": "new", "kind": "created"}', COMPLETE)
    rig.sync()
    same(rig, 4)
    shutil.rmtree(tree / "new")
    tell(rig, '{"path": "new", "kind": "deleted"}', COMPLETE)
    rig.sync()
    same(rig, 5)
    assert rig.notes == []
    assert lins(rig, 5)[b"/d/g"] == lins(rig, 1)[b"/d/g"]


def test_a_killed_command_and_its_snapshot_are_cleared_away(
    fs: Path, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next sync ends what an earlier one's command still does, and releases what it made."""
    monkeypatch.setattr(command, "_GRACE_S", 0.2)
    begun = fs / "begun"
    script(
        rig, "snapshot",
        honest(rig, "snapshot").removeprefix("exec ") + f"; touch {begun}; " + HANG.format(fs=fs),
    )  # fmt: skip
    (rig.tree / "d" / "f").write_bytes(b"changed")
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            rig.sync()
        os._exit(1)
    deadline = time.monotonic() + 20
    while not begun.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert len(held(fs)) == 2
    assert processes(fs) != []
    script(rig, "snapshot", honest(rig, "snapshot"))
    rig.sync()
    same(rig, 2)
    assert len(held(fs)) == 1
    assert processes(fs) == []
