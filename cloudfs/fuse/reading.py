"""Open files: which blocks a read needs, whether they are at hand, and what will be wanted next.

1. :meth:`OpenFile.read` with ``wait=False`` answers only from frames that are in memory and raises
   WouldBlock otherwise; with ``wait=True`` it fetches. So a reader of small files, many of which
   share a frame, leaves the serving thread once a frame.
2. A reader that goes on where it stopped is reading the file through: the frames of the next
   AHEAD bytes are brought in the background, by several requests at once. The kernel's own
   read-ahead asks for several ranges side by side, so what lies a little off counts as going on.
3. What spans of a pack one request brings is decided below, in :mod:`cloudfs.repo.blocks`.
"""

from __future__ import annotations

from cloudfs.core.errors import Damaged
from cloudfs.core.rows import BASE_BLOCKS, Location, Meta
from cloudfs.fuse.patience import WouldBlock
from cloudfs.repo.view import SnapshotView

AHEAD = 8 << 20
"""Bytes of a file that are kept coming before they are asked for."""

NEAR = 4 << 20
"""How far from where a reader stopped the next read may begin to count as going on."""

STEP = 2 << 20
"""Reading ahead is begun anew only when it has fallen behind by this much."""

_ZEROS = memoryview(bytes(1 << 20))

Piece = bytes | memoryview


class OpenFile:
    """One open file. Methods may be called from several threads at once."""

    __slots__ = ("_ahead", "_base", "_expected", "_meta", "_reader", "_rows", "_view")

    def __init__(self, view: SnapshotView, meta: Meta) -> None:
        if meta.size > 0 and meta.block_size <= 0:
            raise Damaged(f"the tables are damaged (LIN {meta.lin} has no block size).")
        self._view = view
        self._reader = view.blocks_reader
        self._meta = meta
        self._base = (-1, list[Location | None]())  # the base last read, and its blocks
        self._expected = 0
        self._ahead = 0

    def read(self, offset: int, size: int, *, wait: bool) -> Piece:
        """The bytes from ``offset`` on; fewer than ``size`` only at the end of the file.

        Raises WouldBlock (see rule 1), Damaged, StoreError.
        """
        meta = self._meta
        size = min(size, meta.size - offset)
        if size <= 0:
            return b""
        block_size, end = meta.block_size, offset + size
        first, last = offset // block_size, (end - 1) // block_size
        located = self._located(first, last)
        has_frame = self._reader.has_frame
        if not wait:
            for loc in located:
                if loc is not None and not has_frame(loc.pack, loc.frame_offset):
                    raise WouldBlock
        pieces: list[Piece] = []
        for number, location in enumerate(located, start=first):
            start = number * block_size
            length = min(block_size, meta.size - start)
            low, high = max(offset - start, 0), min(end - start, length)
            if location is None:
                _append_zeros(pieces, high - low)
            else:
                pieces.append(self._block(location, length)[low:high])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def fetch(self, offset: int, size: int) -> Piece:
        """What :meth:`read` gives when it may wait."""
        return self.read(offset, size, wait=True)

    def _block(self, loc: Location, length: int) -> memoryview:
        if loc.length != length:
            raise Damaged(
                f"the tables are damaged (a block of LIN {self._meta.lin} has the wrong length)."
            )
        frame = self._reader.frame(loc.pack, loc.frame_offset, loc.frame_length)
        block = memoryview(frame)[loc.offset : loc.offset + length]
        self._reader.verify(loc, block)
        return block

    def _located(self, first: int, last: int) -> list[Location | None]:
        base = first // BASE_BLOCKS
        if last // BASE_BLOCKS != base:
            return self._view.blocks(self._meta.lin, first, last - first + 1)
        known, blocks = self._base
        if known != base:
            start = base * BASE_BLOCKS
            total = -(-self._meta.size // self._meta.block_size)
            count = min(BASE_BLOCKS, total - start)
            blocks = self._view.blocks(self._meta.lin, start, count)
            self._base = (base, blocks)
        start = base * BASE_BLOCKS
        return blocks[first - start : last - start + 1]

    # -- reading ahead ---------------------------------------------------------------------

    def wants_ahead(self, offset: int, size: int) -> bool:
        """Note a read; whether :meth:`read_ahead` should be called now."""
        going_on = abs(offset - self._expected) <= NEAR
        self._expected = end = offset + size
        if not going_on:
            self._ahead = end
            return False
        self._ahead = max(self._ahead, end)
        return min(end + AHEAD, self._meta.size) - self._ahead >= min(
            STEP, max(self._meta.size - self._ahead, 1)
        )

    def read_ahead(self) -> None:
        """Begin to bring what comes after the last read. Raises WouldBlock, Damaged, StoreError."""
        block_size = self._meta.block_size
        start, stop = self._ahead, min(self._expected + AHEAD, self._meta.size)
        if stop <= start:
            return
        first, last = start // block_size, (stop - 1) // block_size
        self._reader.prefetch(self._view.blocks(self._meta.lin, first, last - first + 1))
        self._ahead = stop


def _append_zeros(pieces: list[Piece], length: int) -> None:
    while length > len(_ZEROS):
        pieces.append(_ZEROS)
        length -= len(_ZEROS)
    pieces.append(_ZEROS[:length])
