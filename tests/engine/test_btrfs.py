"""Changes told by btrfs: every snapshot is what the tree was, and nothing else was looked at."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as hs
from hypothesis.stateful import RuleBasedStateMachine, rule

from cloudfs.backup import packs
from cloudfs.backup.files import FileReader
from cloudfs.backup.job import SyncResult
from cloudfs.core.changelist import DirChange
from cloudfs.source.btrfs import session
from cloudfs.source.btrfs.subvolume import ROOT_INODE
from cloudfs.source.filters import Filters
from cloudfs.source.roots import HOLDING
from cloudfs.source.scan import Scanner
from cloudfs.source.state import SourceState
from tests.engine import btrfs
from tests.engine.rig import LeftOut, Rig, contents_of_tree, difference
from tests.engine.test_machine import PLACES, SIZES, Tree, hunt, judge_early

FICLONE, FICLONERANGE = 0x40049409, 0x4020940D


@pytest.fixture
def rig(volume: Path) -> Iterator[Rig]:
    """A subvolume with a policy."""
    base = Path(tempfile.mkdtemp(dir=volume))
    tree = btrfs.subvolume(base / "tree")
    yield Rig(base, [tree], source="btrfs")
    remove(base)


def remove(base: Path) -> None:
    """Remove a directory with all subvolumes in it."""
    for path in sorted(base.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink() and path.stat().st_ino == 256:
            btrfs.run("btrfs", "subvolume", "delete", path)
    shutil.rmtree(base, ignore_errors=True)


def sync_of_changes(rig: Rig) -> SyncResult:
    """A sync that goes by what btrfs tells; its snapshot is what the tree is."""
    result = rig.sync()
    assert not rig.notes
    assert not result.unreadable
    assert result.snapshot is not None
    made = rig.contents(result.snapshot.number)
    assert not difference(made, contents_of_tree(rig.tree))
    return result


def test_where_much_changed_the_snapshot_is_scanned(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not for files that were there before and hold much, of which btrfs tells what to read."""
    monkeypatch.setattr(session, "MUCH", 10)
    for number in range(20):
        (rig.tree / f"{number}").write_bytes(os.urandom(300_000))
    (rig.tree / "small").write_text("small")
    rig.sync()

    def state() -> SourceState:
        os.sync()
        history = rig.history()
        last = history.snapshots[-1]
        history.repository.local.close()
        place = rig.repository.local.policy_dir(rig.repository.id, rig.record.id) / "btrfs"
        source = session.BtrfsSource([os.fsencode(rig.tree)], rig.record.id, place, lambda _: False)
        return source.state(last.number, last.time_ns, 20)

    for number in range(12):
        (rig.tree / f"new{number}").write_text("new")
    (rig.tree / "small").rename(rig.tree / "moved")
    reason = "so much changed (14 items) that this costs less"
    assert (state().complete, state().reason) == (False, reason)
    rig.notes.clear()
    result = rig.sync()
    assert rig.notes == [f"the snapshot is scanned: {reason}."]
    assert result.snapshot is not None
    assert result.snapshot.consistent
    assert (result.new, result.moved, result.deleted) == (12, 1, 0)
    assert not difference(rig.contents(2), contents_of_tree(rig.tree))

    for number in range(20):
        with (rig.tree / f"{number}").open("r+b") as file:
            file.write(b"changed")
    assert state().complete
    result = sync_of_changes(rig)
    assert result.snapshot is not None
    assert result.snapshot.stats.bytes_read < 20 * 150_000


@pytest.mark.parametrize("place", ["", "d/"])
@pytest.mark.parametrize("names", [("a", "z"), ("z", "a")])
def test_a_file_of_several_names_that_changed(rig: Rig, names: tuple[str, str], place: str) -> None:
    """The stream tells of one of its names; the others are as they were on record."""
    (rig.tree / "d").mkdir()
    first, second = rig.tree / names[0], rig.tree / f"{place}{names[1]}"
    first.write_bytes(os.urandom(20_000))
    rig.sync()
    os.link(first, second)
    sync_of_changes(rig)
    for path in (first, second):
        os.setxattr(path, "trusted.x", os.fsencode(path))
        sync_of_changes(rig)
        path.write_bytes(os.urandom(20_000))
        sync_of_changes(rig)


@pytest.mark.parametrize("pattern", ["*.tmp", "/new/below/out", "new/*/out"])
def test_what_changed_in_a_directory_that_moved_where_patterns_leave_out(
    rig: Rig, pattern: str
) -> None:
    """Each directory is judged once, and as what it is now left out of."""
    left = LeftOut(
        Filters(excludes=(pattern,)),
        lambda path, is_dir: pattern != "*.tmp" and path == b"/new/below/out",
    )
    rig.filters = left.filters
    for directory in ("old/below/deep", "beside"):
        (rig.tree / directory).mkdir(parents=True)
    for name in ("old/below/out", "old/below/deep/file", "beside/first"):
        (rig.tree / name).write_text("one")
    os.link(rig.tree / "beside/first", rig.tree / "beside/second")
    rig.sync()
    new = rig.tree / "new"
    (rig.tree / "old").rename(new)
    (new / "file").write_text("two")
    os.link(new / "file", new / "further")
    (new / "below/deep/file").write_text("two")
    (rig.tree / "beside/first").rename(new / "first")
    (rig.tree / "beside/second").rename(new / "below/second")
    with (new / "first").open("a") as file:
        file.write("two")
    result = rig.sync()
    assert not rig.notes
    assert result.snapshot is not None
    assert not difference(rig.contents(2), contents_of_tree(rig.tree, left))
    stats = result.snapshot.stats
    assert (stats.files, stats.dirs) == (5 if left.by_path(b"/new/below/out", False) else 6, 5)


@pytest.mark.parametrize("left", [Filters(excludes=("out/",)), Filters(excludes=("first",))])
def test_a_file_that_changed_has_its_first_name_where_it_is_left_out(
    rig: Rig, left: Filters
) -> None:
    """By which alone the stream tells of it."""
    rig.filters = left
    for name in ("out", "known"):
        (rig.tree / name).mkdir()
    names = [rig.tree / "out/first", rig.tree / "known/second"]
    names[0].write_text("one")
    os.link(*names)
    rig.sync()
    for turn in range(4):
        changed = names[turn % 2]
        if turn < 2:
            changed.write_text(f"changed {turn}")
        else:
            os.setxattr(changed, "trusted.turn", b"%d" % turn)
        rig.sync()
        assert not rig.notes
        found = rig.contents(turn + 2)
        assert b"/out/first" not in found
        want = contents_of_tree(rig.tree)
        assert not difference(
            {b"/known/second": found[b"/known/second"]},
            {b"/known/second": want[b"/known/second"]},
        )


def test_a_further_name_in_a_directory_that_was_left_out(rig: Rig) -> None:
    """Neither name was touched, nor was the other one's directory."""
    rig.filters = Filters(excludes=("out/",))
    for name in ("out", "known"):
        (rig.tree / name).mkdir()
    (rig.tree / "known/file").write_text("data")
    os.link(rig.tree / "known/file", rig.tree / "out/name")
    rig.sync()
    (rig.tree / "out").rename(rig.tree / "in")
    rig.sync()
    assert not rig.notes
    assert not difference(rig.contents(2), contents_of_tree(rig.tree))


@pytest.mark.parametrize("left", [False, True])
def test_a_file_that_could_not_be_read_and_then_moved(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, *, left: bool
) -> None:
    """What the second sync is told of begins after what the first one could not read."""
    path = rig.tree / "above/file"
    path.parent.mkdir()
    path.write_bytes(os.urandom(400_000))
    rig.sync()
    with path.open("r+b") as file:
        file.write(b"changed")
    with monkeypatch.context() as patch:

        def fail(*_arguments: object) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        patch.setattr(FileReader, "_file", fail)
        assert [path for path, _ in rig.sync().unreadable] == [b"above/file"]
    path.rename(rig.tree / "moved")
    if left:
        path.parent.rmdir()
    rig.sync()
    assert not rig.notes
    number = rig.history().snapshots[-1].number
    assert not difference(rig.contents(number), contents_of_tree(rig.tree))


@pytest.mark.parametrize("moved", [False, True])
def test_a_file_in_a_directory_that_a_scan_could_not_list(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, *, moved: bool
) -> None:
    """The ranges that are told later begin after what that scan passed over."""
    path = rig.tree / "above/below/file"
    path.parent.mkdir(parents=True)
    path.write_bytes(os.urandom(400_000))
    rig.sync()
    with path.open("r+b") as file:
        file.write(b"changed")
    rig.filters = Filters(excludes=("another",))  # so the tree is scanned
    real = Scanner.visit
    with monkeypatch.context() as patch:

        def fail(self: Scanner, lin: int, path: bytes, *rest: Any) -> object:
            if path == b"above":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(self, lin, path, *rest)

        patch.setattr(Scanner, "visit", fail)
        assert [path for path, _ in rig.sync().unreadable] == [b"above"]
    with path.open("r+b") as file:
        file.seek(300_000)
        file.write(b"changed as well")
    if moved:
        path.rename(rig.tree / "moved")
    rig.sync()
    assert not rig.notes
    number = rig.history().snapshots[-1].number
    assert not difference(rig.contents(number), contents_of_tree(rig.tree))


def test_a_file_of_several_names_that_changed_under_a_new_one_beside_a_subvolume(rig: Rig) -> None:
    """Inodes of several subvolumes have equal numbers: a file that changed is not known by that."""
    btrfs.subvolume(rig.tree / "within")
    (rig.tree / "d").mkdir()
    first, second, moved = (rig.tree / name for name in ("first", "d/second", "moved"))
    first.write_bytes(os.urandom(20_000))
    os.link(first, second)
    sync_of_changes(rig)
    first.rename(moved)
    with moved.open("a") as file:
        file.write("more")
    sync_of_changes(rig)


def test_a_file_of_several_names_that_changed_under_a_new_one(rig: Rig) -> None:
    """The stream tells of the new name alone; the directory of the other is listed, but from the
    record."""
    (rig.tree / "d").mkdir()
    first, second = rig.tree / "first", rig.tree / "d/second"
    first.write_bytes(os.urandom(20_000))
    os.link(first, second)
    rig.sync()
    for number in range(3):
        moved = rig.tree / f"moved{number}"
        first.rename(moved)
        first = moved
        if number != 1:
            os.chown(first, number + 5, number + 5)
        if number:
            with first.open("r+b") as file:
                file.write(b"%d" % number)
        (rig.tree / "d/beside").write_text(f"{number}")
        sync_of_changes(rig)


def test_of_files_that_kept_their_data_nothing_is_read(rig: Rig) -> None:
    """As those that were merely read, of which the stream tells as well."""
    for number in range(20):
        (rig.tree / f"{number}").write_bytes(os.urandom(3000))
    rig.sync()
    for path in rig.tree.glob("*"):
        os.utime(path, ns=(1, path.stat().st_mtime_ns))
        path.chmod(0o600)
    sync_of_changes(rig)
    assert rig.history().snapshots[-1].stats.bytes_read == 0


def test_a_directory_that_goes_with_a_subvolume_that_is_left_out(rig: Rig) -> None:
    """The stream moves it to the top, under a name that it never had, and leaves it there."""
    rig.filters = Filters(excludes=("/above/within/left",))
    (rig.tree / "above/within").mkdir(parents=True)
    (rig.tree / "above/within/file").write_text("text")
    for number in range(12):  # so that its number is above those of the directories
        btrfs.subvolume(rig.base / f"{number}")
    btrfs.subvolume(rig.tree / "above/within/left")
    rig.sync()
    btrfs.run("btrfs", "subvolume", "delete", rig.tree / "above/within/left")
    shutil.rmtree(rig.tree / "above")
    sync_of_changes(rig)


def test_a_name_that_came_while_the_directory_of_another_could_not_be_read(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are two files on record, and the stream tells of one of them."""
    (rig.tree / "known").mkdir()
    names = [rig.tree / "known/file", rig.tree / "name"]
    names[0].write_text("one")
    rig.sync()
    os.link(*names)
    (rig.tree / "known/beside").write_text("text")
    revisit = Scanner.revisit

    def fail(scanner: Scanner, lin: int, change: DirChange, *others: Any, **more: Any) -> Any:
        if change.path == b"known":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return revisit(scanner, lin, change, *others, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Scanner, "revisit", fail)
        assert rig.sync().unreadable
    for turn in range(4):
        if turn:
            names[turn % 2].write_text(f"changed {turn}")
        assert not rig.sync().unreadable
        assert not rig.notes
        found, want = rig.contents(rig.history().snapshots[-1].number), contents_of_tree(rig.tree)
        for path in (b"/known/file", b"/name"):
            assert found[path] == want[path]


def test_shared_extents(rig: Rig) -> None:
    """What shares its data with a file in the same snapshot is told as a clone of it."""
    for name in ("old", "older"):
        (rig.tree / name).write_bytes(os.urandom(200_000))
    rig.sync()
    (rig.tree / "new").write_bytes(os.urandom(200_000))
    for source, target in (("new", "copy"), ("old", "copied"), ("new", "older")):
        clone(rig.tree / source, rig.tree / target)
    sync_of_changes(rig)
    with (rig.tree / "old").open("r+b") as file, (rig.tree / "new").open("rb") as new:
        fcntl.ioctl(file, FICLONERANGE, struct.pack("qQQQ", new.fileno(), 4096, 8192, 25 * 4096))
    result = sync_of_changes(rig)
    assert result.snapshot is not None
    assert result.snapshot.stats.bytes_read <= 3 * rig.block_size


def clone(source: Path, target: Path) -> None:
    """Make a file share all its data with another."""
    with source.open("rb") as old, target.open("wb") as new:
        fcntl.ioctl(new, FICLONE, old.fileno())


class OnBtrfs(Tree):
    """The state machine of the engine, with what only btrfs can do, on a subvolume."""

    volume: Path

    def __init__(self) -> None:
        RuleBasedStateMachine.__init__(self)
        self.base = Path(tempfile.mkdtemp(dir=self.volume))
        tree = btrfs.subvolume(self.base / "tree")
        self.rig = Rig(self.base, [tree], max_pack_bytes=5000, source="btrfs")
        self.models = {}

    def prepare(self) -> None:
        self.sync(True)  # so that there is something to count from in every sequence

    @rule(force=hs.booleans())
    def sync_more_often(self, force: bool) -> None:
        self.sync(force)

    @rule(a=PLACES, b=PLACES)
    def clone(self, a: list[bytes], b: list[bytes]) -> None:
        if os.path.isfile(self.path(a)) and not os.path.isdir(self.path(b)):
            with contextlib.suppress(OSError), open(self.path(a), "rb") as source:
                if os.path.exists(self.path(b)) and not os.path.isfile(self.path(b)):
                    return
                with open(self.path(b), "wb") as target:
                    fcntl.ioctl(target, FICLONE, source.fileno())

    @rule(parts=PLACES, offset=SIZES, size=SIZES)
    def punch(self, parts: list[bytes], offset: int, size: int) -> None:
        if os.path.isfile(self.path(parts)) and size:
            btrfs.run(
                "fallocate", "-p", "-o", str(offset), "-l", str(size),
                os.fsdecode(self.path(parts)),
            )  # fmt: skip

    @rule()
    def lose_base(self) -> None:
        """Somebody deletes the snapshot that changes are counted from."""
        for place in (self.rig.tree / os.fsdecode(HOLDING)).glob("*"):
            btrfs.run("btrfs", "subvolume", "delete", place)

    def take(self, force: bool) -> SyncResult:
        known = bool(self.models) and (self.base / "machines" / self.rig.machine).exists()
        held = any((self.rig.tree / os.fsdecode(HOLDING)).glob("*"))
        result = self.rig.sync(force=force)
        if known:
            scanned = [note for note in self.rig.notes if "is gone" in note]
            assert self.rig.notes == scanned, "the snapshot was scanned"
            assert bool(scanned) != held
        if result.snapshot is not None:
            assert result.snapshot.source == "btrfs"
            assert result.snapshot.consistent
        return result

    def remove_all(self) -> None:
        held = self.rig.tree / os.fsdecode(HOLDING)
        left = os.listdir(held) if held.exists() else []
        remove(self.base)
        assert len(left) <= 1, "snapshots were left behind"


class OnSeveral(OnBtrfs):
    """The same with subvolumes within, whose inodes have equal numbers, and which come and go."""

    def prepare(self) -> None:
        super().prepare()
        for name in ("a", "b"):
            btrfs.subvolume(self.rig.tree / name)
        self.sync(True)

    @rule(parts=PLACES)
    def subvolume(self, parts: list[bytes]) -> None:
        path = Path(os.fsdecode(self.path(parts)))
        if path.parent.is_dir() and not path.exists() and not path.is_symlink():
            btrfs.subvolume(path)

    def keeps_ctime(self, status: os.stat_result) -> bool:
        """Of a subvolume that is renamed, the kernel changes it in memory only."""
        return status.st_ino != ROOT_INODE

    def take(self, force: bool) -> SyncResult:
        result = self.rig.sync(force=force)
        assert result.snapshot is None or result.snapshot.consistent, self.rig.notes
        return result

    def remove_all(self) -> None:
        remove(self.base)


def prepare(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let frames end everywhere, and the machine work on this file system."""
    monkeypatch.setattr(packs, "FRAME_BYTES", 1000)
    monkeypatch.setattr(OnBtrfs, "volume", volume, raising=False)


@pytest.mark.parametrize("_share", range(2))
def test_snapshots_are_what_the_tree_was(
    volume: Path, monkeypatch: pytest.MonkeyPatch, _share: int
) -> None:
    """In shares that several processes can run at once; each finds sequences of its own."""
    prepare(volume, monkeypatch)
    hunt(25, 100, OnBtrfs)


def test_snapshots_are_what_the_tree_was_when_judged_early(
    volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(volume, monkeypatch)
    judge_early(monkeypatch)
    hunt(15, 60, OnBtrfs)


def test_several_subvolumes(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(volume, monkeypatch)
    hunt(12, 40, OnSeveral)


@pytest.mark.long
@pytest.mark.parametrize("_share", range(2))
def test_several_subvolumes_for_long(
    volume: Path, monkeypatch: pytest.MonkeyPatch, _share: int
) -> None:
    prepare(volume, monkeypatch)
    hunt(250, 100, OnSeveral)


@pytest.mark.long
@pytest.mark.parametrize("_share", range(8))
def test_snapshots_are_what_the_tree_was_for_long(
    volume: Path, monkeypatch: pytest.MonkeyPatch, _share: int
) -> None:
    prepare(volume, monkeypatch)
    hunt(250, 100, OnBtrfs)
