"""What the kernel's fanotify tells of a whole file system, by file handle (fanotify(7)).

Struct layouts are those of linux/fanotify.h. For handles see :mod:`cloudfs.source.handles`.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
from collections.abc import Iterator
from enum import IntFlag
from typing import NamedTuple

from cloudfs.core.errors import SourceError


class Mask(IntFlag):
    """Kinds of events; one event may have several."""

    MODIFY = 0x2
    ATTRIB = 0x4
    CLOSE_WRITE = 0x8
    MOVED_FROM = 0x40
    MOVED_TO = 0x80
    CREATE = 0x100
    DELETE = 0x200
    OVERFLOW = 0x4000
    ONDIR = 0x40000000


WATCHED = int(
    Mask.MODIFY
    | Mask.ATTRIB
    | Mask.CLOSE_WRITE  # of what was written through a mapping, or by asynchronous requests
    | Mask.MOVED_FROM
    | Mask.MOVED_TO
    | Mask.CREATE
    | Mask.DELETE
    | Mask.ONDIR
)

_CLOEXEC, _NONBLOCK, _UNLIMITED_QUEUE = 0x1, 0x2, 0x10
_REPORT = 0x200 | 0x400 | 0x800 | 0x1000  # FID, DIR_FID, NAME, TARGET_FID
_MARK_ADD, _MARK_FILESYSTEM = 0x1, 0x100
_AT_FDCWD = -100
_FID, _DFID_NAME, _DFID = 1, 2, 3
_METADATA = struct.Struct("=IBBHQii")  # length, version, -, metadata length, mask, fd, pid
_INFO = struct.Struct("=BBH8sI")  # type, -, length, file system id, bytes in the handle
_VERSION = 3
_HANDLE_AT = 12  # in an info record: after type, length and file system id
_FIONREAD = 0x541B
BUFFER_BYTES = 1 << 20

_SDEV = re.compile(r"fanotify sdev:([0-9a-f]+) mflags:[0-9a-f]+ mask:([0-9a-f]+)")

_libc = ctypes.CDLL(None, use_errno=True)


class Event(NamedTuple):
    """One event. ``fsid`` is the file system's id (8 bytes, as statfs gives it).

    ``directory`` and ``name`` say where, ``name`` is b"." for the directory itself; without them
    ``target``, the handle of the item, is all that is known.
    """

    mask: int
    fsid: bytes
    directory: bytes | None
    name: bytes
    target: bytes | None


class Fanotify:
    """A queue of events. Closing it forgets what was not read."""

    def __init__(self, *, unlimited: bool = True) -> None:
        """Needs CAP_SYS_ADMIN. Raises SourceError. Without ``unlimited`` the queue may overflow."""
        flags = _CLOEXEC | _NONBLOCK | _REPORT | (_UNLIMITED_QUEUE if unlimited else 0)
        self.fd: int = _libc.fanotify_init(flags, os.O_RDONLY)
        if self.fd < 0:
            raise SourceError(
                f"the kernel refuses to watch file systems ({os.strerror(ctypes.get_errno())})."
                " It takes root and Linux 5.17 or newer."
            )

    def mark(self, path: bytes) -> None:
        """Watch all of the file system that ``path`` is on. Raises SourceError."""
        done = _libc.fanotify_mark(
            self.fd,
            _MARK_ADD | _MARK_FILESYSTEM,
            ctypes.c_uint64(WATCHED),
            _AT_FDCWD,
            ctypes.c_char_p(path),
        )
        if done < 0:
            raise SourceError(
                f"the file system of {os.fsdecode(path)} cannot be watched"
                f" ({os.strerror(ctypes.get_errno())})."
            )

    def marked(self) -> set[int]:
        """The devices (st_dev) of the file systems that are still watched.

        Unmounting one ends that without an event.
        """
        with open(f"/proc/self/fdinfo/{self.fd}") as file:
            found = _SDEV.findall(file.read())
        devices = [int(device, 16) for device, mask in found if int(mask, 16) & WATCHED == WATCHED]
        return {os.makedev(device >> 20, device & 0xFFFFF) for device in devices}  # MKDEV of Linux

    def queued(self) -> int:
        """How many events wait to be read."""
        import fcntl

        answer = fcntl.ioctl(self.fd, _FIONREAD, b"\0\0\0\0")
        return int.from_bytes(answer, "little") // _METADATA.size  # what it counts for each

    def read(self) -> list[Event]:
        """The next events, oldest first; none when none wait."""
        try:
            data = os.read(self.fd, BUFFER_BYTES)
        except BlockingIOError:
            return []
        return list(parse(data))

    def close(self) -> None:
        """Stop watching."""
        os.close(self.fd)


def parse(data: bytes) -> Iterator[Event]:
    """The events of one read. Raises SourceError where the kernel speaks another version."""
    at = 0
    while at < len(data):
        length, version, _, header, mask, _, _ = _METADATA.unpack_from(data, at)
        if version != _VERSION:
            raise SourceError(f"the kernel speaks version {version} of fanotify, not {_VERSION}.")
        fsid, directory, name, target = b"", None, b"", None
        info, end = at + header, at + length
        while info < end:
            kind, _, size, fsid, handle_bytes = _INFO.unpack_from(data, info)
            handle_end = info + _HANDLE_AT + 8 + handle_bytes
            handle = data[info + _HANDLE_AT : handle_end]
            if kind == _FID:
                target = handle
            elif kind in (_DFID_NAME, _DFID):
                directory = handle
                name = data[handle_end : info + size].split(b"\0", 1)[0] or b"."
            info += size
        yield Event(mask, fsid, directory, name, target)
        at = end
