"""The stream that the kernel sends without data: a header, then commands of attributes.

The format is that of the kernel's fs/btrfs/send.h, versions 1 to 3: little-endian; a command is
its length, number and checksum, then attributes of type, length and value. Only what tells of
names and of changed bytes is decoded. The stream comes from the kernel itself, so its checksums
are not verified; that it is whole, is: it must end with the command that says so.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import IO, NamedTuple

from cloudfs.core.errors import SourceError

MAGIC = b"btrfs-stream\0"
VERSIONS = (1, 2, 3)
_COMMAND = struct.Struct("<IHI")
_ATTRIBUTE = struct.Struct("<HH")
MAX_COMMAND = 16 << 20


class Kind(IntEnum):
    """The commands."""

    SUBVOL = 1
    SNAPSHOT = 2
    MKFILE = 3
    MKDIR = 4
    MKNOD = 5
    MKFIFO = 6
    MKSOCK = 7
    SYMLINK = 8
    RENAME = 9
    LINK = 10
    UNLINK = 11
    RMDIR = 12
    SET_XATTR = 13
    REMOVE_XATTR = 14
    WRITE = 15
    CLONE = 16
    TRUNCATE = 17
    CHMOD = 18
    CHOWN = 19
    UTIMES = 20
    END = 21
    UPDATE_EXTENT = 22
    FALLOCATE = 23
    FILEATTR = 24
    ENCODED_WRITE = 25
    ENABLE_VERITY = 26


WITH_DATA = frozenset((Kind.WRITE, Kind.ENCODED_WRITE))
"""Commands that a stream without data does not hold."""


_KINDS: dict[int, Kind] = {int(kind): kind for kind in Kind}

# The attributes.
_SIZE = 4
_PATH = 15
_PATH_TO = 16
_PATH_LINK = 17
_FILE_OFFSET = 18
_CLONE_LENGTH = 24


class Command(NamedTuple):
    """One command. ``other`` is the second path of a rename or link; bytes where they apply."""

    kind: Kind
    path: bytes
    other: bytes
    offset: int
    size: int


def commands(stream: IO[bytes]) -> Iterator[Command]:
    """The commands of a stream up to its end. Raises SourceError where it is cut or is none."""
    head = stream.read(len(MAGIC) + 4)
    if head[: len(MAGIC)] != MAGIC or len(head) != len(MAGIC) + 4:
        raise SourceError("btrfs sent nothing that can be read.")
    version = int.from_bytes(head[len(MAGIC) :], "little")
    if version not in VERSIONS:
        raise SourceError(f"btrfs sent a stream of version {version}, which cloudfs does not know.")
    while True:
        header = _read(stream, _COMMAND.size)
        length, number, _checksum = _COMMAND.unpack(header)
        if length > MAX_COMMAND:
            raise SourceError(f"btrfs sent a command of {length:,} bytes.")
        body = _read(stream, length)
        kind = _KINDS.get(number)
        if kind is None:
            raise SourceError(f"btrfs sent command {number}, which cloudfs does not know.")
        if kind == Kind.END:
            if stream.read(1):
                raise SourceError("btrfs sent more than it said.")
            return
        if kind in WITH_DATA:
            raise SourceError("btrfs sent data, which it was not asked for.")
        yield _decode(kind, body)


def _read(stream: IO[bytes], length: int) -> bytes:
    data = stream.read(length)
    if len(data) != length:
        raise SourceError("what btrfs sent ends before its end.")
    return data


def _decode(kind: Kind, body: bytes) -> Command:
    path = other = b""
    offset = size = 0
    size_in = _CLONE_LENGTH if kind is Kind.CLONE else _SIZE
    at, end = 0, len(body)
    while at < end:
        if at + _ATTRIBUTE.size > end:
            raise SourceError("btrfs sent an attribute that is cut.")
        number, length = _ATTRIBUTE.unpack_from(body, at)
        start = at + _ATTRIBUTE.size
        at = start + length
        if at > end:
            raise SourceError("btrfs sent an attribute that is cut.")
        if number == _PATH:
            path = body[start:at]
        elif number in (_PATH_TO, _PATH_LINK):
            other = body[start:at]
        elif number == _FILE_OFFSET:
            offset = _number(body[start:at])
        elif number == size_in:
            size = _number(body[start:at])
    return Command(kind, path, other, offset, size)


def _number(data: bytes) -> int:
    if len(data) != 8:
        raise SourceError("btrfs sent a number that is none.")
    return int.from_bytes(data, "little")
