"""Where an open directory is: its path, or its own name, as the kernel tells them of descriptors.

It tells none of more than 4,095 bytes. Then the names are found by the inode numbers that they have
in the directories above.
"""

from __future__ import annotations

import errno
import os

from cloudfs.source.inode import DIRECTORY_FLAGS


def own_name(fd: int) -> bytes:
    """The name of an open directory in the one above. Raises OSError."""
    path = _told(fd)
    if path is not None:
        return path.rpartition(b"/")[2]
    above = os.open(b"..", DIRECTORY_FLAGS, dir_fd=fd)
    try:
        return _name_of(above, os.fstat(fd).st_ino)
    finally:
        os.close(above)


def path_below(top: bytes, fd: int) -> bytes | None:
    """The path of an open directory below another one's, without a slash at either end; None where
    it is not there. Raises OSError."""
    path = _told(fd)
    return _under(top, path) if path is not None else _far_below(top, fd)


def _far_below(top: bytes, fd: int) -> bytes | None:
    """The same where it is too deep for that. The kernel tells the path of a directory above, and
    from there on the names are found by inode number."""
    at, way = os.open(b".", DIRECTORY_FLAGS, dir_fd=fd), []
    try:
        while (path := _told(at)) is None:
            way.append(os.fstat(at).st_ino)
            at = _onward(at, b"..")
        found = _under(top, path)
        while way and found is not None:
            name = _name_of(at, way.pop())
            at = _onward(at, name)
            found = found + b"/" + name if found else name
        return found
    except (FileNotFoundError, NotADirectoryError):
        return None  # it is moved meanwhile, or not within what is mounted at the place
    finally:
        os.close(at)


def _told(fd: int) -> bytes | None:
    """The path of an open directory; None where it is longer than the kernel tells."""
    try:
        return os.readlink(b"/proc/self/fd/%d" % fd)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return None


def _under(top: bytes, path: bytes) -> bytes | None:
    if path == top:
        return b""
    prefix = top.rstrip(b"/") + b"/"
    return path[len(prefix) :] if path.startswith(prefix) else None


def _onward(fd: int, name: bytes) -> int:
    """Another directory in the place of an open one, which is closed."""
    onward = os.open(name, DIRECTORY_FLAGS, dir_fd=fd)
    os.close(fd)
    return onward


def _name_of(fd: int, inode: int) -> bytes:
    with os.scandir(fd) as entries:
        for entry in entries:
            if entry.inode() == inode:
                return os.fsencode(entry.name)
    raise FileNotFoundError(errno.ENOENT, "is gone")
