"""Faults that lost data elsewhere, and that no other test covers: see tests/PITFALLS.rst."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cloudfs.backup import files, packs
from cloudfs.core.errors import CloudfsError
from cloudfs.core.rows import ROOT_LIN
from cloudfs.source import inode, listing, roots, scan
from tests.cli.conftest import Machine
from tests.cli.test_secrets import environments
from tests.engine.longwrite import long_write
from tests.engine.rig import Rig, contents_of_tree, difference
from tests.fuse.conftest import wait_until

BLOCK = 4096
TICK_NS = 10**9


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def assert_last(rig: Rig) -> None:
    """The newest snapshot is what the tree is."""
    number = rig.history().snapshots[-1].number
    assert not difference(rig.contents(number), contents_of_tree(rig.tree))


# -- borg#3536: a write within the same time stamp ----------------------------------------------


def test_writes_within_one_tick_of_the_clock(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system whose stamps are whole seconds; size and mtime stay as they were."""
    real = listing.raw_entry

    def coarse(name: bytes, status: os.stat_result, dev: int, mask: int = -1) -> Any:
        raw = list(real(name, status, dev, mask))
        for place in (7, 8):  # mtime and ctime
            raw[place] -= raw[place] % TICK_NS
        return tuple(raw)

    monkeypatch.setattr(scan, "raw_entry", coarse)
    monkeypatch.setattr(listing, "raw_entry", coarse)
    path = rig.tree / "file"
    path.write_bytes(b"0" * 5000)
    (rig.tree / "other").write_text("never changes")
    for turn in range(1, 5):
        before = path.stat()
        rig.sync(force=True)
        with path.open("r+b") as file:
            file.write(b"%d" % turn)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        rig.sync(force=True)
        assert_last(rig)


def test_a_write_that_goes_on_while_its_file_is_read(rig: Rig) -> None:
    """Its time stamps are from its beginning, many ticks before."""
    size = 32 << 20
    path = rig.tree / "file"
    path.write_bytes(b"a" * size)
    rig.sync()
    with long_write(path, b"b", size):
        time.sleep(0.1)
        written = path.stat()
        rig.sync()
    assert path.stat().st_ctime_ns == written.st_ctime_ns
    rig.sync()
    assert_last(rig)


@pytest.mark.parametrize("names", [["one"], ["one", "two"]])
def test_the_attributes_of_a_source_within_one_tick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    """No directory of the tree names it."""
    sources = [tmp_path / name for name in names]
    for source in sources:
        source.mkdir()
    rig = Rig(tmp_path, sources=sources)
    real, second = roots._stat, time.time_ns() // TICK_NS * TICK_NS

    def coarse(*what: Any, **more: Any) -> Any:
        return msgspec.structs.replace(real(*what, **more), ctime_ns=second)

    monkeypatch.setattr(roots, "_stat", coarse)
    monkeypatch.setattr(scan, "COARSE_TICK_NS", 10**12)
    for turn in b"1", b"2":
        os.setxattr(rig.tree, "user.turn", turn)
        rig.sync()
        history = rig.history()
        view = history.view(history.snapshots[-1].number)
        source = view.meta(ROOT_LIN if len(names) == 1 else view.entries(ROOT_LIN)[0].lin)
        assert source is not None
        assert view.xattrs(source) == {b"user.turn": turn}
        history.repository.local.close()


def test_data_changed_and_mtime_put_back(rig: Rig) -> None:
    """kopia#4727, duplicati#2332."""
    path = rig.tree / "file"
    path.write_bytes(b"a" * 10_000)
    os.utime(path, ns=(10**18, 10**18))
    time.sleep(0.1)  # so that it is not looked at again just because it is fresh
    rig.sync()
    with path.open("r+b") as file:
        file.seek(5000)
        file.write(b"b")
    os.utime(path, ns=(10**18, 10**18))
    assert rig.sync().changed == 1
    assert_last(rig)


# -- s3ql 1.x: the source changes between each two steps ----------------------------------------

Change = Callable[[Path], None]


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more" * 3000)


def _overwrite(path: Path) -> None:
    """Same size, mtime put back."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"!" * 100)
        file.seek(-10, os.SEEK_END)
        file.write(b"?" * 10)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _truncate(path: Path) -> None:
    os.truncate(path, 5)


def _replace(path: Path) -> None:
    (path.parent / "new").write_bytes(b"replaced" * 700)
    (path.parent / "new").rename(path)


def _become_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "below").write_text("x")


def _become_a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _become_a_symlink(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


CHANGES = [
    _append,
    _overwrite,
    _truncate,
    Path.unlink,
    _replace,
    _become_a_directory,
    _become_a_fifo,
    _become_a_symlink,
]

STEPS: list[tuple[Any, str]] = [
    (os, "open"),
    (os, "scandir"),
    (os, "preadv"),
    (os, "fstat"),
    (os, "close"),
    (inode.StatReader, "of"),
    (files, "read_xattrs"),
    (inode.StatReader, "flags"),
    (files, "decode_listing"),
    (files, "expand"),
    (inode, "data_extents"),
]


@contextlib.contextmanager
def change_before(step: int, act: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Before the ``step``-th of the STEPS that are taken, ``act``. The value: whether it came."""
    count, inside = 0, False

    def counted(real: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal count, inside
            if not inside:
                inside = True
                try:
                    if count == step:
                        act()
                finally:
                    inside = False
                count += 1
            return real(*args, **kwargs)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for place, name in STEPS:
            patch.setattr(place, name, counted(getattr(place, name)))
        yield lambda: count > step


@pytest.mark.parametrize("size", [300, 3 * BLOCK + 7])
@pytest.mark.parametrize(
    "change", CHANGES, ids=lambda change: change.__name__.strip("_") if callable(change) else None
)
def test_the_source_changes_between_each_two_steps(
    tmp_path: Path, change: Change, size: int
) -> None:
    """What a snapshot shows of a file is what it was before or after, or it is reported; and the
    next sync has all of it."""
    rig = Rig(tmp_path)
    (rig.tree / "dir").mkdir()
    path = rig.tree / "dir" / "file"
    (rig.tree / "dir" / "zz beside").write_text("beside")
    step, came = 0, True
    while came:
        _remove(path)
        path.write_bytes(random.Random(step).randbytes(size))
        before = contents_of_tree(rig.tree)
        with change_before(step, lambda: change(path)) as reached:
            result = rig.sync(force=True)
            came = reached()
        after = contents_of_tree(rig.tree)
        assert result.snapshot is not None
        found = rig.contents(result.snapshot.number)
        reported = any(item.startswith(b"dir/file") for item, _ in result.unreadable)
        shown = found.get(b"/dir/file", ())
        data_of = [tree.get(b"/dir/file", ((),))[-1] for tree in (before, after)]  # type: ignore[index]
        assert reported or not shown or shown[-1] in data_of, step  # type: ignore[index]
        assert found[b"/dir/zz beside"][-1] == b"beside"  # type: ignore[index]
        rig.sync(force=True)
        assert_last(rig)
        step += 4 if step > 12 else 1
    assert step > 12


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        (path / "below").unlink()
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


# -- gocryptfs#363: inode numbers are used again -------------------------------------------------


def test_storms_of_inodes_during_syncs(tmp_path: Path) -> None:
    """Files come and go while syncs run; every snapshot can be read, and the last one is true."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as base:
        rig = Rig(Path(base))
        (rig.tree / "stays").write_text("stays")
        stop = threading.Event()

        def storm() -> None:
            dice = random.Random(1)
            for turn in itertools.count():
                names = [rig.tree / f"{turn} {number}" for number in range(20)]
                for path in names:
                    path.write_bytes(dice.randbytes(dice.choice([1, 100, 5000])))
                for path in names[dice.randrange(3) :]:
                    path.unlink()
                if stop.is_set():
                    return

        thread = threading.Thread(target=storm)
        thread.start()
        try:
            for _ in range(6):
                rig.sync(force=True)
        finally:
            stop.set()
            thread.join()
        rig.sync(force=True)
        assert_last(rig)
        for number in range(1, 8):
            assert rig.contents(number)[b"/stays"][-1] == b"stays"  # type: ignore[index]


# -- restic 0.16.3: what the compressor made does not decode ------------------------------------


@pytest.mark.parametrize("place", [0, 5, -1])
def test_a_pack_that_does_not_decode_is_not_published(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    (rig.tree / "first").write_bytes(b"compressible " * 1000)
    rig.sync()
    (rig.tree / "second").write_bytes(b"this one is too " * 1000)
    before = {info.name for info in rig.store.list("")}
    real = packs.encode

    def broken(plain: Any, level: int) -> bytes:
        coded = bytearray(real(plain, level))
        coded[place] ^= 1
        return bytes(coded)

    with monkeypatch.context() as patch:
        patch.setattr(packs, "encode", broken)
        with pytest.raises(CloudfsError, match=r"decode"):
            rig.sync()
    assert {info.name for info in rig.store.list("")} == before
    rig.sync()
    assert_last(rig)


# -- kopia#5217: one unreadable entry, at each place --------------------------------------------

ENTRIES = ["a", "m dir", "m dir/inner", "m dir/inner/deep", "m dir/y", "q link", "z", "z dir"]


def make_entries(tree: Path) -> None:
    (tree / "m dir" / "inner").mkdir(parents=True)
    (tree / "z dir").mkdir()
    (tree / "q link").symlink_to("a")
    for name in ("a", "m dir/inner/deep", "m dir/y", "z", "z dir/only"):
        (tree / name).write_text(name)


def test_what_replaced_a_file_cannot_be_read(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    (rig.tree / "a").write_text("old")
    rig.sync()
    (rig.tree / "new").write_text("other")
    (rig.tree / "new").rename(rig.tree / "a")
    real = os.open

    def refusing(path: Any, *args: Any, **kwargs: Any) -> int:
        if path == b"a":
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refusing)
        assert rig.sync().unreadable == [(b"a", "permission denied")]
    rig.contents(2)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("entry", ENTRIES)
def test_an_unreadable_entry_at_each_place(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, entry: str, new: bool
) -> None:
    if not new:
        (rig.tree / "before").write_text("there was a snapshot")
        rig.sync()
    make_entries(rig.tree)
    last = os.fsencode(entry).rpartition(b"/")[2]
    real_open, real_link = os.open, os.readlink

    def refused(path: Any) -> None:
        if isinstance(path, bytes) and path.rpartition(b"/")[2] == last:
            raise PermissionError(13, "Permission denied")

    def opened(path: Any, *args: Any, **kwargs: Any) -> int:
        refused(path)
        return real_open(path, *args, **kwargs)

    def link(path: Any, *args: Any, **kwargs: Any) -> Any:
        refused(path)
        return real_link(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", opened)
        patch.setattr(os, "readlink", link)
        result = rig.sync()
    assert result.snapshot is not None
    assert {path for path, _ in result.unreadable} >= {os.fsencode(entry)}
    expected = {path for path in contents_of_tree(rig.tree) if path != b"links"}
    lost = b"/" + os.fsencode(entry)
    found = rig.contents(result.snapshot.number)
    kept = {path for path in expected if path != lost and not path.startswith(lost + b"/")}
    assert kept <= set(found)
    rig.sync()
    assert_last(rig)


def cannot_be_told(path: Path) -> bool:
    try:
        path.lstat()
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def test_a_mount_whose_server_died_within_the_tree(tmp_path: Path) -> None:
    """Nothing can be learnt of it, not even by lstat. What lies beside it is backed up."""
    machine, tree = Machine(tmp_path / "machine"), tmp_path / "tree"
    machine.home.mkdir()
    (tree / "sub" / "dead").mkdir(parents=True)
    (tree / "sub" / "before").write_text("before")
    policy = ("policy", "create", "home", "--source", tree, "--repo", f"file://{tmp_path}/repo")
    machine.run(*policy)
    machine.run("sync")
    machine.run("mount", "home", tree / "sub" / "dead")
    try:
        (pid,) = environments(machine)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: cannot_be_told(tree / "sub" / "dead"))
        (tree / "sub" / "new").write_text("new")
        done = machine.run("sync", code=3)
        assert "sub/dead" in done.err
        assert machine.run("cat", "home:/sub/new").out == "new"
    finally:
        machine.run("umount", tree / "sub" / "dead")


# -- rclone#4293, s3fs#2621: no room on this machine --------------------------------------------


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[None]:
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True)


SIZES = ["16k", "80k"]
MORE_SIZES = [
    "4k",
    "8k",
    "12k",
    "24k",
    "40k",
    "64k",
    "100k",
    "120k",
    "160k",
    "200k",
    "300k",
    "600k",
]


@pytest.mark.parametrize(
    "size", [*SIZES, *(pytest.param(size, marks=pytest.mark.long) for size in MORE_SIZES)]
)
def test_no_room_for_what_is_kept_locally(tmp_path: Path, size: str) -> None:
    """Wherever the disk is full first: a sentence, no snapshot that is not true, and the next sync
    with room goes on."""
    machine, other = Machine(tmp_path / "small"), Machine(tmp_path / "large")
    other.home.mkdir()
    tree, url = tmp_path / "tree", f"file://{tmp_path}/repo"
    (tree / "sub").mkdir(parents=True)
    for number in range(150):
        (tree / "sub" / f"{number} {'x' * 150}").write_bytes(b"%d" % number * 400)
    other.run("policy", "create", "home", "--source", tree, "--repo", url)
    with small_disk(machine.home, "1m"):
        (machine.home / "config").mkdir()
        policy = (other.home / "config" / "home.toml").read_text()
        (machine.home / "config" / "home.toml").write_text(policy)
        subprocess.run(["mount", "-o", f"remount,size={size}", machine.home], check=True)
        done = machine.run("sync", code=None)
        assert done.code in (0, 1), done
        if done.code:
            assert done.err.startswith("cloudfs: ") and "\n" not in done.err.strip()
        subprocess.run(["mount", "-o", "remount,size=64m", machine.home], check=True)
        machine.run("sync", "--force")
        other.run("restore", "home", "--target", tmp_path / "out")
        assert not difference(contents_of_tree(tmp_path / "out"), contents_of_tree(tree))


# -- s3ql 5.0: the cache behind a symlink -------------------------------------------------------


def test_a_machine_whose_directories_are_symlinks(tmp_path: Path) -> None:
    """And a machine that has nothing but the URL and the passphrase reads all of it."""
    machine, other = Machine(tmp_path / "one"), Machine(tmp_path / "other")
    for home in (machine.home, other.home):
        home.mkdir()
    for name in ("config", "state", "cache"):
        (tmp_path / "elsewhere" / name).mkdir(parents=True)
        (machine.home / name).symlink_to(tmp_path / "elsewhere" / name)
    tree, url = tmp_path / "tree", f"file://{tmp_path}/repo"
    tree.mkdir()
    (tree / "file").write_text("one")
    machine.run("policy", "create", "home", "--source", tree, "--repo", url)
    machine.run("sync")
    (tree / "file").write_text("two")
    machine.run("sync")
    for number in (1, 2):
        out = tmp_path / f"out{number}"
        other.run("restore", f"{url}@{number}", "--target", out)
        assert (out / "file").read_text() == ("one", "two")[number - 1]
    assert (tmp_path / "elsewhere" / "state" / "policies").is_dir()
