"""From the pages that workers made to segments in the store, and from many runs to few.

1. Pages of the new snapshot are spooled to a temporary file as they come; only their first and
   last keys stay in memory.
2. Workers of neighbouring assignments make pages that do not overlap, so most pages go into the
   segment as they are. Where pages do overlap (an incremental touches LINs anywhere) their rows are
   merged and encoded again.
3. A run is cut into segments of SEGMENT_BYTES, so memory is bounded and a manifest alone tells
   which segment to ask.
4. Runs are merged when :func:`cloudfs.core.manifest.runs_to_merge` says so; the merge reads and
   writes runs as streams. The old segments stay until nothing can need them.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import merge as heap_merge
from pathlib import Path

from cloudfs.core.manifest import Run, SegmentRef, runs_to_merge
from cloudfs.core.rows import Key, Row, Table, key_function
from cloudfs.format import names
from cloudfs.format.envelope import ID_SIZE, Kind
from cloudfs.format.tables import (
    Page,
    PageRef,
    TableFileWriter,
    decode_page,
    encode_pages,
    file_header,
)
from cloudfs.repo.history import History
from cloudfs.repo.repository import Repository
from cloudfs.repo.tables import cache_key
from cloudfs.store.base import Buffer

SEGMENT_BYTES = 24 << 20
_ROWS_AT_ONCE = 4096
_SORTED_AT_ONCE = 256 * 1024
"""Rows that are merged in memory; more of them are merged as streams."""


@dataclass(slots=True)
class _Spooled:
    first: Key
    last: Key
    rows: int
    offset: int
    length: int


class PageSpool:
    """Pages of one sync, on disk until they are put in order."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=directory, prefix="pages-")  # noqa: SIM115
        self._pages: dict[Table, list[_Spooled]] = {table: [] for table in Table}
        self._end = 0

    def add(self, pages: Iterable[Page]) -> None:
        """Keep encoded pages."""
        for page in pages:
            self._file.write(page.coded)
            spooled = _Spooled(page.first, page.last, page.rows, self._end, len(page.coded))
            self._pages[Table(page.table)].append(spooled)
            self._end += len(page.coded)

    def add_rows(self, table: Table, rows: list[Row]) -> None:
        """Keep sorted rows."""
        self.add(encode_pages(table, rows))

    def __bool__(self) -> bool:
        return any(self._pages.values())

    def _read(self, spooled: _Spooled) -> bytes:
        self._file.seek(spooled.offset)
        return self._file.read(spooled.length)

    def ordered(self) -> Iterator[Page]:
        """All pages by table and key, overlapping ones merged."""
        for table in Table:
            pages = sorted(self._pages[table], key=lambda page: page.first)
            group: list[_Spooled] = []
            last: Key = ()
            for page in pages:
                if group and page.first > last:
                    yield from self._merged(table, group)
                    group, last = [], ()
                group.append(page)
                last = max(last, page.last)
            if group:
                yield from self._merged(table, group)

    def _merged(self, table: Table, group: list[_Spooled]) -> Iterator[Page]:
        if len(group) == 1:
            page = group[0]
            yield Page(table, page.first, page.last, page.rows, self._read(page))
            return
        # Pages of one worker are in order: as few streams as possible, each a chain of pages.
        streams: list[list[_Spooled]] = []
        for page in group:
            for stream in streams:
                if stream[-1].last < page.first:
                    stream.append(page)
                    break
            else:
                streams.append([page])
        sources = [self._rows(table, stream) for stream in streams]
        if sum(page.rows for page in group) <= _SORTED_AT_ONCE:
            # The sort finds the sorted pieces by itself and merges them in C.
            everything = [row for source in sources for row in source]
            everything.sort(key=key_function(table))
            yield from encode_pages(table, everything)
        else:
            yield from pages_of(table, heap_merge(*sources, key=key_function(table)))

    def _rows(self, table: Table, pages: list[_Spooled]) -> Iterator[Row]:
        for page in pages:
            yield from decode_page(table, self._read(page), "spooled page")

    def close(self) -> None:
        """Free the room."""
        self._file.close()


def pages_of(table: Table, rows: Iterable[Row]) -> Iterator[Page]:
    """Encode a stream of sorted rows."""
    held: list[Row] = []
    for row in rows:
        held.append(row)
        if len(held) >= _ROWS_AT_ONCE:
            yield from encode_pages(table, held)
            held = []
    if held:
        yield from encode_pages(table, held)


class RunWriter:
    """Writes one run as segments; each is durable before the next begins."""

    def __init__(self, repository: Repository, policy_id: str) -> None:
        self._repository = repository
        self._policy_id = policy_id
        self.bytes_stored = 0

    def write(self, pages: Iterable[Page], first_snap: int, last_snap: int) -> Run:
        """Write all pages, which come by table and key."""
        segments: list[SegmentRef] = []
        tables: dict[Table, list[Page]] = {}
        size = 0
        for page in pages:
            tables.setdefault(Table(page.table), []).append(page)
            size += len(page.coded)
            if size >= SEGMENT_BYTES:
                segments.append(self._segment(tables))
                tables, size = {}, 0
        if tables:
            segments.append(self._segment(tables))
        return Run(first_snap, last_snap, segments)

    def _segment(self, tables: dict[Table, list[Page]]) -> SegmentRef:
        repository = self._repository
        segment_id = repository.entropy(ID_SIZE)
        name = names.segment(self._policy_id, segment_id)
        header = file_header(Kind.SEGMENT)
        writer = TableFileWriter(repository.keyring.sealer(Kind.SEGMENT, name), len(header))
        chunks: list[Buffer] = [header]
        sealed = [writer.page(page) for pages in tables.values() for page in pages]
        end, tail_size, whole = writer.finish()
        chunks.extend([*sealed, end])
        repository.store.put(name, chunks)
        refs = [ref for section in writer.footer.values() for ref in section.pages]
        self._cache(segment_id, end, zip(refs, sealed, strict=True))
        self.bytes_stored += len(header) + whole
        return SegmentRef(segment_id, len(header) + whole, tail_size, writer.ranges())

    def _cache(self, segment_id: bytes, end: bytes, pages: Iterable[tuple[PageRef, bytes]]) -> None:
        """What this machine wrote it need not fetch again."""
        cache = self._repository.local.cache(self._repository.id)
        items = [(cache_key(segment_id, ref), sealed) for ref, sealed in pages]
        cache.put([(segment_id + b"footer", end), *items])


def merge_runs(history: History, runs: list[Run], writer: RunWriter, spool_dir: Path) -> list[Run]:
    """Merge the newest runs as far as they are too many."""
    count = runs_to_merge([run.size for run in runs])
    if count < 2:
        return runs
    merging = runs[-count:]
    with contextlib.closing(PageSpool(spool_dir)) as spool:
        for run in merging:
            spool.add(history.tables.coded_pages(run))
        merged = writer.write(spool.ordered(), merging[0].first_snap, merging[-1].last_snap)
    return [*runs[:-count], merged]
