"""The roots of a policy: one source, or several below a directory that is made up.

Paths within a backup are relative to its root. With one source the root is that directory; with
several, the first part of each path is the base name of a source and leads to it.
"""

from __future__ import annotations

import os
import stat as st

import msgspec

from cloudfs.core.changes import Stat, encode_listing
from cloudfs.core.errors import SourceError, UsageError
from cloudfs.core.limits import raise_file_limit
from cloudfs.source.inode import StatReader, open_directory
from cloudfs.source.live.beneath import Beneath, BeneathPlaces
from cloudfs.source.live.reading import FrozenReader

HOLDING = b".cloudfs-snapshots"
"""The directory at the top of a source that holds snapshots of it; never backed up."""


def root_names(sources: list[bytes]) -> list[bytes]:
    """The names by which a backup shows its sources. Raises UsageError where two have the same."""
    names = [os.path.basename(source.rstrip(b"/")) or b"root" for source in sources]
    if len(set(names)) != len(names):
        raise UsageError(
            "Two sources of this policy have the same base name, by which the backup would show"
            " them. Make a policy for each of them."
        )
    return names


class RootPlaces(msgspec.Struct, frozen=True):
    """The sources, where each is read (itself, or a snapshot of it), and where what stands empty
    in a snapshot is read, by path below the root. ``through_mount``: they are read through what a
    live mount holds frozen."""

    sources: list[bytes]
    at: list[bytes]
    nested: dict[bytes, bytes] = {}
    through_mount: bool = False
    beneath: BeneathPlaces | None = None  # where it is read if nobody has touched it since


class Roots:
    """Opens directories below the sources of a policy."""

    def __init__(self, places: RootPlaces) -> None:
        """Raises SourceError where a source is not there, UsageError where two share a name."""
        self.many = len(places.sources) > 1
        self._through_mount = places.through_mount
        names = root_names(places.sources)
        self._by_name: dict[bytes, int] = {}
        self._nested: dict[bytes, int] = {}
        self._nested_in: dict[bytes, dict[bytes, int]] = {}  # by directory and name
        self._single = -1
        self.beneath = Beneath(places.beneath) if places.beneath is not None else None
        try:
            for name, place in zip(names, places.at, strict=True):
                self._by_name[name] = _open(place)
            if places.nested:  # of which there may be more than a process usually may open
                raise_file_limit()
            for path, place in places.nested.items():
                self._nested[path] = _open(place)
                directory, _, name = path.rpartition(b"/")
                self._nested_in.setdefault(directory, {})[name] = self._nested[path]
        except BaseException:
            self.close()
            raise
        if not self.many:
            self._single = self._by_name[names[0]]

    def reader(self) -> StatReader:
        """Something that reads what there is to know of items here. For one thread."""
        return FrozenReader() if self._through_mount else StatReader()

    def fd_of(self, path: bytes) -> tuple[int, bytes]:
        """The descriptor of what holds a path (a source, or what is nested in one), and the path
        below that."""
        if self._nested:
            end = len(path)
            while end > 0:
                if (fd := self._nested.get(path[:end])) is not None:
                    return fd, path[end + 1 :]
                end = path.rfind(b"/", 0, end)
        first, rest = self.parted(path)
        try:
            return self._by_name[first] if self.many else self._single, rest
        except KeyError:
            raise FileNotFoundError(2, "is no source", os.fsdecode(path)) from None

    def parted(self, path: bytes) -> tuple[bytes, bytes]:
        """What of a path leads to its source (b"" where there is only one), and what leads on from
        there: below the source itself, whatever is nested in that."""
        if not self.many:
            return b"", path
        first, _, rest = path.partition(b"/")
        return first, rest

    def open(self, path: bytes) -> int:
        """Open a directory of the backed-up tree. Raises OSError."""
        if self.many and not path:
            # The made-up root: its entries are opened by their own paths, never through it.
            return os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        fd, rest = self.fd_of(path)
        return open_directory(fd, rest)

    def nested_in(self, path: bytes) -> dict[bytes, int]:
        """The descriptors of what is nested directly in a directory, by name."""
        return self._nested_in.get(path, {})

    def root_listing(self) -> bytes:
        """The listing of the made-up directory above the root: the root, under no name.

        Its inode is left out: whatever directory stands there, it is the root.
        """
        if self.many:
            return encode_listing([Stat(b"", st.S_IFDIR | 0o755, 0, 1, 0, 0, 0, 0, 0, 0, False)])
        return encode_listing([_stat(b"", self._single, ino=0)])

    def top_listing(self) -> bytes:
        """The listing of the made-up root of several sources."""
        stats = [_stat(name, fd) for name, fd in self._by_name.items()]
        return encode_listing(sorted(stats, key=lambda stat: stat.name))

    def close(self) -> None:
        """Close the sources."""
        if self.beneath is not None:
            self.beneath.close()
            self.beneath = None
        for fd in (*self._by_name.values(), *self._nested.values()):
            os.close(fd)
        self._by_name.clear()
        self._nested.clear()
        self._nested_in.clear()


def _open(source: bytes) -> int:
    shown = os.fsdecode(source)
    try:
        return os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise SourceError(
            f"the source {shown} does not exist. Is its drive mounted? Nothing was backed up."
        ) from None
    except NotADirectoryError:
        raise SourceError(f"the source {shown} is not a directory. Name a directory.") from None
    except OSError as error:
        raise SourceError(f"the source {shown} cannot be read: {error.strerror}.") from None


def _stat(name: bytes, fd: int, ino: int | None = None) -> Stat:
    s = os.fstat(fd)
    return Stat(
        name,
        s.st_mode,
        s.st_ino if ino is None else ino,
        s.st_nlink,
        s.st_uid,
        s.st_gid,
        s.st_size,
        s.st_mtime_ns,
        s.st_ctime_ns,
        s.st_rdev,
        False,
    )
