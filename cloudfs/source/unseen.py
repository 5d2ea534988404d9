"""Which files are being written to in ways that leave no trace, or none until they are closed.

1. Through a mapping that is shared and writable (mmap(2)): only the first write to a page since it
   was last written back moves the file's times, and fanotify tells of it when the last reference to
   the open file goes, which is after the mapping has gone. ``/proc/PID/maps`` says who has one.
2. By asynchronous requests (io_submit(2)), as some databases and virtual machines write. Who has a
   ring for them shows "/[aio]" among its mappings; then all files that it has open for writing are
   taken for such.
3. By the kernel itself, into the file behind a loop device. The device says which that is; the path
   in */sys* is one of where the device was set up, which may be another mount namespace.
4. In one of these ways through an overlay of several file systems, as containers do it: then the
   file is another one to its user, and really lies in the upper directory of the overlay.
5. By 1 or 2, or by io_uring(7), while it stays open after the mapping or the ring has gone. That
   moves the file's times, but nothing is told of it either. So what is open for writing, or mapped
   shared though not to be written to any more, is to be looked at.

What other machines do with a file is not seen here; nor what processes do that this one does not
see, or that are kept from whoever may look into others (CAP_SYS_PTRACE), as some sandboxes do it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat as st
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cloudfs.source.inode import Inode
from cloudfs.source.overlays import Overlays

_MAPPED = rb"^([0-9a-f]+-[0-9a-f]+) .%b.s [0-9a-f]+ ([0-9a-f]+):([0-9a-f]+) ([1-9]\d*)"
_SHARED = re.compile(_MAPPED % b"w", re.M)
_SHARED_TO_READ = re.compile(_MAPPED % b"-", re.M)
_RING = b"/[aio]"
_LOOPS = "/sys/block"
_LOOP_GET_STATUS64 = 0x4C05
_LOOP_INFO = struct.Struct("=QQ216x")  # struct loop_info64: the file's device and inode

_CAP_SYS_PTRACE = 19
_ENDED = (FileNotFoundError, ProcessLookupError)  # the process, since it was listed


@dataclass
class Written:
    """What is being written to. ``hidden`` says of what that could not be seen, if of any."""

    inodes: set[Inode] = field(default_factory=set)  # of 1 to 4: whatever their times say
    opened: set[Inode] = field(default_factory=set)  # of 5, and more: their times tell
    hidden: str = ""


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
        # What was written stays dirty in one that may only be read by now.
        for span, major, minor, inode in _SHARED.findall(maps) + _SHARED_TO_READ.findall(maps):
            if inode in settled or os.makedev(int(major, 16), int(minor, 16)) != device:
                continue
            with contextlib.suppress(OSError):  # unmapped since
                fd = os.open(f"/proc/{pid}/map_files/{span.decode()}", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                    settled.add(inode)
                finally:
                    os.close(fd)


def being_written() -> Written:
    """The files of 1 to 5."""
    found, overlays = Written(), Overlays()
    _behind_loops(found, overlays)
    hidden: dict[str, OSError] = {}
    for pid, maps in _all_maps(hidden):
        found.inodes.update(_shared(pid, maps, overlays))
        found.opened.update(_shared(pid, maps, overlays, _SHARED_TO_READ))
        try:
            opened = found.inodes if _RING in maps else found.opened
            opened.update(_open_for_writing(pid, overlays))
        except _ENDED:
            continue
        except OSError as error:
            hidden[pid] = error
    for pid, refused in hidden.items():
        if not isinstance(refused, PermissionError) or not _may_look():
            words = (refused.strerror or str(refused)).lower()
            found.hidden = f"what process {pid} writes to cannot be seen: {words}"
    return found


def _may_look() -> bool:
    """Whether this process may look into all others."""
    capabilities = re.search(rb"^CapEff:\s*(\w+)", Path("/proc/self/status").read_bytes(), re.M)
    return capabilities is not None and bool(int(capabilities[1], 16) >> _CAP_SYS_PTRACE & 1)


def _all_maps(hidden: dict[str, OSError] | None = None) -> Iterator[tuple[str, bytes]]:
    """What each process has mapped. ``hidden`` gets those that this one may not look into."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            task, maps = _living(pid)
        except OSError as error:
            if hidden is not None:
                hidden[pid] = error
        else:
            if maps:
                yield task, maps


def _living(pid: str) -> tuple[str, bytes]:
    """A task of a process, and what it has mapped: nothing is seen of that in the first one when
    that has ended before the others. No task of the kernel has anything."""
    maps = _maps_of(pid)
    if not maps:
        with contextlib.suppress(*_ENDED):
            for task in os.listdir(f"/proc/{pid}/task"):
                if task != pid and (maps := _maps_of(task)):
                    return task, maps
    return pid, maps


def _maps_of(task: str) -> bytes:
    try:
        return Path(f"/proc/{task}/maps").read_bytes()
    except _ENDED:
        return b""


def _shared(
    pid: str, maps: bytes, overlays: Overlays, how: re.Pattern[bytes] = _SHARED
) -> Iterator[Inode]:
    for span, major, minor, inode in how.findall(maps):
        try:
            yield from overlays.really(pid, f"/proc/{pid}/map_files/{span.decode()}")
        except OSError:  # unmapped since, or not allowed; btrfs shows another device than this
            yield os.makedev(int(major, 16), int(minor, 16)), int(inode)


def _open_for_writing(pid: str, overlays: Overlays) -> Iterator[Inode]:
    with os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.stat(follow_symlinks=False).st_mode & st.S_IWUSR:
                    yield from overlays.really(pid, entry.path)


def _behind_loops(found: Written, overlays: Overlays) -> None:
    for name in os.listdir(_LOOPS) if os.path.isdir(_LOOPS) else ():
        if name.startswith("loop") and not _is_read_only(name):
            with contextlib.suppress(OSError):  # no file is behind it
                path = Path(f"{_LOOPS}/{name}/loop/backing_file").read_bytes().rstrip(b"\n")
                found.inodes.update(overlays.beneath("self", path))
                try:
                    found.inodes.add(_behind(f"/dev/{name}", path))
                except OSError as error:
                    if error.errno != errno.ENXIO:  # none any more
                        found.hidden = f"the file behind /dev/{name} cannot be told"


def _is_read_only(loop: str) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"{_LOOPS}/{loop}/ro").read_bytes().strip() == b"1"
    return False


def _behind(device: str, path: bytes) -> Inode:
    try:
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        status = os.stat(path)
        return status.st_dev, status.st_ino
    try:
        info = fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_LOOP_INFO.size))
    finally:
        os.close(fd)
    found: Inode = _LOOP_INFO.unpack(info)
    return found
