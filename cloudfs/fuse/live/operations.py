"""The handlers of the live mount: each only delegates.

1. Numbers tell what an inode is: a live item (below 2^48), a frozen one (up to 2^61), or one of a
   backup (from there on). The side whose it is answers (:mod:`.sides`).
2. Everything that changes the live tree is done at once, on this thread. What may take long and
   changes nothing goes to other threads: flushing, and reads of what is not in memory. Between
   the last wait of a handler and its change stands nothing, so a freeze is between changes.
3. What the kernel is told of is counted before the handler returns.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, StatvfsData

from cloudfs.fuse.live.answers import answering, statvfs_of
from cloudfs.fuse.live.backups import Backups
from cloudfs.fuse.live.frozen import NUMBER_BITS
from cloudfs.fuse.live.frozen_side import FrozenSide
from cloudfs.fuse.live.inodes import Inode
from cloudfs.fuse.live.keeping import TASKS
from cloudfs.fuse.live.live_side import LiveFile, LiveSide, by
from cloudfs.fuse.live.sides import Opened, Side
from cloudfs.fuse.live.tree import LiveTree, Wanted
from cloudfs.fuse.turns import Turns
from cloudfs.source.own import MADE_UP


class LiveMount(pyfuse3.Operations):
    """One live mount."""

    supports_dot_lookup = False
    enable_acl = True
    enable_writeback_cache = False

    def __init__(self, tree: LiveTree, backups: Backups | None = None) -> None:
        """``backups`` is what ``.snapshot`` shows; None: there is none."""
        super().__init__()
        self._tree = tree
        self._inodes = tree.inodes
        self._turns = Turns()
        self.frozen = FrozenSide(tree.inodes)
        self._backups = backups
        self._live = LiveSide(tree, self.frozen, backups, self._turns)
        self._handles: dict[int, Opened] = {}
        self._next_handle = 1

    async def serve(self, nursery: trio.Nursery) -> None:
        """Answer the kernel until the mount ends; what goes on beside it begins in ``nursery``."""
        self._turns.install()
        if self._backups is not None:
            self._backups.begin(nursery, self._turns)
        await pyfuse3.main(max_tasks=TASKS)

    def answered(self) -> None:
        """What is held by no descriptor is opened again for any question, so after any there may be
        too many."""
        self._inodes.trim()
        self._tree.files.trim()

    def expect_news(self) -> None:
        """A sync made a snapshot: show it."""
        if self._backups is not None:
            self._backups.view.expect_news()

    def _handle(self, of: Opened) -> int:
        self._next_handle += 1
        self._handles[self._next_handle] = of
        return self._next_handle

    def _side(self, number: int) -> Side:
        """Who answers for a number. Raises KeyError for nobody."""
        if not number >> NUMBER_BITS:
            return self._live
        if number < MADE_UP:
            return self.frozen
        if self._backups is None:
            raise KeyError(number)
        return self._backups

    def _item(self, number: int) -> Inode:
        """A live item, of which something is to be changed."""
        if number >> NUMBER_BITS:
            raise FUSEError(errno.EROFS)
        return self._inodes.get(number)

    # -- names and attributes ------------------------------------------------------------------

    @answering
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """One name in a directory."""
        return await self._side(parent_inode).lookup(parent_inode, name, ctx)

    @answering
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """The attributes of an item."""
        return await self._side(inode).getattr(inode, ctx)

    @answering
    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        """Set attributes, or cut or grow a file."""
        item = self._item(inode)
        wanted = _wanted(attr, fields)
        opened = self._handles.get(fh) if fh is not None else None
        with self._inodes.using(item):
            if wanted.size is not None:
                size = os.fstat(item.fd).st_size
                await self._live.keeper.keep(item, wanted.size, size, cut=True)
            fd = self._tree.files.fd(opened.file) if isinstance(opened, LiveFile) else -1
            status = self._tree.set_attributes(item, fd, wanted, by(ctx))
        return self._live.attributes(item, status)

    @answering
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        """Where a symlink points."""
        return await self._side(inode).readlink(inode, ctx)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """The kernel no longer knows some items."""
        for number, count in inode_list:
            self._side(number).forget(number, count)

    # -- making, linking, renaming, removing ---------------------------------------------------

    @answering
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a file, fifo, socket or device."""
        parent = self._item(parent_inode)
        return self._live.known(*self._tree.mknod(parent, name, mode, rdev, by(ctx)))

    @answering
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a directory."""
        parent = self._item(parent_inode)
        return self._live.known(*self._tree.mkdir(parent, name, mode, by(ctx)))

    @answering
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a symlink."""
        parent = self._item(parent_inode)
        return self._live.known(*self._tree.symlink(parent, name, target, by(ctx)))

    @answering
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """Make a file and open it."""
        parent = self._item(parent_inode)
        opened, status = self._tree.create(parent, name, mode, flags, by(ctx))
        handle = self._handle(LiveFile(self._live, opened))
        return _info(handle, flags), self._live.known(opened.inode, status)

    @answering
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """Give an item one more name."""
        item, parent = self._item(inode), self._item(new_parent_inode)
        return self._live.known(item, self._tree.link(item, parent, new_name, by(ctx)))

    @answering
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Take a name away."""
        self._tree.unlink(self._item(parent_inode), name)

    @answering
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove a directory."""
        self._tree.rmdir(self._item(parent_inode), name)

    @answering
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        """Rename, exchange, or rename where nothing is."""
        old, new = self._item(parent_inode_old), self._item(parent_inode_new)
        self._tree.rename(old, name_old, new, name_new, flags, by(ctx))

    # -- directories ---------------------------------------------------------------------------

    @answering
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """Get ready to list names."""
        return self._handle(await self._side(inode).opendir(inode, ctx))

    @answering
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        """Names with their attributes from a position on, as many as the kernel has room for."""
        await self._handles[fh].list(start_id, token)

    @answering
    async def releasedir(self, fh: int) -> None:
        """Let the names go."""
        await self._close(fh)

    @answering
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Flush a directory."""
        await self._handles[fh].flush(data_only=datasync)

    # -- files ---------------------------------------------------------------------------------

    @answering
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a file."""
        if flags & os.O_ACCMODE != os.O_RDONLY:
            self._item(inode)  # all else is only read
        return _info(self._handle(await self._side(inode).open(inode, flags, ctx)), flags)

    @answering
    async def read(self, fh: int, off: int, size: int) -> bytes | memoryview:  # type: ignore[override]  # pyfuse3 takes any buffer
        """Bytes of a file."""
        return await self._handles[fh].read(off, size)

    @answering
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write to a file."""
        return await self._handles[fh].write(off, buf)

    @answering
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Flush a file to where it lies."""
        await self._handles[fh].flush(data_only=datasync)

    @answering
    async def release(self, fh: int) -> None:
        """Close a file."""
        await self._close(fh)

    async def _close(self, fh: int) -> None:
        opened = self._handles.pop(fh, None)
        if opened is not None:
            await opened.close()

    async def flush(self, fh: int) -> None:
        """Answering this once keeps the kernel from asking at every close."""
        raise FUSEError(errno.ENOSYS)

    # -- extended attributes -------------------------------------------------------------------

    @answering
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        """One extended attribute."""
        return await self._side(inode).getxattr(inode, name, ctx)

    @answering
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        """The names of the extended attributes."""
        return await self._side(inode).listxattr(inode, ctx)

    @answering
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        """Set an extended attribute."""
        self._tree.set_xattr(self._item(inode), name, value, by(ctx))

    @answering
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove one."""
        self._tree.remove_xattr(self._item(inode), name)

    # -- the whole -----------------------------------------------------------------------------

    @answering
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """How full the file system beneath is."""
        return statvfs_of(os.fstatvfs(self._inodes.root.fd))


def _info(handle: int, flags: int) -> FileInfo:
    """What the kernel is told of an open file. Of one that is opened to be written only, what is
    written need not be remembered by the kernel as well, which is quicker. (Nothing can be mapped
    through such a descriptor.)"""
    written_only = flags & os.O_ACCMODE == os.O_WRONLY
    return FileInfo(fh=handle, keep_cache=True, direct_io=written_only)


def _wanted(attr: EntryAttributes, fields: pyfuse3.SetattrFields) -> Wanted:
    return Wanted(
        attr.st_mode if fields.update_mode else None,
        attr.st_uid if fields.update_uid else None,
        attr.st_gid if fields.update_gid else None,
        attr.st_size if fields.update_size else None,
        attr.st_atime_ns if fields.update_atime else None,
        attr.st_mtime_ns if fields.update_mtime else None,
    )
