"""Making items below the target: the loop in which a restore spends its time.

1. Everything is made relative to the descriptor of its directory, exclusively, and without
   following what may be there already.
2. A file that cannot be written whole is removed: what a restore leaves is what was backed up.
   Where only metadata cannot be given, the item stays and is reported.
3. Holes are not written. Of a file that had holes neither are runs of zeros, which may have been
   part of one.
"""

from __future__ import annotations

import contextlib
import os
import stat as st
from collections.abc import Iterator, Mapping

from cloudfs.core.changes import MODES
from cloudfs.core.errors import Damaged
from cloudfs.core.rows import BASE_BLOCKS, LOCATION, NO_PACK, ItemType, Location, Meta
from cloudfs.restore.directories import Directories
from cloudfs.restore.frames import Frames
from cloudfs.restore.metadata import Dresser, set_flags
from cloudfs.restore.values import Item, Piece

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_AGAIN = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_ZERO_STEP = 4096
_ZEROS = bytes(_ZERO_STEP)

Xattrs = Mapping[bytes, bytes] | None


class Writer:
    """Makes items. For one thread."""

    def __init__(self, directories: Directories, dresser: Dresser) -> None:
        self._directories = directories
        self._dresser = dresser
        self._open: tuple[int, bytes, int] | None = None  # the file that pieces go to

    # -- items ---------------------------------------------------------------------------------

    def item(self, item: Item, xattrs: Xattrs, frames: Frames) -> None:
        """Make one item whole. Raises OSError, Damaged, StoreError."""
        meta = item.meta
        directory = self._directories.open(item.directory)
        if meta.type != ItemType.REGULAR:
            self._special(directory, item.name, meta)
            self._dresser.name(directory, item.name, meta, xattrs)
            return
        fd = os.open(item.name, _CREATE, 0o600, dir_fd=directory)
        try:
            try:
                if meta.flags:
                    with contextlib.suppress(OSError):  # said when they are set for good
                        set_flags(fd, meta.flags, locking=False)
                _fill(fd, meta, item.bases, frames)
            except BaseException:
                os.unlink(item.name, dir_fd=directory)
                raise
            self._dresser.file(fd, meta, xattrs)
            if meta.flags:
                set_flags(fd, meta.flags, locking=False)
        finally:
            os.close(fd)

    @staticmethod
    def _special(directory: int, name: bytes, meta: Meta) -> None:
        if meta.type == ItemType.SYMLINK:
            os.symlink(meta.target, name, dir_fd=directory)
            return
        mode = MODES[meta.type] | 0o600
        device = meta.rdev if st.S_ISCHR(mode) or st.S_ISBLK(mode) else 0
        os.mknod(name, mode, device, dir_fd=directory)

    # -- files in pieces -----------------------------------------------------------------------

    def begin(self, item: Item) -> None:
        """Make a file of its full size without data, to be filled by pieces. Raises OSError."""
        directory = self._directories.open(item.directory)
        fd = os.open(item.name, _CREATE, 0o600, dir_fd=directory)
        try:
            if item.meta.flags:
                with contextlib.suppress(OSError):
                    set_flags(fd, item.meta.flags, locking=False)
            os.ftruncate(fd, item.meta.size)
        finally:
            os.close(fd)

    def piece(self, piece: Piece, frames: Frames) -> None:
        """Write a piece at its place. Raises OSError, Damaged, StoreError."""
        key = (piece.directory, piece.name)
        if self._open is None or self._open[:2] != key:
            self.close()
            directory = self._directories.open(piece.directory)
            self._open = (*key, os.open(piece.name, _AGAIN, dir_fd=directory))
        fd = self._open[2]
        found = _blocks(piece.size, piece.block_size, piece.first_block, piece.locs)
        for offset, location in found:
            _put(fd, offset, frames.block(location), sparse=piece.sparse)

    def finish(self, item: Item, xattrs: Xattrs) -> None:
        """Give a file in pieces its metadata. Raises OSError."""
        directory = self._directories.open(item.directory)
        fd = os.open(item.name, _AGAIN, dir_fd=directory)
        try:
            self._dresser.file(fd, item.meta, xattrs)
            set_flags(fd, item.meta.flags, locking=False)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close the file that pieces went to."""
        if self._open is not None:
            os.close(self._open[2])
            self._open = None


def _fill(fd: int, meta: Meta, bases: list[tuple[int, bytes]], frames: Frames) -> None:
    end = 0
    for base, locs in bases:
        first = base * BASE_BLOCKS
        for offset, location in _blocks(meta.size, meta.block_size, first, locs):
            end = _put(fd, offset, frames.block(location), sparse=meta.sparse)
    if end < meta.size:
        os.ftruncate(fd, meta.size)


def _blocks(size: int, block_size: int, first: int, locs: bytes) -> Iterator[tuple[int, Location]]:
    """(offset in the file, location) of each block that is no hole. Raises Damaged."""
    offset = first * block_size
    for fields in LOCATION.iter_unpack(locs):
        if fields[0] != NO_PACK:
            location = Location(*fields)
            if location.length != min(block_size, size - offset):
                raise Damaged("the tables are damaged (a block has not the length it must have).")
            yield offset, location
        offset += block_size


def _put(fd: int, offset: int, block: memoryview, *, sparse: bool) -> int:
    """Write a block; returns the offset at which what was written ends."""
    if not sparse:
        return _pwrite(fd, offset, block)
    data, end, start = bytes(block), 0, 0
    while start < len(data):
        if _zeros_at(data, start):
            start += _ZERO_STEP
            continue
        stop = start + _ZERO_STEP
        while stop < len(data) and not _zeros_at(data, stop):
            stop += _ZERO_STEP
        end = _pwrite(fd, offset + start, block[start:stop])
        start = stop
    return end


def _zeros_at(data: bytes, start: int) -> bool:
    """Whether the step from ``start`` on, or what is left of it, is zero."""
    return data.startswith(_ZEROS[: len(data) - start], start)


def _pwrite(fd: int, offset: int, data: memoryview) -> int:
    done = os.pwrite(fd, data, offset)
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
    return offset + len(data)
