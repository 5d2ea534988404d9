"""Counting, keeping to a bandwidth, and going wrong on purpose."""

from __future__ import annotations

import threading
from time import monotonic

import pytest

from cloudfs.core.errors import AlreadyExists, NotFound, Unavailable
from cloudfs.store.count import Counts, CountStore
from cloudfs.store.fault import Fault, FaultStore
from cloudfs.store.limit import LimitStore
from cloudfs.store.memory import MemoryStore


def test_requests_and_bytes_are_counted() -> None:
    store = CountStore(MemoryStore())
    assert store.counts() == Counts()
    store.put("a", [b"12", memoryview(b"3456").cast("H")])
    store.get("a")
    store.get("a", -2)
    with pytest.raises(NotFound):
        store.get("b")
    with pytest.raises(AlreadyExists):
        store.put("a", [b"xyz"], if_absent=True)
    assert store.counts() == Counts(gets=3, puts=2, bytes_up=6, bytes_down=8)
    assert store.counts().requests == 5


@pytest.mark.parametrize(("count", "requests"), [(0, 1), (1, 1), (1000, 1), (1001, 2), (2001, 3)])
def test_listings_are_counted_by_the_thousand(count: int, requests: int) -> None:
    memory = MemoryStore()
    for number in range(count):
        memory.put(f"n{number}", [])
    store = CountStore(memory)
    names = [info.name for info in store.list("")]
    assert store.counts() == Counts(lists=requests)
    store.delete(names)
    assert store.counts().deletes == (0 if count == 0 else requests)
    store = CountStore(memory)
    list(store.list("n", limit=1))
    assert store.counts() == Counts(lists=1)


def test_counts_add_up() -> None:
    one, two = Counts(1, 2, 3, 4, 5, 6), Counts(10, 20, 30, 40, 50, 60)
    assert one + two == Counts(11, 22, 33, 44, 55, 66)
    assert two - one == Counts(9, 18, 27, 36, 45, 54)
    assert one.requests == 10


def test_counting_from_many_threads() -> None:
    store = CountStore(MemoryStore())

    def work() -> None:
        for _ in range(1000):
            store.put("a", [b"xx"])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.counts() == Counts(puts=8000, bytes_up=16000)


class Time:
    """A clock that a sleep puts forward."""

    now = 50.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_bandwidth_is_kept_to_each_way() -> None:
    time = Time()
    store = LimitStore(
        MemoryStore(),
        upload_bytes_s=1000,
        download_bytes_s=500,
        clock=time.clock,
        sleep=time.sleep,
    )
    for _ in range(11):
        store.put("a", [b"x" * 700, b"y" * 300])
    assert time.now - 50 == pytest.approx(10)  # the eleventh is sent and not yet paid for
    began = time.now
    for _ in range(11):
        store.get("a")
    assert time.now - began == pytest.approx(20)
    store.get("a", 0, 100)
    began = time.now
    store.get("a")
    assert time.now - began == pytest.approx(0.2)


def test_idle_time_is_not_saved_up() -> None:
    time = Time()
    store = LimitStore(
        MemoryStore(), upload_bytes_s=1000, download_bytes_s=None, clock=time.clock,
        sleep=time.sleep,
    )  # fmt: skip
    store.put("a", [b"x" * 1000])
    time.now += 1000
    began = time.now
    for _ in range(5):
        store.put("a", [b"x" * 1000])
    assert time.now - began == pytest.approx(4)
    began = time.now
    store.get("a")
    assert time.now == began


def test_threads_share_the_bandwidth() -> None:
    """In real time: eight threads together send no faster than one may."""
    store = LimitStore(MemoryStore(), upload_bytes_s=100_000, download_bytes_s=None)
    began = monotonic()
    threads = [
        threading.Thread(target=lambda: [store.put("a", [b"x" * 1000]) for _ in range(5)])
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert monotonic() - began > 0.25


def test_faults_happen_where_they_are_put() -> None:
    memory = MemoryStore()
    asked: list[tuple[int, str, str]] = []
    slept: list[float] = []
    error = Unavailable("away.")
    plan = {
        0: Fault(error),
        1: Fault(error, after=True),
        2: Fault(truncate=2),
        3: Fault(delay_s=3.0),
        4: Fault(truncate=1),
        5: Fault(truncate=1),
        6: Fault(truncate=1),
    }

    def decide(index: int, kind: str, name: str) -> Fault | None:
        asked.append((index, kind, name))
        return plan.get(index)

    store = FaultStore(memory, decide, slept.append)
    with pytest.raises(Unavailable):
        store.put("a", [b"data"])
    assert list(memory.list("")) == []
    with pytest.raises(Unavailable):
        store.put("b", [b"data"])
    assert memory.get("b") == b"data"
    store.put("c", [b"da", b"ta"])
    assert memory.get("c") == b"da"
    assert store.get("b") == b"data"
    assert slept == [3.0]
    assert store.get("b") == b"d"
    assert [info.name for info in store.list("x")] == []
    store.delete(["b", "c"])
    assert [info.name for info in memory.list("")] == ["c"]
    kinds = ["put", "put", "put", "get", "get", "list", "delete"]
    assert asked == list(zip(range(7), kinds, ["a", "b", "c", "b", "b", "x", "b"], strict=True))
