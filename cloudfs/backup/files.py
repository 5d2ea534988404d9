"""From an item of a directory to its rows and blocks: the loop in which a backup spends its time.

1. Everything is done by descriptor, relative to the directory. A regular file is opened, described
   by statx, read, and described again: if it changed meanwhile it is read again, up to TRIES times,
   and then reported.
2. A block is read straight into the packer's buffer and hashed there. If the file had the same
   block at the same place before, its old location is taken over and the buffer keeps nothing.
3. A base whose blocks are all as before gets no row. Bases that the file no longer has get a hole
   row, so that a file cut short and grown again shows nothing of its past.
4. Blocks that lie in holes are not read.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat as st
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import xxhash

from cloudfs.backup.packs import Base, Packer, hole, new_base
from cloudfs.core.changes import DirTask, Stat, decode_listing, expand, item_type
from cloudfs.core.rows import BASE_BLOCKS, LOCATION, Entry, ItemType, Meta
from cloudfs.repo.view import SnapshotView
from cloudfs.source.inode import (
    StatReader,
    Status,
    data_extents,
    read_flags,
    read_xattrs,
)
from cloudfs.source.roots import Roots
from cloudfs.source.scan import reason

TRIES = 3
INLINE_XATTR = 4096
SPARE_LINS = 64
"""LINs that each assignment gets for extended attributes too large for a row."""

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_DIGEST = LOCATION.size - 16  # where the digest stands in a location record
_LENGTH = LOCATION.size - 20
_NO_END = 2**40

Adopted = Callable[[Status], dict[int, bytes]]


@dataclass
class Outcome:
    """What an assignment met. Sizes in bytes."""

    errors: list[tuple[bytes, str]] = field(default_factory=list)
    # (directory LIN, name, whether it is new)
    absent: list[tuple[int, bytes, bool]] = field(default_factory=list)
    bytes_read: int = 0
    adopted: set[bytes] = field(default_factory=set)  # packs of earlier syncs taken over
    parts: list[tuple[int, int, int, int]] = field(default_factory=list)


class FileReader:
    """Turns items into rows and blocks in a packer. For one thread."""

    def __init__(
        self,
        packer: Packer,
        snapshot: int,
        block_size: int,
        digest_seed: int,
        view: SnapshotView | None,
        adopted: Adopted | None,
        spare_lins: int,
        first_new_lin: int,
    ) -> None:
        """``view`` is the last snapshot; LINs from ``first_new_lin`` on are not in it."""
        self._packer = packer
        self._snapshot = snapshot
        self._block_size = block_size
        self._seed = digest_seed
        self._view = view
        self._adopted = adopted
        self._first_new_lin = first_new_lin
        self._spare = list(range(spare_lins + SPARE_LINS - 1, spare_lins - 1, -1))
        self._stat = StatReader()
        self._users: dict[int, str] = {}
        self._groups: dict[int, str] = {}
        self._atime = os.O_NOATIME if os.geteuid() == 0 else 0
        self.outcome = Outcome()

    def run(self, roots: Roots, task: DirTask) -> None:
        """Do one task."""
        stats, lins = decode_listing(task.listing), expand(task.lins)
        every = range(len(stats))
        items = every if task.items is None else task.items
        absent = self._items(roots, task, stats, lins, items) if items else set()
        append = self._packer.rows.entries.append
        parent, snapshot = task.lin, self._snapshot
        for index in every if task.names is None else task.names:
            if index not in absent:
                stat = stats[index]
                append(Entry(parent, stat.name, snapshot, lins[index], stat.type))

    def _items(
        self,
        roots: Roots,
        task: DirTask,
        stats: list[Stat],
        lins: list[int],
        items: list[int] | range,
    ) -> set[int]:
        """Read the items; returns the indexes of new ones that could not be read."""
        new = set(range(len(stats)) if task.names is None else task.names)
        absent = set()
        try:
            directory = roots.open(task.path)
        except OSError as error:
            for index in items:
                self._failed(task, stats[index], error, index in new)
            return new.intersection(items)
        try:
            for index in items:
                try:
                    self._item(roots, directory, task, index, stats[index], lins[index])
                except OSError as error:
                    self._failed(task, stats[index], error, index in new)
                    if index in new:
                        absent.add(index)
        finally:
            os.close(directory)
        return absent

    def _failed(self, task: DirTask, stat: Stat, error: OSError, new: bool) -> None:
        self.outcome.errors.append((_join(task.path, stat.name), reason(error)))
        self.outcome.absent.append((task.lin, stat.name, new))

    def _item(
        self, roots: Roots, directory: int, task: DirTask, index: int, stat: Stat, lin: int
    ) -> None:
        if stat.is_file:
            self._file(directory, task, stat, lin, task.bases.get(index, 0))
        elif stat.is_dir:
            fd = roots.open(_join(task.path, stat.name))
            try:
                status = self._stat.of(fd)
                flags = read_flags(fd, status.dev)
                self._describe(lin, task.lin, status, read_xattrs(fd), flags)
            finally:
                os.close(fd)
        else:
            status = self._stat.of(directory, stat.name)
            if st.S_IFMT(status.mode) != st.S_IFMT(stat.mode):
                raise FileNotFoundError(errno.ENOENT, "is gone")
            path = b"/proc/self/fd/%d/%s" % (directory, stat.name)
            target = b""
            if st.S_ISLNK(status.mode):
                target = os.readlink(stat.name, dir_fd=directory)
            self._describe(lin, task.lin, status, read_xattrs(path), 0, target=target)

    # -- metadata ------------------------------------------------------------------------------

    def _describe(
        self,
        lin: int,
        parent: int,
        status: Status,
        xattrs: dict[bytes, bytes] | None,
        flags: int,
        *,
        target: bytes = b"",
        echo: bool = False,
    ) -> None:
        regular = st.S_ISREG(status.mode)
        streams = self._split_streams(lin, xattrs) if xattrs else False
        meta = Meta(
            lin,
            self._snapshot,
            item_type(status.mode),
            status.mode & 0o7777,
            status.uid,
            status.gid,
            self._user(status.uid),
            self._group(status.gid),
            status.size,
            status.mtime_ns,
            status.ctime_ns,
            status.btime_ns,
            parent,
            status.nlink,
            flags,
            status.dev,
            status.ino,
            status.rdev,
            self._block_size if regular else 0,
            regular and status.allocated < status.size,
            target,
            xattrs or None,
            streams,
        )
        if echo:
            self._packer.rows.echoes.append(meta)
            return
        if self._view is not None and lin < self._first_new_lin and not streams:
            old = self._view.meta(lin)
            if old is not None and _alike(old, meta):
                return
        self._packer.rows.metas.append(meta)

    def _user(self, uid: int) -> str:
        name = self._users.get(uid)
        if name is None:
            try:
                name = pwd.getpwuid(uid).pw_name
            except KeyError:
                name = ""
            self._users[uid] = name
        return name

    def _group(self, gid: int) -> str:
        name = self._groups.get(gid)
        if name is None:
            try:
                name = grp.getgrgid(gid).gr_name
            except KeyError:
                name = ""
            self._groups[gid] = name
        return name

    def _split_streams(self, lin: int, xattrs: dict[bytes, bytes]) -> bool:
        """Move extended attributes too large for a row into items of their own."""
        large = {name: value for name, value in xattrs.items() if len(value) > INLINE_XATTR}
        before: dict[bytes, Entry] = {}
        if self._view is not None and lin < self._first_new_lin:
            old = self._view.meta(lin)
            if old is not None and old.streams:
                before = {entry.name: entry for entry in self._view.entries(lin)}
        kept = False
        for name, value in large.items():
            if not self._spare:
                continue  # more than any real file has: these stay in the row
            del xattrs[name]
            self._stream(lin, name, value)
            before_entry = before.pop(name, None)
            if before_entry is not None:
                self._bury(before_entry)
            kept = True
        for name, entry in before.items():
            self._bury(entry)
            self._packer.rows.entries.append(Entry(lin, name, self._snapshot, 0, 0))
        return kept

    def _bury(self, entry: Entry) -> None:
        self._packer.rows.metas.append(Meta(entry.lin, self._snapshot, ItemType.DELETED_FILE))

    def _stream(self, parent: int, name: bytes, value: bytes) -> None:
        lin, size = self._spare.pop(), self._block_size
        rows = self._packer.rows
        rows.metas.append(
            Meta(
                lin,
                self._snapshot,
                ItemType.STREAM,
                size=len(value),
                parent=parent,
                block_size=size,
            )
        )
        rows.entries.append(Entry(parent, name, self._snapshot, lin, ItemType.STREAM))
        base = new_base(lin, 0, -(-len(value) // size))
        self._packer.rows.bases.append(base)
        for index in range(len(base.records)):
            block = value[index * size : (index + 1) * size]
            digest = xxhash.xxh3_128_digest(block, self._seed)
            self._packer.append(base, index, block, digest)

    # -- data ----------------------------------------------------------------------------------

    def _file(self, directory: int, task: DirTask, stat: Stat, lin: int, base_lin: int) -> None:
        fd = os.open(stat.name, _READ | self._atime, dir_fd=directory)
        try:
            for attempt in range(1, TRIES + 1):
                status = self._stat.of(fd)
                if not st.S_ISREG(status.mode):
                    raise FileNotFoundError(errno.ENOENT, "is gone")
                flags = read_flags(fd, status.dev)
                xattrs = read_xattrs(fd)
                data = _FileData(fd, status, lin, base_lin)
                bases = self._data(data, task.part)
                if not data.torn and _unchanged(status, os.fstat(fd)):
                    break
                if attempt == TRIES:
                    path = _join(task.path, stat.name)
                    self.outcome.errors.append((path, "changed while it was read"))
        finally:
            os.close(fd)
        first = task.part is None or task.part[0] == 0
        self._describe(lin, task.lin, status, xattrs if first else None, flags, echo=not first)
        if task.part is not None:
            self.outcome.parts.append((lin, status.mtime_ns, status.ctime_ns, status.size))
        self._packer.rows.bases.extend(bases)

    def _data(self, data: _FileData, part: tuple[int, int] | None) -> list[Base]:
        """Read the blocks of a file, or of the bases of one part; returns the bases that differ."""
        size, block_size = data.status.size, self._block_size
        first, count = part or (0, 0)
        bases = -(-size // (block_size * BASE_BLOCKS))
        last = min(bases, first + count) if count else bases
        self._recall(data, first, last if count else _NO_END)
        changed: list[Base] = []
        for number in range(first, last):
            start = number * BASE_BLOCKS
            blocks = min(BASE_BLOCKS, -(-size // block_size) - start)
            old = data.before.pop(number, b"")
            if not data.has_data(start, blocks, block_size):
                if old and data.own:
                    changed.append(Base(data.lin, number, []))
                continue
            base = new_base(data.lin, number, blocks)
            self._blocks(data, base, start, old)
            if not (data.own and b"".join(base.records) == old):
                changed.append(base)
        if data.own:
            gone = sorted(number for number, old in data.before.items() if old)
            changed.extend(Base(data.lin, number, []) for number in gone)
        return changed

    def _recall(self, data: _FileData, first: int, last: int) -> None:
        """Look up what blocks the file, or the one it replaced, is known to have had."""
        if data.base_lin and self._view is not None:
            rows = self._view.block_rows(data.base_lin, first, last - 1)
            data.before = {number: row.locs for number, row in rows.items()}
        if self._adopted is not None:
            data.offered = self._adopted(data.status)

    def _blocks(self, data: _FileData, base: Base, start: int, old: bytes) -> None:
        """Read the blocks of one base and place each: where it lay before, or in the packer."""
        packer, block_size, seed = self._packer, self._block_size, self._seed
        size, offered = data.status.size, data.offered.get(base.number, b"")
        for index in range(len(base.records)):
            offset = (start + index) * block_size
            length = min(block_size, size - offset)
            if not data.has_data(start + index, 1, block_size):
                hole(base, index)
                continue
            used = packer.used
            target = packer.buffer[used : used + length]
            got = os.preadv(data.fd, [target], offset)
            if got != length:
                got = _read_on(data.fd, target, offset, got)
                data.torn |= got != length
                target[got:] = bytes(length - got)
            self.outcome.bytes_read += got
            digest = xxhash.xxh3_128_digest(target, seed)
            place = slice(index * LOCATION.size, (index + 1) * LOCATION.size)
            if _is_block(old[place], length, digest):
                base.records[index] = old[place]
            elif offered and _is_block(offered[place], length, digest):
                base.records[index] = offered[place]
                self.outcome.adopted.add(offered[place][:16])
            else:
                packer.keep(base, index, length, digest)


class _FileData:
    """One reading of one file's data."""

    def __init__(self, fd: int, status: Status, lin: int, base_lin: int) -> None:
        self.fd = fd
        self.status = status
        self.lin = lin
        self.base_lin = base_lin
        self.own = base_lin == lin  # what is known from before is this file's own past
        self.torn = False  # the file was shorter than it said
        self.before: dict[int, bytes] = {}  # location records by base
        self.offered: dict[int, bytes] = {}  # the same, from a sync that did not end
        sparse = status.allocated < status.size
        self._extents = data_extents(fd, status.size) if sparse else None
        self._starts = [start for start, _ in self._extents or ()]

    def has_data(self, first: int, count: int, block_size: int) -> bool:
        """Whether any data lies in ``count`` blocks from block ``first`` on."""
        if self._extents is None:
            return True
        low, high = first * block_size, (first + count) * block_size
        at = bisect_left(self._starts, high) - 1  # the last extent that starts before the end
        return at >= 0 and self._extents[at][1] > low


def _unchanged(status: Status, now: os.stat_result) -> bool:
    return (
        now.st_mtime_ns == status.mtime_ns
        and now.st_size == status.size
        and now.st_ctime_ns == status.ctime_ns
    )


def _is_block(record: bytes, length: int, digest: bytes) -> bool:
    """Whether a location record is that of a block of this length and digest."""
    return record[_DIGEST:] == digest and record[_LENGTH:_DIGEST] == length.to_bytes(4, "little")


def _alike(old: Meta, new: Meta) -> bool:
    """Whether two rows say the same, but for when they were made and where the device was."""
    return msgspec.structs.replace(new, snap=old.snap, dev=old.dev) == old


def _read_on(fd: int, target: memoryview, offset: int, got: int) -> int:
    """Go on after a short read, to the end of ``target`` or the file; returns all bytes read."""
    while got < len(target):
        step = os.preadv(fd, [target[got:]], offset + got)
        if not step:
            break
        got += step
    return got


def _join(path: bytes, name: bytes) -> bytes:
    return path + b"/" + name if path and name else path or name
