"""File handles (open_by_handle_at(2)): what an inode can be opened by wherever it is moved, and
what never opens another one that got its number.

A *handle* here is a whole ``struct file_handle`` as bytes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import time

_libc = ctypes.CDLL(None, use_errno=True)
_name_to_handle_at = _libc.name_to_handle_at
_name_to_handle_at.argtypes = (
    ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int,
)  # fmt: skip
_open_by_handle_at = _libc.open_by_handle_at
_open_by_handle_at.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int)

_AT_EMPTY_PATH = 0x1000
_MAX_HANDLE = 128
_HEAD = struct.Struct("=Ii")  # length, type

_TRIES = 100
_PAUSE_S = 0.001


def handle_of(fd: int) -> bytes:
    """What the item behind a descriptor can be opened by later. Raises OSError where the file
    system has no such handles."""
    buffer = ctypes.create_string_buffer(_HEAD.size + _MAX_HANDLE)
    _HEAD.pack_into(buffer, 0, _MAX_HANDLE, 0)
    mount = ctypes.c_int()
    if _name_to_handle_at(fd, b"", buffer, ctypes.byref(mount), _AT_EMPTY_PATH):
        raise _error()
    length, _ = _HEAD.unpack_from(buffer)
    return buffer.raw[: _HEAD.size + length]


def open_handle(mount_fd: int, handle: bytes) -> int:
    """An O_PATH descriptor of what a handle stands for, on the file system of another one, which
    must be open for reading. Raises OSError (ESTALE where it is gone)."""
    for _ in range(_TRIES):
        fd = int(_open_by_handle_at(mount_fd, handle, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC))
        # ext4 says ENOMEM for a number that it is just giving to another inode. (It looks for it
        # by iget_locked, which finds none for one that is being created.)
        if fd >= 0 or ctypes.get_errno() != errno.ENOMEM:
            break
        time.sleep(_PAUSE_S)
    if fd < 0:
        raise _error()
    return fd


def _error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))
