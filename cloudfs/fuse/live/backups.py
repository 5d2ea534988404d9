"""``.snapshot`` in each directory of a live mount: that directory's backups, to be copied from.

1. In ``.snapshot`` of a directory stands a name for each snapshot that holds the directory, and
   ``latest``. What such a name leads to is an inode of the view of all backups (see
   :mod:`cloudfs.fuse.tree`), whose numbers begin at 2^62 here, and which that view answers for.
2. A directory is found by its path in the newest snapshot that has it. In older ones it is the same
   directory, by LIN, whatever it was called then; where there is none of that LIN, what stood at
   the path.
3. Who asks is shown what he could have walked to in that snapshot (:mod:`.reach`), and is asked
   anew each time. Rights that a file gave to whoever ran it, and devices, are not shown: they would
   be there again after they were taken away.
4. ``.snapshot`` itself and ``latest`` are made up: their numbers begin at 2^61, and have the number
   of the directory in their lower bits.
5. What the rows say may have to be fetched; that is done on other threads.
"""

from __future__ import annotations

import errno
import stat as st
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FUSEError, ReaddirToken, RequestContext

from cloudfs.core.errors import UsageError
from cloudfs.core.rows import ROOT_LIN, ItemType
from cloudfs.fuse.inodes import LIN_BITS, ROOT_INO, lin_ino
from cloudfs.fuse.job import MountJob
from cloudfs.fuse.live.answers import attributes_lasting, fill
from cloudfs.fuse.live.inodes import MASK, Inode, Inodes
from cloudfs.fuse.live.reach import groups_of, may_reach
from cloudfs.fuse.live.sides import Opened
from cloudfs.fuse.opening import open_view
from cloudfs.fuse.tree import LATEST, Branch
from cloudfs.fuse.turns import Turns
from cloudfs.fuse.view import View
from cloudfs.repo.view import SnapshotView
from cloudfs.source.own import MADE_UP
from cloudfs.source.whereabouts import path_below

VIEWED = 1 << 62
_LATEST_BIT = 1 << 48
_FIRST_SLOT = VIEWED >> LIN_BITS
_BRIEFLY_S = 1.0
_RETRY_S = 10.0  # meanwhile reads of the tree itself may have to wait


class Backups:
    """The backups of the tree that is mounted live."""

    def __init__(self, job: MountJob, inodes: Inodes, top: bytes) -> None:
        """``top`` is the path of the live tree, whose inodes these are."""
        self._inodes = inodes
        self._top = top
        self.view, self._store = open_view(job, first_slot=_FIRST_SLOT, retry_s=_RETRY_S)
        self.view.shows_rights = False
        self._tree = self.view.tree
        self._brief = attributes_lasting(_BRIEFLY_S)
        self._once = attributes_lasting(0)

    @property
    def _branch(self) -> Branch:
        return self._tree.branches[0]

    def begin(self, nursery: trio.Nursery, turns: Turns) -> None:
        """Be served by this thread, which must never wait for the store."""
        self._store.refuse_here()
        self.view.attach(nursery, turns)

    def enter(self, directory: Inode) -> EntryAttributes:
        """``.snapshot`` in a directory."""
        return self._attributes(MADE_UP | directory.number)

    def _attributes(self, number: int) -> EntryAttributes:
        """What lstat says of something made up."""
        a = self._brief
        latest = bool(number & _LATEST_BIT)
        a.st_ino = number
        a.st_mode = st.S_IFLNK | 0o777 if latest else st.S_IFDIR | 0o555
        a.st_nlink = 1 if latest else 2
        a.st_uid, a.st_gid, a.st_rdev = 0, 0, 0
        a.st_size = a.st_blocks = 0
        a.st_atime_ns = a.st_mtime_ns = a.st_ctime_ns = self._branch.newest_ns
        return a

    def path(self, number: int) -> bytes:
        """Where the directory is now that something made up is in, below the top."""
        found = path_below(self._top, self._inodes.get(number & MASK).fd)
        if found is None:
            raise FUSEError(errno.ENOENT)
        return found

    async def names(
        self, number: int, ctx: RequestContext, name: bytes | None = None, most: int | None = None
    ) -> list[tuple[bytes, int]]:
        """The names in the ``.snapshot`` of this number, newest first, and the inodes that they
        lead to: this one, so many, or all."""
        await self.view.look_for_news(ROOT_INO)
        path, groups = self.path(number), groups_of(ctx)
        return await self.view.ask(self._find, path, ctx.uid, groups, name, most)

    async def named(self, number: int, ctx: RequestContext) -> EntryAttributes:
        """The attributes of what a name leads to, for this question alone: see rule 3."""
        return fill(self._once, number, await self.view.getattr(number, ctx))

    # -- see Side ------------------------------------------------------------------------------

    async def lookup(self, parent: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        if parent >= VIEWED:
            return await self.view.lookup(parent, name, ctx)
        is_latest = name == LATEST
        found = await self.names(parent, ctx, None if is_latest else name, most=1)
        if not found:
            raise FUSEError(errno.ENOENT)
        if is_latest:
            return self._attributes(parent | _LATEST_BIT)
        return await self.named(found[0][1], ctx)

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        if inode >= VIEWED:
            return await self.view.getattr(inode, ctx)
        return self._attributes(inode)

    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        if inode >= VIEWED:
            return await self.view.readlink(inode, ctx)
        found = await self.names(inode, ctx, most=1)
        if not found:
            raise FUSEError(errno.ENOENT)
        return found[0][0]

    async def opendir(self, inode: int, ctx: RequestContext) -> Opened:
        if inode >= VIEWED:
            return ViewedItem(self.view, await self.view.opendir(inode, ctx), is_dir=True)
        found = await self.names(inode, ctx)
        return SnapshotNames(self, inode, found[::-1])

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> ViewedItem:
        opened = await self.view.open(inode, flags, ctx)
        return ViewedItem(self.view, opened.fh, is_dir=False)

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        if inode >= VIEWED:
            return await self.view.getxattr(inode, name, ctx)
        raise FUSEError(pyfuse3.ENOATTR)

    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        return await self.view.listxattr(inode, ctx) if inode >= VIEWED else []

    def forget(self, inode: int, count: int) -> None:
        """Nothing is kept for what was looked up."""

    # -- finding -------------------------------------------------------------------------------

    def _find(
        self,
        path: bytes,
        uid: int,
        groups: Collection[int],
        name: bytes | None,
        most: int | None,
    ) -> list[tuple[bytes, int]]:
        """Rules 2 and 3; see :meth:`names`. May block."""
        lin = self._newest_lin(path)
        if lin is None:
            return []
        known = self._branch.names
        wanted = reversed(known) if name is None else [name] if name in known else []
        found = ((each, self._inode(known[each], lin, path, uid, groups)) for each in wanted)
        return list(islice(((each, inode) for each, inode in found if inode is not None), most))

    def _inode(
        self, number: int, lin: int, path: bytes, uid: int, groups: Collection[int]
    ) -> int | None:
        """What a directory is in one snapshot; None where it is not, or is not to be shown."""
        slot = self._branch.slots[number]
        view = self._tree.view(slot)
        there = _directory_in(view, lin, path)
        if there is None or not may_reach(view, there, uid, groups):
            return None
        return lin_ino(slot, there)

    def _newest_lin(self, path: bytes) -> int | None:
        branch = self._branch
        for number in reversed(branch.numbers):
            found = _at(self._tree.view(branch.slots[number]), path)
            if found is not None:
                return found
        return None


@dataclass(slots=True)
class ViewedItem(Opened):
    """What the view of the backups has open, under a handle of its own. See :class:`Opened`."""

    view: View
    fh: int
    is_dir: bool

    async def read(self, offset: int, size: int) -> bytes | memoryview:
        return await self.view.read(self.fh, offset, size)

    async def list(self, start: int, token: ReaddirToken) -> None:
        await self.view.readdir(self.fh, start, token)

    async def close(self) -> None:
        await (self.view.releasedir if self.is_dir else self.view.release)(self.fh)


@dataclass(slots=True)
class SnapshotNames(Opened):
    """``.snapshot``, opened. See :class:`Opened`."""

    backups: Backups
    number: int
    found: list[tuple[bytes, int]]

    async def list(self, start: int, token: ReaddirToken) -> None:
        latest = [(LATEST, self.number | _LATEST_BIT)] if self.found else []
        entries = [*self.found, *latest]
        ctx = RequestContext()
        for position in range(start, len(entries)):
            name, number = entries[position]
            if number >= VIEWED:
                attributes = await self.backups.named(number, ctx)
            else:
                attributes = await self.backups.getattr(number, ctx)
            if not pyfuse3.readdir_reply(token, name, attributes, position + 1):
                return


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
