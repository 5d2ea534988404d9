"""Items of a directory into rows and blocks.

Everything is done by descriptor, relative to the directory. A regular file is opened, described by
statx, read, and looked at again. If it changed meanwhile it is read from a reflink, which stands
still, where the file system has them; elsewhere it is read again, up to TRIES times, and then
reported. What cannot be read is reported and leaves everything else as it is.

Most files have one block and lie there as they were listed. Such a file is read first and then
described: what statx says is what the listing said, so it did not change meanwhile. Whatever is not
so is looked at again the long way.
"""

from __future__ import annotations

import errno
import os
import stat as st
from collections.abc import Callable
from dataclasses import dataclass, field

from cloudfs.backup.data import DataReader, FileData
from cloudfs.backup.describe import Describer
from cloudfs.backup.packs import Base, Packer
from cloudfs.core.changelist import Range
from cloudfs.core.changes import Absent, DirTask, Stat, decode_listing, expand
from cloudfs.core.rows import Entry
from cloudfs.source.inode import (
    StatReader,
    Status,
    check_inode,
    is_mount,
    read_xattrs,
    reflink,
)
from cloudfs.source.live.beneath import Beneath, TouchedSince
from cloudfs.source.roots import Roots
from cloudfs.source.scan import reason

TRIES = 3
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


@dataclass
class Outcome:
    """What an assignment met."""

    errors: list[tuple[bytes, str]] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)
    parts: list[tuple[int, int, int, int]] = field(default_factory=list)


class Opened:
    """A directory of the tree, opened when it is first needed: as it stands frozen, and beneath a
    live mount."""

    def __init__(self, roots: Roots, path: bytes) -> None:
        self.roots = roots
        self._path = path
        self._frozen = self._beneath = -1

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in (self._frozen, self._beneath):
            if fd >= 0:
                os.close(fd)

    def frozen(self) -> int:
        """Its descriptor. Raises OSError."""
        if self._frozen < 0:
            self._frozen = self.roots.open(self._path)
        return self._frozen

    def beneath(self) -> int:
        """That beneath the mount, which there must be. Raises OSError."""
        if self._beneath < 0:
            assert self.roots.beneath is not None
            self._beneath = self.roots.beneath.open(self._path)
        return self._beneath


class FileReader:
    """Turns items into rows and blocks in a packer. For one thread."""

    def __init__(
        self,
        packer: Packer,
        snapshot: int,
        block_size: int,
        describer: Describer,
        data: DataReader,
        reader: StatReader,
    ) -> None:
        self._packer = packer
        self._snapshot = snapshot
        self._block_size = block_size
        self._describer = describer
        self._data = data
        self._reader = self._stat = reader
        self._plain = StatReader()
        self._beneath: Beneath | None = None  # what is read now, where it is not the tree itself
        self._flags = _READ | (os.O_NOATIME if os.geteuid() == 0 else 0)
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
            stat = stats[index]
            if index in absent:
                # What had the name before is buried: the name goes with it.
                append(Entry(parent, stat.name, snapshot, 0, 0))
            else:
                append(Entry(parent, stat.name, snapshot, lins[index], stat.type))

    def _items(
        self,
        roots: Roots,
        task: DirTask,
        stats: list[Stat],
        lins: list[int],
        items: list[int] | range,
    ) -> set[int]:
        """Read the items; returns the indexes of new ones that could not be read. What is known and
        moved stays as it was, under its new name."""
        named = set(range(len(stats)) if task.names is None else task.names)
        absent = set()
        with Opened(roots, task.path) as place:
            for index in items:
                stat, lin = stats[index], lins[index]
                try:
                    if not self._beneath_mount(place, task, index, stat, lin):
                        self._item(place.frozen(), roots.open, task, index, stat, lin)
                except OSError as error:
                    new = index in named and not self._describer.keep(lin, task.lin)
                    self.outcome.errors.append((_join(task.path, stat.name), reason(error)))
                    self.outcome.absent.append(Absent(task.lin, lin, stat, new))
                    if new:
                        absent.add(index)
        return absent

    def _beneath_mount(
        self, place: Opened, task: DirTask, index: int, stat: Stat, lin: int
    ) -> bool:
        """Do an item beneath a live mount; False where that cannot be, or was touched meanwhile."""
        beneath = place.roots.beneath
        if beneath is None:
            return False
        self._beneath, self._stat = beneath, self._plain
        try:
            self._item(place.beneath(), beneath.open, task, index, stat, lin)
            return True
        except (OSError, TouchedSince):
            return False
        finally:
            self._beneath, self._stat = None, self._reader

    def _item(
        self,
        directory: int,
        open_below: Callable[[bytes], int],
        task: DirTask,
        index: int,
        stat: Stat,
        lin: int,
    ) -> None:
        if stat.is_file:
            base_lin, ranges = task.bases.get(index, 0), task.ranges.get(index)
            # Of one whose data is as it was, no byte is read.
            if ranges == [] or not self._small(directory, task, stat, lin, base_lin):
                self._file(directory, task, stat, lin, base_lin, ranges)
        elif stat.is_dir:
            fd = open_below(_join(task.path, stat.name))
            try:
                status = self._stat.of(fd)
                flags = self._stat.flags(fd, status)
                xattrs = read_xattrs(fd)
                self._check(fd, stat, status)
                self._describer.describe(lin, task.lin, status, xattrs, flags)
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
            xattrs = read_xattrs(path)
            self._check(directory, stat, status)
            self._describer.describe(lin, task.lin, status, xattrs, 0, target=target)

    def _check(self, fd: int, stat: Stat, status: Status) -> None:
        """Raise what says that an item is not the one that was listed. ``fd`` is of the item or of
        its directory."""
        if self._beneath is not None:
            self._beneath.check_same(stat.ino, status.ino)
        elif stat.ino != status.ino and not (stat.is_dir and is_mount(fd)):
            check_inode(fd, stat.ino, status.ino, self._reader)

    def _file(
        self,
        directory: int,
        task: DirTask,
        stat: Stat,
        lin: int,
        base_lin: int,
        ranges: list[Range] | None,
    ) -> None:
        fd = os.open(stat.name, self._flags, dir_fd=directory)
        try:
            for attempt in range(1, TRIES + 1):
                status = self._stat.of(fd)
                if not st.S_ISREG(status.mode):
                    raise FileNotFoundError(errno.ENOENT, "is gone")
                flags = self._stat.flags(fd, status)
                xattrs = read_xattrs(fd)
                still = reflink(directory, fd) if attempt > 1 and task.part is None else None
                if still is not None:
                    bases, status = self._read_still(still, status, lin, base_lin, ranges)
                    break
                data = FileData(fd, status, lin, base_lin, ranges, self._stat.extents)
                bases = self._data.read(data, task.part)
                self._check(fd, stat, status)
                if not data.torn and _unchanged(status, os.fstat(fd)):
                    break
                if attempt == TRIES:
                    path = _join(task.path, stat.name)
                    self.outcome.errors.append((path, "changed while it was read"))
        finally:
            os.close(fd)
        first = task.part is None or task.part[0] == 0
        self._describer.describe(
            lin, task.lin, status, xattrs if first else None, flags, echo=not first
        )
        if task.part is not None:
            self.outcome.parts.append((lin, status.mtime_ns, status.ctime_ns, status.size))
        self._packer.rows.bases.extend(bases)

    def _read_still(
        self, fd: int, status: Status, lin: int, base_lin: int, ranges: list[Range] | None
    ) -> tuple[list[Base], Status]:
        """Read a reflink, which nobody changes, and close it; its size goes into the status."""
        try:
            copy = self._stat.of(fd)
            status = status._replace(size=copy.size, allocated=copy.allocated)
            return self._data.read(
                FileData(fd, status, lin, base_lin, ranges, self._stat.extents), None
            ), status
        finally:
            os.close(fd)

    def _small(self, directory: int, task: DirTask, stat: Stat, lin: int, base_lin: int) -> bool:
        """Do a file of at most one block; False to do it the long way."""
        size = stat.size
        if size > self._block_size or task.part is not None or self._data.adopting:
            return False
        fd = os.open(stat.name, self._flags, dir_fd=directory)
        try:
            target = self._packer.room(size)
            if size and os.preadv(fd, [target], 0) != size:
                return False
            status = self._stat.of(fd)
            if not _as_listed(stat, status):
                return False
            flags = self._stat.flags(fd, status)
            xattrs = read_xattrs(fd)
            self._check(fd, stat, status)
        except OSError:
            return False  # the long way says what is wrong
        finally:
            os.close(fd)
        if size or base_lin:
            # In two steps: taking a block may close the pack, and with it the rows of till then.
            bases = self._data.take_small(target, lin, base_lin)
            self._packer.rows.bases.extend(bases)
        self._describer.describe(lin, task.lin, status, xattrs, flags)
        return True


def _as_listed(stat: Stat, status: Status) -> bool:
    """Whether a regular file is as it was listed, and without holes."""
    return (
        stat.ctime_ns == status.ctime_ns
        and stat.size == status.size <= status.allocated
        and stat.mtime_ns == status.mtime_ns
        and stat.ino == status.ino
        and stat.mode == status.mode
    )


def _unchanged(status: Status, now: os.stat_result) -> bool:
    return (
        now.st_mtime_ns == status.mtime_ns
        and now.st_size == status.size
        and now.st_ctime_ns == status.ctime_ns
    )


def _join(path: bytes, name: bytes) -> bytes:
    return path + b"/" + name if path and name else path or name
