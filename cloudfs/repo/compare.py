"""What differs between two snapshots, found from the rows that came between them.

1. Only runs that hold rows of snapshots after the older one and up to the newer one are read, and
   of their rows only those.
2. Each name that has such a row is looked up in both snapshots. A name counts only where its
   directory is: what was in a directory that is gone has no rows of its own that say so, and is
   found by following the directory in the older snapshot.
3. What became of the names, :mod:`cloudfs.core.snapdiff` says.
4. A LIN that is in both snapshots and whose metadata or blocks have a row is told once: as
   modified where its size, target or blocks differ, else as of other metadata. Of what was renamed
   the change time alone is not told.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import msgspec

from cloudfs.core.rows import BlockRow, Entry, ItemType, Meta, Row, Table, locations
from cloudfs.core.snapdiff import (
    METADATA,
    MODIFIED,
    RENAMED,
    Change,
    Edge,
    Name,
    judge_names,
    told,
)
from cloudfs.repo.history import History
from cloudfs.repo.paths import PathFinder
from cloudfs.repo.view import SnapshotView


def compare(history: History, before: int, after: int) -> list[Change]:
    """The differences from snapshot ``before`` to ``after``, in order of path.

    Either may be the older one. Memory grows with what differs, not with the trees.
    """
    changes = list(_Comparison(history, min(before, after), max(before, after)).run())
    if before > after:
        changes = [change.reversed() for change in changes]
    return sorted(changes, key=lambda change: change.order)


class _Side:
    """One of the two snapshots."""

    def __init__(self, view: SnapshotView) -> None:
        self.view = view
        self.paths = PathFinder(view)

    def name(self, edge: Edge) -> Name | None:
        """A name as it is in this snapshot; None where it is not."""
        parent, name = edge
        entry = self.view.lookup(parent, name)
        if entry is None or entry.type == ItemType.STREAM:
            return None
        directory = self.paths.directory(parent)
        if directory is None:  # the directory is gone, and its rows were left as they were
            return None
        return Name(edge, directory.rstrip(b"/") + b"/" + name, self.view.need(entry.lin))


class _Comparison:
    def __init__(self, history: History, before: int, after: int) -> None:
        self._history = history
        self._between = (before, after)
        self._old, self._new = _Side(history.view(before)), _Side(history.view(after))

    def run(self) -> Iterator[Change]:
        entries = cast("Iterator[Entry]", self._rows(Table.ENTRIES))
        gone, came = self._names({(row.parent, row.name) for row in entries})
        self._follow(gone)
        renamed = set()
        for change in judge_names(gone.values(), came.values(), self._same_content):
            if change.kind == RENAMED:
                renamed.add(change.path)
            yield change
        renamed_lins = {name.meta.lin for name in came.values() if name.path in renamed}
        blocks = {row.lin for row in cast("Iterator[BlockRow]", self._rows(Table.BLOCKS))}
        lins = {row.lin for row in cast("Iterator[Meta]", self._rows(Table.METADATA))}
        for lin in sorted(blocks | lins):
            change_or_none = self._item(lin, lin in blocks, lin in renamed_lins)
            if change_or_none is not None:
                yield change_or_none

    def _rows(self, table: Table) -> Iterator[Row]:
        before, after = self._between
        for run in self._history.manifest.runs:
            if run.last_snap > before and run.first_snap <= after:
                for row in self._history.tables.all_rows(run, table):
                    if before < row.snap <= after:
                        yield row

    # -- names -----------------------------------------------------------------------------

    def _names(self, edges: set[Edge]) -> tuple[dict[Edge, Name], dict[Edge, Name]]:
        """Which of these names went, and which came."""
        gone: dict[Edge, Name] = {}
        came: dict[Edge, Name] = {}
        for edge in sorted(edges):
            old, new = self._old.name(edge), self._new.name(edge)
            if old is not None and new is not None and old.meta.lin == new.meta.lin:
                continue
            if old is not None:
                gone[edge] = old
            if new is not None:
                came[edge] = new
        return gone, came

    def _follow(self, gone: dict[Edge, Name]) -> None:
        """Add what was in directories that are gone; what moved out of them lost a name too."""
        waiting = list(gone.values())
        followed: set[int] = set()
        while waiting:
            path, meta = waiting.pop()[1:]
            if meta.type != ItemType.DIRECTORY or meta.lin in followed:
                continue
            if self._new.view.meta(meta.lin) is not None:
                continue  # it moved, with all that is in it
            followed.add(meta.lin)
            entries = self._old.view.entries(meta.lin)
            metas = self._old.view.metas([entry.lin for entry in entries])
            for entry, found in zip(entries, metas, strict=True):
                if found is not None:
                    edge = (meta.lin, entry.name)
                    gone[edge] = Name(edge, path + b"/" + entry.name, found)
                    waiting.append(gone[edge])

    # -- items -----------------------------------------------------------------------------

    def _item(self, lin: int, blocks: bool, renamed: bool) -> Change | None:
        """What is to be told of an item that has a row, beside what its names tell."""
        old, new = self._old.view.meta(lin), self._new.view.meta(lin)
        if old is None or new is None or new.type == ItemType.STREAM:
            return None
        old_path, path = self._old.paths.path(old), self._new.paths.path(new)
        if old_path is None or path is None:
            return None
        names = Name((old.parent, b""), old_path, old), Name((new.parent, b""), path, new)
        same_size = old.size == new.size or new.type != ItemType.REGULAR
        if not same_size or old.target != new.target or (blocks and not self._same_data(old, new)):
            return told(MODIFIED, *names)
        if renamed and self._same_metadata(old, new):
            return None
        return told(METADATA, *names)

    def _same_content(self, old: Meta, new: Meta) -> bool:
        if new.type == ItemType.REGULAR:
            return old.size == new.size and self._same_data(old, new)
        return old.target == new.target and old.rdev == new.rdev

    def _same_data(self, old: Meta, new: Meta) -> bool:
        """Whether two files of one size hold the same blocks, by their digests."""
        before = _digests(self._old.view, old.lin)
        return old.block_size == new.block_size and before == _digests(self._new.view, new.lin)

    def _same_metadata(self, old: Meta, new: Meta) -> bool:
        like_new = msgspec.structs.replace(
            old, snap=new.snap, ctime_ns=new.ctime_ns, parent=new.parent
        )
        if like_new != new:
            return False
        return not new.streams or self._old.view.xattrs(old) == self._new.view.xattrs(new)


def _digests(view: SnapshotView, lin: int) -> dict[tuple[int, int], tuple[int, bytes]]:
    """(length, digest) of each block that is no hole, by base and place in it."""
    return {
        (base, index): (place.length, place.digest)
        for base, row in view.block_rows(lin).items()
        for index, place in enumerate(locations(row))
        if place is not None
    }
