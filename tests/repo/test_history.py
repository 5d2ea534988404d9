"""Manifests: taken up, committed, raced, rolled back; snapshots by what users call them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from cloudfs.cli.errors import explain
from cloudfs.core.errors import (
    AlreadyExists,
    Held,
    NoRepository,
    RolledBack,
    Unavailable,
    UsageError,
)
from cloudfs.core.manifest import SnapshotRecord, SnapshotStats
from cloudfs.db.local import LocalState, Seen
from cloudfs.format import names
from cloudfs.repo import lease as leases
from cloudfs.repo.history import HEAD_LIMIT, KEEP_MANIFESTS, History
from cloudfs.repo.lease import LeaseContent, acquire
from cloudfs.repo.repository import PolicyRecord, Repository
from cloudfs.store.base import Buffer
from cloudfs.store.count import CountStore
from cloudfs.store.memory import MemoryStore
from cloudfs.store.open import OpenedStore
from cloudfs.store.wrapper import StoreWrapper
from tests.repo.sample import SECRET, Machine, dead_holder, opened

DAY_NS = 86_400 * 10**9


@pytest.fixture(autouse=True)
def in_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def fresh(store: OpenedStore | None = None) -> tuple[Repository, PolicyRecord]:
    repository = Repository.create(store or opened({}), SECRET, Machine(), label="x")
    return repository, repository.save_policy("home", "")


def again(repository: Repository, local: LocalState | None = None) -> History:
    """The history as another machine opens it."""
    other = Repository.open(repository.store, SECRET, local or Machine())
    return History(other, other.policies()[0])


def snapshot(number: int, time_ns: int) -> SnapshotRecord:
    return SnapshotRecord(number, time_ns, "scan", False, "host", [], SnapshotStats())


def commit(history: History, *snapshots: SnapshotRecord) -> None:
    manifest = history.manifest
    history.commit(
        msgspec.structs.replace(
            manifest, number=manifest.number + 1, snapshots=[*manifest.snapshots, *snapshots]
        )
    )


# -- what users call snapshots ---------------------------------------------------------------


@pytest.fixture
def dated() -> History:
    """Snapshots 1, 3, 4 at noon of 2026-11-20, 21 and 21 (a second and a half later)."""
    history = History(*fresh())
    noon = 1795176000 * 10**9
    times = (noon, noon + DAY_NS, noon + DAY_NS + 1_500_000_000)
    commit(history, *(snapshot(n, t) for n, t in zip((1, 3, 4), times, strict=True)))
    return history


@pytest.mark.parametrize(
    ("spec", "number"),
    [
        ("latest", 4),
        ("latest~0", 4),
        ("latest~2", 1),
        ("1", 1),
        ("003", 3),
        ("2026-11-20", 1),
        ("2026-11-21", 4),
        ("2027-01-01", 4),
        ("2026-11-21T11:59", 1),
        ("2026-11-21T12:00", 4),
        ("2026-11-21 12:00:00", 3),
        ("2026-11-21T12:00:01", 4),
    ],
)
def test_a_snapshot_is_found(dated: History, spec: str, number: int) -> None:
    assert dated.find(spec).number == number


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("2", "no snapshot 2"),
        ("0", "no snapshot 0"),
        ("9" * 5000, "no snapshot"),
        ("latest~3", "no latest~3"),
        ("latest~" + "9" * 5000, "no latest"),
        ("2026-11-19", "as old as"),
    ],
)
def test_a_snapshot_is_not_there(dated: History, spec: str, words: str) -> None:
    with pytest.raises(NoRepository, match=words):
        dated.find(spec)


@pytest.mark.parametrize(
    "spec",
    [
        *("", "newest", "latest~x", "latest~-1", "latest~²", "²", "٣", "-1", "1.5", "~1", "1~1"),
        *("2026-13-01", "9999-12-31", "2026-11-21T25:00", "2026-11-21T12:00:00Z", "\0"),
    ],
)
def test_what_names_no_snapshot(dated: History, spec: str) -> None:
    with pytest.raises(UsageError, match="names no snapshot"):
        dated.find(spec)


def test_no_snapshots_yet() -> None:
    with pytest.raises(NoRepository, match="cloudfs sync home"):
        History(*fresh()).find("latest")
    with pytest.raises(NoRepository, match="no snapshot 1"):
        History(*fresh()).view(1)


# -- committing ------------------------------------------------------------------------------


def test_a_new_manifest_is_taken_up() -> None:
    repository, record = fresh()
    writer, reader = History(repository, record), again(repository)
    assert not reader.refresh()
    commit(writer, snapshot(1, 5))
    assert reader.refresh()
    assert reader.snapshots == writer.snapshots == [snapshot(1, 5)]
    before = repository.store.counts()
    assert not writer.refresh()
    assert (repository.store.counts() - before).requests == 1


def test_of_two_writers_one_wins() -> None:
    repository, record = fresh()
    one, two = History(repository, record), again(repository)
    commit(one, snapshot(1, 5))
    with pytest.raises(Held, match="took over"):
        commit(two, snapshot(1, 6))
    assert two.manifest.number == 0
    assert again(repository).snapshots == [snapshot(1, 5)]
    assert two.refresh()
    commit(two, snapshot(2, 7))
    assert one.refresh() and len(one.snapshots) == 2


class LosesAnswers(StoreWrapper):
    """Does each conditional write, and says that the name was taken, as after a time-out."""

    def put(self, name: str, chunks: Sequence[Buffer], *, if_absent: bool = False) -> None:
        self.inner.put(name, chunks, if_absent=if_absent)
        if if_absent and "manifest" in name:
            raise AlreadyExists(f"{name} is already there.")


def test_a_lost_answer_is_no_conflict() -> None:
    counter = CountStore(LosesAnswers(MemoryStore()))
    repository, record = fresh(OpenedStore(counter, counter))
    history = History(repository, record)
    commit(history, snapshot(1, 5))
    assert history.manifest.number == 1
    assert again(repository).snapshots == [snapshot(1, 5)]


def test_old_manifests_are_deleted_and_listings_stay_small() -> None:
    repository, record = fresh()
    history = History(repository, record)
    for number in range(1, 5 * KEEP_MANIFESTS):
        commit(history)
        found = list(repository.store.list(names.head(record.id)))
        assert len(found) <= 2 * KEEP_MANIFESTS < HEAD_LIMIT
        assert len(found) >= min(number, KEEP_MANIFESTS)
    assert again(repository).manifest.number == history.manifest.number


class CannotDelete(StoreWrapper):
    def delete(self, names: Iterable[str]) -> None:
        raise Unavailable("the store is tired.")


def test_a_commit_does_not_fail_over_what_is_old() -> None:
    counter = CountStore(CannotDelete(MemoryStore()))
    repository, record = fresh(OpenedStore(counter, counter))
    history = History(repository, record)
    for _ in range(3 * KEEP_MANIFESTS):
        commit(history)
    assert again(repository).manifest.number == 3 * KEEP_MANIFESTS


@pytest.mark.parametrize("name", ["lease-{:016x}", "a-stranger-{}"])
def test_a_crowd_before_the_manifests_hides_nothing(name: str) -> None:
    repository, record = fresh()
    history = History(repository, record)
    commit(history, snapshot(1, 5))
    for number in range(HEAD_LIMIT + 5):
        object_name = names.head(record.id) + name.format(number)
        repository.store.put(object_name, [b"x"])
    assert again(repository).snapshots == [snapshot(1, 5)]
    assert not history.refresh()


def test_a_first_look_costs_one_listing() -> None:
    repository, record = fresh()
    before = repository.store.counts()
    History(repository, record)
    assert (repository.store.counts() - before).requests == 1


# -- rollback --------------------------------------------------------------------------------


def test_the_memory_of_a_machine_outlives_the_process(tmp_path: Path) -> None:
    repository, record = fresh()
    history = History(repository, record)
    commit(history, snapshot(1, 5))
    commit(history, snapshot(2, 6))
    again(repository, LocalState(tmp_path / "c", tmp_path / "s")).repository.local.close()
    repository.store.delete([names.manifest(record.id, 2)])
    local = LocalState(tmp_path / "c", tmp_path / "s")
    with pytest.raises(RolledBack, match=r"manifest 1\b.*manifest 2\b") as caught:
        again(repository, local)
    local.close()
    memory = Path(str(caught.value).rsplit(" ", 1)[1].rstrip("."))
    memory.unlink()  # as the message says
    local = LocalState(tmp_path / "c", tmp_path / "s")
    assert again(repository, local).manifest.number == 1
    local.close()


def forked(repository: Repository, record: PolicyRecord) -> None:
    """Put the store back to manifest 1, and let somebody write another manifest 2."""
    repository.store.delete([names.manifest(record.id, 2)])
    commit(again(repository), snapshot(2, 7))


def test_another_manifest_of_the_number_that_was_seen(tmp_path: Path) -> None:
    repository, record = fresh()
    history = History(repository, record)
    commit(history, snapshot(1, 5))
    commit(history, snapshot(2, 6))
    for machine in ("reader", "writer"):
        local = LocalState(tmp_path / machine / "c", tmp_path / machine / "s")
        assert again(repository, local).manifest.number == 2
        local.close()
    forked(repository, record)
    local = LocalState(tmp_path / "reader" / "c", tmp_path / "reader" / "s")
    for _ in range(2):  # it is not believed the second time either
        with pytest.raises(RolledBack, match=r"another manifest 2 than the one") as caught:
            again(repository, local)
    assert explain(caught.value) == (str(caught.value), 13)
    Path(str(caught.value).rsplit(" ", 1)[1].rstrip(".")).unlink()  # as the message says
    assert again(repository, local).snapshots[-1] == snapshot(2, 7)
    local.close()


def test_the_writer_itself_remembers_what_it_wrote() -> None:
    repository, record = fresh()
    history = History(repository, record)
    commit(history, snapshot(1, 5))
    commit(history, snapshot(2, 6))
    forked(repository, record)
    with pytest.raises(RolledBack, match="another manifest 2"):
        again(repository, repository.local)


def test_a_memory_without_a_digest_is_taken_up(tmp_path: Path) -> None:
    """As earlier versions wrote it; and one that is no memory at all."""
    repository, record = fresh()
    commit(History(repository, record), snapshot(1, 5))
    local = LocalState(tmp_path / "c", tmp_path / "s")
    path = local._seen_path(repository.id, record.id)
    path.parent.mkdir(parents=True)
    for text in ("1", "1 ", "x y", ""):
        path.write_text(text)
        again(repository, local)
        assert local.seen(repository.id, record.id).digest
    local.remember_seen(repository.id, record.id, Seen(0, "older"))
    assert local.seen(repository.id, record.id).number == 1
    local.close()


def test_an_open_history_does_not_go_back() -> None:
    repository, record = fresh()
    history = History(repository, record)
    commit(history)
    commit(history)
    repository.local.memory.clear()  # type: ignore[attr-defined]  # a Machine
    repository.store.delete([names.manifest(record.id, 2)])
    assert not history.refresh()
    assert history.manifest.number == 2


# -- leases ----------------------------------------------------------------------------------


def test_a_lease_is_taken_and_given_back() -> None:
    repository, record = fresh()
    lease, took_over = acquire(History(repository, record))
    assert not took_over
    with pytest.raises(Held, match=f"process {os.getpid()}"):
        acquire(again(repository))
    lease.release()
    second, took_over = acquire(again(repository))
    assert not took_over
    second.release()
    assert not [i for i in repository.store.list(names.head(record.id)) if "lease" in i.name]


def test_a_dead_holder_is_succeeded_and_fenced_off() -> None:
    repository, record = fresh()
    old = History(repository, record)
    commit(old, snapshot(1, 5))
    leases._write(old, 5, dead_holder(), if_absent=True)
    heir = again(repository)
    lease, took_over = acquire(heir)
    assert took_over and lease.epoch == 6
    assert heir.manifest.epoch == 6 and heir.manifest.number == 2
    assert heir.snapshots == [snapshot(1, 5)]
    with pytest.raises(Held):
        commit(old, snapshot(2, 6))  # it wakes up
    lease.release()


def test_a_holder_elsewhere_is_stale_by_our_clock_only(monkeypatch: pytest.MonkeyPatch) -> None:
    repository, record = fresh()
    history = History(repository, record)
    # Its clock is years ahead or behind: that is of no interest.
    for since_ns in (0, 2**62):
        content = LeaseContent("elsewhere", "b", 1, 1, since_ns, 0)
        leases._write(history, 9, content, if_absent=False)
        with pytest.raises(Held, match="elsewhere"):
            acquire(again(repository))
    watch: dict[int, tuple[bytes, float]] = {}
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert not leases._is_stale(history, 9, watch)
    monkeypatch.setattr(time, "monotonic", lambda: now + leases.STALE_S - 1)
    assert not leases._is_stale(history, 9, watch)
    monkeypatch.setattr(time, "monotonic", lambda: now + leases.STALE_S + 1)
    assert leases._is_stale(history, 9, watch)
    leases._write(history, 9, msgspec.structs.replace(content, beats=1), if_absent=False)
    assert not leases._is_stale(history, 9, watch)  # it beats


def test_a_lease_that_was_not_renewed_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    repository, record = fresh()
    lease, _ = acquire(History(repository, record))
    lease.check()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + leases.STALE_S / 2 + 1)
    with pytest.raises(Held, match="could not be renewed"):
        lease.check()
    lease.release()
