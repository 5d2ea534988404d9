"""What is on record and was not where it was, as far as a walk got.

What is in a directory vanishes with it. Whether an item is gone is known only in the end: it, or a
directory above it, may yet appear elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cloudfs.core.changes import DirRecord, Stat
from cloudfs.core.rows import Entry, ItemType, Meta

Lookup = Callable[[int], DirRecord | None]
"""The record of a directory."""

SameDirectory = Callable[[int, bytes], bool]
"""Whether the directory at a path has the birth time that is on record for a LIN."""


@dataclass(slots=True)
class Vanished:
    """An item that is not under the name that it had."""

    parent: int
    lin: int
    stat: Stat
    replaced: bool = False  # another item has the name now
    with_parent: bool = False  # it went with the directory it was in


class VanishedItems:
    """All of them."""

    def __init__(self) -> None:
        self._by_inode: dict[int, list[Vanished]] = {}
        self._unopened: list[Vanished] = []  # directories
        self._went_with: dict[int, int] = {}  # directory -> its parent; 0: it went by itself
        self._moved: set[int] = set()  # directories that appeared elsewhere
        self.alive: set[int] = set()  # LINs that have a name, as far as was seen

    def __iter__(self) -> Iterator[Vanished]:
        return (item for ino in self._by_inode for item in self.with_inode(ino))

    def with_inode(self, ino: int) -> list[Vanished]:
        """Those of an inode number; without what went with a directory that turned out to have
        moved: where that one was visited, it was judged there, and else it is in there still."""
        return [
            item
            for item in self._by_inode.get(ino, ())
            if not item.with_parent or self.is_gone(item.parent)
        ]

    def add(self, item: Vanished) -> None:
        """An item vanished."""
        self._by_inode.setdefault(item.stat.ino, []).append(item)
        if item.stat.is_dir:
            self._unopened.append(item)
            if item.with_parent:
                self._went_with.setdefault(item.lin, item.parent)
            else:
                self._went_with[item.lin] = 0

    def find_directory(self, ino: int, path: bytes, same_directory: SameDirectory) -> int | None:
        """The LIN of the directory that appeared at a path, and is not gone from now on; None
        where it is none of these."""
        for item in self.with_inode(ino):
            if item.stat.is_dir and item.lin not in self._moved and same_directory(item.lin, path):
                self._moved.add(item.lin)
                return item.lin
        return None

    def open_directories(self, lookup: Lookup) -> bool:
        """Let what directories held that vanished, and did not appear elsewhere, vanish as well;
        False where there was none."""
        fresh = [item.lin for item in self._unopened if item.lin not in self._moved]
        self._unopened = []
        for lin in fresh:
            record = lookup(lin)
            if record is None:
                continue
            for _, stat, child in record.by_name().values():
                self.add(Vanished(lin, child, stat, with_parent=True))
        return bool(fresh)

    def is_gone(self, lin: int) -> bool:
        """Whether a directory vanished, or one above it with which it went, and did not appear
        elsewhere up to now."""
        while (parent := self._went_with.get(lin)) is not None and lin not in self._moved:
            if not parent:
                return True
            lin = parent
        return False

    # -- the end -------------------------------------------------------------------------------

    def in_doubt(self, *, every: bool) -> dict[int, int]:
        """LINs, with their inode numbers, that are to be deleted though they may have other names:
        files of which fewer names vanished than they had, or (``every``) all. To be asked before
        :meth:`tombstones`; see :meth:`keep`."""
        gone: dict[int, set[tuple[int, bytes]]] = {}
        stats: dict[int, Stat] = {}
        for item in self:
            if item.lin not in self.alive:
                gone.setdefault(item.lin, set()).add((item.parent, item.stat.name))
                stats[item.lin] = item.stat
        return {
            lin: stat.ino
            for lin, stat in stats.items()
            if every or (not stat.is_dir and len(gone[lin]) < stat.nlink)
        }

    def keep(self, lins: set[int]) -> None:
        """These have other names: they, and what is in them, are not gone after all."""
        self.alive |= lins
        self._moved |= lins

    def tombstones(self, snapshot: int) -> tuple[list[Meta], list[Entry], list[int]]:
        """Rows for what is gone, and the LINs of directories that are. To be asked when all is
        judged."""
        metas: dict[int, Meta] = {}
        entries: list[Entry] = []
        dead: list[int] = []
        for item in self:
            if not item.replaced and not item.with_parent:
                entries.append(Entry(item.parent, item.stat.name, snapshot, 0, 0))
            if item.lin in self.alive or item.lin in metas:
                continue
            kind = ItemType.DELETED_FILE
            if item.stat.is_dir:
                kind = ItemType.DELETED_DIRECTORY
                dead.append(item.lin)
            metas[item.lin] = Meta(item.lin, snapshot, kind)
        return [metas[lin] for lin in sorted(metas)], sorted(entries, key=_order), dead


def _order(entry: Entry) -> tuple[int, bytes]:
    return entry.parent, entry.name
