"""The handlers of the live mount: each only delegates.

1. Numbers tell what an inode is: a live item (below 2^48), a frozen one (up to 2^61), or one of a
   backup (from there on). For what is not live another side answers (:mod:`.sides`).
2. Everything that changes the live tree is done here and now, on this thread. What may take long
   and changes nothing goes to other threads: flushing, and reads of what is not in memory. Between
   the last ``await`` of a handler and its change stands nothing, so a freeze is between changes.
3. What the kernel is told of is counted before the handler returns.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Sequence
from typing import TypeVar, TypeVarTuple

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, StatvfsData

from cloudfs.fuse.live.answers import answering, attributes_lasting, fill, statvfs_of
from cloudfs.fuse.live.backups import Backups
from cloudfs.fuse.live.caller import By
from cloudfs.fuse.live.files import OpenFile
from cloudfs.fuse.live.freeze import Freeze, Full
from cloudfs.fuse.live.frozen import NUMBER_BITS
from cloudfs.fuse.live.frozen_side import FrozenSide
from cloudfs.fuse.live.inodes import ROOT, Inode
from cloudfs.fuse.live.listing import LiveNames
from cloudfs.fuse.live.sides import Opened, Side
from cloudfs.fuse.live.tree import LiveTree, Wanted
from cloudfs.fuse.turns import Turns
from cloudfs.source.live.protocol import FROZEN_PREFIX
from cloudfs.source.own import MADE_UP, SNAPSHOTS

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

LIVE_S = 10.0
"""How long the kernel believes what it was told of the live tree. It learns at once of what it
changes itself; this is for what others change beneath."""

ABSENT_S = 1.0
TASKS = 128
MAX_WAITING = TASKS // 2
"""Questions at the same time, and how many of them may wait for a freeze to end: what is frozen
must still be read meanwhile. Before more would wait, it is given up as a point in time."""

READ_BYTES = 1 << 20
CAPABILITY = b"security.capability"
TRUSTED = b"trusted."


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
        self._files = tree.files
        self.frozen = FrozenSide(tree.inodes)
        self._backups = backups
        self.turns = Turns()
        self._handles: dict[int, OpenFile | Opened] = {}
        self._next_handle = 1
        self._waiting = 0  # for a freeze to end
        self._lasting = attributes_lasting(LIVE_S)
        self._absent = attributes_lasting(ABSENT_S)
        self._absent.st_ino = 0
        self._buffer = memoryview(bytearray(READ_BYTES))

    async def serve(self, nursery: trio.Nursery) -> None:
        """Answer the kernel until the mount ends; what goes on beside it begins in ``nursery``."""
        self.turns.install()
        if self._backups is not None:
            self._backups.begin(nursery, self.turns)
        await pyfuse3.main(max_tasks=TASKS)

    def answered(self) -> None:
        """What is held by no descriptor is opened again for any question, so after any there may be
        too many."""
        self._inodes.trim()
        self._files.trim()

    def expect_news(self) -> None:
        """A sync made a snapshot: show it."""
        if self._backups is not None:
            self._backups.view.expect_news()

    async def _in_thread(self, question: Callable[[*Ts], T], *args: *Ts) -> T:
        with self.turns.away():
            return await trio.to_thread.run_sync(question, *args)

    def _handle(self, of: OpenFile | Opened) -> int:
        self._next_handle += 1
        self._handles[self._next_handle] = of
        return self._next_handle

    def _side(self, number: int) -> Side:
        """Who answers for a number that is not of the live tree. Raises KeyError for nobody."""
        if number < MADE_UP:
            return self.frozen
        if self._backups is None:
            raise KeyError(number)
        return self._backups

    def _live(self, number: int) -> Inode:
        """A live item, of which something is to be changed."""
        if number >> NUMBER_BITS:
            raise FUSEError(errno.EROFS)
        return self._inodes.get(number)

    def _known(self, inode: Inode, status: os.stat_result) -> EntryAttributes:
        """Rule 3."""
        inode.lookups += 1
        return fill(self._lasting, inode.number, status)

    async def _keep(self, inode: Inode, start: int, end: int) -> None:
        """Keep what a freeze needs of some bytes; when this returns they may change at once."""
        frozen_by, at = self._tree.freeze, start
        while (freeze := self._tree.freeze) is not None and at < end:
            if freeze is not frozen_by:
                frozen_by, at = freeze, start
            try:
                at = self._tree.keep(inode, at, end)
            except Full:
                await self._wait_for_end(freeze)
                continue
            if at < end:
                with self.turns.away():
                    await trio.lowlevel.checkpoint()

    async def _wait_for_end(self, freeze: Freeze) -> None:
        if self._waiting >= MAX_WAITING:
            freeze.give_up("too many writers wait for it")
            return
        self._waiting += 1
        try:
            with self.turns.away():
                await freeze.ended.wait()
        finally:
            self._waiting -= 1

    # -- names and attributes ------------------------------------------------------------------

    @answering
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """One name in a directory."""
        if parent_inode >> NUMBER_BITS:
            return await self._side(parent_inode).lookup(parent_inode, name, ctx)
        parent = self._inodes.get(parent_inode)
        try:
            return self._known(*self._inodes.look_up(parent, name))
        except FileNotFoundError:
            if name == SNAPSHOTS and self._backups is not None:
                return self._backups.enter(parent)
            if parent_inode == ROOT and name.startswith(FROZEN_PREFIX):
                return self.frozen.enter(name, ctx)
            return self._absent

    @answering
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """The attributes of an item."""
        if inode >> NUMBER_BITS:
            return await self._side(inode).getattr(inode, ctx)
        item = self._inodes.get(inode)
        return fill(self._lasting, item.shown, os.fstat(item.fd))

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
        item = self._live(inode)
        wanted = _wanted(attr, fields)
        opened = self._handles.get(fh) if fh is not None else None
        with self._inodes.using(item):
            if wanted.size is not None:
                await self._keep(item, wanted.size, os.fstat(item.fd).st_size)
            fd = self._files.fd(opened) if isinstance(opened, OpenFile) else -1
            status = self._tree.set_attributes(item, fd, wanted, _by(ctx))
        return fill(self._lasting, item.shown, status)

    @answering
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        """Where a symlink points."""
        if inode >> NUMBER_BITS:
            return await self._side(inode).readlink(inode, ctx)
        return os.readlink(b"", dir_fd=self._inodes.get(inode).fd)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """The kernel no longer knows some items."""
        for number, count in inode_list:
            if not number >> NUMBER_BITS:
                self._inodes.forget(number, count)
            else:
                with contextlib.suppress(KeyError):
                    self._side(number).forget(number, count)

    # -- making, linking, renaming, removing ---------------------------------------------------

    @answering
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a file, fifo, socket or device."""
        parent = self._live(parent_inode)
        by = _by(ctx)
        return self._known(*self._tree.mknod(parent, name, mode, rdev, by))

    @answering
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a directory."""
        parent = self._live(parent_inode)
        return self._known(*self._tree.mkdir(parent, name, mode, _by(ctx)))

    @answering
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a symlink."""
        parent = self._live(parent_inode)
        return self._known(*self._tree.symlink(parent, name, target, _by(ctx)))

    @answering
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """Make a file and open it."""
        parent = self._live(parent_inode)
        opened, status = self._tree.create(parent, name, mode, flags, _by(ctx))
        info = FileInfo(fh=self._handle(opened), keep_cache=True, direct_io=_is_stream(flags))
        return info, self._known(opened.inode, status)

    @answering
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """Give an item one more name."""
        item, parent = self._live(inode), self._live(new_parent_inode)
        return self._known(item, self._tree.link(item, parent, new_name, _by(ctx)))

    @answering
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Take a name away."""
        self._tree.unlink(self._live(parent_inode), name)

    @answering
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove a directory."""
        self._tree.rmdir(self._live(parent_inode), name)

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
        old, new = self._live(parent_inode_old), self._live(parent_inode_new)
        self._tree.rename(old, name_old, new, name_new, flags, _by(ctx))

    # -- directories ---------------------------------------------------------------------------

    @answering
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """Get ready to list names."""
        if inode >> NUMBER_BITS:
            return self._handle(await self._side(inode).opendir(inode, ctx))
        item = self._inodes.get(inode)
        return self._handle(LiveNames(item, self._inodes, self._backups, self._lasting))

    @answering
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        """Names with their attributes from a position on, as many as the kernel has room for."""
        listing = self._handles[fh]
        assert not isinstance(listing, OpenFile)
        await listing.list(start_id, token)

    @answering
    async def releasedir(self, fh: int) -> None:
        """Let the names go."""
        await self._close(fh)

    @answering
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Flush a directory."""
        listing = self._handles[fh]
        if not isinstance(listing, LiveNames):
            return  # nothing in there is ever dirty
        with self._inodes.using(self._inodes.opened(listing.inode)):
            await self._in_thread(_flush_directory, listing.inode.proc)

    # -- files ---------------------------------------------------------------------------------

    @answering
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a file."""
        if inode >> NUMBER_BITS:
            if flags & os.O_ACCMODE != os.O_RDONLY:
                raise FUSEError(errno.EROFS)
            other = await self._side(inode).open(inode, flags, ctx)
            return FileInfo(fh=self._handle(other), keep_cache=True)
        item = self._inodes.get(inode)
        with self._inodes.using(item):
            if flags & os.O_TRUNC:
                await self._keep(item, 0, os.fstat(item.fd).st_size)
            opened = self._tree.open(item, flags, _by(ctx))
        return FileInfo(fh=self._handle(opened), keep_cache=True, direct_io=_is_stream(flags))

    @answering
    async def read(self, fh: int, off: int, size: int) -> bytes | memoryview:  # type: ignore[override]  # pyfuse3 takes any buffer
        """Bytes of a file."""
        opened = self._handles[fh]
        if not isinstance(opened, OpenFile):
            return await opened.read(off, size)
        fd = self._files.fd(opened)
        if opened.nowait:
            try:
                # The answer is sent before anything else runs, so one buffer serves all.
                got = os.preadv(fd, [self._buffer[:size]], off, os.RWF_NOWAIT)
                if got == size or (got and off + got >= os.fstat(fd).st_size):
                    return self._buffer[:got]
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                opened.nowait = False
        if not opened.nowait:
            return self._buffer[: os.preadv(fd, [self._buffer[:size]], off)]
        with self._files.using(opened):
            return await self._in_thread(os.pread, fd, size, off)

    @answering
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write to a file."""
        opened = self._handles[fh]
        if not isinstance(opened, OpenFile):
            raise FUSEError(errno.EROFS)
        if self._tree.freeze is not None:
            await self._keep(opened.inode, off, off + len(buf))
        return self._tree.write(opened, off, buf)

    @answering
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Flush a file to where it lies."""
        opened = self._handles[fh]
        if not isinstance(opened, OpenFile):
            return  # nothing of it is ever dirty
        with self._files.using(opened) as fd:
            await self._in_thread(os.fdatasync if datasync else os.fsync, fd)

    @answering
    async def release(self, fh: int) -> None:
        """Close a file."""
        await self._close(fh)

    async def _close(self, fh: int) -> None:
        opened = self._handles.pop(fh, None)
        if isinstance(opened, OpenFile):
            self._files.close(opened)
        elif opened is not None:
            await opened.close()

    async def flush(self, fh: int) -> None:
        """Answering this once keeps the kernel from asking at every close."""
        raise FUSEError(errno.ENOSYS)

    # -- extended attributes -------------------------------------------------------------------

    @answering
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        """One extended attribute."""
        if inode >> NUMBER_BITS:
            return await self._side(inode).getxattr(inode, name, ctx)
        item = self._inodes.get(inode)
        if name == CAPABILITY and item.has_no_capability:
            raise FUSEError(pyfuse3.ENOATTR)  # a new one: a raised error remembers where, for ever
        try:
            return os.getxattr(item.proc, name)
        except OSError as error:
            # The kernel asks for this one before each write.
            item.has_no_capability |= name == CAPABILITY and error.errno == errno.ENODATA
            raise

    @answering
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        """The names of the extended attributes."""
        if inode >> NUMBER_BITS:
            return await self._side(inode).listxattr(inode, ctx)
        names = [os.fsencode(name) for name in os.listxattr(self._inodes.get(inode).proc)]
        # The kernel refuses these to all but root when they are read, but not when they are listed.
        return names if ctx.uid == 0 else [name for name in names if not name.startswith(TRUSTED)]

    @answering
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        """Set an extended attribute."""
        self._tree.set_xattr(self._live(inode), name, value, _by(ctx))

    @answering
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove one."""
        self._tree.remove_xattr(self._live(inode), name)

    # -- the whole -----------------------------------------------------------------------------

    @answering
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """How full the file system beneath is."""
        return statvfs_of(os.fstatvfs(self._inodes.root.fd))


def _by(ctx: RequestContext) -> By:
    return By(ctx.uid, ctx.gid, ctx.pid)


def _is_stream(flags: int) -> bool:
    """Whether a file is opened to be written only: then what is written need not be remembered by
    the kernel as well, which is quicker. (Nothing can be mapped through such a descriptor.)"""
    return flags & os.O_ACCMODE == os.O_WRONLY


def _wanted(attr: EntryAttributes, fields: pyfuse3.SetattrFields) -> Wanted:
    return Wanted(
        attr.st_mode if fields.update_mode else None,
        attr.st_uid if fields.update_uid else None,
        attr.st_gid if fields.update_gid else None,
        attr.st_size if fields.update_size else None,
        attr.st_atime_ns if fields.update_atime else None,
        attr.st_mtime_ns if fields.update_mtime else None,
    )


def _flush_directory(path: bytes) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
