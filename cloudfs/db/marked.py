"""What a live mount has marked as changed, by epoch: names in directories, blocks and attributes of
items.

1. A row is written before the change that it stands for, so it outlives the death of the process
   that wrote it. It need not outlive the machine's: after a boot nothing here is believed (see
   :mod:`cloudfs.fuse.live.tracking`), and nothing is flushed.
2. Each epoch has a file, and rows are only appended: a mark costs one system call. All epochs up to
   one are dropped at once, for which there is room on a full disk too.
3. A row that is not whole, at the end of a file, is that of a process that died over it; what it
   stands for was not done.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from cloudfs.core.marks import NEVER, Blocks

_STATE = "state"
_COMPLETE = "complete"
_SUFFIX = ".marks"
_HEAD = struct.Struct("<IH")  # length of key and value, of the key

# Kinds of rows. After the kind comes the inode number, then what is said of it.
NAME = b"N"  # a name in a directory
DATA = b"D"  # one group of blocks, as bits
TAIL = b"T"  # all blocks from one on
ITEM = b"I"  # attributes
WHERE = b"W"  # a file handle of a directory, by which it can be found again

Row = tuple[bytes, bytes]
"""A key, of which the last row counts, and a value."""


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
        """Open or make it. Raises OSError where the disk does not allow it."""
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._directory = directory
        self._complete = directory / _COMPLETE
        self._epoch = -1  # whose file is open
        self._fd = -1
        self._end = 0

    def add(self, epoch: int, rows: Iterable[Row]) -> None:
        """Add rows to an epoch. When this returns they outlive this process. Raises OSError; then
        perhaps some of them do."""
        if epoch != self._epoch:
            self._open(epoch)
        pack = _HEAD.pack
        data = b"".join([pack(len(k) + len(v), len(k)) + k + v for k, v in rows])
        written = os.pwrite(self._fd, data, self._end)
        if written != len(data):
            os.ftruncate(self._fd, self._end)  # what comes next must not stand before a rest
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._end += written

    def _open(self, epoch: int) -> None:
        self.close()
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._fd = os.open(self._file(epoch), flags, 0o600)
        self._end = sum(len(row) for row in _rows(self._file(epoch).read_bytes()))
        os.ftruncate(self._fd, self._end)
        self._epoch = epoch

    def load(self, first: int, last: int) -> Marks:
        """All rows of the epochs from ``first`` to ``last``. Raises OSError."""
        found = Marks()
        for epoch in self._epochs():
            if first <= epoch <= last:
                for row in _rows(self._file(epoch).read_bytes()):
                    _, length = _HEAD.unpack_from(row)
                    start = _HEAD.size + length
                    found.take(row[_HEAD.size : start], row[start:])
        return found

    def drop_through(self, epoch: int) -> None:
        """Forget all epochs up to this one. Raises OSError."""
        if self._epoch <= epoch:
            self.close()
        for number in self._epochs():
            if number <= epoch:
                self._file(number).unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget everything. Raises OSError."""
        self.drop_through(max(self._epochs(), default=0))
        (self._directory / _STATE).unlink(missing_ok=True)

    def _epochs(self) -> list[int]:
        names = (Path(name) for name in os.listdir(self._directory))
        return sorted(int(path.stem) for path in names if path.suffix == _SUFFIX)

    def _file(self, epoch: int) -> Path:
        return self._directory / f"{epoch}{_SUFFIX}"

    def save_state(self, value: bytes) -> None:
        """Keep what the writer has to know when it is started again. Raises OSError."""
        temporary = self._directory / f"{_STATE}.new"
        temporary.write_bytes(value)
        temporary.replace(self._directory / _STATE)

    def drop_state(self) -> None:
        """Keep nothing of it. Raises OSError."""
        (self._directory / _STATE).unlink(missing_ok=True)

    def state(self) -> bytes:
        """What was saved last; b"" for nothing. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            return (self._directory / _STATE).read_bytes()
        return b""

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
        """Close it. Rows may be added all the same."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = self._epoch = -1


def _rows(data: bytes) -> Iterator[bytes]:
    """The whole rows of a file."""
    start = 0
    while start + _HEAD.size <= len(data):
        end = start + _HEAD.size + _HEAD.unpack_from(data, start)[0]
        if end > len(data):
            break
        yield data[start:end]
        start = end
