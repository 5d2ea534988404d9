"""A single write(2) that goes on for as long as a test likes.

The second half of what it writes is memory that is not there: the kernel, which has set the times
of the file and taken over the first half, waits in the midst of the write for whoever handles
faults of that memory (userfaultfd(2)), and that is us.

Run as a program: ``longwrite.py FILE BYTE SIZE`` writes, and goes on when its stdin ends.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fuse.conftest import wait_until

_SYS_USERFAULTFD = 323
_API = 0xC018_AA3F
_REGISTER = 0xC020_AA00
_COPY = 0xC028_AA03
_MISSING = 1


@contextmanager
def long_write(path: Path, byte: bytes, size: int) -> Iterator[None]:
    """Write ``size`` times ``byte`` over the start of a file: half of it is written when this
    yields, the other half when it is left."""
    program = [sys.executable, "-m", __name__, str(path), byte.hex(), str(size)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(program, cwd=root, stdin=subprocess.PIPE) as process:
        wait_until(lambda: _byte_at(path, size // 2 - 1) == byte or process.poll() is not None)
        assert process.poll() is None, "no write that waits: is there no userfaultfd(2)?"
        yield
    assert process.returncode == 0


def _byte_at(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(1)


def _write(path: str, byte: bytes, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    half = size // 2
    memory[:half] = byte * half
    faults = libc.syscall(_SYS_USERFAULTFD, os.O_CLOEXEC)
    _ioctl(libc, faults, _API, 0xAA, 0, 0)
    _ioctl(libc, faults, _REGISTER, address + half, size - half, _MISSING, 0)

    def handle() -> None:
        sys.stdin.read()
        rest = ctypes.create_string_buffer(byte * (size - half), size - half)
        source = ctypes.addressof(rest)
        _ioctl(libc, faults, _COPY, address + half, source, size - half, 0, 0)

    threading.Thread(target=handle).start()
    fd = os.open(path, os.O_WRONLY)
    libc.write.argtypes = ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t
    libc.write.restype = ctypes.c_ssize_t
    assert libc.write(fd, address, size) == size


def _ioctl(libc: ctypes.CDLL, fd: int, request: int, *fields: int) -> None:
    arguments = (ctypes.c_uint64 * len(fields))(*fields)
    if libc.ioctl(fd, ctypes.c_ulong(request), arguments):
        code = ctypes.get_errno()
        raise OSError(code, f"userfaultfd: {os.strerror(code)}")


if __name__ == "__main__":
    _write(sys.argv[1], bytes.fromhex(sys.argv[2]), int(sys.argv[3]))
