"""What a change source hands to a sync: where to read, and what changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cloudfs.core.changelist import Changelist
from cloudfs.core.manifest import SnapshotRecord
from cloudfs.source.live.beneath import BeneathPlaces


@dataclass
class Ready:
    """A tree that is ready to be read.

    ``at`` says where each source is read (a snapshot, or the source itself), ``nested`` where what
    another file system's snapshot leaves out is read, by path below the root. Without ``changes``
    the sync scans. ``frozen_ns`` is when the tree stood still; None: it may change meanwhile.
    """

    kind: str
    at: list[bytes]
    nested: dict[bytes, bytes] = field(default_factory=dict)
    changes: Changelist | None = None
    frozen_ns: int | None = None
    through_mount: bool = False  # it is read through what a live mount holds frozen
    beneath: BeneathPlaces | None = None  # where it is read if nobody has touched it since
    consistent: bool = True  # where it stood still: whether all of it did, till the end
    stable_inodes: bool = False  # an inode number is never given twice, in all of the tree
    notes: list[str] = field(default_factory=list)
    # What changed since the source looked, where the tree did not stand still; None: not known.
    changed_since: Callable[[], Changelist | None] = lambda: None
    # Called when all is read, before the commit. Raises SourceError where not all of it was what
    # stood still.
    intact: Callable[[], None] = lambda: None
    # Called after the commit, with the snapshot that holds the tree as it is here.
    keep: Callable[[SnapshotRecord], None] = lambda record: None


def scanned(sources: list[bytes], notes: list[str] | None = None) -> Ready:
    """The sources themselves, to be scanned."""
    return Ready("scan", sources, notes=notes or [])
