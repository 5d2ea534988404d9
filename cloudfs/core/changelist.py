"""What a change source says has changed since the last snapshot: directories, names, byte ranges.

A changelist is complete or it is not made at all: what it does not name is as it was. So a sync
that has one visits only what it names; paths and names may be too many in it, never too few.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Range = tuple[int, int]
"""Bytes of a file: [start, end)."""


@dataclass
class DirChange:
    """One directory that was there at the last snapshot, and the names in it to look at again.

    Paths are below the source, without a slash at either end; b"" is the source itself.
    ``ranges`` says for a name with data changes where they are. A file that is among the names and
    not among the ranges kept its data. Of what is among the ``looks`` as well, nothing was told.
    """

    path: bytes
    old_path: bytes | None  # as it was at the last snapshot; None: it is known by its inode
    names: set[bytes] = field(default_factory=set)
    ranges: dict[bytes, list[Range]] = field(default_factory=dict)
    whole: bool = False  # all names in it
    looks: set[bytes] = field(default_factory=set)
    inode: int = 0  # what stands at ``path`` must have this number; 0: whatever stands there

    def join(self, other: DirChange) -> None:
        """Let the names in the same directory that ``other`` has be looked at as well."""
        self.looks -= other.names - other.looks
        self.looks |= other.looks - self.names
        self.names |= other.names
        for name, ranges in other.ranges.items():
            self.ranges[name] = [*self.ranges.get(name, ()), *ranges]


@dataclass
class Changelist:
    """All directories that changed, or in which something did.

    ``inodes`` are items of which a source knows the inode number and no name, with what of their
    data can be others (None: all): each of their names on record is looked at. None for a source
    that names every name of what it names. With ``reread`` the data of all named files is compared,
    even where lstat says that nothing changed. ``looks`` are further inode numbers, of files that
    may be others though nothing was told of them: then lstat says so. ``elsewhere`` are inode
    numbers of directories in which something changed, and which were not in the tree when they were
    looked for. ``tops`` are the paths at which parts of file systems are reached, where there may
    be several, and a number for each: inode numbers below one say nothing of what is below another,
    but where both have the same.
    """

    dirs: list[DirChange] = field(default_factory=list)
    inodes: dict[int, list[Range] | None] | None = None
    reread: bool = False
    looks: set[int] = field(default_factory=set)
    elsewhere: set[int] = field(default_factory=set)
    tops: dict[bytes, int] = field(default_factory=dict)

    @property
    def names(self) -> int:
        """How many names are to be looked at again."""
        return sum(len(change.names) for change in self.dirs)


def merged(ranges: list[Range]) -> list[Range]:
    """The same bytes as sorted ranges that neither touch nor overlap."""
    found: list[Range] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found
