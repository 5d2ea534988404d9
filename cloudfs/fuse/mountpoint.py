"""Mountpoints: what may be mounted on, what is mounted, taking it away again.

A mount whose server died answers every call with ENOTCONN; it must never be taken for an empty
directory. So nothing here looks into a mountpoint to learn whether something is mounted there:
that stands in the kernel's list of mounts. Nor is a mount asked anything but by who wants to know
whether it answers: one that hangs must not keep those from their work that have none with it.
"""

from __future__ import annotations

import enum
import errno
import os
import subprocess
import threading
import time
from dataclasses import dataclass

from cloudfs.core.errors import CloudfsError, UsageError
from cloudfs.source.inode import mount_of
from cloudfs.source.mounts import Mount
from cloudfs.source.mounts import mounts as all_mounts
from cloudfs.source.own import LIVE_SUBTYPE, SUBTYPE

_TRIES, _PAUSE_S = 4, 0.1
_MAX_LINKS = 40  # as the kernel follows
ANSWER_S = 5.0
_KINDS = (f"fuse.{SUBTYPE}", f"fuse.{LIVE_SUBTYPE}")


class Health(enum.Enum):
    """Whether a mount's server answers: it does, it is gone, or it says nothing for ANSWER_S."""

    ALIVE = enum.auto()
    DEAD = enum.auto()
    SILENT = enum.auto()


@dataclass(frozen=True)
class Mounted:
    """One cloudfs mount of this machine: where, of what repository (a live one: of what directory),
    its device "major:minor"."""

    mountpoint: str
    url: str
    device: str
    live: bool = False

    def health(self) -> Health:
        """Ask it whether it is there."""
        found: list[Health] = []
        # Nothing but the end of a process ends its waiting for a mount that hangs.
        asking = threading.Thread(target=lambda: found.append(_ask(self.mountpoint)), daemon=True)
        asking.start()
        asking.join(ANSWER_S)
        return found[0] if found else Health.SILENT


def mounts() -> list[Mounted]:
    """The cloudfs mounts that this process sees, oldest first."""
    return [
        Mounted(
            os.fsdecode(mount.place),
            os.fsdecode(mount.of),
            _device(mount),
            mount.kind == f"fuse.{LIVE_SUBTYPE}",
        )
        for mount in all_mounts()
        if mount.kind in _KINDS
    ]


def _device(mount: Mount) -> str:
    return f"{os.major(mount.device)}:{os.minor(mount.device)}"


def _ask(path: str) -> Health:
    try:
        os.statvfs(path)  # always asks the server; the kernel may still know what stat says
    except OSError as error:
        return Health.DEAD if error.errno == errno.ENOTCONN else Health.ALIVE
    return Health.ALIVE


def device_of(mountpoint: str) -> str | None:
    """ "major:minor" of the mount at an absolute path, without touching it."""
    for mount in reversed(all_mounts()):
        if os.fsdecode(mount.place) == mountpoint:
            return _device(mount)
    return None


def identity_of(mountpoint: str) -> str:
    """By what the mount at an absolute path is known from all that come later: its device, which is
    given again, and a number that is not (0 where the kernel knows none). Without asking it."""
    fd = os.open(mountpoint, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return f"{device_of(mountpoint)} {mount_of(fd)}"
    finally:
        os.close(fd)


def check(mountpoint: str) -> str:
    """The absolute path of a directory that can be mounted on. Raises UsageError."""
    path = os.path.realpath(mountpoint)
    if any(mounted.mountpoint == path for mounted in mounts()):
        raise UsageError(
            f"{mountpoint}: something is mounted there already; `cloudfs umount` takes it away."
        )
    try:
        with os.scandir(path) as names:
            empty = next(names, None) is None
    except FileNotFoundError:
        raise UsageError(f"{mountpoint} does not exist; make the directory first.") from None
    except NotADirectoryError:
        raise UsageError(f"{mountpoint} is not a directory; a mount needs one.") from None
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise UsageError(
                f"{mountpoint} is a mount whose server has ended; take it away first with"
                f" `umount {mountpoint}`."
            ) from None
        raise UsageError(f"{mountpoint} cannot be read ({error.strerror}).") from None
    if not empty:
        raise UsageError(f"{mountpoint} is not empty; mount on an empty directory.")
    if not os.access(path, os.W_OK):
        raise UsageError(f"{mountpoint} is not writable; mount on a directory of your own.")
    return path


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Take a cloudfs mount away, alive or dead. Raises UsageError, CloudfsError where it is busy.

    ``lazy``: now from the tree, and for good when the last user of it is done.
    """
    path = _mounted_at(mountpoint)
    if path is None:
        raise UsageError(f"no cloudfs mount at {mountpoint}; `cloudfs status` lists them.")
    if os.geteuid() == 0:
        command = ["umount", *(["-l"] if lazy else []), "--", path]
    else:
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", path]
    said = ""
    for _ in range(_TRIES):  # whoever lists the mounts of the machine is in each of them a moment
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise CloudfsError(f"{command[0]} is missing; install it to unmount.") from None
        if done.returncode == 0:
            return
        said = done.stderr.strip()
        if "busy" not in said:
            break
        time.sleep(_PAUSE_S)
    if "busy" in said:
        raise CloudfsError(
            f"{mountpoint} is in use; close what uses it, or take it away when that is done with"
            " `cloudfs umount --lazy`."
        )
    raise CloudfsError(f"{mountpoint} could not be unmounted: {said}.")


def _mounted_at(path: str) -> str | None:
    """The real path of a cloudfs mount, found without looking at it, as it may be dead."""
    places = {mounted.mountpoint for mounted in mounts()}
    path = os.path.abspath(path)
    for _ in range(_MAX_LINKS):
        head, tail = os.path.split(path)
        directory = os.path.realpath(head)
        path = os.path.join(directory, tail)
        if path in places:
            return path
        try:
            path = os.path.join(directory, os.readlink(path).rstrip("/"))
        except OSError:
            break  # no symlink
    return None
