"""The rows of the tables, and what "in force at a snapshot" means.

1. Every row carries the snapshot from which it holds. The row in force at snapshot S is the one
   of the same key with the greatest ``snap`` not above S ("newest wins").
2. Rows are never changed. Deleting is writing a tombstone: a metadata row of a deleted type, a
   directory entry whose LIN is 0, a block row without locations.
3. Rows order by their key fields, which stand first; :func:`key_of` gives the key as a tuple.

The classes are msgspec structs that encode as arrays: one compact codec for store, IPC and
local state, decoded in C. They hold no cycles, hence ``gc=False``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from operator import attrgetter
from typing import NamedTuple

import msgspec

ROOT_LIN = 1
FIRST_FREE_LIN = 2

BASE_BLOCKS = 64
"""Blocks per base: a block location row covers this many blocks of one file."""


class Table(IntEnum):
    """The tables, in the order in which they stand in a segment."""

    METADATA = 1
    ENTRIES = 2
    BLOCKS = 3
    PACKS = 4


class ItemType(IntEnum):
    """Item types. 1 to 5 are the patent's numbers; the rest follow."""

    REGULAR = 1
    STREAM = 2  # an extended attribute too large to stand in the row
    DIRECTORY = 3
    DELETED_FILE = 4
    DELETED_DIRECTORY = 5
    SYMLINK = 6
    FIFO = 7
    SOCKET = 8
    CHARACTER_DEVICE = 9
    BLOCK_DEVICE = 10


DELETED_TYPES = frozenset((ItemType.DELETED_FILE, ItemType.DELETED_DIRECTORY))


class Meta(msgspec.Struct, array_like=True, gc=False, omit_defaults=True):
    """Metadata of one LIN from one snapshot on. Times in ns since the epoch, sizes in bytes."""

    lin: int
    snap: int
    type: int
    mode: int = 0  # permission bits with setuid, setgid, sticky: 12 bits
    uid: int = 0
    gid: int = 0
    uname: str = ""
    gname: str = ""
    size: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    btime_ns: int = 0  # 0 where the file system does not tell
    parent: int = 0  # LIN of the directory of the first name; of the file for a STREAM
    nlink: int = 1
    flags: int = 0  # FS_*_FL inode flags, as chattr(1) sets them
    dev: int = 0  # device and inode of the source, by which a later scan knows it again
    ino: int = 0
    rdev: int = 0
    block_size: int = 0
    sparse: bool = False
    target: bytes = b""
    xattrs: dict[bytes, bytes] | None = None
    streams: bool = False  # large extended attributes lie as entries below this LIN


class Entry(msgspec.Struct, array_like=True, gc=False):
    """One name in one directory from one snapshot on; ``lin`` 0 says the name is gone."""

    parent: int
    name: bytes
    snap: int
    lin: int
    type: int


STREAM_PREFIX = b"/"
"""Large extended attributes lie as entries below their item, named by this and their name, as no
file can be called."""


class BlockRow(msgspec.Struct, array_like=True, gc=False):
    """Where the blocks of one base of one file lie, from one snapshot on.

    ``locs`` is a run of :data:`LOCATION` records, one a block; fewer than BASE_BLOCKS of them
    where the file ends or only holes follow; none at all is a hole row (nothing of older rows
    shows through). ``digest_kind`` says what the digests are (1: xxh3-128 under the
    repository's seed).
    """

    lin: int
    base: int
    snap: int
    digest_kind: int
    locs: bytes


class PackRow(msgspec.Struct, array_like=True, gc=False):
    """One pack: its name (16 random bytes), sizes in bytes and where and when it was made."""

    name: bytes
    snap: int
    size: int
    live: int
    index_size: int  # length of the sealed pack index at the pack's end, tail included
    storage_class: str
    node: str
    time_ns: int


Row = Meta | Entry | BlockRow | PackRow

ROW_TYPES: dict[Table, type[Meta] | type[Entry] | type[BlockRow] | type[PackRow]] = {
    Table.METADATA: Meta,
    Table.ENTRIES: Entry,
    Table.BLOCKS: BlockRow,
    Table.PACKS: PackRow,
}

DIGEST_XXH3_128 = 1

LOCATION = struct.Struct("<16sIIII16s")
"""pack, offset of the frame in the pack, stored length of the frame, offset of the block in the
plain frame, length of the block, digest. A hole is a record whose pack is all zero."""

NO_PACK = bytes(16)
HOLE_RECORD = bytes(LOCATION.size)


class Location(NamedTuple):
    """One block's place; the fields of :data:`LOCATION` in order."""

    pack: bytes
    frame_offset: int
    frame_length: int
    offset: int
    length: int
    digest: bytes


Key = tuple[int | bytes, ...]


_KEYS: dict[type, Callable[[Row], Key]] = {
    Meta: attrgetter("lin", "snap"),
    Entry: attrgetter("parent", "name", "snap"),
    BlockRow: attrgetter("lin", "base", "snap"),
    PackRow: attrgetter("name", "snap"),
}

_SUBJECTS: dict[type, Callable[[Row], object]] = {
    Meta: attrgetter("lin"),
    Entry: attrgetter("parent", "name"),
    BlockRow: attrgetter("lin", "base"),
    PackRow: attrgetter("name"),
}


def key_of(row: Row) -> Key:
    """The key of any row, by which its table is sorted."""
    return _KEYS[type(row)](row)


def key_function(table: Table) -> Callable[[Row], Key]:
    """What gives the key of the rows of one table; faster than :func:`key_of` for many."""
    return _KEYS[ROW_TYPES[table]]


def locations(row: BlockRow) -> list[Location | None]:
    """The records of a block row, one a block; None is a hole."""
    return [
        None if fields[0] == NO_PACK else Location(*fields)
        for fields in LOCATION.iter_unpack(row.locs)
    ]


def newest_at(rows: Iterable[Row], snapshot: int) -> Iterator[Row]:
    """Of rows sorted by key, yield for each key the one in force at ``snapshot``, tombstones too.

    Rows of one key stand together in ascending order of ``snap``; rows younger than
    ``snapshot`` are passed over.
    """
    held: Row | None = None
    subject: object = None
    subject_of: Callable[[Row], object] | None = None
    for row in rows:
        if row.snap > snapshot:
            continue
        if subject_of is None:
            subject_of = _SUBJECTS[type(row)]
        following = subject_of(row)
        if held is not None and following != subject:
            yield held
        held, subject = row, following
    if held is not None:
        yield held


def is_tombstone(row: Row) -> bool:
    """Whether the row only says that something is gone."""
    if isinstance(row, Meta):
        return row.type in DELETED_TYPES
    if isinstance(row, Entry):
        return row.lin == 0
    return isinstance(row, BlockRow) and not row.locs
