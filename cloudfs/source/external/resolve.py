"""From what a changes command told to a changelist that can be gone by.

What is told is not taken as it is: sources differ in what they call a change, and one that says
too little must not lead to a backup that holds too little. So it is set beside the last snapshot,
as the records have it, and the new one, at each place that is named and nowhere else.

1. Each line names places to look at: a name in a directory. Where names came or went, the row of
   the directory itself has changed too, which is a name in the one above.
2. A directory to look into is one that was there, and is now where the renames that were told lead.
   One that is not on record is new, whether that was told or not: it is visited whole.
3. A directory that vanished takes along what was in it; one that appeared where nothing told of a
   rename, with the inode and birth time of one that vanished, has moved, and is compared whole.
4. A file of several names is one file: when one of its names is looked at, all are, which are found
   in the records. So it is when it is told of under a name in a directory that is left out.
5. What contradicts itself or the two trees ends in a SourceError, and the snapshot is scanned.
"""

from __future__ import annotations

import os
import stat as st
from collections.abc import Callable

from cloudfs.core.changelist import Changelist, DirChange, Range
from cloudfs.core.changes import Stat
from cloudfs.core.errors import SourceError
from cloudfs.source.external.moves import Moves, shown
from cloudfs.source.external.told import Ranges, Told
from cloudfs.source.external.trees import NewTree, OldTree, join, split

_ALL: Range = (0, 1 << 63)


class Resolver:
    """Resolves what was told of one source; only for use once."""

    def __init__(
        self,
        told: Told,
        old: OldTree,
        new: NewTree,
        excluded: Callable[[bytes], bool] | None,
        born_ns: Callable[[int], int | None],
        *,
        unique_inodes: bool,
    ) -> None:
        """``excluded`` says whether a directory is left out of the backup (None: none is),
        ``born_ns`` when the one with a LIN was made; ``unique_inodes``: no number was ever given
        twice."""
        self._told = told
        self._old = old
        self._new = new
        self._patterns = excluded
        self._born_ns = born_ns
        self._unique = unique_inodes
        self._moves = Moves(told, old, new, self._excluded)
        self._names: dict[bytes, set[bytes]] = {}
        self._place: dict[bytes, tuple[bytes, int]] = {}  # old path and LIN of those looked into
        self._todo: list[tuple[bytes, bytes]] = []
        self._whole: set[bytes] = set()  # directories in which all names are looked at
        self._vanished: dict[int, list[tuple[bytes, int]]] = {}  # directories, by inode
        self._appeared: list[bytes] = []
        self._fresh: dict[int, list[bytes]] = {}  # new directories, by inode
        self._link_lins: set[int] = set()
        self._links: dict[int, set[bytes]] = {}  # names seen of inodes with several
        self._links_left_out: dict[int, set[bytes]] = {}  # names told where they are left out
        self._link_counts: dict[int, int] = {}
        self._linked: tuple[set[int], set[int]] = set(), set()  # whose names were looked for
        self._seen: set[int] = set()

    def changelist(self) -> Changelist:
        """The changes, by directory. Raises SourceError with the reason to scan instead."""
        try:
            self._moves.take_renames()
            by_inode = self._find_inodes()
            self._look_into_inodes(by_inode)
            self._look_where_told()
            self._follow()
            self._look_at_inodes(by_inode)
            self._follow()
            while self._look_at_links():
                self._follow()
            self._check()
        except OSError as error:
            place = error.filename or "a directory"
            words = (error.strerror or str(error)).lower()
            raise SourceError(f"{place} in the new snapshot cannot be read ({words}).") from None
        changes = [
            DirChange(path, self._place[path][0], names, self._ranges(path, names))
            for path, names in sorted(self._names.items())
            if names
        ]
        return Changelist(changes)

    def _excluded(self, path: bytes) -> bool:
        return self._patterns is not None and self._patterns(path)

    # -- what is told by paths -------------------------------------------------------------------

    def _look_where_told(self) -> None:
        told = self._told
        for path in told.created:
            self._look(path, names_changed=True)
        for path in told.deleted:
            self._look_before(path)
        for path, origin in list(self._moves.origins.items()):
            self._look(path, names_changed=True)
            self._look_before(origin)
        for path in (*told.data, *told.attributes):
            self._look(path)
        for path in told.data:
            now = self._new.lstat(path)
            if now is not None and st.S_ISDIR(now.st_mode):
                self._list(path)

    def _look(self, path: bytes, *, names_changed: bool = False) -> None:
        """Look at a place in the new snapshot. (The source itself is always looked at.)"""
        if not path:
            return
        directory, name = split(path)
        if self._into(directory):
            if name not in self._names[directory]:
                self._names[directory].add(name)
                self._todo.append((directory, name))
            if names_changed and directory:
                self._look(directory)
        elif self._excluded(directory):
            now = self._new.lstat(path)
            if now is not None and now.st_nlink > 1 and not st.S_ISDIR(now.st_mode):
                self._links_left_out.setdefault(now.st_ino, set()).add(path)

    def _look_before(self, path: bytes) -> None:
        """Look at a place where something was: in its directory, wherever that is now."""
        directory, name = split(path)
        now = self._moves.now(directory)
        if now is not None:
            self._look(join(now, name), names_changed=True)

    def _into(self, path: bytes) -> bool:
        """Whether a directory can be looked into: it is backed up, and was before."""
        if path in self._names:
            return True
        if path and self._excluded(path):
            return False
        before = self._moves.before(path)
        if before is None:
            return False
        lin = self._old.lin(before)
        if lin is None:
            if not path:
                raise SourceError("the source is not in the last snapshot.")
            self._look(path)  # it is new, and nobody said so
            return False
        self._check_same(path, before)
        self._names[path] = set()
        self._place[path] = before, lin
        return True

    def _check_same(self, path: bytes, before: bytes) -> None:
        """A directory must be the one that it is said to be."""
        if not path:
            return
        old, now = self._old.entry(before), self._new.lstat(path)
        if now is None or not st.S_ISDIR(now.st_mode):
            raise SourceError(f"{shown(path)} is no directory in the new snapshot.")
        if old is None or old[0].ino != now.st_ino:
            raise SourceError(f"{shown(path)} is another directory, which was not told.")
        if self._moves.told(path) and self._born_ns(old[1]) != self._new.born_ns(path):
            raise SourceError(f"{shown(path)} was not made from {shown(before)}.")

    def _list(self, path: bytes) -> None:
        """Look at the names in a directory that are not as they were."""
        if not self._into(path):
            return
        before = dict(self._old.entries(self._place[path][1]))
        changed = False
        for name, inode, is_dir in self._new.list(path):
            known = before.pop(name, None)
            if known is None or known[0].ino != inode or known[0].is_dir != is_dir:
                self._look(join(path, name))
                changed = True
        for name in before:
            self._look(join(path, name))
            changed = True
        if changed:
            self._look(path)

    # -- what is told by inode numbers -----------------------------------------------------------

    def _find_inodes(self) -> list[tuple[bytes, Stat]]:
        """The paths, in the last snapshot, of all that was told by its inode number."""
        wanted = self._told.inodes
        if not wanted:
            return []
        found = self._old.find(lambda stat, _: stat.ino in wanted)
        return [(path, stat) for path, stat in found if path is not None]

    def _look_into_inodes(self, by_inode: list[tuple[bytes, Stat]]) -> None:
        """Directories first: what is in them tells what moved."""
        for path, stat in by_inode:
            kinds = self._told.inodes[stat.ino]
            now = self._moves.now(path)
            if not stat.is_dir or now is None:
                continue
            there = self._new.lstat(now)
            if there is None or there.st_ino != stat.ino or not st.S_ISDIR(there.st_mode):
                continue  # it moved: its directory, then and now, must be told too
            if kinds & {"created", "deleted"}:
                self._told.created.add(now)
            self._look(now)
            if kinds != {"attributes"}:
                self._list(now)
        root = self._new.lstat(b"")
        if root is not None and root.st_ino in self._told.inodes:
            self._list(b"")

    def _look_at_inodes(self, by_inode: list[tuple[bytes, Stat]]) -> None:
        """Then all else, wherever its directory is."""
        for path, stat in by_inode:
            directory, name = split(path)
            now = self._moves.now(directory)
            if now is None or now in self._whole:
                continue
            place = join(now, name)
            kinds = self._told.inodes[stat.ino]
            if not stat.is_dir and kinds <= {"changed", "attributes"}:
                if "changed" in kinds:
                    self._told.data.setdefault(place, self._told.inode_data[stat.ino])
                else:
                    self._told.attributes.add(place)
            self._look(place)

    # -- what follows from it --------------------------------------------------------------------

    def _follow(self) -> None:
        """Look at all places, and at what they lead to, until there are no more."""
        while self._todo or self._appeared:
            while self._todo:
                self._compare(*self._todo.pop())
            appeared, self._appeared = self._appeared, []
            for path in appeared:
                self._enter(path)

    def _compare(self, directory: bytes, name: bytes) -> None:
        """Compare one name in a directory with what it was."""
        before, lin = self._place[directory]
        old, path = self._old.entries(lin).get(name), join(directory, name)
        now = self._new.lstat(path)
        old_path = join(before, name)
        was_dir = old is not None and old[0].is_dir
        is_dir = now is not None and st.S_ISDIR(now.st_mode)
        if old is not None and now is not None and was_dir and is_dir and old[0].ino == now.st_ino:
            if self._made_anew(path, old_path) or directory in self._whole:
                self._compare_whole(path, old[1])
        else:
            if old is not None and was_dir and not self._moves.has_moved(old_path):
                self._vanish(old_path, old[0], old[1])
            if is_dir:
                self._appeared.append(path)
        if old is not None and not was_dir and old[0].nlink > 1:
            self._link_lins.add(old[1])
        if now is not None:
            self._see(path, now)

    def _made_anew(self, path: bytes, old_path: bytes) -> bool:
        """Whether a directory was told to be a new one although it has the inode of that which
        stood there. It is gone by as if it were that one, and nothing in it as it was."""
        if self._moves.differs(path, old_path):
            raise SourceError(f"{shown(path)} is the directory that it was, and was told moved.")
        if path not in self._told.created and old_path not in self._told.deleted:
            return False
        self._moves.add(path, old_path)
        return True

    def _see(self, path: bytes, now: os.stat_result) -> None:
        self._seen.add(now.st_ino)
        if now.st_nlink > 1 and not st.S_ISDIR(now.st_mode):
            self._links.setdefault(now.st_ino, set()).add(path)
            self._link_counts[now.st_ino] = now.st_nlink

    def _vanish(self, path: bytes, stat: Stat, lin: int) -> None:
        """A directory is not where it was; so are those in it of which nothing else was told."""
        if path in self._moves.gone:
            return
        self._moves.gone.add(path)
        self._vanished.setdefault(stat.ino, []).append((path, lin))
        for below, other, other_lin in self._old.below(lin, path):
            if self._moves.is_elsewhere(below):
                continue
            if other.is_dir:
                self._vanished.setdefault(other.ino, []).append((below, other_lin))
            elif other.nlink > 1:
                self._link_lins.add(other_lin)

    def _enter(self, top: bytes) -> None:
        """Go through a directory that appeared: it may have moved, and so may those in it."""
        waiting = [top]
        while waiting:
            path = waiting.pop()
            now = self._new.lstat(path)
            if now is None or self._excluded(path):
                continue
            self._seen.add(now.st_ino)
            if path in self._moves.origins:
                self._check_same(path, self._moves.origins[path])
                continue
            known = self._moved(path, now.st_ino)
            if known is not None:
                self._moves.add(path, known[0])
                self._compare_whole(path, known[1])
                continue
            self._fresh.setdefault(now.st_ino, []).append(path)
            for name, _, is_dir in self._new.list(path):
                below = join(path, name)
                if is_dir:
                    waiting.append(below)
                elif (item := self._new.lstat(below)) is not None:
                    self._see(below, item)

    def _moved(self, path: bytes, inode: int) -> tuple[bytes, int] | None:
        """The old path and the LIN of a directory that has moved to this path."""
        for old_path, lin in self._vanished.get(inode, ()):
            if not self._moves.is_taken(old_path) and self._born_ns(lin) == self._new.born_ns(path):
                return old_path, lin
        return None

    def _compare_whole(self, path: bytes, lin: int) -> None:
        """Look at all names in a directory, and in those that are in it."""
        self._whole.add(path)
        if not self._into(path):
            return
        names = {name for name, _, _ in self._new.list(path)}
        for name in names.union(self._old.entries(lin)):
            self._look(join(path, name))

    # -- files of several names ------------------------------------------------------------------

    def _look_at_links(self) -> bool:
        """Look at all names, on record, of the files of several that were met; False when no more
        were met since."""
        lins = self._link_lins - self._linked[0]
        inodes = (self._links.keys() | self._links_left_out.keys()) - self._linked[1]
        if not lins and not inodes:
            return False
        self._linked[0].update(lins)
        self._linked[1].update(inodes)
        for path, _ in self._old.find(
            lambda stat, lin: not stat.is_dir and (lin in lins or stat.ino in inodes)
        ):
            if path is None:
                raise SourceError("a file has names in several sources.")
            directory, name = split(path)
            now = self._moves.now(directory)
            if now is not None:
                self._look(join(now, name))
        return True

    # -- the end ---------------------------------------------------------------------------------

    def _check(self) -> None:
        """See that nothing was left out."""
        for inode, paths in self._fresh.items():
            if any(self._moved(path, inode) is not None for path in paths):
                raise SourceError(f"{shown(paths[0])} moved, which was not told.")
        for inode, backed_up in self._links.items():
            names = backed_up | self._links_left_out.get(inode, set())
            if len(names) < self._link_counts[inode] and not self._unique:
                raise SourceError(f"{shown(min(names))} has names that are not told nor on record.")
        for inode, kinds in self._told.inodes.items():
            if "created" in kinds and inode not in self._seen and self._patterns is None:
                raise SourceError(f"inode {inode} is told new, and stands in no changed directory.")

    def _ranges(self, directory: bytes, names: set[bytes]) -> dict[bytes, list[Range]]:
        """Where the data of files can be others: for all but those of which it was told."""
        before, lin = self._place[directory]
        entries = self._old.entries(lin)
        found: dict[bytes, list[Range]] = {}
        for name in names:
            old = entries.get(name)
            ranges = self._told_ranges(join(directory, name), join(before, name))
            if ranges is None or old is None or old[0].nlink > 1:
                found[name] = [_ALL]
            elif ranges:
                found[name] = ranges
        return found

    def _told_ranges(self, path: bytes, old_path: bytes) -> Ranges:
        told = self._told
        if path in told.created or old_path in told.deleted:
            return None
        if self._moves.differs(path, old_path):
            return told.data.get(path) if path in self._moves.origins else None
        if path in told.data:
            return told.data[path]
        return [] if path in told.attributes else None
