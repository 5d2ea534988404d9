"""Reading what there is to know of one inode: statx, extended attributes, inode flags.

Directories are held by descriptor and items are named relative to them, so a rename of a parent
confuses nothing and no path is too long.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import sys
from typing import NamedTuple

from cloudfs.source.numbers import is_stub, keeps_numbers

_STATX = struct.Struct("<IIQIIIH2xQQQQ" + "qI4x" * 4 + "IIII")
_STATX_BASIC_AND_BTIME = 0xFFF
_STATX_MNT_ID_UNIQUE = 0x4000
_MNT_ID_AT = 144
_AT_EMPTY_PATH = 0x1000
_AT_SYMLINK_NOFOLLOW = 0x100
_AT_STATX_DONT_SYNC = 0x4000
_AT_FDCWD = -100

_libc = ctypes.CDLL(None, use_errno=True)
_statx = _libc.statx
_statx.argtypes = (
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_void_p,
)

FS_IOC_GETFLAGS = 0x80086601
FICLONE = 0x40049409
KEPT_FLAGS = (
    0x0000_00FF  # secure delete, undelete, compress, sync, immutable, append, no dump, no atime
    | 0x0000_0400  # no compress
    | 0x0001_C000  # journal data, no tail, directory sync
    | 0x0002_0000  # top of directory hierarchies
    | 0x0080_0000  # no copy on write
    | 0x2200_0000  # direct access, project inheritance
)
"""The inode flags that chattr(1) can set; the others only report."""

Inode = tuple[int, int]
"""st_dev and st_ino."""

PATH_STEP = 2048
DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Status(NamedTuple):
    """What statx tells. Times in ns since the epoch (btime 0: not known), sizes in bytes."""

    mode: int
    nlink: int
    uid: int
    gid: int
    ino: int
    size: int
    allocated: int
    mtime_ns: int
    ctime_ns: int
    btime_ns: int
    rdev: int
    dev: int


class StatReader:
    """Reads what there is to know of items: by statx, into a buffer of its own; not for several
    threads."""

    inode_mask = -1
    """What of an inode number is the item's own."""

    def vouches(self, fd: int, number: int) -> bool:
        """Whether nothing else than what has this number can be the item, found in or at ``fd``,
        that had it a moment ago."""
        return keeps_numbers(fd)

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(256)
        self._address = ctypes.addressof(self._buffer)

    def of(self, fd: int, name: bytes = b"") -> Status:
        """The status of an open file, or of a name in an open directory (no symlink followed)."""
        return self._read(fd, name, _AT_SYMLINK_NOFOLLOW if name else _AT_EMPTY_PATH)

    def behind(self, link: str) -> Status:
        """The status of what a link leads to, as the kernel has it: of a file of another machine,
        or of a server of this one, nobody is asked who may not answer."""
        return self._read(_AT_FDCWD, os.fsencode(link), _AT_STATX_DONT_SYNC)

    def _read(self, fd: int, name: bytes, flags: int) -> Status:
        if _statx(fd, name, flags, _STATX_BASIC_AND_BTIME, self._address):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), os.fsdecode(name))
        (
            _mask, _blksize, _attributes, nlink, uid, gid, mode, ino, size, blocks, _attr_mask,
            _atime, _atime_ns, btime, btime_ns, ctime, ctime_ns, mtime, mtime_ns,
            rdev_major, rdev_minor, dev_major, dev_minor,
        ) = _STATX.unpack_from(self._buffer)  # fmt: skip
        found = Status(
            mode,
            nlink,
            uid,
            gid,
            ino,
            size,
            blocks * 512,
            mtime * 1_000_000_000 + mtime_ns,
            ctime * 1_000_000_000 + ctime_ns,
            btime * 1_000_000_000 + btime_ns,
            os.makedev(rdev_major, rdev_minor) if rdev_major or rdev_minor else 0,
            os.makedev(dev_major, dev_minor),
        )
        if not name and is_stub(fd, ino, mode):
            found = found._replace(mtime_ns=0, ctime_ns=0, btime_ns=0)
        return found

    def flags(self, fd: int, status: Status) -> int:
        """The inode flags that chattr(1) can set, of an open file or directory."""
        return read_flags(fd, status.dev)

    def extents(self, fd: int, size: int) -> list[tuple[int, int]]:
        """The [start, end) byte ranges of an open file that are not holes."""
        return data_extents(fd, size)


def mount_of(fd: int) -> int:
    """The number of the mount that an open item is on, which no other one gets as long as the
    machine runs; 0 where the kernel knows none (before Linux 6.8). No server is asked."""
    buffer = ctypes.create_string_buffer(256)
    flags = _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC
    if _statx(fd, b"", flags, _STATX_MNT_ID_UNIQUE, ctypes.addressof(buffer)):
        return 0
    known = int.from_bytes(buffer.raw[:4], sys.byteorder) & _STATX_MNT_ID_UNIQUE
    return int.from_bytes(buffer.raw[_MNT_ID_AT:][:8], sys.byteorder) if known else 0


def open_directory(root_fd: int, path: bytes, flags: int = 0) -> int:
    """Open a directory below an open one; ``path`` may be longer than the kernel takes at once.

    ``path`` has no leading slash; b"" is the root itself. Of what is above it, nothing need be
    readable; with O_PATH among ``flags``, nor need the directory. Raises OSError.
    """
    fd = root_fd
    rest = path or b"."
    try:
        while len(rest) > PATH_STEP:
            cut = rest.rindex(b"/", 0, PATH_STEP)
            deeper = os.open(rest[:cut], DIRECTORY_FLAGS | os.O_PATH, dir_fd=fd)
            if fd != root_fd:
                os.close(fd)
            fd, rest = deeper, rest[cut + 1 :]
        return os.open(rest, DIRECTORY_FLAGS | flags, dir_fd=fd)
    finally:
        if fd != root_fd:
            os.close(fd)


def check_directory(fd: int, inode: int, reader: StatReader) -> int:
    """The device of an open directory; raises FileNotFoundError where it is not the one with this
    inode number (0: any is right)."""
    status = os.fstat(fd)
    found = status.st_ino & reader.inode_mask
    if found != inode and not is_mount(fd):
        check_inode(fd, inode, found, reader)
    return status.st_dev


def check_inode(fd: int, listed: int, found: int, reader: StatReader) -> None:
    """Raise FileNotFoundError where an item is not the one that was listed: in a tree that does not
    stand still its name, or that of a directory above it, may be another's. ``fd`` is of the item
    or of its directory; a number of 0 was made up."""
    if listed not in (0, found) and reader.vouches(fd, listed):
        raise FileNotFoundError(errno.ENOENT, "is gone")


def is_mount(fd: int) -> bool:
    """Whether an open directory is the top of a file system: it may have been mounted by opening
    it, or since the directory was listed, whose inode number it has not."""
    return os.fstat(fd).st_dev != os.stat("..", dir_fd=fd).st_dev


def read_xattrs(target: int | bytes, *, follow: bool = False) -> dict[bytes, bytes] | None:
    """All extended attributes of an open file or of a path (a symlink's own, but for ``follow``);
    None for none."""
    follow = follow or isinstance(target, int)
    try:
        names = os.listxattr(target, follow_symlinks=follow)
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.EPERM, errno.ENOSYS):
            return None
        raise
    found = {}
    for name in names:
        try:
            found[os.fsencode(name)] = os.getxattr(target, name, follow_symlinks=follow)
        except OSError as error:
            # Gone since it was listed, or readable by its owner alone (trusted.*, some security.*).
            if error.errno not in (errno.ENODATA, errno.EPERM, errno.EACCES, errno.ENOTSUP):
                raise
    return found or None


_no_flags: set[int] = set()


def read_flags(fd: int, dev: int) -> int:
    """The inode flags that chattr(1) can set, of an open file or directory."""
    if dev in _no_flags:
        return 0
    try:
        raw = fcntl.ioctl(fd, FS_IOC_GETFLAGS, b"\0\0\0\0\0\0\0\0")
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            _no_flags.add(dev)  # this file system has none: do not ask for every file
            return 0
        raise
    return int.from_bytes(raw[:4], "little") & KEPT_FLAGS


def reflink(directory: int, fd: int) -> int | None:
    """A descriptor of a nameless copy of an open file that shares its blocks, on the file system of
    an open directory; None where that has none."""
    try:
        copy = os.open(b".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=directory)
    except OSError:
        return None
    try:
        fcntl.ioctl(copy, FICLONE, fd)
    except OSError:
        os.close(copy)
        return None
    return copy


def data_extents(fd: int, size: int) -> list[tuple[int, int]]:
    """The [start, end) byte ranges of a file that are not holes, as the file system tells."""
    extents = []
    offset = 0
    while offset < size:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                break
            raise
        offset = os.lseek(fd, start, os.SEEK_HOLE)
        extents.append((start, min(offset, size)))
    return extents
