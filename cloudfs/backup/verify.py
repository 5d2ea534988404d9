"""Verifying a source: reading a sample of what it says did not change.

1. When the walk is over and nothing is packed yet, it is known what the next snapshot would hold:
   the records in force, and before them those that the walk laid down. What the walk queued is read
   anyway (see :class:`NotingQueue`). All the rest is what the source calls unchanged.
2. Of that, LINs are chosen by a hash under a salt that is another one each time, so that nothing
   is passed over for ever.
3. Where the walk went by a changelist, a directory that is chosen is listed, and its names and what
   lstat says of them are compared with its record. Where the tree was scanned, that has been done.
4. A file that is chosen must be as it is on record, and each of its blocks must be the one that the
   last snapshot holds. Of a file with changed ranges, the other blocks are compared.
5. An entry of several names may have been looked at under another name, now or long ago; so what
   is not as its record says may be as its metadata row says.
6. In a tree that does not stand still, a file that changes while it is read is passed over, and the
   source is asked what has changed since it made its changelist: that explains a difference.

Directories go to threads in pieces; records are read as they are needed and not kept.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import msgspec
import xxhash

from cloudfs.backup.data import FileData, is_block
from cloudfs.backup.job import Difference, Verified
from cloudfs.core.assign import WorkQueue
from cloudfs.core.changelist import Changelist, Range
from cloudfs.core.changes import DirRecord, DirTask, Stat, decode_listing, expand, item_type
from cloudfs.core.rows import BASE_BLOCKS, HOLE_RECORD, LOCATION, ROOT_LIN, Meta
from cloudfs.db.state import SyncState
from cloudfs.repo.view import SnapshotView
from cloudfs.source.inode import StatReader, Status, open_directory
from cloudfs.source.roots import Roots
from cloudfs.source.scan import Scanner

PIECE = 512
"""Files that are given to a thread at once."""

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)

DATA, ATTRIBUTES, GONE, NEW = "data", "attributes", "is gone", "is not on record"


class Sample(msgspec.Struct, frozen=True):
    """A share of all LINs, from 0 to 1; another one for each 64-bit salt."""

    share: float
    salt: int

    def chosen(self, lins: list[int]) -> list[int]:
        """The indexes of those that are in it."""
        limit, salt, digest = int(self.share * 2**64), self.salt, xxhash.xxh3_64_intdigest
        return [i for i, lin in enumerate(lins) if digest(lin.to_bytes(8, "big"), salt) < limit]


class NotingQueue(WorkQueue):
    """A queue that remembers which items were put into it, and what of their data can be others
    (None: all of it). Of items that are new it remembers nothing."""

    def __init__(self, block_size: int, part_bytes: int, first_new_lin: int) -> None:
        super().__init__(block_size, part_bytes)
        self.first_new_lin = first_new_lin
        self.noted: dict[int, list[Range] | None] = {}

    def add(self, task: DirTask, items: int, size: int) -> None:
        """See :class:`WorkQueue`."""
        lins = expand(task.lins)
        for index in range(len(lins)) if task.items is None else task.items:
            if lins[index] < self.first_new_lin:
                ranges = task.ranges.get(index) if task.bases.get(index) == lins[index] else None
                self.noted[lins[index]] = ranges
        super().add(task, items, size)


@dataclass(frozen=True)
class Against:
    """What is compared with what.

    ``changelist`` says whether the walk went by one; ``changed_since`` is asked, where something
    differs, what has changed since the changelist was made (None: it does not know).
    """

    roots: Roots
    scanner: Scanner
    state: SyncState
    view: SnapshotView
    digest_seed: int
    noted: NotingQueue
    changelist: bool
    changed_since: Callable[[], Changelist | None]


@dataclass
class _Piece:
    """A part of the work: a directory to be listed, files in it to be read."""

    lin: int
    path: bytes
    record: DirRecord
    listed: bool
    files: list[tuple[Stat, int]]


class Differs(Exception):
    """The source called something unchanged that is not."""

    def __init__(self, verified: Verified, *, changelist: bool) -> None:
        """``changelist``: by a changelist, not by what lstat says."""
        super().__init__()
        self.verified = verified
        self.changelist = changelist


@dataclass
class Verifier:
    """Looks at one sample."""

    against: Against
    sample: Sample
    threads: int
    tell: Callable[[Verified], None]  # now and then; may raise, to end it
    verified: Verified = field(default_factory=Verified)

    def run(self) -> Verified:
        """Look at all of the sample; what differs is in what is returned."""
        waiting: deque[Future[Verified]] = deque()
        with ThreadPoolExecutor(self.threads, "verify") as pool:
            try:
                for piece in self._pieces():
                    waiting.append(pool.submit(self._look, piece))
                    if len(waiting) > 4 * self.threads:
                        self._take(waiting.popleft())
                while waiting:
                    self._take(waiting.popleft())
            finally:
                for future in waiting:
                    future.cancel()
        if self.verified.differences:
            later = self.against.changed_since()
            explained = Explained(later or Changelist())
            # A file may have been found by its directory's listing, and by itself.
            found = {d.path: d for d in self.verified.differences if not explained.has(d)}
            self.verified.differences = [found[path] for path in sorted(found)]
        return self.verified

    def _take(self, future: Future[Verified]) -> None:
        self.verified.add(future.result())
        self.tell(self.verified)

    # -- what there is to look at ----------------------------------------------------------------

    def _pieces(self) -> Iterator[_Piece]:
        """All that is chosen, directory by directory."""
        against = self.against
        state, noted, first_new = against.state, against.noted.noted, against.noted.first_new_lin
        staged = against.view.number + 1
        waiting = [(ROOT_LIN, b"")]
        while waiting:
            lin, path = waiting.pop()
            record = state.staged(lin, staged) or state.record(lin)
            if record is None:
                continue
            prefix = path + b"/" if path else b""
            waiting.extend((sub, prefix + name) for name, sub in reversed(record.subdirs))
            if against.roots.many and lin == ROOT_LIN:
                continue  # made up
            known = lin < first_new
            listed = against.changelist and known and bool(self.sample.chosen([lin]))
            lins = expand(record.lins)
            chosen = self.sample.chosen(lins)
            files = []
            if chosen:
                stats, absent = decode_listing(record.listing), set(record.absent)
                files = [
                    (stats[index], lins[index])
                    for index in chosen
                    if stats[index].is_file
                    and lins[index] < first_new
                    and index not in absent
                    and noted.get(lins[index], ()) is not None
                ]
            for start in range(0, len(files) or listed, PIECE):
                piece = files[start : start + PIECE]
                yield _Piece(lin, path, record, listed and not start, piece)

    # -- looking, in a thread --------------------------------------------------------------------

    def _look(self, piece: _Piece) -> Verified:
        found = Verified()
        try:
            if piece.listed:
                found.directories = 1
                found.differences.extend(self._list(piece))
            if piece.files:
                root_fd, below = self.against.roots.fd_of(piece.path)
                fd = open_directory(root_fd, below)
                try:
                    for stat, lin in piece.files:
                        self._file(fd, piece, stat, lin, found)
                finally:
                    os.close(fd)
        except OSError as error:
            # What can no longer be read is the walk's to report; only what is gone differs.
            if self.against.changelist and error.errno in _GONE:
                found.differences.append(Difference(piece.path, GONE))
        return found

    def _list(self, piece: _Piece) -> Iterator[Difference]:
        """Compare a directory's listing with its record."""
        scanner = self.against.scanner
        scan = scanner.visit(piece.lin, piece.path, piece.record)
        if scan is None or scan.listing == piece.record.listing:
            return
        lins, absent = expand(piece.record.lins), set(piece.record.absent)
        now = {stat.name: stat for stat in decode_listing(scan.listing)}
        for index, stat in enumerate(decode_listing(piece.record.listing)):
            new = now.pop(stat.name, None)
            if index in absent or new == stat:
                continue
            what = GONE if new is None else ATTRIBUTES
            if new is None or not self._as_described(lins[index], new):
                yield Difference(
                    _join(piece.path, stat.name), what, piece.lin, lins[index], stat.ino
                )
        for name, stat in now.items():
            yield Difference(_join(piece.path, name), NEW, piece.lin, 0, stat.ino)

    def _as_described(self, lin: int, now: Stat | Status) -> bool:
        """Whether an item is as its metadata says, or is described anew by this sync anyway."""
        against = self.against
        if lin >= against.noted.first_new_lin or lin in against.noted.noted:
            return True
        meta = against.view.meta(lin)
        return meta is not None and _described(meta) == _described(now)

    def _file(self, directory: int, piece: _Piece, stat: Stat, lin: int, found: Verified) -> None:
        """Compare one file's attributes and data."""
        meta = self.against.view.meta(lin)
        if meta is None:
            return  # it could not be read
        difference = Difference(_join(piece.path, stat.name), DATA, piece.lin, lin, stat.ino)
        try:
            fd = os.open(stat.name, _READ | os.O_NOATIME * (os.geteuid() == 0), dir_fd=directory)
        except OSError as error:
            if self.against.changelist and error.errno in _GONE:
                difference.what = GONE
                found.differences.append(difference)
            return
        try:
            reader = self.against.roots.reader()
            status = reader.of(fd)
            noted = self.against.noted.noted
            if lin not in noted and not _as_listed(stat, status):
                if self.against.changelist and not self._as_described(lin, status):
                    difference.what = ATTRIBUTES
                    found.differences.append(difference)
                    return
                if not self.against.changelist:
                    return  # it changed since it was listed: the next sync takes it
            same, count = self._data(fd, status, meta, noted.get(lin), reader)
            found.files += 1
            found.bytes += count
            if not same and _unchanged(status, os.fstat(fd)):
                found.differences.append(difference)
        finally:
            os.close(fd)

    def _data(
        self, fd: int, status: Status, meta: Meta, ranges: list[Range] | None, reader: StatReader
    ) -> tuple[bool, int]:
        """Whether the blocks of an open file are those of the last snapshot, but for ``ranges``;
        and how many bytes were read to know that."""
        size, block_size = status.size, meta.block_size
        data = FileData(fd, status, meta.lin, meta.lin, ranges, reader.extents)
        buffer = _buffer(block_size)
        read = 0
        bases = -(-size // (block_size * BASE_BLOCKS))
        for base in range(bases):
            rows = self.against.view.block_rows(meta.lin, base, base)
            records = rows[base].locs if base in rows else b""
            first = base * BASE_BLOCKS
            blocks = min(BASE_BLOCKS, -(-size // block_size) - first)
            for index in range(blocks):
                record = records[index * LOCATION.size : (index + 1) * LOCATION.size]
                hole = record in (b"", HOLE_RECORD)
                number = first + index
                if ranges is not None and not data.kept(record, number, 1, block_size):
                    continue
                if hole and not data.has_data(number, 1, block_size):
                    continue
                block = buffer[: min(block_size, size - number * block_size)]
                got = os.preadv(fd, [block], number * block_size)
                read += got
                if got != len(block) or not self._is(block, record, hole=hole):
                    return False, read
        return True, read

    def _is(self, block: memoryview, record: bytes, *, hole: bool) -> bool:
        if hole:
            return bytes(block).count(0) == len(block)
        digest = xxhash.xxh3_128_digest(block, self.against.digest_seed)
        return is_block(record, len(block), digest)


class Explained:
    """What a changelist says has changed, to be asked of single paths."""

    def __init__(self, changes: Changelist) -> None:
        self._inodes = changes.inodes or {}
        self._names: dict[bytes, set[bytes]] = {}
        self._whole: set[bytes] = set()
        for change in changes.dirs:
            for path in {change.path, change.old_path or change.path}:
                self._names.setdefault(path, set()).update(change.names)
                if change.whole:
                    self._whole.add(path)

    def has(self, difference: Difference) -> bool:
        """Whether what differs, or a directory above it, is among the changes."""
        if difference.inode in self._inodes:
            return True
        path = difference.path
        while path:
            directory, _, name = path.rpartition(b"/")
            if directory in self._whole or name in self._names.get(directory, ()):
                return True
            path = directory
        return False


def doubt(state: SyncState, differences: list[Difference]) -> None:
    """Let the next walk read the files that differ, whatever lstat says of them."""
    directories: dict[int, set[int]] = {}
    for difference in differences:
        if difference.directory:
            directories.setdefault(difference.directory, set()).add(difference.lin)
    head = state.head
    for directory, lins in directories.items():
        record = state.record(directory)
        if record is not None:
            found = [i for i, lin in enumerate(expand(record.lins)) if lin in lins]
            record.doubtful = sorted({*record.doubtful, *found})
            record.signature = b""
            state.put_records(head.snapshot, [(directory, record)])
    # Should this sync not end, the next one looks at them as well, whatever its source says.
    again = sorted({*head.again, *directories})
    state.save_head(msgspec.structs.replace(head, again=again))


_local = threading.local()


def _buffer(size: int) -> memoryview:
    """This thread's buffer of at least so many bytes."""
    found: memoryview | None = getattr(_local, "buffer", None)
    if found is None or len(found) < size:
        found = _local.buffer = memoryview(bytearray(size))
    return found


def _described(item: Stat | Status | Meta) -> tuple[int, ...]:
    """What of an item's metadata is the same for all of its names."""
    if isinstance(item, Meta):
        kind, mode = item.type, item.mode
    else:
        kind, mode = int(item_type(item.mode)), item.mode & 0o7777
    times = item.mtime_ns, item.ctime_ns
    return kind, mode, item.uid, item.gid, item.size, item.nlink, item.ino, item.rdev, *times


def _as_listed(stat: Stat, status: Status) -> bool:
    return stat.mode == status.mode and _described(stat) == _described(status)


def _unchanged(before: Status, now: os.stat_result) -> bool:
    return (before.size, before.mtime_ns, before.ctime_ns) == (
        now.st_size,
        now.st_mtime_ns,
        now.st_ctime_ns,
    )


def _join(path: bytes, name: bytes) -> bytes:
    return path + b"/" + name if path else name
