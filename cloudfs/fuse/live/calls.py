"""System calls that Python does not have: renaming with flags, leaving a mount behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator

from cloudfs.source.mounts import mounts

_libc = ctypes.CDLL(None, use_errno=True)
_renameat2 = _libc.renameat2
_renameat2.argtypes = (
    ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint,
)  # fmt: skip
_mount = _libc.mount
_mount.argtypes = (
    ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p,
)  # fmt: skip

_CLONE_NEWNS = 0x0002_0000
_CLONE_FS = 0x0200
_MNT_DETACH = 2
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT = 428, 429  # the same on all machines
_AT_FDCWD = -100
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH, _MOVE_MOUNT_BENEATH = 0x4, 0x200
_MS_REC, _MS_SLAVE = 0x4000, 0x80000


def rename(old_fd: int, old: bytes, new_fd: int, new: bytes, flags: int) -> None:
    """**renameat2**\\(2). Raises OSError."""
    if _renameat2(old_fd, old, new_fd, new, flags):
        raise _error()


class MountNamespace:
    """The mounts that this process sees now, to be seen again later."""

    def __init__(self) -> None:
        self._fd = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)

    def enter(self) -> None:
        """See them again, on this thread. Raises OSError."""
        if _libc.unshare(_CLONE_FS) or _libc.setns(self._fd, _CLONE_NEWNS):
            raise _error()


def leave_mount(path: str, is_useless: Callable[[str], bool] | None = None) -> None:
    """Let this process, and it alone, see what lies beneath the mount at ``path``.

    So nothing that it opens by a path (its log, its state) can lead to a question that only it
    could answer. Mounts that others make are still seen where mounts are shared. Where they are
    not, those that are there now stay here after they were unmounted, so the useless ones are left
    too: the list is that of the copy, since another mount may have been made just before. Call it
    before there are threads. Raises OSError.
    """
    if (
        _libc.unshare(_CLONE_NEWNS)
        or _mount(b"none", b"/", None, _MS_REC | _MS_SLAVE, None)
        or _libc.umount2(os.fsencode(path), _MNT_DETACH)
    ):
        raise _error()
    if is_useless is not None:
        for other in (os.fsdecode(mount.place) for mount in reversed(mounts())):
            if is_useless(other):
                detach(other)  # one that is gone need not be left


def replace_mount(place: str, mountpoint: str) -> bool:
    """Move what is mounted at ``place`` to where a mount stands whose process died, and take that
    one away. Raises OSError.

    It is put beneath the dead one first, so nobody sees what they cover. Returns whether that could
    be; before Linux 6.5 it could not, and for a moment nothing was mounted.
    """
    path, target = os.fsencode(place), os.fsencode(mountpoint)
    tree = _libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, path, _OPEN_TREE_CLONE | os.O_CLOEXEC)
    if tree < 0:
        raise _error()
    try:
        beneath = _move_mount(tree, target, _MOVE_MOUNT_BENEATH)
        if _libc.umount2(target, _MNT_DETACH):
            raise _error()
        if not beneath and not _move_mount(tree, target, 0):
            raise _error()
    finally:
        os.close(tree)
        _libc.umount2(path, _MNT_DETACH)
    return beneath


def _move_mount(tree: int, target: bytes, flags: int) -> bool:
    flags |= _MOVE_MOUNT_F_EMPTY_PATH
    return not _libc.syscall(_SYS_MOVE_MOUNT, tree, b"", _AT_FDCWD, target, flags)


def detach(path: str) -> None:
    """Unmount what is mounted last at a path; it ends with its last user."""
    _libc.umount2(os.fsencode(path), _MNT_DETACH)


@contextlib.contextmanager
def opened(path: bytes, flags: int) -> Iterator[int]:
    """An open file that is closed again."""
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))
