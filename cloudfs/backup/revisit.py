"""Walking by a changelist: only what a change source names is looked at.

1. Each directory that the changelist names is found on record, by its path at the last snapshot or
   by its inode, and the names in it are looked at again. One that is not on record is new: its name
   in the directory above has changed too, and it is visited whole from there.
2. What appeared and vanished is settled as after any walk; what moved is as it was, but for what
   the changelist names.
3. Where a source knows items by inode alone, their names on record are looked at, and so are the
   other names of files with several that have appeared: without them a file that got a further name
   would be taken for a new one, and one that lost a name for gone. Their directories may have moved
   with one above, so they come after the settling.
4. Directories in which something could not be read last time are visited whole; where they were not
   looked into at all, so is all that is known below them. So are those that were not where the
   changelist had found them, in a tree that does not stand still: they may be back before anybody
   hears of it. In all these more may have changed than the changelist says, which counts from that
   last time on, and what is on record may have been elsewhere by then.
5. Much may be named. So others have their turn after each QUOTA names, and what cannot have moved
   is handed out during the walk, as in a scan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from cloudfs.backup.known import Known
from cloudfs.backup.walk import QUOTA, ScanParts, Walk
from cloudfs.core.changelist import Changelist, DirChange
from cloudfs.core.changes import DirRecord, Visit, decode_listing
from cloudfs.core.rows import ROOT_LIN
from cloudfs.source.scan import Scanner, reason


class Revisit(Walk):
    """A walk that goes by a changelist."""

    def run_changes(
        self,
        changes: Changelist,
        scanner: Scanner,
        scan_parts: ScanParts,
        quota: int,
        turn: Callable[[], None],
    ) -> None:
        """Visit only what a changelist names and what is new, settle and queue as :meth:`run`.

        ``turn`` is called now and then while names are looked at.
        """
        assert self._view is not None
        self._turn, self._turn_at = turn, QUOTA
        self._early: list[Visit] = []  # directories that were judged early
        self._scanner, self._changes = scanner, changes
        self._known_names = Known(self._state, self._view, self._same_directory)
        self._taken: set[int] = set()
        self._as_was: set[int] = set()  # of these: nothing was found changed, and nothing compared
        self._looked_at_whole: set[int] = set()
        self._gone: dict[int, DirChange] = {}  # changes in what is not there, as far as was seen
        self._in_doubt: set[int] = set()  # directories that are not where they were looked for
        self._stands: dict[tuple[int, bytes], bool] = {}
        if self._roots.many:
            self._visit_top()
        if changes.inodes is not None:
            self._state.index_inodes()
        again = self._again()
        self.diff.behind = again.keys()
        todo = self._on_record()
        for inode in changes.elsewhere:
            self._in_doubt.update(self._known_names.directories(inode))
        further: dict[int, DirChange] = {}
        for lin in again:
            _either(lin, todo, further).whole = True
        for inode in changes.inodes or ():
            self._add_names(inode, todo, further)
        for inode in changes.looks:
            self._add_names(inode, todo, further, told=False)
        for inode in self._told_of_one_name():
            self._add_names(inode, todo, further)
        for lin, change in todo.items():
            self._revisit(lin, change, further)
            self._take_turns()
        self._settle(scan_parts, quota)
        looked_at = changes.looks.union(changes.inodes or ())
        while further or self._linked() - looked_at:
            for inode in self._linked() - looked_at:
                looked_at.add(inode)
                self._add_names(inode, {}, further)
            later: dict[int, DirChange] = {}
            for lin, change in further.items():
                self._revisit_further(lin, change, later)
                self._take_turns()
            self._settle(scan_parts, quota)
            further = later | self._found_again()
        self.unread.update(lin for lin in self._in_doubt if not self._is_gone(lin))
        self._finish()

    def _again(self) -> dict[int, None]:
        """The directories of rule 4, such as are below others after these."""
        head = self._state.head
        above = self._known_names.above
        waiting = sorted(head.unvisited, key=lambda lin: -len(above(lin, {})))
        found: dict[int, None] = {}
        while waiting:
            lin = waiting.pop()
            record = self._state.record(lin)
            if record is not None and lin not in found:
                found[lin] = None
                waiting.extend(below for _, below in record.subdirs)
        return found | dict.fromkeys(head.again)

    def _linked(self) -> set[int]:
        """Inode numbers of files that appeared and may have other names on record."""
        found = self.diff.unknown_links()
        if self._changes.inodes is not None:
            return set(found)
        # Who names all names of what changed does so where they were, too: by its number, if that
        # is never used again, a file that moved is known. But where they were left out, none is.
        known = self._stable_inodes and not self._scanner.filters.by_name
        lacking = {inode for inode, more in found.items() if more > 0 and not known}
        if lacking:
            self._state.index_inodes()
        return lacking

    def _told_of_one_name(self) -> set[int]:
        """Inode numbers of files of which a change was told under one name, by a source that tells
        of no other, and of which others may be on record apart from it: where it is left out, or
        where one came while the directory of another could not be looked into."""
        apart, filters = self._state.head.apart, self._scanner.filters
        if self._changes.inodes is not None or not (apart or filters.by_name):
            return set()
        links = self._scanner.links_among
        found = {
            inode
            for change in self._changes.dirs
            for inode in links(change.path, change.names, left_out=not apart)
        }
        if found:
            self._state.index_inodes()
        return found

    def _on_record(self) -> dict[int, DirChange]:
        """The changes in directories that are on record, by LIN."""
        found: dict[int, DirChange] = {}
        behind = self.diff.behind
        for change in self._changes.dirs:
            top = not change.path or (self._roots.many and b"/" not in change.path)
            if change.old_path is not None:
                lin = self._known_names.by_path(change.old_path)
                if lin is not None and lin in behind and not self._same(lin, change.path):
                    continue  # another one was there by then
            elif top:
                lin = self._known_names.by_path(change.path)
            else:
                # One that is on record twice was elsewhere when the older place could not be read.
                known = sorted(self._known_names.directories(change.inode), key=behind.__contains__)
                lin = self._known_names.standing(known, change.path)
                self._in_doubt.update(known if lin is None else ())
            # What is not on record is within something new, or left out of the backup.
            if lin is None or self._scanner.leaves_out(change.path):
                continue
            if found.setdefault(lin, change) is not change:
                found[lin].join(change)  # it was moved meanwhile, and told of at both places
        return found

    def _add_names(
        self,
        inode: int,
        todo: dict[int, DirChange],
        further: dict[int, DirChange],
        *,
        told: bool = True,
    ) -> None:
        """Let all names on record of an inode be looked at."""
        ranges = (self._changes.inodes or {}).get(inode)
        for lin, name in self._known_names.names(inode):
            change = _either(lin, todo, further)
            if told:
                change.looks.discard(name)
            elif name not in change.names:
                change.looks.add(name)
            change.names.add(name)
            if ranges is not None:
                change.ranges.setdefault(name, []).extend(ranges)

    def _in_force(self, inodes: set[int]) -> Iterator[tuple[int, DirRecord]]:
        self._state.index_inodes()
        for lin in {lin for ino in inodes for lin in self._state.directories_with(ino)}:
            record = self._state.record(lin)
            if record is not None:
                yield lin, record

    # -- looking ---------------------------------------------------------------------------------

    def _take_turns(self) -> None:
        """Let others have their turn, if enough names were looked at since the last one."""
        if self.items_seen >= self._turn_at:
            self._turn_at = self.items_seen + QUOTA
            self._early.extend(self._judge_early())
            self._turn()

    def _revisit(self, lin: int, change: DirChange, further: dict[int, DirChange]) -> None:
        """Look at names in a directory, once; ``further`` gets what is to be looked at for that."""
        record = self._state.record(lin)
        if record is None or self._is_done(lin):
            return
        self._taken.add(lin)
        self._as_was.discard(lin)
        if self._scanner.filters.by_path and self._known_names.path(lin, {}) != change.path:
            change.whole = True  # patterns may leave out other things in it now
        if change.whole:
            self._in_doubt.discard(lin)
        record = self._doubting(record, change)
        scanner = self._scanner
        try:
            scan = scanner.revisit(lin, change, record, reread=self._changes.reread)
        except OSError as error:
            self.errors.append((change.path, reason(error)))
            self._unread(lin)
            return
        self._take_unlisted(scanner.unlisted)
        scanner.unlisted.clear()
        self.items_seen += len(change.names)
        if scan is not None:
            self.diff.take(scan, record)
        else:
            self._as_was.add(lin)
        if change.whole:
            self._looked_at_whole.add(lin)
        self._suspect(record, change, further)

    def _is_done(self, lin: int) -> bool:
        """Whether a directory needs no further look: all in it was compared with its record."""
        return lin in self._taken and lin not in self._as_was

    def _doubting(self, record: DirRecord, change: DirChange) -> DirRecord:
        """The record as it is to be compared with: whose data is to be read, whatever lstat says.

        Who has a changelist need not doubt time stamps, but of what is named.
        """
        doubtful = record.doubtful if change.whole else []
        if not self._changes.reread:
            return msgspec.structs.replace(record, doubtful=doubtful)
        fresh = set(record.doubtful)
        told = change.names - change.looks
        named = [
            index
            for index, stat in enumerate(decode_listing(record.listing))
            if (stat.name in told and stat.is_file)
            or (stat.name in change.names and index in fresh)
        ]
        doubtful = sorted({*doubtful, *named})
        signature = b"" if doubtful else record.signature
        return msgspec.structs.replace(record, doubtful=doubtful, signature=signature)

    def _suspect(self, record: DirRecord, change: DirChange, further: dict[int, DirChange]) -> None:
        """A directory among the names may be another one that got the number of the one on record:
        then it is looked at whole, and so on below it."""
        for name, below in record.subdirs:
            if change.whole or name in change.names:
                path = change.path + b"/" + name if change.path else name
                if not self._same(below, path):
                    further.setdefault(below, DirChange(b"", None))

    def _revisit_further(self, lin: int, change: DirChange, later: dict[int, DirChange]) -> None:
        """Look at names in a directory that the changelist does not name itself."""
        if (lin == ROOT_LIN and self._roots.many) or self._is_done(lin):
            return
        path = self._known_names.path(lin, self._moved)
        if path is None or self._scanner.leaves_out(path):
            return  # not in the last snapshot: what is above it is looked at whole
        if self._is_gone(lin):
            self._gone[lin] = change
            return
        above = self._known_names.above(lin, self._moved)
        if not self.unvisited.isdisjoint(above):
            return  # it is visited with that one, next time
        for at in above:
            place = self._known_names.path(at, self._moved)
            if place and at not in self._looked_at_whole and not self._same(at, place):
                if self._is_done(at):
                    self.errors.append((path, "could not be opened"))
                    self._unread(lin)
                    return
                whole = DirChange(place, None, whole=True, inode=self._inode(at))
                self._revisit(at, whole, later)
                if at != lin:
                    later[lin] = change
                return
        change.path, change.inode = path, self._inode(lin)
        self._revisit(lin, change, later)

    def _inode(self, lin: int) -> int:
        """The inode number of a directory on record: in a tree that does not stand still another
        one may be at its path by the time it is opened."""
        meta = self._view.meta(lin) if self._view is not None else None
        return meta.ino if meta is not None else 0

    def _found_again(self) -> dict[int, DirChange]:
        """Changes in directories that seemed to be gone, and then appeared elsewhere."""
        found = {lin: change for lin, change in self._gone.items() if not self._is_gone(lin)}
        for lin in found:
            del self._gone[lin]
        return found

    def _is_gone(self, lin: int) -> bool:
        """Whether a directory is gone, with one above it or by itself, as far as was seen."""
        above = self._known_names.above(lin, self._moved)
        return any(self.diff.vanished.is_gone(at) for at in above)

    def _same_directory(self, lin: int, path: bytes) -> bool:
        return self._same_top(lin, path) and super()._same_directory(lin, path)

    def _same_top(self, lin: int, path: bytes) -> bool:
        """Whether the inode number of what is at a path says that it is the directory on record, by
        where that was. (Which file systems are where is as it was, or there would be no
        changelist.)"""
        tops = self._changes.tops
        if len(set(tops.values())) < 2:
            return True
        was = self._known_names.path(lin, {})
        return was is not None and _side_of(tops, was) == _side_of(tops, path)

    def _same(self, lin: int, path: bytes) -> bool:
        """Whether the directory on record stands at a path; asked of each once."""
        found = self._stands.get((lin, path))
        if found is None:
            found = self._stands[lin, path] = self._same_directory(lin, path)
        return found

    def _settle(self, scan_parts: ScanParts, quota: int) -> None:
        """Judge what appeared, and visit what is new, until nothing is left to visit."""
        visits, self._early = self._early, []
        if not visits:
            visits = self.diff.settle(self._state.record, self._same_directory)
        while visits:
            known = {lin: path for lin, path, _ in visits if self._state.record(lin) is not None}
            self._moved.update(known)
            if self._scanner.filters.by_path:
                self._look_at_moved([visit for visit in visits if visit[0] in known])
            # Else what moved is as it was.
            visits = [visit for visit in visits if visit[0] not in known]
            while visits:
                visits = self._visit(visits, scan_parts, 1, quota)
            visits = self.diff.settle(self._state.record, self._same_directory)

    def _look_at_moved(self, visits: list[Visit]) -> None:
        """Look at directories that moved, and at what is known below them, whole, if that was not
        done."""
        while visits:
            lin, path, inode = visits.pop()
            if not self._is_done(lin):
                self._revisit(lin, DirChange(path, None, whole=True, inode=inode), {})
                self._take_turns()
            if self.diff.has_taken(lin):
                visits.extend(self.diff.known_below(lin))
            elif lin in self._as_was:
                record = self._state.record(lin)
                below = record.subdirs if record is not None else []
                visits.extend((at, path + b"/" + name, 0) for name, at in below)


def _side_of(tops: dict[bytes, int], path: bytes) -> int | None:
    """What the deepest of ``tops`` that a path is at or below has."""
    above = (top for top in tops if (path + b"/").startswith(top and top + b"/"))
    return tops.get(max(above, key=len, default=b""))


def _either(lin: int, todo: dict[int, DirChange], further: dict[int, DirChange]) -> DirChange:
    """The change of a directory, wherever it is; a new one goes to ``further``."""
    return todo.get(lin) or further.setdefault(lin, DirChange(b"", None))
