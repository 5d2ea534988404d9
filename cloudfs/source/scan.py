"""The scan: reading directories and telling which differ from the last snapshot.

1. A directory is read whole and each entry lstat'ed; the listing is sorted and encoded, and its
   digest compared with that of the last snapshot's. Equal: nothing in it changed, only its
   subdirectories are to be visited. Different: it is handed on as it is.
2. lstat's ctime moves with every change of data or attributes. A change within the same tick of the
   clock could hide, one through a mapping that stays, and the rest of a write(2) that goes on: the
   kernel sets the times before it takes over the data. An entry whose ctime is that fresh when it
   is listed, or that is mapped, is *doubtful*, and the signature of its directory is not kept, so
   that the next scan compares its data. What is mapped now is compared now as well.
3. A directory that cannot be read is reported, and what was known of it stays in force.

Filters leave names out before anything else sees them. The functions keep nothing between calls,
so any process can run any part of a scan.
"""

from __future__ import annotations

import contextlib
import os
import stat as st
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import xxhash

from cloudfs.core.changelist import DirChange
from cloudfs.core.changes import Counts, DirRecord, DirScan, Visit
from cloudfs.source.filters import CACHE_TAG_NAME, Filters, Matcher, is_cache
from cloudfs.source.inode import Inode, StatReader, check_directory, open_directory
from cloudfs.source.listing import (
    RawEntry,
    decode,
    encode,
    fix_times_of_stubs,
    has_name,
    raw_entry,
    read_listing,
)
from cloudfs.source.live.beneath import Beneath, TouchedSince
from cloudfs.source.live.protocol import OTHERS
from cloudfs.source.own import OwnMounts, own_mounts, shows_backups
from cloudfs.source.roots import HOLDING, Roots

COARSE_TICK_NS = 2_000_000_000  # time stamps of whole seconds: FAT, ext3, some network servers
FINE_TICK_NS = 20_000_000  # two ticks of a kernel that counts 100 a second
MAX_WRITE_BYTES = 0x7FFF_F000  # the kernel takes no more at once
SLOW_WRITE_NS = 100  # for a byte: 10 MB/s, a slow disk whose queue of writes is full

Lookup = Callable[[int], DirRecord | None]


class ScanPart(msgspec.Struct, array_like=True):
    """Directories to visit."""

    dirs: list[Visit]
    quota: int  # entries after which what is left is handed back
    trust: bool = True  # without it each counts as changed


class ScanOutcome(msgspec.Struct, array_like=True):
    """What a part of a scan found."""

    unchanged: Counts = msgspec.field(default_factory=Counts)
    changed: list[DirScan] = msgspec.field(default_factory=list)
    left: list[Visit] = msgspec.field(default_factory=list)
    errors: list[tuple[int, bytes, str]] = msgspec.field(default_factory=list)
    unlisted: list[tuple[int, bytes, str]] = msgspec.field(default_factory=list)


@dataclass
class Scanner:
    """Reads directories below the roots of a policy."""

    roots: Roots
    filters: Filters
    clock_ns: Callable[[], int] = time.time_ns
    mapped: frozenset[Inode] = frozenset()  # files that are mapped shared and writable
    # Single entries that cannot be looked at: LIN of the directory, path, reason. Whoever visits
    # takes them from here.
    unlisted: list[tuple[int, bytes, str]] = field(default_factory=list)
    _matcher: Matcher | None = field(init=False, default=None)
    _reader: StatReader = field(init=False)
    _plain: StatReader = field(init=False, default_factory=StatReader)  # for what lies beneath
    _mount_dev: int = field(init=False, default=0)  # the device of a live mount
    _own: OwnMounts = field(init=False, default_factory=own_mounts)
    _tagged: dict[bytes, bool] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._reader = self.roots.reader()
        if self.roots.beneath is not None:
            self._mount_dev = os.fstat(self.roots.fd_of(b"")[0]).st_dev
        if self.filters.excludes:
            self._matcher = Matcher(self.filters.excludes)

    def run(self, part: ScanPart, lookup: Lookup) -> ScanOutcome:
        """Visit directories and, where they did not change, those below them."""
        outcome = ScanOutcome()
        stack = list(reversed(part.dirs))
        seen = 0
        while stack:
            if seen >= part.quota:
                outcome.left = stack
                break
            lin, path, inode = stack.pop()
            record = lookup(lin) if lin else None
            try:
                found = self.visit(lin, path, record, inode)
            except OSError as error:
                outcome.errors.append((lin, path, reason(error)))
                continue
            if found is None:
                assert record is not None
                outcome.unchanged.add(record.counts)
                seen += record.counts.items + 1
                prefix = path + b"/" if path else b""
                stack.extend((sub, prefix + name, 0) for name, sub in reversed(record.subdirs))
            else:
                seen += found.counts.items + 1
                outcome.changed.append(found)
        outcome.unlisted, self.unlisted = self.unlisted, []
        return outcome

    def visit(
        self, lin: int, path: bytes, record: DirRecord | None, inode: int = 0
    ) -> DirScan | None:
        """Read one directory; None when it is as in ``record``.

        Raises OSError, also where it is not the one with this inode number (0: any is right).
        """
        root_fd, below = self.roots.fd_of(path)
        beneath = self.roots.beneath
        if beneath is not None:
            before = len(self.unlisted)
            with contextlib.suppress(OSError, TouchedSince):
                found = self._visit(lin, path, record, inode, (beneath.fd, below), self._plain)
                if found is not None:
                    found.dev = self._mount_dev  # by which files of several names are known
                return found
            del self.unlisted[before:]
        return self._visit(lin, path, record, inode, (root_fd, below), self._reader)

    def _visit(
        self,
        lin: int,
        path: bytes,
        record: DirRecord | None,
        inode: int,
        place: tuple[int, bytes],
        reader: StatReader,
    ) -> DirScan | None:
        (root_fd, below), mask = place, reader.inode_mask
        fd = open_directory(root_fd, below)
        try:
            dev = check_directory(fd, inode, reader)
            # Of what is left out only the mount point itself belongs to the backup.
            left_out = self.filters.one_file_system or dev in self._own.views
            foreign = left_out and dev != os.fstat(root_fd).st_dev
            now_ns = self.clock_ns()
            refused: dict[bytes, OSError] = {}
            entries = [] if foreign else read_listing(fd, dev, mask, refused)
            if self.roots.beneath is not None and root_fd == self.roots.beneath.fd:
                self._check_beneath(self.roots.beneath, fd, dev, entries)
                if not inode:
                    self._check_way(self.roots.beneath, fd, path)
            if has_name(entries, HOLDING) and _holds_snapshots(fd, below):
                entries = [entry for entry in entries if entry[0] != HOLDING]
            if dev in self._own.live:
                entries = [entry for entry in entries if not shows_backups(entry[0], entry[2])]
            if self.filters.by_name:
                entries = self._filtered(entries, self.roots.parted(path)[1], fd)
            if refused:
                entries = self._refuse(lin, path, entries, refused, record)
            for name, nested_fd in self.roots.nested_in(path).items():
                entries = [
                    e if e[0] != name else raw_entry(name, os.fstat(nested_fd), dev, mask)
                    for e in entries
                ]
        finally:
            os.close(fd)
        listing = encode(entries)
        signature = xxhash.xxh3_128_digest(listing)
        if record is not None and record.signature == signature and not self._mapped(dev, entries):
            return None
        found = _describe(lin, path, dev, entries, listing, signature, now_ns)
        return self._doubting_mapped(found, entries)

    @staticmethod
    def _check_beneath(beneath: Beneath, fd: int, dev: int, entries: list[RawEntry]) -> None:
        """Raise TouchedSince where a directory has to be read through the mount: it was touched, or
        the mount has numbers of its own for something in it."""
        if dev != beneath.device or any(entry[-1] or entry[2] >= OTHERS for entry in entries):
            raise TouchedSince
        beneath.check([os.fstat(fd).st_ino, *(entry[2] for entry in entries)])

    def _check_way(self, beneath: Beneath, fd: int, path: bytes) -> None:
        """Raise TouchedSince where the path of an open directory led to another one when the tree
        was frozen. One that was in the tree then is held by the mount, so nothing that was made
        since has its number."""
        if beneath.way_touched(fd, path):
            root_fd, below = self.roots.fd_of(path)
            frozen = os.stat(below or b".", dir_fd=root_fd, follow_symlinks=False)
            if frozen.st_ino & self._reader.inode_mask != os.fstat(fd).st_ino:
                raise TouchedSince

    def _refuse(
        self,
        lin: int,
        path: bytes,
        entries: list[RawEntry],
        refused: dict[bytes, OSError],
        record: DirRecord | None,
    ) -> list[RawEntry]:
        """Note entries that cannot be looked at. Those that are on record stay as they were, the
        others are left out."""
        known = {e[0]: e for e in decode(record.listing)} if record is not None else {}
        found = []
        for entry in entries:
            name = entry[0]
            if name not in refused:
                found.append(entry)
                continue
            self.unlisted.append((lin, path + b"/" + name if path else name, reason(refused[name])))
            if name in known:
                found.append(known[name])
        return found

    def revisit(
        self, lin: int, change: DirChange, record: DirRecord, *, reread: bool = False
    ) -> DirScan | None:
        """Look at the names that changed in a directory, and take the others from its record.

        None where nothing is as it was not. With ``reread`` every byte of the files named may be
        another; without, what was named is not as it was, whatever lstat says: a time stamp does
        not move with every change within a tick, nor during a write. Raises OSError.
        """
        if change.names and not reread:
            record = msgspec.structs.replace(record, signature=b"")
        if change.whole or self.filters.by_tag:
            found = self.visit(lin, change.path, record, change.inode)
            return found if found is None or reread else _tell(found, change)
        root_fd, below = self.roots.fd_of(change.path)
        mask = self._reader.inode_mask
        nested = self.roots.nested_in(change.path)
        fd = open_directory(root_fd, below)
        try:
            dev = check_directory(fd, change.inode, self._reader)
            now_ns = self.clock_ns()
            known = {entry[0]: entry for entry in decode(record.listing)}
            again: list[RawEntry] = []
            for name in change.names:
                known.pop(name, None)
                if name in nested or (name == HOLDING and _holds_snapshots(fd, below)):
                    continue
                try:
                    status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                    again.append(raw_entry(name, status, dev, mask))
                except FileNotFoundError:
                    continue
                except OSError:  # patterns may leave it out: the listing says what it is
                    return self.visit(lin, change.path, record, change.inode)
            fix_times_of_stubs(fd, again)
            if self.filters.by_name:
                again = self._filtered(again, self.roots.parted(change.path)[1], fd)
            again.extend(
                raw_entry(name, os.fstat(nested_fd), dev, mask)
                for name, nested_fd in nested.items()
            )
        finally:
            os.close(fd)
        known.update((entry[0], entry) for entry in again)
        entries = [known[name] for name in sorted(known)]
        listing = encode(entries)
        signature = xxhash.xxh3_128_digest(listing)
        if record.signature == signature:
            return None
        found = _describe(lin, change.path, dev, entries, listing, signature, now_ns)
        found = self._doubting_mapped(found, entries)
        return found if reread else _tell(found, change)

    def _mapped(self, dev: int, entries: list[RawEntry]) -> list[int]:
        """The indexes of those that are mapped."""
        if not self.mapped:
            return []
        return [index for index, entry in enumerate(entries) if (dev, entry[2]) in self.mapped]

    def _doubting_mapped(self, found: DirScan, entries: list[RawEntry]) -> DirScan:
        found.mapped = self._mapped(found.dev, entries)
        if found.mapped:
            found.doubtful = sorted({*found.doubtful, *found.mapped})
            found.signature = b""
        return found

    def links_among(self, path: bytes, names: set[bytes], *, left_out: bool) -> list[int]:
        """The inode numbers of the files of several names among names in a directory, which may not
        be there: of all, or of what is ``left_out``."""
        if left_out:
            names = self._left_out_of(path, names)
        found = []
        with contextlib.suppress(OSError):
            fd = self.roots.open(path)
            try:
                for name in names:
                    with contextlib.suppress(OSError):
                        status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                        if status.st_nlink > 1 and not st.S_ISDIR(status.st_mode):
                            found.append(status.st_ino & self._reader.inode_mask)
            finally:
                os.close(fd)
        return found

    def _left_out_of(self, path: bytes, names: set[bytes]) -> set[bytes]:
        if self.leaves_out(path) or (self.filters.by_tag and self._holds_tag(path)):
            return names
        if self._matcher is None:
            return set()
        below = self.roots.parted(path)[1]
        prefix, excludes = below + b"/" if below else b"", self._matcher.excludes
        return {name for name in names if excludes(prefix + name, is_dir=False)}

    def leaves_out(self, path: bytes) -> bool:
        """Whether the filters leave a directory out, or one above it."""
        if not self.filters.by_name:
            return False
        source, below = self.roots.parted(path)
        parts = below.split(b"/") if below else []
        way = [b"/".join(parts[:count]) for count in range(len(parts) + 1)]
        matcher = self._matcher
        if matcher is not None and any(matcher.excludes(at, is_dir=True) for at in way[1:]):
            return True
        if not self.filters.by_tag:
            return False
        prefix = source + b"/" if source else b""
        return any(self._holds_tag(prefix + at if at else source) for at in way[:-1])

    def _holds_tag(self, path: bytes) -> bool:
        """Whether a file in a directory leaves out what else is in it; asked of each once."""
        found = self._tagged.get(path)
        if found is not None:
            return found
        try:
            fd = self.roots.open(path)
        except OSError:
            return False  # who visits it meets that too
        try:
            found = (self.filters.exclude_caches and is_cache(fd)) or any(
                os.access(name, os.F_OK, dir_fd=fd, follow_symlinks=False)
                for name in self.filters.exclude_if_present
            )
        finally:
            os.close(fd)
        self._tagged[path] = found
        return found

    def _filtered(self, entries: list[RawEntry], path: bytes, fd: int) -> list[RawEntry]:
        """The entries of an open directory, at a path below its source, that are not left out."""
        names = {entry[0] for entry in entries}
        if any(os.fsencode(name) in names for name in self.filters.exclude_if_present):
            return []
        if self.filters.exclude_caches and CACHE_TAG_NAME in names and is_cache(fd):
            return [entry for entry in entries if entry[0] == CACHE_TAG_NAME]
        if self._matcher is None:
            return entries
        excluded = self._matcher.excludes
        prefix = path + b"/" if path else b""
        return [e for e in entries if not excluded(prefix + e[0], st.S_ISDIR(e[1]))]


def _holds_snapshots(fd: int, below: bytes) -> bool:
    """Whether HOLDING in an open directory holds snapshots: at the top of a source, or of what is
    nested in one, or of a subvolume that may be another policy's source."""
    from cloudfs.source.btrfs.subvolume import is_subvolume

    return not below or is_subvolume(b"/proc/self/fd/%d" % fd)


def _describe(
    lin: int,
    path: bytes,
    dev: int,
    entries: list[RawEntry],
    listing: bytes,
    signature: bytes,
    now_ns: int,
) -> DirScan:
    counts = Counts()
    subdirs, links, doubtful = [], [], []
    for index, entry in enumerate(entries):
        mode = entry[1] & 0o170000
        if mode == st.S_IFREG:
            counts.files += 1
            counts.bytes += entry[6]
            if entry[3] > 1:
                links.append(index)
        elif mode == st.S_IFDIR:
            counts.dirs += 1
            subdirs.append((index, entry[0], 0 if entry[-1] else entry[2]))
        else:
            if mode == st.S_IFLNK:
                counts.symlinks += 1
            else:
                counts.others += 1
            if entry[3] > 1:
                links.append(index)
        if is_fresh(entry[8], now_ns, entry[6] if mode == st.S_IFREG else 0):
            doubtful.append(index)
    if doubtful:
        signature = b""
    return DirScan(lin, path, dev, signature, listing, subdirs, links, doubtful, counts)


def _tell(found: DirScan, change: DirChange) -> DirScan:
    """Note what a changelist says of the entries, which the listing may not show."""
    for index, entry in enumerate(decode(found.listing)):
        if entry[0] in change.names:
            found.told.append(index)
            # A file of several names may have been changed under another one.
            if st.S_ISREG(entry[1]) and entry[3] == 1:
                found.ranges[index] = change.ranges.get(entry[0], [])
    return found


def is_fresh(ctime_ns: int, now_ns: int, size: int) -> bool:
    """Whether a change after ``now_ns`` might still leave this ctime as it is: in the same tick, or
    by a write of all the ``size`` bytes of a file that goes on."""
    tick = FINE_TICK_NS if ctime_ns % 1_000_000_000 else COARSE_TICK_NS
    return ctime_ns > now_ns - tick - min(size, MAX_WRITE_BYTES) * SLOW_WRITE_NS


def reason(error: OSError) -> str:
    """An error in a few words, as it is listed beside a path."""
    words = {
        "FileNotFoundError": "is gone",
        "PermissionError": "permission denied",
        "NotADirectoryError": "is no longer a directory",
    }
    return words.get(type(error).__name__) or (error.strerror or str(error)).lower()
