"""What a sync is asked to do, what it tells while it runs, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec

from cloudfs.core.errors import CloudfsError
from cloudfs.core.manifest import SnapshotRecord
from cloudfs.repo.repository import PolicyRecord, Repository
from cloudfs.source.external.command import Commands
from cloudfs.source.filters import Filters
from cloudfs.store.count import Counts as Requests
from cloudfs.store.open import StoreOptions


class Interrupted(CloudfsError):
    """The user asked the sync to stop."""


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
    verify: float = 0.0  # the share, 0 to 1, of what is called unchanged that is looked at


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
    salt: int = 0  # 64 random bits: what of the unchanged is looked at
    stopped: Callable[[], bool] = lambda: False  # asked between steps: True ends the sync cleanly

    @property
    def state_dir(self) -> Path:
        """Where this machine keeps what it knows of the policy's last sync."""
        return self.repository.local.policy_dir(self.repository.id, self.record.id)

    def check_stop(self, snapshot: int) -> None:
        """Raise Interrupted where the user asked to stop, before this snapshot was made."""
        if self.stopped():
            raise Interrupted(
                f"stopped. Snapshot {snapshot} was not made; what was stored is used by the next"
                " sync."
            )


@dataclass
class Difference:
    """Something that was called unchanged and is not. LINs are 0 where there is none."""

    path: bytes
    what: str  # differs: "data", "attributes"; or "is gone", "is not on record"
    directory: int = 0
    lin: int = 0
    inode: int = 0


@dataclass
class Verified:
    """What was looked at of what was called unchanged: bytes that were read, files, directories."""

    files: int = 0
    bytes: int = 0
    directories: int = 0
    differences: list[Difference] = field(default_factory=list)

    def add(self, other: Verified) -> None:
        """Add what was looked at elsewhere."""
        self.files += other.files
        self.bytes += other.bytes
        self.directories += other.directories
        self.differences.extend(other.differences)


class SyncEvents(Protocol):
    """Told while a sync runs, from one thread."""

    def phase(self, name: str) -> None:
        """A new phase: waiting, opening, scanning, verifying, packing, coalescing,
        committing."""

    def progress(
        self, items_found: int, items_done: int, bytes_found: int, bytes_done: int
    ) -> None:
        """How far it is; ``found`` grows while the tree is walked."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def differs(self, source: str, found: Verified) -> None:
        """What ``source`` calls unchanged is not; the tree is scanned now."""


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
    verified: Verified | None = None  # where that was asked for, and there was a snapshot before
