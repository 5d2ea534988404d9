"""What a user sees of backups through a real mount."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest

from cloudfs.core.rows import ItemType
from cloudfs.fuse import mountpoint as places
from cloudfs.fuse.inodes import split
from cloudfs.fuse.mounting import READ_AHEAD_KIB
from cloudfs.fuse.turns import TASKS
from tests.fuse.compare import assert_same, make_odd_tree
from tests.fuse.conftest import BLOCK, Bench, wait_until


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The live tree."""
    root = tmp_path / "tree"
    make_odd_tree(root)
    return root


@pytest.fixture
def mnt(tmp_path: Path) -> Path:
    """Where to mount."""
    return tmp_path / "mnt"


def test_odd_things_look_as_they_were(bench: Bench, tree: Path, mnt: Path) -> None:
    bench.sync(tree)
    with bench.mounted(mnt):
        assert assert_same(tree, mnt / "latest") == 30


def test_copying_out_is_a_restore(bench: Bench, tree: Path, mnt: Path, tmp_path: Path) -> None:
    bench.sync(tree)
    with bench.mounted(mnt):
        subprocess.run(["cp", "-a", f"{mnt}/latest/.", tmp_path / "out"], check=True)
    assert assert_same(tree, tmp_path / "out") == 30


def test_large_attributes_are_read_from_blocks(bench: Bench, mnt: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    value = os.urandom(40_000)
    try:
        os.setxattr(tree / "sub", "user.large", value)
    except OSError as error:  # ext4 has room for one block of them, tmpfs and btrfs for 64 KiB
        assert error.errno in (errno.ENOSPC, errno.E2BIG)
        value = value[:3_500]
        os.setxattr(tree / "sub", "user.large", value)
    (tree / "sub" / "file").write_text("beside it")
    bench.sync(tree)
    with bench.mounted(mnt):
        assert assert_same(tree, mnt / "latest") == 3
        assert os.getxattr(mnt / "latest" / "sub", "user.large") == value


def test_every_snapshot_stays_as_it_was(bench: Bench, tree: Path, mnt: Path) -> None:
    first = bench.sync(tree)
    with bench.mounted(mnt):
        (tree / "length-1").write_text("now longer")
        (tree / "new").write_text("new")
        (tree / "fifo").unlink()
        second = bench.sync(tree)
        wait_until(lambda: "2" in os.listdir(mnt / "by-number"))
        wait_until(lambda: os.readlink(mnt / "latest") == os.readlink(mnt / "by-number/2")[3:])
        old, new = mnt / "by-number" / "1", mnt / "by-number" / "2"
        assert (first.number, second.number) == (1, 2)
        assert (old / "length-1").stat().st_size == 1
        assert not (old / "new").exists()
        assert (old / "fifo").exists()
        assert (new / "new").read_text() == "new"
        assert not (new / "fifo").exists()
        assert_same(tree, new)


def test_snapshots_are_named_by_local_time(bench: Bench, tree: Path, mnt: Path) -> None:
    record = bench.sync(tree)
    (tree / "more").write_text("more")
    bench.sync(tree)
    name = datetime.fromtimestamp(record.time_ns // 10**9).isoformat()
    with bench.mounted(mnt):
        names = sorted(os.listdir(mnt))
        assert names[0] == name
        assert names[2:] == ["by-number", "latest"]
        assert os.readlink(mnt / "latest") == names[1]
        assert os.readlink(mnt / "by-number" / "1") == f"../{name}"
        with pytest.raises(FileNotFoundError):
            os.stat(mnt / "by-number" / "01")
        with pytest.raises(FileNotFoundError):
            os.stat(mnt / "nothing")


def test_inode_numbers_are_lins(bench: Bench, tree: Path, mnt: Path) -> None:
    bench.sync(tree)
    history = bench.history()
    view = history.view(1)
    with bench.mounted(mnt):
        for path, entry, meta in view.walk():
            shown = Path(os.fsdecode(os.fsencode(mnt / "latest") + path))
            ino = shown.lstat().st_ino
            assert split(ino) == (1, entry.lin)
            if meta.type == ItemType.REGULAR:
                assert os.getxattr(shown, "user.cloudfs.lin") == b"%d" % entry.lin
        assert (mnt / "latest/length-1").stat().st_ino == (
            mnt / "latest/dir/in/dir/hard-link"
        ).stat().st_ino
    history.close()


def test_attributes_of_cloudfs_can_be_read_but_are_not_listed(
    bench: Bench, tree: Path, mnt: Path
) -> None:
    bench.sync(tree)
    with bench.mounted(mnt):
        file = mnt / "latest" / f"length-{3 * BLOCK}"
        assert os.listxattr(file) == []
        assert os.getxattr(file, "user.cloudfs.snapshot") == b"1"
        packs = os.getxattr(file, "user.cloudfs.packs").decode().splitlines()
        assert packs
        assert all((bench.base / "repo" / name).is_file() for name in packs)
        for path, name in (("dir", "user.cloudfs.packs"), ("dir", "user.no"), ("", "user.no")):
            with pytest.raises(OSError) as raised:
                os.getxattr(mnt / "latest" / path, name)
            assert raised.value.errno == errno.ENODATA


def test_holes_take_no_room(bench: Bench, tree: Path, mnt: Path) -> None:
    bench.sync(tree)
    with bench.mounted(mnt):
        found = (mnt / "latest" / "sparse").stat()
        assert found.st_size == 50 * BLOCK
        assert found.st_blocks * 512 == BLOCK
        listed = next(e for e in os.scandir(mnt / "latest") if e.name == "sparse")
        assert listed.stat().st_blocks * 512 == BLOCK


def test_a_large_directory_is_listed_whole(bench: Bench, mnt: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    names = [f"{'x' * (i % 90)}{i}" for i in range(3000)]
    for name in names:
        (tree / name).touch()
    bench.sync(tree)
    with bench.mounted(mnt):
        assert sorted(os.listdir(mnt / "latest")) == sorted(names)
        assert [e.stat().st_size for e in os.scandir(mnt / "latest")] == [0] * 3000


def test_large_files_are_read_whole_and_in_pieces(bench: Bench, mnt: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    data = os.urandom(30 << 20)
    (tree / "large").write_bytes(data)
    bench.sync(tree)
    with bench.mounted(mnt):
        file = mnt / "latest" / "large"
        with file.open("rb", buffering=0) as opened:
            for offset in (25 << 20, 3, (7 << 20) - 1, BLOCK * 64 - 5, len(data) - 10, len(data)):
                assert os.pread(opened.fileno(), 100_000, offset) == data[offset:][:100_000]
        assert file.read_bytes() == data


def test_many_readers_at_once(bench: Bench, mnt: Path, tmp_path: Path) -> None:
    """More of them than questions are worked on at a time."""
    tree = tmp_path / "tree"
    tree.mkdir()
    content = {f"{number}": os.urandom(300_000) for number in range(100)}
    for name, data in content.items():
        (tree / name).write_bytes(data)
    bench.sync(tree)
    with bench.mounted(mnt), ThreadPoolExecutor(3 * TASKS) as readers:
        names = list(content) * 2
        found = readers.map(lambda name: (mnt / "latest" / name).read_bytes(), names)
        for name, data in zip(names, found, strict=True):
            assert data == content[name]


def test_several_policies_have_a_directory_each(bench: Bench, mnt: Path, tmp_path: Path) -> None:
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "of").write_text(name)
        bench.sync(tmp_path / name, policy=name)
    with bench.mounted(mnt):
        assert sorted(os.listdir(mnt)) == ["home", "work"]
        for name in ("home", "work"):
            assert (mnt / name / "latest" / "of").read_text() == name
            assert sorted(os.listdir(mnt / name))[1:] == ["by-number", "latest"]
        inodes = {(mnt / name / "latest" / "of").stat().st_ino for name in ("home", "work")}
        assert len(inodes) == 2


def test_a_policy_without_snapshots_shows_its_first(bench: Bench, tree: Path, mnt: Path) -> None:
    bench.policies["home"] = bench.repository.save_policy("home", "")
    with bench.mounted(mnt):
        assert os.listdir(mnt) == ["by-number"]
        bench.sync(tree)
        wait_until(lambda: "latest" in os.listdir(mnt))
        assert (mnt / "latest" / "new\nline").read_text() == "2"


def test_nothing_can_be_changed(bench: Bench, tree: Path, mnt: Path) -> None:
    bench.sync(tree)
    with bench.mounted(mnt):
        file = mnt / "latest" / "length-1"
        for change in (
            lambda: file.write_text("x"),
            file.unlink,
            (mnt / "latest" / "made").mkdir,
            lambda: file.chmod(0),
            lambda: os.setxattr(file, "user.x", b""),
            (mnt / "made").mkdir,
        ):
            with pytest.raises(OSError) as raised:
                change()
            assert raised.value.errno == errno.EROFS


def test_two_mounts_at_once(bench: Bench, tree: Path, mnt: Path, tmp_path: Path) -> None:
    bench.sync(tree)
    other = tmp_path / "other"
    with bench.mounted(mnt), bench.mounted(other):
        assert_same(mnt / "latest", other / "latest")
        found = {mounted.mountpoint: mounted for mounted in places.mounts()}
        assert found[str(mnt)].url == bench.url
        assert found[str(other)].health() is places.Health.ALIVE
    assert str(mnt) not in {mounted.mountpoint for mounted in places.mounts()}


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A directory that every user reaches: pytest closes its own ones again whenever it starts."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        os.chmod(place, 0o755)
        yield Path(place)


def test_modes_are_obeyed(bench: Bench, tree: Path, open_to_all: Path) -> None:
    tree.chmod(0o755)
    mnt = open_to_all / "mnt"
    (tree / "length-1").chmod(0o600)
    bench.sync(tree)
    reads = ["setpriv", "--reuid=1234", "--regid=1234", "--clear-groups", "cat"]
    with bench.mounted(mnt, allow_other=True):
        for name, allowed in (("dir/in/dir/file", True), ("length-1", False), ("tagged", True)):
            done = subprocess.run([*reads, mnt / "latest" / name], capture_output=True, check=False)
            assert (done.returncode == 0) is allowed, (name, done.stderr)


def test_the_kernel_reads_far_ahead_and_knows_the_size(bench: Bench, tree: Path, mnt: Path) -> None:
    record = bench.sync(tree)
    with bench.mounted(mnt):
        device = places.device_of(str(mnt))
        assert Path(f"/sys/class/bdi/{device}/read_ahead_kb").read_text() == f"{READ_AHEAD_KIB}\n"
        found = os.statvfs(mnt)
        assert found.f_blocks * found.f_frsize >= record.stats.bytes_total
        assert found.f_files == record.stats.files + record.stats.dirs + (
            record.stats.symlinks + record.stats.others
        )
        assert (found.f_bfree, found.f_namemax) == (0, 255)


@pytest.mark.parametrize("before", [1, 2])
def test_policies_that_come_later_appear(
    bench: Bench, mnt: Path, tmp_path: Path, before: int
) -> None:
    names = ["home", "work", "latest", "by-number"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "of").write_text(name)
    for name in names[:before]:
        bench.sync(tmp_path / name, policy=name)
    with bench.mounted(mnt, whole=True):
        top = set(os.listdir(mnt))
        shown = mnt / ("latest" if before == 1 else "home/latest") / "of"
        with shown.open() as opened:
            for name in names[before:]:
                bench.sync(tmp_path / name, policy=name)
            wait_until(lambda: len(os.listdir(mnt)) == len(top) + len(names) - before)
            assert top < set(os.listdir(mnt))
            assert opened.read() == shown.read_text() == "home"  # what was there stays
        for name in names[before:]:
            found = [n for n in set(os.listdir(mnt)) - top if n.partition(".")[0] == name]
            assert (mnt / found[0] / "latest" / "of").read_text() == name
            assert sorted(os.listdir(mnt / found[0]))[1:] == ["by-number", "latest"]
        (tmp_path / "work" / "more").write_text("more")
        bench.sync(tmp_path / "work", policy="work")
        wait_until((mnt / "work" / "latest" / "more").exists)
        inodes = [entry.inode() for entry in os.scandir(mnt)]
        assert len(set(inodes)) == len(inodes)


def test_a_mount_of_one_policy_shows_no_other(bench: Bench, tree: Path, mnt: Path) -> None:
    bench.sync(tree)
    with bench.mounted(mnt):
        top = os.listdir(mnt)
        bench.sync(tree, policy="work")
        began = time.monotonic()
        while time.monotonic() - began < 2.5:  # twice as long as news take here
            assert os.listdir(mnt) == top
            time.sleep(0.1)


def test_a_damaged_newcomer_is_logged_once_and_hides_nothing(
    bench: Bench, tree: Path, mnt: Path, tmp_path: Path
) -> None:
    bench.sync(tree)
    log = tmp_path / "log"
    with bench.mounted(mnt, whole=True, log_file=log):
        copy = bench.base / "repo" / "policy" / ("0" * 32)
        copy.write_bytes(b"garbage")
        bench.sync(tree, policy="work")
        wait_until(lambda: "work" in os.listdir(mnt))
        first = time.monotonic()
        wait_until(lambda: time.monotonic() - first > 2.5 and bool(os.listdir(mnt)))
        assert log.read_text().count("is damaged") == 1
        assert (mnt / "latest" / "new\nline").read_text() == "2"
