"""Fixtures for all tests: a btrfs; the servers, each started once for a test process, when first
used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import servers
from tests.engine import btrfs


@pytest.fixture
def volume() -> Iterator[Path]:
    """A btrfs of its own."""
    with btrfs.volume() as place:
        yield place


@pytest.fixture(scope="session")
def seaweedfs_server() -> Iterator[servers.S3Server]:
    """A real S3 server."""
    with servers.seaweedfs() as server:
        yield server


@pytest.fixture
def seaweedfs(
    seaweedfs_server: servers.S3Server, monkeypatch: pytest.MonkeyPatch
) -> servers.S3Server:
    """A real S3 server, with the environment set so that clients can log in."""
    return login(seaweedfs_server, monkeypatch)


@pytest.fixture(scope="session")
def moto_server() -> Iterator[servers.S3Server]:
    """moto's imitation of S3."""
    with servers.moto() as server:
        yield server


@pytest.fixture
def moto(moto_server: servers.S3Server, monkeypatch: pytest.MonkeyPatch) -> servers.S3Server:
    """moto's imitation of S3, with the environment set so that clients can log in."""
    return login(moto_server, monkeypatch)


def login(server: servers.S3Server, monkeypatch: pytest.MonkeyPatch) -> servers.S3Server:
    """Set the environment for ``server``."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    return server
