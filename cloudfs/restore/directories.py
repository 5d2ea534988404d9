"""Directories below the target, opened one component at a time.

Each directory is opened relative to its parent's descriptor, without following symlinks, so no
path is too long and nothing that lies below the target leads out of it. Some descriptors are kept.
"""

from __future__ import annotations

import os
from collections import OrderedDict

from cloudfs.core.errors import CloudfsError

KEPT = 128
_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

Names = dict[int, tuple[int, bytes]]
"""(parent, name) of directories by their index; the target itself, 0, is not among them."""


class Directories:
    """Descriptors of directories by index. For one thread."""

    def __init__(self, target: bytes, identity: tuple[int, int]) -> None:
        """Opens the target, which must be the directory with this device and inode."""
        self._names: Names = {}
        self._kept: OrderedDict[int, int] = OrderedDict()
        self._target = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        status = os.fstat(self._target)
        if (status.st_dev, status.st_ino) != identity:
            os.close(self._target)
            raise CloudfsError(
                f"{os.fsdecode(target)} was replaced by another directory during the restore."
                " Restore again, into a directory that nobody else touches."
            )

    def use(self, names: Names) -> None:
        """Say what the indexes mean from now on; those known before keep their meaning."""
        self._names = names

    def open(self, index: int) -> int:
        """The descriptor of a directory, good until the next call. Raises OSError."""
        if index == 0:
            return self._target
        fd = self._kept.get(index)
        if fd is not None:
            self._kept.move_to_end(index)
            return fd
        chain = []
        while index != 0 and index not in self._kept:
            chain.append(index)
            index = self._names[index][0]
        fd = self._target if index == 0 else self._kept[index]
        for deeper in reversed(chain):
            fd = os.open(self._names[deeper][1], _FLAGS, dir_fd=fd)
            self._kept[deeper] = fd
            if len(self._kept) > KEPT:
                os.close(self._kept.popitem(last=False)[1])
        return fd

    def close(self) -> None:
        """Close all."""
        for fd in self._kept.values():
            os.close(fd)
        self._kept.clear()
        os.close(self._target)
