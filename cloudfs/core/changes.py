"""What a change source says of the tree, and what a worker is asked to do about it.

A directory's *listing* is what ``lstat`` says of each entry, sorted by name, encoded once where
the directory was read; its *signature* is a digest of that encoding. Most directories have not
changed, so most listings are only ever compared by signature; and where a whole directory is new
its listing goes from the reader to the worker as the bytes that it is. That is why the structs
below carry encoded listings and say "all" or name the few indexes that matter.
"""

from __future__ import annotations

import stat as st

import msgspec

from cloudfs.core.changelist import Range
from cloudfs.core.rows import ItemType

_TYPES = {
    st.S_IFREG: ItemType.REGULAR,
    st.S_IFDIR: ItemType.DIRECTORY,
    st.S_IFLNK: ItemType.SYMLINK,
    st.S_IFIFO: ItemType.FIFO,
    st.S_IFSOCK: ItemType.SOCKET,
    st.S_IFCHR: ItemType.CHARACTER_DEVICE,
    st.S_IFBLK: ItemType.BLOCK_DEVICE,
}

MODES = {int(kind): mode for mode, kind in _TYPES.items()}
"""The S_IF* bits of each item type that a directory may name."""


def item_type(mode: int) -> ItemType:
    """The item type of what has this st_mode."""
    return _TYPES[st.S_IFMT(mode)]


class Stat(msgspec.Struct, array_like=True, gc=False):
    """One entry of a listing, as lstat gives it; ``mount`` says it lies on another device."""

    name: bytes
    mode: int
    ino: int
    nlink: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    ctime_ns: int
    rdev: int
    mount: bool

    @property
    def type(self) -> ItemType:
        """The item type."""
        return item_type(self.mode)

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory."""
        return st.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return st.S_ISREG(self.mode)


class Counts(msgspec.Struct, array_like=True):
    """Items by kind, and the sum of the sizes of regular files in bytes."""

    files: int = 0
    dirs: int = 0
    symlinks: int = 0
    others: int = 0
    bytes: int = 0

    @property
    def items(self) -> int:
        """All items."""
        return self.files + self.dirs + self.symlinks + self.others

    def add(self, other: Counts, sign: int = 1) -> None:
        """Add (or with ``sign`` -1 take away) what another counted."""
        self.files += sign * other.files
        self.dirs += sign * other.dirs
        self.symlinks += sign * other.symlinks
        self.others += sign * other.others
        self.bytes += sign * other.bytes

    def count(self, stat: Stat, sign: int = 1) -> None:
        """Count one item (or with ``sign`` -1 no longer)."""
        if stat.is_file:
            self.files += sign
            self.bytes += sign * stat.size
        elif stat.is_dir:
            self.dirs += sign
        elif stat.type == ItemType.SYMLINK:
            self.symlinks += sign
        else:
            self.others += sign


LinRuns = list[tuple[int, int]]
"""LINs in listing order, as runs of (first, how many)."""


def expand(runs: LinRuns) -> list[int]:
    """The LINs one by one."""
    return [lin for first, count in runs for lin in range(first, first + count)]


def collapse(lins: list[int]) -> LinRuns:
    """The runs of a list of LINs."""
    runs: LinRuns = []
    for lin in lins:
        if runs and runs[-1][0] + runs[-1][1] == lin:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((lin, 1))
    return runs


class DirRecord(msgspec.Struct, array_like=True):
    """What the local state keeps of a directory as it was at the last snapshot.

    ``doubtful`` are indexes whose item may have changed within the tick of its time stamp;
    ``absent`` are those that are in the listing but could not be read, so not in the snapshot.
    """

    signature: bytes
    listing: bytes
    lins: LinRuns
    subdirs: list[tuple[bytes, int]]
    counts: Counts
    doubtful: list[int] = []
    absent: list[int] = []

    def by_name(self) -> dict[bytes, tuple[int, Stat, int]]:
        """(index, stat, LIN) of what was in the snapshot, by name."""
        absent = set(self.absent)
        found = zip(decode_listing(self.listing), expand(self.lins), strict=True)
        return {
            stat.name: (index, stat, lin)
            for index, (stat, lin) in enumerate(found)
            if index not in absent
        }

    def mark_unread(self, absent: set[bytes], stale: set[bytes]) -> None:
        """Note names that could not be read: new ones, and ones of which an older state stays."""
        for index, stat in enumerate(decode_listing(self.listing)):
            if stat.name in absent:
                self.absent.append(index)
                self.counts.count(stat, -1)
            elif stat.name in stale:
                self.doubtful.append(index)
        self.signature = b""


Visit = tuple[int, bytes, int]
"""A directory to visit: its LIN, its path below the source, and the inode number that it was listed
with (0: whatever stands there). In a tree that does not stand still another may stand there."""


class DirScan(msgspec.Struct, array_like=True):
    """One directory that is new or whose listing changed, as it was just read."""

    lin: int
    path: bytes
    dev: int
    signature: bytes
    listing: bytes
    subdirs: list[tuple[int, bytes, int]]  # index in the listing, name, inode number as in Visit
    links: list[int]  # indexes of files with several names
    doubtful: list[int]
    counts: Counts
    ranges: dict[int, list[Range]] = {}  # of files by index: only these bytes can be others
    mapped: list[int] = []  # of files whose data can be another whatever lstat says
    told: list[int] = []  # of items that are not as they were, whatever lstat says


class Absent(msgspec.Struct, array_like=True):
    """An item that was listed and could not be read; ``new``: its name is not in the snapshot."""

    directory: int  # LIN
    lin: int
    stat: Stat
    new: bool


class DirTask(msgspec.Struct, array_like=True):
    """What a worker is to do in one directory.

    ``items`` are the indexes to be read and described, ``names`` those that get a directory entry
    row (None: all); ``bases`` says for an index which LIN's blocks to compare with (its own, or
    that of the file it replaced), ``ranges`` for one with its own base which bytes alone can be
    others. ``part`` restricts the one item to a range of bases [first,
    first + count) of its blocks, of which part 0 also writes the other rows.
    """

    lin: int  # 0: the item is a root, which no directory names
    path: bytes
    listing: bytes
    lins: LinRuns
    items: list[int] | None = None
    names: list[int] | None = None
    bases: dict[int, int] = {}
    part: tuple[int, int] | None = None
    ranges: dict[int, list[Range]] = {}


_stat_decoder = msgspec.msgpack.Decoder(list[Stat])


def decode_listing(listing: bytes) -> list[Stat]:
    """The entries of a listing."""
    return _stat_decoder.decode(listing)


def encode_listing(stats: list[Stat]) -> bytes:
    """A listing of entries, which must be sorted by name."""
    return msgspec.msgpack.encode(stats)
