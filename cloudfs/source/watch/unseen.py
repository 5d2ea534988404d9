"""Which files are being written to in ways of which fanotify tells nothing until they are closed.

1. Through a mapping that is shared and writable (mmap(2)): the kernel tells of it when the last
   reference to the open file goes, which is after the mapping has gone. ``/proc/PID/maps`` says who
   has one.
2. By asynchronous requests (io_submit(2)), as some databases and virtual machines write. Who has a
   ring for them shows "/[aio]" among its mappings; then all files that it has open for writing are
   taken for such.
3. By the kernel itself, into the file behind a loop device.

What other machines, or processes that this one may not see, do with a file is not seen here.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat as st
from collections.abc import Iterator

_SHARED = re.compile(rb"^[0-9a-f]+-[0-9a-f]+ .w.s [0-9a-f]+ ([0-9a-f]+):([0-9a-f]+) (\d+)", re.M)
_RING = b"/[aio]"
_LOOPS = "/sys/block"

Inode = tuple[int, int]
"""A device (major << 20 | minor) and an inode number on it."""


def being_written() -> set[Inode]:
    """All such files, of all file systems."""
    found = set(_behind_loops())
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):  # the process ended
                found.update(_of_process(name))
    return found


def _of_process(pid: str) -> Iterator[Inode]:
    with open(f"/proc/{pid}/maps", "rb") as file:
        maps = file.read()
    for major, minor, inode in _SHARED.findall(maps):
        yield int(major, 16) << 20 | int(minor, 16), int(inode)
    if _RING in maps:
        yield from _open_for_writing(f"/proc/{pid}/fd")


def _open_for_writing(directory: str) -> Iterator[Inode]:
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.stat(follow_symlinks=False).st_mode & st.S_IWUSR:
                    status = entry.stat()
                    if st.S_ISREG(status.st_mode):
                        yield _inode(status)


def _behind_loops() -> Iterator[Inode]:
    for name in os.listdir(_LOOPS) if os.path.isdir(_LOOPS) else ():
        if name.startswith("loop"):
            with (
                contextlib.suppress(OSError),
                open(f"{_LOOPS}/{name}/loop/backing_file", "rb") as f,
            ):
                yield _inode(os.stat(f.read().rstrip(b"\n")))


def _inode(status: os.stat_result) -> Inode:
    return os.major(status.st_dev) << 20 | os.minor(status.st_dev), status.st_ino
