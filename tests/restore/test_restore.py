"""Restores of real snapshots, compared with the trees that were backed up."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import socket
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudfs.core.errors import CloudfsError, UsageError
from cloudfs.restore import plan, restore
from cloudfs.restore.job import Interrupted
from tests.fuse.compare import ACL, assert_same, make_odd_tree
from tests.fuse.conftest import BLOCK, Bench
from tests.restore.conftest import run

NOBODY = 65534
IMMUTABLE, APPEND, NO_ATIME = 0x10, 0x20, 0x80
GETFLAGS, SETFLAGS = 0x80086601, 0x40086602


@pytest.fixture
def in_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let even the smallest restore be done by processes."""
    monkeypatch.setattr(restore, "POOL_ITEMS", 1)


@pytest.mark.parametrize("workers", [1, 3])
def test_odd_things_come_back_as_they_were(
    bench: Bench, tree: Path, out: Path, workers: int, in_pool: None
) -> None:
    make_odd_tree(tree)
    os.setxattr(tree / "dir", "system.posix_acl_default", ACL)
    (tree / "large").write_text("with a large attribute")
    os.setxattr(tree / "large", "user.large", random.Random(1).randbytes(3500))
    bench.sync(tree)
    result = run(bench, out, workers=workers)
    assert result.failures == []
    assert result.lost == {}
    assert assert_same(tree, out) >= 31
    assert result.totals.links == 1
    assert result.totals.others == 3


def test_attributes_too_large_for_a_row(bench: Bench) -> None:
    # tmpfs takes 64 KiB, ext4 does not.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as base:
        tree, out = Path(base, "tree"), Path(base, "out")
        tree.mkdir()
        (tree / "file").write_text("x")
        value = random.Random(2).randbytes(65536)
        os.setxattr(tree / "file", "trusted.large", value)
        os.setxattr(tree, "trusted.large", value[::-1])
        (tree / "trusted.other").write_text("no attribute")
        bench.sync(tree)
        assert run(bench, out).failures == []
        assert os.getxattr(out / "file", "trusted.large") == value
        assert os.getxattr(out, "trusted.large") == value[::-1]
        assert sorted(os.listdir(out)) == ["file", "trusted.other"]


def test_holes_stay_holes(bench: Bench, tree: Path, out: Path) -> None:
    tree.mkdir()
    with (tree / "sparse").open("wb") as file:
        file.truncate(20 << 30)
        file.seek(7 << 30)
        file.write(b"island")
    with (tree / "within a block").open("wb") as file:
        file.write(b"a" * 4096)
        file.seek(40960)
        file.write(b"b" * 4096)
    with (tree / "written zeros").open("wb") as file:
        file.write(bytes(4 * BLOCK))
    bench.sync(tree)
    assert run(bench, out).failures == []
    assert (out / "sparse").stat().st_size == 20 << 30
    assert (out / "sparse").stat().st_blocks * 512 <= BLOCK
    with (out / "sparse").open("rb") as file:
        file.seek((7 << 30) - 2)
        assert file.read(10) == b"\0\0island\0\0"
    assert (out / "within a block").read_bytes() == (tree / "within a block").read_bytes()
    assert (out / "within a block").stat().st_blocks * 512 <= 8192
    assert (out / "written zeros").stat().st_blocks * 512 >= 4 * BLOCK


def test_large_files_are_shared_by_workers(
    bench: Bench, tree: Path, out: Path, monkeypatch: pytest.MonkeyPatch, in_pool: None
) -> None:
    monkeypatch.setattr(plan, "WHOLE_BYTES", BLOCK)
    tree.mkdir()
    data = random.Random(3).randbytes(70 * BLOCK + 17)
    (tree / "large").write_bytes(data)
    (tree / "large").chmod(0o4755)
    os.link(tree / "large", tree / "other name")
    with (tree / "sparse").open("wb") as file:
        file.write(data[: 3 * BLOCK])
        file.seek(100 * BLOCK)
        file.write(data[: 3 * BLOCK])
    bench.sync(tree)
    result = run(bench, out, workers=3)
    assert result.failures == []
    assert_same(tree, out)
    assert (out / "sparse").stat().st_blocks == (tree / "sparse").stat().st_blocks


def test_each_snapshot_comes_back(bench: Bench, tree: Path, tmp_path: Path) -> None:
    """Blocks of one file in several packs; a file cut short and grown again."""
    tree.mkdir()
    data = bytearray(random.Random(4).randbytes(9 * BLOCK))
    (tree / "a").write_bytes(data)
    (tree / "b").write_bytes(data)
    bench.sync(tree)
    first = bytes(data)
    data[4 * BLOCK + 5] ^= 1
    (tree / "a").write_bytes(data)
    os.truncate(tree / "b", BLOCK + 1)
    bench.sync(tree)
    os.truncate(tree / "b", 9 * BLOCK)
    bench.sync(tree)
    for number, (a, b) in enumerate(
        (
            (first, first),
            (data, first[: BLOCK + 1]),
            (data, first[: BLOCK + 1] + bytes(8 * BLOCK - 1)),
        ),
        start=1,
    ):
        target = tmp_path / f"out{number}"
        assert run(bench, target, snapshot=number).failures == []
        assert (target / "a").read_bytes() == a
        assert (target / "b").read_bytes() == b


def test_paths_longer_than_the_kernel_takes(bench: Bench, tree: Path, out: Path) -> None:
    tree.mkdir()
    name, depth = "d" * 200, 300
    fds = [os.open(tree, os.O_RDONLY)]
    for _ in range(depth):
        os.mkdir(name, dir_fd=fds[-1])
        fds.append(os.open(name, os.O_RDONLY, dir_fd=fds.pop()))
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, 0o640, dir_fd=fds[-1]))
    os.utime("file", ns=(1, 2), dir_fd=fds[-1])
    os.close(fds.pop())
    bench.sync(tree)
    assert run(bench, out).failures == []
    fd = os.open(out, os.O_RDONLY)
    for _ in range(depth):
        deeper = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = deeper
    status = os.stat("file", dir_fd=fd)
    os.close(fd)
    assert (status.st_mode, status.st_mtime_ns) == (stat.S_IFREG | 0o640, 2)
    subprocess.run(["rm", "-rf", tree, out], check=True)  # too deep for shutil


def _flags(path: Path, flags: int | None = None) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        found = int.from_bytes(fcntl.ioctl(fd, GETFLAGS, bytes(8))[:4], "little")
        if flags is not None:
            fcntl.ioctl(fd, SETFLAGS, flags.to_bytes(8, "little"))
        return found
    finally:
        os.close(fd)


@pytest.fixture
def unlocked(tree: Path, out: Path) -> Iterator[None]:
    """Take the locking flags away at the end, or nobody could delete the trees."""
    yield
    for base in (tree, out):
        if base.exists():
            subprocess.run(["chattr", "-R", "-ia", base], check=True)


def test_flags(bench: Bench, tree: Path, out: Path, unlocked: None) -> None:
    (tree / "dir").mkdir(parents=True)
    (tree / "fixed").write_text("immutable")
    os.link(tree / "fixed", tree / "dir" / "same")
    (tree / "log").write_text("append only")
    (tree / "dir" / "file").write_text("in an immutable directory")
    for name, flags in (("fixed", IMMUTABLE), ("log", APPEND | NO_ATIME), ("dir", IMMUTABLE)):
        _flags(tree / name, _flags(tree / name) | flags)
    bench.sync(tree)
    assert run(bench, out).failures == []
    assert_same(tree, out)
    locking = IMMUTABLE | APPEND | NO_ATIME
    for name in ("fixed", "log", "dir", "dir/file", "dir/same"):
        assert _flags(out / name) & locking == _flags(tree / name) & locking, name


def test_a_directory_and_a_file_below(bench: Bench, tree: Path, tmp_path: Path) -> None:
    make_odd_tree(tree)
    bench.sync(tree)
    run(bench, tmp_path / "some", "/dir/in")
    # Of the hard link only this name is restored.
    (tree / "length-1").unlink()
    assert_same(tree / "dir" / "in", tmp_path / "some")
    run(bench, tmp_path / "one", "/tagged")
    assert os.listdir(tmp_path / "one") == ["tagged"]
    assert os.getxattr(tmp_path / "one" / "tagged", "system.posix_acl_access") == ACL
    run(bench, tmp_path / "link", "/dangling")
    assert os.readlink(os.fsencode(tmp_path / "link" / "dangling")) == b"\xff\xfe nowhere"
    with pytest.raises(UsageError, match="there is no /nowhere in snapshot 1"):
        run(bench, tmp_path / "none", "/nowhere")
    assert not (tmp_path / "none").exists()


def test_the_target_is_new_or_empty(bench: Bench, tree: Path, out: Path, tmp_path: Path) -> None:
    tree.mkdir()
    (tree / "file").write_text("x")
    bench.sync(tree)
    out.mkdir()
    os.setxattr(out, "system.posix_acl_default", ACL)
    assert run(bench, out).failures == []
    assert_same(tree, out)
    with pytest.raises(UsageError, match="is not empty"):
        run(bench, out)
    with pytest.raises(UsageError, match="is no directory"):
        run(bench, out / "file")
    with pytest.raises(UsageError, match=r"in which .* is to be made, is no directory"):
        run(bench, tmp_path / "no" / "where")


def test_a_dry_run_writes_nothing(bench: Bench, tree: Path, out: Path) -> None:
    tree.mkdir()
    (tree / "file").write_bytes(b"x" * 100)
    bench.sync(tree)
    result = run(bench, out, dry_run=True)
    assert (result.totals.files, result.totals.size, result.totals.packs) == (1, 100, 1)
    assert not out.exists()


def test_a_damaged_pack_costs_what_lies_in_it(bench: Bench, tree: Path, out: Path) -> None:
    tree.mkdir()
    noise = random.Random(5)
    for name in "abcdef":
        (tree / name).write_bytes(noise.randbytes(12 * BLOCK))
    bench.sync(tree)
    packs = [p for p in bench.base.joinpath("repo").rglob("*") if p.stat().st_size > 60 * BLOCK]
    assert len(packs) == 1
    data = bytearray(packs[0].read_bytes())
    data[len(data) // 2] ^= 1
    packs[0].chmod(0o600)
    packs[0].write_bytes(data)
    result = run(bench, out)
    assert result.damaged
    lost = {path.decode() for path, _ in result.failures}
    assert 1 <= len(lost) <= 3
    assert all("does not verify" in reason for _, reason in result.failures)
    assert {path.name for path in out.iterdir()} == set("abcdef") - lost
    for path in out.iterdir():
        assert path.read_bytes() == (tree / path.name).read_bytes()


def test_a_damaged_block_removes_a_file_in_pieces(
    bench: Bench, tree: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "WHOLE_BYTES", BLOCK)
    tree.mkdir()
    (tree / "large").write_bytes(random.Random(6).randbytes(40 * BLOCK))
    (tree / "small").write_text("small")
    bench.sync(tree)
    for path in bench.base.joinpath("repo").rglob("*"):
        if path.is_file() and path.stat().st_size > 30 * BLOCK:
            data = bytearray(path.read_bytes())
            data[20 * BLOCK] ^= 1
            path.chmod(0o600)
            path.write_bytes(data)
    result = run(bench, out)
    assert {path for path, _ in result.failures} == {b"large"}
    assert os.listdir(out) == ["small"]


def test_a_pack_that_is_gone(bench: Bench, tree: Path, out: Path) -> None:
    tree.mkdir()
    (tree / "file").write_bytes(random.Random(7).randbytes(2 * BLOCK))
    (tree / "empty").touch()
    bench.sync(tree)
    for path in bench.base.joinpath("repo").rglob("*"):
        if path.is_file() and path.stat().st_size > BLOCK:
            path.unlink()
    result = run(bench, out)
    assert result.damaged
    assert [path for path, _ in result.failures] == [b"file"]
    assert "is missing" in result.failures[0][1]
    assert os.listdir(out) == ["empty"]


def test_setuid_only_with_its_owner(bench: Bench, tree: Path, out: Path, tmp_path: Path) -> None:
    tree.mkdir()
    (tree / "theirs").write_text("x")
    os.chown(tree / "theirs", 1234, 1234)
    (tree / "theirs").chmod(0o6755)
    (tree / "ours").write_text("x")
    (tree / "ours").chmod(0o6755)
    bench.sync(tree)
    result = run(bench, out, owners="none")
    assert (out / "theirs").stat().st_mode & 0o7777 == 0o755
    assert (out / "theirs").stat().st_uid == 0
    assert (out / "ours").stat().st_mode & 0o7777 == 0o6755
    assert result.lost == {"setuid or setgid": 1}
    # No user of this machine has the number 1234, so by name it is the number again.
    assert run(bench, tmp_path / "named", owners="name").lost == {}
    assert (tmp_path / "named" / "theirs").stat().st_uid == 1234


def test_who_is_not_root_gets_the_rest() -> None:
    with tempfile.TemporaryDirectory() as base:
        bench = Bench(Path(base))
        tree, out = Path(base, "tree"), Path(base, "out")
        tree.mkdir()
        (tree / "closed").mkdir()
        (tree / "closed" / "file").write_text("x")
        (tree / "closed" / "file").chmod(0o4400)
        os.setxattr(tree / "closed" / "file", "user.mine", b"1")
        os.setxattr(tree / "closed" / "file", "trusted.theirs", b"2")
        (tree / "closed").chmod(0o500)
        os.mkfifo(tree / "fifo")
        os.mknod(tree / "device", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        bench.sync(tree)
        for path in (Path(base), *Path(base).rglob("*")):
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
        try:
            result = run(bench, out)
        finally:
            os.seteuid(0)
            os.setegid(0)
        bench.close()
        assert [path for path, _ in result.failures] == [b"device"]
        assert set(result.lost) == {
            "owner", "group", "setuid or setgid", "attribute trusted.theirs"
        } - ({"group"} if 0 in os.getgroups() else set())  # fmt: skip
        file = out / "closed" / "file"
        assert file.read_text() == "x"
        assert stat.S_IMODE(file.stat().st_mode) == 0o400
        assert file.stat().st_uid == NOBODY
        assert file.stat().st_mtime_ns == (tree / "closed" / "file").stat().st_mtime_ns
        assert os.listxattr(file) == ["user.mine"]
        assert stat.S_IMODE((out / "closed").stat().st_mode) == 0o500


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk(bench: Bench, tree: Path, tmp_path: Path, workers: int, in_pool: None) -> None:
    tree.mkdir()
    for number in range(64):
        (tree / f"{number}").write_bytes(random.Random(number).randbytes(BLOCK))
    bench.sync(tree)
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", small], check=True)
    try:
        with pytest.raises(CloudfsError, match=r"there is no room left for .*/out") as caught:
            run(bench, small / "out", workers=workers)
        assert "Free some space" in str(caught.value)
        left = list((small / "out").iterdir())
        assert 0 < len(left) < 64
        if workers == 1:
            for path in left:
                assert path.read_bytes() == (tree / path.name).read_bytes()
    finally:
        subprocess.run(["umount", small], check=True)


def test_stopping(bench: Bench, tree: Path, out: Path) -> None:
    tree.mkdir()
    (tree / "file").write_text("x")
    bench.sync(tree)
    with pytest.raises(Interrupted, match="items were restored and are left in"):
        run(bench, out, stopped=lambda: True)


def test_requests_are_few(bench: Bench, tree: Path, out: Path) -> None:
    """2,000 files in 20 directories come by a handful of requests."""
    noise = random.Random(8)
    for number in range(2000):
        path = tree / f"{number // 100}" / f"{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise.randbytes(noise.randrange(5000)))
    bench.sync(tree)
    before = bench.repository.store.counts()
    result = run(bench, out)
    used = bench.repository.store.counts() - before
    assert result.totals.requests == 1
    assert used.gets <= 6
    assert_same(tree, out)


def test_sockets_are_sockets(bench: Bench, tree: Path, out: Path) -> None:
    tree.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tree / "socket"))
        bench.sync(tree)
    run(bench, out)
    assert stat.S_ISSOCK((out / "socket").lstat().st_mode)


def test_an_item_that_fails_is_listed(
    bench: Bench, tree: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree.mkdir()
    (tree / "a").write_text("a")
    (tree / "b").write_text("b")
    bench.sync(tree)
    real = os.fchown
    calls = []

    def refuse_first(fd: int, uid: int, gid: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        real(fd, uid, gid)

    monkeypatch.setattr(os, "fchown", refuse_first)
    result = run(bench, out)
    assert result.failures == [(b"a", "operation not permitted")]
    assert not result.damaged
    assert (out / "b").read_text() == "b"
