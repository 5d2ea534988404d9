"""Finding what is on record: directories by path or inode number, names by inode number."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cloudfs.core.changes import Stat, decode_listing, expand
from cloudfs.core.rows import ROOT_LIN
from cloudfs.db.state import SyncState
from cloudfs.repo.view import SnapshotView

_LISTINGS_KEPT = 1024

Listing = dict[int, list[tuple[Stat, int]]]
"""The entries of one directory with their LINs, by inode number."""


class Known:
    """The last snapshot as the records have it.

    What is looked for by inode needs the records' index (:meth:`SyncState.index_inodes`).
    """

    def __init__(
        self, state: SyncState, view: SnapshotView, same_directory: Callable[[int, bytes], bool]
    ) -> None:
        """``same_directory`` says whether the directory at a path has the birth time of a LIN."""
        self._state = state
        self._view = view
        self._same_directory = same_directory
        self._below: dict[int, dict[bytes, int]] = {}
        self._named: dict[int, dict[int, bytes]] = {}  # the other way round
        self._listings: dict[int, Listing] = {}

    def by_path(self, path: bytes) -> int | None:
        """The LIN of the directory that was at a path; None where there was none."""
        lin = ROOT_LIN
        for name in path.split(b"/") if path else ():
            below = self._below.get(lin)
            if below is None:
                record = self._state.record(lin)
                below = self._below[lin] = dict(record.subdirs) if record is not None else {}
            found = below.get(name)
            if found is None:
                return None
            lin = found
        return lin

    def standing(self, lins: list[int], path: bytes) -> int | None:
        """Which of the directories on record that have its inode number now is at a path; None
        where it is none of them: then it is new."""
        return next((lin for lin in lins if self._same_directory(lin, path)), None)

    def directories(self, inode: int) -> list[int]:
        """The LINs of all directories on record with an inode number."""
        return [
            lin
            for directory in self._state.directories_with(inode)
            for stat, lin in self._listing(directory).get(inode, ())
            if stat.is_dir
        ]

    def names(self, inode: int) -> list[tuple[int, bytes]]:
        """(LIN of the directory, name) of all names of an inode that are on record."""
        return [
            (directory, stat.name)
            for directory in self._state.directories_with(inode)
            for stat, _ in self._listing(directory).get(inode, ())
        ]

    def _listing(self, lin: int) -> Listing:
        found = self._listings.get(lin)
        if found is None:
            record = self._state.record(lin)
            found = {}
            if record is not None:
                stats = decode_listing(record.listing)
                for stat, entry in zip(stats, expand(record.lins), strict=True):
                    found.setdefault(stat.ino, []).append((stat, entry))
            if len(self._listings) >= _LISTINGS_KEPT:
                self._listings.clear()
            self._listings[lin] = found
        return found

    def path(self, lin: int, moved: Mapping[int, bytes]) -> bytes | None:
        """Where a directory is, if nothing above it moved but what is in ``moved``: LINs, and the
        paths at which they are now. None where nothing names it."""
        parts: list[bytes] = []
        while lin != ROOT_LIN:
            if lin in moved:
                parts.append(moved[lin])
                break
            meta = self._view.meta(lin)
            name = self._name(meta.parent, lin) if meta is not None else None
            if meta is None or name is None:
                return None
            parts.append(name)
            lin = meta.parent
        return b"/".join(reversed(parts))

    def above(self, lin: int, moved: Mapping[int, bytes]) -> list[int]:
        """A directory and those above it, from below the root (or what moved) down to itself."""
        found: list[int] = []
        while lin != ROOT_LIN:
            found.append(lin)
            meta = self._view.meta(lin)
            if lin in moved or meta is None:
                break
            lin = meta.parent
        return found[::-1]

    def _name(self, parent: int, lin: int) -> bytes | None:
        named = self._named.get(parent)
        if named is None:
            record = self._state.record(parent)
            found = record.subdirs if record is not None else []
            named = self._named[parent] = {directory: name for name, directory in found}
        return named.get(lin)
