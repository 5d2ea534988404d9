"""Who goes past a live mount that lies over its own tree.

Whatever somebody had open before it was mounted still leads beneath it: a file that is open for
writing or mapped, or a directory that a process is in, or has open, and below which it can reach
everything. What is done there is not marked, and not kept for a freeze.
"""

from __future__ import annotations

import contextlib
import os
import stat as st
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from cloudfs.source.inode import Inode, StatReader
from cloudfs.source.mounts import mounts
from cloudfs.source.numbers import kind_keeps_numbers

_STEPS = 1000  # upwards from a directory
_MOMENT_S = 0.02


def who_goes_past(source: bytes, top: Inode, but: Collection[int]) -> Iterator[str]:
    """What each such process does, in words. ``top`` is what lies beneath the mount at ``source``.

    Looked through are all processes that this one may look into, without those ``but``. No server
    of a file system is asked. In other mount namespaces, only directories are seen.
    """
    look = _Look(source, top)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if int(pid) not in but:
            with contextlib.suppress(OSError):  # it ended, or may not be looked into
                if (words := look.at(pid)) and not _is_ours(pid):
                    name = os.fsdecode(Path(f"/proc/{pid}/comm").read_bytes().strip())
                    yield f"{name} (process {pid}) {words}"


class _Look:
    def __init__(self, source: bytes, top: Inode) -> None:
        self._source = source.rstrip(b"/") + b"/"
        self._top = top
        self._mount = [m.device for m in mounts() if m.place == source][-1:]
        self._reader = StatReader()
        self._known: dict[Inode, bool] = {}  # directories, and whether they are in the tree
        # What lies on these is not followed upwards, for that may ask their servers.
        self._elsewhere = {m.device for m in mounts() if not kind_keeps_numbers(m.kind)}

    def at(self, pid: str) -> str:
        """What a process does; "" for nothing. Raises OSError."""
        for link in _links(pid):
            with contextlib.suppress(OSError):
                status = self._reader.behind(link)
                inode = status.dev, status.ino
                if (
                    st.S_ISDIR(status.mode)
                    and self._is_in(link, inode)
                    and self._stays(link, inode)
                ):
                    return f"is at {os.readlink(link)}"
                if st.S_ISREG(status.mode) and os.lstat(link).st_mode & st.S_IWUSR:
                    path = os.readlink(os.fsencode(link))
                    if path.startswith(self._source) and status.dev not in self._elsewhere:
                        return f"has {os.fsdecode(path)} open"
        for line in Path(f"/proc/{pid}/maps").read_bytes().split(b"\n"):
            _, how, _, device, _, *path_of = line.split(maxsplit=5) if line else [b""] * 5
            if how[1:4:2] == b"ws" and path_of and path_of[0].startswith(self._source):
                major, _, minor = device.partition(b":")
                if os.makedev(int(major, 16), int(minor, 16)) not in self._elsewhere:
                    return f"has {os.fsdecode(path_of[0])} mapped"
        return ""

    def _is_in(self, link: str, inode: Inode) -> bool:
        """Whether a directory is the top, or below it."""
        if inode not in self._known and inode[0] not in self._elsewhere:
            self._climb(link)
        return self._known.get(inode, False)

    def _stays(self, link: str, inode: Inode) -> bool:
        """Whether a process has it for longer than another one that looks through all does."""
        time.sleep(_MOMENT_S)
        status = self._reader.behind(link)
        return (status.dev, status.ino) == inode

    def _climb(self, link: str) -> None:
        """Find out whether what a link leads to now is in the tree. From below the top, the name of
        that leads to what is mounted over it."""
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        fd, first, before = os.open(link, flags), None, None
        try:
            for _ in range(_STEPS):
                status = self._reader.behind(f"/proc/self/fd/{fd}")
                here = status.dev, status.ino
                first = first or here
                self._known[first] = here == self._top or (
                    before is not None and here[0] in self._mount
                )
                if self._known[first] or here == before or here[0] in self._elsewhere:
                    return
                above = os.open("..", flags, dir_fd=fd)
                os.close(fd)
                fd, before = above, here
        finally:
            os.close(fd)


def _links(pid: str) -> Iterator[str]:
    yield f"/proc/{pid}/cwd"
    yield f"/proc/{pid}/root"
    for name in os.listdir(f"/proc/{pid}/fd"):
        yield f"/proc/{pid}/fd/{name}"


def _is_ours(pid: str) -> bool:
    """Whether a process is one of cloudfs: these read, and change nothing there."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    if b"-m" in words[:3]:
        return words[words.index(b"-m") + 1].partition(b".")[0] == b"cloudfs"
    return any(os.path.basename(word) == b"cloudfs" for word in words[:2])
