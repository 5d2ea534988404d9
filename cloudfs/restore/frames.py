"""The blocks of one part: spans out of packs, frames out of spans, blocks out of frames.

Parts name their spans, so a worker fetches each with one request and holds a single one, beside a
few decoded frames: memory does not depend on what is restored. Whatever lies in no span, or in one
that came damaged, goes the way of the view.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence

from cloudfs.core.errors import Damaged
from cloudfs.core.rows import Location
from cloudfs.repo.blocks import BlockReader
from cloudfs.restore.values import Span

FRAMES_KEPT_BYTES = 24 << 20


class Frames:
    """Reads blocks for one part. For one thread."""

    def __init__(self, reader: BlockReader, spans: Sequence[Span]) -> None:
        """``spans`` in order of pack and offset."""
        self._reader = reader
        self._spans = spans
        self._keys = [(span.pack, span.offset) for span in spans]
        self._data: tuple[Span, memoryview] | None = None
        self._frames: OrderedDict[tuple[bytes, int], bytes] = OrderedDict()
        self._size = 0

    def block(self, location: Location) -> memoryview:
        """One block, verified. Raises Damaged, StoreError."""
        frame = self._frames.get(location[:2])
        if frame is None:
            frame = self._load(location)
        block = memoryview(frame)[location.offset : location.offset + location.length]
        self._reader.verify(location, block)
        return block

    def _load(self, location: Location) -> bytes:
        pack, offset, length = location[:3]
        span = self._span(pack, offset, length)
        if span is None:
            return self._reader.frame(pack, offset, length)
        try:
            if self._data is None or self._data[0] is not span:
                self._data = None  # the old one is freed before the new one comes
                data = self._reader.span(span.pack, span.offset, span.length)
                self._data = span, memoryview(data)
            start = offset - span.offset
            frame = self._reader.open_frame(pack, offset, self._data[1][start : start + length])
        except Damaged:
            # Perhaps only a part of the span is: what is sound is still to be restored.
            return self._reader.frame(pack, offset, length)
        self._frames[pack, offset] = frame
        self._size += len(frame)
        while self._size > FRAMES_KEPT_BYTES and len(self._frames) > 1:
            self._size -= len(self._frames.popitem(last=False)[1])
        return frame

    def _span(self, pack: bytes, offset: int, length: int) -> Span | None:
        index = bisect_right(self._keys, (pack, offset)) - 1
        if index < 0:
            return None
        span = self._spans[index]
        if span.pack == pack and offset + length <= span.offset + span.length:
            return span
        return None
