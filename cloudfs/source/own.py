"""The mounts of cloudfs itself. What shows backups is not backed up: each backup would hold all
those before it.

1. The view of backups, mounted within a tree, counts as an empty directory. A source that lies in
   such a view is backed up like any other.
2. A live mount within a tree is read through like any other file system, but for the backups that
   it shows at its top.
"""

from __future__ import annotations

from typing import NamedTuple

from cloudfs.source.mounts import Mount, mounts

SUBTYPE = "cloudfs"
LIVE_SUBTYPE = "cloudfs-live"
"""As the kernel lists them, after "fuse."."""

SNAPSHOTS = b".snapshot"
"""In each directory of a live mount: that directory's backups. Listed at the top only."""

MADE_UP = 1 << 61
"""From here on are the inode numbers of a live mount for what it shows of backups."""


class OwnMounts(NamedTuple):
    """Their devices, as st_dev."""

    views: frozenset[int]
    live: frozenset[int]


def own_mounts() -> OwnMounts:
    """Those that this process sees now."""
    found = mounts()
    views = frozenset(mount.device for mount in found if is_view(mount))
    live = frozenset(mount.device for mount in found if is_live(mount))
    return OwnMounts(views, live)


def shows_backups(name: bytes, inode: int) -> bool:
    """Whether an entry of a directory on a live mount is how that shows backups."""
    return name == SNAPSHOTS and inode >= MADE_UP


def is_view(mount: Mount) -> bool:
    """Whether a mount is a view of backups."""
    return mount.kind == f"fuse.{SUBTYPE}"


def is_live(mount: Mount) -> bool:
    """Whether a mount is a live one."""
    return mount.kind == f"fuse.{LIVE_SUBTYPE}"
