"""The handlers of the live mount: each only delegates.

1. Numbers tell what an inode is: a live item (below 2^48), a frozen one (up to 2^62), or one of a
   backup (from there on; see :mod:`cloudfs.fuse.live.backups`).
2. Everything that changes the live tree is done here and now, on this thread. What may take long
   and changes nothing goes to other threads: flushing, and reads of what is not in memory. Between
   the last ``await`` of a handler and its change stands nothing, so a freeze is between changes.
3. What the kernel is told of is counted before the handler returns.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, TypeVarTuple

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, StatvfsData

from cloudfs.fuse.live.answers import answering, attributes_lasting, fill, statvfs_of
from cloudfs.fuse.live.freeze import Full
from cloudfs.fuse.live.frozen import NUMBER_BITS, FrozenTree, list_names
from cloudfs.fuse.live.inodes import ROOT, Inode
from cloudfs.fuse.live.tree import By, LiveTree, OpenFile, Wanted
from cloudfs.fuse.turns import Turns
from cloudfs.source.live.protocol import FROZEN_PREFIX

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

LIVE_S = 10.0
"""How long the kernel believes what it was told of the live tree. It learns at once of what it
changes itself; this is for what others change beneath."""

ABSENT_S = 1.0
FOREVER_S = 86400.0
TASKS = 10_000
"""Questions at the same time: whoever waits for a freeze to end takes one, and what is frozen must
still be read meanwhile."""

READ_BYTES = 1 << 20
NO_ATTRIBUTE = b"security.capability"


@dataclass(slots=True)
class FrozenFile:
    """An open file of what is frozen."""

    inode: Inode
    fd: int


@dataclass(slots=True)
class Names:
    """An open directory: the names as they were when it was opened, and whose they are."""

    inode: Inode
    names: list[bytes]
    frozen: FrozenTree | None


class LiveMount(pyfuse3.Operations):
    """One live mount."""

    supports_dot_lookup = False
    enable_acl = True
    enable_writeback_cache = False

    def __init__(self, tree: LiveTree) -> None:
        super().__init__()
        self._tree = tree
        self._inodes = tree.inodes
        self.frozen: FrozenTree | None = None
        self.turns = Turns()
        self._handles: dict[int, OpenFile | FrozenFile | Names] = {}
        self._next_handle = 1
        self._lasting = attributes_lasting(LIVE_S)
        self._frozen_lasting = attributes_lasting(FOREVER_S)
        self._absent = attributes_lasting(ABSENT_S)
        self._absent.st_ino = 0
        self._buffer = memoryview(bytearray(READ_BYTES))

    async def serve(self) -> None:
        """Answer the kernel until the mount ends."""
        self.turns.install()
        await pyfuse3.main(max_tasks=TASKS)

    async def _in_thread(self, question: Callable[[*Ts], T], *args: *Ts) -> T:
        with self.turns.away():
            return await trio.to_thread.run_sync(question, *args)

    def _handle(self, of: OpenFile | FrozenFile | Names) -> int:
        self._next_handle += 1
        self._handles[self._next_handle] = of
        return self._next_handle

    def _frozen_of(self, number: int) -> FrozenTree:
        """The frozen tree that a number belongs to. Raises KeyError where it is gone."""
        frozen = self.frozen
        if frozen is None or number >> NUMBER_BITS != frozen.base >> NUMBER_BITS:
            raise KeyError(number)
        return frozen

    def _live(self, number: int) -> Inode:
        """A live item, of which something is to be changed."""
        if number >> NUMBER_BITS:
            raise FUSEError(errno.EROFS)
        return self._inodes.get(number)

    def _known(self, inode: Inode, status: os.stat_result) -> EntryAttributes:
        """Rule 3."""
        inode.lookups += 1
        return fill(self._lasting, inode.number, status)

    def _known_frozen(self, frozen: FrozenTree, inode: Inode) -> EntryAttributes:
        frozen.count(inode)
        status = frozen.freeze.status(inode)
        return fill(self._frozen_lasting, frozen.number(inode), status)

    async def _keep(self, inode: Inode, start: int, end: int) -> None:
        """Keep what a freeze needs of some bytes; when this returns they may change at once."""
        freeze, at = self._tree.freeze, start
        while self._tree.freeze is not None and at < end:
            if self._tree.freeze is not freeze:
                freeze, at = self._tree.freeze, start
            try:
                at = self._tree.keep(inode, at, end)
            except Full:
                with self.turns.away():
                    await freeze.ended.wait()
                continue
            if at < end:
                with self.turns.away():
                    await trio.lowlevel.checkpoint()

    # -- names and attributes ------------------------------------------------------------------

    @answering
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """One name in a directory."""
        if parent_inode >> NUMBER_BITS:
            return self._look_up_frozen(parent_inode, name)
        parent = self._inodes.get(parent_inode)
        try:
            return self._known(*self._inodes.look_up(parent, name))
        except FileNotFoundError:
            if parent_inode == ROOT and name.startswith(FROZEN_PREFIX):
                return self._enter_frozen(name, ctx)
            return self._absent

    def _enter_frozen(self, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """The top of what is frozen, for whom the mount belongs to."""
        frozen = self.frozen
        wanted = name.removeprefix(FROZEN_PREFIX)
        if frozen is None or wanted != b"%d" % frozen.freeze.number or ctx.uid != os.geteuid():
            raise FUSEError(errno.ENOENT)
        return self._known_frozen(frozen, self._inodes.root)

    def _look_up_frozen(self, parent: int, name: bytes) -> EntryAttributes:
        frozen = self._frozen_of(parent)
        inode = frozen.look_up(frozen.get(parent), name)
        if inode is None:
            raise FUSEError(errno.ENOENT)
        return self._known_frozen(frozen, inode)

    @answering
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """The attributes of an item."""
        if inode >> NUMBER_BITS:
            frozen = self._frozen_of(inode)
            item = frozen.get(inode)
            return fill(self._frozen_lasting, inode, frozen.freeze.status(item))
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
        if wanted.size is not None:
            await self._keep(item, wanted.size, os.fstat(item.fd).st_size)
        opened = self._handles.get(fh) if fh is not None else None
        fd = opened.fd if isinstance(opened, OpenFile) else -1
        status = self._tree.set_attributes(item, fd, wanted, By(ctx.uid, ctx.gid))
        return fill(self._lasting, item.shown, status)

    @answering
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        """Where a symlink points. That never changes."""
        if inode >> NUMBER_BITS:
            item = self._frozen_of(inode).get(inode)
        else:
            item = self._inodes.get(inode)
        return os.readlink(b"", dir_fd=item.fd)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """The kernel no longer knows some items."""
        for number, count in inode_list:
            if not number >> NUMBER_BITS:
                self._inodes.forget(number, count)
            elif self.frozen is not None and number >> NUMBER_BITS == (
                self.frozen.base >> NUMBER_BITS
            ):
                self.frozen.forget(number, count)

    # -- making, linking, renaming, removing ---------------------------------------------------

    @answering
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a file, fifo, socket or device."""
        parent = self._live(parent_inode)
        by = By(ctx.uid, ctx.gid)
        return self._known(*self._tree.mknod(parent, name, mode, rdev, by))

    @answering
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a directory."""
        parent = self._live(parent_inode)
        return self._known(*self._tree.mkdir(parent, name, mode, By(ctx.uid, ctx.gid)))

    @answering
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a symlink."""
        parent = self._live(parent_inode)
        return self._known(*self._tree.symlink(parent, name, target, By(ctx.uid, ctx.gid)))

    @answering
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """Make a file and open it."""
        parent = self._live(parent_inode)
        opened, status = self._tree.create(parent, name, mode, flags, By(ctx.uid, ctx.gid))
        info = FileInfo(fh=self._handle(opened), keep_cache=True)
        return info, self._known(opened.inode, status)

    @answering
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """Give an item one more name."""
        item, parent = self._live(inode), self._live(new_parent_inode)
        return self._known(item, self._tree.link(item, parent, new_name))

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
        self._tree.rename(old, name_old, new, name_new, flags)

    # -- directories ---------------------------------------------------------------------------

    @answering
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """Take the names down."""
        if inode >> NUMBER_BITS:
            frozen = self._frozen_of(inode)
            item = frozen.get(inode)
            return self._handle(Names(item, frozen.names(item), frozen))
        item = self._inodes.get(inode)
        return self._handle(Names(item, [b".", b"..", *list_names(item)], None))

    @answering
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        """Names with their attributes from a position on, as many as the kernel has room for."""
        listing = self._handles[fh]
        assert isinstance(listing, Names)
        for position in range(start_id, len(listing.names)):
            name = listing.names[position]
            if name in (b".", b".."):
                if not self._list_dots(listing.inode, name, token, position + 1):
                    return
            elif not self._list_one(listing, name, token, position + 1):
                return

    def _list_one(self, listing: Names, name: bytes, token: ReaddirToken, cookie: int) -> bool:
        frozen = listing.frozen
        if frozen is not None:
            inode = frozen.look_up(listing.inode, name)
            if inode is None:
                return True
            status = frozen.freeze.status(inode)
            attributes = fill(self._frozen_lasting, frozen.number(inode), status)
            if not pyfuse3.readdir_reply(token, name, attributes, cookie):
                return False
            frozen.count(inode)
            return True
        try:
            inode, status = self._inodes.look_up(listing.inode, name)
        except FileNotFoundError:
            return True  # removed since the directory was opened
        attributes = fill(self._lasting, inode.number, status)
        if not pyfuse3.readdir_reply(token, name, attributes, cookie):
            self._inodes.release(inode)
            return False
        inode.lookups += 1
        return True

    def _list_dots(self, inode: Inode, name: bytes, token: ReaddirToken, cookie: int) -> bool:
        """The directory itself and the one above: the kernel is not told of them."""
        status = os.fstat(inode.fd)
        if name == b".." and inode.number != ROOT:
            status = os.stat(b"..", dir_fd=inode.fd)
        number = status.st_ino
        return pyfuse3.readdir_reply(token, name, fill(self._lasting, number, status), cookie)

    @answering
    async def releasedir(self, fh: int) -> None:
        """Let the names go."""
        self._handles.pop(fh, None)

    @answering
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Flush a directory."""
        listing = self._handles[fh]
        assert isinstance(listing, Names)
        await self._in_thread(_flush_directory, listing.inode.proc)

    # -- files ---------------------------------------------------------------------------------

    @answering
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a file."""
        if inode >> NUMBER_BITS:
            item = self._frozen_of(inode).get(inode)
            if flags & os.O_ACCMODE != os.O_RDONLY:
                raise FUSEError(errno.EROFS)
            fd = os.open(item.proc, os.O_RDONLY | os.O_CLOEXEC)
            return FileInfo(fh=self._handle(FrozenFile(item, fd)), keep_cache=True)
        item = self._inodes.get(inode)
        if flags & os.O_TRUNC:
            await self._keep(item, 0, os.fstat(item.fd).st_size)
        opened = self._tree.open(item, flags, By(ctx.uid, ctx.gid))
        return FileInfo(fh=self._handle(opened), keep_cache=True)

    @answering
    async def read(self, fh: int, off: int, size: int) -> bytes | memoryview:  # type: ignore[override]  # pyfuse3 takes any buffer
        """Bytes of a file."""
        opened = self._handles[fh]
        if isinstance(opened, FrozenFile):
            if self.frozen is None:
                raise FUSEError(errno.ESTALE)
            return self.frozen.freeze.read(opened.inode, opened.fd, off, size)
        assert isinstance(opened, OpenFile)
        if opened.nowait:
            try:
                # The answer is sent before anything else runs, so one buffer serves all.
                got = os.preadv(opened.fd, [self._buffer[:size]], off, os.RWF_NOWAIT)
                if got == size or (got and off + got >= os.fstat(opened.fd).st_size):
                    return self._buffer[:got]
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                opened.nowait = False
            else:
                return await self._in_thread(os.pread, opened.fd, size, off)
        if opened.nowait:
            return await self._in_thread(os.pread, opened.fd, size, off)
        return self._buffer[: os.preadv(opened.fd, [self._buffer[:size]], off)]

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
        assert not isinstance(opened, Names)
        await self._in_thread(os.fdatasync if datasync else os.fsync, opened.fd)

    @answering
    async def release(self, fh: int) -> None:
        """Close a file."""
        opened = self._handles.pop(fh, None)
        if isinstance(opened, OpenFile):
            self._tree.close(opened)
        elif isinstance(opened, FrozenFile):
            os.close(opened.fd)

    async def flush(self, fh: int) -> None:
        """Answering this once keeps the kernel from asking at every close."""
        raise FUSEError(errno.ENOSYS)

    # -- extended attributes -------------------------------------------------------------------

    @answering
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        """One extended attribute."""
        if inode >> NUMBER_BITS:
            frozen = self._frozen_of(inode)
            found = frozen.xattr(frozen.get(inode), name)
            if found is None:
                raise FUSEError(pyfuse3.ENOATTR)
            return found
        item = self._inodes.get(inode)
        return os.getxattr(item.proc, name)

    @answering
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        """The names of the extended attributes."""
        if inode >> NUMBER_BITS:
            frozen = self._frozen_of(inode)
            return list(frozen.xattrs(frozen.get(inode)))
        return [os.fsencode(name) for name in os.listxattr(self._inodes.get(inode).proc)]

    @answering
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        """Set an extended attribute."""
        self._tree.set_xattr(self._live(inode), name, value)

    @answering
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove one."""
        self._tree.remove_xattr(self._live(inode), name)

    # -- the whole -----------------------------------------------------------------------------

    @answering
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """How full the file system beneath is."""
        return statvfs_of(os.fstatvfs(self._inodes.root.fd))


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
