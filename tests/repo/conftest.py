"""The sample repository, made once for a test process."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.repo import sample


@dataclass
class Sample:
    """See :func:`tests.repo.sample.make`."""

    early: sample.Objects
    objects: sample.Objects
    truth: sample.Contents

    def of_kind(self, kind: str) -> list[str]:
        """The names of all objects of a kind."""
        return [name for name in self.objects if sample.kind_of(name) == kind]


@pytest.fixture(scope="session")
def made() -> Iterator[Sample]:
    """A repository with two policies of two snapshots each, and what it holds."""
    with in_memory() as place:
        yield Sample(*sample.make(place))


@contextlib.contextmanager
def in_memory() -> Iterator[Path]:
    """A directory on tmpfs: ext4 does not hold the large attributes that are wanted here."""
    place = Path(tempfile.mkdtemp(prefix="cloudfs-test-", dir="/dev/shm"))
    try:
        yield place
    finally:
        shutil.rmtree(place)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """The directory of one test, on tmpfs."""
    with in_memory() as place:
        yield place
