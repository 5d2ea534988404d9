"""The file systems that a watched tree lies on: that of each source, and those mounted within.

A changelist is believed only while these stay what they were: a source that is another directory
now, or a mount that came or went, changes the tree without an event.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import NamedTuple

import xxhash

from cloudfs.core.errors import SourceError
from cloudfs.source.inode import StatReader
from cloudfs.source.mounts import Mount, mounts, within
from cloudfs.source.own import is_view
from cloudfs.source.roots import root_names

LeavesOut = Callable[[bytes], bool]
"""Whether a directory of another file system, by its path below its source, is left out."""


class Place(NamedTuple):
    """A file system, or a part of one, that is part of the tree."""

    path: bytes  # where it is reached
    below: bytes  # the same in the backup
    device: int  # as st_dev
    fsid: bytes  # as fanotify tells it
    kind: str  # of the file system
    is_source: bool


class Places(NamedTuple):
    """All of them, and a digest by which another layout is noticed."""

    found: list[Place]
    token: str


def places_of(sources: list[bytes], leaves_out: LeavesOut) -> Places:
    """Where a tree lies now. Raises SourceError."""
    names = root_names(sources) if len(sources) > 1 else [b""]
    found: list[Place] = []
    digest = xxhash.xxh3_128()
    with contextlib.ExitStack() as opened:
        fds = [_open(source) for source in sources]
        for fd in fds:
            opened.callback(os.close, fd)
        all_mounts = mounts()  # now: a source may have been mounted by opening it (autofs)
        for source, name, fd in zip(sources, names, fds, strict=True):
            top = os.readlink(b"/proc/self/fd/%d" % fd)
            status = StatReader().of(fd)
            digest.update(b"%d %d %d\0" % (status.dev, status.ino, status.btime_ns) + top)
            own = _mount_of(source, fd, all_mounts)
            found.append(Place(top, name, own.device, _fsid(fd), own.kind, True))
            for mount in within(top, all_mounts):
                view = is_view(mount)  # which may have a server that does not answer
                if not view and not os.path.isdir(mount.place):
                    continue
                below = mount.place[len(top.rstrip(b"/")) + 1 :]
                if leaves_out(below):
                    continue
                digest.update(b"%d %d %s\0" % (mount.device, mount.number, mount.top) + mount.place)
                if not view:
                    found.append(_place(mount, name + b"/" + below if name else below))
    return Places(found, digest.hexdigest())


def _open(path: bytes) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _cannot(path, error) from None


def _place(mount: Mount, below: bytes) -> Place:
    fd = _open(mount.place)
    try:
        return Place(mount.place, below, mount.device, _fsid(fd), mount.kind, False)
    except OSError as error:
        raise _cannot(mount.place, error) from None
    finally:
        os.close(fd)


def _cannot(path: bytes, error: OSError) -> SourceError:
    return SourceError(f"{os.fsdecode(path)}: {(error.strerror or '').lower()}.")


def _fsid(fd: int) -> bytes:
    return os.fstatvfs(fd).f_fsid.to_bytes(8, "little")


def _mount_of(source: bytes, fd: int, all_mounts: list[Mount]) -> Mount:
    with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
        number = next(int(line.split()[1]) for line in file if line.startswith(b"mnt_id:"))
    for mount in all_mounts:
        if mount.number == number:
            return mount
    # Only mounts that the root directory leads to are listed, and not the one that it lies within.
    raise SourceError(f"the mount that {os.fsdecode(source)} is on is not listed, as in a chroot.")
