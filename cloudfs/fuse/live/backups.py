"""``.snapshot`` in each directory of a live mount: that directory's backups, to be copied from.

1. In ``.snapshot`` of a directory stands a name for each snapshot that holds the directory, and
   ``latest``. What such a name leads to is an inode of the view of all backups (see
   :mod:`cloudfs.fuse.tree`), whose numbers begin at 2^62 here, and which that view answers for.
2. A directory is found by its path in the newest snapshot that has it. In older ones it is the same
   directory, by LIN, whatever it was called then; where there is none of that LIN, what stood at
   the path.
3. ``.snapshot`` itself and ``latest`` are made up: their numbers begin at 2^61, and have the number
   of the directory in their lower bits.
4. What the rows say may have to be fetched; that is done on other threads.
"""

from __future__ import annotations

import os
import stat as st

import trio
from pyfuse3 import EntryAttributes

from cloudfs.core.errors import UsageError
from cloudfs.core.rows import ROOT_LIN, ItemType
from cloudfs.fuse.inodes import LIN_BITS, ROOT_INO, lin_ino
from cloudfs.fuse.job import MountJob
from cloudfs.fuse.live.answers import attributes_lasting
from cloudfs.fuse.live.inodes import MASK, Inode
from cloudfs.fuse.opening import open_view
from cloudfs.fuse.tree import LATEST, Branch
from cloudfs.fuse.turns import Turns
from cloudfs.repo.view import SnapshotView

NAME = b".snapshot"
MADE_UP = 1 << 61
VIEWED = 1 << 62
_LATEST_BIT = 1 << 48
_FIRST_SLOT = VIEWED >> LIN_BITS
_BRIEFLY_S = 1.0


class Backups:
    """The backups of the tree that is mounted live."""

    def __init__(self, job: MountJob) -> None:
        self.view, self._store = open_view(job, first_slot=_FIRST_SLOT)
        self._tree = self.view.tree
        self._brief = attributes_lasting(_BRIEFLY_S)

    @property
    def _branch(self) -> Branch:
        return self._tree.branches[0]

    def begin(self, nursery: trio.Nursery, turns: Turns) -> None:
        """Be served by this thread, which must never wait for the store."""
        self._store.refuse_here()
        self.view.attach(nursery, turns)

    @staticmethod
    def number(directory: Inode) -> int:
        """The number of ``.snapshot`` in a directory."""
        return MADE_UP | directory.number

    @staticmethod
    def directory(number: int) -> int:
        """The number of the directory that something made up is in."""
        return number & MASK

    @staticmethod
    def is_latest(number: int) -> bool:
        """Whether it is the symlink ``latest``."""
        return bool(number & _LATEST_BIT)

    def attributes(self, number: int, directory: Inode) -> EntryAttributes:
        """What lstat says of something made up in a directory."""
        a = self._brief
        latest = self.is_latest(number)
        a.st_ino = number
        a.st_mode = st.S_IFLNK | 0o777 if latest else st.S_IFDIR | 0o555
        a.st_nlink = 1 if latest else 2
        a.st_uid, a.st_gid, a.st_rdev = 0, 0, 0
        a.st_size = a.st_blocks = 0
        a.st_atime_ns = a.st_mtime_ns = a.st_ctime_ns = self._branch.newest_ns
        return a

    async def names(self, path: bytes) -> list[bytes]:
        """The names in ``.snapshot`` of the directory at a path, with ``latest`` at the end."""
        await self.view.look_for_news(ROOT_INO)
        names = [name for name, _ in await self.view.ask(self._find_all, path)]
        return [*names, LATEST] if names else []

    async def latest(self, path: bytes) -> bytes | None:
        """Where ``latest`` points; None where no snapshot has the directory."""
        names = await self.names(path)
        return names[-2] if names else None

    async def look_up(self, number: int, path: bytes, name: bytes) -> int | None:
        """The inode that a name in ``.snapshot`` of the directory at a path leads to."""
        await self.view.look_for_news(ROOT_INO)
        found = dict(await self.view.ask(self._find_all, path))
        if name == LATEST and found:
            return number | _LATEST_BIT
        return found.get(name)

    def _find_all(self, path: bytes) -> list[tuple[bytes, int]]:
        """Rule 2: names of snapshots, oldest first, and what they lead to. May block."""
        branch = self._branch
        lin = self._newest_lin(path)
        if lin is None:
            return []
        found = []
        for name, number in branch.names.items():
            slot = branch.slots[number]
            there = _directory_in(self._tree.view(slot), lin, path)
            if there is not None:
                found.append((name, lin_ino(slot, there)))
        return found

    def _newest_lin(self, path: bytes) -> int | None:
        branch = self._branch
        for number in reversed(branch.numbers):
            found = _at(self._tree.view(branch.slots[number]), path)
            if found is not None:
                return found
        return None


def _directory_in(view: SnapshotView, lin: int, path: bytes) -> int | None:
    meta = view.meta(lin)
    if meta is not None and meta.type == ItemType.DIRECTORY:
        return lin
    return _at(view, path)


def _at(view: SnapshotView, path: bytes) -> int | None:
    """The LIN of the directory at a path, if there is one."""
    if not path:
        return ROOT_LIN
    try:
        meta = view.resolve(path)
    except UsageError:
        return None  # nothing is there
    return meta.lin if meta.type == ItemType.DIRECTORY else None


def path_below(top: bytes, directory: Inode) -> bytes:
    """Where a directory is now, below the top."""
    path = os.readlink(directory.proc)
    return b"" if path == top else path[len(top.rstrip(b"/")) + 1 :]
