"""A bounded cache of stored bytes on the local disk: table pages, footers and frames.

1. Values are kept as they came from the store, sealed. So the cache holds no plain name or
   content, and whatever reads a value verifies it; a value that does not verify is dropped by
   the reader and fetched again.
2. A value never changes (objects are write-once), so there is nothing to invalidate.
3. The bound is kept by dropping the oldest values first: a queue of keys in order of arrival.
4. Commits are not flushed to disk: a cache that was open when the machine died (its boot id is
   not today's) is thrown away whole and costs only time.

LMDB environments may be opened once a process and do not survive a fork; several processes may
use one cache at the same time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import lmdb

MAX_READERS = 1024
_LOCK_BYTES = (MAX_READERS + 2) * 64  # a cache line for each reader, and two of its own
_SIZE_KEY = b"size"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """The id that the kernel took at boot."""
    return _BOOT_ID.read_text().strip()


def reserve_locks(directory: Path) -> None:
    """Take the room of LMDB's table of readers. Raises OSError where there is none.

    LMDB maps that file as it is, full of holes: on a full disk the process would be killed
    (SIGBUS) when it first writes there. Only before the environment is opened in this process:
    closing the file drops the locks that LMDB would hold.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd = os.open(directory / "lock.mdb", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, _LOCK_BYTES)
    finally:
        os.close(fd)


class BlobCache:
    """Bytes by key, bounded in bytes. Losing any of it is harmless."""

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        """Open or make the cache; raises OSError or lmdb.Error where the disk does not allow it."""
        self._limit = max(limit_bytes, 1 << 20)
        self._lock = threading.Lock()
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _exclusive(directory / "lock"):
            stamp = directory / "boot"
            today = boot_id()
            if not stamp.exists() or stamp.read_text() != today:
                shutil.rmtree(directory / "blobs", ignore_errors=True)
                stamp.write_text(today)
            try:
                self._env = self._open(directory / "blobs")
            except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError):
                shutil.rmtree(directory / "blobs", ignore_errors=True)
                self._env = self._open(directory / "blobs")
            self._blobs = self._env.open_db(b"blobs")
            self._queue = self._env.open_db(b"queue", integerkey=False)

    def _open(self, directory: Path) -> lmdb.Environment:
        reserve_locks(directory)
        return lmdb.open(
            str(directory),
            map_size=4 * self._limit + (64 << 20),
            max_dbs=2,
            sync=False,
            mode=0o600,
            max_readers=MAX_READERS,
        )

    def get(self, key: bytes) -> bytes | None:
        """The bytes kept under ``key``, not verified."""
        with self._env.begin(db=self._blobs) as txn:
            value: bytes | None = txn.get(key)
            return value

    def put(self, items: Iterable[tuple[bytes, bytes]]) -> None:
        """Keep these. A full disk is no error: the cache then keeps less."""
        with self._lock, contextlib.suppress(lmdb.Error), self._env.begin(write=True) as txn:
            size = int.from_bytes(txn.get(_SIZE_KEY, b""), "big")
            with txn.cursor(self._queue) as cursor:
                last = int.from_bytes(cursor.key(), "big") if cursor.last() else 0
            for key, value in items:
                if not txn.put(key, value, overwrite=False, db=self._blobs):
                    continue
                last += 1
                txn.put(last.to_bytes(8, "big"), key, db=self._queue, append=True)
                size += len(value)
            if size > self._limit:
                size -= self._drop(txn, size - self._limit)
            txn.put(_SIZE_KEY, size.to_bytes(8, "big"))

    def _drop(self, txn: lmdb.Transaction, excess: int) -> int:
        dropped = 0
        with txn.cursor(self._queue) as cursor:
            found = cursor.first()
            while found and dropped < excess:
                value = txn.pop(cursor.value(), db=self._blobs)
                dropped += len(value or b"")
                found = cursor.delete()
        return dropped

    def discard(self, key: bytes) -> None:
        """Forget one value (it did not verify)."""
        with self._lock, contextlib.suppress(lmdb.Error), self._env.begin(write=True) as txn:
            value = txn.pop(key, db=self._blobs)
            size = int.from_bytes(txn.get(_SIZE_KEY, b""), "big") - len(value or b"")
            txn.put(_SIZE_KEY, max(size, 0).to_bytes(8, "big"))

    def close(self) -> None:
        """Free the environment."""
        self._env.close()


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
