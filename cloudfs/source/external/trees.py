"""The two trees between which a changes command told the difference: one from the local records,
one in the new snapshot."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator

from cloudfs.core.changes import Stat, decode_listing, expand
from cloudfs.core.rows import ROOT_LIN
from cloudfs.db.state import SyncState
from cloudfs.source.inode import StatReader, open_directory

_LISTINGS_KEPT = 16

Entries = dict[bytes, tuple[Stat, int]]
"""What a directory held, and the LINs of it, by name."""


def join(path: bytes, name: bytes) -> bytes:
    """A path below the source."""
    return path + b"/" + name if path and name else path or name


def split(path: bytes) -> tuple[bytes, bytes]:
    """The directory of a path, and the name in it."""
    directory, _, name = path.rpartition(b"/")
    return directory, name


class OldTree:
    """A source as it was at the last snapshot. Paths are below the source."""

    def __init__(self, state: SyncState, prefix: bytes) -> None:
        """``prefix`` is the name of the source in the backup; b"" where it is the only one."""
        self._state = state
        self._prefix = prefix
        self._below: dict[int, dict[bytes, int]] = {}
        self._entries: OrderedDict[int, Entries] = OrderedDict()

    def lin(self, path: bytes) -> int | None:
        """The LIN of a directory; None where there was none."""
        lin = ROOT_LIN
        path = join(self._prefix, path)
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

    def entries(self, lin: int) -> Entries:
        """What was in a directory; what could not be read then was not in it."""
        found = self._entries.get(lin)
        if found is not None:
            self._entries.move_to_end(lin)
            return found
        record = self._state.record(lin)
        found = {}
        if record is not None:
            absent = set(record.absent)
            stats = decode_listing(record.listing)
            for index, (stat, entry) in enumerate(zip(stats, expand(record.lins), strict=True)):
                if index not in absent:
                    found[stat.name] = stat, entry
        self._entries[lin] = found
        if len(self._entries) > _LISTINGS_KEPT:
            self._entries.popitem(last=False)
        return found

    def entry(self, path: bytes) -> tuple[Stat, int] | None:
        """What was at a path, which is not that of the source itself."""
        directory, name = split(path)
        lin = self.lin(directory)
        return self.entries(lin).get(name) if lin is not None else None

    def below(self, lin: int, path: bytes) -> Iterator[tuple[bytes, Stat, int]]:
        """All that was below a directory, and the paths of it."""
        stack = [(lin, path)]
        while stack:
            directory, top = stack.pop()
            for name, (stat, entry) in self.entries(directory).items():
                yield join(top, name), stat, entry
                if stat.is_dir:
                    stack.append((entry, join(top, name)))

    def find(self, wanted: Callable[[Stat, int], bool]) -> list[tuple[bytes | None, Stat]]:
        """The paths of all entries that are wanted; None for one of another source.

        Reads all records: as long as there is much, not as long as much changed.
        """
        parents: dict[int, tuple[int, bytes]] = {}
        hits: list[tuple[int, Stat]] = []
        for lin, record in self._state.all_records():
            for name, directory in record.subdirs:
                parents[directory] = lin, name
            stats = decode_listing(record.listing)
            for stat, entry in zip(stats, expand(record.lins), strict=True):
                if wanted(stat, entry) and lin >= ROOT_LIN:
                    hits.append((lin, stat))
        return [(self._path(lin, stat.name, parents), stat) for lin, stat in hits]

    def _path(self, lin: int, name: bytes, parents: dict[int, tuple[int, bytes]]) -> bytes | None:
        parts = [name]
        while lin != ROOT_LIN:
            if lin not in parents:
                return None
            lin, part = parents[lin]
            parts.append(part)
        path = b"/".join(reversed(parts))
        if not self._prefix:
            return path
        return path[len(self._prefix) + 1 :] if path.startswith(self._prefix + b"/") else None


class NewTree:
    """A source as the new snapshot has it. Nothing is followed, paths may be of any length."""

    def __init__(self, place: bytes) -> None:
        """Raises OSError."""
        self._root = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._open: tuple[bytes, int] = b"", self._root
        self._stat = StatReader()

    def _directory(self, path: bytes) -> int:
        if self._open[0] != path:
            fd = open_directory(self._root, path) if path else self._root
            self._shut()
            self._open = path, fd
        return self._open[1]

    def _shut(self) -> None:
        if self._open[1] != self._root:
            os.close(self._open[1])
        self._open = b"", self._root

    def lstat(self, path: bytes) -> os.stat_result | None:
        """What stands at a path; None for nothing. Raises OSError where that cannot be said."""
        if not path:
            return os.fstat(self._root)
        directory, name = split(path)
        try:
            return os.stat(name, dir_fd=self._directory(directory), follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def born_ns(self, path: bytes) -> int:
        """When a directory was made; 0 where that is not known. Raises OSError."""
        return self._stat.of(self._directory(path)).btime_ns

    def list(self, path: bytes) -> list[tuple[bytes, int, bool]]:
        """(name, inode number, whether it is a directory) of all that is in a directory."""
        with os.scandir(self._directory(path)) as listing:
            return [
                (os.fsencode(entry.name), entry.inode(), entry.is_dir(follow_symlinks=False))
                for entry in listing
            ]

    def close(self) -> None:
        """Close what is open."""
        self._shut()
        os.close(self._root)
