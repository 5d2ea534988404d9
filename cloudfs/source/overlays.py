"""Files of overlays of several file systems, as containers have them.

Whoever has one open knows it by an inode of the overlay. What is written to it goes to the file at
the same path in the upper directory, which may lie in a tree that is backed up.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat as st

from cloudfs.source.inode import Inode, StatReader
from cloudfs.source.mounts import Mount, mounts

_UPPER = re.compile(rb",upperdir=(/[^,]*)")


class Overlays:
    """Finds what files of overlays really are. It is asked once, and remembers what is mounted."""

    def __init__(self) -> None:
        self._mounts: dict[str, list[Mount]] = {}  # by mount namespace
        self._reader = StatReader()

    def really(self, pid: str, link: str) -> set[Inode]:
        """The inodes of the file that a link in */proc* of a process leads to: its own, and that in
        the upper directory. None where it is no regular file. Raises OSError."""
        status = self._reader.behind(link)
        if not st.S_ISREG(status.mode):
            return set()
        found = {(status.dev, status.ino)}
        if os.major(status.dev) == 0:  # a file system without a device
            with contextlib.suppress(OSError):  # the process ended, or closed it
                found |= self.beneath(pid, os.fsencode(os.readlink(link)))
        return found

    def beneath(self, pid: str, path: bytes) -> set[Inode]:
        """That in the upper directory of what a process knows by a path. Raises OSError."""
        on = [mount for mount in self._seen_by(pid) if path.startswith(_within(mount))]
        if not on:
            return set()
        # Not by the device: files of an overlay have others than it has.
        mount = max(on, key=lambda mount: len(mount.place))
        return _in_upper(mount, path) if mount.kind == "overlay" else set()

    def _seen_by(self, pid: str) -> list[Mount]:
        """The mounts of a process, the newest first."""
        namespace = os.readlink(f"/proc/{pid}/ns/mnt")
        if namespace not in self._mounts:
            self._mounts[namespace] = list(reversed(mounts(pid)))
        return self._mounts[namespace]


def _within(mount: Mount) -> bytes:
    """What the paths of a mount's files begin with."""
    return mount.place.rstrip(b"/") + b"/"


def _in_upper(mount: Mount, path: bytes) -> set[Inode]:
    """The inode of a file in the upper directory of an overlay, by its path where that is mounted.

    (Where that directory was named by a path of another namespace, or a relative one, there is
    none. Then the file is known as changed when it is closed.)
    """
    upper = _UPPER.search(mount.given)
    if upper is None:
        return set()
    try:
        below = path.removeprefix(_within(mount))
        status = os.stat(upper[1] + mount.top.rstrip(b"/") + b"/" + below)
    except OSError:
        return set()
    return {(status.st_dev, status.st_ino)}
