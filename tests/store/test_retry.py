"""The store that tries again, with time that passes only when it sleeps."""

from __future__ import annotations

import pytest

from cloudfs.core.errors import (
    AlreadyExists,
    Denied,
    Full,
    NotFound,
    StoreError,
    Unavailable,
)
from cloudfs.store.base import Store
from cloudfs.store.fault import Decide, Fault, FaultStore
from cloudfs.store.memory import MemoryStore
from cloudfs.store.retry import LONGEST_WAIT_S, RetryStore

AWAY = Unavailable("the store does not answer.")


class Time:
    """A clock that a sleep puts forward."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.slept.append(seconds)
        self.now += seconds


def retrying(inner: Store, time: Time, *, limit_s: float = 120, chance: float = 1.0) -> RetryStore:
    return RetryStore(
        inner, limit_s=limit_s, clock=time.clock, sleep=time.sleep, chance=lambda: chance
    )


def faulty(decide: Decide) -> tuple[MemoryStore, FaultStore]:
    memory = MemoryStore()
    return memory, FaultStore(memory, decide)


def first(count: int, fault: Fault) -> Decide:
    return lambda index, kind, name: fault if index < count else None


@pytest.mark.parametrize("after", [False, True])
def test_every_request_is_tried_again(after: bool) -> None:
    time = Time()
    # Every request fails twice before it succeeds.
    memory, inner = faulty(lambda i, k, n: Fault(AWAY, after=after) if i % 3 < 2 else None)
    store = retrying(inner, time)
    store.put("a", [b"x"])
    assert memory.get("a") == b"x"
    assert store.get("a") == b"x"
    assert [info.name for info in store.list("")] == ["a"]
    store.delete(iter(["a"]))
    assert list(memory.list("")) == []
    assert len(time.slept) == 8


def test_waits_grow_and_end() -> None:
    time = Time()
    _, inner = faulty(lambda *_: Fault(AWAY))
    with pytest.raises(Unavailable, match=r"does not answer, tried for 2 min\. Try again later\.$"):
        retrying(inner, time).get("a")
    assert time.slept[:4] == [0.2, 0.4, 0.8, 1.6]
    assert time.slept == sorted(time.slept)
    assert max(time.slept) == LONGEST_WAIT_S
    assert 100 < sum(time.slept) <= 120


def test_waits_are_spread() -> None:
    least, most = Time(), Time()
    for time, chance in ((least, 0.0), (most, 1.0)):
        _, inner = faulty(first(3, Fault(AWAY)))
        retrying(inner, time, chance=chance).put("a", [b"x"])
    assert least.slept == [wait / 2 for wait in most.slept]


def test_no_time_means_one_try() -> None:
    time = Time()
    _, inner = faulty(first(1, Fault(AWAY)))
    with pytest.raises(Unavailable):
        retrying(inner, time, limit_s=0).get("a")
    assert time.slept == []


@pytest.mark.parametrize("kind", [NotFound, AlreadyExists, Denied, Full, StoreError])
def test_an_answer_is_not_asked_for_again(kind: type[StoreError]) -> None:
    time = Time()
    _, inner = faulty(first(1, Fault(kind("an answer."))))
    store = retrying(inner, time)
    with pytest.raises(kind, match=r"^an answer\.$"):
        store.put("a", [b"x"], if_absent=True)
    assert time.slept == []


def test_a_conditional_write_that_arrived_unconfirmed_is_a_success() -> None:
    time = Time()
    memory, inner = faulty(first(1, Fault(AWAY, after=True)))
    retrying(inner, time).put("a", [b"my", bytearray(b"to"), memoryview(b"ken")], if_absent=True)
    assert memory.get("a") == b"mytoken"
    assert len(time.slept) == 1


@pytest.mark.parametrize("theirs", [b"theirs!", b"", b"mytoke", b"mytoken!"])
def test_a_conditional_write_that_another_won_is_none(theirs: bytes) -> None:
    time = Time()
    memory, inner = faulty(first(1, Fault(AWAY)))
    memory.put("a", [theirs])
    with pytest.raises(AlreadyExists):
        retrying(inner, time).put("a", [b"my", b"token"], if_absent=True)
    assert memory.get("a") == theirs


def test_a_name_taken_at_the_first_try_is_not_read() -> None:
    time = Time()
    kinds: list[str] = []
    memory, inner = faulty(lambda index, kind, name: kinds.append(kind))
    memory.put("a", [b"same"])
    with pytest.raises(AlreadyExists):
        retrying(inner, time).put("a", [b"same"], if_absent=True)
    assert kinds == ["put"]


def test_reading_back_is_tried_again_too() -> None:
    time = Time()
    faults = {0: Fault(AWAY, after=True), 2: Fault(AWAY)}  # the write, and the first look at it
    memory, inner = faulty(lambda index, kind, name: faults.get(index))
    retrying(inner, time).put("a", [b"token"], if_absent=True)
    assert memory.get("a") == b"token"


def test_a_name_that_another_took_and_gave_back_was_not_ours() -> None:
    time = Time()
    faults = {0: Fault(AWAY), 1: Fault(AlreadyExists("taken."))}
    _, inner = faulty(lambda index, kind, name: faults.get(index))
    with pytest.raises(AlreadyExists):
        retrying(inner, time).put("a", [b"token"], if_absent=True)


class BrokenListing(MemoryStore):
    """Its listings break after so many objects each; what is left in ``breaks`` is to come."""

    def __init__(self, breaks: list[int]) -> None:
        super().__init__()
        self.breaks = breaks

    def list(self, prefix, *, limit=None):
        for index, info in enumerate(super().list(prefix, limit=limit)):
            if self.breaks and index == self.breaks[0]:
                self.breaks.pop(0)
                raise AWAY
            yield info


@pytest.mark.parametrize("breaks", [[0], [3], [3, 3], [3, 5, 0, 9], [9, 1, 1]])
@pytest.mark.parametrize("limit", [None, 1, 4, 10, 20])
def test_a_listing_goes_on_where_it_broke(breaks: list[int], limit: int | None) -> None:
    time = Time()
    memory = BrokenListing(list(breaks))
    expected = [f"n{index}" for index in range(10)]
    for name in expected:
        memory.put(name, [])
    found = [info.name for info in retrying(memory, time).list("n", limit=limit)]
    assert found == expected[:limit]


def test_a_listing_that_makes_progress_is_not_given_up() -> None:
    time = Time()
    memory = BrokenListing([index // 3 for index in range(90)])
    for index in range(31):
        memory.put(f"n{index:03}", [])
    assert len(list(retrying(memory, time, limit_s=2.0).list(""))) == 31
    assert sum(time.slept) > 10
