"""What a watch daemon has heard of, by epoch: names in directories, items known by handle alone.

It is written by the daemon and read by syncs. It holds nothing that must last: what it says counts
only while the daemon that wrote it lives, which alone knows whether it is complete.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import lmdb

from cloudfs.db.cache import MAX_READERS, reserve_locks

MAP_BYTES = 1 << 38
_AT_ONCE = 1000

Place = tuple[bytes, bytes]
"""A file system's id and a file handle on it."""


class WatchedSet:
    """Names by (epoch, directory), items by (epoch, handle)."""

    def __init__(self, directory: Path, *, writer: bool) -> None:
        """A writer begins with an empty set. Raises lmdb.Error, OSError."""
        if writer:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True, mode=0o700)
            reserve_locks(directory)
        self._env = lmdb.open(
            str(directory),
            map_size=MAP_BYTES,
            max_dbs=2,
            sync=False,
            readonly=not writer,
            mode=0o600,
            max_readers=MAX_READERS,
        )
        self._names = self._env.open_db(b"names", create=writer)
        self._items = self._env.open_db(b"items", create=writer)

    def add(self, epoch: int, names: dict[Place, set[bytes]], items: set[Place]) -> None:
        """Add to what was heard in an epoch."""
        keys = [_key(epoch, place) + name for place, found in names.items() for name in found]
        with self._env.begin(write=True) as txn:
            for table, rows in (
                (self._names, keys),
                (self._items, [_key(epoch, item) for item in items]),
            ):
                with txn.cursor(table) as cursor:
                    cursor.putmulti((key, b"") for key in sorted(rows))

    def forget(self, epoch: int, gone: Iterable[Place]) -> None:
        """Drop the names of directories that are gone for ever."""
        with self._env.begin(write=True) as txn, txn.cursor(self._names) as cursor:
            for place in gone:
                prefix = _key(epoch, place)
                found = cursor.set_range(prefix)
                while found and cursor.key().startswith(prefix):
                    found = cursor.delete()

    def drop_through(self, epoch: int) -> None:
        """Forget all epochs up to this one."""
        for table in (self._names, self._items):
            more = True
            while more:  # in pieces, so that no transaction grows without bounds
                with self._env.begin(write=True) as txn, txn.cursor(table) as cursor:
                    more = cursor.first()
                    for _ in range(_AT_ONCE):
                        more = more and int.from_bytes(cursor.key()[:4], "big") <= epoch
                        if not more:
                            break
                        more = cursor.delete()

    def directories(self, first: int, last: int) -> Iterator[tuple[Place, set[bytes]]]:
        """The directories with the names heard of, epoch by epoch."""
        with self._env.begin() as txn, txn.cursor(self._names) as cursor:
            keys = _between(cursor, first, last)
            for prefix, group in groupby(keys, key=_prefix):
                yield _place(prefix), {key[len(prefix) :] for key in group}

    def items(self, first: int, last: int) -> Iterator[Place]:
        """The items known by their handle alone."""
        with self._env.begin() as txn, txn.cursor(self._items) as cursor:
            for key in _between(cursor, first, last):
                yield _place(key)

    def forget_dead_readers(self) -> None:
        """Let go of what readers held that were killed: no room would be used again till the end
        of this process."""
        self._env.reader_check()

    def count(self) -> int:
        """How many names and items there are, of all epochs."""
        with self._env.begin() as txn:
            tables = (self._names, self._items)
            return sum(int(txn.stat(table)["entries"]) for table in tables)

    def close(self) -> None:
        """Close it."""
        self._env.close()


def _key(epoch: int, place: Place) -> bytes:
    fsid, handle = place
    return epoch.to_bytes(4, "big") + fsid + bytes([len(handle)]) + handle


def _prefix(key: bytes) -> bytes:
    return key[: 13 + key[12]]


def _place(prefix: bytes) -> Place:
    return prefix[4:12], prefix[13:]


def _between(cursor: lmdb.Cursor, first: int, last: int) -> Iterator[bytes]:
    """The keys of epochs ``first`` to ``last``."""
    found = cursor.set_range(first.to_bytes(4, "big"))
    while found and int.from_bytes(cursor.key()[:4], "big") <= last:
        yield bytes(cursor.key())
        found = cursor.next()
