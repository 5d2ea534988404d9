"""A store in a directory: ``file:///path``.

1. An object is a file below the root, its name the path. An object appears whole: it is written
   to a file of its own in ``.tmp`` (below the root, so on the same file system), fsynced, and
   then linked (if_absent: the kernel refuses when the name is taken, so exactly one of several
   racing writers wins, on this machine or another) or renamed to its name.
2. It is durable when ``put`` returns: after the file, the directory that holds it is fsynced, and
   so is every directory above it up to the root. Each store does that once for each directory,
   even one that it did not make: whoever made it may not have come to fsync it.
3. Names of objects never begin with a dot, so ``.tmp`` is never listed. A writer that was killed
   leaves a file there; the first ``put`` of every store removes those older than a day, by the
   clock of the file system itself (that of a server may differ from ours).
4. ``put`` makes a root that is missing, ``get`` and ``list`` find nothing in it. But a root that
   vanishes under a store that wrote to it (a drive was unmounted) is not made again.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from cloudfs.core.errors import AlreadyExists, Denied, Full, NotFound, StoreError, Unavailable
from cloudfs.store.base import Buffer, ObjectInfo
from cloudfs.store.naming import check_name, is_name

TEMP = ".tmp"
STALE_NS = 24 * 3600 * 10**9

_FULL = {errno.ENOSPC, errno.EDQUOT}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_AWAY = {errno.ETIMEDOUT, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH}
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


class LocalStore:
    """Objects as files below ``root``, an absolute path. Thread safe, process safe."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._durable: set[str] = set()

    @property
    def url(self) -> str:
        """``file://`` and the path."""
        return f"file://{self.root}"

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See :meth:`Store.get`."""
        try:
            fd = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                size = os.fstat(fd).st_size
                start = max(0, size + offset) if offset < 0 else offset
                left = max(0, size - start)
                return _read(fd, start, left if length is None else min(length, left))
            finally:
                os.close(fd)
        except OSError as error:
            raise self._translate(error, name) from error

    def put(self, name: str, chunks: Sequence[Buffer], *, if_absent: bool = False) -> None:
        """See :meth:`Store.put`. One fsync of the file, one of its directory."""
        path = self._path(name)
        parent = os.path.dirname(path)
        try:
            self._make(parent)
            temp = self._write(chunks)
            try:
                if if_absent:
                    _publish_if_absent(temp, path)
                else:
                    os.replace(temp, path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temp)
            _sync_directory(parent)
        except FileExistsError:
            raise AlreadyExists(f"{name} is already in {self.url}.") from None
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise StoreError(
                    f"{self.root} vanished while it was written to. Is the drive mounted?"
                ) from error
            if error.errno in _MISSING:
                raise StoreError(
                    f"{path} cannot be written: there is a file where a directory must be, or the"
                    " other way round. Choose another place for the repository."
                ) from error
            raise self._translate(error, name) from error

    def list(self, prefix: str, *, limit: int | None = None) -> Iterator[ObjectInfo]:
        """See :meth:`Store.list`. Reads one directory at a time, none that cannot match."""
        return islice(self._walk("", prefix), limit)

    def delete(self, names: Iterable[str]) -> None:
        """See :meth:`Store.delete`. Durable when it returns."""
        touched = set()
        for name in names:
            path = self._path(name)
            try:
                os.unlink(path)
                touched.add(os.path.dirname(path))
            except OSError as error:
                if error.errno not in _MISSING:
                    raise self._translate(error, name) from error
        for directory in touched:
            try:
                _sync_directory(directory)
            except OSError as error:
                raise self._translate(error, directory) from error

    def close(self) -> None:
        """Nothing is held."""

    def _path(self, name: str) -> str:
        return f"{self.root}/{check_name(name)}"

    def _make(self, directory: str) -> None:
        """Make ``directory`` and those above it, durably; once each (rule 2)."""
        if directory in self._durable:
            return
        if directory == self.root:
            _make_root(directory)
            self._durable.add(directory)
            return
        parent = os.path.dirname(directory)
        self._make(parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, 0o770)
        _sync_directory(parent)
        self._durable.add(directory)

    def _write(self, chunks: Sequence[Buffer]) -> str:
        """Write a new temporary file, fsync it and return its path."""
        directory = f"{self.root}/{TEMP}"
        first = directory not in self._durable
        if first:
            with contextlib.suppress(FileExistsError):
                os.mkdir(directory, 0o770)
        temp = f"{directory}/{os.getpid()}-{os.urandom(8).hex()}"
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
        try:
            with open(fd, "wb", buffering=1 << 18) as file:
                file.writelines(chunks)
                file.flush()
                os.fsync(fd)
                now_ns = os.fstat(fd).st_mtime_ns
        except BaseException:
            os.unlink(temp)
            raise
        if first:
            _remove_stale(directory, now_ns)
            self._durable.add(directory)
        return temp

    def _walk(self, below: str, prefix: str) -> Iterator[ObjectInfo]:
        """The objects whose names begin with ``below`` (empty, or ending in /) and ``prefix``."""
        try:
            with os.scandir(f"{self.root}/{below}") as entries:
                # A directory sorts as its objects do, whose names go on with a slash.
                found = sorted(
                    (entry.name + "/" * entry.is_dir(), entry)
                    for entry in entries
                    if not entry.name.startswith(".")
                )
        except OSError as error:
            if error.errno in _MISSING:
                return
            raise self._translate(error, below) from error
        for part, entry in found:
            name = below + part
            if part.endswith("/"):
                if name.startswith(prefix) or prefix.startswith(name):
                    yield from self._walk(name, prefix)
            elif name.startswith(prefix) and is_name(name):
                try:
                    size = entry.stat().st_size
                except FileNotFoundError:
                    continue  # deleted since
                except OSError as error:
                    raise self._translate(error, name) from error
                yield ObjectInfo(name, size)

    def _translate(self, error: OSError, name: str) -> StoreError:
        """What ``error``, met while working on ``name``, means to a user of a store."""
        reason = os.strerror(error.errno).lower() if error.errno else str(error)
        if error.errno in _MISSING:
            return NotFound(f"{name} is not in {self.url}.")
        if error.errno in _FULL:
            return Full(f"no room is left in {self.url} ({reason}). Free some and try again.")
        if error.errno in _DENIED:
            return Denied(f"{self.url} refuses access to {name} ({reason}). Check who owns it.")
        if error.errno in _AWAY:
            return Unavailable(f"{self.url} does not answer ({reason}).")
        return StoreError(f"{self.url} failed at {name} ({reason}). Check the drive.")


def _read(fd: int, start: int, length: int) -> bytes:
    """Read ``length`` bytes, fewer only where the file ends."""
    data = os.pread(fd, length, start)
    if len(data) == length:
        return data
    pieces = [data]
    got = len(data)
    while got < length and pieces[-1]:
        pieces.append(os.pread(fd, length - got, start + got))
        got += len(pieces[-1])
    return b"".join(pieces)


def _publish_if_absent(temp: str, path: str) -> None:
    """Give the file its name, or raise FileExistsError."""
    try:
        os.link(temp, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    else:
        return
    # No hard links here (exFAT, some network file systems): rename, but not over anything.
    libc = ctypes.CDLL(None, use_errno=True)
    old, new = os.fsencode(temp), os.fsencode(path)
    if libc.renameat2(_AT_FDCWD, old, _AT_FDCWD, new, _RENAME_NOREPLACE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)


def _make_root(root: str) -> None:
    """Make ``root`` and whatever above it is missing, durably."""
    if os.path.isdir(root):
        return
    parent = os.path.dirname(root)
    _make_root(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(root, 0o770)
    _sync_directory(parent)


def _sync_directory(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove_stale(directory: str, now_ns: int) -> None:
    """Remove what killed writers left behind (rule 3)."""
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.stat().st_mtime_ns < now_ns - STALE_NS:
                    os.unlink(entry.path)
