"""From URLs to stores."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from cloudfs.core.errors import NotFound, Unavailable, UsageError
from cloudfs.store.count import Counts
from cloudfs.store.open import Place, StoreOptions, open_store, parse_url
from tests import servers


@pytest.mark.parametrize(
    ("url", "place", "plain"),
    [
        ("file:///backup", Place("", "/backup"), "file:///backup"),
        ("/backup", Place("", "/backup"), "file:///backup"),
        ("file:///a/b/", Place("", "/a/b"), "file:///a/b"),
        ("//a//b/./c/../d", Place("", "/a/b/d"), "file:///a/b/d"),
        ("file:///with space/%20/ü", Place("", "/with space/%20/ü"), "file:///with space/%20/ü"),
        ("s3://bucket", Place("bucket", ""), "s3://bucket"),
        ("s3://bucket/", Place("bucket", ""), "s3://bucket"),
        ("s3://my.buck-et/a/b/", Place("my.buck-et", "a/b"), "s3://my.buck-et/a/b"),
    ],
)
def test_good_urls(url: str, place: Place, plain: str) -> None:
    assert parse_url(url) == place
    assert parse_url(url).url == plain
    assert parse_url(plain) == place


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "is no repository URL"),
        ("backup", "is no repository URL"),
        ("s3:bucket", "is no repository URL"),
        ("file://host/path", "three slashes"),
        ("file://", "three slashes"),
        ("file:///", "directory of its own"),
        ("/", "directory of its own"),
        ("s3://", "names no bucket"),
        ("s3:///prefix", "names no bucket"),
        ("s3://a b/c", "names no bucket"),
        ("s3://bucket/a//b", "in the prefix"),
        ("s3://bucket/../b", "in the prefix"),
        ("s3://bucket/a b", "in the prefix"),
        ("sftp://host/x", "not sftp://"),
    ],
)
def test_bad_urls(url: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse_url(url)
    assert f'"{url}"' in str(caught.value)


def test_opening_touches_nothing(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/repo")
    assert store.url == f"file://{tmp_path}/repo"
    assert list(tmp_path.iterdir()) == []


def test_counts_are_those_of_this_store(tmp_path: Path) -> None:
    store = open_store(f"{tmp_path}/repo")
    store.put("a", [b"1234"])
    before = store.counts()
    assert before == Counts(puts=1, bytes_up=4)
    store.get("a", 1)
    with pytest.raises(NotFound):
        store.get("b")
    assert store.counts() - before == Counts(gets=2, bytes_down=3)


def test_tries_are_counted_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in servers.environment("key", "secret").items():
        monkeypatch.setenv(name, value)
    (port,) = servers.free_ports(1)
    options = StoreOptions(endpoint_url=f"http://127.0.0.1:{port}", retry_s=1.0)
    store = open_store("s3://bucket", options)
    with pytest.raises(Unavailable, match=r"connection refused\), tried for [01] s"):
        store.get("a")
    assert 3 <= store.counts().gets <= 6


def test_a_limit_of_bandwidth_reaches_the_store(tmp_path: Path) -> None:
    import time

    store = open_store(f"{tmp_path}/repo", StoreOptions(upload_limit_bytes_s=1_000_000))
    began = time.monotonic()
    for _ in range(3):
        store.put("a", [b"x" * 100_000])
    assert time.monotonic() - began > 0.19


def test_options_travel_to_workers() -> None:
    options = StoreOptions("http://x", "r", "p", 1000.0, None, 5.0)
    assert pickle.loads(pickle.dumps(options)) == options
    assert options.shared_by(4) == StoreOptions("http://x", "r", "p", 250.0, None, 5.0)
