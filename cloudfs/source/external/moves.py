"""Where the directories of the last snapshot are in the new one, and the other way round.

A path is followed by its longest part of which a move is known: what is in a directory that moved,
moved with it. What is in one that is gone or new has no counterpart.
"""

from __future__ import annotations

import os
import stat as st
from collections.abc import Callable

from cloudfs.core.errors import SourceError
from cloudfs.source.external.told import Told
from cloudfs.source.external.trees import NewTree, OldTree


class Moves:
    """What is known of renames: such as were told, and such as were found out."""

    def __init__(
        self, told: Told, old: OldTree, new: NewTree, excluded: Callable[[bytes], bool]
    ) -> None:
        self._told = told
        self._old = old
        self._new = new
        self._excluded = excluded
        self.origins: dict[bytes, bytes] = {}  # where something was, by where it is
        self._places: dict[bytes, bytes] = {}  # the other way round
        self.gone: set[bytes] = set()  # old paths of directories that vanished, told or not

    def take_renames(self) -> None:
        """Believe that something moved only if it was there and a directory stayed one.

        What is not believed counts as created. Raises SourceError where that is not enough.
        """
        for path, origin in self._told.renamed.items():
            old = self._old.entry(origin)
            if old is None:
                self._told.created.add(path)  # it was left out of the last snapshot, or never there
                continue
            if old[0].is_dir and not self._excluded(path):
                now = self._new.lstat(path)
                if now is None or not st.S_ISDIR(now.st_mode):
                    raise SourceError(f"{shown(path)} is no directory in the new snapshot.")
            if self._places.setdefault(origin, path) != path:
                if old[0].is_dir:
                    raise SourceError(f"{shown(origin)} was told to have moved to two places.")
                self._told.created.add(path)
                continue
            self.origins[path] = origin

    def add(self, path: bytes, old_path: bytes) -> None:
        """What is at ``path`` was at ``old_path``."""
        self.origins[path], self._places[old_path] = old_path, path

    def now(self, path: bytes) -> bytes | None:
        """Where a directory of the last snapshot is now; None where it is gone."""
        for top, rest in _prefixes(path):
            if top in self._places:
                return self._places[top] + rest
            if top in self._told.deleted or top in self.gone:
                return None
        return path

    def before(self, path: bytes) -> bytes | None:
        """Where a directory of the new snapshot was; None for one within something new."""
        for top, rest in _prefixes(path):
            if top in self.origins:
                return self.origins[top] + rest
            if top in self._told.created:
                return None
        return path

    def told(self, path: bytes) -> bool:
        """Whether it was told, and believed, that what is at a path was renamed."""
        return path in self._told.renamed and path in self.origins

    def is_taken(self, old_path: bytes) -> bool:
        """Whether it is known where that is which was at this path."""
        return old_path in self._places

    def has_moved(self, old_path: bytes) -> bool:
        """Whether what was at this path is elsewhere, and not left out of the backup there."""
        return old_path in self._places and not self._excluded(self._places[old_path])

    def is_elsewhere(self, old_path: bytes) -> bool:
        """Whether what was at this path, or a directory above it, is known to be elsewhere."""
        return any(top in self._places for top, _ in _prefixes(old_path))

    def differs(self, path: bytes, old_path: bytes) -> bool:
        """Whether other things are known to stand at one or the other path than the same."""
        return (
            self.origins.get(path, old_path) != old_path or self._places.get(old_path, path) != path
        )


def _prefixes(path: bytes) -> list[tuple[bytes, bytes]]:
    """The path and those of all directories above it, each with what is left, longest first."""
    found = []
    end = len(path)
    while end > 0:
        found.append((path[:end], path[end:]))
        end = path.rfind(b"/", 0, end)
    return found


def shown(path: bytes) -> str:
    """A path as it is shown in a message."""
    return ascii(os.fsdecode(path))[1:-1]
