"""New files of several names that could not be read under the one that was chosen for it.

Where a tree does not stand still, that name may be gone, or another file's, by the time it is read.
The file is then read under its other names, one after the other; the entries of those lead to it
already. If none leads to it any more, it is described as it was listed, without data, so that the
snapshot is whole; each name that was tried has been reported, and is looked at by the next sync.
"""

from __future__ import annotations

from collections.abc import Iterator

from cloudfs.backup.packs import PackSettings
from cloudfs.core.changes import DirRecord, DirTask, Stat, decode_listing, expand
from cloudfs.core.rows import Meta
from cloudfs.db.state import SyncState

Absent = list[tuple[int, bytes, bool]]
"""What could not be read: LIN of the directory, name, whether the name is new."""

Place = tuple[int, bytes]
"""The LIN of a directory, and a name in it."""


class OtherNames:
    """Finds the names that are left of the files that are new in one sync."""

    def __init__(
        self, state: SyncState, packing: PackSettings, directories: dict[int, bytes]
    ) -> None:
        """``directories`` are those that hold further names of files, and their paths."""
        self._state = state
        self._packing = packing
        self._snapshot = packing.snapshot
        self._directories = directories
        self._seen = 0
        self._tried: dict[int, set[Place]] = {}
        self.given_up: list[Meta] = []  # the rows of those that no name leads to
        self.holding: set[int] = set()  # directories of other names, for the next sync to look at

    def tasks(self, absent: Absent) -> list[DirTask]:
        """What is to be done about all that could not be read up to now; nothing at last."""
        fresh, self._seen = absent[self._seen :], len(absent)
        failed: dict[int, Stat] = {}
        for directory, name, _ in fresh:
            for _, stat, lin in self._entries(directory):
                if stat.name == name and stat.nlink > 1 and lin >= self._packing.first_new_lin:
                    failed[lin] = stat
                    self._tried.setdefault(lin, set()).add((directory, name))
        found = {} if not failed else self._next_names(failed)
        self.given_up.extend(
            self._as_listed(lin, stat) for lin, stat in failed.items() if lin not in found
        )
        return list(found.values())

    def _next_names(self, failed: dict[int, Stat]) -> dict[int, DirTask]:
        found: dict[int, DirTask] = {}
        for directory, path in self._directories.items():
            for index, stat, lin in self._entries(directory):
                if lin not in failed:
                    continue
                self.holding.add(directory)
                if lin not in found and (directory, stat.name) not in self._tried[lin]:
                    record = self._record(directory)
                    found[lin] = DirTask(directory, path, record.listing, record.lins, [index], [])
        return found

    def _record(self, directory: int) -> DirRecord:
        record = self._state.staged(directory, self._snapshot)
        assert record is not None
        return record

    def _entries(self, directory: int) -> Iterator[tuple[int, Stat, int]]:
        """(index, stat, LIN) of what was listed in a directory. (Directories have one name.)"""
        record = self._state.staged(directory, self._snapshot)
        if record is not None:
            found = zip(decode_listing(record.listing), expand(record.lins), strict=True)
            for index, (stat, lin) in enumerate(found):
                if not stat.is_dir:
                    yield index, stat, lin

    def _as_listed(self, lin: int, stat: Stat) -> Meta:
        return Meta(
            lin,
            self._snapshot,
            stat.type,
            stat.mode & 0o7777,
            stat.uid,
            stat.gid,
            mtime_ns=stat.mtime_ns,
            ctime_ns=stat.ctime_ns,
            nlink=stat.nlink,
            ino=stat.ino,
            rdev=stat.rdev,
            block_size=self._packing.block_size if stat.is_file else 0,
        )
