"""What was touched since a freeze, for readers in other processes that go past the mount.

1. A reader reads an item beneath the mount, and only then asks whether it was touched. What changes
   an item says so here first. So an item that was read and is not touched then was read as it
   stood at the freeze; any other is read again from what is frozen.
2. The answer is a bit by a hash of the inode number. Two items may share one: then an item is read
   again without need.
3. When a directory was moved, every path may lead elsewhere: then all counts as touched.
"""

from __future__ import annotations

import mmap
import os

BITS = 23
_BYTES = 1 << (BITS - 3)
_ALL = _BYTES  # a byte behind the bits
_LENGTH = _BYTES + mmap.PAGESIZE
_FACTOR = 0x9E37_79B9_7F4A_7C15  # Knuth's multiplicative hash: 2^64 by the golden ratio


class Touched:
    """The bits, in memory that is shared through a descriptor."""

    def __init__(self, fd: int | None = None) -> None:
        """With the descriptor of another process's, what that one says."""
        self._owner = fd is None
        if fd is None:
            fd = os.memfd_create("cloudfs-touched")
            os.ftruncate(fd, _LENGTH)
        self.fd = fd
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if self._owner else 0)
        self._bits = mmap.mmap(fd, _LENGTH, prot=protection)

    def add(self, inode: int) -> None:
        """An item is about to change."""
        at = _place(inode)
        self._bits[at >> 3] |= 1 << (at & 7)

    def all(self) -> None:
        """Everything counts as touched."""
        self._bits[_ALL] = 1

    def has(self, inode: int) -> bool:
        """Whether an item may have changed."""
        at = _place(inode)
        return bool(self._bits[at >> 3] >> (at & 7) & 1 or self._bits[_ALL])

    def close(self) -> None:
        """Readers that still look are told that everything was touched."""
        if self._owner:
            self.all()
        self._bits.close()
        os.close(self.fd)


def _place(inode: int) -> int:
    return (inode * _FACTOR & 0xFFFF_FFFF_FFFF_FFFF) >> (64 - BITS)
