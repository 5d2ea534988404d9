"""The manifest: which segments and snapshots are in force. Committing one makes a snapshot exist.

1. Manifests of a policy are numbered upwards from 1; the next one is written only if absent, so
   of two writers that built on the same manifest exactly one succeeds.
2. ``epoch`` is the lease under which it was written. A writer that takes a stale lease over first
   commits the same content under its own epoch, so whatever the old holder still commits fails.
3. ``runs`` are ordered oldest first. A run is one sorted sequence of rows, cut into segments that
   do not overlap; the snapshots that two runs speak of do not overlap either, so the newest run
   that has a row of a key at or before S has the row in force at S.
"""

from __future__ import annotations

import msgspec

from cloudfs.core.rows import FIRST_FREE_LIN, Key


class KeyRange(msgspec.Struct, array_like=True, frozen=True):
    """The first and the last key of one table in one segment."""

    first: Key
    last: Key


class SegmentRef(msgspec.Struct, array_like=True, frozen=True):
    """One segment: 16 random bytes of name, sizes in bytes, and per table the keys it spans."""

    name: bytes
    size: int
    tail_size: int  # the sealed footer with what follows it: one read from the end brings it
    tables: dict[int, KeyRange]


class Run(msgspec.Struct, array_like=True, frozen=True):
    """One sorted run of rows of the snapshots ``first_snap`` to ``last_snap``."""

    first_snap: int
    last_snap: int
    segments: list[SegmentRef]

    @property
    def size(self) -> int:
        """Stored bytes."""
        return sum(segment.size for segment in self.segments)


class Retired(msgspec.Struct, array_like=True, frozen=True):
    """A segment that a merge replaced, kept for readers that still hold an older manifest."""

    name: bytes
    time_ns: int


class SnapshotStats(msgspec.Struct, frozen=True):
    """What a snapshot holds and what it cost. Counts of items, sizes in bytes."""

    files: int = 0
    dirs: int = 0
    symlinks: int = 0
    others: int = 0
    bytes_total: int = 0
    new: int = 0
    changed: int = 0
    moved: int = 0
    deleted: int = 0
    unreadable: int = 0
    bytes_read: int = 0
    bytes_stored: int = 0
    packs: int = 0
    requests: int = 0
    duration_ns: int = 0


class SnapshotRecord(msgspec.Struct, frozen=True):
    """One snapshot. ``consistent`` says whether it is one point in time of the tree."""

    number: int
    time_ns: int
    source: str
    consistent: bool
    host: str
    tags: list[str]
    stats: SnapshotStats


class Manifest(msgspec.Struct, frozen=True):
    """What is in force for one policy."""

    number: int = 0
    epoch: int = 0
    next_lin: int = FIRST_FREE_LIN
    runs: list[Run] = []
    snapshots: list[SnapshotRecord] = []
    retired: list[Retired] = []

    @property
    def last_snapshot(self) -> SnapshotRecord | None:
        """The newest snapshot."""
        return self.snapshots[-1] if self.snapshots else None


EMPTY = Manifest()


def runs_to_merge(sizes: list[int], *, fan: int = 4) -> int:
    """How many of the newest runs to merge, given the sizes in bytes of all runs, oldest first.

    Up to ``fan`` runs are left alone. Beyond that the newest ones are merged, and with them every
    older one that is not more than ``fan`` times as large as all that follow it. So the number of
    runs stays below ``fan`` plus the logarithm of the size of the tables to the base of ``fan``,
    and a row is rewritten about once for each factor of ``fan`` by which its run grows.
    Returns 0 when there is nothing to merge.
    """
    if len(sizes) <= fan:
        return 0
    total = sizes[-1]
    merge = 1
    for size in reversed(sizes[:-1]):
        if size > fan * total and merge > 1:
            break
        total += size
        merge += 1
    return merge
