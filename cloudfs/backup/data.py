"""From a file's bytes to blocks in a packer: the loop in which a backup spends its time.

1. A block is read straight into the packer's buffer and hashed there. If the file had the same
   block at the same place before, its old location is taken over and the buffer keeps nothing.
2. A base whose blocks are all as before gets no row. Bases that the file no longer has get a hole
   row, so that a file cut short and grown again shows nothing of its past.
3. Blocks that lie in holes are not read, and neither are those of which the change source says
   that they are as they were.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable

import xxhash

from cloudfs.backup.packs import Base, Packer, hole, new_base
from cloudfs.core.changelist import Range
from cloudfs.core.rows import BASE_BLOCKS, HOLE_RECORD, LOCATION
from cloudfs.repo.view import SnapshotView
from cloudfs.source.inode import Status, data_extents

_DIGEST = LOCATION.size - 16  # where the digest stands in a location record
_LENGTH = LOCATION.size - 20
_NO_END = 2**40

Extents = Callable[[int, int], list[Range]]
Adopted = Callable[[Status], dict[int, bytes]]


class FileData:
    """One reading of one file's data."""

    def __init__(
        self,
        fd: int,
        status: Status,
        lin: int,
        base_lin: int,
        ranges: list[Range] | None = None,
        extents: Extents = data_extents,
    ) -> None:
        """``ranges``: the bytes that can be others than before (sorted); None for all. ``extents``
        tells where a sparse file of some size has data."""
        self.fd = fd
        self.status = status
        self.lin = lin
        self.base_lin = base_lin
        self.own = base_lin == lin  # what is known from before is this file's own past
        self.old_size = -1  # in bytes, where it was looked up
        self.torn = False  # the file was shorter than it said
        self.before: dict[int, bytes] = {}  # location records by base
        self.offered: dict[int, bytes] = {}  # the same, from a sync that did not end
        sparse = status.allocated < status.size
        self._extents = extents(fd, status.size) if sparse else None
        self._starts = [start for start, _ in self._extents or ()]
        self._ranges = ranges if self.own else None
        self._changes = [start for start, _ in self._ranges or ()]

    def has_data(self, first: int, count: int, block_size: int) -> bool:
        """Whether any data lies in ``count`` blocks from block ``first`` on."""
        if self._extents is None:
            return True
        low, high = first * block_size, (first + count) * block_size
        return _meets(self._extents, self._starts, low, high)

    def unchanged(self, first: int, count: int, block_size: int) -> bool:
        """Whether a source told that nothing changed in ``count`` blocks."""
        if self._ranges is None:
            return False
        low, high = first * block_size, (first + count) * block_size
        return not _meets(self._ranges, self._changes, low, high)

    def kept(self, old: bytes, first: int, count: int, block_size: int) -> bool:
        """Whether ``count`` blocks from block ``first`` on are surely as ``old``, their records,
        says: a source told that nothing in them changed, and they are as long as they were."""
        if len(old) != count * LOCATION.size or not self.unchanged(first, count, block_size):
            return False
        last = old[-LOCATION.size :]
        end = min((first + count) * block_size, self.status.size)
        length = end - (first + count - 1) * block_size
        return last == HOLE_RECORD or last[_LENGTH:_DIGEST] == length.to_bytes(4, "little")


def _meets(ranges: list[Range], starts: list[int], low: int, high: int) -> bool:
    """Whether any of these sorted ranges has a byte from ``low`` to before ``high``."""
    at = bisect_left(starts, high) - 1  # the last one that starts before the end
    return at >= 0 and ranges[at][1] > low


class DataReader:
    """Reads files into a packer's buffer. For one thread."""

    def __init__(
        self,
        packer: Packer,
        block_size: int,
        digest_seed: int,
        view: SnapshotView | None,
        adopted: Adopted | None,
    ) -> None:
        """``view`` is the last snapshot, ``adopted`` looks up what unfinished syncs stored."""
        self._packer = packer
        self._block_size = block_size
        self._seed = digest_seed
        self._view = view
        self._adopted = adopted
        self.bytes_read = 0
        self.packs_adopted: set[bytes] = set()

    @property
    def adopting(self) -> bool:
        """Whether blocks may be known from a sync that did not end."""
        return self._adopted is not None

    def read(self, data: FileData, part: tuple[int, int] | None) -> list[Base]:
        """Read the blocks of a file, or of the bases of one part; returns the bases that differ."""
        size, block_size = data.status.size, self._block_size
        first, count = part or (0, 0)
        bases = -(-size // (block_size * BASE_BLOCKS))
        last = min(bases, first + count) if count else bases
        self._recall(data, first, last if count else _NO_END)
        changed: list[Base] = []
        for number in range(first, last):
            start = number * BASE_BLOCKS
            blocks = min(BASE_BLOCKS, -(-size // block_size) - start)
            old = data.before.pop(number, b"")
            if data.kept(old, start, blocks, block_size):
                continue
            if not old and self._stays_hole(data, start, blocks):
                continue
            if not data.has_data(start, blocks, block_size):
                if old and data.own:
                    changed.append(Base(data.lin, number, []))
                continue
            base = new_base(data.lin, number, blocks)
            self._blocks(data, base, start, old)
            # A record that is still empty waits for its frame: a block that was not there before.
            kept = b"" not in base.records and b"".join(base.records) == old
            if not (data.own and kept):
                changed.append(base)
        if data.own:
            changed.extend(_gone(data.lin, data.before))
        return changed

    def _recall(self, data: FileData, first: int, last: int) -> None:
        """Look up what blocks the file, or the one it replaced, is known to have had."""
        if data.base_lin and self._view is not None:
            rows = self._view.block_rows(data.base_lin, first, last - 1)
            data.before = {number: row.locs for number, row in rows.items()}
        if self._adopted is not None:
            data.offered = self._adopted(data.status)

    def _blocks(self, data: FileData, base: Base, start: int, old: bytes) -> None:
        """Read the blocks of one base and place each: where it lay before, or in the packer."""
        packer, block_size, seed = self._packer, self._block_size, self._seed
        size, offered = data.status.size, data.offered.get(base.number, b"")
        for index in range(len(base.records)):
            offset = (start + index) * block_size
            length = min(block_size, size - offset)
            place = slice(index * LOCATION.size, (index + 1) * LOCATION.size)
            if data.kept(old[place], start + index, 1, block_size):
                base.records[index] = old[place]
                continue
            if not data.has_data(start + index, 1, block_size) or (
                not old and self._stays_hole(data, start + index, 1)
            ):
                hole(base, index)
                continue
            target = packer.room(length)
            got = os.preadv(data.fd, [target], offset)
            if got != length:
                got = _read_on(data.fd, target, offset, got)
                data.torn |= got != length
                target[got:] = bytes(length - got)
            self.bytes_read += got
            digest = xxhash.xxh3_128_digest(target, seed)
            if is_block(old[place], length, digest):
                base.records[index] = old[place]
            elif offered and is_block(offered[place], length, digest):
                base.records[index] = offered[place]
                self.packs_adopted.add(offered[place][:16])
            else:
                packer.keep(base, index, length, digest)

    def _stays_hole(self, data: FileData, first: int, count: int) -> bool:
        """Whether ``count`` blocks without records are surely the hole that they were: a source
        told that nothing in them changed, and the file reached beyond them already.

        What lies there now may be younger than what is backed up, where that is a tree that stands
        frozen: of it nothing was kept but what the source told.
        """
        if not data.unchanged(first, count, self._block_size):
            return False
        if data.old_size < 0:
            meta = self._view.meta(data.lin) if data.own and self._view is not None else None
            data.old_size = meta.size if meta is not None else 0
        return min((first + count) * self._block_size, data.status.size) <= data.old_size

    def take_small(self, block: memoryview, lin: int, base_lin: int) -> list[Base]:
        """Take a file of at most one block, read into the packer's room; as :meth:`read` does."""
        own, size = base_lin == lin, len(block)
        before: dict[int, bytes] = {}
        if base_lin and self._view is not None:
            before = {number: row.locs for number, row in self._view.block_rows(base_lin).items()}
        changed: list[Base] = []
        if size:
            self.bytes_read += size
            old = before.pop(0, b"")
            record = old[: LOCATION.size]
            digest = xxhash.xxh3_128_digest(block, self._seed)
            base = Base(lin, 0, [b""])
            known = is_block(record, size, digest)
            if known:
                base.records[0] = record
            else:
                self._packer.keep(base, 0, size, digest)
            if not (own and known and record == old):
                changed.append(base)
        return changed + (_gone(lin, before) if own else [])


def _gone(lin: int, before: dict[int, bytes]) -> list[Base]:
    """Hole rows for the bases that a file had and has no more."""
    return [Base(lin, number, []) for number, old in sorted(before.items()) if old]


def is_block(record: bytes, length: int, digest: bytes) -> bool:
    """Whether a location record is that of a block of this length and digest."""
    return record[_DIGEST:] == digest and record[_LENGTH:_DIGEST] == length.to_bytes(4, "little")


def _read_on(fd: int, target: memoryview, offset: int, got: int) -> int:
    """Go on after a short read, to the end of ``target`` or the file; returns all bytes read."""
    while got < len(target):
        step = os.preadv(fd, [target[got:]], offset + got)
        if not step:
            break
        got += step
    return got
