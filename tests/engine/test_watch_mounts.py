"""What is mounted, in a tree that is watched or elsewhere, in all ways that the kernel allows."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloudfs.backup.attempt import Attempt
from cloudfs.backup.publish import Publisher
from cloudfs.core.errors import SourceError
from cloudfs.source.filters import Filters
from cloudfs.source.watch.session import WatchSource
from tests.engine.btrfs import run
from tests.engine.test_watch_faults import scanned
from tests.engine.watched import Watched, heard, settle

ODD_MOUNTS = """
import ctypes, os, sys
from cloudfs.source.mounts import mounts

libc = ctypes.CDLL(None, use_errno=True)
top = os.fsencode(sys.argv[1])
for name in (b"a\\rb", b"a\\x0bb", b"a\\nb", b"a\\xff b\\\\"):
    os.mkdir(top + b"/" + name)
    assert not libc.mount(b"none", top + b"/" + name, b"tmpfs", 0, None)
fuse = os.open("/dev/fuse", os.O_RDWR)
options = b"fd=%d,rootmode=40000,user_id=0,group_id=0" % fuse
assert not libc.mount(b"none", top, b"fuse.\\xff", 0, options), os.strerror(ctypes.get_errno())
found = [mount for mount in mounts() if (mount.place + b"/").startswith(top + b"/")]
for mount in found:
    print(ascii(os.fsencode(mount.kind)), ascii(mount.place[len(top):]))
"""
"""Run in a mount namespace of its own: nobody else is to be bothered by such mounts."""


def apart(script: str, *arguments: str | Path) -> str:
    """What a Python script prints that sees mounts of its own."""
    done = subprocess.run(
        ["unshare", "-m", "--propagation", "private", sys.executable, "-c", script, *arguments],
        check=False,
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    return done.stdout


def test_mounts_of_any_name_and_kind(base: Path) -> None:
    assert apart(ODD_MOUNTS, base).splitlines() == [
        r"b'tmpfs' b'/a\rb'",
        r"b'tmpfs' b'/a\x0bb'",
        r"b'tmpfs' b'/a\nb'",
        r"b'tmpfs' b'/a\xff b\\'",
        r"b'fuse.\xff' b''",
    ]


IN_A_CHROOT = """
import ctypes, os, sys
from cloudfs.core.errors import SourceError
from cloudfs.backup.attempt import Attempt
from cloudfs.backup.publish import Publisher
from cloudfs.core.errors import SourceError
from cloudfs.source.filters import Filters
from cloudfs.source.watch.session import WatchSource
from cloudfs.source.watch.places import places_of

libc = ctypes.CDLL(None, use_errno=True)
top, bind = os.fsencode(sys.argv[1]), 4096
for name in (b"proc", b"tree"):
    os.mkdir(top + b"/" + name)
assert not libc.mount(b"/proc", top + b"/proc", None, bind, None)
os.chroot(top)
os.chdir("/")
try:
    places_of([b"/tree"], Filters())
except SourceError as error:
    print(error)
"""


def test_a_root_directory_that_is_no_mount_point(base: Path) -> None:
    """The kernel does not list the mount that it is on."""
    assert apart(IN_A_CHROOT, base) == "the mount that /tree is on is not listed, as in a chroot.\n"


@contextlib.contextmanager
def bound(what: Path, place: Path) -> Iterator[Path]:
    """A bind mount."""
    run("mount", "--bind", what, place)
    try:
        yield place
    finally:
        run("umount", place)


@pytest.fixture
def on_one(watched: Watched) -> Watched:
    """One whose policy leaves other file systems out."""
    watched.kill()
    watched.filters = Filters(one_file_system=True)
    watched.start()
    return watched


def test_a_mount_that_is_left_out_comes_and_goes(on_one: Watched, own_volume: Path) -> None:
    """What lies beneath it is part of the tree."""
    within = on_one.tree / "within"
    within.mkdir()
    (within / "hidden").write_text("hidden")
    with bound(own_volume, within):
        settle(on_one)
        within.chmod(0o750)
        on_one.sync()
        assert on_one.notes == []
        assert on_one.contents(2)[b"/within"] != on_one.contents(1)[b"/within"]
    scanned(on_one, "is another one than before")
    with bound(own_volume, within):
        on_one.sync()
        assert "is another one than before" in on_one.notes[0]
        last = on_one.history().snapshots[-1].number
        assert b"/within/hidden" not in on_one.contents(last)


def test_what_is_mounted_within_what_is_left_out(on_one: Watched, own_volume: Path) -> None:
    """It comes and goes unheeded."""
    within = on_one.tree / "within"
    within.mkdir()
    (own_volume / "in").mkdir()
    with bound(own_volume, within):
        settle(on_one)
        with bound(own_volume, within / "in"):
            on_one.sync()
            assert on_one.notes == []


def test_a_part_of_the_one_file_system_mounted_within(on_one: Watched) -> None:
    within, outside = on_one.tree / "within", on_one.base / "outside"
    for directory in (within, outside):
        directory.mkdir()
    with bound(outside, within):
        (within / "file").write_text("one")
        settle(on_one)
        (outside / "file").write_text("two and more")
        heard(on_one)


@pytest.mark.parametrize("directory", ["", "in"])
def test_a_file_that_is_a_mount_point(watched: Watched, own_volume: Path, directory: str) -> None:
    """Its file system is none that is watched, so each sync looks at it."""
    place = watched.tree / directory / "file"
    place.parent.mkdir(exist_ok=True)
    place.write_text("beneath")
    settle(watched)
    (own_volume / "file").write_text("one")
    with bound(own_volume / "file", place):
        scanned(watched, "is another one than before")
        (own_volume / "file").write_text("two and more")
        heard(watched)
    scanned(watched, "is another one than before")


def test_a_mount_that_another_one_hides(watched: Watched, own_volume: Path) -> None:
    """By what is mounted above it, or over it."""
    (watched.tree / "a" / "b").mkdir(parents=True)
    (own_volume / "b").mkdir()
    with contextlib.ExitStack() as mounted:
        for place in ("a/b", "a"):
            run("mount", "-t", "tmpfs", "none", watched.tree / place)
            mounted.callback(run, "umount", watched.tree / place)
        mounted.enter_context(bound(own_volume, watched.tree / "a"))
        watched.kill()
        watched.start()
        assert len(watched.state().devices) == 2
        settle(watched)
        (own_volume / "b" / "file").write_text("text")
        heard(watched)
    scanned(watched, "is another one than before")


@pytest.mark.parametrize("parts", [False, True])
def test_changes_beneath_a_mount(
    watched: Watched, own_volume: Path, tmp_path: Path, parts: bool
) -> None:
    """They are heard of, as is what else happens on that file system, and are not in the tree."""
    covered, over = watched.tree / "within", own_volume
    (covered / "in").mkdir(parents=True)
    if parts:  # of the same file system, so that its device does not tell
        over = watched.base / "over"
        over.mkdir()
    beside = tmp_path / "beside"
    beside.mkdir()
    with bound(over, covered), bound(watched.tree, beside):
        watched.kill()
        watched.start()
        settle(watched)
        for text in ("one", "two and more"):
            (beside / "within" / "in" / "file").write_text(text)
            (watched.tree / "file").write_text(text)
            heard(watched)


def test_a_mount_that_is_away_while_a_scan_looks(
    watched: Watched, own_volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel lists another one in its place by the same number."""
    within = watched.tree / "within"
    within.mkdir()
    (own_volume / "file").write_text("text")
    publish, walk = Publisher.publish, Attempt._walk_all
    run("mount", "--bind", own_volume, within)
    watched.kill()
    watched.start()

    def without(*args: Any) -> Any:
        run("umount", within)
        return walk(*args)

    def with_it(*args: Any) -> Any:
        run("mount", "--bind", own_volume, within)
        return publish(*args)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(Attempt, "_walk_all", without)
            patch.setattr(Publisher, "publish", with_it)
            watched.sync()
        scanned(watched, "only since after the last snapshot")
    finally:
        run("umount", within)


CLOSED = """
import errno, stat, sys
import pyfuse3, trio

class Closed(pyfuse3.Operations):
    async def getattr(self, inode, ctx=None):
        found = pyfuse3.EntryAttributes()
        found.st_ino, found.st_mode, found.st_nlink = inode, stat.S_IFDIR | 0o755, 2
        return found

    async def opendir(self, inode, ctx):
        raise pyfuse3.FUSEError(errno.EACCES)

pyfuse3.init(Closed(), sys.argv[1], {"fsname=closed"})
print("mounted", flush=True)
trio.run(pyfuse3.main)
"""


@contextlib.contextmanager
def closed(place: Path) -> Iterator[None]:
    """A mount that can be looked at and not opened, as a network share that is another user's."""
    arguments = [sys.executable, "-c", CLOSED, place]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "mounted\n"
        try:
            yield
        finally:
            run("umount", "-l", place)
            server.kill()


def test_a_mount_that_cannot_be_opened(watched: Watched) -> None:
    within = watched.tree / "within"
    within.mkdir()
    settle(watched)
    words = "cannot be opened (permission denied); --exclude leaves it out"
    reason = f"what is mounted at {within} {words}"
    with closed(within):
        for text in ("one", "two"):
            (watched.tree / "file").write_text(text)
            result = watched.sync()
            assert result.unreadable == [(b"within", "permission denied")]
            assert f"is scanned: {reason}" in watched.notes[0]
            number = watched.history().snapshots[-1].number
            assert watched.contents(number)[b"/file"][-1] == text.encode()  # type: ignore[index]
        source = WatchSource("home", [os.fsencode(watched.tree)], watched.place, watched.filters)
        assert source.state(2, 0).reason == reason
        with pytest.raises(SourceError, match="permission denied"):
            watched.start()
    scanned(watched, "another snapshot")


def test_a_mount_that_cannot_be_opened_after_the_commit(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    within = watched.tree / "within"
    within.mkdir()
    settle(watched)
    (watched.tree / "file").write_text("text")
    real = Publisher.publish
    with contextlib.ExitStack() as mounted, monkeypatch.context() as patch:

        def mount_first(*args: Any) -> Any:
            mounted.enter_context(closed(within))
            return real(*args)

        patch.setattr(Publisher, "publish", mount_first)
        assert watched.sync().snapshot is not None
    scanned(watched, "another snapshot")
