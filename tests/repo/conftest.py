"""The sample repository, made once for a test process."""

from __future__ import annotations

from dataclasses import dataclass

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
def made(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """A repository with two policies of two snapshots each, and what it holds."""
    return Sample(*sample.make(tmp_path_factory.mktemp("sample")))
