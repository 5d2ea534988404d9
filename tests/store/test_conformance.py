"""What every store must do, tried on all of them, and on every wrapper around one."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudfs.core.errors import AlreadyExists, NotFound, StoreError
from cloudfs.store.base import ObjectInfo, Store
from cloudfs.store.count import CountStore
from cloudfs.store.fault import FaultStore
from cloudfs.store.limit import LimitStore
from cloudfs.store.local import LocalStore
from cloudfs.store.memory import MemoryStore
from cloudfs.store.open import StoreOptions, open_store
from cloudfs.store.retry import RetryStore

DIRECT = ["memory", "local", "seaweedfs", "moto"]
WRAPPED = ["count", "limit", "retry", "fault", "opened"]


def make_store(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    match kind:
        case "memory":
            return MemoryStore()
        case "local":
            return LocalStore(str(tmp_path / "below" / "repo"))
        case "seaweedfs" | "moto":
            server = request.getfixturevalue(kind)
            options = StoreOptions(endpoint_url=server.endpoint_url, retry_s=0)
            return open_store(f"s3://{server.bucket}/{uuid.uuid4().hex}/sub", options)
        case "count":
            return CountStore(MemoryStore())
        case "limit":
            return LimitStore(MemoryStore(), upload_bytes_s=1e12, download_bytes_s=1e12)
        case "retry":
            return RetryStore(MemoryStore())
        case "fault":
            return FaultStore(MemoryStore(), lambda *_: None)
        case "opened":
            options = StoreOptions(upload_limit_bytes_s=1e12, download_limit_bytes_s=1e12)
            return open_store(f"file://{tmp_path}/repo", options)
    raise AssertionError(kind)


@pytest.fixture(params=DIRECT + WRAPPED)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    made = make_store(request.param, request, tmp_path)
    yield made
    made.close()


def names(store: Store, prefix: str = "", limit: int | None = None) -> list[str]:
    return [info.name for info in store.list(prefix, limit=limit)]


def test_nothing_is_there_at_first(store: Store) -> None:
    assert names(store) == []
    assert names(store, "data/x") == []
    with pytest.raises(NotFound, match="data/a"):
        store.get("data/a")
    with pytest.raises(NotFound):
        store.get("data/a", 5, 0)
    store.delete(["data/a", "b"])
    store.delete([])


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 3_000_001])
def test_what_is_put_is_got(store: Store, size: int) -> None:
    data = bytes(range(251)) * (size // 251 + 1)
    data = data[:size]
    store.put("data/a", [data])
    assert store.get("data/a") == data
    assert type(store.get("data/a")) is bytes
    assert list(store.list("")) == [ObjectInfo("data/a", size)]


def test_chunks_of_every_kind_are_joined(store: Store) -> None:
    words = memoryview(bytearray(b"0123456789"))[2:8].cast("H")
    store.put("a", [b"ab", bytearray(b"cd"), b"", memoryview(b"xefx")[1:3], words])
    assert store.get("a") == b"abcdef234567"
    many = [bytes([i % 256]) * 3 for i in range(5000)]
    store.put("b", many)
    assert store.get("b") == b"".join(many)


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, None, b"0123456789"),
        (0, 4, b"0123"),
        (3, 4, b"3456"),
        (3, None, b"3456789"),
        (0, 10, b"0123456789"),
        (0, 99, b"0123456789"),
        (8, 99, b"89"),
        (10, None, b""),
        (10, 1, b""),
        (99, 5, b""),
        (5, 0, b""),
        (-3, None, b"789"),
        (-3, 2, b"78"),
        (-3, 99, b"789"),
        (-10, None, b"0123456789"),
        (-99, None, b"0123456789"),
        (-99, 2, b"01"),
        (-3, 0, b""),
    ],
)
def test_parts(store: Store, offset: int, length: int | None, expected: bytes) -> None:
    store.put("a", [b"0123456789"])
    assert store.get("a", offset, length) == expected


def test_parts_of_nothing(store: Store) -> None:
    store.put("empty", [])
    assert store.get("empty", 0, 5) == b""
    assert store.get("empty", -5) == b""
    assert store.get("empty", 7) == b""


def test_put_replaces(store: Store) -> None:
    store.put("a/b", [b"a longer first one"])
    store.put("a/b", [b"second"])
    assert store.get("a/b") == b"second"
    assert list(store.list("")) == [ObjectInfo("a/b", 6)]


def test_put_if_absent_does_not(store: Store) -> None:
    store.put("a/b", [b"first"], if_absent=True)
    for data in (b"second", b"first", b""):
        with pytest.raises(AlreadyExists, match="a/b"):
            store.put("a/b", [data], if_absent=True)
    assert store.get("a/b") == b"first"
    store.delete(["a/b"])
    store.put("a/b", [b"third"], if_absent=True)
    assert store.get("a/b") == b"third"
    assert names(store) == ["a/b"]


def test_one_of_many_racing_writers_wins(store: Store) -> None:
    for attempt in range(3):
        name = f"race/{attempt}"
        barrier = threading.Barrier(10)
        won: list[int] = []
        lost: list[int] = []
        other: list[BaseException] = []

        def write(number: int, name: str = name, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            try:
                store.put(name, [b"%d" % number * 1000], if_absent=True)
                won.append(number)  # noqa: B023  # joined within this turn of the loop
            except AlreadyExists:
                lost.append(number)  # noqa: B023
            except BaseException as error:
                other.append(error)  # noqa: B023

        threads = [threading.Thread(target=write, args=(number,)) for number in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert other == []
        assert len(won) == 1
        assert len(lost) == 9
        assert store.get(name) == b"%d" % won[0] * 1000


def test_listing_is_sorted_and_keeps_to_the_prefix(store: Store) -> None:
    given = ["a0", "B", "a/b0", "a/d", "a/b/d", "a/c0/d", "a/c0/e", "a/c00", "_", "b", "a/c1-"]
    for name in given:
        store.put(name, [name.encode()])
    assert names(store) == sorted(given)
    for prefix in ("a", "a/", "a/b", "a/c", "a/c0/", "a/c0/d", "a/c0/d/", "x", "a/bb", "A", "a0"):
        expected = sorted(name for name in given if name.startswith(prefix))
        assert names(store, prefix) == expected
        for limit in range(len(expected) + 2):
            assert names(store, prefix, limit) == expected[:limit]


def test_listing_over_many_pages(store: Store) -> None:
    count = 1101
    threads = [
        threading.Thread(
            target=lambda part=part: [
                store.put(f"many/{number % 7}/{number:05}", []) for number in range(part, count, 8)
            ]
        )
        for part in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = sorted(f"many/{number % 7}/{number:05}" for number in range(count))
    assert names(store, "many/") == expected
    assert names(store, "many/", 1001) == expected[:1001]
    store.delete(name for name in expected[1:])
    assert names(store) == expected[:1]


def test_delete(store: Store) -> None:
    for name in ("a", "b/c", "b/d"):
        store.put(name, [b"x"])
    store.delete(iter(["b/c", "gone", "b/gone", "a"]))
    assert names(store) == ["b/d"]
    with pytest.raises(NotFound):
        store.get("b/c")


def test_a_part_of_a_name_is_no_object(store: Store) -> None:
    store.put("a/b/c", [b"x"])
    with pytest.raises(NotFound):
        store.get("a/b")
    with pytest.raises(NotFound):
        store.get("a/b/c/d")
    store.delete(["a/b/c/d"])
    assert store.get("a/b/c") == b"x"


@pytest.mark.parametrize(
    "name",
    ["", "/a", "a/", "a//b", ".", "..", "a/../b", "../a", ".tmp/x", "a\n", "ä", "a b", "a\0"],
)
def test_bad_names(store: Store, name: str) -> None:
    with pytest.raises(StoreError, match="name"):
        store.put(name, [b"x"])
    with pytest.raises(StoreError, match="name"):
        store.get(name)
    with pytest.raises(StoreError, match="name"):
        store.delete([name])


def test_threads_share_a_store(store: Store) -> None:
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(15):
                data = b"%d-%d" % (number, turn) * 100
                store.put(f"t/{number}/{turn}", [data])
                assert store.get(f"t/{number}/{turn}") == data
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(names(store, "t/")) == 120
