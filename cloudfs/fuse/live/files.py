"""Open files of the live tree, of which there may be more than descriptors.

1. An open file has a descriptor of its own. Where there are too many, those opened longest ago lose
   theirs, but for what is in use; it is opened again, through its item, when something is asked of
   it. (What it was opened for was judged then, by the kernel: root may open everything.)
2. An item stays known while files are open on it (``Inode.opens``), but may be held by its handle
   alone, as others. If its last name is taken away it is held open, so nothing is lost; what is
   removed beneath, past the mount, can be lost to a file that has no descriptor just then (ESTALE).
3. Where the file system has no handles, items keep their descriptors, and open files go by those.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from itertools import islice

from cloudfs.fuse.live.caller import By
from cloudfs.fuse.live.inodes import Inode, Inodes

_AT_ONCE = 256


class OpenFile:
    """An open file of the live tree."""

    __slots__ = ("by", "fd", "flags", "inode", "nowait", "uses")

    def __init__(self, inode: Inode, fd: int, flags: int, by: By) -> None:
        """``flags``: what it can be opened with again."""
        self.inode = inode
        self.fd = fd  # -1: it has none just now
        self.flags = flags
        self.by = by  # who opened it; what is written is written as for this one
        self.nowait = True  # whether the file system can say that a read would have to wait
        self.uses = 0


class OpenFiles:
    """All that are open. For the thread that serves the kernel."""

    def __init__(self, inodes: Inodes, limit: int) -> None:
        """``limit``: how many descriptors items and files may have together."""
        self._inodes = inodes
        self._limit = limit
        self._held: dict[OpenFile, None] = {}  # those that have descriptors, the longest first

    def add(self, inode: Inode, fd: int, flags: int, by: By) -> OpenFile:
        """An item was opened with these flags."""
        opened = OpenFile(inode, fd, flags, by)
        inode.opens += 1
        self._held[opened] = None
        return opened

    def fd(self, opened: OpenFile) -> int:
        """The descriptor of a file, good until anything is awaited. Raises OSError."""
        if opened.fd < 0:
            item = self._inodes.opened(opened.inode)
            opened.fd = os.open(item.proc, opened.flags)
            self._held[opened] = None
        return opened.fd

    @contextlib.contextmanager
    def using(self, opened: OpenFile) -> Iterator[int]:
        """The descriptor of a file, which stays while something is waited for. Raises OSError."""
        fd = self.fd(opened)
        opened.uses += 1
        try:
            yield fd
        finally:
            opened.uses -= 1

    def close(self, opened: OpenFile) -> None:
        """A file is closed."""
        self._let_go(opened)
        opened.inode.opens -= 1
        self._inodes.release(opened.inode)

    def trim(self) -> None:
        """Close descriptors if there are too many. To be called when a question is answered."""
        if len(self._held) > max(_AT_ONCE, self._limit - self._inodes.held):
            for opened in list(islice(self._held, _AT_ONCE)):
                if opened.uses:  # to the end of the line
                    del self._held[opened]
                    self._held[opened] = None
                else:
                    self._let_go(opened)

    def _let_go(self, opened: OpenFile) -> None:
        if opened.fd >= 0:
            del self._held[opened]
            fd, opened.fd = opened.fd, -1
            os.close(fd)
