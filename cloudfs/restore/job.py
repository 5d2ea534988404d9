"""What a restore is asked to do, what it tells while it runs, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from cloudfs.core.errors import CloudfsError
from cloudfs.core.manifest import SnapshotRecord
from cloudfs.repo.history import History
from cloudfs.repo.pool import WorkerOpening
from cloudfs.restore.values import Totals
from cloudfs.store.count import Counts as Requests


@dataclass
class RestoreJob:
    """One restore to be done. ``workers`` 0: as many as there are cores."""

    history: History
    snapshot: int
    path: bytes  # within the snapshot, absolute
    target: bytes
    opening: WorkerOpening
    workers: int = 0
    owners: str = "id"  # see metadata.OWNERS
    dry_run: bool = False
    stopped: Callable[[], bool] = lambda: False  # asked between parts: True ends it cleanly


class RestoreEvents(Protocol):
    """Told while a restore runs, from one thread."""

    def phase(self, name: str) -> None:
        """A new phase: planning, restoring, finishing."""

    def progress(
        self, items_found: int, items_done: int, bytes_found: int, bytes_done: int
    ) -> None:
        """How far it is."""


@dataclass
class RestoreResult:
    """What came of a restore. ``failures`` are (path below the target, reason)."""

    snapshot: SnapshotRecord
    totals: Totals
    requests: Requests = field(default_factory=Requests)
    failures: list[tuple[bytes, str]] = field(default_factory=list)
    lost: dict[str, int] = field(default_factory=dict)
    damaged: bool = False
    duration_ns: int = 0


class Interrupted(CloudfsError):
    """The user asked the restore to stop."""
