"""What later syncs cost: what changed, not what exists."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from cloudfs.backup.job import SyncResult
from cloudfs.core.errors import Denied
from cloudfs.db.local import LocalState
from cloudfs.repo.history import History
from cloudfs.repo.repository import PolicyRecord, Repository
from cloudfs.store.base import Buffer
from cloudfs.store.count import CountStore
from cloudfs.store.memory import MemoryStore
from cloudfs.store.open import OpenedStore
from cloudfs.store.wrapper import StoreWrapper
from tests.engine.rig import contents_of_tree, contents_of_view
from tests.repo.sample import SECRET, Machine, run_sync

MIB = 1 << 20
KIB = 1 << 10


class NoManifests(StoreWrapper):
    """A store in which, when told so, no manifest can be written."""

    refuses = False

    def put(self, name: str, chunks: Sequence[Buffer], *, if_absent: bool = False) -> None:
        if self.refuses and "/manifest-" in name:
            raise Denied(f"{name} may not be written.")
        self.inner.put(name, chunks, if_absent=if_absent)


class Place:
    """A tree, a store that counts, and a machine."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.tree = base / "tree"
        self.tree.mkdir()
        self.gate = NoManifests(MemoryStore())
        counter = CountStore(self.gate)
        self.store = OpenedStore(counter, counter)
        self.machines = 0
        self.local = self._machine()
        self.repository = Repository.create(self.store, SECRET, self.local, label="x")
        self.record: PolicyRecord = self.repository.save_policy("home", "")

    def _machine(self) -> LocalState:
        self.machines += 1
        place = self.base / f"machine{self.machines}"
        return LocalState(place / "c", place / "s", cache_bytes=64 * MIB)

    def lose_local_state(self) -> None:
        """Go on as a machine that has nothing."""
        self.local.close()
        self.local = self._machine()
        self.repository = Repository.open(self.store, SECRET, self.local)

    def sync(self) -> tuple[SyncResult, int]:
        """A sync, and the bytes that it stored, tables and all."""
        time.sleep(0.05)  # so that nothing is so fresh that it is looked at again
        before = self.store.counts()
        settings = {"block_size": 64 * KIB, "max_pack_bytes": 32 * MIB}
        result = run_sync(self.repository, self.record, self.tree, **settings)
        return result, (self.store.counts() - before).bytes_up

    def is_true(self, number: int) -> bool:
        """Whether a machine that has nothing sees the tree as it is."""
        repository = Repository.open(self.store, SECRET, Machine())
        view = History(repository, self.record).view(number)
        return contents_of_view(view) == contents_of_tree(self.tree)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    found = Place(tmp_path)
    dice = random.Random(3)
    (found.tree / "large").write_bytes(dice.randbytes(16 * MIB))
    (found.tree / "many").mkdir()
    for number in range(500):
        (found.tree / "many" / f"{number}").write_bytes(dice.randbytes(2000))
    return found


def test_one_block_in_a_large_file(place: Place) -> None:
    place.sync()
    with open(place.tree / "large", "r+b") as file:
        file.seek(9 * MIB + 5)
        file.write(b"changed")
    result, stored = place.sync()
    assert result.changed == 1
    assert stored < 64 * KIB + 32 * KIB
    assert place.is_true(2)


def test_a_file_replaced_by_an_almost_equal_one(place: Place) -> None:
    place.sync()
    data = bytearray((place.tree / "large").read_bytes())
    data[5 * MIB] ^= 1
    (place.tree / "new").write_bytes(data)
    (place.tree / "new").rename(place.tree / "large")
    _, stored = place.sync()
    assert stored < 64 * KIB + 64 * KIB  # the block, and where all blocks of the new LIN lie
    assert place.is_true(2)


def test_a_directory_renamed(place: Place) -> None:
    place.sync()
    (place.tree / "many").rename(place.tree / "called otherwise")
    result, stored = place.sync()
    assert stored < 16 * KIB
    assert (result.new, result.moved) == (0, 1)
    assert place.is_true(2)


def test_a_file_moved(place: Place) -> None:
    place.sync()
    (place.tree / "large").rename(place.tree / "many" / "large")
    _, stored = place.sync()
    assert stored < 16 * KIB
    assert place.is_true(2)


def test_nothing_changed(place: Place) -> None:
    place.sync()
    result, _ = place.sync()
    assert result.snapshot is None
    before = place.store.counts()
    result, stored = place.sync()
    assert result.snapshot is None
    assert stored < KIB  # the lease
    assert (place.store.counts() - before).requests <= 8


def test_local_state_lost(place: Place) -> None:
    place.sync()
    place.lose_local_state()
    result, stored = place.sync()
    assert stored < KIB and result.snapshot is None
    (place.tree / "many" / "7").rename(place.tree / "seven")
    place.lose_local_state()
    _, stored = place.sync()
    assert stored < 16 * KIB
    assert place.is_true(2)


@pytest.mark.parametrize("lost", [False, True])
def test_what_an_unfinished_sync_stored_is_not_stored_again(place: Place, lost: bool) -> None:
    place.gate.refuses = True
    with pytest.raises(Denied):
        place.sync()
    place.gate.refuses = False
    if lost:
        place.lose_local_state()
    result, stored = place.sync()
    assert stored < MIB
    assert result.snapshot is not None and place.is_true(1)
    os.truncate(place.tree / "large", 100)
    place.sync()
    assert place.is_true(2)
