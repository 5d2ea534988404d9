"""What differs between two snapshots, found from the rows that came between them.

1. Only rows of snapshots after the older one and up to the newer one are looked at: runs that end
   before are not read at all.
2. A name that came or went is told as added or removed, or as renamed where the LIN has another
   name now. A directory that is gone is followed in the older snapshot, since what was in it has no
   rows of its own.
3. A LIN whose metadata row changed is told once: modified where its size or blocks changed too,
   else only its metadata.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

from cloudfs.core.rows import BlockRow, Entry, ItemType, Meta, Row, Table
from cloudfs.repo.history import History
from cloudfs.repo.paths import PathFinder

ADDED, REMOVED, MODIFIED, METADATA, TYPE, RENAMED = "+", "-", "M", "m", "T", "R"


class Change(NamedTuple):
    """One difference. ``old_path`` is that before a rename; sizes in bytes."""

    kind: str
    path: bytes
    old_path: bytes
    size_before: int
    size_after: int
    type: int

    def reversed(self) -> Change:
        """The same difference, looked at from the newer snapshot."""
        kind = {ADDED: REMOVED, REMOVED: ADDED}.get(self.kind, self.kind)
        sizes = (self.size_after, self.size_before)
        return Change(kind, self.old_path, self.path, *sizes, self.type)


def compare(history: History, before: int, after: int) -> list[Change]:
    """The differences between two snapshots, ``before`` being the older one, by path."""
    return sorted(_Comparison(history, before, after).run(), key=lambda c: (c.path, c.kind))


class _Comparison:
    def __init__(self, history: History, before: int, after: int) -> None:
        self._history = history
        self._between = (before, after)
        self._old, self._new = history.view(before), history.view(after)
        self._old_paths, self._new_paths = PathFinder(self._old), PathFinder(self._new)
        self._named: set[int] = set()  # LINs that are told by their names

    def _rows(self, table: Table) -> Iterator[Row]:
        before, after = self._between
        for run in self._history.manifest.runs:
            if run.last_snap > before and run.first_snap <= after:
                for row in self._history.tables.all_rows(run, table):
                    if before < row.snap <= after:
                        yield row

    def run(self) -> Iterator[Change]:
        entries = cast("Iterator[Entry]", self._rows(Table.ENTRIES))
        yield from self._names({(row.parent, row.name) for row in entries})
        blocks = {row.lin for row in cast("Iterator[BlockRow]", self._rows(Table.BLOCKS))}
        lins = {row.lin for row in cast("Iterator[Meta]", self._rows(Table.METADATA))}
        for lin in (blocks | lins) - self._named:
            old, new = self._old.meta(lin), self._new.meta(lin)
            if old is None or new is None or new.type == ItemType.STREAM:
                continue
            path = self._new_paths.path(new)
            if path is not None:
                data = lin in blocks or (old.size != new.size and new.type == ItemType.REGULAR)
                kind = MODIFIED if data or old.target != new.target else METADATA
                yield Change(kind, path, path, old.size, new.size, new.type)

    def _names(self, names: set[tuple[int, bytes]]) -> Iterator[Change]:
        gone: list[tuple[bytes, Meta]] = []
        came: list[tuple[bytes, Meta]] = []
        for parent, name in names:
            old, new = self._old.lookup(parent, name), self._new.lookup(parent, name)
            if (old and old.type == ItemType.STREAM) or (new and new.type == ItemType.STREAM):
                continue
            old_meta = self._old.need(old.lin) if old else None
            new_meta = self._new.need(new.lin) if new else None
            old_path = self._named_path(self._old_paths, parent, name, old is not None)
            new_path = self._named_path(self._new_paths, parent, name, new is not None)
            if old_meta and new_meta and old_path == new_path and new_path is not None:
                if old_meta.lin != new_meta.lin:
                    self._named.add(new_meta.lin)
                    kind = MODIFIED if old_meta.type == new_meta.type else TYPE
                    sizes = (old_meta.size, new_meta.size)
                    yield Change(kind, new_path, new_path, *sizes, new_meta.type)
                continue
            if old_meta and old_path is not None:
                gone.append((old_path, old_meta))
            if new_meta and new_path is not None:
                came.append((new_path, new_meta))
        yield from self._pair(gone, came)

    def _named_path(self, paths: PathFinder, parent: int, name: bytes, there: bool) -> bytes | None:
        if not there:
            return None
        directory = paths.directory(parent)
        if directory is None:
            return None
        return (b"" if directory == b"/" else directory) + b"/" + name

    def _pair(
        self, gone: list[tuple[bytes, Meta]], came: list[tuple[bytes, Meta]]
    ) -> Iterator[Change]:
        by_lin: dict[int, list[bytes]] = {}
        for path, meta in gone:
            by_lin.setdefault(meta.lin, []).append(path)
        for path, meta in came:
            self._named.add(meta.lin)
            old_meta = self._old.meta(meta.lin)
            old_paths = by_lin.get(meta.lin)
            if old_paths:
                size = old_meta.size if old_meta else meta.size
                yield Change(RENAMED, path, old_paths.pop(), size, meta.size, meta.type)
            elif old_meta is not None and (old_path := self._old_paths.path(old_meta)) is not None:
                if self._new_paths.path(meta) == path:  # it was below a directory that is gone
                    yield Change(RENAMED, path, old_path, old_meta.size, meta.size, meta.type)
                else:
                    yield Change(ADDED, path, path, 0, meta.size, meta.type)
            else:
                yield Change(ADDED, path, path, 0, meta.size, meta.type)
        for path, meta in gone:
            if path in by_lin.get(meta.lin, ()):
                yield Change(REMOVED, path, path, meta.size, 0, meta.type)
                if meta.type == ItemType.DIRECTORY and self._new.meta(meta.lin) is None:
                    yield from self._below(path, meta)

    def _below(self, path: bytes, meta: Meta) -> Iterator[Change]:
        for below, entry, old in self._old.walk(meta.lin, path):
            if self._new.meta(entry.lin) is None:
                yield Change(REMOVED, below, below, old.size, 0, old.type)
