"""From file handles to the directories of the tree as they are now."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import NamedTuple

from cloudfs.core.changelist import Changelist, DirChange
from cloudfs.core.errors import SourceError
from cloudfs.db.watched import Place
from cloudfs.source.handles import open_handle
from cloudfs.source.inode import open_directory
from cloudfs.source.mounts import overlap
from cloudfs.source.watch.places import Place as Part
from cloudfs.source.whereabouts import path_below

TRIES = 5
DISK_FAILS = (errno.EIO, errno.EUCLEAN, errno.EBADMSG)
"""By the last two, file systems tell of what is damaged."""


class _Found(NamedTuple):
    below: bytes | None  # its path below the place; None: it is elsewhere
    inode: int
    inode_above: int  # of the directory that it is in


class Resolver:
    """Finds where the directories behind handles are, and collects what changed in each."""

    def __init__(self, parts: list[Part]) -> None:
        """``parts`` are the places that make the tree. Raises SourceError."""
        self._parts = parts
        self._fds: list[int] = []
        self._dirs: dict[tuple[bytes, int], DirChange] = {}
        self._inodes: set[int] = set()
        self._elsewhere: set[int] = set()
        try:
            for part in parts:
                self._fds.append(os.open(part.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        except OSError as error:
            self.close()
            raise SourceError(f"{os.fsdecode(part.path)}: {error.strerror}") from None

    def close(self) -> None:
        """Close the places."""
        for fd in self._fds:
            os.close(fd)
        self._fds = []

    def directory(self, place: Place, names: set[bytes]) -> None:
        """Names in a directory changed; b"." is the directory itself. Raises SourceError."""
        fsid, handle = place
        found: list[tuple[Part, _Found]] = []
        for top, part in zip(self._fds, self._parts, strict=True):
            fd = _opened(top, part, handle) if part.fsid == fsid else None
            if fd is None:
                continue
            try:
                self._add_linked(fd, names)
                at = self._find(top, part, fd)
            finally:
                os.close(fd)
            if at is not None:
                found.append((part, at))
        self._add_all(found, names)

    def _add_all(self, found: list[tuple[Part, _Found]], names: set[bytes]) -> None:
        """Note where a directory is, in those places that are on its file system.

        Where it was found in one, it is looked for in another one only if that holds it too: then
        it was moved before it was looked for there.
        """
        there = [os.path.join(p.inside, at.below) for p, at in found if at.below is not None]
        for part, at in found:
            if at.below is not None:
                self._add(part, at, names)
            elif not there or any(map(part.holds, there)):
                self._elsewhere.add(at.inode)

    def _add_linked(self, fd: int, names: set[bytes]) -> None:
        """Files of several names change under all of them, and are told of under one: which may be
        elsewhere, or left out of the backup."""
        for name in names:
            with contextlib.suppress(OSError):  # it is gone: that was told by handle
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
                    self._inodes.add(status.st_ino)

    def _find(self, top: int, part: Part, fd: int) -> _Found | None:
        """Where an open directory is; None where it is gone. Raises SourceError."""
        try:
            for _ in range(TRIES):  # it may be moved between any two of these steps
                here = os.fstat(fd)
                below = path_below(part.path, fd)
                if here.st_nlink == 0:
                    return None
                if below is None:
                    break
                there = _identity(top, below)
                if there == (here.st_dev, here.st_ino):
                    return _Found(below, here.st_ino, os.stat(b"..", dir_fd=fd).st_ino)
                if there is not None and there[0] != here.st_dev:
                    break
            # Or something is mounted over it, or above it, or it is moved all the time.
            return _Found(None, here.st_ino, 0)
        except OSError as error:
            raise _cannot(part, error) from None

    def _add(self, part: Part, found: _Found, names: set[bytes]) -> None:
        """Note the names, and the directory's own name, for its times change with them."""
        path = b"/".join(filter(None, (part.below, found.below)))
        named = names - {b"."}
        if named:
            self._change(path, found.inode).names.update(named)
        if found.below or not part.is_source:
            above, _, own = path.rpartition(b"/")
            self._change(above, found.inode_above).names.add(own)

    def _change(self, path: bytes, inode: int) -> DirChange:
        # One may have come to where another was a moment ago.
        return self._dirs.setdefault((path, inode), DirChange(path, None, inode=inode))

    def item(self, place: Place) -> None:
        """A file of which no name is known changed. Raises SourceError."""
        fsid, handle = place
        for fd, part in zip(self._fds, self._parts, strict=True):
            if part.fsid == fsid:
                opened = _opened(fd, part, handle)
                if opened is not None:
                    self._inodes.add(os.fstat(opened).st_ino)
                    os.close(opened)

    def changelist(self) -> Changelist:
        """All that was collected."""
        return Changelist(
            sorted(self._dirs.values(), key=lambda change: change.path),
            dict.fromkeys(self._inodes),
            reread=True,
            elsewhere=self._elsewhere,
            tops=_sides(self._parts),
        )


def _sides(parts: list[Part]) -> dict[bytes, int]:
    """By the path of each part, a number that it shares with those of its file system, as long as
    none of them shows what another one does."""
    found: dict[bytes, int] = {}
    for number, part in enumerate(parts):
        beside = [at for at, other in enumerate(parts) if other.device == part.device]
        shown = any(at != number and overlap(part.inside, parts[at].inside) for at in beside)
        found[part.below] = number if shown else min(beside)
    return found


def _opened(top: int, part: Part, handle: bytes) -> int | None:
    """What a handle names; None where it is gone. Raises SourceError."""
    try:
        return open_handle(top, handle)
    except OSError as error:
        if error.errno == errno.ESTALE:
            return None
        raise _cannot(part, error) from None


def _cannot(part: Part, error: OSError) -> SourceError:
    return SourceError(f"{os.fsdecode(part.path)}: {(error.strerror or '').lower()}")


def _identity(top: int, below: bytes) -> tuple[int, int] | None:
    """Device and inode number of the directory that is at a path, also of one that cannot be read;
    None where there is none. Raises OSError where a disk fails, so that this is not known."""
    try:
        fd = open_directory(top, below, os.O_PATH)
        try:
            status = os.fstat(fd)
        finally:
            os.close(fd)
    except OSError as error:  # also of a server, if what is mounted there has one
        if error.errno in DISK_FAILS:
            raise
        return None
    return status.st_dev, status.st_ino
