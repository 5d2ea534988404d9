"""Counting what a sync does with a tree: the calls that reach it, and the bytes that it reads."""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cloudfs.source import inode
from cloudfs.source.watch import resolve

_readlink = os.readlink  # which counts nothing
OF_OS = (
    "open",
    "stat",
    "lstat",
    "fstat",
    "scandir",
    "listdir",
    "readlink",
    "listxattr",
    "getxattr",
    "pread",
    "preadv",
    "read",
    "lseek",
    "statvfs",
    "fstatvfs",
    "access",
    "mkdir",
    "unlink",
    "rename",
)


@dataclass
class Calls:
    """What was counted of one tree."""

    top: bytes
    by_name: Counter[str] = field(default_factory=Counter)
    bytes_read: int = 0

    @property
    def all(self) -> int:
        """How many calls there were."""
        return self.by_name.total()

    def counting(self, name: str, call: Callable[..., object]) -> Callable[..., object]:
        """The same call, counted where what it is given lies in the tree."""

        def counted(*arguments: object, **named: object) -> object:
            reaches = self._reaches(arguments, named.get("dir_fd"))
            result = call(*arguments, **named)
            if reaches:
                self.by_name[name] += 1
                if name in ("pread", "preadv"):
                    self.bytes_read += result  # type: ignore[operator]
                elif name == "read":
                    self.bytes_read += len(result)  # type: ignore[arg-type]
            return result

        return counted

    def _reaches(self, arguments: tuple[object, ...], dir_fd: object) -> bool:
        what = arguments[0] if arguments else b"."
        if isinstance(what, str | bytes | os.PathLike):
            path = os.fsencode(what)
            if path.startswith(b"/") or dir_fd is None:
                return self._holds(path)
            what = dir_fd
        try:
            return self._holds(os.fsencode(_readlink(f"/proc/self/fd/{what}")))
        except OSError:
            return False

    def _holds(self, path: bytes) -> bool:
        if path.startswith(b"/proc/self/fd/"):
            return False  # asked where a descriptor is
        return path == self.top or path.startswith(self.top + b"/")


def count_calls(patch: pytest.MonkeyPatch, tree: Path) -> Calls:
    """Count from now on."""
    found = Calls(os.fsencode(tree))
    for name in OF_OS:
        patch.setattr(os, name, found.counting(name, getattr(os, name)))
    patch.setattr(fcntl, "ioctl", found.counting("ioctl", fcntl.ioctl))
    patch.setattr(inode, "_statx", found.counting("statx", inode._statx))
    patch.setattr(resolve, "open_handle", found.counting("open_handle", resolve.open_handle))
    return found
