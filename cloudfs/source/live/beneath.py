"""Reading past a live mount what nobody has touched since the freeze.

What is frozen can be read through the mount, at a request for each question. Most of it is as it
was, and beneath the mount it is read at full speed; whether it was as it was is asked afterwards
(:mod:`cloudfs.source.live.touched`). Paths lead where they led at the freeze unless a directory on
the way was touched: if one had moved, everything would count as touched, and if one was removed and
another made under its name, the directory that held it was touched.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import msgspec

from cloudfs.core.errors import SourceError
from cloudfs.source.inode import open_directory
from cloudfs.source.live.touched import Touched

DEPTH = 64
"""Directories above one that are looked at; deeper than that, they count as touched."""


class TouchedSince(Exception):
    """Something was touched since the freeze, or may have been: read what is frozen."""


class BeneathPlaces(msgspec.Struct, frozen=True):
    """Where to find the tree beneath a mount, and the bits that say what was touched."""

    top: bytes
    touched: bytes


class Beneath:
    """The tree beneath a live mount, opened."""

    def __init__(self, places: BeneathPlaces) -> None:
        """Raises SourceError where the mount is gone."""
        try:
            self.fd = os.open(places.top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._touched = Touched(os.open(places.touched, os.O_RDONLY | os.O_CLOEXEC))
            except BaseException:
                os.close(self.fd)
                raise
            self.device = os.fstat(self.fd).st_dev
        except OSError:
            raise SourceError("the live mount is gone; the sync cannot go on.") from None

    def open(self, path: bytes) -> int:
        """Open a directory. Raises OSError."""
        return open_directory(self.fd, path)

    def check(self, inodes: Iterable[int]) -> None:
        """Raise TouchedSince if any of these was touched since the freeze."""
        has = self._touched.has
        for inode in inodes:
            if has(inode):
                raise TouchedSince

    def way_touched(self, fd: int, path: bytes) -> bool:
        """Whether something above an open directory was touched since the freeze, so that its path
        may have led elsewhere then."""
        depth = path.count(b"/") + 1 if path else 0
        has = self._touched.has
        return depth > DEPTH or any(
            has(os.stat(b"../" * up, dir_fd=fd).st_ino) for up in range(1, depth + 1)
        )

    def check_same(self, listed: int, found: int) -> None:
        """The same of an item, by the numbers it was listed with and read with. (They also differ
        where the mount has one of its own for it, by which it is known.)"""
        if listed != found:
            raise TouchedSince
        self.check([listed])

    def close(self) -> None:
        """Close it."""
        os.close(self.fd)
        self._touched.close()
