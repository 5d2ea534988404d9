"""A live mount when something goes wrong: never an error to who writes but the file system's own,
never a change that is missed."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cloudfs.cli.errors import EXIT_CODES
from cloudfs.core.errors import CloudfsError, SourceError, UsageError
from cloudfs.fuse import mountpoint as places
from cloudfs.fuse.daemon import Daemon
from cloudfs.fuse.live.tracking import MOST_HELD
from cloudfs.source.filters import Filters
from cloudfs.source.live import session
from cloudfs.source.live.client import NotMounted
from cloudfs.source.mounts import mounts as all_mounts
from cloudfs.source.ready import Ready
from tests.engine import btrfs, loops
from tests.engine.living import Living, Meanwhile, living
from tests.engine.rig import contents_of_tree, difference
from tests.posix.mounts import few_descriptors, job

KIB, MIB = 1 << 10, 1 << 20
LONG_S = 60.0
"""Longer than anything here takes, unless it waits for itself."""


@pytest.fixture
def rig(mounted: Living) -> Living:
    return mounted


def fill(rig: Living, files: int = 20, size: int = 20_000) -> list[Path]:
    """Files in directories."""
    made = []
    for number in range(files):
        path = rig.tree / f"d{number % 3}" / f"f{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(os.urandom(size))
        made.append(path)
    return made


def sync_by_marks(rig: Living) -> None:
    """A sync that goes by the marks, and is right."""
    made = rig.sync().snapshot
    assert made is not None
    assert (made.source, made.consistent, rig.notes) == ("live", True, [])
    rig.check()


def sync_by_scan(rig: Living, why: str) -> None:
    """A sync that says why it does not, and is right."""
    made = rig.sync().snapshot
    assert made is not None
    assert made.source == "scan"
    assert any(why in note for note in rig.notes), rig.notes
    rig.check()


def last_contents(rig: Living) -> dict[bytes, object]:
    return rig.contents(rig.history().snapshots[-1].number)


def at_once(work: Callable[[int], None], count: int) -> list[threading.Thread]:
    """Do things in threads that do not keep the test from ending."""
    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    return threads


def ended(threads: list[threading.Thread]) -> bool:
    until = time.monotonic() + LONG_S
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


# -- room for what is overwritten ------------------------------------------------------------------


def test_writers_wait_while_the_room_is_full(base: Path, meanwhile: Meanwhile) -> None:
    with living(base) as rig:
        rig.unmount()
        rig.room_bytes = 200 * KIB
        rig.mount()
        paths = fill(rig, 40, 50 * KIB)
        waiting = 0
        writers: list[threading.Thread] = []

        def overwrite(number: int) -> None:
            with paths[number].open("r+b") as file:
                file.write(b"new" * 5000)

        def begin() -> None:
            nonlocal waiting
            writers.extend(at_once(overwrite, len(paths)))
            time.sleep(1)
            waiting = sum(writer.is_alive() for writer in writers)

        model = contents_of_tree(rig.tree)
        meanwhile.when_frozen = begin
        made = rig.sync().snapshot
        assert made is not None
        assert made.consistent
        assert 20 < waiting < len(paths)
        assert ended(writers)
        assert not difference(last_contents(rig), model)
        meanwhile.when_frozen = lambda: None
        sync_by_marks(rig)


def test_the_kernel_may_wait_as_well(base: Path, meanwhile: Meanwhile) -> None:
    """Pages that it writes of its own accord must not keep it from reading what is frozen."""
    with living(base) as rig:
        rig.unmount()
        rig.room_bytes = 64 * KIB
        rig.mount()
        paths = fill(rig, 60, 300 * KIB)
        held, mapped = [], []
        for path in paths:
            held.append(os.open(path, os.O_RDWR))
            mapped.append(mmap.mmap(held[-1], 0))
        waiting: list[int] = []
        writers: list[threading.Thread] = []

        def dirty(number: int) -> None:
            mapped[number][::4096] = b"x" * len(mapped[number][::4096])
            os.fsync(held[number])  # unlike a mapping's flush() it lets other threads run

        def begin() -> None:
            writers.extend(at_once(dirty, len(paths)))
            time.sleep(1)
            waiting.append(sum(writer.is_alive() for writer in writers))

        model = contents_of_tree(rig.tree)
        meanwhile.when_frozen = begin
        found: list[object] = []
        syncing = at_once(lambda _: found.append(rig.sync().snapshot), 1)
        try:
            assert ended(syncing), "the sync waits for who waits for the sync"
        finally:
            if syncing[0].is_alive():
                rig.kill()
        assert ended(writers)
        [made] = found
        assert waiting[0] > 12, waiting  # more than the kernel has under way by default
        if made.consistent:  # type: ignore[attr-defined]
            assert not difference(last_contents(rig), model)
        else:
            assert any("one point in time" in note for note in rig.notes)
        meanwhile.when_frozen = lambda: None
        rig.sync()
        rig.check()
        for one, fd in zip(mapped, held, strict=True):
            one.close()
            os.close(fd)


def test_a_snapshot_says_that_it_is_none(base: Path, meanwhile: Meanwhile) -> None:
    """Where the policy has nobody wait, the room is full and the freeze given up."""
    with living(base) as rig:
        rig.unmount()
        rig.room_bytes, rig.waits = 100 * KIB, False
        rig.mount()
        paths = fill(rig, 10, 50 * KIB)

        def overwrite() -> None:
            for path in paths:
                with path.open("r+b") as file:
                    file.write(b"new" * 5000)

        meanwhile.when_frozen = overwrite
        made = rig.sync().snapshot
        assert made is not None
        assert not made.consistent
        assert any("point in time: the room for" in note for note in rig.notes)
        meanwhile.when_frozen = lambda: None
        rig.sync(force=True)
        assert not rig.notes
        rig.check()


def test_nobody_is_refused_who_removes_much(
    base: Path, meanwhile: Meanwhile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than can be held open: the freeze is given up, and nothing is held any more."""
    few_descriptors(monkeypatch, 2100)
    with living(base) as rig:

        def make() -> None:
            for number in range(3000):
                path = rig.tree / f"d{number % 3}" / f"f{number}"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(b"%d" % number)

        def remove() -> None:
            for name in ("d0", "d1", "d2"):
                shutil.rmtree(rig.tree / name)
            make()

        make()
        meanwhile.when_frozen = remove
        made = rig.sync().snapshot
        assert made is not None
        assert not made.consistent
        assert any("point in time: so much was removed" in note for note in rig.notes)
        meanwhile.when_frozen = lambda: shutil.rmtree(rig.tree / "d0")
        made = rig.sync(force=True).snapshot
        assert made is not None
        assert not made.consistent
        meanwhile.when_frozen = lambda: None
        rig.sync(force=True)
        rig.check()


# -- what is forbidden beneath ---------------------------------------------------------------------


def forbidden_on(rig: Living) -> set[str]:
    """What may not be done on a live mount, by the options that say so."""
    rig.unmount()
    rig.mount()
    return {word for word in options_of(rig.tree) if word.startswith("no")}


def options_of(place: Path) -> frozenset[str]:
    """Those of the mount that is on top there."""
    return [m.options for m in all_mounts() if m.place == os.fsencode(place)][-1]


def test_what_is_forbidden_beneath_is_forbidden(base: Path) -> None:
    def remount(place: Path, options: str) -> None:
        btrfs.run("mount", "-o", f"remount,bind,{options}", place)

    with loops.file_system(base, "ext4", 24 * MIB) as place, living(base, sources=[place]) as rig:
        rig.unmount()
        program = rig.tree / "program"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        remount(place, "suid,dev,exec")
        assert forbidden_on(rig) == set()
        subprocess.run([program], check=True)
        rig.unmount()
        remount(place, "nosuid,nodev,noexec")
        assert forbidden_on(rig) == {"nosuid", "nodev", "noexec"}
        with pytest.raises(PermissionError):
            subprocess.run([program], check=True)
        rig.unmount()
        remount(place, "suid,dev,noexec")
        assert forbidden_on(rig) == {"noexec"}
        rig.unmount()
        remount(place, "suid,dev,exec")
        within = rig.tree / "within"
        within.mkdir()
        btrfs.run("mount", "-t", "tmpfs", "-o", "nosuid,nodev,noexec", "none", within)
        try:
            assert forbidden_on(rig) == {"nosuid", "nodev"}
            rig.unmount()
        finally:
            btrfs.run("umount", within)


# -- disks -----------------------------------------------------------------------------------------


def test_a_full_disk_beneath_is_said_to_who_writes(base: Path) -> None:
    with loops.file_system(base, "ext4", 24 * MIB) as place, living(base, sources=[place]) as rig:
        fill(rig)
        rig.sync()
        big = rig.tree / "big"
        with pytest.raises(OSError, match="No space left"), big.open("wb") as file:
            while True:
                file.write(os.urandom(MIB))
        (rig.tree / "d0" / "f0").chmod(0o600)
        sync_by_marks(rig)
        big.unlink()
        fill(rig, 3)
        sync_by_marks(rig)


FILL = """
import os, sys
os.setgid(int(sys.argv[2])), os.setuid(int(sys.argv[2]))
file = open(sys.argv[1], "wb", buffering=0)
print("open", flush=True)
sys.stdin.readline()
written = 0
try:
    while True:
        written += file.write(bytes(1 << 16))
except OSError as error:
    assert error.errno == 28, error
print(written)
"""


class Filler:
    """A process of some user that opens a file, and writes to it until there is no more room."""

    def __init__(self, path: Path, uid: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", FILL, path, f"{uid}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "open\n"

    def fill(self) -> int:
        """How many bytes there was room for."""
        out, _ = self._process.communicate("\n", timeout=LONG_S)
        return int(out)


def test_what_is_reserved_for_root_is_for_root_alone(base: Path) -> None:
    """Room is found as for the one who opened a file, whoever made something in between."""
    options = (64 * MIB, "-m", "30", "-O", "^has_journal")
    with loops.file_system(base, "ext4", *options) as place, living(base, sources=[place]) as rig:
        rooms = []
        for tree in (rig.beneath, rig.tree):
            base.chmod(0o755), tree.chmod(0o777)
            users, roots = Filler(tree / "user", 12345), Filler(tree / "root", 0)
            (tree / "by root").touch()
            room = users.fill()
            (tree / "user").chmod(0o644)
            rooms.append((room, roots.fill()))
            (tree / "user").unlink(), (tree / "root").unlink()
            os.sync()
        beneath, live = rooms
        assert live == pytest.approx(beneath, abs=MIB)
        assert live[1] > 15 * MIB


@contextlib.contextmanager
def small_state(rig: Living) -> Iterator[Path]:
    """The mount's state on a file system that is soon full."""
    place = rig.base / "small"
    place.mkdir()
    btrfs.run("mount", "-t", "tmpfs", "-o", "size=400k", "none", place)
    rig.state = place / "state"
    try:
        yield place
    finally:
        btrfs.run("umount", "-l", place)


@pytest.fixture
def on_small_state(base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Living]:
    rig = Living(base)
    with small_state(rig):
        monkeypatch.setattr(type(rig.local()), "live_dir", lambda self, name: rig.place)
        try:
            rig.mount()
            fill(rig)
            rig.sync()
            yield rig
        finally:
            rig.close()


def fill_up(place: Path) -> Path:
    """Leave no room."""
    hog = place / "hog"
    with contextlib.suppress(OSError), hog.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(512))
    return hog


def many_names(rig: Living, prefix: str, count: int = 300) -> None:
    """More marks than there is room for in pages that are there already."""
    for number in range(count):
        (rig.tree / f"{prefix}{number}{'-' * 200}").write_bytes(b"new")


def test_a_full_disk_for_the_state_is_a_scan(on_small_state: Living) -> None:
    rig = on_small_state
    hog = fill_up(rig.place.parent)
    many_names(rig, "a")
    sync_by_scan(rig, "changes could not be noted")
    hog.unlink()
    rig.sync(force=True)
    fill(rig, 3)
    sync_by_marks(rig)


def test_what_could_not_be_noted_is_not_forgotten_with_the_process(on_small_state: Living) -> None:
    rig = on_small_state
    hog = fill_up(rig.place.parent)
    many_names(rig, "a")
    rig.kill()
    hog.unlink()
    rig.mount()
    sync_by_scan(rig, "")
    fill(rig, 3)
    sync_by_marks(rig)


def test_nothing_can_be_kept_on_a_full_disk(on_small_state: Living, meanwhile: Meanwhile) -> None:
    """The freeze is given up, and who writes does not notice."""
    rig = on_small_state
    paths = fill(rig)

    def overwrite() -> None:
        fill_up(rig.place.parent)
        for path in paths:
            path.write_bytes(b"new" * 5000)

    meanwhile.when_frozen = overwrite
    made = rig.sync().snapshot
    assert made is not None
    assert not made.consistent
    meanwhile.when_frozen = lambda: None
    rig.sync(force=True)
    rig.check()


def test_a_lost_state_directory_is_a_scan(rig: Living) -> None:
    fill(rig)
    rig.sync()
    shutil.rmtree(rig.place)
    fill(rig, 5)
    sync_by_scan(rig, "it is not mounted live")
    rig.unmount()
    rig.mount()
    fill(rig, 5)
    sync_by_scan(rig, "scanned")
    fill(rig, 5)
    sync_by_marks(rig)


def test_a_broken_disk_beneath(base: Path) -> None:
    """What cannot be read is reported, all else is in the snapshot, and the mount goes on."""
    with (
        btrfs.file_system(base, 256 * MIB, "-dsingle") as place,
        living(base, sources=[place]) as rig,
    ):
        fill(rig)
        rig.sync()
        victim = rig.tree / "victim"
        sign = os.urandom(64)
        victim.write_bytes(os.urandom(MIB) + sign + os.urandom(MIB))
        fill(rig, 3)
        rig.flush()
        btrfs.run("sync", "-f", rig.beneath)
        rot(base / "btrfs.img", sign)
        for path in (rig.beneath / "victim", victim):
            drop_pages(path)
        with pytest.raises(OSError, match="Input/output"):
            victim.read_bytes()
        result = rig.sync()
        assert [path for path, _ in result.unreadable] == [b"victim"]
        (rig.tree / "d0" / "f0").write_bytes(b"still works")
        assert (rig.tree / "d0" / "f0").read_bytes() == b"still works"
        victim.write_bytes(b"mended")
        assert not rig.sync().unreadable
        rig.check()


def rot(image: Path, sign: bytes) -> None:
    """Have what lies on a disk be something else than its checksum says."""
    with image.open("r+b") as file, mmap.mmap(file.fileno(), 0) as disk:
        at = disk.find(sign)
        assert at >= 0
        disk[at] ^= 1


def drop_pages(path: Path) -> None:
    """Have nothing of a file in memory."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# -- processes that end ----------------------------------------------------------------------------


def test_a_killed_sync_lets_go(rig: Living, meanwhile: Meanwhile) -> None:
    paths = fill(rig)
    rig.sync()
    model = contents_of_tree(rig.tree)
    fill(rig, 5)
    ours, theirs = os.pipe()
    syncing = os.fork()
    if not syncing:
        meanwhile.when_reading = lambda: (os.write(theirs, b"."), time.sleep(LONG_S))  # type: ignore[assignment, return-value]
        rig.sync()
        os._exit(0)
    assert os.read(ours, 1) == b"."
    assert rig.daemon is not None
    for path in paths:
        path.write_bytes(b"while it is frozen" * 1000)
    assert nameless_files(rig.daemon.pid)
    os.kill(syncing, signal.SIGKILL)
    os.waitpid(syncing, 0)
    until = time.monotonic() + LONG_S
    while nameless_files(rig.daemon.pid) and time.monotonic() < until:
        time.sleep(0.01)
    assert not nameless_files(rig.daemon.pid), "what was kept is still there"
    sync_by_marks(rig)
    assert not difference(rig.contents(1), model)


def nameless_files(pid: int) -> int:
    """How many files a process holds open that have no name."""
    found = 0
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            where = os.readlink(fd)
            found += "/live/" in where and where.endswith("(deleted)")
    return found


@pytest.mark.parametrize("when", ["when_frozen", "when_reading"])
def test_a_sync_fails_whose_mount_is_killed(rig: Living, meanwhile: Meanwhile, when: str) -> None:
    fill(rig)
    rig.sync()
    model = contents_of_tree(rig.tree)
    fill(rig)
    setattr(meanwhile, when, rig.kill)
    with pytest.raises(CloudfsError) as raised:
        rig.sync()
    assert type(raised.value) not in EXIT_CODES  # so it ends with 1
    assert "live mount" in str(raised.value)
    setattr(meanwhile, when, lambda: None)
    rig.mount()
    assert [record.number for record in rig.history().snapshots] == [1]
    assert not difference(rig.contents(1), model)
    sync_by_marks(rig)


def test_a_tree_is_unmounted_while_a_sync_reads(rig: Living, meanwhile: Meanwhile) -> None:
    """It is in use; and a mount that is told to end does, and the sync fails."""
    fill(rig)
    rig.sync()
    fill(rig)
    refused: list[str] = []

    def try_it() -> None:
        with pytest.raises(CloudfsError) as raised:
            rig.take_away_once()
        refused.append(str(raised.value))

    meanwhile.when_reading = try_it
    sync_by_marks(rig)
    assert "in use" in refused[0]
    fill(rig)

    def stop() -> None:
        assert rig.daemon is not None
        os.kill(rig.daemon.pid, signal.SIGTERM)
        rig.daemon.wait(LONG_S)

    meanwhile.when_reading = stop
    with pytest.raises(SourceError):
        rig.sync()
    meanwhile.when_reading = lambda: None
    rig.daemon = None
    rig.unmount()
    rig.mount()
    sync_by_scan(rig, "could be changed while it was not mounted live")


def test_nobody_goes_past_a_mount_that_takes_the_place_of_a_dead_one(rig: Living) -> None:
    """Writers that never stop meet errors while there is none, and nothing else."""
    fill(rig)
    rig.sync()
    for turn in range(4):
        stop = threading.Event()

        def write(writer: int, turn: int = turn, stop: threading.Event = stop) -> None:
            number = 0
            while not stop.is_set():
                number += 1
                try:
                    (rig.tree / f"w{turn}-{writer}-{number}").write_bytes(b"%d" % number)
                except OSError:
                    time.sleep(0.0005)

        writers = at_once(write, 2)
        rig.remount()
        time.sleep(0.02)
        stop.set()
        assert ended(writers)
        sync_by_marks(rig)


def test_a_mount_that_is_killed_right_after_a_sync_is_gone_at_once(rig: Living) -> None:
    """A process does not end, nor anybody's waiting for it, while one of its threads waits in the
    kernel for the lock of a directory, which is held by who waits for an answer. So it has no
    thread that could."""
    fill(rig)
    stop = threading.Event()

    def write(writer: int) -> None:
        while not stop.is_set():
            path = rig.tree / f"w{writer}"
            with contextlib.suppress(OSError):
                path.write_bytes(b"a")
                path.unlink()

    writers = at_once(write, 2)
    for _ in range(6):
        rig.sync()
        assert rig.daemon is not None
        assert len(os.listdir(f"/proc/{rig.daemon.pid}/task")) == 1
        rig.remount()  # fails where the process does not end
    stop.set()
    assert ended(writers)


# -- two of them -----------------------------------------------------------------------------------


def refused(rig: Living, **others: object) -> str:
    daemon = Daemon()
    with pytest.raises(UsageError) as raised:
        daemon.mount(rig.job(**others))
    return str(raised.value)


def test_a_second_mount_of_a_tree_is_refused(rig: Living) -> None:
    elsewhere = rig.base / "elsewhere"
    elsewhere.mkdir()
    other = {"directory": rig.base / "other", "name": "other"}
    assert "mounted live already" in refused(rig)
    assert "mounted live already" in refused(rig, mountpoint=str(elsewhere))
    assert "mounted there already" in refused(rig, **other)
    assert "mounted live already" in refused(rig, mountpoint=str(elsewhere), **other)
    fill(rig)
    rig.sync()
    fill(rig)
    sync_by_marks(rig)


def test_a_second_mount_elsewhere_is_refused(base: Path) -> None:
    """Neither would hear of what is done through the other."""
    one, two = base / "one", base / "two"
    one.mkdir()
    two.mkdir()
    rig = Living(base)
    try:
        rig.mount(mountpoint=str(one))
        others = {"directory": base / "other", "name": "other"}
        assert "mounted live already" in refused(rig, mountpoint=str(two), **others)
    finally:
        btrfs.run("umount", one)
        rig.close()


def test_mounts_of_two_trees_end_each_by_itself(base: Path) -> None:
    with living(base / "a") as one, living(base / "b") as two:
        one.unmount()  # fails where its process does not end
        fill(two)
        two.sync()
        two.check()


# -- what a sync reads -----------------------------------------------------------------------------


def test_mounts_made_at_the_same_moment_end_each_by_itself(tmp_path: Path) -> None:
    """Neither is held by what the other's process saw when it left its own mount behind."""
    jobs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        jobs.append(job(tmp_path / name, tmp_path / f"state-{name}"))
    for _ in range(10):
        daemons = [Daemon(), Daemon()]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda daemon, wanted: daemon.mount(wanted), daemons, jobs))
        for wanted in jobs:
            places.unmount(wanted.mountpoint)
        for daemon in daemons:
            daemon.wait(10)


def test_what_was_written_through_mappings_is_there_before_the_freeze(rig: Living) -> None:
    """It is on its way for a while after the kernel was told to write it."""
    with contextlib.ExitStack() as stack:
        mappings = {}
        for path in fill(rig, 40):
            with path.open("r+b") as file:
                mappings[path] = stack.enter_context(mmap.mmap(file.fileno(), 0))
        for turn in range(20):
            for mapping in mappings.values():
                mapping[0] = mapping[9000] = turn
            rig.flush()
            for path in mappings:
                data = (rig.beneath / path.relative_to(rig.tree)).read_bytes()
                assert (data[0], data[9000]) == (turn, turn)


def test_a_directory_made_anew_since_the_freeze_is_not_the_one_that_is_read(
    rig: Living, meanwhile: Meanwhile
) -> None:
    """Though what is new was never touched, and lies where the old one lay."""
    for deep in ("old", "above/old", "above/below/old"):
        (rig.tree / deep).mkdir(parents=True)
        (rig.tree / deep / "file").write_bytes(b"of old")
    fill(rig)

    def replace() -> None:
        for name in ("old", "above"):
            shutil.rmtree(rig.tree / name)
        for deep in ("old", "above/old", "above/below/old"):
            (rig.tree / deep).mkdir(parents=True)
        (rig.tree / "above" / "old" / "file").write_bytes(b"of new")

    model = contents_of_tree(rig.tree)
    meanwhile.when_frozen = replace
    rig.sync()
    assert not difference(last_contents(rig), model)
    meanwhile.when_frozen = lambda: None
    sync_by_marks(rig)


def test_names_of_a_file_are_one_file_however_they_are_read(
    rig: Living, meanwhile: Meanwhile
) -> None:
    """One directory is read beneath the mount, the other through it, as it was touched."""
    paths = [rig.tree / name / "file" for name in ("a", "b", "c")]
    for path in paths:
        path.parent.mkdir()
    paths[0].write_bytes(b"content")
    for again in (0, 1):  # a first backup, and one whose records are made anew
        if again:
            rig.unmount()
            rig.forget_local()
            rig.mount()
        os.link(paths[0], paths[1 + again])
        model = contents_of_tree(rig.tree)
        meanwhile.when_frozen = lambda: (rig.tree / "b" / "new").write_bytes(b"new")
        rig.sync()
        assert not difference(last_contents(rig), model)


@pytest.mark.parametrize("size", [0, 300 * KIB])
def test_what_was_a_hole_at_the_freeze_is_one(rig: Living, meanwhile: Meanwhile, size: int) -> None:
    """Of a block that was not marked nothing is kept, so it must not be read though it has data by
    now: neither in a base of blocks that has some on record, nor in one that has none."""
    sparse = rig.tree / "sparse"
    sparse.write_bytes(b"x" * size)
    os.truncate(sparse, 40 * MIB)
    rig.sync()

    def overwrite(at: int) -> None:
        with sparse.open("r+b") as file:
            file.seek(at)
            file.write(b"written")

    overwrite(30 * MIB)
    model = contents_of_tree(rig.tree)
    meanwhile.when_frozen = lambda: [
        overwrite(at) for at in (0, MIB, 20 * MIB, 30 * MIB + 64 * KIB)
    ]
    made = rig.sync().snapshot
    assert made is not None
    assert made.consistent
    assert not difference(last_contents(rig), model)
    meanwhile.when_frozen = lambda: None
    sync_by_marks(rig)


def test_the_first_backup_is_one_point_in_time(rig: Living, meanwhile: Meanwhile) -> None:
    paths = fill(rig, 60)
    model = contents_of_tree(rig.tree)

    def change() -> None:
        for number, path in enumerate(paths):
            if number % 3 == 0:
                path.write_bytes(b"new")
            elif number % 3 == 1:
                path.rename(path.with_name(path.name + "x"))
            else:
                path.unlink()
        (rig.tree / "d0").rename(rig.tree / "moved")

    meanwhile.when_frozen = change
    made = rig.sync().snapshot
    assert made is not None
    assert made.consistent
    assert not difference(rig.contents(1), model)
    meanwhile.when_frozen = lambda: None
    sync_by_marks(rig)


def test_what_comes_into_the_backup_by_moving_is_kept(base: Path, meanwhile: Meanwhile) -> None:
    """It is read whole, though nothing in it was marked."""
    with living(base, filters=Filters(excludes=("/out",))) as rig:
        fill(rig)
        out = rig.tree / "out"
        out.mkdir()
        (out / "file").write_bytes(b"old" * 50_000)
        rig.sync()
        out.rename(rig.tree / "in")

        def overwrite() -> None:
            with (rig.tree / "in" / "file").open("r+b") as file:
                file.write(b"new" * 50_000)

        meanwhile.when_frozen = overwrite
        made = rig.sync().snapshot
        assert made is not None
        assert made.consistent
        assert last_contents(rig)[b"/in/file"][-1] == b"old" * 50_000  # type: ignore[index]


def test_other_filters_read_what_was_not_marked(base: Path, meanwhile: Meanwhile) -> None:
    with living(base, filters=Filters(excludes=("/out",))) as rig:
        fill(rig)
        (rig.tree / "out").write_bytes(b"old" * 50_000)
        rig.sync()
        rig.filters = Filters()

        def overwrite() -> None:
            with (rig.tree / "out").open("r+b") as file:
                file.write(b"new" * 50_000)

        meanwhile.when_frozen = overwrite
        made = rig.sync().snapshot
        assert made is not None
        assert made.consistent
        assert last_contents(rig)[b"/out"][-1] == b"old" * 50_000  # type: ignore[index]


def test_a_clock_that_is_set_back(rig: Living, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(rig)
    rig.sync()
    ready = session._Frozen.ready

    def yesterday(frozen: session._Frozen) -> Ready:
        made = ready(frozen)
        assert made.frozen_ns is not None
        made.frozen_ns -= 86_400 * 10**9
        return made

    monkeypatch.setattr(session._Frozen, "ready", yesterday)
    for _ in range(2):
        fill(rig, 5)
        sync_by_marks(rig)
    times = [record.time_ns for record in rig.history().snapshots]
    assert times == sorted(set(times))


def test_a_file_system_within_the_tree(base: Path) -> None:
    """What the kernel forgot in between is known again by what was marked."""
    with with_another_within(base) as (rig, nested):
        (nested / "d").mkdir()
        paths = [nested / "f", nested / "d" / "g", rig.tree / "h"]
        for turn in range(4):
            for path in paths:
                path.write_bytes(b"%d" % turn * 10_000)
            if turn == 2:
                (nested / "d" / "more").write_bytes(b"more")
            if turn == 3:
                rig.remount()
            drop_inodes()
            made = rig.sync().snapshot
            assert made is not None
            by_marks = 0 < turn < 3  # who comes after a kill may not find its directories again
            assert not by_marks or (made.source, rig.notes) == ("live", [])
            assert not difference(last_contents(rig), contents_of_tree(rig.tree))
            assert wait_for(lambda: not held_in(rig, b"/nested/")), "nothing is held in the end"


@contextlib.contextmanager
def with_another_within(base: Path) -> Iterator[tuple[Living, Path]]:
    """A rig that is mounted live, and a place within where another file system is mounted."""
    rig = Living(base)
    nested = rig.tree / "nested"
    nested.mkdir()
    btrfs.run("mount", "-t", "tmpfs", "none", nested)
    try:
        rig.mount()
        yield rig, nested
    finally:
        rig.unmount()
        btrfs.run("umount", nested)
        rig.close()


def drop_inodes() -> bool:
    """Have the kernel forget what nobody uses."""
    Path("/proc/sys/vm/drop_caches").write_text("2")
    return True


def wait_for(condition: Callable[[], bool]) -> bool:
    """Whether it comes to be, once the kernel has forgotten all that it may."""
    deadline = time.monotonic() + LONG_S
    while drop_inodes() and not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def held_in(rig: Living, part: bytes) -> list[bytes]:
    """What the mount has open, by a part of its path."""
    assert rig.daemon is not None
    place = b"/proc/%d/fd/" % rig.daemon.pid
    found = []
    for name in os.listdir(place):
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            found.append(os.readlink(place + name))
    return [path for path in found if part in path]


def test_many_directories_of_a_file_system_within_the_tree(base: Path) -> None:
    """More than are held: what nobody knows where to find is looked for by a scan."""
    with with_another_within(base) as (rig, nested):
        rig.sync()
        for number in range(MOST_HELD + 10):
            (nested / f"{number}").mkdir()
            (nested / f"{number}" / "file").write_text("file")
        assert wait_for(lambda: len(held_in(rig, b"/nested/")) <= MOST_HELD)
        for source in ("scan", "live"):
            made = rig.sync().snapshot
            assert made is not None
            assert made.source == source, rig.notes
            assert not difference(last_contents(rig), contents_of_tree(rig.tree))
            (nested / "0" / "file").write_text("changed")
            drop_inodes()


def test_a_write_far_beyond_the_end(rig: Living) -> None:
    """Marking it takes no longer than any other."""
    path = rig.tree / "sparse"
    path.write_bytes(b"x")
    rig.sync()

    def write(_: int) -> None:
        with path.open("r+b") as file:
            file.seek(1 << 60)
            file.write(b"y")

    writers = at_once(write, 1)
    writers[0].join(10)
    assert not writers[0].is_alive()
    os.truncate(path, 10_000)
    sync_by_marks(rig)


def test_nobody_else_can_take_the_name_of_what_is_frozen(rig: Living, meanwhile: Meanwhile) -> None:
    for number in range(1, 6):
        (rig.tree / f".cloudfs-frozen-{number}").mkdir()
        (rig.tree / f".cloudfs-frozen-{number}" / "trap").write_bytes(b"trap")
    fill(rig)
    rig.sync()
    fill(rig)
    sync_by_marks(rig)


def test_no_mount_answers(rig: Living) -> None:
    fill(rig)
    rig.unmount()
    with pytest.raises(NotMounted):
        rig.state_of_mount()
    rig.sync()
    assert any("it is not mounted live" in note for note in rig.notes)
    rig.check()
