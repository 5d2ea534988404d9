"""What may go wrong on btrfs: snapshots deleted or written to, bad streams, no room, clocks."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from cloudfs.backup.attempt import Attempt
from cloudfs.backup.data import DataReader
from cloudfs.backup.files import FileReader
from cloudfs.backup.publish import Publisher
from cloudfs.backup.worker import Worker
from cloudfs.core.errors import SourceError
from cloudfs.source.btrfs import ioctl
from cloudfs.source.btrfs.session import BtrfsSource
from cloudfs.source.roots import HOLDING
from cloudfs.source.scan import Scanner
from tests.engine import btrfs
from tests.engine.longwrite import long_write
from tests.engine.rig import Rig, contents_of_tree, difference

DAY_NS = 86_400 * 10**9


@pytest.fixture
def rig(volume: Path) -> Rig:
    """A policy that was synced once, with changes since."""
    tree = btrfs.subvolume(volume / "tree")
    for number in range(8):
        (tree / f"d{number}").mkdir()
        for name in ("kept", "changed", "removed"):
            (tree / f"d{number}" / name).write_bytes(os.urandom(9000))
    rig = Rig(volume, [tree], source="btrfs")
    rig.sync()
    change(tree, 1)
    return rig


def change(tree: Path, turn: int) -> None:
    """Change something of everything."""
    dice = random.Random(turn)
    for number in range(8):
        directory = tree / f"d{number}"
        (directory / "changed").write_bytes(dice.randbytes(9000 + turn))
        (directory / "removed").unlink(missing_ok=True)
        (directory / f"new{turn}").write_bytes(dice.randbytes(9000))
        (directory / f"replaced{turn}").write_bytes(dice.randbytes(500))
        (directory / f"replaced{turn}").rename(directory / "kept")


def held_place(rig: Rig) -> Path:
    """Where the snapshots are."""
    return rig.tree / os.fsdecode(HOLDING)


def held(rig: Rig) -> list[Path]:
    """The snapshots that are there."""
    return sorted(held_place(rig).iterdir())


def check(rig: Rig, numbers: int, *, notes: str | None = None) -> None:
    """Sync; the new snapshot is what the tree is, and what went before is as it was.

    ``notes`` is what must have been told; None: nothing, so the sync went by the changelist.
    """
    before = {number: rig.contents(number) for number in range(1, numbers)}
    result = rig.sync()
    assert bool(rig.notes) == bool(notes), rig.notes
    assert not notes or notes in rig.notes[0]
    assert result.snapshot is not None
    assert (result.snapshot.number, result.unreadable) == (numbers, [])
    assert not difference(rig.contents(numbers), contents_of_tree(rig.tree))
    for number, contents in before.items():
        assert not difference(rig.contents(number), contents)
    assert len(held(rig)) == 1


# -- the snapshot that is read ---------------------------------------------------------------------

MOMENTS: dict[str, tuple[type, str, int]] = {
    "before it is opened": (BtrfsSource, "_changes", 1),
    "when it is opened": (Attempt, "_prepare", 1),
    "in the walk": (Scanner, "revisit", 4),
    "before the files": (Worker, "pack", 1),
    "between two directories": (FileReader, "run", 4),
    "between two files": (FileReader, "_item", 9),
    "within a file": (DataReader, "read", 6),
    "at the end": (Attempt, "_conclude", 1),
}
"""Moments of a sync: which call of which method begins then."""


def at(
    patch: pytest.MonkeyPatch, moment: tuple[type, str, int], act: Callable[[], None]
) -> list[bool]:
    """Let something happen at a moment. The value holds something once it did."""
    kind, name, turn = moment
    original = getattr(kind, name)
    calls: list[bool] = []
    happened: list[bool] = []

    def wrapped(*arguments: object, **named: object) -> object:
        calls.append(True)
        if len(calls) == turn:
            act()
            happened.append(True)
        return original(*arguments, **named)

    patch.setattr(kind, name, wrapped)
    return happened


@pytest.mark.parametrize("way", ["changes", "scan"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_snapshot_deleted_under_a_sync(rig: Rig, moment: str, way: str) -> None:
    """Nothing that is then not found counts as gone: no snapshot is made."""
    (base,) = held(rig)
    models = {1: rig.contents(1)}
    kind, name, turn = MOMENTS[moment]
    if way == "scan":
        rig.forget_local()
        rig = Rig(rig.base, rig.sources, source="btrfs")
        name = "visit" if kind is Scanner else name

    def delete() -> None:
        for place in held(rig):
            if place != base:
                btrfs.run("btrfs", "subvolume", "delete", place)

    with pytest.MonkeyPatch.context() as patch:
        happened = at(patch, (kind, name, turn), delete)
        with pytest.raises(SourceError, match=r"is gone while|does not exist"):
            rig.sync()
    assert happened
    assert not difference(rig.contents(1), models[1])
    rig.repository.local.close()
    result = rig.sync()
    assert result.snapshot is not None
    assert result.snapshot.number == 2
    assert not result.unreadable
    assert not difference(rig.contents(2), contents_of_tree(rig.tree))
    assert not difference(rig.contents(1), models[1])
    assert len(held(rig)) == 1
    change(rig.tree, 2)
    check(rig, 3)


def test_a_snapshot_deleted_after_all_was_read(rig: Rig) -> None:
    """Then nothing is missing but the base of the next sync."""
    (base,) = held(rig)

    def delete() -> None:
        for place in held(rig):
            if place != base:
                btrfs.run("btrfs", "subvolume", "delete", place)

    with pytest.MonkeyPatch.context() as patch:
        assert at(patch, (Publisher, "publish", 1), delete) == []
        rig.sync()
    assert not held(rig)
    assert not difference(rig.contents(2), contents_of_tree(rig.tree))
    change(rig.tree, 2)
    check(rig, 3, notes="is gone")
    change(rig.tree, 3)
    check(rig, 4)


# -- the base --------------------------------------------------------------------------------------


def writable(place: Path, wanted: bool) -> None:
    btrfs.run("btrfs", "property", "set", "-ts", place, "ro", "false" if wanted else "true")


def test_a_base_deleted_before_it_is_compared(rig: Rig) -> None:
    (base,) = held(rig)
    with pytest.MonkeyPatch.context() as patch:
        send = ioctl.send

        def delete_and_send(*arguments: object) -> None:
            btrfs.run("btrfs", "subvolume", "delete", base)
            send(*arguments)  # type: ignore[arg-type]

        patch.setattr(ioctl, "send", delete_and_send)
        check(rig, 2, notes="could not compare")
    change(rig.tree, 2)
    check(rig, 3)


def test_a_base_that_is_lost_after_a_snapshot_was_taken_in_the_midst_of_a_write(rig: Rig) -> None:
    """Half of it is in the snapshot, with the time of all, by which the next sync scans."""
    size, path = 32 << 20, rig.tree / "long"
    path.write_bytes(b"a" * size)
    check(rig, 2)
    with long_write(path, b"b", size):
        time.sleep(0.1)
        check(rig, 3)
    btrfs.run("btrfs", "subvolume", "delete", *held(rig))
    check(rig, 4, notes="is gone")


def test_a_base_that_was_made_to_hide_a_change(rig: Rig) -> None:
    """What was just written to it is still in memory when it is read-only again."""
    (base,) = held(rig)
    writable(base, True)
    for number in range(8):
        for name in ("changed", "kept"):
            data = (rig.tree / f"d{number}" / name).read_bytes()
            (base / f"d{number}" / name).write_bytes(data)
    writable(base, False)
    check(rig, 2, notes="was written to")
    change(rig.tree, 2)
    check(rig, 3)


def test_a_base_that_is_writable(rig: Rig) -> None:
    (base,) = held(rig)
    writable(base, True)
    check(rig, 2, notes="was written to")


def test_a_base_that_was_writable_for_a_while(rig: Rig) -> None:
    """And to which nobody wrote."""
    (base,) = held(rig)
    writable(base, True)
    os.sync()
    writable(base, False)
    check(rig, 2)


def test_a_base_whose_blocks_were_moved(rig: Rig, volume: Path) -> None:
    """A balance writes all trees anew, and changes nothing in them."""
    btrfs.run("btrfs", "balance", "start", "--full-balance", volume)
    check(rig, 2)


# -- what the kernel sends -------------------------------------------------------------------------


def spoilt(how: str, path: bytes, parent: int, target: IO[bytes]) -> None:
    """Send, but not well."""
    with tempfile.TemporaryFile() as whole:
        SEND(path, parent, whole)
        whole.seek(0)
        stream = whole.read()
    half = stream[: len(stream) // 2]
    sent = {
        "nothing": b"",
        "half": half,
        "half, and an error": half,
        "half, and the rest again": half + stream,
        "garbage": random.Random(how).randbytes(len(stream)),
        "garbage in the middle": half + random.Random(how).randbytes(len(stream)),
        "another version": stream.replace(b"\0\1\0\0\0", b"\0\x09\0\0\0", 1),
        "twice": stream + stream,
    }
    target.write(sent[how])
    target.flush()
    if "error" in how:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


SEND = ioctl.send


@pytest.mark.parametrize(
    "how",
    [
        "nothing",
        "half",
        "half, and an error",
        "half, and the rest again",
        "garbage",
        "garbage in the middle",
        "another version",
        "twice",
    ],
)
def test_a_stream_that_fails(rig: Rig, how: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ioctl, "send", lambda *arguments: spoilt(how, *arguments))
        check(rig, 2, notes="the snapshot is scanned: ")
    change(rig.tree, 2)
    check(rig, 3)


def test_no_room_for_the_stream(rig: Rig, tmp_path: Path) -> None:
    """The kernel cannot write all of it."""
    btrfs.run("mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", tmp_path)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tempfile, "tempdir", str(tmp_path))
            check(rig, 2, notes="No space left on device")
    finally:
        btrfs.run("umount", tmp_path)
    change(rig.tree, 2)
    check(rig, 3)


def killed_sync(base: Path, tree: Path, when: str) -> None:
    """A sync in a process of its own, which is killed in the middle of the stream, or before."""

    def die(path: bytes, parent: int, target: IO[bytes]) -> None:
        if when == "in the stream":
            spoilt("half", path, parent, target)
        os.kill(os.getpid(), signal.SIGKILL)

    ioctl.send = die
    Rig(base, [tree], source="btrfs").sync()


@pytest.mark.parametrize("when", ["before the stream", "in the stream"])
def test_a_sync_that_is_killed_while_snapshots_are_compared(rig: Rig, when: str) -> None:
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=killed_sync, args=(rig.base, rig.tree, when))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(held(rig)) == 2
    check(rig, 2)


# -- room ------------------------------------------------------------------------------------------


@pytest.fixture
def small() -> Iterator[Path]:
    """A btrfs that is soon full: of data and metadata at once, as both lie together."""
    with btrfs.volume(64 << 20, "--mixed") as place:
        yield place


def data(path: Path) -> None:
    """Something that takes room for data."""
    path.write_bytes(os.urandom(1 << 20))


def metadata(path: Path) -> None:
    """Something that takes room for metadata, and none for data."""
    path.symlink_to("x" * 3000)


def fill(directory: Path, make: Callable[[Path], None]) -> None:
    """Make things until there is no more room, none of them by half."""
    for number in range(100_000):
        path = directory / f"{make.__name__}{number}"
        try:
            make(path)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            path.unlink(missing_ok=True)
            return
    raise AssertionError("there is no end of room")


def test_a_full_file_system(small: Path, tmp_path: Path) -> None:
    """It is backed up, by a btrfs snapshot or without, and goes on when there is room again."""
    tree = btrfs.subvolume(small / "tree")
    directories = [tree / "large", tree / "small"]
    for directory in directories:
        directory.mkdir()
    rig = Rig(tmp_path, [tree], source="btrfs", block_size=128 << 10, max_pack_bytes=16 << 20)
    rig.sync()
    fill(directories[0], data)
    fill(directories[1], metadata)
    os.sync()
    assert not rig.sync().unreadable
    assert not difference(rig.contents(2), contents_of_tree(tree))
    shutil.rmtree(directories[0])  # its room is not free as long as the base holds it
    for number in range(3, 20):
        assert not rig.sync(force=True).unreadable
        assert not difference(rig.contents(number), contents_of_tree(tree))
        if not rig.notes:
            return
        btrfs.run("btrfs", "filesystem", "sync", small)  # which lets it clean up what is gone
    raise AssertionError(rig.notes)


def test_no_room_for_one_of_two_snapshots(rig: Rig) -> None:
    """The other one is not left behind; the tree itself is scanned."""
    nested = btrfs.subvolume(rig.tree / "nested")
    (nested / "file").write_text("file")
    base = held(rig)
    with pytest.MonkeyPatch.context() as patch:
        snapshot = ioctl.snapshot

        def fail(source: bytes, target: bytes) -> None:
            if source.endswith(b"nested"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            snapshot(source, target)

        patch.setattr(ioctl, "snapshot", fail)
        result = rig.sync()
    assert "the tree itself is scanned" in rig.notes[0]
    assert "nested (No space left on device)" in rig.notes[0]
    assert result.snapshot is not None
    assert (result.snapshot.source, result.snapshot.consistent) == ("scan", False)
    assert not difference(rig.contents(2), contents_of_tree(rig.tree))
    assert len(base) == 1
    assert not held(rig), "of no use any more"
    rig.sync(force=True)
    assert not difference(rig.contents(3), contents_of_tree(rig.tree))
    assert len(held(rig)) == 2


def test_a_swap_file_in_use(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what holds one no snapshot can be taken."""
    monkeypatch.setattr(ioctl, "snapshot", fails_with(errno.ETXTBSY))
    rig.sync()
    assert "tree (a swap file in it is in use: " in rig.notes[0]


def test_snapshots_that_cannot_be_deleted(rig: Rig) -> None:
    """As where a quota is exceeded. Each sync says so once, and tries again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ioctl, "delete", fails_with(errno.EDQUOT))
        for number in range(3):
            rig.sync()
            (note,) = rig.notes
            assert f"{HOLDING.decode()}/" in note
            assert "(Disk quota exceeded). It takes up room until" in note
            change(rig.tree, number + 2)
    assert len(held(rig)) == 4
    check(rig, 5)


def fails_with(number: int) -> Callable[..., None]:
    """A call that does."""

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_file_system_that_is_read_only(rig: Rig, volume: Path, tmp_path: Path) -> None:
    """No snapshot can be taken, so the tree itself is scanned."""
    rig.repository.local.close()
    for name in ("repository", "machines"):
        shutil.copytree(volume / name, tmp_path / name)
    rig = Rig(tmp_path, rig.sources, source="btrfs")
    btrfs.run("mount", "-o", "remount,ro", volume)
    check(rig, 2, notes="Read-only file system")
    btrfs.run("mount", "-o", "remount,rw", volume)
    change(rig.tree, 2)
    check(rig, 3, notes="belongs to snapshot 1")  # which could not be deleted
    change(rig.tree, 3)
    check(rig, 4)


# -- another subvolume -----------------------------------------------------------------------------


def test_a_source_that_is_rolled_back(rig: Rig, volume: Path) -> None:
    """A snapshot of it takes its place, in which empty directories stand for those of cloudfs."""
    btrfs.run("btrfs", "subvolume", "snapshot", rig.tree, volume / "earlier")
    check(rig, 2)
    change(rig.tree, 2)
    check(rig, 3)
    rig.tree.rename(volume / "later")
    btrfs.run("btrfs", "subvolume", "snapshot", volume / "earlier", rig.tree)
    assert held(rig), "that snapshot has one"
    check(rig, 4, notes="another subvolume took the place of one")
    change(rig.tree, 3)
    check(rig, 5)
    rig.source = "scan"
    change(rig.tree, 4)
    rig.sync()
    assert not rig.notes
    assert not held_place(rig).exists()


# -- clocks ----------------------------------------------------------------------------------------


def test_a_clock_that_is_set_back(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers and times of snapshots go on; what changed is found, also by a scan."""
    real = time.time_ns
    for number, days in enumerate((-1, -400, 400, -1, 0), 2):
        clock = lambda days=days: real() + days * DAY_NS  # noqa: E731
        monkeypatch.setattr(time, "time_ns", clock)
        rig.repository.clock_ns = clock
        check(rig, number)
        change(rig.tree, number)
    for place in held(rig):
        btrfs.run("btrfs", "subvolume", "delete", place)
    check(rig, 7, notes="is gone")
    history = rig.history()
    times = [record.time_ns for record in history.snapshots]
    history.repository.local.close()
    assert times == sorted(set(times))
