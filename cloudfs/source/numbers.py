"""Which file systems keep the numbers of their inodes.

Most do: by its number an item is known again. Some make a number up when they read an item, and
another one when they have forgotten it meanwhile, which the kernel decides: FAT and exFAT, many
that run in user space, network shares, and overlays of several file systems (their directories).
There an item that has another number than a moment ago may be the same, and a change that is told
by number is told of nothing. They are known by name and by what statfs(2) says of them.

On btrfs a snapshot has an empty directory where a subvolume lay. It is in no tree of the file
system: the kernel makes up all that there is to know of it when it reads it, also its times.
"""

from __future__ import annotations

import ctypes
import os
import stat as st

_KINDS = {
    "cifs": 0xFF53_4D42,
    "exfat": 0x2011_BAB0,
    "fuse": 0x6573_5546,
    "fuseblk": 0x6573_5546,
    "msdos": 0x4D44,
    "overlay": 0x794C_7630,
    "smb3": 0xFE53_4D42,
    "vfat": 0x4D44,
    "virtiofs": 0x6573_5546,
}
"""By the name of the kind of file system, the type that statfs(2) gives (linux/magic.h)."""

_fstatfs = ctypes.CDLL(None, use_errno=True).fstatfs
_fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)


_BTRFS = 0x9123_683E
STUB = 2
"""On btrfs, the number of all empty directories that stand where subvolumes were."""


def keeps_numbers(fd: int) -> bool:
    """Whether the file system of an open item does; ``fd`` may be an O_PATH descriptor. Raises
    OSError."""
    return _kind(fd) not in _KINDS.values()


def is_stub(fd: int, number: int, mode: int) -> bool:
    """Whether an open item with this number only stands for a btrfs subvolume; ``fd`` may be an
    O_PATH descriptor. Raises OSError."""
    return number == STUB and st.S_ISDIR(mode) and _kind(fd) == _BTRFS


def _kind(fd: int) -> int:
    buffer = (ctypes.c_long * 64)()  # struct statfs has 15, and the type is the first
    if _fstatfs(fd, buffer):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return buffer[0] & 0xFFFF_FFFF


def kind_keeps_numbers(kind: str) -> bool:
    """Whether a kind of file system does, by its name in the list of mounts."""
    return kind.partition(".")[0] not in _KINDS
