"""Keys that are changed by several machines at once: no change is lost, and never the last key.

A second editor comes between each two requests of a first one, who goes on, or dies there.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from cloudfs.core.errors import CloudfsError, Damaged, Held, UsageError
from cloudfs.db.local import LocalState
from cloudfs.format import names
from cloudfs.repo import edits
from cloudfs.repo.keys import Secret
from cloudfs.repo.repository import Repository
from cloudfs.store.base import Buffer, ObjectInfo
from cloudfs.store.count import CountStore
from cloudfs.store.open import OpenedStore, open_store
from cloudfs.store.wrapper import StoreWrapper
from tests.repo.sample import Machine, opened

FIRST = Secret.key_file(b"1" * 32)


def secret(number: int) -> Secret:
    return Secret.key_file(b"%032d" % number)


class Dead(BaseException):
    """The editor died here."""


class Between(StoreWrapper):
    """Calls ``act`` once, before or after the ``place``-th request."""

    def __init__(self, store: OpenedStore, place: int, act: Callable[[], None], when: str) -> None:
        super().__init__(store)
        self._left, self._act, self._when = place, act, when

    def _now(self, when: str) -> None:
        if self._when == when:
            self._left -= 1
            if self._left == -1:
                self._act()

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        self._now("before")
        data = self.inner.get(name, offset, length)
        self._now("after")
        return data

    def put(self, name: str, chunks: Sequence[Buffer], *, if_absent: bool = False) -> None:
        self._now("before")
        self.inner.put(name, chunks, if_absent=if_absent)
        self._now("after")

    def list(self, prefix: str, *, limit: int | None = None) -> Iterator[ObjectInfo]:
        self._now("before")
        found = list(self.inner.list(prefix, limit=limit))
        self._now("after")
        return iter(found)

    def delete(self, names: Iterable[str]) -> None:
        self._now("before")
        self.inner.delete(names)
        self._now("after")


def editor(
    store: OpenedStore, place: int = 10**6, act: Callable[[], None] = int, when: str = "before"
) -> Repository:
    """One who has the repository open; ``act`` happens at a request of his from then on."""
    opening = Repository.open(store, FIRST, Machine()).opening
    counter = CountStore(Between(store, place, act, when))
    return Repository.reopen(OpenedStore(counter, counter), opening, Machine())


def labels(store: OpenedStore) -> list[str]:
    return [key.label for key in Repository.read_config(store).keys]


def opens(store: OpenedStore, given: Secret) -> bool:
    try:
        Repository.open(store, given, Machine())
    except CloudfsError:
        return False
    return True


PLACES = [(place, when) for place in range(14) for when in ("before", "after")]


@pytest.mark.parametrize("others", [1, 3])
def test_an_editor_between_each_two_requests_of_another(others: int) -> None:
    acted = 0
    for place, when in PLACES:
        store = opened({})
        Repository.create(store, FIRST, Machine(), label="first")
        happened = []

        def others_add(store: OpenedStore = store, happened: list[int] = happened) -> None:
            for number in range(others):
                editor(store).add_key(secret(number), f"other {number}")
            happened.append(1)

        one = editor(store, place, others_add, when)
        one.add_key(secret(99), "one")
        one.remove_key(one.add_key(secret(98), "for a moment").id)
        acted += len(happened)
        expected = ["first", "one"] + [f"other {n}" for n in range(others)] * len(happened)
        assert sorted(labels(store)) == sorted(expected), (place, when)
        assert opens(store, secret(99)) and not opens(store, secret(98))
        assert sorted(key.label for key in one.keys()) == sorted(labels(store))
    assert acted > 20


def test_an_editor_who_dies_at_each_request() -> None:
    outcomes = set()
    for place, when in PLACES:
        store = opened({})
        Repository.create(store, FIRST, Machine(), label="first")

        def die() -> None:
            raise Dead

        try:
            editor(store, place, die, when).add_key(secret(1), "dying")
        except Dead:
            pass
        else:
            assert labels(store) == ["first", "dying"]
            continue
        before = labels(store)
        editor(store).add_key(secret(2), "second")
        assert labels(store) in (["first", "second"], ["first", "dying", "second"])
        assert "dying" not in before or "dying" in labels(store)
        outcomes.add(tuple(labels(store)))
    assert len(outcomes) == 2


def test_of_the_last_two_keys_one_stays() -> None:
    refused = 0
    for place, when in PLACES:
        store = opened({})
        made = Repository.create(store, FIRST, Machine(), label="first")
        other = made.add_key(secret(1), "second")
        first = made.keys()[0].id

        def remove(made: Repository = made, key_id: str = other.id) -> None:
            nonlocal refused
            try:
                made.remove_key(key_id)
            except UsageError as error:
                assert "only key" in str(error)
                refused += 1

        try:
            editor(store, place, remove, when).remove_key(first)
        except UsageError as error:
            assert "only key" in str(error)
            refused += 1
        assert len(labels(store)) == 1, (place, when)
        assert opens(store, FIRST) != opens(store, secret(1))
    assert refused > 10


def test_who_was_stopped_for_long_undoes_nothing() -> None:
    """Even one whose claim's number was used, superseded and deleted meanwhile."""
    store = opened({})
    Repository.create(store, FIRST, Machine(), label="first")
    keys = Repository.read_config(store).keys
    for number in range(4):
        editor(store).add_key(secret(number), f"{number}")
    assert len(list(store.list(edits.CLAIMS))) == 1  # older ones are gone
    old = msgspec.structs.replace(Repository.read_config(store), keys=keys, revision=2)
    store.put(edits.claim_name(2), [edits.format_config(old)], if_absent=True)
    editor(store).add_key(secret(5), "5")
    assert labels(store) == ["first", "0", "1", "2", "3", "5"]
    assert [info.name for info in store.list(edits.CLAIMS)] == [edits.claim_name(5)]


def test_a_claim_is_never_written_over() -> None:
    """Who copies a claim must find the one whose writer was told that it is his."""
    conditions = []

    class Watched(StoreWrapper):
        def put(self, name: str, chunks: Sequence[Buffer], *, if_absent: bool = False) -> None:
            self.inner.put(name, chunks, if_absent=if_absent)
            if name.startswith(edits.CLAIMS):
                conditions.append(if_absent)

    counter = CountStore(Watched(opened({})))
    store = OpenedStore(counter, counter)
    Repository.create(store, FIRST, Machine(), label="first").add_key(secret(1), "1")
    assert conditions == [True]


@pytest.mark.parametrize("data", [b"", b"{}", b"\0" * 100])
def test_a_damaged_claim_is_named(data: bytes) -> None:
    store = opened({})
    repository = Repository.create(store, FIRST, Machine(), label="first")
    store.put(edits.claim_name(1), [data])
    with pytest.raises(Damaged, match=r"edit/f+e .*damaged.*Delete it"):
        repository.add_key(secret(1), "x")
    assert opens(store, FIRST)  # who only reads is not disturbed
    store.delete([edits.claim_name(1)])
    repository.add_key(secret(1), "x")


def test_a_stranger_among_the_claims_is_passed_over() -> None:
    store = opened({})
    repository = Repository.create(store, FIRST, Machine(), label="first")
    for name in ("edit/readme", "edit/0", "edit/" + "F" * 16):
        store.put(name, [b"x"])
    repository.add_key(secret(1), "x")
    assert labels(store) == ["first", "x"]


def test_who_is_never_quick_enough_gives_up() -> None:
    class Forgets(StoreWrapper):
        def put(self, name: str, chunks: Sequence[Buffer], *, if_absent: bool = False) -> None:
            if name != names.CONFIG or if_absent:
                self.inner.put(name, chunks, if_absent=if_absent)

    counter = CountStore(Forgets(opened({})))
    repository = Repository.create(OpenedStore(counter, counter), FIRST, Machine(), label="first")
    with pytest.raises(Held, match="all the time"):
        repository.add_key(secret(1), "x")


def test_one_writer_on_a_store_without_conditions() -> None:
    store = opened({})
    repository = Repository.create(store, FIRST, Machine(), label="first", conditional=False)
    for number in range(3):
        repository.add_key(secret(number), f"{number}")
    repository.remove_key(repository.keys()[0].id)
    assert labels(store) == ["0", "1", "2"]


def add_some(url: str, base: str, number: int) -> None:
    local = LocalState(Path(base) / "c", Path(base) / "s")
    repository = Repository.open(open_store(url), FIRST, local)
    for turn in range(5):
        repository.add_key(secret(10 * number + turn), f"{number}-{turn}")
    repository.remove_key(next(k.id for k in repository.keys() if k.label == f"{number}-0"))


def test_several_processes_at_once(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/repo"
    local = LocalState(tmp_path / "c", tmp_path / "s")
    Repository.create(open_store(url), FIRST, local, label="first")
    context = multiprocessing.get_context("forkserver")
    processes = [
        context.Process(target=add_some, args=(url, str(tmp_path / str(number)), number))
        for number in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    expected = {f"{number}-{turn}" for number in range(4) for turn in range(1, 5)} | {"first"}
    found = labels(open_store(url))
    assert len(found) == len(expected) and set(found) == expected
