"""A repository made by real syncs, and real mounts of it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cloudfs.backup.job import SyncJob, SyncSettings, Verified
from cloudfs.backup.sync import sync
from cloudfs.core.manifest import SnapshotRecord
from cloudfs.db.local import LocalState
from cloudfs.fuse.daemon import Daemon
from cloudfs.fuse.job import MountJob, job_of
from cloudfs.repo.history import History
from cloudfs.repo.keys import Secret
from cloudfs.repo.pool import WorkerOpening
from cloudfs.repo.repository import PolicyRecord, Repository
from cloudfs.store.open import StoreOptions, open_store

BLOCK = 64 * 1024


class Quiet:
    """Takes what a sync tells, and tells nobody."""

    def phase(self, name: str) -> None:
        """See SyncEvents."""

    def progress(
        self, items_found: int, items_done: int, bytes_found: int, bytes_done: int
    ) -> None:
        """See SyncEvents."""

    def note(self, text: str) -> None:
        """See SyncEvents."""

    def differs(self, source: str, found: Verified) -> None:
        """See SyncEvents."""


class Bench:
    """A directory with a repository and its local state; trees below it can be synced."""

    def __init__(
        self, base: Path, url: str | None = None, options: StoreOptions | None = None
    ) -> None:
        self.base = base
        self.options = options or StoreOptions(retry_s=1.0)
        self.url = url or f"file://{base}/repo"
        self.local = LocalState(base / "cache", base / "state")
        store = open_store(self.url, self.options)
        # Argon2 is tested elsewhere: a key file opens at once.
        secret = Secret.key_file(b"k" * 32)
        self.repository = Repository.create(store, secret, self.local, label="test")
        self.policies: dict[str, PolicyRecord] = {}

    def sync(self, tree: Path, policy: str = "home") -> SnapshotRecord:
        """Sync a tree under a policy of that name; what it made."""
        if policy not in self.policies:
            self.policies[policy] = self.repository.save_policy(policy, "")
        settings = SyncSettings(
            name=policy,
            sources=[os.fsencode(tree)],
            url=self.url,
            options=self.options,
            block_size=BLOCK,
            workers=1,
        )
        job = SyncJob(settings, self.policies[policy], self.repository, "host")
        made = sync(job, Quiet()).snapshot
        assert made is not None
        return made

    def history(self, policy: str = "home") -> History:
        """A policy's history as it is in the repository now."""
        return History(self.repository, self.policies[policy])

    def job(self, mountpoint: Path, **changes: object) -> MountJob:
        """The job to mount all policies of the repository."""
        opening = WorkerOpening(
            self.url,
            self.options,
            self.repository.opening,
            self.local.cache_dir,
            self.local.state_dir,
        )
        histories = [self.history(name) for name in self.policies]
        try:
            job = job_of(opening, histories, str(mountpoint))
        finally:
            for history in histories:
                history.close()
        return dataclasses.replace(job, **changes)  # type: ignore[arg-type]  # a test's shorthand

    @contextlib.contextmanager
    def mounted(self, mountpoint: Path, **changes: object) -> Iterator[Daemon]:
        """Mount at a directory, which is made if need be, and take it away at the end."""
        mountpoint.mkdir(exist_ok=True)
        with self.serving(self.job(mountpoint, **changes)) as daemon:
            yield daemon

    @contextlib.contextmanager
    def serving(self, job: MountJob) -> Iterator[Daemon]:
        """Do a job, and end it at the end."""
        daemon = Daemon()
        daemon.mount(job)
        try:
            yield daemon
        finally:
            daemon.cancel()

    def close(self) -> None:
        """Free what was opened."""
        self.local.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A repository of its own."""
    made = Bench(tmp_path)
    yield made
    made.close()


def wait_until(true: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for something to become true; fail when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)
