"""Big things: what they cost when little of them changes, and that all of them comes back."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudfs.repo.pool import WorkerOpening
from cloudfs.restore.job import RestoreJob
from cloudfs.restore.restore import restore
from cloudfs.store.open import StoreOptions
from tests.engine.rig import Quiet, Rig

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("big")]

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BLOCK = 128 * KIB
PIECE = 8 * MIB


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    """A directory that is emptied at the end: pytest would keep what is too large to be kept."""
    yield tmp_path
    subprocess.run(["rm", "-rf", *tmp_path.iterdir()], check=True)


def rig_at(base: Path) -> Rig:
    """As policies are by default: the tests of small things have smaller blocks and packs."""
    return Rig(base, block_size=BLOCK, max_pack_bytes=48 * MIB, workers=0)


def stored(rig: Rig) -> int:
    """The bytes of all objects."""
    return sum(info.size_bytes for info in rig.store.list(""))


def grows_by(rig: Rig) -> int:
    """Sync; how many bytes more lie in the store."""
    before = stored(rig)
    result = rig.sync()
    assert result.snapshot is not None
    assert not result.unreadable
    return stored(rig) - before


def comes_back(rig: Rig, out: Path) -> None:
    """Restore the newest snapshot on another machine; it is what the tree is."""
    history = rig.history()
    repository = history.repository
    local = repository.local
    opening = WorkerOpening(
        rig.url, StoreOptions(), repository.opening, local.cache_dir, local.state_dir
    )
    number = history.snapshots[-1].number
    with contextlib.closing(history):
        result = restore(RestoreJob(history, number, b"/", os.fsencode(out), opening), Quiet())
    local.close()
    assert (result.failures, result.lost, result.damaged) == ([], {}, False)
    assert_alike(rig.tree, out)


def assert_alike(one: Path, other: Path) -> None:
    """Both trees are the same in names, metadata, content and holes."""
    assert_item_alike(os.fsencode(one), os.fsencode(other))
    for directory, dirs, files in os.walk(os.fsencode(one)):
        twin = os.fsencode(other) + directory[len(os.fsencode(one)) :]
        assert sorted(os.listdir(twin)) == sorted(dirs + files)
        for name in dirs + files:
            assert_item_alike(directory + b"/" + name, twin + b"/" + name)


def assert_item_alike(one: bytes, other: bytes) -> None:
    a, b = os.lstat(one), os.lstat(other)
    for field in ("st_mode", "st_uid", "st_gid", "st_nlink", "st_mtime_ns", "st_rdev"):
        assert getattr(a, field) == getattr(b, field), (one, field)
    assert attributes(one) == attributes(other), one
    if stat.S_ISREG(a.st_mode):
        assert a.st_size == b.st_size, one
        assert_same_data(one, other)
    elif stat.S_ISLNK(a.st_mode):
        assert os.readlink(one) == os.readlink(other)


def attributes(path: bytes) -> dict[str, bytes]:
    names = os.listxattr(path, follow_symlinks=False)
    return {name: os.getxattr(path, name, follow_symlinks=False) for name in names}


def assert_same_data(one: bytes, other: bytes) -> None:
    """The same bytes; what is a hole here is a hole there. (Of a file that has holes, zeros that
    were written may come back as holes too: see rule 3 of cloudfs.restore.write.)"""
    with open(one, "rb", buffering=0) as a, open(other, "rb", buffering=0) as b:
        blocks = data_blocks(a.fileno())
        for first, last in data_blocks(b.fileno()):
            assert any(low <= first and last <= high for low, high in blocks), (one, first)
        if blocks == [(0, -(-os.fstat(a.fileno()).st_size // BLOCK) * BLOCK)]:
            assert data_blocks(b.fileno()) == blocks, one
        for first, last in blocks:
            for offset in range(first, last, PIECE):
                length = min(PIECE, last - offset)
                found = os.pread(b.fileno(), length, offset)
                assert os.pread(a.fileno(), length, offset) == found, (one, offset)


def data_blocks(fd: int) -> list[tuple[int, int]]:
    """Where a file has data, in whole blocks: (first, after the last) byte."""
    found: list[tuple[int, int]] = []
    end = os.fstat(fd).st_size
    place = 0
    while place < end:
        try:
            first = os.lseek(fd, place, os.SEEK_DATA)
        except OSError:  # nothing but a hole up to the end
            break
        place = os.lseek(fd, first, os.SEEK_HOLE)
        low, high = first // BLOCK * BLOCK, -(-place // BLOCK) * BLOCK
        if found and low <= found[-1][1]:
            low = found.pop()[0]
        found.append((low, high))
    return found


def test_one_block_of_a_file_of_4_gib(base: Path) -> None:
    rig = rig_at(base)
    path = rig.tree / "large"
    tile = bytearray(random.Random(1).randbytes(PIECE))  # which no compressor makes smaller
    with path.open("wb") as file:
        for number in range(4 * GIB // PIECE):
            for place in range(0, PIECE, 4096):
                tile[place : place + 8] = (number * PIECE + place).to_bytes(8, "big")
            file.write(tile)
    assert grows_by(rig) > 4 * GIB
    with path.open("r+b") as file:
        file.seek(2 * GIB + 12_288)
        file.write(os.urandom(4096))
    assert 4096 < grows_by(rig) < MIB
    comes_back(rig, base / "out")


def test_a_directory_of_10_000_files_is_renamed(base: Path) -> None:
    rig = rig_at(base)
    (rig.tree / "old" / "below").mkdir(parents=True)
    dice = random.Random(2)
    for number in range(10_000):
        where = "old/below" if number % 3 else "old"
        (rig.tree / where / f"file {number}").write_bytes(dice.randbytes(dice.randrange(2000)))
    assert grows_by(rig) > 5 * MIB
    (rig.tree / "old").rename(rig.tree / "new")
    assert grows_by(rig) < MIB
    comes_back(rig, base / "out")


def test_100_000_files_in_one_directory(base: Path) -> None:
    rig = rig_at(base)
    for number in range(100_000):
        path = rig.tree / f"{number * 7919 % 100_000:05} of many"
        path.write_bytes(b"%d" % number * (number % 50))
    grows_by(rig)
    (rig.tree / "50000 of many").write_text("changed")
    (rig.tree / "50001 of many").unlink()
    (rig.tree / "one more").write_text("new")
    assert grows_by(rig) < MIB
    comes_back(rig, base / "out")


def test_a_sparse_file_of_20_gib(base: Path) -> None:
    rig = rig_at(base)
    dice = random.Random(3)
    with (rig.tree / "sparse").open("wb") as file:
        file.truncate(20 * GIB)
        for place in (0, 5 * GIB - 100, 10 * GIB + BLOCK, 20 * GIB - 7):
            file.seek(place)
            file.write(dice.randbytes(7))
        file.seek(15 * GIB)
        file.write(bytes(2 * BLOCK))  # zeros that are data, not a hole
    with (rig.tree / "nothing").open("wb") as file:
        file.truncate(20 * GIB)
    assert grows_by(rig) < MIB
    comes_back(rig, base / "out")
    assert os.stat(base / "out" / "nothing").st_blocks == 0


# -- 64 KiB of attributes, which not every file system holds ------------------------------------

FILE_SYSTEMS = {
    "xfs": ("xfsprogs", ["mkfs.xfs", "-q"], [64 * KIB]),
    "btrfs": ("btrfs-progs", ["mkfs.btrfs", "-q"], [15_000] * 5),
    "ext4": ("e2fsprogs", ["mkfs.ext4", "-q", "-O", "ea_inode"], [64 * KIB, 5000]),
}
"""By name: the Debian package, how one is made, and sizes of values that one item can have."""


def run(*command: str | Path, package: str) -> None:
    """Run what a test cannot do without; one line says what is missing."""
    if shutil.which(str(command[0])) is None:
        pytest.fail(f"{command[0]} is missing: install {package}.", pytrace=False)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-1:]
        pytest.fail(f"{' '.join(map(str, command))} failed: {said}", pytrace=False)


@contextlib.contextmanager
def image(kind: str, base: Path) -> Iterator[Path]:
    """A file system of that kind, in a file."""
    package, make, _ = FILE_SYSTEMS[kind]
    place, file = base / kind, base / f"{kind}.image"
    place.mkdir()
    with file.open("wb") as made:
        made.truncate(GIB)
    run(*make, file, package=package)
    run("mount", "-o", "loop", file, place, package="mount")
    try:
        yield place
    finally:
        run("umount", place, package="mount")
        place.rmdir()


@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_64_kib_of_attributes(base: Path, kind: str) -> None:
    dice = random.Random(4)
    with image(kind, base) as place:
        rig = Rig(base, [place / "tree"], block_size=BLOCK)
        (rig.tree / "dir").mkdir(parents=True)
        (rig.tree / "file").write_text("small beside its attributes")
        (rig.tree / "link").symlink_to("file")
        for path in (rig.tree / "dir", rig.tree / "file", rig.tree / "link"):
            for number, size in enumerate(FILE_SYSTEMS[kind][2]):
                name = f"trusted.{number}"
                os.setxattr(path, name, dice.randbytes(size), follow_symlinks=False)
            assert sum(map(len, attributes(os.fsencode(path)).values())) >= 64 * KIB
        grows_by(rig)
        comes_back(rig, place / "out")
        (rig.tree / "file").write_text("changed, and its attributes are not")
        assert grows_by(rig) < 16 * KIB
        os.removexattr(rig.tree / "dir", "trusted.0")
        os.setxattr(rig.tree / "file", "trusted.0", b"small now")
        grows_by(rig)
        comes_back(rig, place / "out 2")
