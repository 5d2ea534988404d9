"""Which files are being written to in ways that leave no trace, or none until they are closed.

1. Through a mapping that is shared and writable (mmap(2)): only the first write to a page since it
   was last written back moves the file's times, and fanotify tells of it when the last reference to
   the open file goes, which is after the mapping has gone. ``/proc/PID/maps`` says who has one.
2. By asynchronous requests (io_submit(2)), as some databases and virtual machines write. Who has a
   ring for them shows "/[aio]" among its mappings; then all files that it has open for writing are
   taken for such.
3. By the kernel itself, into the file behind a loop device.
4. In one of these ways through an overlay of several file systems, as containers do it: then the
   file is another one to its user, and really lies in the upper directory of the overlay.

What other machines, or processes that this one may not see, do with a file is not seen here.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat as st
from collections.abc import Iterator
from pathlib import Path

from cloudfs.source.inode import Inode
from cloudfs.source.overlays import Overlays

_SHARED = re.compile(
    rb"^([0-9a-f]+-[0-9a-f]+) .w.s [0-9a-f]+ ([0-9a-f]+):([0-9a-f]+) ([1-9]\d*)", re.M
)
_RING = b"/[aio]"
_LOOPS = "/sys/block"


def mapped() -> set[Inode]:
    """The files of 1, of all file systems; of processes that this one may look into."""
    found: set[Inode] = set()
    overlays = Overlays()
    for pid, maps in _all_maps():
        found.update(_shared(pid, maps, overlays))
    return found


def settle_mapped(device: int) -> None:
    """Wait until what was written through mappings of a FUSE file system has reached its server.

    Pages are dirty there only while they are mapped: the end of a mapping waits for them. Those of
    processes that this one may not look into are left out. File by file, and not by syncfs(2),
    which does not wait for them, and worse: of a file that somebody makes longer by writes while
    the kernel writes a page of it back, Linux (seen with 6.18, on any FUSE file system) can fill
    with zeros what was just written behind the old end. fsync(2) keeps such writes out meanwhile.
    """
    settled: set[bytes] = set()
    for pid, maps in _all_maps():
        for span, major, minor, inode in _SHARED.findall(maps):
            if inode in settled or os.makedev(int(major, 16), int(minor, 16)) != device:
                continue
            with contextlib.suppress(OSError):  # unmapped since
                fd = os.open(f"/proc/{pid}/map_files/{span.decode()}", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                    settled.add(inode)
                finally:
                    os.close(fd)


def being_written() -> set[Inode]:
    """The files of 1 to 4."""
    overlays = Overlays()
    found = set(_behind_loops(overlays))
    for pid, maps in _all_maps():
        found.update(_shared(pid, maps, overlays))
        if _RING in maps:
            with contextlib.suppress(OSError):
                found.update(_open_for_writing(pid, overlays))
    return found


def _all_maps() -> Iterator[tuple[str, bytes]]:
    for pid in os.listdir("/proc"):
        if pid.isdigit():
            with contextlib.suppress(OSError):  # the process ended, or is another user's
                yield pid, Path(f"/proc/{pid}/maps").read_bytes()


def _shared(pid: str, maps: bytes, overlays: Overlays) -> Iterator[Inode]:
    for span, major, minor, inode in _SHARED.findall(maps):
        link = f"/proc/{pid}/map_files/{span.decode()}"
        try:
            status = os.stat(link)
        except OSError:  # unmapped since, or not allowed; btrfs shows another device than this
            yield os.makedev(int(major, 16), int(minor, 16)), int(inode)
        else:
            yield from overlays.really(pid, link, status)


def _open_for_writing(pid: str, overlays: Overlays) -> Iterator[Inode]:
    with os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.stat(follow_symlinks=False).st_mode & st.S_IWUSR:
                    status = entry.stat()
                    if st.S_ISREG(status.st_mode):
                        yield from overlays.really(pid, entry.path, status)


def _behind_loops(overlays: Overlays) -> Iterator[Inode]:
    for name in os.listdir(_LOOPS) if os.path.isdir(_LOOPS) else ():
        if name.startswith("loop"):
            with (
                contextlib.suppress(OSError),
                open(f"{_LOOPS}/{name}/loop/backing_file", "rb") as f,
            ):
                path = f.read().rstrip(b"\n")
                yield from overlays.beneath("self", path)
                status = os.stat(path)
                yield status.st_dev, status.st_ino
