"""Trees of odd things: each kind of item, each length, each way of being hard to read."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import stat as st
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from cloudfs.backup import dispatch
from cloudfs.backup.walk import Walk
from cloudfs.core.changes import DirScan
from cloudfs.core.errors import SourceError, UsageError
from cloudfs.source.filters import Filters
from cloudfs.source.scan import Scanner
from tests.engine import btrfs
from tests.engine.rig import Rig, contents_of_tree, difference

BLOCK = 4096


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def check(rig: Rig) -> None:
    """One sync, and the snapshot is what the tree is."""
    result = rig.sync()
    assert result.snapshot is not None
    assert not result.unreadable
    found = difference(rig.contents(result.snapshot.number), contents_of_tree(rig.tree))
    assert not found


def test_every_length_around_block_borders(rig: Rig) -> None:
    rng = random.Random(1)
    for blocks in range(4):
        for extra in (-1, 0, 1):
            size = blocks * BLOCK + extra
            if size >= 0:
                (rig.tree / f"random-{size}").write_bytes(rng.randbytes(size))
                (rig.tree / f"zeros-{size}").write_bytes(bytes(size))
    base = BLOCK * 64
    for size in (base - 1, base, base + 1, 3 * base + 7):
        (rig.tree / f"base-{size}").write_bytes(rng.randbytes(size))
    check(rig)


def test_every_kind_of_item(rig: Rig) -> None:
    tree = rig.tree
    (tree / "empty").mkdir()
    (tree / "symlink").symlink_to("nowhere/at/all")
    os.mkfifo(tree / "fifo", 0o640)
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(tree)  # the path of a socket is bounded
        listener.bind("socket")
    os.mknod(tree / "char", st.S_IFCHR | 0o600, os.makedev(5, 1))
    os.mknod(tree / "block", st.S_IFBLK | 0o660, os.makedev(7, 300))
    (tree / "file").write_text("content")
    os.link(tree / "file", tree / "empty" / "second name")
    os.link(tree / "symlink", tree / "empty" / "second symlink", follow_symlinks=False)
    for name in (b"new\nline", b"\xff\xfe\x01", b" ", b"-rf", b"\\", "ü".encode(), b"n" * 255):
        Path(os.fsdecode(os.fsencode(tree) + b"/" + name)).write_bytes(name)
    os.chmod(tree / "file", 0o6755)
    os.chown(tree / "char", 12345, 54321)
    os.setxattr(tree / "file", b"user.x", b"\0\xff")
    os.setxattr(tree / "symlink", b"trusted.x", b"of a symlink", follow_symlinks=False)
    os.utime(tree / "file", ns=(1, 1_234_567_891))
    os.utime(tree / "symlink", ns=(5, -5_000_000_001), follow_symlinks=False)
    subprocess.run(["setfacl", "-m", "u:12345:rw", tree / "fifo"], check=True)
    subprocess.run(["setfacl", "-d", "-m", "g:7:rx", tree / "empty"], check=True)
    check(rig)


def test_a_path_deeper_than_the_kernel_takes(rig: Rig) -> None:
    fd = os.open(rig.tree, os.O_RDONLY)
    depth = 40
    for number in range(depth):
        name = f"{number:03}" + "d" * 200
        os.mkdir(name, dir_fd=fd)
        deeper = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = deeper
    leaf = os.open("leaf", os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=fd)
    os.write(leaf, b"deep down")
    os.close(leaf)
    os.close(fd)
    result = rig.sync()
    assert not result.unreadable
    found = rig.contents(1)
    path = max((key for key in found if isinstance(key, bytes)), key=len)
    assert len(path) > 4096 * 1.9
    assert found[path][-1] == b"deep down"  # type: ignore[index]
    assert rig.sync().snapshot is None or not rig.sync().snapshot


def test_a_sparse_file_costs_what_it_holds(rig: Rig) -> None:
    size = 20 << 30
    with (rig.tree / "sparse").open("wb") as file:
        file.truncate(size)
        file.seek(10 << 30)
        file.write(b"in the middle")
        file.seek(size - 5)
        file.write(b"end")
    rig.block_size = 128 * 1024
    result = rig.sync()
    assert result.snapshot is not None
    assert result.snapshot.stats.bytes_read < 1 << 20
    history = rig.history()
    view = history.view(1)
    meta = view.resolve(b"/sparse")
    assert meta.size == size
    assert meta.sparse
    assert history.reader.read(view, meta, (10 << 30) - 3, 20) == b"\0\0\0in the middle\0\0\0\0"
    assert history.reader.read(view, meta, size - 8, 100) == b"\0\0\0end\0\0"
    history.repository.local.close()


def test_many_files_in_one_directory(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INLINE_WORK", 1 << 20)
    rig.workers = 2
    for number in range(20_000):
        (rig.tree / f"{number:06}").write_bytes(b"%d" % number if number % 7 else b"")
    check(rig)
    (rig.tree / "010000").write_text("changed")
    (rig.tree / "010001").unlink()
    (rig.tree / "020001").write_text("new")
    before = rig.store.counts().bytes_up
    check(rig)
    assert rig.store.counts().bytes_up - before < 100_000


@pytest.mark.parametrize("moved", [False, True])
def test_a_name_that_came_in_with_its_directory(rig: Rig, tmp_path: Path, *, moved: bool) -> None:
    """Of a file that is on record under another name: neither name was touched."""
    outside, known = tmp_path / "outside", rig.tree / "known" / "below"
    outside.mkdir()
    known.mkdir(parents=True)
    (known / "file").write_text("one")
    os.link(known / "file", outside / "name")
    check(rig)
    rig.sync()  # until then times are too fresh to be believed
    outside.rename(rig.tree / "inside")
    if moved:
        (rig.tree / "known").rename(rig.tree / "elsewhere")
    check(rig)
    shutil.rmtree(rig.tree / ("elsewhere" if moved else "known"))
    check(rig)


def test_what_comes_and_goes_before_a_directory_is_visited_once_more(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the sake of a name in it; a directory that came then is visited, too."""
    outside, known = tmp_path / "outside", rig.tree / "known"
    for directory in (outside, known / "old/below"):
        directory.mkdir(parents=True)
    (known / "file").write_text("data")
    os.link(known / "file", outside / "name")
    check(rig)
    rig.sync()
    outside.rename(rig.tree / "inside")
    look = Walk._look_for_names

    def change_and_look(walk: Walk, *arguments: Any) -> None:
        if (known / "old").exists():
            shutil.rmtree(known / "old")
            (known / "new/below").mkdir(parents=True)
            (known / "new/below/file").write_text("new")
        look(walk, *arguments)

    monkeypatch.setattr(Walk, "_look_for_names", change_and_look)
    result = rig.sync()
    assert result.snapshot is not None
    found = rig.contents(result.snapshot.number)
    assert found[b"/known/new/below/file"][-1] == b"new"  # type: ignore[index]
    assert b"/known/old" not in found
    check(rig)


def test_a_name_that_came_in_at_two_places(rig: Rig, tmp_path: Path) -> None:
    """As many as the file has, though it also has one on record."""
    outside = tmp_path / "outside"
    for directory in (outside, rig.tree / "known", rig.tree / "one", rig.tree / "two"):
        directory.mkdir()
    (rig.tree / "known" / "file").write_text("data")
    os.link(rig.tree / "known" / "file", outside / "name")
    check(rig)
    with contextlib.ExitStack() as stack:
        for place in ("one", "two"):
            btrfs.run("mount", "--bind", outside, rig.tree / place)
            stack.callback(btrfs.run, "umount", rig.tree / place)
        check(rig)


def test_a_renamed_directory_is_a_few_rows(rig: Rig) -> None:
    (rig.tree / "old").mkdir()
    for number in range(2000):
        (rig.tree / "old" / f"{number}").write_bytes(os.urandom(1000))
    rig.sync()
    (rig.tree / "old").rename(rig.tree / "new")
    before = rig.store.counts().bytes_up
    result = rig.sync()
    assert (result.moved, result.new, result.deleted) == (1, 0, 0)
    assert rig.store.counts().bytes_up - before < 20_000
    assert not difference(rig.contents(2), contents_of_tree(rig.tree))


def test_a_replaced_file_uploads_what_differs(rig: Rig) -> None:
    content = bytearray(random.Random(5).randbytes(1 << 20))
    (rig.tree / "file").write_bytes(content)
    rig.sync()
    content[500_000] ^= 1
    (rig.tree / "new").write_bytes(content)
    (rig.tree / "new").rename(rig.tree / "file")
    before = rig.store.counts().bytes_up
    check(rig)
    assert rig.store.counts().bytes_up - before < 40_000


def test_unreadable_items_leave_the_rest_whole(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be opened is listed; an older state of it stays; the next sync gets it."""
    for name in ("a", "b", "c"):
        (rig.tree / name).write_text(name)
    rig.sync()
    (rig.tree / "b").write_text("b changed")
    (rig.tree / "d").write_text("new")
    (rig.tree / "e").write_text("new")
    real_open = os.open

    def refusing(path: object, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path in (b"b", b"d"):
            raise PermissionError(13, "Permission denied")
        return real_open(path, flags, mode, dir_fd=dir_fd)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refusing)
        result = rig.sync()
    assert result.unreadable == [(b"b", "permission denied"), (b"d", "permission denied")]
    found = rig.contents(2)
    assert found[b"/b"][-1] == b"b"  # type: ignore[index]
    assert found[b"/e"][-1] == b"new"  # type: ignore[index]
    assert b"/d" not in found
    check(rig)


def test_a_file_that_never_stops_changing_is_reported(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rig.tree / "busy"
    path.write_bytes(b"x" * 10_000)
    (rig.tree / "calm").write_text("calm")
    real = os.preadv

    def touching(fd: int, buffers: list[memoryview], offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("busy"):
            with path.open("ab") as file:
                file.write(b"more")
            time.sleep(0.01)
        return real(fd, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", touching)
        result = rig.sync()
    assert result.unreadable == [(b"busy", "changed while it was read")]
    assert rig.contents(1)[b"/calm"][-1] == b"calm"  # type: ignore[index]
    check(rig)


def test_filters(rig: Rig) -> None:
    tree = rig.tree
    for name in ("keep.txt", "drop.o", "sub/drop.o", "sub/keep.c", "cache/x", "marked/y"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text(name)
    (tree / "cache" / "CACHEDIR.TAG").write_text("Signature: 8a477f597d28d172789f06886806bc55")
    (tree / "marked" / ".nobackup").write_text("")
    rig.filters = Filters(("*.o",), True, (".nobackup",), False)
    rig.sync()
    assert {key for key in rig.contents(1) if key != b"links"} == {
        b"/keep.txt",
        b"/sub",
        b"/sub/keep.c",
        b"/cache",
        b"/cache/CACHEDIR.TAG",
        b"/marked",
    }
    rig.filters = Filters()
    check(rig)


def test_several_sources(tmp_path: Path) -> None:
    sources = [tmp_path / "one", tmp_path / "two"]
    for source in sources:
        (source / "sub").mkdir(parents=True)
        (source / "sub" / "file").write_text(source.name)
    rig = Rig(tmp_path, sources)
    for _ in range(2):
        rig.sync(force=True)
        for number in range(1, rig.history().snapshots[-1].number + 1):
            found = rig.contents(number)
            assert found[b"/one/sub/file"][-1] == b"one"  # type: ignore[index]
            assert found[b"/two/sub/file"][-1] == b"two"  # type: ignore[index]
        (sources[0] / "sub").rename(sources[0] / "moved")
        (sources[0] / "moved").rename(sources[0] / "sub")


def test_sources_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        Rig(tmp_path / "x", [tmp_path / "missing"]).sync()
    (tmp_path / "a" / "same").mkdir(parents=True)
    (tmp_path / "b" / "same").mkdir(parents=True)
    with pytest.raises(UsageError, match="same base name"):
        Rig(tmp_path / "y", [tmp_path / "a" / "same", tmp_path / "b" / "same"]).sync()


def test_a_large_attribute_in_which_a_pack_ends() -> None:
    """Its row is written with the pack that holds its last block."""
    base = Path(tempfile.mkdtemp(dir="/dev/shm"))  # tmpfs takes attributes of any size
    rig = Rig(base)
    (rig.tree / "a").write_bytes(os.urandom((1 << 20) - 8192))
    (rig.tree / "b").write_bytes(b"b")
    os.setxattr(rig.tree / "b", "trusted.big", os.urandom(60_000))
    check(rig)
    rig.repository.local.close()
    shutil.rmtree(base)


def test_a_dry_run_leaves_nothing_behind(rig: Rig) -> None:
    """What it met and gave numbers to was gone before the next sync, which gave them again."""
    for name in ("x", "y"):
        (rig.tree / name).mkdir()
        (rig.tree / name / "file").write_text(name)
    rig.sync()
    (rig.tree / "x" / "passing").write_text("here for a moment")
    assert rig.sync(dry_run=True).new == 1
    (rig.tree / "x" / "passing").unlink()
    (rig.tree / "y" / "other").write_text("other")
    check(rig)
    (rig.tree / "y" / "file").write_text("more")
    check(rig)


def test_what_is_mounted_by_being_opened(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As automounts are: what was listed is the directory that is mounted over."""
    (rig.tree / "place").mkdir()
    real = Scanner.visit

    def mounting(self: Scanner, lin: int, path: bytes, *rest: Any) -> DirScan | None:
        if path == b"place":
            subprocess.run(["mount", "-t", "tmpfs", "none", rig.tree / "place"], check=True)
            (rig.tree / "place/file").write_text("mounted")
        return real(self, lin, path, *rest)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(Scanner, "visit", mounting)
            result = rig.sync()
        assert result.snapshot is not None
        assert not result.unreadable
        assert b"/place/file" in rig.contents(result.snapshot.number)
        check(rig)
    finally:
        subprocess.run(["umount", rig.tree / "place"], check=True)
