"""What a live mount shows: the live tree, what is frozen of it, and its backups.

Each side answers for the inode numbers of a range of its own, in the terms of the kernel; an error
is an OSError or FUSEError, and a number that is no longer known a KeyError. Only the live tree can
be changed.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Protocol

from pyfuse3 import EntryAttributes, FUSEError, ReaddirToken, RequestContext


class Opened:
    """A file or directory that was opened on a side. What it is not good for it refuses."""

    __slots__ = ()

    async def read(self, offset: int, size: int) -> bytes | memoryview:
        """Bytes of a file."""
        raise FUSEError(errno.EISDIR)

    async def write(self, offset: int, data: bytes) -> int:
        """Write to a file; returns how many bytes."""
        raise FUSEError(errno.EROFS)

    async def list(self, start: int, token: ReaddirToken) -> None:
        """The names of a directory from a position on, as many as the kernel has room for."""
        raise FUSEError(errno.ENOTDIR)

    async def flush(self, *, data_only: bool) -> None:
        """Have it lie where it outlives the machine. Of what cannot be changed nothing is dirty."""

    async def close(self) -> None:
        """Let it go."""


class Side(Protocol):
    """One of them."""

    async def lookup(self, parent: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """One name in a directory, counted."""

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """The attributes of an item."""

    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        """Where a symlink points."""

    async def opendir(self, inode: int, ctx: RequestContext) -> Opened:
        """Open a directory."""

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> Opened:
        """Open a file; for reading alone where nothing can be changed."""

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        """One extended attribute."""

    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        """The names of the extended attributes."""

    def forget(self, inode: int, count: int) -> None:
        """The kernel forgot so many times that it was told of an inode."""
