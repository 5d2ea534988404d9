"""The plan of a restore: what goes where, cut into parts. A pure value; a dry run prints it.

1. The names below the start are laid out first: directories in an order in which each comes after
   its parent, every other LIN under its first name, further names as links. What no file system
   could have named so (a name with a slash, a directory with two names) is refused here, before
   anything is written.
2. Metadata and block rows come in the order of LINs and are joined to the names. A file becomes an
   *item* that is written whole, unless it is large or its blocks lie far apart: then it becomes
   *pieces*, runs of blocks that lie in one frame, which are written at their places in any order.
3. Items and pieces are ordered by where their (first) block lies, and cut into *parts* of some
   work each. So each frame is fetched and decoded by one part, but for the one at a cut.
4. The frames of a part are merged into *spans*: what is fetched by one request.

Items and pieces are encoded as they are made, so that the plan of a million files stays small and
a part travels to its worker as the bytes that it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import msgspec

from cloudfs.core.errors import Damaged
from cloudfs.core.rows import (
    BASE_BLOCKS,
    DELETED_TYPES,
    LOCATION,
    NO_PACK,
    BlockRow,
    ItemType,
    Meta,
)
from cloudfs.restore.check import check_meta
from cloudfs.restore.layout import Layout
from cloudfs.restore.parts import MAX_SPAN, Work, cut
from cloudfs.restore.values import LOCKING_FLAGS, Frame, Item, Piece, Plan

MAX_STORED_FRAME = 65 << 20
WHOLE_BYTES = 32 << 20
"""Files with more data than this are written in pieces, by several workers."""

_encode = msgspec.msgpack.Encoder().encode


class Planner:
    """Joins rows to names. Feed it with :meth:`join`, then take :meth:`plan`."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._plan = Plan(layout.directories, layout.links)
        self._works: list[Work] = []
        self._at: tuple[bytes, int] = (b"", 0)

    def join(self, metas: Iterable[Meta], rows: Iterable[BlockRow]) -> None:
        """Take metadata and block rows in force, both in order of LINs; others may be among them.

        Raises Damaged where a name has no metadata or one of another type.
        """
        places, index_of = self._layout.places, self._layout.index_of
        blocks = iter(rows)
        row = next(blocks, None)
        for meta in metas:
            lin = meta.lin
            if meta.type in DELETED_TYPES:
                continue
            place = places.pop(lin, None)
            if place is None:
                index = index_of.pop(lin, None)
                if index is not None:
                    check_meta(meta, ItemType.DIRECTORY)
                    self._plan.directories[index].meta = meta
                continue
            check_meta(meta, place[2])
            bases = []
            while row is not None and row.lin <= lin:
                if row.lin == lin and row.locs:
                    bases.append((row.base, row.locs))
                row = next(blocks, None)
            self._count(place[0], place[1], meta)
            self._add(place[0], place[1], meta, bases)
        for lin in (*places, *index_of):
            raise Damaged(f"the tables are damaged (LIN {lin} has a name but no metadata).")

    def _add(self, directory: int, name: bytes, meta: Meta, bases: list[tuple[int, bytes]]) -> None:
        frames: Sequence[Frame] = ()
        size = 0
        if bases and meta.type == ItemType.REGULAR:
            frames, blocks = _frames(bases)
            size = min(blocks * meta.block_size, meta.size)
            if frames:
                self._at = frames[0][:2]
                if size > WHOLE_BYTES or (len(frames) > 1 and _far_apart(frames)):
                    self._split(directory, name, meta, bases)
                    return
        # What has no blocks goes with its neighbours, whose directory is open.
        self._put(self._at, size, frames, Item(directory, name, meta, bases))

    def _count(self, directory: int, name: bytes, meta: Meta) -> None:
        totals = self._plan.totals
        if meta.type == ItemType.REGULAR:
            totals.files += 1
            totals.size += meta.size
            if meta.flags & LOCKING_FLAGS:
                self._plan.locked.append((directory, name, meta.flags))
        elif meta.type == ItemType.SYMLINK:
            totals.symlinks += 1
        else:
            totals.others += 1

    def _put(
        self, at: tuple[bytes, int], size: int, frames: Sequence[Frame], work: Item | Piece
    ) -> None:
        turn = len(self._works)
        self._works.append(Work(*at, turn, work.directory, size, frames, _encode(work)))

    def _split(
        self, directory: int, name: bytes, meta: Meta, bases: list[tuple[int, bytes]]
    ) -> None:
        self._plan.split.append(Item(directory, name, meta))
        for first, frame, locs in _runs(bases):
            size = len(locs) // LOCATION.size * meta.block_size
            work = Piece(directory, name, meta.size, meta.block_size, meta.sparse, first, locs)
            self._put(frame[:2], size, (frame,), work)

    def plan(self, workers: int) -> Plan:
        """Order and cut what was joined; ``workers`` is how many will share it."""
        plan, totals = self._plan, self._plan.totals
        self._works.sort()
        plan.parts = list(cut(self._works, plan.directories, workers))
        self._works = []
        spans = [span for part in plan.parts for span in part.spans]
        totals.dirs = len(plan.directories) - 1
        totals.links = len(plan.links)
        totals.packs = len({span.pack for span in spans})
        totals.requests = len(spans)
        totals.stored = sum(span.length for span in spans)
        return plan


def _frames(bases: list[tuple[int, bytes]]) -> tuple[Sequence[Frame], int]:
    """The frames of a file in the order of its blocks, and how many blocks have data."""
    if len(bases) == 1 and len(bases[0][1]) == LOCATION.size:
        fields = LOCATION.unpack(bases[0][1])  # most files have a single block
        if fields[0] == NO_PACK:
            return (), 0
        _check_frame(fields[2])
        return (fields[:3],), 1
    found: dict[Frame, None] = {}
    data = 0
    for base, locs in bases:
        if len(locs) % LOCATION.size or len(locs) > BASE_BLOCKS * LOCATION.size:
            raise Damaged(f"the tables are damaged (base {base} of a file cannot be read).")
        for fields in LOCATION.iter_unpack(locs):
            if fields[0] != NO_PACK:
                data += 1
                found[fields[:3]] = None
    for frame in found:
        _check_frame(frame[2])
    return tuple(found), data


def _check_frame(length: int) -> None:
    if length > MAX_STORED_FRAME:
        raise Damaged("the tables are damaged (a frame is larger than any can be).")


def _far_apart(frames: Sequence[Frame]) -> bool:
    low = min(frame[1] for frame in frames)
    high = max(frame[1] + frame[2] for frame in frames)
    return high - low > MAX_SPAN or any(frame[0] != frames[0][0] for frame in frames)


def _runs(bases: list[tuple[int, bytes]]) -> Iterator[tuple[int, Frame, bytes]]:
    """(first block, frame, records) of neighbouring blocks that lie in one frame."""
    first, frame, locs = 0, (b"", 0, 0), bytearray()
    for base, records in bases:
        for index, fields in enumerate(LOCATION.iter_unpack(records)):
            block = base * BASE_BLOCKS + index
            here: Frame = fields[:3]
            if here != frame or block != first + len(locs) // LOCATION.size:
                if locs:
                    yield first, frame, bytes(locs)
                first, frame, locs = block, here, bytearray()
            if here[0] != NO_PACK:
                locs += records[index * LOCATION.size : (index + 1) * LOCATION.size]
    if locs:
        yield first, frame, bytes(locs)
