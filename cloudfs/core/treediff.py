"""What changed between the last snapshot's directory records and the tree as it was just listed.

The walk hands in every directory whose listing differs; this module decides which item is which.

1. An entry of the same name, inode and type as before is the same item; it is *changed* when
   anything lstat says of it differs.
2. Any other entry has *appeared*, and what stood in the record and is not in the listing has
   *vanished*. Neither is judged until the walk is over, because a thing that moved may appear
   before it vanishes.
3. An appeared directory that has the inode and birth time of a vanished one has moved: it keeps
   its LIN and its record, and is visited like any known directory, which may bring more to light.
4. What vanished directories held has vanished with them (they are expanded from their records, as
   far as anything can still have moved out of them).
5. Appeared directories that match nothing are new, and visited; all in them has appeared.
6. When nothing is left to visit, appeared files are matched: a further name of a file seen in this
   walk (same device and inode, several links) is a hard link, by which what changed is seen if the
   other name came from a record; one with the inode, type, size and mtime of a vanished one has
   moved. The rest is new and gets LINs in the order of (parent, name),
   so that a directory's children lie side by side. Where a file has more names than were seen, as
   one that came in with its directory, whoever walks looks for them on record first
   (:meth:`TreeDiff.unknown_links`).
7. What vanished and was not matched is deleted, unless another name of it is there: a change of
   links changes ctime, so all other names of a file that lost one stand in changed listings. Names
   also go with a directory that leaves the tree, which changes no file; and what was listed of a
   directory that cannot be read is out of date. Then there may be others where nobody looked
   (:meth:`VanishedItems.in_doubt`).
8. A new file that took the name of another is compared with the blocks of that one: a file that
   was replaced by an almost equal one uploads only what differs.

Where much has appeared, rule 2 need not hold back what is like nothing on record: it cannot have
moved, wherever things vanish later, and is judged at once (:meth:`TreeDiff.judge_early`).

The first backup has no records: LINs are given at once and listings go through undecoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, field

from msgspec.structs import replace

from cloudfs.core.changes import (
    DirRecord,
    DirScan,
    DirTask,
    LinRuns,
    Stat,
    Visit,
    collapse,
    decode_listing,
)
from cloudfs.core.vanished import Lookup, SameDirectory, Vanished, VanishedItems


@dataclass(slots=True)
class _Changed:
    """One directory whose listing differs, as far as it is judged."""

    scan: DirScan
    lins: list[int]  # 0 where not known yet
    items: list[int] = field(default_factory=list)
    names: list[int] = field(default_factory=list)
    bases: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Appeared:
    directory: _Changed
    index: int
    stat: Stat


@dataclass
class Tally:
    """How many items were found new, changed, moved and deleted."""

    new: int = 0
    changed: int = 0
    moved: int = 0
    deleted: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.new + self.changed + self.moved + self.deleted


class TreeDiff:
    """Takes directories as they are listed; gives tasks, records and tombstones."""

    def __init__(self, next_lin: int, *, first: bool, stable_inodes: bool = False) -> None:
        """``stable_inodes``: no inode number is ever used again, so by it alone a file is known."""
        self.next_lin = next_lin
        self.first = first
        self._stable_inodes = stable_inodes
        self.tally = Tally()
        self._changed: dict[int, _Changed] = {}
        self._appeared_dirs: list[_Appeared] = []
        self._appeared_files: list[_Appeared] = []
        self._kept_back: list[_Appeared] = []  # like something on record: may have moved
        self.vanished = VanishedItems()
        self._links: dict[tuple[int, int], int] = {}
        self._described: set[int] = set()  # LINs of several names that have an item
        self._as_recorded: dict[int, Stat] = {}  # of several names, where one looked so
        self.with_further_names: dict[int, bytes] = {}  # directories, and their paths
        # Directories on record of which more may have changed than what scans are told of.
        self.behind: Set[int] = frozenset()

    @property
    def waiting(self) -> int:
        """How many files have appeared and were not looked at."""
        return len(self._appeared_files)

    def allot(self, count: int) -> int:
        """Take ``count`` LINs; returns the first."""
        first = self.next_lin
        self.next_lin += count
        return first

    def unknown_links(self) -> dict[int, int]:
        """Inode numbers of files of several names that have appeared, of which no name was seen
        that is on record; and how many more names than have appeared they have. (Of files of one
        number, in several file systems: the one of which most are lacking.)"""
        more: dict[tuple[int, int], int] = {}
        for item in (*self._appeared_files, *self._kept_back):
            stat = item.stat
            file = item.directory.scan.dev, stat.ino
            if stat.nlink > 1 and file not in self._links:
                more[file] = more.get(file, stat.nlink) - 1
        found: dict[int, int] = {}
        for (_, inode), lacking in more.items():
            found[inode] = max(found.get(inode, 0), lacking)
        return found

    def has_taken(self, lin: int) -> bool:
        """Whether a directory was found to differ, and taken."""
        return lin in self._changed

    def known_below(self, lin: int) -> list[Visit]:
        """What is to be visited below a directory that was taken: what is known there."""
        scan, lins = self._changed[lin].scan, self._changed[lin].lins
        return [
            (lins[index], _join(scan.path, name), inode)
            for index, name, inode in scan.subdirs
            if lins[index]
        ]

    # -- the first backup ----------------------------------------------------------------------

    def take_new(self, scan: DirScan) -> tuple[DirTask, DirRecord, list[Visit]]:
        """A directory of a tree that was never backed up: task, record, directories to visit."""
        count = scan.counts.items
        first = self.allot(count)
        runs: LinRuns = [(first, count)] if count else []
        items: list[int] | None = None
        subdirs = [(name, first + index) for index, name, _ in scan.subdirs]
        visits = [
            (first + index, _join(scan.path, name), inode) for index, name, inode in scan.subdirs
        ]
        if scan.links:
            stats = decode_listing(scan.listing)
            lins = list(range(first, first + count))
            again = set()
            for index in scan.links:
                known = self._links.setdefault((scan.dev, stats[index].ino), lins[index])
                if known != lins[index]:
                    lins[index] = known
                    again.add(index)
            if again:
                self.with_further_names[scan.lin] = scan.path
                runs = collapse(lins)
                items = [index for index in range(count) if index not in again]
        self.tally.new += count
        task = DirTask(scan.lin, scan.path, scan.listing, runs, items)
        record = DirRecord(scan.signature, scan.listing, runs, subdirs, scan.counts, scan.doubtful)
        return task, record, visits

    # -- later ones ----------------------------------------------------------------------------

    def take(self, scan: DirScan, record: DirRecord | None) -> list[Visit]:
        """A directory that is new (no record) or differs; returns known ones to visit below it."""
        assert scan.lin not in self._changed, "a directory is judged once"
        stats = decode_listing(scan.listing)
        changed = _Changed(scan, [0] * len(stats))
        self._changed[scan.lin] = changed
        before = record.by_name() if record is not None else {}
        doubtful = set(record.doubtful) if record is not None else set()
        mapped, told = set(scan.mapped), set(scan.told)
        if scan.lin in self.behind:
            scan.ranges.clear()
        visits: list[Visit] = []
        for index, stat in enumerate(stats):
            old = before.pop(stat.name, None)
            if old is not None and _same_item(old[1], stat):
                if doubted := old[0] in doubtful or index in mapped:
                    scan.ranges.pop(index, None)
                self._take_known(changed, index, stat, old, look=doubted or index in told)
                if stat.is_dir:
                    visits.append(_visit(old[2], scan, stat))
                continue
            if old is not None:
                self.vanished.add(Vanished(scan.lin, old[2], old[1], replaced=True))
                if stat.is_file and old[1].is_file:
                    changed.bases[index] = old[2]
            appeared = _Appeared(changed, index, stat)
            (self._appeared_dirs if stat.is_dir else self._appeared_files).append(appeared)
        for _, stat, lin in before.values():
            self.vanished.add(Vanished(scan.lin, lin, stat))
        return visits

    def _take_known(
        self,
        changed: _Changed,
        index: int,
        stat: Stat,
        old: tuple[int, Stat, int],
        *,
        look: bool,
    ) -> None:
        """``look``: it may be another than on record even if lstat says the same."""
        _, old_stat, lin = old
        changed.lins[index] = lin
        linked = stat.nlink > 1 and not stat.is_dir
        if old_stat.nlink > 1:  # another name of it may have vanished
            self.vanished.alive.add(lin)
        if linked:
            self.vanished.alive.add(lin)
            self._links.setdefault((changed.scan.dev, stat.ino), lin)
        # Of several names, one is enough. The others may come from a record, and look unchanged.
        if lin not in self._described and (stat != old_stat or look):
            changed.items.append(index)
            if linked:
                self._described.add(lin)
            if stat.is_file:
                changed.bases[index] = lin
            self.tally.changed += stat != old_stat or bool(changed.scan.ranges.get(index))
        elif linked:
            self._as_recorded[lin] = stat

    # -- during the walk -----------------------------------------------------------------------

    def judge_early(self, known: set[int]) -> tuple[list[DirTask], list[Visit]]:
        """Judge what cannot have moved; ``known`` are the fingerprints of all that is on record.

        Returns tasks for it and the directories among it, to be visited. May be called again as
        more appears.
        """
        fresh: dict[int, list[_Appeared]] = {}
        visits: list[Visit] = []
        waiting = sorted((*self._appeared_dirs, *self._appeared_files), key=_order)
        self._appeared_dirs, self._appeared_files = [], []
        for item in waiting:
            stat, scan = item.stat, item.directory.scan
            linked = stat.nlink > 1 and not stat.is_dir
            if linked or not scan.lin or fingerprint(stat) in known:
                (self._appeared_dirs if stat.is_dir else self._kept_back).append(item)
                continue
            lin = item.directory.lins[item.index] = self.allot(1)
            self.tally.new += 1
            fresh.setdefault(scan.lin, []).append(item)
            if stat.is_dir:
                visits.append(_visit(lin, scan, stat))
        return [_early_task(items) for items in fresh.values()], visits

    # -- after the walk ------------------------------------------------------------------------

    def settle(self, lookup: Lookup, same_directory: SameDirectory) -> list[Visit]:
        """Judge appeared directories; returns what must be visited, nothing when all is judged.

        ``same_directory`` says whether the directory at a path has the birth time that is on
        record for a LIN.
        """
        while True:
            visits = self._match_directories(same_directory)
            if visits:
                return visits
            if not self.vanished.open_directories(lookup):
                break
        waiting = sorted(self._appeared_dirs, key=_order)
        self._appeared_dirs.clear()
        for item in waiting:
            lin = self.allot(1)
            self._place(item, lin)
            self.tally.new += 1
            visits.append(_visit(lin, item.directory.scan, item.stat))
        return visits

    def _match_directories(self, same_directory: SameDirectory) -> list[Visit]:
        visits: list[Visit] = []
        waiting, self._appeared_dirs = self._appeared_dirs, []
        for item in waiting:
            path = _join(item.directory.scan.path, item.stat.name)
            lin = self.vanished.find_directory(item.stat.ino, path, same_directory)
            if lin is None:
                self._appeared_dirs.append(item)
                continue
            self.vanished.alive.add(lin)
            self._place(item, lin)
            self.tally.moved += 1
            visits.append(_visit(lin, item.directory.scan, item.stat))
        return visits

    def _place(self, item: _Appeared, lin: int) -> None:
        item.directory.lins[item.index] = lin
        item.directory.items.append(item.index)
        item.directory.names.append(item.index)

    def finish(self) -> Iterator[tuple[DirTask | None, int, DirRecord]]:
        """For each differing directory its task (None: nothing to do), LIN and new record."""
        for item in sorted((*self._kept_back, *self._appeared_files), key=_order):
            self._judge_file(item)
        self._kept_back.clear()
        self._appeared_files.clear()
        for lin in sorted(self._changed):
            yield self._result(self._changed[lin])
        self._changed.clear()

    def _judge_file(self, item: _Appeared) -> None:
        directory, stat = item.directory, item.stat
        key = (directory.scan.dev, stat.ino)
        if stat.nlink > 1 and key in self._links:
            self._judge_further_name(item, self._links[key])
            return
        old = self._moved_from(stat)
        if old is not None:
            lin = old.lin
            self.tally.moved += 1
            directory.bases[item.index] = lin
            # Where numbers are used again, it may be another file that is like it.
            if old.parent in self.behind or not self._stable_inodes:
                directory.scan.ranges.pop(item.index, None)
        else:
            self.tally.new += 1
            lin = self.allot(1)
        self.vanished.alive.add(lin)
        if stat.nlink > 1:
            self._links[key] = lin
        self._place(item, lin)

    def _moved_from(self, stat: Stat) -> Vanished | None:
        """What vanished and is this file."""
        for old in self.vanished.with_inode(stat.ino):
            if old.lin not in self.vanished.alive and self._same_file(old.stat, stat):
                return old
        return None

    def _judge_further_name(self, item: _Appeared, lin: int) -> None:
        """A name that appeared, of a file that was seen under another one.

        That one may come from a record, where nobody told of it: what changed is seen here then.
        """
        directory, index = item.directory, item.index
        self.with_further_names[directory.scan.lin] = directory.scan.path
        directory.lins[index] = lin
        directory.names.append(index)
        directory.bases.pop(index, None)
        self.tally.new += 1
        seen = self._as_recorded.get(lin)
        changed = seen is not None and replace(item.stat, name=seen.name) != seen
        if changed and lin not in self._described:
            self._described.add(lin)
            directory.items.append(index)
            if item.stat.is_file:
                directory.bases[index] = lin

    def _same_file(self, old: Stat, new: Stat) -> bool:
        if self._stable_inodes:
            return _same_item(old, new) and not old.is_dir
        return _same_content(old, new)

    @staticmethod
    def _result(changed: _Changed) -> tuple[DirTask | None, int, DirRecord]:
        scan, runs = changed.scan, collapse(changed.lins)
        assert all(first for first, _ in runs), "all is judged"
        items, names = sorted(changed.items), sorted(changed.names)
        chosen = set(items)
        bases = {index: lin for index, lin in changed.bases.items() if index in chosen}
        subdirs = [(name, changed.lins[index]) for index, name, _ in scan.subdirs]
        record = DirRecord(scan.signature, scan.listing, runs, subdirs, scan.counts, scan.doubtful)
        if not items and not names:
            return None, scan.lin, record
        ranges = {
            index: found
            for index, found in scan.ranges.items()
            if bases.get(index) == changed.lins[index]
        }
        task = DirTask(scan.lin, scan.path, scan.listing, runs, items, names, bases, ranges=ranges)
        return task, scan.lin, record


def _visit(lin: int, scan: DirScan, stat: Stat) -> Visit:
    """A directory that was listed."""
    return lin, _join(scan.path, stat.name), 0 if stat.mount else stat.ino


def _early_task(items: list[_Appeared]) -> DirTask:
    """The task for new items of one directory, in listing order."""
    directory = items[0].directory
    scan, indexes = directory.scan, sorted(item.index for item in items)
    bases = {index: directory.bases.pop(index) for index in indexes if index in directory.bases}
    runs = collapse(directory.lins)
    return DirTask(scan.lin, scan.path, scan.listing, runs, indexes, indexes, bases)


def fingerprint(stat: Stat) -> int:
    """A number that an item keeps when it moves; others may have it too, but hardly any."""
    return hash((stat.ino,) if stat.is_dir else (stat.ino, stat.size, stat.mtime_ns))


def _same_item(old: Stat, new: Stat) -> bool:
    return old.ino == new.ino and (old.mode ^ new.mode) & 0o170000 == 0 and old.mount == new.mount


def _same_content(old: Stat, new: Stat) -> bool:
    return (
        _same_item(old, new)
        and not old.is_dir
        and old.mtime_ns == new.mtime_ns
        and old.size == new.size
    )


def _order(item: _Appeared) -> tuple[int, bytes]:
    return item.directory.scan.lin, item.stat.name


def _join(path: bytes, name: bytes) -> bytes:
    return path + b"/" + name if path else name
