"""Walking the tree: from directories to tasks, by the scan and the difference to the last snapshot.

The first backup hands out tasks while it walks. A later one first walks all that is known, then
settles what appeared and vanished (see :mod:`cloudfs.core.treediff`), and only then hands out; but
where very much has appeared, what cannot have moved is handed out during the walk as well.
"""

from __future__ import annotations

import os
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator

import xxhash

from cloudfs.backup.known import Known
from cloudfs.backup.rebuild import TOP
from cloudfs.core.assign import WorkQueue, bytes_of
from cloudfs.core.changes import Counts, DirRecord, DirScan, DirTask, Visit, decode_listing
from cloudfs.core.rows import ROOT_LIN, Entry, Meta
from cloudfs.core.treediff import TreeDiff, fingerprint
from cloudfs.db.state import SyncState
from cloudfs.repo.view import SnapshotView
from cloudfs.source.roots import Roots
from cloudfs.source.scan import ScanOutcome, ScanPart, is_fresh

QUOTA = 4096
"""Entries that one step of a walk visits before it lets others have their turn."""

EARLY_ITEMS = 2000
EARLY_SHARE = 16
"""When so many files have appeared, and one for so many on record, all records are read to know
which of the files cannot have moved. Reading them takes a tenth of what packing as many takes."""

_RECORDS_AT_ONCE = 256

ScanParts = Callable[[list[ScanPart]], Iterator[ScanOutcome]]


class Walk:
    """One walk of the tree for one sync."""

    def __init__(
        self,
        roots: Roots,
        state: SyncState,
        view: SnapshotView | None,
        next_lin: int,
        queue: WorkQueue,
        *,
        now_ns: int,
        trust: bool,
        stable_inodes: bool = False,
    ) -> None:
        """``view`` is the last snapshot, to which ``state`` belongs; None for a first backup.
        ``now_ns``: when the tree stood still, or a time before anything of it is read.

        Without ``trust`` no directory is passed over because its listing is as before (the
        policy's filters are others now).
        """
        self._roots = roots
        self._state = state
        self._view = view
        self._queue = queue
        self._now_ns = now_ns
        self._trust = trust
        self._snapshot = view.number + 1 if view is not None else 1
        self._stat = roots.reader()
        self.first = view is None
        self._stable_inodes = stable_inodes
        self.diff = TreeDiff(next_lin, first=self.first, stable_inodes=stable_inodes)
        self.counts = Counts()
        self.counts.add(state.head.counts)
        self.items_seen = 0
        self.errors: list[tuple[bytes, str]] = []
        self.unread: set[int] = set()  # directories in which something could not be looked at
        self.unvisited: set[int] = set()  # of these: such that could not be looked into at all
        self.changed: list[int] = []
        self.made_up: list[Meta | Entry] = []
        self._staged: list[tuple[int, DirRecord | None]] = []
        self._waiting: list[Visit] = []
        self._moved: dict[int, bytes] = {}  # where directories that moved are now
        self._known: set[int] | None = None  # fingerprints of all on record, once they are needed
        self._begin()

    def _begin(self) -> None:
        """The root, as an entry without a name of a directory that nothing names."""
        scan = _made_up_scan(TOP, self._roots.root_listing(), [(0, b"", 0)], self._now_ns)
        record = self._state.record(TOP) if not self.first else None
        if record is None:
            task = DirTask(TOP, b"", scan.listing, [(ROOT_LIN, 1)], None, [])
            self._stage(TOP, _record_of(scan, ROOT_LIN))
            self.diff.tally.new += 1
            self._queue_root(task)
            self.counts.add(scan.counts)
        elif not _as_recorded(scan, record):
            self.diff.take(scan, record)
        self._waiting = [(ROOT_LIN, b"", 0)]

    def _queue_root(self, task: DirTask) -> None:
        if self._roots.many:
            self.made_up.append(Meta(ROOT_LIN, self._snapshot, 3, 0o755, nlink=2))
        else:
            self._queue.add(task, 1, 0)

    # -- the first backup ----------------------------------------------------------------------

    def step_first(self, scan: Callable[[ScanPart], ScanOutcome]) -> bool:
        """Walk on for a while and queue tasks; False when there is nothing more to walk."""
        if self._roots.many and self._waiting == [(ROOT_LIN, b"", 0)]:
            self._take_first(self._top_scan())
            self._waiting.pop(0)
        seen = 0
        index = 0
        while index < len(self._waiting) and seen < QUOTA:
            outcome = scan(ScanPart([self._waiting[index]], 1, trust=False))
            index += 1
            for found in outcome.changed:
                self._take_first(found)
                seen += found.counts.items + 1
            self._take_unlisted(outcome.unlisted)
            for error_lin, error_path, words in outcome.errors:
                self.errors.append((error_path, words))
                self.unread.add(error_lin)
                self._stage(error_lin, DirRecord(b"", b"\x90", [], [], Counts()))
        del self._waiting[:index]
        if not self._waiting:
            self._flush()
        return bool(self._waiting)

    def _top_scan(self) -> DirScan:
        listing = self._roots.top_listing()
        stats = decode_listing(listing)
        below = [(i, s.name, 0) for i, s in enumerate(stats)]
        return _made_up_scan(ROOT_LIN, listing, below, self._now_ns)

    def _take_first(self, scan: DirScan) -> None:
        task, record, visits = self.diff.take_new(scan)
        self.items_seen += scan.counts.items
        self.counts.add(scan.counts)
        self._stage(scan.lin, record)
        if scan.counts.items:
            self._queue.add(task, scan.counts.items, scan.counts.bytes)
        self._waiting.extend(visits)

    # -- later ones ----------------------------------------------------------------------------

    def run(self, scan_parts: ScanParts, pieces: int, quota: int) -> None:
        """Walk all of it, settle what moved, and queue what is to be done."""
        visits = self._waiting
        if self._roots.many:
            visits = self._visit_top()
        while visits:
            while visits:
                visits = self._visit(visits, scan_parts, pieces, quota)
            visits = self._settled()
            if not visits:
                self._look_for_names(scan_parts)
                visits = self._settled()
        self._finish()

    def _settled(self) -> list[Visit]:
        """Judge which directory is which, as far as was seen; what is to be visited then."""
        visits = self.diff.settle(self._state.record, self._same_directory)
        self._moved.update((lin, path) for lin, path, _ in visits)
        return visits

    def _look_for_names(self, scan_parts: ScanParts) -> None:
        """Visit once more the directories that are as they were, and hold a name on record of a
        file of which another one came in unchanged, with its directory. How many of its names were
        seen says nothing: a tree may show one at several places."""
        inodes = set(self.diff.unknown_links())
        if not inodes or self._view is None:
            return
        known = Known(self._state, self._view, self._same_directory)
        is_gone = self.diff.vanished.is_gone
        found: list[Visit] = []
        for lin, record in self._state.all_records():
            stats = decode_listing(record.listing)
            if inodes.isdisjoint(stat.ino for stat in stats if not stat.is_dir):
                continue
            if lin in self.unread or self.diff.has_taken(lin):
                continue
            path = known.path(lin, self._moved)
            if path is not None and not any(map(is_gone, known.above(lin, self._moved))):
                found.append((lin, path, 0))
        # What is known below them was visited already; what is new may have come since.
        for _ in self._scanned([ScanPart(found, sys.maxsize, trust=False)], scan_parts):
            pass

    def _visit_top(self) -> list[Visit]:
        scan, record = self._top_scan(), self._state.record(ROOT_LIN)
        if record is not None and _as_recorded(scan, record) and self._trust:
            self.items_seen += record.counts.items
            return [(lin, name, 0) for name, lin in record.subdirs]
        return self.diff.take(scan, record) or self.diff.settle(
            self._state.record, self._same_directory
        )

    def _visit(
        self, visits: list[Visit], scan_parts: ScanParts, pieces: int, quota: int
    ) -> list[Visit]:
        """One round: visit these and what is known below them; returns what to visit next."""
        size = -(-len(visits) // pieces)
        parts = [
            ScanPart(visits[start : start + size], quota, self._trust)
            for start in range(0, len(visits), size)
        ]
        following: list[Visit] = []
        for visits_below in self._scanned(parts, scan_parts):
            following.extend(visits_below)
            following.extend(self._judge_early())
        return following

    def _scanned(self, parts: list[ScanPart], scan_parts: ScanParts) -> Iterator[list[Visit]]:
        """Scan parts, and take what is found; what is to be visited below each."""
        for outcome in scan_parts(parts):
            self.items_seen += outcome.unchanged.items
            following = outcome.left
            self._take_unlisted(outcome.unlisted)
            for lin, path, words in outcome.errors:
                self.errors.append((path, words))
                self._unread(lin)
            for scan in outcome.changed:
                record = self._state.record(scan.lin)
                self.items_seen += scan.counts.items
                following.extend(self.diff.take(scan, record))
            yield following

    def _judge_early(self) -> list[Visit]:
        """Queue what cannot have moved, if that is much; returns the directories among it."""
        if self._known is None:
            enough = max(EARLY_ITEMS, self._state.head.counts.items // EARLY_SHARE)
            if self.diff.waiting < enough:
                return []
            self._known = {
                fingerprint(stat)
                for _, record in self._state.all_records()
                for stat in decode_listing(record.listing)
            }
        tasks, visits = self.diff.judge_early(self._known)
        for task in tasks:
            self._queue_changed(task)
        return visits

    def _take_unlisted(self, unlisted: list[tuple[int, bytes, str]]) -> None:
        for lin, path, words in unlisted:
            self.errors.append((path, words))
            self.unread.add(lin)

    def _unread(self, lin: int) -> None:
        """A directory that could not be read: what was known of it and of what is below it stays,
        a new one is empty."""
        self.unread.add(lin)
        self.unvisited.add(lin)
        if self._state.record(lin) is None:
            self._stage(lin, DirRecord(b"", b"\x90", [], [], Counts()))
            self.changed.append(lin)

    def _same_directory(self, lin: int, path: bytes) -> bool:
        """Whether a directory was born when the one on record was; inodes are used again. (Read
        through a mount, birth times are not known.)"""
        meta = self._view.meta(lin) if self._view is not None else None
        if meta is None:
            return False
        try:
            fd = self._roots.open(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True  # who visits it meets that too, and reports it
        try:
            born_ns = self._stat.of(fd).btime_ns
        finally:
            os.close(fd)
        return meta.btime_ns == born_ns or not (meta.btime_ns and born_ns)

    def _finish(self) -> None:
        for task, lin, record in self.diff.finish():
            old = self._state.record(lin)
            if old is not None:
                self.counts.add(old.counts, -1)
            self.counts.add(record.counts)
            self.changed.append(lin)
            self._stage(lin, record)
            if task is not None and lin == TOP:
                task.names = []
                self._queue_root(task)
            elif task is not None:
                self._queue_changed(task)
        self._flush()

    def _queue_changed(self, task: DirTask) -> None:
        items = task.items or []
        stats = decode_listing(task.listing) if items else []
        size = sum(bytes_of(task, index, stats[index]) for index in items)
        self._queue.add(task, max(len(items), len(task.names or ())), size)

    def bury(self, snapshot: int) -> tuple[list[Meta], list[Entry]]:
        """The tombstones of what is gone; its directories' records go too."""
        self._keep_named()
        metas, entries, dead = self.diff.vanished.tombstones(snapshot)
        self.diff.tally.deleted += len(metas)
        for lin in dead:
            # In a tree that does not stand still it may have been listed before it was gone.
            old = self._state.staged(lin, self._snapshot) or self._state.record(lin)
            if old is not None:
                self.counts.add(old.counts, -1)
            self._stage(lin, None)
            self.changed.append(lin)
        self._flush()
        return metas, entries

    def _keep_named(self) -> None:
        """Keep what has a name elsewhere; see rule 7 of :mod:`cloudfs.core.treediff`."""
        head = self._state.head
        every = bool(self.unread or head.again or head.unread)
        doubtful = self.diff.vanished.in_doubt(every=every)
        more = bool(doubtful)
        while more:  # what is in a directory that is kept is not gone with it
            lins, found = sorted(doubtful), set[int]()
            for _, record in self.standing(set(doubtful.values())):
                for first, count in record.lins:
                    found.update(lins[bisect_left(lins, first) : bisect_left(lins, first + count)])
            self.diff.vanished.keep(found)
            doubtful = {lin: ino for lin, ino in doubtful.items() if lin not in found}
            more = every and bool(doubtful and found)

    def standing(self, inodes: set[int]) -> Iterator[tuple[int, DirRecord]]:
        """The records, as they are to be, of directories that are there, if they hold any of these
        inode numbers."""
        looked_at, is_gone = set(self.changed), self.diff.vanished.is_gone
        for lin in looked_at:
            record = self._state.staged(lin, self._snapshot)
            if record is not None and not is_gone(lin):
                yield lin, record
        for lin, record in self._in_force(inodes):
            if lin not in looked_at and not is_gone(lin):
                yield lin, record

    def _in_force(self, _inodes: set[int]) -> Iterator[tuple[int, DirRecord]]:
        return self._state.all_records()

    def forget(self, lin: int) -> None:
        """A directory that was found is not in the snapshot after all: nor is what is below it."""
        waiting = [lin]
        while waiting:
            lin = waiting.pop()
            record = self._state.staged(lin, self._snapshot) or self._state.record(lin)
            if record is not None:
                self.counts.add(record.counts, -1)
                self.changed.append(lin)
                self.unread.discard(lin)
                self.unvisited.discard(lin)
                self._stage(lin, None)
                waiting.extend(below for _, below in record.subdirs)
        self._flush()

    # -- records -------------------------------------------------------------------------------

    def _stage(self, lin: int, record: DirRecord | None) -> None:
        self._staged.append((lin, record))
        if len(self._staged) >= _RECORDS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if self._staged:
            self._state.put_records(self._snapshot, self._staged)
            self._staged = []


def _made_up_scan(
    lin: int, listing: bytes, subdirs: list[tuple[int, bytes, int]], now_ns: int
) -> DirScan:
    counts, doubtful = Counts(), []
    for index, stat in enumerate(decode_listing(listing)):
        counts.count(stat)
        if is_fresh(stat.ctime_ns, now_ns, 0):  # directories, as sources are
            doubtful.append(index)
    signature = b"" if doubtful else xxhash.xxh3_128_digest(listing)
    return DirScan(lin, b"", 0, signature, listing, subdirs, [], doubtful, counts)


def _as_recorded(scan: DirScan, record: DirRecord) -> bool:
    return scan.signature != b"" and scan.signature == record.signature


def _record_of(scan: DirScan, first_lin: int) -> DirRecord:
    subdirs = [(name, first_lin + index) for index, name, _ in scan.subdirs]
    runs = [(first_lin, scan.counts.items)]
    return DirRecord(scan.signature, scan.listing, runs, subdirs, scan.counts, scan.doubtful)
