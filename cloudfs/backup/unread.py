"""What was found and could not be read: under which other name to try, and what is noted of it.

1. A file of several names that is new is read under one of them. In a tree that does not stand
   still that name may be gone, or another file's, by then. So the file is read under its other
   names, one after the other: their entries lead to it already. If none of them does any more, it
   is described as it was listed, without data, so that the snapshot is whole; each name that was
   tried is reported.
2. What could not be read is noted in the records, and the next sync looks at its directories again;
   so it does at those that hold other names of a file, or the missing name would be taken for
   another file when it is there again. A file of several names that is on record is noted under
   each of them: any may be gone by then.
3. A directory that is not in the snapshot after all has no record, nor has what is below it.
"""

from __future__ import annotations

from collections.abc import Iterable

from cloudfs.backup.packs import PackSettings
from cloudfs.backup.walk import Walk
from cloudfs.core.changes import Absent, DirTask, Stat, decode_listing, expand
from cloudfs.core.rows import Meta
from cloudfs.db.state import SyncState

Place = tuple[int, int]
"""The LIN of a directory, and the index of a name in its listing."""


class Unread:
    """What one sync could not read."""

    def __init__(self, state: SyncState, packing: PackSettings, walk: Walk) -> None:
        self._state = state
        self._packing = packing
        self._walk = walk
        self._absent: dict[int, dict[bytes, bool]] = {}  # by directory: names, whether new
        self._left: dict[int, list[Place]] = {}  # names of new files that were not tried
        self._holding: set[int] = set()  # directories of such names
        self._linked: dict[int, int] = {}  # inode numbers of files on record with several names
        self.given_up: list[Meta] = []  # rows of files that no name leads to

    def take(self, absent: Iterable[Absent]) -> list[DirTask]:
        """Take what could not be read, and tell what is to be tried instead."""
        failed: dict[int, Stat] = {}
        for item in absent:
            self._absent.setdefault(item.directory, {})[item.stat.name] = item.new
            if item.stat.nlink == 1 or item.stat.is_dir:
                continue
            if item.lin >= self._packing.first_new_lin:
                failed[item.lin] = item.stat
            else:
                self._linked[item.lin] = item.stat.ino
        self._find_names({lin for lin in failed if lin not in self._left})
        return [task for lin, stat in failed.items() for task in self._next(lin, stat)]

    def _find_names(self, lins: set[int]) -> None:
        """Find the names of files in all directories that hold further names."""
        self._left.update((lin, []) for lin in lins)
        for directory in self._walk.diff.with_further_names if lins else ():
            for index, (_, lin) in enumerate(self._entries(directory)):
                if lin in lins:
                    self._left[lin].append((directory, index))
                    self._holding.add(directory)

    def _next(self, lin: int, stat: Stat) -> list[DirTask]:
        while self._left[lin]:
            directory, index = self._left[lin].pop(0)
            record = self._state.staged(directory, self._packing.snapshot)
            assert record is not None
            if decode_listing(record.listing)[index].name not in self._absent.get(directory, ()):
                path = self._walk.diff.with_further_names[directory]
                return [DirTask(directory, path, record.listing, record.lins, [index], [])]
        self.given_up.append(self._as_listed(lin, stat))
        return []

    def _entries(self, directory: int) -> list[tuple[Stat, int]]:
        """What was listed in a directory, with LINs; nothing for one that turned out to be gone."""
        record = self._state.staged(directory, self._packing.snapshot)
        if record is None:
            return []
        return list(zip(decode_listing(record.listing), expand(record.lins), strict=True))

    def _as_listed(self, lin: int, stat: Stat) -> Meta:
        return Meta(
            lin,
            self._packing.snapshot,
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

    def mark(self) -> None:
        """Rules 2 and 3. To be called when all is read."""
        walk, snapshot = self._walk, self._packing.snapshot
        self._note_all_names()
        again = self._holding | self._absent.keys()
        walk.unread.update(again)
        for lin in again:
            record = self._state.staged(lin, snapshot)
            if record is None:  # it is one of those that are not in the snapshot
                continue
            names = self._absent.get(lin, {})
            absent = {name for name, new in names.items() if new}
            for name, below in record.subdirs:
                if name in absent:
                    walk.forget(below)
            walk.counts.add(record.counts, -1)
            record.mark_unread(absent, names.keys() - absent)
            walk.counts.add(record.counts)
            self._state.put_records(snapshot, [(lin, record)])

    def _note_all_names(self) -> None:
        """Rule 2, for files on record: of names that were not tried, an older state stays too."""
        if not self._linked:
            return
        walk, untouched = self._walk, []
        changed = set(walk.changed)
        for directory, record in walk.standing(set(self._linked.values())):
            stats = decode_listing(record.listing)
            entries = zip(stats, expand(record.lins), strict=True)
            names = {stat.name: False for stat, lin in entries if lin in self._linked}
            if names:
                self._absent[directory] = names | self._absent.get(directory, {})
                if directory not in changed:
                    untouched.append((directory, record))
        walk.changed.extend(directory for directory, _ in untouched)
        self._state.put_records(self._packing.snapshot, untouched)
