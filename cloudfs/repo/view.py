"""One snapshot as a tree of rows: what the view, restore and every looking command read.

The row in force at S is the newest one at or before S; runs are looked through from the newest
to the oldest, and the first that has a row of the key at or before S has it (see
:mod:`cloudfs.core.manifest`, rule 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import merge as heap_merge
from typing import cast

from cloudfs.core.errors import Damaged, UsageError
from cloudfs.core.manifest import Run, SnapshotRecord
from cloudfs.core.rows import (
    BASE_BLOCKS,
    DELETED_TYPES,
    ROOT_LIN,
    STREAM_PREFIX,
    BlockRow,
    Entry,
    ItemType,
    Location,
    Meta,
    Row,
    Table,
    key_function,
    locations,
    newest_at,
)
from cloudfs.repo.blocks import BlockReader
from cloudfs.repo.tables import TableReader

MAX_LARGE_XATTR = 64 * 1024 * 1024
_MAPS_KEPT = 64


class SnapshotView:
    """One snapshot, read-only. Methods block where pages are missing; thread-safe."""

    def __init__(
        self, tables: TableReader, blocks: BlockReader, runs: Sequence[Run], record: SnapshotRecord
    ) -> None:
        self.record = record
        self.number = record.number
        self.blocks_reader = blocks
        self._tables = tables
        # Newest first, and only those that can speak of this snapshot.
        self._runs = [run for run in reversed(runs) if run.first_snap <= self.number]
        self._maps: dict[tuple[bytes, int], dict[int, Meta]] = {}

    # -- metadata --------------------------------------------------------------------------

    def meta(self, lin: int) -> Meta | None:
        """The metadata of a LIN; None where it does not exist in this snapshot."""
        key = (lin, self.number)
        for run in self._runs:
            found = self._tables.at_or_before(run, Table.METADATA, key)
            if found is None:
                continue
            segment, index, rows = found
            row = self._map(segment.name, index, rows).get(lin)
            if row is not None:
                return None if row.type in DELETED_TYPES else row
        return None

    def metas(self, lins: Sequence[int]) -> list[Meta | None]:
        """The metadata of many LINs, in their order; cheap for neighbours."""
        found: list[Meta | None] = []
        known: dict[int, Meta] = {}
        edge = 0  # the last LIN of the page at hand: a newer row of it may stand on the next page
        for lin in lins:
            if len(self._runs) != 1:
                found.append(self.meta(lin))
                continue
            row = known.get(lin) if lin != edge else None
            if row is None:
                page = self._tables.at_or_before(self._runs[0], Table.METADATA, (lin, self.number))
                if page is not None:
                    known = self._map(page[0].name, page[1], page[2])
                    edge = cast(Meta, page[2][-1]).lin
                row = known.get(lin)
            found.append(None if row is None or row.type in DELETED_TYPES else row)
        return found

    def _map(self, segment: bytes, index: int, rows: list[Row]) -> dict[int, Meta]:
        """The rows of a page in force at this snapshot, by LIN."""
        found = self._maps.get((segment, index))
        if found is None:
            if len(self._maps) >= _MAPS_KEPT:
                self._maps.clear()
            metas = cast("list[Meta]", rows)
            found = {row.lin: row for row in metas if row.snap <= self.number}
            self._maps[segment, index] = found
        return found

    # -- names -----------------------------------------------------------------------------

    def entries(self, parent: int) -> list[Entry]:
        """The names in a directory in force at this snapshot, in byte order."""
        return [entry for entry in self._entries(parent) if entry.type != ItemType.STREAM]

    def streams(self, lin: int) -> list[Entry]:
        """The large extended attributes of an item; their names begin with STREAM_PREFIX."""
        return [entry for entry in self._entries(lin) if entry.type == ItemType.STREAM]

    def _entries(self, parent: int) -> list[Entry]:
        low, high = (parent,), (parent + 1,)
        if len(self._runs) == 1:
            rows = self._tables.between(self._runs[0], Table.ENTRIES, low, high)
            return [
                entry
                for entry in cast("Iterator[Entry]", newest_at(rows, self.number))
                if entry.lin
            ]
        found: dict[bytes, Entry] = {}
        for run in self._runs:
            rows = self._tables.between(run, Table.ENTRIES, low, high)
            for row in cast("Iterator[Entry]", newest_at(rows, self.number)):
                found.setdefault(row.name, row)
        return [found[name] for name in sorted(found) if found[name].lin]

    def lookup(self, parent: int, name: bytes) -> Entry | None:
        """One name in a directory; None where there is none."""
        low, high = (parent, name, 0), (parent, name, self.number + 1)
        for run in self._runs:
            rows = list(self._tables.between(run, Table.ENTRIES, low, high))
            if rows:
                row = cast(Entry, rows[-1])
                return row if row.lin else None
        return None

    def resolve(self, path: bytes) -> Meta:
        """The metadata of what lies at a path; no symlink is followed. Raises UsageError."""
        lin = ROOT_LIN
        for part in path.split(b"/"):
            if part in (b"", b"."):
                continue
            entry = self.lookup(lin, part)
            if entry is None:
                shown = path.decode(errors="backslashreplace")
                raise UsageError(f"there is no {shown} in snapshot {self.number}.")
            lin = entry.lin
        return self.need(lin)

    def need(self, lin: int) -> Meta:
        """The metadata of a LIN that must be there. Raises Damaged."""
        meta = self.meta(lin)
        if meta is None:
            raise Damaged(f"the tables are damaged (LIN {lin} has a name but no metadata).")
        return meta

    def walk(self, lin: int = ROOT_LIN, prefix: bytes = b"") -> Iterator[tuple[bytes, Entry, Meta]]:
        """(path, entry, metadata) of all below a directory, depth first, names in byte order.

        Raises Damaged where a directory has two names, so that a forged table cannot make the
        walk endless.
        """
        seen = {lin}
        stack = [self._children(lin, prefix)]
        while stack:
            item = next(stack[-1], None)
            if item is None:
                stack.pop()
                continue
            yield item
            path, entry, meta = item
            if meta.type == ItemType.DIRECTORY:
                if entry.lin in seen:
                    raise Damaged(f"the tables are damaged (directory {entry.lin} has two names).")
                seen.add(entry.lin)
                stack.append(self._children(entry.lin, path))

    def _children(self, lin: int, prefix: bytes) -> Iterator[tuple[bytes, Entry, Meta]]:
        entries = self.entries(lin)
        for entry, meta in zip(entries, self.metas([e.lin for e in entries]), strict=True):
            if meta is None:
                raise Damaged(f"the tables are damaged (LIN {entry.lin} has no metadata).")
            yield prefix + b"/" + entry.name, entry, meta

    # -- blocks ----------------------------------------------------------------------------

    def block_rows(
        self, lin: int, first_base: int = 0, last_base: int = 2**63
    ) -> dict[int, BlockRow]:
        """The block rows in force of a range of bases (inclusive), by base."""
        found: dict[int, BlockRow] = {}
        low, high = (lin, first_base), (lin, last_base + 1)
        for run in self._runs:
            rows = self._tables.between(run, Table.BLOCKS, low, high)
            for row in cast("Iterator[BlockRow]", newest_at(rows, self.number)):
                found.setdefault(row.base, row)
        return found

    def blocks(self, lin: int, first: int, count: int) -> list[Location | None]:
        """Where ``count`` blocks from block ``first`` on lie; None for a hole."""
        if count <= 0:
            return []
        first_base, last_base = first // BASE_BLOCKS, (first + count - 1) // BASE_BLOCKS
        rows = self.block_rows(lin, first_base, last_base)
        found: list[Location | None] = []
        for base in range(first_base, last_base + 1):
            here = locations(rows[base]) if base in rows else []
            found += here + [None] * (BASE_BLOCKS - len(here))
        skip = first - first_base * BASE_BLOCKS
        return found[skip : skip + count]

    def xattrs(self, meta: Meta) -> dict[bytes, bytes]:
        """All extended attributes of an item, the large ones read from their blocks."""
        found = dict(meta.xattrs or {})
        if meta.streams:
            for entry in self.streams(meta.lin):
                stream = self.need(entry.lin)
                if stream.size > MAX_LARGE_XATTR:
                    raise Damaged(f"the tables are damaged (attribute of {stream.size} bytes).")
                value = self.blocks_reader.read(self, stream, 0, stream.size)
                found[entry.name.removeprefix(STREAM_PREFIX)] = value
        return found

    # -- whole tables ----------------------------------------------------------------------

    def rows(self, table: Table) -> Iterator[Row]:
        """All rows of a table in force at this snapshot in key order, tombstones too."""
        return newest_at(all_versions(self._tables, self._runs, table), self.number)


def all_versions(tables: TableReader, runs: Sequence[Run], table: Table) -> Iterator[Row]:
    """All rows of a table in key order, of all snapshots."""
    readers = [tables.all_rows(run, table) for run in runs]
    if len(readers) == 1:
        return readers[0]
    return heap_merge(*readers, key=key_function(table))
