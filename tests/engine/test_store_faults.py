"""Every request of a sync and of a restore goes wrong in every way, one at a time and in storms.

A run without faults tells how many requests there are. Then it is run again for a request and a
kind of fault. It succeeds with the very bytes, or says what is wrong by a CloudfsError; success is
reported only of a snapshot that another machine sees; what was there before is whole; and the next
sync, without faults, completes. A failure names stage, fault and request, or the seed.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from cloudfs.backup import packs
from cloudfs.backup.job import SyncResult
from cloudfs.core.errors import (
    CloudfsError,
    Denied,
    Full,
    Held,
    NotFound,
    StoreError,
    Unavailable,
)
from cloudfs.db.local import LocalState
from cloudfs.format import names
from cloudfs.repo import lease as leases
from cloudfs.repo.history import KEEP_MANIFESTS, History
from cloudfs.repo.pool import WorkerOpening
from cloudfs.repo.repository import PolicyRecord, Repository
from cloudfs.restore.job import RestoreJob, RestoreResult
from cloudfs.restore.restore import restore
from cloudfs.store.base import Buffer, Store
from cloudfs.store.count import CountStore
from cloudfs.store.fault import Decide, Fault, FaultStore
from cloudfs.store.memory import MemoryStore
from cloudfs.store.open import OpenedStore, StoreOptions
from cloudfs.store.retry import RetryStore
from cloudfs.store.wrapper import StoreWrapper
from tests.engine.rig import Quiet, contents_of_tree, contents_of_view, difference
from tests.repo.sample import SECRET, dead_holder, objects_of, opened, run_sync

Contents = dict[bytes, object]
Wrap = Callable[[Store], Store]

SLOW = Unavailable("the store says: slow down.")
FORBIDDEN = Denied("the store says: forbidden.")
ABSENT = NotFound("the store says: there is none.")
NO_ROOM = Full("the store says: no room.")


# -- what goes wrong --------------------------------------------------------------------------


@dataclass(frozen=True)
class Trouble:
    """A kind of fault. ``kinds``: the requests it can happen to; ``tried``: the store in use is one
    that tries again; ``passes``: nobody must notice."""

    make: Callable[[int], Decide]
    kinds: Sequence[str] = ("get", "put", "list", "delete")
    tried: bool = False
    passes: bool = False


def once(fault: Fault, *kinds: str) -> Callable[[int], Decide]:
    """One request goes wrong, if it is of one of these kinds."""

    def make(at: int) -> Decide:
        return lambda index, kind, _: fault if index == at and kind in (kinds or kind) else None

    return make


def ever_since(fault: Fault, *kinds: str) -> Callable[[int], Decide]:
    """A request goes wrong, and all that follow."""

    def make(at: int) -> Decide:
        return lambda index, kind, _: fault if index >= at and kind in (kinds or kind) else None

    return make


TROUBLES = {
    "fails": Trouble(once(Fault(SLOW))),
    "fails late": Trouble(once(Fault(SLOW, after=True))),
    "fails from then on": Trouble(ever_since(Fault(SLOW))),
    "is throttled": Trouble(once(Fault(SLOW)), tried=True, passes=True),
    "loses its answer": Trouble(once(Fault(SLOW, after=True)), tried=True, passes=True),
    "is forbidden": Trouble(once(Fault(FORBIDDEN))),
    "is forbidden from then on": Trouble(ever_since(Fault(FORBIDDEN))),
    "finds no room": Trouble(ever_since(Fault(NO_ROOM), "put"), ["put"]),
    "finds nothing": Trouble(once(Fault(ABSENT), "get"), ["get"]),
    "is cut": Trouble(once(Fault(truncate=60), "get"), ["get"]),
    "is empty": Trouble(once(Fault(truncate=0), "get"), ["get"]),
    "lists too little": Trouble(once(Fault(truncate=1), "list"), ["list"]),
    "lists nothing": Trouble(once(Fault(truncate=0), "list"), ["list"]),
    "lists nothing from then on": Trouble(ever_since(Fault(truncate=0), "list"), ["list"]),
}


def store_of(memory: MemoryStore, wrap: Wrap, *, tried: bool = False) -> OpenedStore:
    """A store as it is opened for use, over what ``wrap`` makes of the memory."""
    counter = CountStore(wrap(memory))
    if not tried:
        return OpenedStore(counter, counter)
    return OpenedStore(RetryStore(counter, sleep=lambda _: None), counter)


# -- stages: a tree, a repository, and what is about to be done ----------------------------------


@dataclass
class Stage:
    """What there is before a sync: a tree, a repository, and a machine's local state."""

    base: Path
    objects: dict[str, bytes] = field(default_factory=dict)
    known: dict[int, Contents] = field(default_factory=dict)

    def __post_init__(self) -> None:
        store = opened({})
        local = LocalState(self.base / "c", self.base / "s")
        repository = Repository.create(store, SECRET, local, label="x")
        self.record = repository.save_policy("home", "")
        self.objects = objects_of(store)
        self.tree.mkdir()
        grow(self.tree, 1)

    @property
    def tree(self) -> Path:
        return self.base / "tree"

    @property
    def saved(self) -> Path:
        """The local state of the machine that made the snapshots before."""
        return self.base / "saved"

    def advance(self) -> None:
        """Sync without faults and change the tree: the stage after this one."""
        store = opened(self.objects)
        result = sync(store, self.record, self.saved, self.tree)
        assert result.snapshot is not None
        self.known[result.snapshot.number] = contents_of_tree(self.tree)
        self.objects = objects_of(store)
        grow(self.tree, len(self.known) + 1)

    def machine(self) -> Path:
        """A copy of the local state, for one run."""
        place = self.base / "run"
        shutil.rmtree(place, ignore_errors=True)
        if self.saved.exists():
            shutil.copytree(self.saved, place)
        return place

    def memory(self) -> MemoryStore:
        """A copy of the repository, for one run."""
        memory = MemoryStore()
        for name, data in self.objects.items():
            memory.put(name, [data])
        return memory

    def requests(self) -> list[str]:
        """The kinds of all requests of a run without faults."""
        kinds: list[str] = []
        wrap = watching(lambda _, kind, __: kinds.append(kind))
        sync(store_of(self.memory(), wrap), self.record, self.machine(), self.tree)
        return kinds


def grow(tree: Path, turn: int) -> None:
    """Make or change a tree: several packs of data, names that come, go and move."""
    dice = random.Random(turn)
    for number in range(4):
        directory = tree / f"d{number}"
        directory.mkdir(exist_ok=True)
        (directory / f"f{turn % 3}").write_bytes(dice.randbytes(9000))
        (directory / "text").write_text(f"{turn}" * 5000)
    with open(tree / "large", "ab") as file:
        file.write(dice.randbytes(150_000))
    if turn > 1:
        with contextlib.suppress(OSError):
            os.rename(tree / "d1", tree / f"moved{turn}")
        (tree / "d2" / "text").unlink()


def watching(see: Callable[[int, str, str], None]) -> Wrap:
    """A wrap that tells of every request and spoils none."""

    def decide(index: int, kind: str, name: str) -> Fault | None:
        see(index, kind, name)
        return None

    return lambda store: FaultStore(store, decide)


def sync(store: OpenedStore, record: PolicyRecord, machine: Path, tree: Path) -> SyncResult:
    """A sync as a process of its own would run it."""
    local = LocalState(machine / "c", machine / "s", cache_bytes=8 << 20)
    try:
        return run_sync(Repository.open(store, SECRET, local), record, tree)
    finally:
        local.close()


def fresh(base: Path) -> Stage:
    """The first sync of all."""
    return Stage(base)


def second(base: Path) -> Stage:
    """A sync on top of one snapshot, with the local state that it left."""
    stage = Stage(base)
    stage.advance()
    return stage


def hard(base: Path) -> Stage:
    """A sync that takes a dead holder's lease over, makes the local state anew, finds packs that no
    snapshot names, merges runs, and deletes old manifests."""
    stage = Stage(base)
    for _ in range(4):
        stage.advance()
    memory = stage.memory()
    refuse = ever_since(Fault(FORBIDDEN), "put")(0)
    for name in ("/segment/", "/manifest-"):
        with pytest.raises(Denied):
            sync(store_of(memory, only(name, refuse)), stage.record, stage.machine(), stage.tree)
    local = LocalState(base / "c", base / "s")
    repository = Repository.open(store_of(memory, plainly), SECRET, local)
    with contextlib.closing(History(repository, stage.record)) as history:
        # Old manifests are deleted at certain numbers; the one after the next is such a number.
        while history.manifest.number < 2 * KEEP_MANIFESTS - 2:
            number = history.manifest.number + 1
            history.commit(msgspec.structs.replace(history.manifest, number=number))
        leases._write(history, 90, dead_holder(), if_absent=True)
    local.close()
    stage.objects = objects_of(store_of(memory, plainly))
    shutil.rmtree(stage.saved)
    return stage


def plainly(store: Store) -> Store:
    """A wrap that changes nothing."""
    return store


def only(part: str, decide: Decide) -> Wrap:
    """Faults only where the name has this part."""
    return lambda store: FaultStore(
        store, lambda index, kind, name: decide(index, kind, name) if part in name else None
    )


STAGES = {"first": fresh, "second": second, "hard": hard}


@pytest.fixture(scope="module")
def stages() -> Iterator[Callable[[str], Stage]]:
    """Stages by name, each made when it is first asked for."""
    made: dict[str, Stage] = {}
    with (
        tempfile.TemporaryDirectory(prefix="cloudfs-faults-", dir="/dev/shm") as base,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(packs, "FRAME_BYTES", 32 << 10)  # several packs of little data

        def stage(name: str) -> Stage:
            if name not in made:
                place = Path(base, name)
                place.mkdir()
                made[name] = STAGES[name](place)
            return made[name]

        yield stage


# -- what must hold ------------------------------------------------------------------------------


def snapshots(memory: MemoryStore, record: PolicyRecord) -> dict[int, Contents]:
    """Everything that a machine sees that knows nothing but the store."""
    with tempfile.TemporaryDirectory(prefix="cloudfs-reader-", dir="/dev/shm") as place:
        local = LocalState(Path(place, "c"), Path(place, "s"), cache_bytes=8 << 20)
        store = store_of(memory, plainly)
        history = History(Repository.open(store, SECRET, local), record)
        try:
            assert len({s.number for s in history.snapshots}) == len(history.snapshots)
            return {s.number: contents_of_view(history.view(s.number)) for s in history.snapshots}
        finally:
            history.close()
            local.close()


def run(stage: Stage, wrap: Wrap, where: str, *, tried: bool = False, passes: bool = False) -> None:
    """A sync under faults, and all that must hold after it."""
    memory, machine = stage.memory(), stage.machine()
    result: SyncResult | None = None
    try:
        result = sync(store_of(memory, wrap, tried=tried), stage.record, machine, stage.tree)
    except CloudfsError as error:
        assert not passes, f"{where}: {error!r}"
    except Exception as error:
        raise AssertionError(f"{where}: {error!r} is no CloudfsError") from error
    model = contents_of_tree(stage.tree)
    new = max(stage.known, default=0) + 1
    judge(snapshots(memory, stage.record), stage.known, {new: model}, where)
    if result is not None:
        assert result.snapshot is not None and result.snapshot.number == new, where
        assert new in snapshots(memory, stage.record), f"{where}: success without a snapshot"
    go_on(memory, machine, stage, where)
    found = snapshots(memory, stage.record)
    last = max(found)
    assert last in (new, new + 1), where
    judge(found, stage.known, {new: model, last: model}, f"{where}, the sync after it")


def judge(
    found: dict[int, Contents], old: dict[int, Contents], new: dict[int, Contents], where: str
) -> None:
    """All old snapshots are there, and all that are there are whole."""
    expected = old | new
    assert set(old) <= set(found) <= set(expected), f"{where}: snapshots {sorted(found)}"
    for number, content in found.items():
        differs = difference(content, expected[number])
        assert not differs, f"{where}: snapshot {number}: {differs[:3]}"


def go_on(memory: MemoryStore, machine: Path, stage: Stage, where: str) -> None:
    """The next sync, without faults. A lease that was left behind holds it up for STALE_S."""
    for later_s in (0.0, leases.STALE_S + 1):
        with pytest.MonkeyPatch.context() as patch:
            real = time.monotonic
            patch.setattr(time, "monotonic", lambda: real() + later_s)  # noqa: B023
            try:
                sync(store_of(memory, plainly), stage.record, machine, stage.tree)
                return
            except Held as error:
                assert not later_s, f"{where}: the next sync: {error}"
            except CloudfsError as error:
                raise AssertionError(f"{where}: the next sync: {error!r}") from error


# -- one fault at a time -------------------------------------------------------------------------


def spread(count: int, few: int) -> list[int]:
    """``few`` of ``count`` indexes, evenly, the last one among them."""
    if count <= few:
        return list(range(count))
    return sorted({count - 1 - round(i * (count - 1) / max(1, few - 1)) for i in range(few)})


def hunt(stage: Stage, name: str, kind: str, few: int | None) -> None:
    trouble = TROUBLES[kind]
    places = [i for i, found in enumerate(stage.requests()) if found in trouble.kinds]
    for place in spread(len(places), few) if few else range(len(places)):
        index = places[place]
        wrap = faults(trouble.make(index))
        where = f"stage {name}, request {index} {kind}"
        run(stage, wrap, where, tried=trouble.tried, passes=trouble.passes)


def faults(decide: Decide) -> Wrap:
    return lambda store: FaultStore(store, decide)


@pytest.mark.parametrize("kind", TROUBLES)
@pytest.mark.parametrize("name", STAGES)
def test_a_request_of_a_sync(stages: Callable[[str], Stage], name: str, kind: str) -> None:
    hunt(stages(name), name, kind, 4)


@pytest.mark.long
@pytest.mark.parametrize("kind", TROUBLES)
@pytest.mark.parametrize("name", STAGES)
def test_every_request_of_a_sync(stages: Callable[[str], Stage], name: str, kind: str) -> None:
    hunt(stages(name), name, kind, None)


@pytest.mark.parametrize("kind", [k for k, t in TROUBLES.items() if "put" in t.kinds])
@pytest.mark.parametrize("part", ["/lease-", "/pack/", "/segment/", "/manifest-"])
def test_a_write_of_each_kind(stages: Callable[[str], Stage], part: str, kind: str) -> None:
    """By name, so that no sample misses them: the last of all commits the snapshot."""
    trouble, stage = TROUBLES[kind], stages("second")
    writes: list[int] = []

    def see(index: int, request: str, name: str) -> None:
        if request == "put" and part in name:
            writes.append(index)

    sync(store_of(stage.memory(), watching(see)), stage.record, stage.machine(), stage.tree)
    assert writes
    for index in writes:
        wrap = faults(trouble.make(index))
        where = f"{part}, request {index} {kind}"
        run(stage, wrap, where, tried=trouble.tried, passes=trouble.passes)


# -- duplicates ----------------------------------------------------------------------------------


class Echo(StoreWrapper):
    """One write arrives a second time: so many requests later, or at the end."""

    def __init__(self, inner: Store, index: int, later: int) -> None:
        super().__init__(inner)
        self._at, self._later = index, later
        self._puts = self._requests = 0
        self._late: Callable[[], None] | None = None

    def _tick(self) -> None:
        self._requests += 1
        if self._late is not None and self._requests >= self._later:
            self.flush()

    def flush(self) -> None:
        """The second one arrives now; nobody waits for its answer."""
        late, self._late = self._late, None
        if late is not None:
            with contextlib.suppress(StoreError):
                late()

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        self._tick()
        return self.inner.get(name, offset, length)

    def put(self, name: str, chunks: Sequence[Buffer], *, if_absent: bool = False) -> None:
        self._tick()
        self.inner.put(name, chunks, if_absent=if_absent)
        if self._puts == self._at:
            data, self._requests = b"".join(chunks), 0
            self._late = lambda: self.inner.put(name, [data], if_absent=if_absent)
        self._puts += 1


@pytest.mark.parametrize("name", STAGES)
def test_a_write_arrives_twice(stages: Callable[[str], Stage], name: str) -> None:
    duplicates(stages(name), name, [1, 3, 10**9], 3)


@pytest.mark.long
@pytest.mark.parametrize("name", STAGES)
def test_every_write_arrives_twice(stages: Callable[[str], Stage], name: str) -> None:
    duplicates(stages(name), name, [1, 2, 5, 10, 10**9], None)


def duplicates(stage: Stage, name: str, delays: list[int], few: int | None) -> None:
    count = stage.requests().count("put")
    for index in spread(count, few) if few else range(count):
        for later in delays:
            memory, machine = stage.memory(), stage.machine()
            where = f"stage {name}, write {index} again {later} requests later"
            echo = Echo(memory, index, later)
            counter = CountStore(echo)
            sync(OpenedStore(counter, counter), stage.record, machine, stage.tree)
            echo.flush()
            model = contents_of_tree(stage.tree)
            new = {max(stage.known, default=0) + 1: model}
            judge(snapshots(memory, stage.record), stage.known, new, where)
            go_on(memory, machine, stage, where)
            judge(snapshots(memory, stage.record), stage.known, new, where)


# -- storms --------------------------------------------------------------------------------------


def storm(seed: int) -> tuple[Decide, bool]:
    """Any faults, anywhere."""
    dice = random.Random(seed)
    rate = dice.choice([0.03, 0.1, 0.3])
    tried = dice.random() < 0.7
    every = [
        Fault(SLOW),
        Fault(SLOW, after=True),
        Fault(FORBIDDEN) if dice.random() < 0.3 else Fault(SLOW),
        Fault(truncate=dice.choice([0, 1, 60])),
    ]

    def decide(index: int, kind: str, name: str) -> Fault | None:
        if dice.random() >= rate:
            return None
        fault = dice.choice(every)
        # A store that keeps less than it was given, and says nothing, is another story.
        return None if fault.truncate is not None and kind in ("put", "delete") else fault

    return decide, tried


@pytest.mark.parametrize("seed", range(6))
def test_storms(stages: Callable[[str], Stage], seed: int) -> None:
    weather(stages, seed)


@pytest.mark.long
@pytest.mark.parametrize("hundred", range(1, 9))
def test_many_storms(stages: Callable[[str], Stage], hundred: int) -> None:
    for seed in range(100 * hundred, 100 * hundred + 100):
        weather(stages, seed)


def weather(stages: Callable[[str], Stage], seed: int) -> None:
    name = list(STAGES)[seed % len(STAGES)]
    decide, tried = storm(seed)
    run(stages(name), faults(decide), f"stage {name}, storm {seed}", tried=tried)


# -- restore -------------------------------------------------------------------------------------


def restored(store: OpenedStore, record: PolicyRecord, place: Path) -> RestoreResult:
    """Restore the latest snapshot on a machine that has nothing."""
    local = LocalState(place / "c", place / "s", cache_bytes=8 << 20)
    try:
        repository = Repository.open(store, SECRET, local)
        options = StoreOptions()
        opening = WorkerOpening(
            store.url, options, repository.opening, local.cache_dir, local.state_dir
        )
        with contextlib.closing(History(repository, record)) as history:
            number = history.find("latest").number
            target = os.fsencode(place / "out")
            job = RestoreJob(history, number, b"/", target, opening, workers=1)
            return restore(job, Quiet())
    finally:
        local.close()


def rescue(stage: Stage, number: int, wrap: Wrap, where: str, trouble: Trouble) -> None:
    """A restore under faults: the very bytes, or it says what is wrong."""
    place = stage.base / "restore"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    store = store_of(stage.memory(), wrap, tried=trouble.tried)
    failed: set[bytes] = set()
    try:
        failed = {path for path, _ in restored(store, stage.record, place).failures}
        assert not (trouble.passes and failed), f"{where}: {sorted(failed)}"
    except CloudfsError as error:
        assert not trouble.passes, f"{where}: {error!r}"
        return
    except Exception as error:
        raise AssertionError(f"{where}: {error!r} is no CloudfsError") from error
    found, model = contents_of_tree(place / "out"), stage.known[number]
    differs = {key for key in found.keys() | model.keys() if found.get(key) != model.get(key)}
    assert differs <= {b"/" + path.lstrip(b"/") for path in failed}, f"{where}: {sorted(differs)}"


def rescues(stage: Stage, kind: str, few: int | None) -> None:
    kinds: list[str] = []
    number, trouble = max(stage.known), TROUBLES[kind]
    rescue(stage, number, watching(lambda _, k, __: kinds.append(k)), "no fault", trouble)
    places = [i for i, found in enumerate(kinds) if found in trouble.kinds]
    for place in spread(len(places), few) if few else range(len(places)):
        index = places[place]
        wrap = faults(trouble.make(index))
        rescue(stage, number, wrap, f"restore, request {index} {kind}", trouble)


RESTORING = [kind for kind, trouble in TROUBLES.items() if trouble.kinds != ["put"]]


@pytest.mark.parametrize("kind", RESTORING)
def test_a_request_of_a_restore(stages: Callable[[str], Stage], kind: str) -> None:
    rescues(stages("hard"), kind, 3)


@pytest.mark.long
@pytest.mark.parametrize("kind", RESTORING)
def test_every_request_of_a_restore(stages: Callable[[str], Stage], kind: str) -> None:
    rescues(stages("second"), kind, None)
    rescues(stages("hard"), kind, None)


def test_a_fault_is_one(stages: Callable[[str], Stage]) -> None:
    """What this file stands on: the stages do what their names say."""
    seen: dict[str, list[tuple[str, str]]] = {}
    for name in STAGES:
        found = seen.setdefault(name, [])
        stage = stages(name)
        wrap = watching(lambda _, kind, what: found.append((kind, what)))  # noqa: B023
        sync(store_of(stage.memory(), wrap), stage.record, stage.machine(), stage.tree)
    prefix = names.packs(stages("hard").record.id)
    deleted = [what for kind, what in seen["hard"] if kind == "delete"]
    assert any("/manifest-" in what for what in deleted), "no old manifest is deleted"
    assert sum("/lease-" in what for what in deleted) == 2, "no lease is taken over"
    assert any(kind == "list" and what == prefix for kind, what in seen["hard"]), "no adoption"
    assert sum(kind == "put" and "/segment/" in w for kind, w in seen["hard"]) == 2, "no merge"
    assert sum(kind == "put" and "/pack/" in what for kind, what in seen["first"]) >= 3
