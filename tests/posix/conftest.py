"""Live mounts for the tests of how they behave."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.posix import mounts
from tests.posix.mounts import Pair


@pytest.fixture(scope="session", params=["tmpfs", "ext4"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A live mount beside a bare directory, on a file system of each kind."""
    with mounts.pair(request.param) as made:
        yield made
        assert not mounts.complaints(made)


@pytest.fixture
def live_pair() -> Iterator[Pair]:
    """One on tmpfs for one test alone."""
    with mounts.pair("tmpfs") as made:
        yield made
        assert not mounts.complaints(made)
