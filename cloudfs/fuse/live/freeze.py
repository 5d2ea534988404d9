"""One point in time of a tree that goes on changing: what was, kept before it is something else.

1. A freeze begins between two changes. From then on the first change of anything keeps what it
   was: a *row* (what lstat said, and the extended attributes), a *name* (what it stood for, or that
   it did not stand there), a *chunk* of data. Whoever changes keeps first, without an ``await``
   between the keeping and the change. Reading what is frozen is reading what was kept, and for the
   rest what is there.
2. Items that were made after the freeze are not in it: no name leads to them.
3. An item that loses its last name stays open until the freeze ends, so its data is there. There
   may be half as many of these as items may be held open; before there would be more, the freeze is
   given up. (Who removes something holds the lock of its directory, and cannot be kept waiting.)
4. Chunks are kept only of what the sync will read: all, or the blocks that were marked.
5. The room for chunks is bounded. When it is full, who would overwrite something waits until the
   freeze ends (but not before the sync has reached what is frozen, for who waits may be in its
   way), or the freeze is given up as a point in time, as the policy says. Never is there an
   error for who writes; where chunks cannot be kept (the disk is full), it is given up.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import trio

from cloudfs.core.marks import NEVER
from cloudfs.db.marked import Marks
from cloudfs.fuse.live.inodes import Inode, Inodes
from cloudfs.source.inode import read_xattrs
from cloudfs.source.live.touched import Touched

log = logging.getLogger(__name__)

CHUNK = 16 * 1024
"""Bytes that are kept at once: little enough that small random writes copy little."""

AT_ONCE = 512
"""Chunks that are kept before others have their turn (8 MiB)."""

READERS = 256
"""Descriptors that are kept for reading what is about to be overwritten."""

ROW_BYTES = 1024
"""What a row or a name counts for in the bound."""

Place = tuple[Inode, bytes]
"""A directory and a name in it."""


class Row(NamedTuple):
    """What an item was."""

    status: os.stat_result
    xattrs: dict[bytes, bytes]


class Full(Exception):
    """There is no room for more chunks, and the policy has writers wait."""


class Freeze:
    """What a sync needs and would otherwise be gone. For the thread that serves the kernel."""

    def __init__(
        self,
        number: int,
        inodes: Inodes,
        room_bytes: int,
        *,
        waits: bool,
        wanted: Marks | None,
        block_size: int,
        store_fd: Callable[[], int],
        touched: Touched,
    ) -> None:
        """``wanted``: what will be read (None: anything). ``waits``: see rule 5. ``store_fd`` opens
        a nameless file for chunks."""
        self.number = number
        self.given_up = ""  # why it is no point in time any more
        self.reached = False  # by the sync: till then nobody waits
        self.ended = trio.Event()
        self.released = trio.Event()  # nobody need wait for room any more
        self._inodes = inodes
        self._room = room_bytes
        self._waits = waits
        self._wanted = wanted
        self.block_size = block_size
        self._open_store = store_fd
        self._store = -1
        self._stored = 0  # chunks
        self._kept_bytes = 0
        self._touched = touched
        self.rows: dict[int, Row] = {}
        self.names: dict[int, dict[bytes, Inode | None]] = {}  # by directory
        self.places: dict[int, Place] = {}  # of directories that moved or went since
        self._chunks: dict[int, dict[int, int]] = {}  # inode -> chunk -> place in the store
        self._readers: dict[int, int] = {}  # inode -> descriptor
        self._pinned: list[Inode] = []
        self._gone: list[Inode] = []  # since it began, with their last names
        self._most_gone = inodes.limit // 2

    @property
    def touched_fd(self) -> int:
        """The descriptor by which others see what was touched."""
        return self._touched.fd

    def holds(self, inode: Inode) -> bool:
        """Whether an item was there when the freeze began."""
        return inode.born < self.number

    # -- keeping -------------------------------------------------------------------------------

    def keep_row(self, inode: Inode) -> None:
        """An item's attributes are about to change."""
        if inode.number in self.rows or not self.holds(inode) or self.given_up:
            return
        self._touched.add(inode.ino)
        self._pin(inode)
        try:
            self.rows[inode.number] = Row(os.fstat(inode.fd), xattrs_of(inode))
        except OSError as error:
            self.give_up(f"an item could not be looked at: {error}")
        self._kept_bytes += ROW_BYTES

    def keep_name(self, directory: Inode, name: bytes, child: Inode | None) -> None:
        """A name is about to stand for something else, or for nothing; ``child`` is what it stands
        for now."""
        if not self.holds(directory) or self.given_up:
            return
        names = self.names.setdefault(directory.number, {})
        if name in names:
            return
        self.keep_row(directory)
        if child is not None and not self.holds(child):
            child = None
        if child is not None:
            self._pin(child)
            if child.is_dir:
                self.places.setdefault(child.number, (directory, name))
        names[name] = child
        self._kept_bytes += ROW_BYTES

    def lose(self, inode: Inode) -> None:
        """An item has lost its last name."""
        if not self.given_up and self.holds(inode):
            self._gone.append(inode)
            if len(self._gone) > self._most_gone:
                self.give_up("so much was removed that not all of it can be held open")

    def moved_directory(self) -> None:
        """A directory is about to move: every path may lead elsewhere."""
        self._touched.all()

    def _pin(self, inode: Inode) -> None:
        inode.pins += 1
        self._pinned.append(inode)

    def missing(self, inode: Inode, start: int, end: int) -> list[int]:
        """The chunks of these bytes that have to be kept before they change.

        For some AT_ONCE chunks at the most; see :meth:`LiveTree.keep`.
        """
        if not self.holds(inode) or self.given_up or not inode.is_file:
            return []
        row = self.rows.get(inode.number)
        size = row.status.st_size if row is not None else os.fstat(inode.fd).st_size
        end = min(end, size)
        if start >= end:
            return []
        kept = self._chunks.get(inode.number, {})
        wants = self._wants(inode)
        chunks = range(start // CHUNK, (end - 1) // CHUNK + 1)
        return [chunk for chunk in chunks if chunk not in kept and wants(chunk)]

    def next_data(self, inode: Inode, start: int) -> tuple[int, int]:
        """The first bytes of a file from ``start`` on that are none of its holes: of these, what is
        cut off need not be kept. Without any, they begin where no file ends."""
        if not self.holds(inode) or self.given_up or not inode.is_file:
            return start, NEVER
        try:
            reader = self._reader(inode)
            first = os.lseek(reader, start, os.SEEK_DATA)
            return first, os.lseek(reader, first, os.SEEK_HOLE)
        except OSError as error:
            return (NEVER, NEVER) if error.errno == errno.ENXIO else (start, NEVER)

    def size_of(self, inode: Inode) -> int:
        """Up to where a file can have anything to be kept."""
        return self.status(inode).st_size

    def _wants(self, inode: Inode) -> Callable[[int], bool]:
        """Which chunks of a file will be read."""
        wanted = self._wanted
        if (
            wanted is None
            or inode.number in wanted.items  # it may have moved, and is then read whole
            or self.status(inode).st_nlink > 1  # so are files of several names
        ):
            return lambda chunk: True
        blocks = wanted.blocks.get(inode.number)
        if blocks is None:
            return lambda chunk: False
        size = self.block_size

        def wants(chunk: int) -> bool:
            return blocks.touches(chunk * CHUNK // size, ((chunk + 1) * CHUNK - 1) // size)

        return wants

    def keep_chunks(self, inode: Inode, chunks: list[int]) -> None:
        """Keep chunks of a file. Raises Full."""
        if self.given_up:
            return
        if self._kept_bytes + len(chunks) * CHUNK > self._room:
            if self._waits and self.reached:
                raise Full
            if not self._waits:
                self.give_up(
                    "the room for what is overwritten is full; see kept_room in cloudfs-policy(5)"
                )
                return
        self._touched.add(inode.ino)
        try:
            if self._store < 0:
                self._store = self._open_store()
            reader = self._reader(inode)
            kept = self._chunks.setdefault(inode.number, {})
            for chunk in chunks:
                data = os.pread(reader, CHUNK, chunk * CHUNK)
                _write_all(self._store, data, self._stored * CHUNK)
                kept[chunk] = self._stored
                self._stored += 1
        except OSError as error:
            self.give_up(f"what is overwritten could not be kept: {error}")
            return
        self._kept_bytes += len(chunks) * CHUNK

    def _reader(self, inode: Inode) -> int:
        fd = self._readers.get(inode.number)
        if fd is None:
            if len(self._readers) >= READERS:
                self._close_readers()
            fd = os.open(inode.proc, os.O_RDONLY | os.O_CLOEXEC)
            self._readers[inode.number] = fd
        return fd

    def _close_readers(self) -> None:
        for fd in self._readers.values():
            os.close(fd)
        self._readers.clear()

    def give_up(self, why: str) -> None:
        """What is frozen is no longer one point in time."""
        if not self.given_up:
            log.error("The freeze is given up as a point in time: %s", why)
        self.given_up = self.given_up or why
        self.released.set()
        self._touched.all()
        for inode in self._gone:
            self._inodes.abandon(inode)
        self._gone.clear()

    # -- reading -------------------------------------------------------------------------------

    def status(self, inode: Inode) -> os.stat_result:
        """What lstat said of an item. Raises OSError."""
        row = self.rows.get(inode.number)
        return row.status if row is not None else os.fstat(self._inodes.opened(inode).fd)

    def xattrs(self, inode: Inode) -> dict[bytes, bytes] | None:
        """The extended attributes that were kept; None where they are as they were."""
        row = self.rows.get(inode.number)
        return row.xattrs if row is not None else None

    def read(self, inode: Inode, fd: int, start: int, size: int) -> bytes:
        """Bytes of a file; ``fd`` is open on it."""
        end = min(start + size, self.status(inode).st_size)
        if start >= end:
            return b""
        data = _read_all(fd, start, end)
        kept = self._chunks.get(inode.number)
        if not kept:
            return data
        found = bytearray(data)
        for chunk in range(start // CHUNK, (end - 1) // CHUNK + 1):
            at = kept.get(chunk)
            if at is not None:
                low, high = max(start, chunk * CHUNK), min(end, (chunk + 1) * CHUNK)
                piece = os.pread(self._store, high - low, at * CHUNK + low - chunk * CHUNK)
                found[low - start : high - start] = piece.ljust(high - low, b"\0")
        return bytes(found)

    def kept_extents(self, inode: Inode) -> list[tuple[int, int]]:
        """The bytes that were kept."""
        kept = sorted(self._chunks.get(inode.number, ()))
        return [(chunk * CHUNK, (chunk + 1) * CHUNK) for chunk in kept]

    # -- the end -------------------------------------------------------------------------------

    def end(self) -> None:
        """Let go of all that was kept, and of who waits."""
        self.given_up = self.given_up or "it has ended"
        self._close_readers()
        if self._store >= 0:
            os.close(self._store)
            self._store = -1
        pinned, self._pinned = self._pinned, []
        for inode in pinned:
            self._inodes.unpin(inode)
        self._touched.close()
        self.ended.set()
        self.released.set()


def _read_all(fd: int, start: int, end: int) -> bytes:
    """Bytes of a file, of which holes may have been cut off. Raises OSError."""
    data = os.pread(fd, end - start, start)
    while len(data) < end - start:  # behind the end, or something cannot be read
        more = os.pread(fd, end - start - len(data), start + len(data))
        if not more:
            return data.ljust(end - start, b"\0")
        data += more
    return data


def _write_all(fd: int, data: bytes, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def xattrs_of(inode: Inode) -> dict[bytes, bytes]:
    """All extended attributes of an item that is held open."""
    return read_xattrs(inode.proc, follow=True) or {}
