"""Trees that are mounted live, and what is seldom: mounts within, directories too deep for a path,
files that can only be appended to, processes that were there before."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from cloudfs.db.marked import MarkedSet
from cloudfs.fuse.live.tracking import State
from cloudfs.source.live import session
from cloudfs.source.live.protocol import MARKS
from tests.engine import loops
from tests.engine.btrfs import run
from tests.engine.living import Living, Meanwhile, living
from tests.engine.rig import contents_of_tree, difference
from tests.engine.test_live_faults import (
    MIB,
    at_once,
    ended,
    last_contents,
    sync_by_marks,
    sync_by_scan,
)


@pytest.fixture
def rig(mounted: Living) -> Living:
    return mounted


@contextlib.contextmanager
def on_ext4(base: Path) -> Iterator[Living]:
    """A rig on a file system that can do more than one in memory."""
    with loops.file_system(base, "ext4", 64 * MIB) as place:
        (place / "base").mkdir()
        with living(place / "base") as rig:
            yield rig


# -- who was there before --------------------------------------------------------------------------


PROGRAM = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
how = sys.argv[1]
if how != "in":
    file = open("file", "r+b", buffering=0)
    os.chdir("/")
if how == "mapped":
    address = libc.mmap(None, 4096, 3, 1, file.fileno(), 0)
    file.close()
print("there", flush=True)
for line in sys.stdin:
    text = line.strip().encode()
    if how == "in":
        open(text, "wb").write(text)
    elif how == "open":
        os.pwrite(file.fileno(), text, 0)
    else:
        ctypes.memmove(address, text, len(text))
        libc.msync(ctypes.c_void_p(address), 4096, 4)
    print("done", flush=True)
"""


@contextlib.contextmanager
def somebody(place: Path, how: str) -> Iterator[Callable[[str], None]]:
    """A process that is in a directory, or has a file in it open or mapped; it writes what it is
    told to write."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how],
        cwd=place,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout
        assert stdout.readline() == "there\n"

        def write(text: str) -> None:
            stdin.write(f"{text}\n")
            assert stdout.readline() == "done\n"

        yield write
        stdin.close()


@pytest.mark.parametrize(
    ("how", "words"),
    [("in", "tree/place"), ("open", "file open"), ("mapped", "file mapped")],
)
def test_who_was_there_before_goes_past_the_mount(base: Path, how: str, words: str) -> None:
    """What such a process does is found by scans, till one was made after it had ended."""
    with on_ext4(base) as rig:
        rig.unmount()
        place = rig.tree / "place"
        place.mkdir()
        (place / "file").write_bytes(b"-" * mmap.PAGESIZE)
        with somebody(place, how) as write:
            rig.mount()
            for number in range(3):
                write(f"text{number}")
                made = rig.sync().snapshot
                assert made is not None
                assert not made.consistent
                assert f"{words} since before the tree was mounted live" in rig.notes[-1]
                assert not difference(last_contents(rig), contents_of_tree(rig.beneath))
            write("the last")
        sync_by_scan(rig, words)
        (rig.tree / "more").write_text("text")
        sync_by_marks(rig)


# -- mounts within ---------------------------------------------------------------------------------


@pytest.mark.parametrize("left_out", [False, True])
def test_what_was_mounted_in_the_tree_since_is_named(base: Path, *, left_out: bool) -> None:
    with living(base) as rig:
        rig.filters = type(rig.filters)(excludes=("/drive",) if left_out else ())
        place = rig.tree / "drive"
        place.mkdir()
        rig.sync()
        run("mount", "-t", "tmpfs", "drive", place)
        try:
            (place / "file").write_text("text")
            (rig.tree / "beside").write_text("text")
            rig.sync()
            told = [f"{place} since the tree was mounted live" in note for note in rig.notes]
            assert told == ([] if left_out else [True])
            assert b"/drive/file" not in last_contents(rig)
        finally:
            run("umount", place)


def test_one_directory_at_two_places(base: Path) -> None:
    """A change would be told of one of them."""
    with living(base) as rig:
        rig.unmount()
        for name in ("one", "two"):
            (rig.tree / name).mkdir()
        run("mount", "--bind", rig.tree / "one", rig.tree / "two")
        rig.mount()
        for number in range(2):
            (rig.tree / "one" / f"{number}").write_text("text")
            rig.sync()
            assert not number or "shows what" in rig.notes[-1]
            assert b"/two/%d" % number in last_contents(rig)
        rig.unmount()
        run("umount", "-l", rig.tree / "two")


def test_a_drive_of_some_user_gains_no_rights(base: Path) -> None:
    """It forbids what the live mount allows, and came later: it is not entered."""
    with living(base) as rig:
        rig.unmount()
        elsewhere = base / "elsewhere"
        elsewhere.mkdir()
        for name in ("allowed", "forbidden"):
            (rig.tree / name).mkdir()
        run("mount", "--bind", base, base)
        run("mount", "--make-shared", base)
        rig.mount(mountpoint=str(elsewhere))
        try:
            run("mount", "-t", "tmpfs", "-o", "nosuid,nodev", "drive", rig.tree / "forbidden")
            (rig.tree / "forbidden/file").write_text("text")
            with pytest.raises(OSError, match="cross-device") as refused:
                os.stat(elsewhere / "forbidden")
            assert refused.value.errno == errno.EXDEV
            run("umount", rig.tree / "forbidden")
            assert os.listdir(elsewhere / "forbidden") == []
        finally:
            run("umount", elsewhere)
            assert rig.daemon is not None
            rig.daemon.wait(20)
            rig.daemon = None
            run("umount", "-l", base)


def test_a_mount_that_was_taken_away_while_it_is_used(rig: Living) -> None:
    with (rig.tree / "file").open("w"):
        rig.take_away_once(lazy=True)
        (rig.tree / "beneath").write_text("text")
        sync_by_scan_of_the_tree(rig)
    assert rig.daemon is not None
    rig.daemon.wait(20)
    rig.daemon = None


def sync_by_scan_of_the_tree(rig: Living) -> None:
    made = rig.sync().snapshot
    assert made is not None
    assert "was unmounted, and is only there for" in rig.notes[0]
    assert not difference(last_contents(rig), contents_of_tree(rig.tree))


def test_marks_end_with_their_mount(rig: Living) -> None:
    """So none is believed by a mount that is killed, or one after it, as it begins."""
    (rig.tree / "file").write_text("text")
    rig.sync()
    rig.unmount()
    with contextlib.closing(MarkedSet(rig.place / MARKS)) as marks:
        state = msgspec.msgpack.decode(marks.state(), type=State)
    assert state.base is not None
    assert state.mount == ""


# -- names and files -------------------------------------------------------------------------------


def test_directories_deeper_than_a_path_can_be(rig: Living) -> None:
    fds = [os.open(rig.tree, os.O_RDONLY)]
    for _ in range(30):
        os.mkdir("x" * 200, dir_fd=fds[-1])
        fds.append(os.open("x" * 200, os.O_RDONLY, dir_fd=fds[-1]))
    for number in range(3):
        for depth in (-1, -2):
            fd = os.open(f"file{number}", os.O_CREAT | os.O_WRONLY, dir_fd=fds[depth])
            os.write(fd, b"text")
            os.close(fd)
        made = rig.sync().snapshot
        assert made is not None
        assert made.stats.files == 2 * (number + 1)
        assert number == 0 or rig.notes == []
    for fd in fds:
        os.close(fd)


def test_a_file_that_can_only_be_appended_to(base: Path) -> None:
    with on_ext4(base) as rig:
        path = rig.tree / "log"
        path.write_text("one\n")
        run("chattr", "+a", rig.beneath / "log")
        try:
            rig.sync()
            with path.open("a") as file:
                file.write("two\n")
            assert path.read_text() == "one\ntwo\n"
            with pytest.raises(PermissionError):
                path.open("r+")
            sync_by_marks(rig)
        finally:
            run("chattr", "-a", rig.beneath / "log")


def test_holes_that_are_cut_off_need_no_room(base: Path, meanwhile: Meanwhile) -> None:
    with living(base) as rig:
        rig.unmount()
        rig.room_bytes = MIB
        rig.mount()
        path = rig.tree / "sparse"
        with path.open("wb") as file:
            for at in (0, 1 << 33):
                file.seek(at)
                file.write(b"data")
            file.truncate(1 << 34)
        model = contents_of_sparse(path)

        def cut() -> None:
            threads = at_once(lambda _: os.truncate(path, 10), 1)
            assert ended(threads)
            with path.open("r+b") as file:
                file.seek(1 << 33)
                file.write(b"other")

        meanwhile.when_frozen = cut
        made = rig.sync().snapshot
        meanwhile.when_frozen = lambda: None
        assert made is not None
        assert made.consistent
        view = rig.history().view(made.number)
        meta = view.resolve(b"sparse")
        assert (meta.size, meta.lin > 0) == (1 << 34, True)
        assert model == {0: b"data", 1 << 33: b"data"}


def contents_of_sparse(path: Path) -> dict[int, bytes]:
    with path.open("rb") as file:
        found = {}
        for at in (0, 1 << 33):
            file.seek(at)
            found[at] = file.read(4)
        return found


def test_directories_that_cannot_be_removed_are_not_gone(base: Path, meanwhile: Meanwhile) -> None:
    with living(base) as rig:
        (rig.tree / "full/within").mkdir(parents=True)

        def try_to_remove() -> None:
            limit = os.sysconf("SC_OPEN_MAX")
            for _ in range(min(limit, 20_000) // 2 + 10):
                with contextlib.suppress(OSError):
                    os.rmdir(rig.tree / "full")

        meanwhile.when_frozen = try_to_remove
        made = rig.sync().snapshot
        assert made is not None
        assert made.consistent


def test_what_was_written_through_a_mapping_that_is_read_only_now(rig: Living) -> None:
    path = rig.tree / "mapped"
    path.write_bytes(b"-" * mmap.PAGESIZE)
    rig.sync()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
        shared[:7] = b"written"
        held = ctypes.c_char.from_buffer(shared)
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.c_void_p(ctypes.addressof(held))
        assert libc.mprotect(address, ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ) == 0
        rig.sync()
        assert last_contents(rig)[b"/mapped"][-1].startswith(b"written")  # type: ignore[index]
        del held


def test_what_cannot_be_told_after_the_freeze_is_frozen_anew(
    rig: Living, meanwhile: Meanwhile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then all is scanned, of which not all was to be kept."""
    path = rig.tree / "large"
    path.write_bytes(b"as it was" * MIB)  # so large that its record is in doubt, and it is read
    rig.sync()
    monkeypatch.setattr(session, "_changelist", lambda line: (None, "as this test wants it"))
    (rig.tree / "beside").write_text("text")

    def overwrite() -> None:
        with path.open("r+b") as file:
            file.write(b"it is another")

    meanwhile.when_frozen = overwrite
    made = rig.sync().snapshot
    assert made is not None
    assert (made.source, made.consistent) == ("scan", True)
    assert last_contents(rig)[b"/large"][-1].startswith(b"as it was")  # type: ignore[index]
