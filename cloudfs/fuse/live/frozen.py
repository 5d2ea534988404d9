"""What is frozen, as a tree: what was kept, and for the rest what is there.

1. A frozen item has the number of the live one, with that of the freeze above it, as far as it
   fits, and whole as its generation: what the kernel remembers of one freeze is never taken for
   another's, or for what lives.
2. Within a freeze nothing changes, so the kernel may believe everything for as long as it likes.
   After it every number of it is stale.
3. What the kernel knows of a frozen item pins the live one, so its number cannot be given again.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import msgspec

from cloudfs.core.errors import SourceError
from cloudfs.fuse.live.freeze import Freeze, xattrs_of
from cloudfs.fuse.live.inodes import MASK, ROOT, Inode, Inodes
from cloudfs.source.inode import StatReader, data_extents, read_flags
from cloudfs.source.live.protocol import EXTENTS_ATTRIBUTE, STATUS_ATTRIBUTE, MoreStatus
from cloudfs.source.own import SNAPSHOTS, own_mounts, shows_backups
from cloudfs.source.whereabouts import own_name

NUMBER_BITS = 48
_FREEZES = 1 << 12
_MAX_EXTENTS = 2000

Crosses = Callable[[Inode], bool]
"""Whether a directory is on a file system that the backup leaves out."""


def base_of(freeze: int) -> int:
    """What the numbers of a freeze's items begin with."""
    return (1 + freeze % (_FREEZES - 1)) << NUMBER_BITS


class FrozenTree:
    """The tree at one freeze. For the thread that serves the kernel."""

    def __init__(self, freeze: Freeze, inodes: Inodes, crosses: Crosses) -> None:
        self.freeze = freeze
        self.base = base_of(freeze.number)
        self._inodes = inodes
        self._crosses = crosses
        self._own = own_mounts()
        self._known: dict[int, int] = {}  # live number -> how often the kernel was told of it
        self._stat = StatReader()

    def number(self, inode: Inode) -> int:
        """The number that the kernel gets for a frozen item."""
        return self.base | inode.shown

    def _live(self, number: int) -> int:
        live = number & MASK
        return ROOT if live == self._inodes.root.shown else live

    def get(self, number: int) -> Inode:
        """The item of a frozen number, held open. Raises KeyError where it is not known."""
        live = self._live(number)
        if live not in self._known:
            raise KeyError(number)
        return self._inodes.get(live)

    def count(self, inode: Inode) -> None:
        """The kernel is told of an item."""
        times = self._known.get(inode.number, 0)
        if not times:
            inode.pins += 1
        self._known[inode.number] = times + 1

    def forget(self, number: int, count: int) -> None:
        """The kernel forgot that."""
        live = self._live(number)
        times = self._known.get(live, 0) - count
        if times > 0:
            self._known[live] = times
        elif self._known.pop(live, 0):
            inode = self._inodes.find(live)
            if inode is not None:
                self._inodes.unpin(inode)

    @property
    def block_size(self) -> int:
        """Of the blocks in which data is marked, in bytes."""
        return self.freeze.block_size

    def release(self, inode: Inode) -> None:
        """Let a live item go, if nobody else knows it."""
        self._inodes.release(inode)

    def end(self) -> None:
        """Nothing of it is valid any more."""
        for live in list(self._known):
            self.forget(live, self._known[live])

    # -- what is asked -------------------------------------------------------------------------

    def look_up(self, parent: Inode, name: bytes) -> Inode | None:
        """What stood under a name; None for nothing. Raises OSError."""
        kept = self.freeze.names.get(parent.number)
        if kept is not None and name in kept:
            child = kept[name]
            return child if child is None else self._inodes.opened(child)
        if self._stands_empty(parent):
            return None
        try:
            inode, _ = self._inodes.look_up(parent, name)
        except FileNotFoundError:
            return None
        return inode if self.freeze.holds(inode) else None

    def names(self, directory: Inode) -> list[bytes]:
        """The names that stood in a directory. Raises OSError."""
        if self._stands_empty(directory):
            return []
        kept = self.freeze.names.get(directory.number, {})
        there = [name for name in self._listed(directory) if name not in kept]
        return there + [name for name, child in kept.items() if child is not None]

    def _stands_empty(self, directory: Inode) -> bool:
        return directory.dev in self._own.views or self._crosses(directory)

    def _listed(self, directory: Inode) -> list[bytes]:
        """What is in a directory now, but for the backups that a live mount within shows."""
        names = list_names(directory)
        if directory.dev in self._own.live and SNAPSHOTS in names:
            number = os.lstat(directory.proc + b"/" + SNAPSHOTS).st_ino
            if shows_backups(SNAPSHOTS, number):
                names.remove(SNAPSHOTS)
        return names

    def xattrs(self, inode: Inode) -> dict[bytes, bytes]:
        """The extended attributes that an item had."""
        kept = self.freeze.xattrs(inode)
        return xattrs_of(inode) if kept is None else kept

    def xattr(self, inode: Inode, name: bytes) -> bytes | None:
        """One of them, or what is told by an attribute for want of another call."""
        if name == STATUS_ATTRIBUTE:
            return self._more(inode)
        if name == EXTENTS_ATTRIBUTE:
            return self._extents(inode)
        return self.xattrs(inode).get(name)

    def _more(self, inode: Inode) -> bytes:
        status, flags = self._stat.of(inode.fd), 0
        if inode.is_dir or inode.is_file:
            fd = os.open(inode.proc, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                flags = read_flags(fd, inode.dev)
            finally:
                os.close(fd)
        return msgspec.msgpack.encode(MoreStatus(status.btime_ns, flags, inode.dev))

    def _extents(self, inode: Inode) -> bytes:
        """Where the data of a sparse file lies, rather too much than too little."""
        size = self.freeze.status(inode).st_size
        fd = os.open(inode.proc, os.O_RDONLY | os.O_CLOEXEC)
        try:
            there = data_extents(fd, size)
        finally:
            os.close(fd)
        found: list[tuple[int, int]] = []
        for start, end in sorted(there + self.freeze.kept_extents(inode)):
            full = len(found) >= _MAX_EXTENTS
            if found and (start <= found[-1][1] or full):
                found[-1] = (found[-1][0], max(found[-1][1], min(end, size)))
            elif start < size:
                found.append((start, min(end, size)))
        return msgspec.msgpack.encode(found)

    # -- where things were ---------------------------------------------------------------------

    def path(self, directory: Inode, known: dict[int, bytes | None]) -> bytes | None:
        """Where a directory was, below the top; None where it was not in the tree. ``known`` holds
        what was asked before."""
        chain: list[tuple[int, bytes]] = []
        above: list[Inode] = []
        inode = directory
        found: bytes | None = b""
        while inode.number != ROOT:
            if inode.number in known:
                found = known[inode.number]
                break
            place = self._place(inode)
            if place is None:
                known[inode.number] = found = None
                break
            chain.append((inode.number, place[1]))
            inode = place[0]
            above.append(inode)
        for number, name in reversed(chain):
            found = None if found is None else (found + b"/" + name if found else name)
            known[number] = found
        for inode in above:
            self._inodes.release(inode)
        return found

    def _place(self, directory: Inode) -> tuple[Inode, bytes] | None:
        kept = self.freeze.places.get(directory.number)
        if kept is not None:
            return kept
        self._inodes.opened(directory)
        if not self.freeze.holds(directory) or not os.fstat(directory.fd).st_nlink:
            return None
        name = own_name(directory.fd)
        above = os.open(b"..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory.fd)
        parent, _ = self._inodes.take(above)
        if parent is directory or not name:
            raise SourceError("a directory that changed lies outside of the tree")
        return parent, name

    def by_handle(self, number: int, handle: bytes) -> Inode | None:
        """A directory that was marked: as it is known, or by its handle; None where it is gone.
        Raises OSError, SourceError where that cannot be told."""
        inode = self._inodes.find(number)
        if inode is not None:
            return self._inodes.opened(inode)
        if not handle:
            raise SourceError("a directory that changed can no longer be found")
        try:
            return self._inodes.take(self._inodes.open_by(handle))[0]
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            return None  # removed: the name above it is marked too


def list_names(directory: Inode) -> list[bytes]:
    """The names in a directory now."""
    fd = os.open(directory.proc, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return [os.fsencode(name) for name in os.listdir(fd)]
    finally:
        os.close(fd)
