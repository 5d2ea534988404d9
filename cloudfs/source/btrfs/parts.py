"""Which subvolumes a source is made of, and what else is mounted in it.

Those within its own, and those of its file system that are mounted there, as /home often is in /,
can be snapshotted with it. What else is mounted there is in no snapshot of it.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import NamedTuple

from cloudfs.core.errors import SourceError
from cloudfs.source.btrfs import subvolume
from cloudfs.source.mounts import mount_at, mounts, seen_within, within
from cloudfs.source.own import is_live, is_view


class Parts(NamedTuple):
    """Paths below a source."""

    subvolumes: list[bytes]  # in it, each before those within it
    others: list[bytes]  # where something else is mounted


def parts_of(source: bytes) -> Parts:
    """What a source holds now. Raises SourceError."""
    device, mounted = _mounted_in(source)
    tops = {b""}
    found = Parts([], [])
    for at in sorted({b"", *mounted}):
        place = os.path.join(source, at) if at else source
        if at:
            if innermost(os.path.dirname(at), {b"", *mounted}) not in tops:
                continue  # it is within what is none
            if mounted[at] != device or not subvolume.is_subvolume(place):
                found.others.append(at)
                continue
            tops.add(at)
            found.subvolumes.append(at)
        below = (at + b"/" + path if at else path for path in subvolume.below(place))
        # What lies beneath a mount is not to be seen.
        found.subvolumes.extend(p for p in below if innermost(p, {b"", *mounted}) == at)
    return found


def _mounted_in(source: bytes) -> tuple[int | None, dict[bytes, int]]:
    """The device of a source (None where its mount is not to be seen, as in a chroot), and those of
    what is mounted in it, by path below; as the list of mounts has them, where all subvolumes of a
    file system have the same. Without the mounts of cloudfs itself: what they show is in the
    snapshot, or is backups."""
    try:
        fd = os.open(source, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError(f"{os.fsdecode(source)}: {error.strerror}.") from None
    try:
        top, seen = os.readlink(b"/proc/self/fd/%d" % fd), mounts()
        own = mount_at(fd, seen)
    finally:
        os.close(fd)
    prefix = top.rstrip(b"/") + b"/"
    found = within(top, seen) if own is None else seen_within(top, own.number, seen)
    below = [mount for mount in found if not (is_view(mount) or is_live(mount))]
    device = own.device if own is not None else None
    return device, {mount.place.removeprefix(prefix): mount.device for mount in below}


def innermost(path: bytes, places: Collection[bytes]) -> bytes:
    """The longest of ``places``, of which b"" is one, that a path is at or below."""
    while path not in places:
        path = path.rpartition(b"/")[0]
    return path
