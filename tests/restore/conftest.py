"""A repository made by real syncs, and real restores from it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudfs.repo.pool import WorkerOpening
from cloudfs.restore.job import RestoreJob, RestoreResult
from cloudfs.restore.restore import restore
from tests.fuse.conftest import Bench, Quiet


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A repository of its own."""
    made = Bench(tmp_path)
    yield made
    made.close()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Where a tree may be made."""
    return tmp_path / "tree"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where to restore to."""
    return tmp_path / "out"


def run(bench: Bench, target: Path, path: str = "/", **changes: object) -> RestoreResult:
    """Restore from the latest snapshot, or as ``changes`` of the job say."""
    local = bench.local
    opening = WorkerOpening(
        bench.url, bench.options, bench.repository.opening, local.cache_dir, local.state_dir
    )
    with contextlib.closing(bench.history()) as history:
        job = RestoreJob(
            history,
            history.snapshots[-1].number,
            os.fsencode(path),
            os.fsencode(target),
            opening,
            workers=1,
        )
        for name, value in changes.items():
            assert hasattr(job, name)
            setattr(job, name, value)
        return restore(job, Quiet())
