"""What a sync is asked to do, what it tells while it runs, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from cloudfs.core.manifest import SnapshotRecord
from cloudfs.repo.repository import PolicyRecord, Repository
from cloudfs.source.external.command import Commands
from cloudfs.source.scan import Filters
from cloudfs.store.count import Counts as Requests
from cloudfs.store.open import StoreOptions


class SyncSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a policy that a sync needs. Sizes in bytes; ``workers`` 0: as many as cores."""

    name: str
    sources: list[bytes]
    url: str
    options: StoreOptions
    source: str = "scan"  # one of cloudfs.core.policy.SOURCES
    filters: Filters = Filters()
    block_size: int = 128 * 1024
    max_pack_bytes: int = 32 << 20
    pack_time_limit_s: float = 300.0
    level: int = 3
    verify_packs: bool = True
    workers: int = 0
    tags: list[str] = []
    external: Commands | None = None


@dataclass
class SyncJob:
    """One sync to be done."""

    settings: SyncSettings
    record: PolicyRecord
    repository: Repository
    host: str
    dry_run: bool = False
    force: bool = False
    wait_s: float = 0.0
    stopped: Callable[[], bool] = lambda: False  # asked between steps: True ends the sync cleanly


class SyncEvents(Protocol):
    """Told while a sync runs, from one thread."""

    def phase(self, name: str) -> None:
        """A new phase: waiting, opening, scanning, packing, coalescing, committing."""

    def progress(
        self, items_found: int, items_done: int, bytes_found: int, bytes_done: int
    ) -> None:
        """How far it is; ``found`` grows while the tree is walked."""

    def note(self, text: str) -> None:
        """Something worth a line."""


@dataclass
class SyncResult:
    """What came of a sync. ``snapshot`` is None when nothing had changed, or for a dry run."""

    snapshot: SnapshotRecord | None
    previous: SnapshotRecord | None
    unreadable: list[tuple[bytes, str]]
    requests: Requests
    new: int = 0
    changed: int = 0
    moved: int = 0
    deleted: int = 0
    duration_ns: int = 0
    notes: list[str] = field(default_factory=list)
