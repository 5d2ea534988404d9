"""The kernel's questions, answered from the tree: what pyfuse3 calls.

1. Each handler asks :class:`Tree` at once and, where that would wait for the store, once more on
   another thread (see :mod:`cloudfs.fuse.patience`).
2. No exception but FUSEError leaves a handler, as any other would end the mount: what cloudfs
   raises is logged as its sentence and answered with EIO, what it does not is logged in full.
3. Answers are filled into two :class:`EntryAttributes` that live as long as the mount. pyfuse3
   copies them before anything else runs, so there must be no ``await`` between filling one and
   returning it.
4. What lies in a snapshot never changes, and the kernel may believe it for a day; what is made up
   for a second.
5. Nothing is kept for a name that was looked up, hence ``forget`` has nothing to do. What is kept
   for open files and directories goes when they are closed.
"""

from __future__ import annotations

import errno
import functools
import logging
import math
import stat
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar, TypeVarTuple

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, StatvfsData

from cloudfs.core.errors import CloudfsError, NoRepository
from cloudfs.core.rows import ItemType, Meta
from cloudfs.fuse.attributes import CAPABILITY, MadeUpAttribute, attribute, own_attributes
from cloudfs.fuse.inodes import LIN_BITS
from cloudfs.fuse.listing import Listing
from cloudfs.fuse.patience import WouldBlock
from cloudfs.fuse.reading import OpenFile, Piece
from cloudfs.fuse.tree import Branch, Tree
from cloudfs.fuse.turns import TASKS, Turns

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

FOREVER_S = 86400.0
BRIEFLY_S = 1.0
REFRESH_WAIT_S = 1.0
"""How long looking at the top waits for the store to say whether there are new snapshots."""

STATFS_UNIT = 4096
NAME_MAX = 255

FORMATS = {
    ItemType.REGULAR: stat.S_IFREG,
    ItemType.DIRECTORY: stat.S_IFDIR,
    ItemType.SYMLINK: stat.S_IFLNK,
    ItemType.FIFO: stat.S_IFIFO,
    ItemType.SOCKET: stat.S_IFSOCK,
    ItemType.CHARACTER_DEVICE: stat.S_IFCHR,
    ItemType.BLOCK_DEVICE: stat.S_IFBLK,
}
_FORMATS: dict[int, int] = {int(kind): bits for kind, bits in FORMATS.items()}


def guarded(
    handler: Callable[Concatenate[View, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[View, P], Coroutine[Any, Any, T]]:
    """Rule 2."""

    @functools.wraps(handler)
    async def run(self: View, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(self, *args, **kwargs)
        except FUSEError:
            raise
        except NoRepository:
            raise FUSEError(errno.ESTALE) from None  # the snapshot was forgotten meanwhile
        except CloudfsError as error:
            self.complain(str(error))
        except Exception:
            log.exception("%s failed", handler.__name__)
        raise FUSEError(errno.EIO)

    return run


class View(pyfuse3.Operations):
    """The read-only view of one mount."""

    supports_dot_lookup = False
    enable_acl = True  # the kernel then obeys the ACLs that it finds among the attributes
    enable_writeback_cache = False

    def __init__(
        self, tree: Tree, *, refresh_s: float, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        """``refresh_s``: how old the list of snapshots may be when the top is looked at."""
        super().__init__()
        self.tree = tree
        self.shows_rights = True  # setuid and setgid, capabilities and devices
        self._refresh_s = refresh_s
        self._clock_s = clock_s
        self._made = clock_s()
        self._refreshed: dict[Branch | None, float] = {}
        self._refreshing: dict[Branch | None, trio.Event] = {}
        self._nursery: trio.Nursery | None = None
        self.turns = Turns()
        self._complaint = ""
        self._next_handle = 1
        self._files: dict[int, OpenFile] = {}
        self._listings: dict[int, Listing] = {}
        self._stable = _attributes(FOREVER_S)
        self._brief = _attributes(BRIEFLY_S)
        self._absent = _attributes(FOREVER_S)
        self._absent.st_ino = 0

    def complain(self, sentence: str) -> None:
        """Log what went wrong, the same thing not twice in a row."""
        if sentence != self._complaint:
            self._complaint = sentence
            log.error("%s", sentence)

    def expect_news(self) -> None:
        """Look for new snapshots when next the top is looked at, however short ago that was."""
        self._made = -math.inf
        self._refreshed.clear()

    def attach(self, nursery: trio.Nursery, turns: Turns) -> None:
        """Be part of another mount: what is begun in the background, and whose turn it is, is that
        mount's."""
        self._nursery, self.turns = nursery, turns

    async def serve(self) -> None:
        """Answer the kernel until the mount ends."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self.turns.install()
            await pyfuse3.main(max_tasks=TASKS)
            nursery.cancel_scope.cancel()

    async def ask(self, question: Callable[[*Ts], T], *args: *Ts) -> T:
        """Rule 1."""
        try:
            return question(*args)
        except WouldBlock:
            return await self._in_thread(question, *args)

    async def _in_thread(self, question: Callable[[*Ts], T], *args: *Ts) -> T:
        return await self.turns.in_thread(question, *args, abandon=True)

    def _handle(self) -> int:
        self._next_handle += 1
        return self._next_handle

    def _fill(self, attributes: EntryAttributes, ino: int, meta: Meta, stored: int) -> None:
        """``stored``: bytes that are not holes. See rule 3."""
        a = attributes
        a.st_ino = ino
        a.st_mode = _FORMATS[meta.type] | meta.mode
        a.st_nlink = meta.nlink
        a.st_uid = meta.uid
        a.st_gid = meta.gid
        a.st_rdev = meta.rdev
        if not self.shows_rights:
            a.st_rdev = 0
            if meta.type == ItemType.REGULAR:
                a.st_mode &= ~(stat.S_ISUID | stat.S_ISGID)
        a.st_size = meta.size
        a.st_blocks = (stored + 511) // 512
        a.st_mtime_ns = a.st_atime_ns = meta.mtime_ns
        a.st_ctime_ns = meta.ctime_ns

    def _attributes(self, ino: int, meta: Meta, stored: int) -> EntryAttributes:
        attributes = self._stable if ino >> LIN_BITS else self._brief
        self._fill(attributes, ino, meta, stored)
        return attributes

    # -- new snapshots ---------------------------------------------------------------------

    async def look_for_news(self, ino: int) -> None:
        """Where ``ino`` shows snapshots or policies, learn of new ones, but wait only so long."""
        waiting = []
        for branch in self.tree.branches_at(ino):
            if self._clock_s() - self._refreshed.get(branch, self._made) < self._refresh_s:
                continue
            done = self._refreshing.get(branch)
            if done is None:
                assert self._nursery is not None
                done = self._refreshing[branch] = trio.Event()
                self._nursery.start_soon(self._refresh, branch, done)
            waiting.append(done)
        if waiting:
            with self.turns.away(), trio.move_on_after(REFRESH_WAIT_S):
                for done in waiting:
                    await done.wait()

    async def _refresh(self, branch: Branch | None, done: trio.Event) -> None:
        what = "policies" if branch is None else "snapshots"
        try:
            await self._in_thread(self.tree.refresh, branch)
        except CloudfsError as error:
            self.complain(f"Looking for new {what} failed: {error}")
        except Exception:
            log.exception("Looking for new %s failed", what)
        finally:
            self._refreshed[branch] = self._clock_s()
            del self._refreshing[branch]
            done.set()

    # -- names and attributes --------------------------------------------------------------

    @guarded
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """One name in a directory."""
        if not parent_inode >> LIN_BITS:
            await self.look_for_news(parent_inode)
        found = await self.ask(self.tree.lookup, parent_inode, name)
        if found is None:
            if not parent_inode >> LIN_BITS:
                raise FUSEError(errno.ENOENT)
            return self._absent
        ino, meta = found
        stored = await self._stored(ino, meta)
        return (
            self._attributes(ino, meta, stored)
            if parent_inode >> LIN_BITS
            else self._top(ino, meta)
        )

    def _top(self, ino: int, meta: Meta) -> EntryAttributes:
        """What a made-up directory names: the name may go, even where what it names may not."""
        self._fill(self._brief, ino, meta, meta.size)
        return self._brief

    async def _stored(self, ino: int, meta: Meta) -> int:
        if meta.sparse:
            return await self.ask(self.tree.stored_bytes, ino, meta)
        return meta.size

    async def _need(self, ino: int) -> Meta:
        meta = await self.ask(self.tree.meta, ino)
        if meta is None:
            raise FUSEError(errno.ESTALE if not ino >> LIN_BITS else errno.EIO)
        return meta

    @guarded
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """The attributes of an inode."""
        meta = await self._need(inode)
        stored = await self._stored(inode, meta)
        return self._attributes(inode, meta, stored)

    @guarded
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        """Where a symlink points."""
        if not inode >> LIN_BITS:
            await self.look_for_news(inode)
        return (await self._need(inode)).target

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Rule 5."""

    # -- directories -----------------------------------------------------------------------

    @guarded
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """Take the names down."""
        if not inode >> LIN_BITS:
            await self.look_for_news(inode)
        listing = await self.ask(self.tree.listing, inode)
        handle = self._handle()
        self._listings[handle] = listing
        return handle

    @guarded
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        """Names with their attributes from a position on, as many as the kernel has room for."""
        listing = self._listings[fh]
        fill, reply = self._fill, pyfuse3.readdir_reply
        attributes = self._brief if listing.made_up else self._stable
        position = start_id
        while True:
            batch = await self.ask(listing.batch, position)
            if not batch:
                return
            for name, ino, meta in batch:
                if meta is None:
                    self.complain(f"the tables are damaged (inode {ino} has no metadata).")
                    chosen = _damaged(ino)
                elif meta.sparse:
                    stored = await self._stored(ino, meta)
                    fill(attributes, ino, meta, stored)
                    chosen = attributes
                else:
                    fill(attributes, ino, meta, meta.size)
                    chosen = attributes
                position += 1
                if not reply(token, name, chosen, position):
                    return

    async def releasedir(self, fh: int) -> None:
        """Let the names go."""
        self._listings.pop(fh, None)

    # -- files -----------------------------------------------------------------------------

    @guarded
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a file; what the kernel has of its content stays true."""
        meta = await self._need(inode)
        opened = OpenFile(self.tree.view(inode >> LIN_BITS), meta)
        handle = self._handle()
        self._files[handle] = opened
        return FileInfo(fh=handle, keep_cache=True)

    @guarded
    async def read(self, fh: int, off: int, size: int) -> Piece:  # type: ignore[override]  # pyfuse3 takes any buffer
        """Bytes of a file."""
        opened = self._files[fh]
        try:
            found = opened.read(off, size, wait=False)
        except WouldBlock:
            found = await self._in_thread(opened.fetch, off, size)
        if opened.wants_ahead(off, size):
            try:
                opened.read_ahead()
            except WouldBlock:
                assert self._nursery is not None
                self._nursery.start_soon(self._read_ahead, opened)
        return found

    async def _read_ahead(self, opened: OpenFile) -> None:
        try:
            await self._in_thread(opened.read_ahead)
        except CloudfsError:
            pass  # the reader will meet it, and say so

    async def release(self, fh: int) -> None:
        """Let an open file go."""
        self._files.pop(fh, None)

    async def flush(self, fh: int) -> None:
        """Answering this once keeps the kernel from asking at every close."""
        raise FUSEError(errno.ENOSYS)

    # -- extended attributes ---------------------------------------------------------------

    @guarded
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        """One extended attribute, one of ``user.cloudfs.*`` among them."""
        meta = await self._need(inode)
        found: bytes | None = None
        if inode >> LIN_BITS and (self.shows_rights or name != CAPABILITY):
            own = MadeUpAttribute.by_name(name)
            if own is not None or meta.streams:
                found = await self._in_thread(attribute, self.tree, inode, meta, name)
            else:
                found = (meta.xattrs or {}).get(name)
        if found is None:
            raise FUSEError(pyfuse3.ENOATTR)
        return found

    @guarded
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        """The names of the extended attributes that the file had."""
        meta = await self._need(inode)
        if not meta.streams:
            names = list(meta.xattrs or ())
        else:
            names = await self._in_thread(own_attributes, self.tree, inode, meta)
        return names

    # -- the whole -------------------------------------------------------------------------

    @guarded
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """The size of the newest snapshots; nothing is free."""
        size = items = 0
        for branch in self.tree.branches:
            last = branch.history.manifest.last_snapshot
            if last is not None:
                size += last.stats.bytes_total
                items += last.stats.files + last.stats.dirs
                items += last.stats.symlinks + last.stats.others
        data = StatvfsData()
        data.f_bsize = data.f_frsize = STATFS_UNIT
        data.f_blocks = -(-size // STATFS_UNIT)
        data.f_files = items
        data.f_namemax = NAME_MAX
        return data


def _attributes(timeout_s: float) -> EntryAttributes:
    attributes = EntryAttributes()
    attributes.entry_timeout = attributes.attr_timeout = timeout_s
    return attributes


def _damaged(ino: int) -> EntryAttributes:
    """What has a name but no metadata: listed, and an error as soon as it is looked at."""
    attributes = _attributes(0)
    attributes.st_ino = ino
    return attributes
