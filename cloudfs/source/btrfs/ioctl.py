"""What the kernel does with btrfs subvolumes: its ioctls, one function each.

Numbers, structures and flags are those of linux/btrfs.h, for machines of 64 bits. A test compiles
that header and compares. The youngest of these calls came with Linux 4.18.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from typing import IO, NamedTuple

_MAGIC = 0x94
_WRITE, _READ = 1, 2  # what the kernel gets, what it gives

VOL_ARGS = struct.Struct("=q4088s")
"""struct btrfs_ioctl_vol_args: descriptor, name."""

VOL_ARGS_V2 = struct.Struct("=qQQ32x4040s")
"""struct btrfs_ioctl_vol_args_v2: descriptor, transaction, flags, name."""

SUBVOL_INFO_ARGS = struct.Struct("=Q256sQQQQ16s16s16s4Q64x64x")
"""struct btrfs_ioctl_get_subvol_info_args: number, name, number of the parent, its directory,
generation, flags, UUID, UUID of what it is a snapshot of, UUID of what was received as it, the
transaction that last changed something in it, that in which it was made, and more that is not
used."""

ROOTREF = struct.Struct("=QQ")
ROOTREF_ARGS = struct.Struct("=Q4080sB7x")
"""struct btrfs_ioctl_get_subvol_rootref_args: least number, up to 255 pairs of number and
directory, how many there are."""

INO_LOOKUP_USER_ARGS = struct.Struct("=QQ256s3824s")
"""struct btrfs_ioctl_ino_lookup_user_args: directory, number, name, path of the directory."""

SEND_ARGS = struct.Struct("=qQQQQI28x")
"""struct btrfs_ioctl_send_args: descriptor, count of clone sources, where they are, parent, flags,
version."""

SEARCH_ARGS_V2 = struct.Struct("=7Q4I4QQ")
"""struct btrfs_ioctl_search_args_v2: tree (0: the one that the descriptor is in), least and
greatest object, offset and transaction, least and greatest type, count of items, six words that are
not used, size of the buffer that follows."""

SEARCH_HEADER = struct.Struct("=QQQII")
"""struct btrfs_ioctl_search_header: transaction, object, offset, type, bytes of the item."""


def _number(direction: int, number: int, layout: struct.Struct) -> int:
    return direction << 30 | layout.size << 16 | _MAGIC << 8 | number


SYNC = _MAGIC << 8 | 8
SNAP_DESTROY = _number(_WRITE, 15, VOL_ARGS)
SNAP_CREATE_V2 = _number(_WRITE, 23, VOL_ARGS_V2)
TREE_SEARCH_V2 = _number(_READ | _WRITE, 17, SEARCH_ARGS_V2)
SEND = _number(_WRITE, 38, SEND_ARGS)
GET_SUBVOL_INFO = _number(_READ, 60, SUBVOL_INFO_ARGS)
GET_SUBVOL_ROOTREF = _number(_READ | _WRITE, 61, ROOTREF_ARGS)
INO_LOOKUP_USER = _number(_READ | _WRITE, 62, INO_LOOKUP_USER_ARGS)

SUBVOL_RDONLY = 1 << 1  # asked for when a snapshot is made
ROOT_SUBVOL_RDONLY = 1 << 0  # and as it is told of one (linux/btrfs_tree.h)
SEND_FLAG_NO_FILE_DATA = 1 << 0
INODE_ITEM_KEY = 1  # the type of what a tree holds of an inode itself

INODE_ITEM = struct.Struct("=QQQ28xI")
"""The beginning of struct btrfs_inode_item: the transaction that made an inode, the one that last
changed it, its size, its mode."""

_SEARCHED_BYTES = 1 << 16  # what one search may give
_GREATEST = (1 << 64) - 1
_LAST_INODE = _GREATEST - 256


class SubvolumeInfo(NamedTuple):
    """What the kernel says of a subvolume."""

    number: int
    changed: int  # the transaction that last changed something in it; moving its blocks does not
    made: int  # the transaction in which it was made
    read_only: bool
    uuid: str
    parent_uuid: str  # of the subvolume that it is a snapshot of


def snapshot(source: bytes, target: bytes) -> None:
    """Take a read-only snapshot. Raises OSError."""
    directory, name = os.path.split(target)
    with opened(source) as source_fd, opened(directory) as fd:
        arguments = VOL_ARGS_V2.pack(source_fd, 0, SUBVOL_RDONLY, name)
        fcntl.ioctl(fd, SNAP_CREATE_V2, bytearray(arguments))


def write_out(path: bytes) -> None:
    """Have the file system write out what it holds in memory. Raises OSError."""
    with opened(path) as fd:
        fcntl.ioctl(fd, SYNC)


def delete(path: bytes) -> None:
    """Delete a subvolume. Raises OSError."""
    directory, name = os.path.split(path)
    with opened(directory) as fd:
        fcntl.ioctl(fd, SNAP_DESTROY, bytearray(VOL_ARGS.pack(0, name)))


def info(path: bytes) -> SubvolumeInfo:
    """What a subvolume is. Raises OSError, also where the path is not the top of one."""
    answer = bytearray(SUBVOL_INFO_ARGS.size)
    with opened(path) as fd:
        fcntl.ioctl(fd, GET_SUBVOL_INFO, answer)
    number, _, _, _, _, flags, own, parent, _, changed, made, *_ = SUBVOL_INFO_ARGS.unpack(answer)
    read_only = bool(flags & ROOT_SUBVOL_RDONLY)
    return SubvolumeInfo(number, changed, made, read_only, own.hex(), parent.hex())


def children(path: bytes) -> list[bytes]:
    """The paths, below that of a subvolume, of those directly in it. Raises OSError."""
    with opened(path) as fd:
        return [_path(fd, number, directory) for number, directory in _references(fd)]


def _references(fd: int) -> Iterator[tuple[int, int]]:
    least, more = 0, True
    while more:
        answer = bytearray(ROOTREF_ARGS.pack(least, b"", 0))
        try:
            fcntl.ioctl(fd, GET_SUBVOL_ROOTREF, answer)
            more = False
        except OSError as error:
            if error.errno != errno.EOVERFLOW:  # there are more
                raise
        least, found, count = ROOTREF_ARGS.unpack(answer)
        yield from ROOTREF.iter_unpack(found[: count * ROOTREF.size])


def _path(fd: int, number: int, directory: int) -> bytes:
    answer = bytearray(INO_LOOKUP_USER_ARGS.pack(directory, number, b"", b""))
    fcntl.ioctl(fd, INO_LOOKUP_USER, answer)
    _, _, name, path = INO_LOOKUP_USER_ARGS.unpack(answer)
    return bytes(path.partition(b"\0")[0] + name.partition(b"\0")[0])


class ChangedInode(NamedTuple):
    """An inode as a subvolume's tree has it; ``made`` is the transaction that made it."""

    number: int
    made: int
    size: int
    mode: int


def inodes_since(path: bytes, transaction: int) -> Iterator[list[ChangedInode]]:
    """The inodes of a subvolume that were changed after a transaction, search by search. Raises
    OSError.

    Blocks of the tree that are older are passed over, so this costs what changed. Of changes that
    were not yet written out (at most for half a minute) it does not tell.
    """
    inode = 0
    with opened(path) as fd:
        while True:
            key = (0, inode, _LAST_INODE, 0, _GREATEST, transaction + 1, _GREATEST)
            size = _SEARCHED_BYTES - SEARCH_ARGS_V2.size
            counts = (0, 0xFF, 1 << 31, 0)  # least and greatest type, items
            answer = bytearray(SEARCH_ARGS_V2.pack(*key, *counts, 0, 0, 0, 0, size))
            answer.extend(bytes(size))
            fcntl.ioctl(fd, TREE_SEARCH_V2, answer)
            found, last = _changed_inodes(answer, transaction)
            if last is None:
                return
            yield found
            inode = last + 1  # its inode item comes before all else of it


def _changed_inodes(answer: bytearray, transaction: int) -> tuple[list[ChangedInode], int | None]:
    """The inodes that a search found, and the last object that it saw anything of."""
    found, last = [], None
    place = SEARCH_ARGS_V2.size
    for _ in range(SEARCH_ARGS_V2.unpack_from(answer)[9]):
        _, last, _, kind, size = SEARCH_HEADER.unpack_from(answer, place)
        place += SEARCH_HEADER.size
        if kind == INODE_ITEM_KEY:
            made, changed, inode_bytes, mode = INODE_ITEM.unpack_from(answer, place)
            if changed > transaction:
                found.append(ChangedInode(last, made, inode_bytes, mode))
        place += size
    return found, last


def send(path: bytes, parent: int, target: IO[bytes]) -> None:
    """Write to a file what makes a snapshot of the one that is its parent, without data.

    Into a file, since a pipe that is full may be waited for: were the process stopped then, the
    kernel would begin from the start when it goes on. Raises OSError.
    """
    with opened(path) as fd:
        arguments = SEND_ARGS.pack(target.fileno(), 0, 0, parent, SEND_FLAG_NO_FILE_DATA, 0)
        fcntl.ioctl(fd, SEND, bytearray(arguments))


@contextlib.contextmanager
def opened(path: bytes) -> Iterator[int]:
    """A descriptor of a directory. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
