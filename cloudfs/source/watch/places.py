"""The file systems that a watched tree lies on: that of each source, and those mounted within.

A changelist is believed only while these stay what they were: a source that is another directory
now, or a mount that came or went, changes the tree without an event.
"""

from __future__ import annotations

import contextlib
import os
import stat as st
from typing import NamedTuple

import xxhash

from cloudfs.core.errors import SourceError
from cloudfs.source.filters import Filters, Matcher
from cloudfs.source.inode import StatReader, mount_of
from cloudfs.source.mounts import Mount, mount_at, mounts, seen_within
from cloudfs.source.own import is_view
from cloudfs.source.roots import root_names


class Place(NamedTuple):
    """A file system, or a part of one, that is part of the tree."""

    path: bytes  # where it is reached
    below: bytes  # the same in the backup
    device: int  # as st_dev
    fsid: bytes  # as fanotify tells it
    inside: bytes  # where the place is in that file system
    kind: str  # of the file system
    is_source: bool
    has_births: bool  # whether it keeps times of birth

    def holds(self, inside: bytes) -> bool:
        """Whether what is at a path in this file system is part of the place."""
        return (inside.rstrip(b"/") + b"/").startswith(self.inside.rstrip(b"/") + b"/")


class Point(NamedTuple):
    """A mount point that every sync looks at, for nothing is told of it: that of a file, or of a
    file system that is left out, of which the mount point itself belongs to the backup."""

    directory: bytes  # that it is in, as in the backup
    inode: int  # of that directory
    name: bytes


class Places(NamedTuple):
    """All of them, and a digest by which another layout is noticed."""

    found: list[Place]
    points: list[Point]
    token: str


def places_of(sources: list[bytes], filters: Filters) -> Places:
    """Where a tree lies now. Raises SourceError."""
    names = root_names(sources) if len(sources) > 1 else [b""]
    layout = _Layout(filters)
    with contextlib.ExitStack() as opened:
        fds = []
        for source in sources:
            fds.append(_open(source))
            opened.callback(os.close, fds[-1])
        all_mounts = mounts()  # now: a source may have been mounted by opening it (autofs)
        for source, name, fd in zip(sources, names, fds, strict=True):
            try:
                layout.add_source(source, name, fd, all_mounts)
            except OSError as error:
                raise _cannot(source, error) from None
    return Places(layout.found, layout.points, layout.digest.hexdigest())


class _Layout:
    """Collects what there is."""

    def __init__(self, filters: Filters) -> None:
        self.found: list[Place] = []
        self.points: list[Point] = []
        self.digest = xxhash.xxh3_128()
        self._one_file_system = filters.one_file_system
        self._matcher = Matcher(filters.excludes) if filters.excludes else None

    def add_source(self, source: bytes, name: bytes, fd: int, all_mounts: list[Mount]) -> None:
        """Add a source that is open, and what is mounted within it. Raises SourceError."""
        top = os.readlink(b"/proc/self/fd/%d" % fd)
        status = StatReader().of(fd)
        self.digest.update(b"%d %d %d\0" % (status.dev, status.ino, status.btime_ns) + top)
        own = _mount_of(source, fd, all_mounts)
        inside = own.top.rstrip(b"/") + top.removeprefix(own.place.rstrip(b"/"))
        births = bool(status.btime_ns)
        self.found.append(Place(top, name, own.device, _fsid(fd), inside, own.kind, True, births))
        for mount in seen_within(top, own.number, all_mounts):
            below = mount.place[len(top.rstrip(b"/")) + 1 :]
            self._add_mount(mount, name, below, status.dev)

    def _add_mount(self, mount: Mount, name: bytes, below: bytes, source_dev: int) -> None:
        """Add what is mounted below a source, whose name in the backup is given.

        Also what is left out as another file system counts: what its mount point hides is seen when
        it goes.
        """
        try:
            above = os.stat(os.path.dirname(mount.place))
            if self._one_file_system and above.st_dev != source_dev:
                return  # it is mounted within what is left out
            # A view is not asked: it may have a server that does not answer.
            status = None if is_view(mount) else os.stat(mount.place)
        except OSError:
            return  # each sync looks again, and reports it
        is_dir = status is None or st.S_ISDIR(status.st_mode)
        if self._matcher is not None and self._matcher.excludes(below, is_dir):
            return
        number = _number(mount)
        self.digest.update(b"%d %d %s\0" % (mount.device, number, mount.top) + mount.place)
        path = name + b"/" + below if name else below
        if status is None:
            return
        if is_dir and not (self._one_file_system and status.st_dev != source_dev):
            self.found.append(_place(mount, path))
            return
        directory, _, own_name = path.rpartition(b"/")
        self.points.append(Point(directory, above.st_ino, own_name))


def _number(mount: Mount) -> int:
    """One that no later mount gets, if the kernel gives such: the listed ones are given again."""
    fd = os.open(mount.place, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return mount_of(fd) or mount.number
    finally:
        os.close(fd)


def _open(path: bytes) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _cannot(path, error) from None


def _place(mount: Mount, below: bytes) -> Place:
    try:
        fd = os.open(mount.place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fsid, births = _fsid(fd), bool(StatReader().of(fd).btime_ns)
        finally:
            os.close(fd)
    except OSError as error:
        raise SourceError(
            f"what is mounted at {os.fsdecode(mount.place)} cannot be opened"
            f" ({(error.strerror or '').lower()}); --exclude leaves it out."
        ) from None
    return Place(mount.place, below, mount.device, fsid, mount.top, mount.kind, False, births)


def _cannot(path: bytes, error: OSError) -> SourceError:
    return SourceError(f"{os.fsdecode(path)}: {(error.strerror or '').lower()}.")


def _fsid(fd: int) -> bytes:
    return os.fstatvfs(fd).f_fsid.to_bytes(8, "little")


def _mount_of(source: bytes, fd: int, all_mounts: list[Mount]) -> Mount:
    found = mount_at(fd, all_mounts)
    if found is None:
        shown = os.fsdecode(source)
        raise SourceError(f"the mount that {shown} is on is not listed, as in a chroot.")
    return found
