"""What a live mount has marked as changed, by epoch: names in directories, blocks and attributes of
items.

1. A row is written before the change that it stands for, so it outlives the death of the process
   that wrote it. It need not outlive the machine's: after a boot nothing here is believed (see
   :mod:`cloudfs.fuse.live.tracking`), and commits are not flushed.
2. Rows are only added, until all epochs up to one are dropped at once.
3. LMDB writes through its file descriptor, not through a mapping: on a full disk that is an error
   that can be answered, not the end of the process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import lmdb

from cloudfs.core.marks import NEVER, Blocks
from cloudfs.db.cache import MAX_READERS, reserve_locks

MAP_BYTES = 1 << 38
_AT_ONCE = 1000
_STATE = b"state"
_COMPLETE = "complete"

# Kinds of rows. After the kind comes the inode number, then what is said of it.
NAME = b"N"  # a name in a directory
DATA = b"D"  # one group of blocks, as bits
TAIL = b"T"  # all blocks from one on
ITEM = b"I"  # attributes
WHERE = b"W"  # a file handle of a directory, by which it can be found again

Row = tuple[bytes, bytes]
"""A key below its epoch, and a value."""


def name_row(inode: int, name: bytes) -> Row:
    """A name in a directory changed."""
    return NAME + inode.to_bytes(8, "big") + name, b""


def item_row(inode: int) -> Row:
    """An item's attributes changed."""
    return ITEM + inode.to_bytes(8, "big"), b""


def where_row(inode: int, handle: bytes) -> Row:
    """How a directory is found again."""
    return WHERE + inode.to_bytes(8, "big"), handle


def group_row(inode: int, group: int, bits: int) -> Row:
    """The blocks of one group that changed."""
    key = DATA + inode.to_bytes(8, "big") + group.to_bytes(8, "big")
    return key, bits.to_bytes(128, "little")


def tail_row(inode: int, first: int) -> Row:
    """All blocks from one on changed."""
    return TAIL + inode.to_bytes(8, "big"), first.to_bytes(8, "big")


class Marks:
    """All that was marked in some epochs, in memory."""

    def __init__(self) -> None:
        self.names: dict[int, set[bytes]] = {}
        self.blocks: dict[int, Blocks] = {}
        self.items: set[int] = set()
        self.where: dict[int, bytes] = {}

    def take(self, key: bytes, value: bytes) -> None:
        """Take one row in."""
        kind, inode, rest = key[:1], int.from_bytes(key[1:9], "big"), key[9:]
        if kind == NAME:
            self.names.setdefault(inode, set()).add(rest)
        elif kind == ITEM:
            self.items.add(inode)
        elif kind == WHERE:
            self.where[inode] = value
        elif kind in (DATA, TAIL):
            blocks = self.blocks.setdefault(inode, Blocks())
            if kind == TAIL:
                blocks.cut(min(int.from_bytes(value, "big"), NEVER))
            else:
                group = int.from_bytes(rest, "big")
                bits = int.from_bytes(value, "little")
                blocks.groups[group] = blocks.groups.get(group, 0) | bits

    @property
    def count(self) -> int:
        """How many names and items there are; an item of which both attributes and data were
        marked counts twice."""
        return sum(map(len, self.names.values())) + len(self.items) + len(self.blocks)


class MarkedSet:
    """The rows on disk. One process writes."""

    def __init__(self, directory: Path) -> None:
        """Open or make it. Raises lmdb.Error, OSError where the disk does not allow it."""
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._complete = directory / _COMPLETE
        reserve_locks(directory)
        self._env = lmdb.open(
            str(directory), map_size=MAP_BYTES, sync=False, mode=0o600, max_readers=MAX_READERS
        )

    def add(self, epoch: int, rows: Iterable[Row]) -> None:
        """Add rows to an epoch. When this returns they outlive this process. Raises lmdb.Error."""
        prefix = epoch.to_bytes(4, "big")
        with self._env.begin(write=True) as txn:
            for key, value in rows:
                txn.put(prefix + key, value)

    def load(self, first: int, last: int) -> Marks:
        """All rows of the epochs from ``first`` to ``last``."""
        found = Marks()
        end = (last + 1).to_bytes(4, "big")
        for key, value in self._rows(first.to_bytes(4, "big")):
            if key >= end:
                break
            found.take(key[4:], value)
        return found

    def _rows(self, start: bytes) -> Iterator[tuple[bytes, bytes]]:
        with self._env.begin() as txn, txn.cursor() as cursor:
            if cursor.set_range(start):
                yield from cursor.iternext()

    def drop_through(self, epoch: int) -> None:
        """Forget all epochs up to this one."""
        more = True
        while more:  # in pieces, so that no transaction grows without bounds
            with self._env.begin(write=True) as txn, txn.cursor() as cursor:
                more = cursor.first()
                for _ in range(_AT_ONCE):
                    more = more and int.from_bytes(cursor.key()[:4], "big") <= epoch
                    if not more:
                        break
                    more = cursor.delete()

    def clear(self) -> None:
        """Forget everything."""
        self.drop_through(0xFFFF_FFFE)
        self.save_state(b"")

    # The state's key sorts behind every epoch that is ever reached.

    def save_state(self, value: bytes) -> None:
        """Keep what the writer has to know when it is started again."""
        with self._env.begin(write=True) as txn:
            txn.put(b"\xff\xff\xff\xff" + _STATE, value)

    def state(self) -> bytes:
        """What was saved last; b"" for nothing."""
        with self._env.begin() as txn:
            return bytes(txn.get(b"\xff\xff\xff\xff" + _STATE, b""))

    # A file that is there while all is on disk: on a full one it can still be taken away.

    @property
    def complete(self) -> bool:
        """Whether everything was written, as far as the last writer knew."""
        return self._complete.exists()

    def set_complete(self, complete: bool) -> None:
        """Say so. Raises OSError."""
        if complete:
            self._complete.touch()
        else:
            self._complete.unlink(missing_ok=True)

    def close(self) -> None:
        """Close it."""
        self._env.close()
