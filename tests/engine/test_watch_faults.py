"""What a watch daemon cannot hear is found another way, or the sync scans and says why."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import msgspec
import pytest

from cloudfs.backup.publish import Publisher
from cloudfs.core.errors import SourceError, Unavailable
from cloudfs.db.watched import Place, WatchedSet
from cloudfs.source import handles, listing, scan, unseen
from cloudfs.source.filters import Filters
from cloudfs.source.inode import Inode
from cloudfs.source.scan import Scanner
from cloudfs.source.watch import client, start
from cloudfs.source.watch.resolve import Resolver
from tests.engine import loops
from tests.engine.btrfs import run
from tests.engine.watched import Watched, heard, settle
from tests.fuse.conftest import wait_until


def scanned(rig: Watched, reason: str) -> None:
    """The next sync scans for a reason that it tells, and the one after it does not."""
    rig.sync()
    assert [note for note in rig.notes if "is scanned" in note and reason in note], rig.notes
    rig.check()
    (rig.tree / "afterwards").write_text(reason)
    heard(rig)


# -- what the daemon cannot tell --------------------------------------------------------------


def test_a_daemon_killed_between_event_and_record(watched: Watched) -> None:
    settle(watched)
    os.kill(watched.daemon, signal.SIGSTOP)
    (watched.tree / "file").write_text("nobody wrote this down")
    watched.kill()
    watched.start()
    scanned(watched, "only since after the last snapshot")


def test_a_daemon_that_does_not_run(watched: Watched) -> None:
    settle(watched)
    watched.kill()
    (watched.tree / "file").write_text("unheard")
    watched.sync()
    assert "no daemon watches it. Start one: cloudfs watch home" in watched.notes[0]
    watched.check()


def test_a_daemon_that_does_not_answer(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(watched)
    (watched.tree / "file").write_text("text")
    os.kill(watched.daemon, signal.SIGSTOP)
    monkeypatch.setattr(client.ask, "__defaults__", (0.5,))
    watched.sync()
    assert "does not answer" in watched.notes[0]
    watched.check()
    monkeypatch.undo()
    os.kill(watched.daemon, signal.SIGCONT)
    (watched.tree / "file").write_text("more text")
    scanned(watched, "another snapshot")


def test_a_daemon_that_dies_while_a_sync_runs(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one in its place must not take the snapshot for its own base."""
    settle(watched)
    (watched.tree / "file").write_text("text")
    real = Scanner.revisit

    def replacing(self: Scanner, *what: object, **more: object) -> object:
        if watched.daemon:
            watched.kill()
            (watched.tree / "unheard").write_text("between two daemons")
            watched.start()
            watched.daemon_was_replaced = True
        return real(self, *what, **more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Scanner, "revisit", replacing)
        patch.setattr(Watched, "daemon_was_replaced", False, raising=False)
        watched.sync()
        assert watched.daemon_was_replaced  # type: ignore[attr-defined]
    scanned(watched, "only since after the last snapshot")


def test_a_daemon_that_is_replaced_before_a_sync_reads_what_it_heard(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(watched)
    (watched.tree / "file").write_text("text")
    real = WatchedSet.__init__

    def replacing(self: WatchedSet, *what: Any, **more: Any) -> None:
        watched.kill()
        watched.start()
        real(self, *what, **more)

    with monkeypatch.context() as patch:
        patch.setattr(WatchedSet, "__init__", replacing)
        watched.sync()
    assert "taken the place" in watched.notes[0]
    watched.check()


READING = """
import sys, time
from pathlib import Path
from cloudfs.db.watched import WatchedSet

heard = WatchedSet(Path(sys.argv[1]), writer=False).directories(0, 1 << 31)
next(heard)
print("reading", flush=True)
time.sleep(60)
"""


def test_a_sync_killed_while_it_reads_what_was_heard(watched: Watched) -> None:
    """It holds no room in the set for ever."""
    settle(watched)
    (watched.tree / "file").write_text("text")
    watched.state()  # so that it is in the set
    arguments = [sys.executable, "-c", READING, watched.place / "events"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "reading\n"
        assert str(reader.pid) in readers(watched)
        reader.kill()
    heard(watched)
    assert str(reader.pid) not in readers(watched)


def readers(rig: Watched) -> list[str]:
    """The process ids of those who read the set, or are taken for such."""
    with lmdb.open(str(rig.place / "events"), readonly=True, max_dbs=2) as opened:
        return [line.split()[0] for line in opened.readers().splitlines()[1:]]


def test_what_was_heard_is_removed(watched: Watched) -> None:
    settle(watched)
    shutil.rmtree(watched.place / "events")
    (watched.tree / "file").write_text("text")
    watched.sync()
    assert "cannot be read" in watched.notes[0]
    assert "Start it anew: cloudfs watch home" in watched.notes[0]
    watched.check()


def test_a_queue_that_overflows(watched: Watched) -> None:
    watched.kill()
    watched.start(unlimited=False)
    settle(watched)
    os.kill(watched.daemon, signal.SIGSTOP)
    limit = int(Path("/proc/sys/fs/fanotify/max_queued_events").read_text())
    for number in range(limit // 2 + 10):
        name = watched.tree / str(number)
        name.touch()
        name.unlink()
    (watched.tree / "last").write_text("lost")
    os.kill(watched.daemon, signal.SIGCONT)
    scanned(watched, "overflowed")


def test_a_file_system_that_was_mounted_anew(own_volume: Path, tmp_path: Path) -> None:
    """Unmounting, which the daemon does not hinder, ends its hearing without an event."""
    (own_volume / "tree").mkdir()
    rig = Watched(tmp_path, sources=[own_volume / "tree"])
    rig.start()
    settle(rig)
    rig.repository.local.close()
    run("umount", own_volume)
    run("mount", "-o", "loop", own_volume.with_name("ext4.img"), own_volume)
    (rig.tree / "file").write_text("unheard")
    rig.sync()
    assert "is not watched" in rig.notes[0]
    rig.check()
    rig.kill()
    rig.start()
    rig.sync()
    (rig.tree / "more").write_text("heard")
    heard(rig)
    rig.kill()
    rig.repository.local.close()


def test_a_mount_within_that_comes_and_goes(watched: Watched, own_volume: Path) -> None:
    (watched.tree / "within").mkdir()
    (watched.tree / "within" / "hidden").write_text("hidden")
    settle(watched)
    (own_volume / "shown").write_text("shown")
    run("mount", "--bind", own_volume, watched.tree / "within")
    try:
        watched.sync()
        assert "within is not watched" in watched.notes[0]
        watched.check()
        watched.kill()
        watched.start()
        settle(watched)
        (watched.tree / "within" / "shown").write_text("more")
        (watched.tree / "within" / "new").mkdir()
        (watched.tree / "beside").write_text("beside")
        heard(watched)
    finally:
        run("umount", watched.tree / "within")
    scanned(watched, "is another one than before")


def test_another_directory_in_the_place_of_the_source(watched: Watched) -> None:
    settle(watched)
    aside = watched.tree.with_name("aside")
    watched.tree.rename(aside)
    watched.tree.mkdir()
    (watched.tree / "file").write_text("of another tree")
    scanned(watched, "is another one than before")


# -- what is heard all the same ---------------------------------------------------------------


@contextlib.contextmanager
def overlaid(watched: Watched, tmp_path: Path) -> Iterator[Path]:
    """A directory of the tree as the upper one of an overlay, as containers have it."""
    lower, work, place = tmp_path / "lower", watched.tree.with_name("work"), tmp_path / "place"
    upper = watched.tree / "upper"
    for directory in (lower, upper, work, place):
        directory.mkdir(exist_ok=True)
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    run("mount", "-t", "overlay", "-o", options, "overlay", place)
    try:
        yield place
    finally:
        run("umount", "-l", place)


def test_changes_through_other_mounts(watched: Watched, tmp_path: Path) -> None:
    """A bind mount, another mount namespace, an overlay above the tree."""
    (watched.tree / "upper").mkdir()
    (watched.tree / "upper" / "below").write_text("below")
    settle(watched)
    place = tmp_path / "elsewhere"
    place.mkdir()
    run("mount", "--bind", watched.tree, place)
    try:
        (place / "bound").write_text("through a bind mount")
        (place / "moved").mkdir()
    finally:
        run("umount", place)
    heard(watched)
    script = 'mount --bind "$0" "$1" && echo text > "$1"/namespace && mkdir "$1"/moved/in'
    run("unshare", "-m", "sh", "-c", script, watched.tree, place)
    heard(watched)
    with overlaid(watched, tmp_path) as place:
        (place / "made").write_text("through an overlay")
        with (place / "below").open("a") as file:
            file.write(" and more")
    heard(watched)


def test_a_mapping_through_an_overlay(watched: Watched, tmp_path: Path) -> None:
    """The one who has mapped the file knows it by another inode."""
    (watched.tree / "upper" / "in").mkdir(parents=True)
    (watched.tree / "upper" / "in" / "mapped").write_bytes(b"x" * 10_000)
    settle(watched)
    with overlaid(watched, tmp_path) as place:
        with (place / "in" / "mapped").open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
        for turn in b"abc":
            mapped[5000] = turn
            heard(watched)
        mapped[5000] = 0
        mapped.close()
        heard(watched)


def test_asynchronous_writes_and_loops_through_an_overlay(watched: Watched, tmp_path: Path) -> None:
    (watched.tree / "upper").mkdir()
    for name in ("database", "image"):
        (watched.tree / "upper" / name).write_bytes(b"x" * (1 << 20))
    settle(watched)
    with overlaid(watched, tmp_path) as place:
        with (place / "database").open("r+b") as file, asynchronous() as ring:
            for turn in range(3):
                write_asynchronously(ring, file.fileno(), b"turn %d" % turn, 4000)
                time.sleep(0.05)
                heard(watched)
        setup = subprocess.run(
            ["losetup", "-f", "--show", place / "image"], check=True, capture_output=True, text=True
        )
        device = setup.stdout.strip()
        try:
            fd = os.open(device, os.O_WRONLY)
            for turn in range(3):
                os.pwrite(fd, b"turn %d" % turn, 8192)
                os.fsync(fd)
                time.sleep(0.05)
                heard(watched)
            os.close(fd)
        finally:
            run("losetup", "-d", device)


def test_a_mapping_that_stays(watched: Watched) -> None:
    """Every sync reads what is mapped shared and writable, though its times need not change."""
    path = watched.tree / "mapped"
    path.write_bytes(b"x" * 10_000)
    settle(watched)
    with path.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    for turn in b"abc":
        mapped[5000] = turn
        heard(watched)
    mapped.close()
    mapped_again = watched.sync()
    assert mapped_again.snapshot is None


def test_a_mapping_that_ended(watched: Watched) -> None:
    """Nothing is told of what was written through it while the file stays open."""
    path = watched.tree / "mapped"
    path.write_bytes(b"x" * 10_000)
    time.sleep(0.05)  # so that it is not read just because it is fresh
    settle(watched)
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0) as mapped:
            mapped[5000] = 1
        heard(watched)
        with mmap.mmap(file.fileno(), 0) as mapped:
            mapped[5000] = 2
            heard(watched)
            mapped[5000] = 3  # which moves no times
        heard(watched)
        assert watched.sync().snapshot is None


def test_a_mapping_that_is_no_longer_writable(watched: Watched) -> None:
    path = watched.tree / "mapped"
    path.write_bytes(b"x" * 8192)
    time.sleep(0.05)
    settle(watched)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = address = ctypes.c_void_p
    libc.mprotect.argtypes = address, ctypes.c_size_t, ctypes.c_int
    libc.munmap.argtypes = address, ctypes.c_size_t
    with path.open("r+b") as file:
        readable, both = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
        mapped = libc.mmap(None, 8192, both, mmap.MAP_SHARED, file.fileno(), ctypes.c_long(0))
    ctypes.memset(mapped, 0, 100)
    assert libc.mprotect(mapped, 8192, readable) == 0
    heard(watched)
    assert libc.munmap(mapped, 8192) == 0


def test_asynchronous_writes(watched: Watched) -> None:
    """Nothing is told of them until the file is closed."""
    path = watched.tree / "database"
    path.write_bytes(b"x" * 10_000)
    settle(watched)
    with path.open("r+b") as file:
        with asynchronous() as ring:
            for turn in range(3):
                write_asynchronously(ring, file.fileno(), b"turn %d" % turn, 4000)
                time.sleep(0.05)  # so that the file's times differ from those of the last turn
                heard(watched)
            write_asynchronously(ring, file.fileno(), b"the last", 4000)
        heard(watched)


@contextlib.contextmanager
def asynchronous() -> Iterator[ctypes.c_ulong]:
    """A ring for asynchronous requests."""
    setup, destroy = {"x86_64": (206, 207), "aarch64": (0, 1)}[platform.machine()]
    libc = ctypes.CDLL(None, use_errno=True)
    ring = ctypes.c_ulong(0)
    assert libc.syscall(setup, 8, ctypes.byref(ring)) == 0
    try:
        yield ring
    finally:
        libc.syscall(destroy, ring)


def write_asynchronously(ring: ctypes.c_ulong, fd: int, data: bytes, offset: int) -> None:
    """Write by io_submit."""
    submit, getevents = {"x86_64": (209, 208), "aarch64": (2, 4)}[platform.machine()]
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(data)
    pwrite = 1
    request = ctypes.create_string_buffer(
        struct.pack(
            "=QIIHhIQQq16x", 0, 0, 0, pwrite, 0, fd, ctypes.addressof(buffer), len(data), offset
        )
    )
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(request))
    assert libc.syscall(submit, ring, 1, pointers) == 1
    event = ctypes.create_string_buffer(32)
    assert libc.syscall(getevents, ring, 1, 1, event, None) == 1
    assert struct.unpack_from("=QQqq", event.raw)[2] == len(data)


def test_the_file_behind_a_loop_device(watched: Watched, tmp_path: Path) -> None:
    image = watched.tree / "image"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    run("mkfs.ext4", "-q", image)
    settle(watched)
    place = tmp_path / "inner"
    place.mkdir()
    run("mount", "-o", "loop", image, place)
    try:
        for turn in range(2):
            (place / "file").write_text(f"turn {turn}")
            os.sync()
            heard(watched)
    finally:
        run("umount", place)


def test_a_loop_device_of_another_namespace(watched: Watched, tmp_path: Path) -> None:
    """The path that the kernel shows is one of where the device was set up."""
    image, place = watched.tree / "image", tmp_path / "elsewhere"
    image.write_bytes(b"x" * (1 << 20))
    place.mkdir()
    settle(watched)
    script = 'mount --bind "$0" "$1" && losetup -f --show "$1"/image'
    command = ["unshare", "-m", "sh", "-c", script, watched.tree, place]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        fd = os.open(device, os.O_WRONLY)
        os.pwrite(fd, b"written", 8192)
        os.fsync(fd)
        os.close(fd)
        heard(watched)
    finally:
        run("losetup", "-d", device)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_loop_device_of_which_nothing_is_to_be_seen(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, read_only: bool
) -> None:
    """As in a container; nobody writes to one that is read-only."""
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    settle(watched)
    options = ["-r"] if read_only else []
    command = ["losetup", "-f", "--show", *options, image]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    real = unseen._behind

    def behind(asked: str, path: bytes) -> Inode:
        if asked == device:
            raise FileNotFoundError(asked)
        return real(asked, path)

    monkeypatch.setattr(unseen, "_behind", behind)
    try:
        (watched.tree / "file").write_text("text")
        if read_only:
            heard(watched)
        else:
            watched.sync()
            assert f"the file behind {device} cannot be told" in watched.notes[0]
    finally:
        run("losetup", "-d", device)


MAIN_THREAD_ENDS = """
import ctypes, mmap, platform, sys, threading
with open(sys.argv[1], "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 0)
def work():
    sys.stdin.readline()
    mapped[5000] = 1
    print("written", flush=True)
    sys.stdin.readline()
threading.Thread(target=work).start()
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)
"""


def test_a_mapping_of_a_process_whose_main_thread_ended(watched: Watched) -> None:
    """Its other threads go on; what is mapped is seen in them alone."""
    path = watched.tree / "mapped"
    path.write_bytes(b"x" * 10_000)
    command = [sys.executable, "-c", MAIN_THREAD_ENDS, path]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin
        assert process.stdout
        wait_until(lambda: "(zombie)" in Path(f"/proc/{process.pid}/status").read_text())
        settle(watched)
        print(file=process.stdin, flush=True)
        assert process.stdout.readline() == "written\n"
        heard(watched)
        process.communicate("\n")


@contextlib.contextmanager
def without_capability(number: int) -> Iterator[None]:
    """This thread, without one of its capabilities in effect."""
    libc = ctypes.CDLL(None, use_errno=True)
    head = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    assert libc.capget(head, sets) == 0
    place = number // 32 * 3
    sets[place] &= ~(1 << number % 32)
    assert libc.capset(head, sets) == 0
    try:
        yield
    finally:
        sets[place] |= 1 << number % 32
        assert libc.capset(head, sets) == 0


def test_processes_that_may_not_be_looked_into(watched: Watched) -> None:
    settle(watched)
    cap_sys_ptrace = 19
    with without_capability(cap_sys_ptrace):
        watched.sync()
    assert "cannot be seen: permission denied" in watched.notes[0]
    (watched.tree / "file").write_text("text")
    heard(watched)


def test_an_inode_number_that_is_used_again(watched: Watched) -> None:
    """What happens in a directory that has the number of one on record is no news of that one."""
    old = watched.tree / "old"
    old.mkdir()
    (old / "file").write_text("of the old one")
    settle(watched)
    number, again = old.stat().st_ino, 0
    shutil.rmtree(old)
    for turn in range(1000):
        if turn % 100 == 99:
            time.sleep(0.1)  # xfs frees inodes in the background, late where much else is done
        new = watched.tree / f"new{turn}"
        new.mkdir()
        again += new.stat().st_ino == number
        (new / "file").write_text(f"of the new one {turn}")
        if again:
            break
    # xfs gives a number again when it pleases, and then the rest is a test of less.
    assert again or watched.tree.parent.parent.name == "xfs", "the number was not used again"
    (new / "file").rename(new / "renamed")
    heard(watched)
    (new / "more").write_text("more")
    heard(watched)
    for turn in range(3):
        shutil.rmtree(watched.tree / f"new{turn}", ignore_errors=True)
        (watched.tree / f"later{turn}").mkdir()
        (watched.tree / f"later{turn}" / "file").write_text(f"later {turn}")
    heard(watched)


@pytest.mark.parametrize(("times", "scans"), [(3, False), (1 << 30, True)])
def test_a_number_that_is_just_being_given_again(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, times: int, scans: bool
) -> None:
    """ext4 says then that there is no memory, for a moment."""
    for name in ("file", "other"):
        (watched.tree / name).write_text("before")
    (watched.tree / "directory").mkdir()
    settle(watched)
    os.link(watched.tree / "file", watched.tree / "directory/further")  # told of by its handle
    (watched.tree / "other").write_text("after")
    opened, left = handles._open_by_handle_at, times

    def busy(mount_fd: int, handle: bytes, flags: int) -> int:
        nonlocal left
        if left:
            left -= 1
            ctypes.set_errno(errno.ENOMEM)
            return -1
        return int(opened(mount_fd, handle, flags))

    monkeypatch.setattr(handles, "_open_by_handle_at", busy)
    if scans:
        watched.sync()
        assert ["cannot allocate memory" in note for note in watched.notes] == [True]
        watched.check()
    else:
        heard(watched)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("found", [False, True])
def test_a_directory_that_moves_while_a_sync_looks_for_it(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, found: bool, back: bool
) -> None:
    """The next sync hears of its moves, but not of what this one had heard of and could not see."""
    directory = watched.tree / "above/directory"
    directory.mkdir(parents=True)
    (directory / "file").write_text("before")
    settle(watched)
    (directory / "file").write_text("after and longer")
    away = (watched.base if back else watched.tree) / "away"

    step = "changelist" if found else "directory"
    real = getattr(Resolver, step)

    def move_first(*args: object) -> object:
        if directory.exists():
            directory.rename(away)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Resolver, step, move_first)
        (watched.tree / "beside").write_text("so that there is a snapshot")
        assert watched.sync().snapshot is not None
    if back:
        away.rename(directory)
    heard(watched)


@pytest.mark.parametrize("often", [1, 2])
def test_directories_that_change_places_while_they_are_found(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, often: int
) -> None:
    """What changed in each is told of each, though both were found at one place."""
    one, two = watched.tree / "one", watched.tree / "two"
    for directory in (one, two):
        directory.mkdir()
    settle(watched)
    (one / "in one").write_text("one")
    (two / "in two").write_text("two")
    real = Resolver.directory
    found: list[set[bytes]] = []

    def directory(self: Resolver, place: Place, names: set[bytes]) -> None:
        real(self, place, names)
        if names & {b"in one", b"in two"}:
            found.append(names)
            if len(found) <= often:
                one.rename(watched.tree / "third")
                two.rename(one)
                (watched.tree / "third").rename(two)

    with monkeypatch.context() as patch:
        patch.setattr(Resolver, "directory", directory)
        watched.sync()
    assert len(found) == 2
    heard(watched)


def test_an_empty_directory_with_the_number_of_a_full_one(watched: Watched) -> None:
    """Nothing is told of what was in a directory that is gone."""
    place, again = watched.tree / "place", 0
    for turn in range(10):
        (place / "within").mkdir(parents=True)
        for directory in (place, place / "within"):
            (directory / "file").write_text(f"{turn}")
        settle(watched) if not turn else heard(watched)
        number = place.stat().st_ino
        shutil.rmtree(place)
        place.mkdir()
        again += place.stat().st_ino == number
        heard(watched)
        place.rmdir()
        if again:
            break
    assert again or watched.tree.parent.parent.name == "xfs", "the number was not used again"


def test_a_sync_that_fails_forgets_nothing(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(watched)
    (watched.tree / "first").write_text("heard before the sync that fails")

    def failing(*_: object) -> None:
        raise Unavailable("the store is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Publisher, "publish", failing)
        with pytest.raises(Unavailable):
            watched.sync()
    (watched.tree / "second").write_text("heard after it")
    heard(watched)


def test_a_burst_of_events(watched: Watched) -> None:
    burst(watched, 20_000)


@pytest.mark.long
def test_a_burst_of_a_million_events(watched: Watched) -> None:
    burst(watched, 340_000)


def burst(watched: Watched, count: int) -> None:
    """Three events for each of so many names; what they leave behind is in the snapshot."""
    (watched.tree / "kept").write_text("before")
    settle(watched)
    directory = os.open(watched.tree, os.O_RDONLY)
    for number in range(count):
        name = b"%d" % number
        fd = os.open(name, os.O_WRONLY | os.O_CREAT, dir_fd=directory)
        os.write(fd, b"x")
        os.close(fd)
        if number % 1000:
            os.unlink(name, dir_fd=directory)
    os.close(directory)
    (watched.tree / "kept").write_text("after")
    heard(watched)
    peak = Path(f"/proc/{watched.daemon}/status").read_text()
    peak_kb = int(peak.split("VmHWM:")[1].split()[0])
    assert peak_kb < 200_000, "the daemon keeps its set in memory"


def test_directories_deeper_than_a_path_may_be_long(watched: Watched) -> None:
    """Within the tree and beside it."""
    (watched.base / "outside").mkdir()
    tops = [os.open(top, os.O_RDONLY) for top in (watched.tree, watched.base / "outside")]
    deep = [make_deep(top) for top in tops]
    settle(watched)
    for number, text in enumerate((b"one", b"two and more"), 2):
        for fd in deep:
            write(fd, text)
        result = watched.sync()
        assert watched.notes == []
        assert not result.unreadable
        path = b"/" + b"/".join([DEEP] * LEVELS) + b"/file"
        assert watched.contents(number)[path][-1] == text  # type: ignore[index]
    write(deep[1], b"three")
    assert watched.sync().snapshot is None
    assert watched.notes == []
    for fd in (*deep, *tops):
        os.close(fd)


DEEP, LEVELS = b"d" * 200, 25


def make_deep(top: int) -> int:
    """A directory so deep that the kernel takes and tells no path of it at once."""
    fd = os.dup(top)
    for _ in range(LEVELS):
        os.mkdir(DEEP, dir_fd=fd)
        below = os.open(DEEP, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    return fd


def write(directory: int, text: bytes) -> None:
    fd = os.open("file", os.O_CREAT | os.O_TRUNC | os.O_WRONLY, dir_fd=directory)
    os.write(fd, text)
    os.close(fd)


@pytest.mark.parametrize("excludes", [(), ("doc/",), ("/cache/doc",)])
def test_a_mount_that_cannot_be_looked_at(watched: Watched, excludes: tuple[str, ...]) -> None:
    """Where it is not left out it is reported each time, and the sync does not scan for that."""
    watched.filters = Filters(excludes)
    (watched.tree / "cache" / "doc").mkdir(parents=True)
    (watched.tree / "cache" / "file").write_text("before")
    found = [] if excludes else [(b"cache/doc", "permission denied")]
    with loops.mount_of_another(watched.tree / "cache" / "doc"):
        assert watched.sync().unreadable == found
        assert watched.sync().unreadable == found
        assert watched.notes == []
        (watched.tree / "cache" / "file").write_text("after")
        result = watched.sync()
        assert watched.notes == []
        assert result.unreadable == found
        assert watched.contents(2)[b"/cache/file"][-1] == b"after"  # type: ignore[index]
    if not excludes:
        heard(watched)


def test_attributes_within_one_tick_of_the_clock(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is no file too: nothing else than its time stamps would tell."""
    real, second = listing.raw_entry, time.time_ns() // 10**9 * 10**9

    def coarse(*entry: Any) -> Any:
        raw = list(real(*entry))
        raw[8] = second  # ctime
        return tuple(raw)

    monkeypatch.setattr(scan, "raw_entry", coarse)
    monkeypatch.setattr(listing, "raw_entry", coarse)
    monkeypatch.setattr(scan, "COARSE_TICK_NS", 10**12)
    names = [watched.tree / name for name in ("directory", "fifo", "link")]
    names[0].mkdir()
    os.mkfifo(names[1])
    names[2].symlink_to("nowhere")
    settle(watched)
    for turn in b"1", b"2":
        for path in names:
            os.setxattr(path, "trusted.turn", turn, follow_symlinks=False)
        heard(watched)


def test_clocks_that_go_back(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    (watched.tree / "file").write_text("before")
    settle(watched)
    day_ns = 86_400_000_000_000
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() - day_ns)
    (watched.tree / "file").write_text("after!")
    os.utime(watched.tree / "file", ns=(1, real() - 2 * day_ns))
    heard(watched)


def test_a_tree_on_several_file_systems(local_volume: Path, own_volume: Path) -> None:
    base = Path(tempfile.mkdtemp(dir=local_volume))
    sources = [base / "one", own_volume / "two", base / "three"]
    for source in sources:
        (source / "in").mkdir(parents=True)
        (source / "in" / "file").write_text("before")
    rig = Watched(base, sources=sources)
    rig.start()
    settle(rig)
    for source in sources:
        (source / "in" / "file").write_text("after")
        (source / "new").write_text("new")
    result = rig.sync()
    assert rig.notes == []
    assert (result.new, result.changed) == (3, 6)  # each file, and the source in which one is new
    found = rig.contents(2)
    for source in sources:
        at = b"/" + os.fsencode(source.name)
        assert found[at + b"/in/file"][-1] == b"after"  # type: ignore[index]
        assert found[at + b"/new"][-1] == b"new"  # type: ignore[index]
    rig.kill()
    rig.repository.local.close()


# -- what cannot be watched -------------------------------------------------------------------


def test_two_daemons_of_one_policy(watched: Watched) -> None:
    with pytest.raises(SourceError, match="watched already"):
        watched.start()


def test_file_systems_that_cannot_be_watched(base: Path, tmp_path: Path) -> None:
    job = start.job_for("home", tmp_path / "place", [os.fsencode(base)], Filters())
    with pytest.raises(SourceError, match=r"/proc cannot be watched .*--snapshot scan"):
        start.start(msgspec.structs.replace(job, paths=[b"/proc"]))


# -- reading what changes ---------------------------------------------------------------------


def test_a_file_that_changes_while_it_is_read(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a reflink, where there are such, it is read as it was at one moment."""
    path = watched.tree / "busy"
    path.write_bytes(b"0" * 50_000)
    real, turn = os.preadv, iter(range(1, 1000))

    def touching(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset:
            path.write_bytes(b"%d" % (next(turn) % 10) * 50_000)
        return real(fd, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", touching)
        result = watched.sync()
    found = watched.contents(1)[b"/busy"][-1]  # type: ignore[index]
    names = {entry.name for entry in watched.tree.iterdir()}
    assert names == {"busy"}
    if "xfs" in str(watched.base):
        assert not result.unreadable
        assert len(found) == 50_000
        assert len(set(found)) == 1, "the data is of more than one moment"
    else:
        assert result.unreadable == [(b"busy", "changed while it was read")]
    watched.sync()
    (watched.tree / "other").write_text("other")
    heard(watched)
