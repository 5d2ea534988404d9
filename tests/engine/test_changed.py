"""A sync by a changelist costs what changed, not what is there: counted, not timed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.engine import btrfs, loops
from tests.engine.calls import Calls, count_calls
from tests.engine.rig import Rig
from tests.engine.watched import Watched

CHANGED = 100
IN_A_DIRECTORY = 10
FILE_BYTES = 3000
ALLOWED = 1.3
MIB = 1 << 20

Make = Callable[[str], Rig]


class Cost(NamedTuple):
    """What a sync did."""

    calls: int
    bytes_read: int
    requests: int


@pytest.fixture(params=["btrfs", "watch"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes rigs with an empty tree, by name, on a file system that their source is for."""
    base = Path(tempfile.mkdtemp(prefix="cloudfs-changed-", dir="/dev/shm"))
    size = 4 << 30
    made: list[Rig] = []

    def rig(name: str) -> Rig:
        (place / name).mkdir()
        if request.param == "watch":
            made.append(Watched(place / name))
        else:
            made.append(Rig(place / name, [btrfs.subvolume(place / name / "t")], source="btrfs"))
        return made[-1]

    is_btrfs = request.param == "btrfs"
    with (
        btrfs.file_system(base, size)
        if is_btrfs
        else loops.file_system(base, "ext4", size) as place
    ):
        yield rig
        for one in made:
            one.repository.local.close()
            if isinstance(one, Watched):
                one.kill()
    shutil.rmtree(base)


def fill(tree: Path, files: int) -> None:
    """So many small files, a few in a directory."""
    for directory in range(files // IN_A_DIRECTORY):
        place = tree / f"d{directory // 100}" / f"{directory}"
        place.mkdir(parents=True)
        for number in range(IN_A_DIRECTORY):
            (place / f"{number}").write_bytes(b"%08d" % (directory * 10 + number) * 375)


def settle(rig: Rig) -> None:
    """Sync until the source can be gone by."""
    rig.sync()
    if isinstance(rig, Watched):
        rig.start()
        rig.sync()


def change(tree: Path) -> None:
    """Change one block of each of CHANGED files, each in a directory of its own."""
    for directory in range(CHANGED):
        path = tree / f"d{directory // 100}" / f"{directory}" / "3"
        with path.open("r+b") as file:
            file.write(b"changed")
    os.sync()


def counted(rig: Rig) -> tuple[Calls, Cost]:
    """A sync, and what it did."""
    before = rig.repository.store.counts()
    with pytest.MonkeyPatch.context() as patch:
        calls = count_calls(patch, rig.tree)
        requests = rig.sync().requests - before
    return calls, Cost(calls.all, calls.bytes_read, requests.requests)


def cost(rig: Rig, files: int) -> Cost:
    """What it costs to sync changes in a tree of so many files."""
    fill(rig.tree, files)
    settle(rig)
    change(rig.tree)
    calls, found = counted(rig)
    assert rig.notes == [], "the sync did not go by what the source knows"
    assert calls.bytes_read >= CHANGED * FILE_BYTES, "the counter missed what was read"
    assert found.calls > CHANGED, "the counter missed what was called"
    return found


def costs_of_two_sizes(make: Make, small: int, large: int) -> None:
    few, many = cost(make("few"), small), cost(make("many"), large)
    for name, a, b in zip(Cost._fields, few, many, strict=True):
        assert b < ALLOWED * a, f"{name}: {a} of {small} files, {b} of {large}"


def test_what_changed_is_what_it_costs(make: Make) -> None:
    costs_of_two_sizes(make, 1000, 20_000)


@pytest.mark.long
def test_what_changed_is_what_it_costs_in_large_trees(make: Make) -> None:
    costs_of_two_sizes(make, 10_000, 200_000)


def test_a_scan_costs_what_is_there(tmp_path: Path) -> None:
    """So the counter can tell one from the other."""
    found = []
    for files in (1000, 5000):
        rig = Rig(tmp_path / f"{files}")
        fill(rig.tree, files)
        rig.sync()
        change(rig.tree)
        found.append(counted(rig)[0].by_name["scandir"])
    assert found[1] > 4 * found[0] > 0


def test_one_write_in_a_large_file(make: Make) -> None:
    """btrfs tells where it was; of others only the file is known, and read whole."""
    rig = make("large")
    rig.block_size, rig.max_pack_bytes = 128 << 10, 32 * MIB
    with (rig.tree / "large").open("wb") as file:
        piece = os.urandom(MIB)
        for number in range(256):
            file.write(b"%d" % number + piece)
    settle(rig)
    for offset in (100 * MIB + 5000, 128 * 7 * 1024 - 2048):  # in a block, and across two
        with (rig.tree / "large").open("r+b") as file:
            file.seek(offset)
            file.write(os.urandom(4096))
        calls, found = counted(rig)
        assert rig.notes == []
        if rig.source == "btrfs":
            assert 0 < found.bytes_read <= 2 * rig.block_size
        else:
            assert found.bytes_read >= 256 * MIB
        assert calls.by_name["scandir"] <= 1
