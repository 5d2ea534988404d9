"""The inodes that the kernel knows of the live tree, and how each is reached.

1. An item is held by an O_PATH descriptor, so neither renames nor symlinks can lead elsewhere, and
   its inode number is not given again for as long as it is held. The number that the kernel gets is
   the file system's own. What lies on other file systems within the tree, or has too large a
   number, gets one from OTHERS on: always the same, as it is known by that in marks and snapshots.
2. The kernel counts what it was told (lookup, create, readdirplus and their like) and says how much
   of that it has forgotten. At zero the item goes, unless something else knows it: a freeze
   (``pins``), open files (``opens``), or a change that is being made (``uses``). Counting and
   answering happen without an ``await`` in between.
3. There may be more items than descriptors. From ``limit`` on, those longest not looked up are held
   by their file handles only, but for what is in use and what has no name any more. They are opened
   again when they are needed; where a number was given again meanwhile, the handle does not open
   (ESTALE), and the new item is another one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat as st
from collections.abc import Iterator

import xxhash

from cloudfs.core.marks import Blocks
from cloudfs.source.handles import handle_of, open_handle
from cloudfs.source.live.protocol import OTHERS

ROOT = 1
MASK = (1 << 48) - 1
"""The numbers of live items; above these bits stand those of frozen ones and of backups."""

_HOLD = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_EVICTED_AT_ONCE = 256


class Inode:
    """One item. ``number`` is what the kernel knows it by."""

    __slots__ = (
        "blocks", "born", "dev", "epoch", "fd", "handle", "has_no_capability", "ino", "is_dir",
        "is_file", "lookups", "nested", "number", "opens", "pins", "proc", "shown", "uses",
    )  # fmt: skip

    def __init__(self, number: int, fd: int, status: os.stat_result) -> None:
        self.number = number
        self.shown = number if number != ROOT else status.st_ino  # what lstat says
        self.dev = status.st_dev
        self.ino = status.st_ino
        self.nested = False  # on another file system than the top
        self.is_dir = st.S_ISDIR(status.st_mode)
        self.is_file = st.S_ISREG(status.st_mode)
        self.lookups = 0
        self.pins = 0
        self.opens = 0
        self.uses = 0
        self.handle = b""
        self.has_no_capability = False  # security.capability was looked for and is not there
        self.fd = -1
        self.proc = b""
        self.hold(fd)
        self.blocks: Blocks | None = None  # marked in ``epoch``
        self.epoch = 0
        self.born = 0  # the freeze before which it was not there; 0: before all of them

    def hold(self, fd: int) -> None:
        """Be held by an O_PATH descriptor, or (-1) by none."""
        self.fd = fd
        self.proc = b"/proc/self/fd/%d" % fd if fd >= 0 else b""


class Inodes:
    """All that are known."""

    def __init__(self, root_fd: int, limit: int) -> None:
        """``root_fd`` is an O_PATH descriptor of the top; ``limit``: how many may be ``held`` open,
        but for those that must be."""
        status = os.fstat(root_fd)
        self.dev = status.st_dev
        self.root = Inode(ROOT, root_fd, status)
        self.root.uses = 1
        self._known = {ROOT: self.root}
        self._others: dict[tuple[int, int], int] = {}
        self.limit = self._trim_at = limit
        self.held = 1
        self._mounts: dict[int, int] = {}  # by device, a descriptor for opening by handle
        self.refused = 0  # flags (statvfs) of mounts that are not entered

    def enter(self, root_fd: int) -> None:
        """Go by another descriptor of the same top. Raises OSError where it is of another one."""
        status = os.fstat(root_fd)
        if (status.st_dev, status.st_ino) != (self.root.dev, self.root.ino):
            raise FileNotFoundError(errno.ENOENT, "the source was moved")
        os.close(self.root.fd)
        self.root.hold(root_fd)

    def __len__(self) -> int:
        return len(self._known)

    def get(self, number: int) -> Inode:
        """The inode of a number that the kernel was given, held open. Raises OSError (ESTALE)."""
        return self.opened(self._known[number])

    def opened(self, inode: Inode) -> Inode:
        """An inode, held open. Raises OSError (ESTALE)."""
        if inode.fd < 0:
            self._reopen(inode)
        return inode

    def find(self, number: int) -> Inode | None:
        """The inode of a number, if it is known."""
        return self._known.get(number)

    def number_of(self, status: os.stat_result) -> int:
        """The number of an item of this status."""
        if status.st_dev == self.dev:
            if status.st_ino == self.root.ino:
                return ROOT
            if ROOT < status.st_ino < OTHERS:
                return status.st_ino
        key = (status.st_dev, status.st_ino)
        number = self._others.get(key)
        if number is None:
            number = self._others[key] = self._free(*key)
        return number

    def _free(self, dev: int, ino: int) -> int:
        """A number from OTHERS on that nothing known has: one that is made of device and number,
        which all others will hardly ever be as well."""
        digest = xxhash.xxh3_64_intdigest(b"%d %d" % (dev, ino))
        number = OTHERS | digest >> 17
        while number in self._known:
            number = OTHERS | (number + 1 & MASK)
        return number

    def look_up(self, parent: Inode, name: bytes) -> tuple[Inode, os.stat_result]:
        """The item of a name, known from now on; not counted yet. Raises OSError."""
        self.opened(parent)
        status = os.stat(name, dir_fd=parent.fd, follow_symlinks=False)
        inode = self._known.get(self.number_of(status))
        if inode is not None and inode.fd >= 0:
            return inode, status
        fd = os.open(name, _HOLD, dir_fd=parent.fd)
        try:
            if status.st_dev != parent.dev and os.fstatvfs(fd).f_flag & self.refused:
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        except OSError:
            os.close(fd)
            raise
        return self.take(fd)

    def take(self, fd: int) -> tuple[Inode, os.stat_result]:
        """The item behind an O_PATH descriptor, which is kept or closed."""
        status = os.fstat(fd)
        number = self.number_of(status)
        inode = self._known.get(number)
        if inode is not None and inode.fd < 0 and not self._is_same(inode, fd):
            # Another item got its number; what the kernel still knows of the old one is stale.
            if inode.lookups or inode.opens:
                number = self._renumber(status)
            else:
                del self._known[number]
            inode = None
        if inode is None:
            self.held += 1
            inode = self._known[number] = Inode(number, fd, status)
            inode.nested = status.st_dev != self.dev
        elif inode.fd < 0:
            self.held += 1
            inode.hold(fd)
        else:
            os.close(fd)
        return inode, status

    def _renumber(self, status: os.stat_result) -> int:
        key = (status.st_dev, status.st_ino)
        number = self._others[key] = self._free(*key)
        return number

    def _is_same(self, inode: Inode, fd: int) -> bool:
        return inode.handle == handle_of(fd)

    def forget(self, number: int, count: int) -> None:
        """The kernel forgot so many times that it was told of a number."""
        inode = self._known.get(number)
        if inode is not None:
            inode.lookups -= count
            self.release(inode)

    def release(self, inode: Inode) -> None:
        """Let an item go if nobody knows it any more."""
        if inode.lookups > 0 or inode.pins > 0 or inode.uses > 0 or inode.opens > 0:
            return
        if self._known.get(inode.number) is inode:
            del self._known[inode.number]
            if inode.number >= OTHERS:
                self._others.pop((inode.dev, inode.ino), None)
        if inode.fd >= 0:
            os.close(inode.fd)
            inode.hold(-1)
            self.held -= 1

    def unpin(self, inode: Inode) -> None:
        """Something else no longer knows an item."""
        inode.pins -= 1
        self.release(inode)

    def unuse(self, inode: Inode) -> None:
        """An item is in use one time less."""
        inode.uses -= 1
        self.release(inode)

    # -- fewer descriptors than items ----------------------------------------------------------

    def trim(self) -> None:
        """Close descriptors if there are too many. To be called when a question is answered, and
        nothing that was looked up for it is needed any more."""
        if self.held > self._trim_at:
            before = self.held
            for inode in self._idle():
                self._evict(inode)
            self._trim_at = self.limit
            if before - self.held < _EVICTED_AT_ONCE:  # the others are in use, or have no handles
                self._trim_at = max(self.limit, self.held + _EVICTED_AT_ONCE)

    @contextlib.contextmanager
    def using(self, inode: Inode) -> Iterator[None]:
        """Let an item stay open while something is waited for."""
        inode.uses += 1
        try:
            yield
        finally:
            self.unuse(inode)

    def _idle(self) -> list[Inode]:
        """Those that were known first and that nothing holds. They go to the end of the line."""
        found: list[Inode] = []
        for inode in self._known.values():
            if inode.fd >= 0 and not inode.uses and os.fstat(inode.fd).st_nlink:
                found.append(inode)
                if len(found) == _EVICTED_AT_ONCE:
                    break
        for inode in found:
            self._known[inode.number] = self._known.pop(inode.number)
        return found

    def abandon(self, inode: Inode) -> None:
        """Let the descriptor of an item go that has no name any more, unless the kernel knows it or
        something uses it: its number may then be another's."""
        if inode.fd >= 0 and not (inode.lookups or inode.uses or inode.opens):
            self._evict(inode)

    def _evict(self, inode: Inode) -> None:
        try:
            inode.handle = inode.handle or handle_of(inode.fd)
            self._mount_of(inode)
        except OSError:
            return  # no handles on that file system: it stays open
        os.close(inode.fd)
        inode.hold(-1)
        self.held -= 1

    def _reopen(self, inode: Inode) -> None:
        inode.hold(open_handle(self._mount_of(inode), inode.handle))
        self.held += 1
        if self._known.get(inode.number) is inode:  # to the end of the line
            self._known[inode.number] = self._known.pop(inode.number)

    def _mount_of(self, inode: Inode) -> int:
        """A descriptor on the file system of an inode that handles can be opened by."""
        fd = self._mounts.get(inode.dev)
        if fd is None:
            near = self.root if inode.dev == self.dev else inode
            if not near.is_dir:
                raise OSError("no directory of that file system is at hand")
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            fd = self._mounts[inode.dev] = os.open(near.proc, flags)
        return fd

    def open_by(self, handle: bytes) -> int:
        """An O_PATH descriptor of what a handle on the tree's own file system stands for."""
        return open_handle(self._mount_of(self.root), handle)

    def all(self) -> Iterator[Inode]:
        """All that are known."""
        return iter(self._known.values())
