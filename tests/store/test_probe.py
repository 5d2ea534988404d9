"""Stores that can be trusted, and others."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloudfs.core.errors import NotFound, StoreError
from cloudfs.store.base import Store
from cloudfs.store.count import CountStore
from cloudfs.store.fault import Fault, FaultStore
from cloudfs.store.local import LocalStore
from cloudfs.store.memory import MemoryStore
from cloudfs.store.open import StoreOptions, open_store
from cloudfs.store.probe import Probe, probe
from tests import servers


def test_good_stores(seaweedfs: servers.S3Server, moto: servers.S3Server, tmp_path: Path) -> None:
    stores: list[Store] = [MemoryStore(), LocalStore(f"{tmp_path}/repo")]
    for server in (seaweedfs, moto):
        options = StoreOptions(endpoint_url=server.endpoint_url, retry_s=0)
        stores.append(open_store("s3://bucket/probed", options))
    for store in stores:
        counted = CountStore(store)
        assert probe(counted, "probe-1") == Probe(conditional=True)
        assert list(store.list("")) == []
        assert counted.counts().requests == 6


@pytest.fixture
def careless(monkeypatch: pytest.MonkeyPatch):
    for name, value in servers.environment("key", "secret").items():
        monkeypatch.setenv(name, value)
    with servers.careless_s3() as url:
        yield open_store("s3://bucket", StoreOptions(endpoint_url=url, retry_s=0))


def test_a_server_that_ignores_conditions(careless: Store) -> None:
    with pytest.raises(StoreError, match=r"this store ignores conditional writes.*single-writer"):
        probe(careless, "probe-1")
    with pytest.raises(NotFound):
        careless.get("probe-1")
    assert probe(careless, "probe-2", single_writer=True) == Probe(conditional=False)
    with pytest.raises(NotFound):
        careless.get("probe-2")


class Trailers(MemoryStore):
    """Stores a checksum trailer as if it were data, as some servers do."""

    def put(self, name, chunks, *, if_absent=False):
        framed = [b"1000\r\n", *chunks, b"\r\n0\r\nx-amz-checksum-crc32:AAAAAA==\r\n"]
        super().put(name, framed, if_absent=if_absent)


class NoRanges(MemoryStore):
    """Returns the whole object whatever is asked for."""

    def get(self, name, offset=0, length=None):
        return super().get(name)


class NoEnds(MemoryStore):
    """Takes an offset from the end for one from the beginning."""

    def get(self, name, offset=0, length=None):
        return super().get(name, abs(offset), length)


@pytest.mark.parametrize("kind", [Trailers, NoRanges, NoEnds])
def test_stores_that_return_other_bytes(kind: type[MemoryStore]) -> None:
    store = kind()
    with pytest.raises(StoreError, match="other bytes"):
        probe(store, "probe-1", single_writer=True)
    assert list(store.list("")) == []


def test_a_store_that_forgets() -> None:
    memory = MemoryStore()

    def decide(index: int, kind: str, name: str) -> Fault | None:
        return Fault(NotFound("not there.")) if kind == "get" else None

    with pytest.raises(StoreError, match="does not find an object"):
        probe(FaultStore(memory, decide), "probe-1")
    assert list(memory.list("")) == []
