"""Reading rows: pages of segments, through memory and the local cache, out of the store.

1. A page is looked for among the decoded pages in memory, then among the sealed bytes in the
   local cache, then in the store. Whatever is fetched is kept in the cache.
2. A request brings MIN_SPAN of pages, as the time of one is spent on waiting up to there. Who
   misses where the last span ended is reading the table through: the span doubles with each such
   miss, up to MAX_SPAN.
3. In a run the segments do not overlap; the page that holds the greatest key not above (k, S)
   is found by bisection over the segments' ranges and then over the footer.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator

from cloudfs.core.errors import Damaged, NotFound
from cloudfs.core.manifest import Run, SegmentRef
from cloudfs.core.rows import Key, Row, Table, key_function
from cloudfs.db.cache import BlobCache
from cloudfs.format import names
from cloudfs.format.envelope import Keyring, Kind, Sealer
from cloudfs.format.tables import (
    Footer,
    Page,
    PageRef,
    Section,
    decode_page,
    read_footer,
    sealed_rows,
)
from cloudfs.store.base import Store

MIN_SPAN = 128 << 10
MAX_SPAN = 8 << 20
DECODED_PAGES = 96

PageId = tuple[bytes, int, int]


class TableReader:
    """Pages and footers of one policy's segments. Safe to share between threads."""

    def __init__(self, store: Store, keyring: Keyring, cache: BlobCache, policy_id: str) -> None:
        self._store = store
        self._keyring = keyring
        self._cache = cache
        self._policy_id = policy_id
        self._lock = threading.Lock()
        self._footers: dict[bytes, Footer] = {}
        self._sealers: dict[bytes, Sealer] = {}
        self._pages: OrderedDict[PageId, list[Row]] = OrderedDict()
        self._streaks: dict[tuple[bytes, int], tuple[int, int]] = {}

    def sealer(self, segment: SegmentRef) -> Sealer:
        """What opens the parts of a segment."""
        found = self._sealers.get(segment.name)
        if found is None:
            name = names.segment(self._policy_id, segment.name)
            found = self._sealers[segment.name] = self._keyring.sealer(Kind.SEGMENT, name)
        return found

    def section(self, segment: SegmentRef, table: Table) -> Section | None:
        """The pages of one table in a segment; None where it has none."""
        if int(table) not in segment.tables:
            return None
        footer = self._footers.get(segment.name)
        if footer is None:
            footer = self._footers[segment.name] = self._read_footer(segment)
        return footer.get(int(table))

    def _read_footer(self, segment: SegmentRef) -> Footer:
        key = segment.name + b"footer"
        sealer = self.sealer(segment)
        data = self._cache.get(key)
        if data is not None:
            try:
                return read_footer(sealer, segment.size, data)
            except Damaged:
                self._cache.discard(key)
        data = self._get(sealer.name, segment.size - segment.tail_size, segment.tail_size)
        footer = read_footer(sealer, segment.size, data)
        self._cache.put([(key, data)])
        return footer

    def _get(self, name: str, offset: int, length: int) -> bytes:
        try:
            data = self._store.get(name, offset, length)
        except NotFound:
            raise Damaged(f"{name} is missing from {self._store.url}.") from None
        if len(data) != length:
            raise Damaged(f"{name} is damaged (cut short).")
        return data

    def page(self, segment: SegmentRef, table: Table, index: int) -> list[Row]:
        """The rows of one page. Not to be changed by the caller."""
        page_id = (segment.name, int(table), index)
        with self._lock:
            rows = self._pages.get(page_id)
            if rows is not None:
                self._pages.move_to_end(page_id)
                return rows
        rows = self._load(segment, table, index)
        with self._lock:
            self._pages[page_id] = rows
            while len(self._pages) > DECODED_PAGES:
                self._pages.popitem(last=False)
        return rows

    def _load(self, segment: SegmentRef, table: Table, index: int) -> list[Row]:
        section = self.section(segment, table)
        assert section is not None
        ref, sealer = section.pages[index], self.sealer(segment)
        key = cache_key(segment.name, ref)
        sealed = self._cache.get(key)
        if sealed is not None:
            try:
                return sealed_rows(sealer, table, ref, sealed)
            except Damaged:
                self._cache.discard(key)
        return sealed_rows(sealer, table, ref, self._fetch(segment, table, section, index))

    def _fetch(self, segment: SegmentRef, table: Table, section: Section, index: int) -> bytes:
        """Fetch a page, and as many after it as the reader's habit suggests (rule 2)."""
        expected, span = self._streaks.get((segment.name, int(table)), (-1, MIN_SPAN))
        span = min(span * 2, MAX_SPAN) if index == expected else MIN_SPAN
        refs = [section.pages[index]]
        length = refs[0].length
        for ref in section.pages[index + 1 :]:
            if length + ref.length > span:
                break
            refs.append(ref)
            length += ref.length
        data = self._get(self.sealer(segment).name, refs[0].offset, length)
        # Only now: a request that failed, or was refused, is sent again with the same span.
        self._streaks[segment.name, int(table)] = (index + len(refs), max(span, length))
        start = refs[0].offset
        parts = [data[ref.offset - start :][: ref.length] for ref in refs]
        self._cache.put(
            (cache_key(segment.name, ref), part) for ref, part in zip(refs, parts, strict=True)
        )
        return parts[0]

    # -- rows of one run -------------------------------------------------------------------

    def at_or_before(
        self, run: Run, table: Table, key: Key
    ) -> tuple[SegmentRef, int, list[Row]] | None:
        """The page that holds the greatest key not above ``key``, if the run has one."""
        for segment in reversed(run.segments):
            span = segment.tables.get(int(table))
            if span is None or span.first > key:
                continue
            section = self.section(segment, table)
            assert section is not None
            index = section.find(key)
            return segment, index, self.page(segment, table, index)
        return None

    def between(self, run: Run, table: Table, low: Key, high: Key) -> Iterator[Row]:
        """The rows of a run with low <= key < high, in key order."""
        for segment in run.segments:
            span = segment.tables.get(int(table))
            if span is None or span.last < low or span.first >= high:
                continue
            section = self.section(segment, table)
            assert section is not None
            for index in range(max(section.find(low), 0), len(section.pages)):
                if section.pages[index].first >= high:
                    return
                yield from _cut(table, self.page(segment, table, index), low, high)

    def all_rows(self, run: Run, table: Table) -> Iterator[Row]:
        """All rows of a run in key order, fetched in large spans; pages are not kept in memory."""
        for segment in run.segments:
            section = self.section(segment, table)
            if section is None:
                continue
            name = self.sealer(segment).name
            for _, coded in self._stream(segment, section.pages):
                yield from decode_page(table, coded, name)

    def coded_pages(self, run: Run) -> Iterator[Page]:
        """All pages of a run as they can go into another segment, by table and key."""
        for segment in run.segments:
            for table in Table:
                section = self.section(segment, table)
                for ref, coded in self._stream(segment, section.pages) if section else ():
                    yield Page(table, ref.first, ref.last, ref.rows, coded)

    def _stream(self, segment: SegmentRef, pages: list[PageRef]) -> Iterator[tuple[PageRef, bytes]]:
        """Each page as it was coded; those the cache lacks come by MAX_SPAN a request."""
        sealer = self.sealer(segment)
        start = 0
        while start < len(pages):
            ref = pages[start]
            coded = self._cached(segment, ref)
            if coded is not None:
                yield ref, coded
                start += 1
                continue
            stop, length = start, 0
            while stop < len(pages) and (stop == start or length + pages[stop].length <= MAX_SPAN):
                length += pages[stop].length
                stop += 1
            data = memoryview(self._get(sealer.name, ref.offset, length))
            parts = [
                (p, bytes(data[p.offset - ref.offset :][: p.length])) for p in pages[start:stop]
            ]
            self._cache.put((cache_key(segment.name, p), part) for p, part in parts)
            for p, part in parts:
                yield p, sealer.open(p.offset, part)
            start = stop

    def _cached(self, segment: SegmentRef, ref: PageRef) -> bytes | None:
        """A page as it was coded out of the cache; None where that lacks it or has it damaged."""
        key = cache_key(segment.name, ref)
        sealed = self._cache.get(key)
        if sealed is None:
            return None
        try:
            return self.sealer(segment).open(ref.offset, sealed)
        except Damaged:
            self._cache.discard(key)
            return None


def _cut(table: Table, rows: list[Row], low: Key, high: Key) -> list[Row]:
    key = key_function(table)
    start = bisect_left(rows, low, key=key) if key(rows[0]) < low else 0
    stop = bisect_left(rows, high, lo=start, key=key) if key(rows[-1]) >= high else len(rows)
    return rows[start:stop]


def cache_key(segment_name: bytes, ref: PageRef) -> bytes:
    """The name of a page in the local cache."""
    return segment_name + ref.offset.to_bytes(8, "big")
