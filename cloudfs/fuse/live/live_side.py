"""The live tree, as the kernel sees it: what is asked of items, and open files.

What is changed by name or number is changed by the handlers themselves (:mod:`.operations`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

import pyfuse3
from pyfuse3 import EntryAttributes, FUSEError, RequestContext

from cloudfs.fuse.attributes import CAPABILITY
from cloudfs.fuse.live.answers import attributes_lasting, fill
from cloudfs.fuse.live.backups import Backups
from cloudfs.fuse.live.caller import By
from cloudfs.fuse.live.files import OpenFile
from cloudfs.fuse.live.frozen_side import FrozenSide
from cloudfs.fuse.live.inodes import ROOT, Inode
from cloudfs.fuse.live.keeping import Keeper
from cloudfs.fuse.live.listing import LiveNames
from cloudfs.fuse.live.sides import Opened
from cloudfs.fuse.live.tree import LiveTree
from cloudfs.fuse.turns import Turns
from cloudfs.source.live.protocol import FROZEN_PREFIX
from cloudfs.source.own import SNAPSHOTS

LIVE_S = 10.0
"""How long the kernel believes what it was told of the live tree. It learns at once of what it
changes itself; this is for what others change beneath."""

ABSENT_S = 1.0
READ_BYTES = 1 << 20
TRUSTED = b"trusted."


class LiveSide:
    """Answers from the tree beneath. See :class:`Side`; what leads to the others is found here."""

    def __init__(
        self, tree: LiveTree, frozen: FrozenSide, backups: Backups | None, turns: Turns
    ) -> None:
        self.tree = tree
        self.turns = turns
        self.keeper = Keeper(tree, turns)
        self._inodes = tree.inodes
        self._frozen = frozen
        self._backups = backups
        self._lasting = attributes_lasting(LIVE_S)
        self._absent = attributes_lasting(ABSENT_S)
        self._absent.st_ino = 0
        self.buffer = memoryview(bytearray(READ_BYTES))

    def known(self, inode: Inode, status: os.stat_result) -> EntryAttributes:
        """The attributes of an item, of which the kernel is told."""
        inode.lookups += 1
        return fill(self._lasting, inode.number, status)

    def attributes(self, inode: Inode, status: os.stat_result) -> EntryAttributes:
        """Those of an item that it knows."""
        return fill(self._lasting, inode.shown, status)

    async def lookup(self, parent: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        above = self._inodes.get(parent)
        try:
            return self.known(*self._inodes.look_up(above, name))
        except FileNotFoundError:
            if name == SNAPSHOTS and self._backups is not None:
                return self._backups.enter(above)
            if parent == ROOT and name.startswith(FROZEN_PREFIX):
                return self._frozen.enter(name, ctx)
            return self._absent

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        item = self._inodes.get(inode)
        return self.attributes(item, os.fstat(item.fd))

    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return os.readlink(b"", dir_fd=self._inodes.get(inode).fd)

    async def opendir(self, inode: int, ctx: RequestContext) -> LiveNames:
        item = self._inodes.get(inode)
        return LiveNames(item, self._inodes, self._backups, self._lasting, self.turns)

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> Opened:
        item = self._inodes.get(inode)
        with self._inodes.using(item):
            if flags & os.O_TRUNC:
                await self.keeper.keep(item, 0, os.fstat(item.fd).st_size, cut=True)
            return LiveFile(self, self.tree.open(item, flags, by(ctx)))

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        item = self._inodes.get(inode)
        if name == CAPABILITY and item.has_no_capability:
            raise FUSEError(pyfuse3.ENOATTR)  # a new one: a raised error remembers where, for ever
        try:
            return os.getxattr(item.proc, name)
        except OSError as error:
            # The kernel asks for this one before each write.
            item.has_no_capability |= name == CAPABILITY and error.errno == errno.ENODATA
            raise

    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        names = [os.fsencode(name) for name in os.listxattr(self._inodes.get(inode).proc)]
        # The kernel refuses these to all but root when they are read, but not when they are listed.
        return names if ctx.uid == 0 else [name for name in names if not name.startswith(TRUSTED)]

    def forget(self, inode: int, count: int) -> None:
        self._inodes.forget(inode, count)


class LiveFile(Opened):
    """An open file. See :class:`Opened`."""

    __slots__ = ("_side", "file")

    def __init__(self, side: LiveSide, file: OpenFile) -> None:
        self._side = side
        self.file = file

    async def read(self, offset: int, size: int) -> bytes | memoryview:
        file, files, buffer = self.file, self._side.tree.files, self._side.buffer
        fd = files.fd(file)
        if file.nowait:
            try:
                # The answer is sent before anything else runs, so one buffer serves all.
                got = os.preadv(fd, [buffer[:size]], offset, os.RWF_NOWAIT)
                if got == size or (got and offset + got >= os.fstat(fd).st_size):
                    return buffer[:got]
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                file.nowait = False
        if not file.nowait:
            return buffer[: os.preadv(fd, [buffer[:size]], offset)]
        with files.using(file):
            return await self._side.turns.in_thread(os.pread, fd, size, offset)

    async def write(self, offset: int, data: bytes) -> int:
        side = self._side
        if side.tree.freeze is not None:
            await side.keeper.keep(self.file.inode, offset, offset + len(data))
        return side.tree.write(self.file, offset, data)

    async def flush(self, *, data_only: bool) -> None:
        with self._side.tree.files.using(self.file) as fd:
            await self._side.turns.in_thread(os.fdatasync if data_only else os.fsync, fd)

    async def close(self) -> None:
        self._side.tree.files.close(self.file)


def by(ctx: RequestContext) -> By:
    """Who asks."""
    return By(ctx.uid, ctx.gid, ctx.pid)
