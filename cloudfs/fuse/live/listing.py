"""Open directories of the live tree."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pyfuse3
from pyfuse3 import EntryAttributes, ReaddirToken

from cloudfs.fuse.live.answers import fill
from cloudfs.fuse.live.backups import Backups
from cloudfs.fuse.live.frozen import list_names
from cloudfs.fuse.live.inodes import ROOT, Inode, Inodes
from cloudfs.fuse.live.sides import Opened
from cloudfs.fuse.turns import Turns
from cloudfs.source.own import SNAPSHOTS


class LiveNames(Opened):
    """An open directory: the names as they were when its start was read. See :class:`Opened`."""

    def __init__(
        self,
        inode: Inode,
        inodes: Inodes,
        backups: Backups | None,
        lasting: EntryAttributes,
        turns: Turns,
    ) -> None:
        """``lasting`` is filled for each name."""
        self.inode = inode
        self._inodes = inodes
        self._backups = backups
        self._lasting = lasting
        self._turns = turns
        self._names: Sequence[bytes] | None = None  # None: it has not been read

    async def list(self, start: int, token: ReaddirToken) -> None:
        names = self._names
        if names is None or start == 0:
            names = self._names = self._read_names()
        for position in range(start, len(names)):
            name = names[position]
            give = self._give_dots if name in (b".", b"..") else self._give
            if not give(name, token, position + 1):
                return
            self._inodes.trim()

    async def flush(self, *, data_only: bool) -> None:
        with self._inodes.using(self._inodes.opened(self.inode)):
            await self._turns.in_thread(_flush_directory, self.inode.proc)

    def _read_names(self) -> Sequence[bytes]:
        names = [b".", b"..", *list_names(self._inodes.opened(self.inode))]
        if self.inode.number == ROOT and self._backups is not None and SNAPSHOTS not in names:
            names.append(SNAPSHOTS)
        return names

    def _give(self, name: bytes, token: ReaddirToken, cookie: int) -> bool:
        """Tell of one name, which is counted; False where there is no room for it."""
        try:
            inode, status = self._inodes.look_up(self.inode, name)
        except FileNotFoundError:
            if name == SNAPSHOTS and self._backups is not None:
                attributes = self._backups.enter(self.inode)
                return pyfuse3.readdir_reply(token, name, attributes, cookie)
            return True  # removed since the directory was opened
        attributes = fill(self._lasting, inode.number, status)
        if not pyfuse3.readdir_reply(token, name, attributes, cookie):
            self._inodes.release(inode)
            return False
        inode.lookups += 1
        return True

    def _give_dots(self, name: bytes, token: ReaddirToken, cookie: int) -> bool:
        """The directory itself and the one above: the kernel is not told of them."""
        inode = self._inodes.opened(self.inode)
        status = os.fstat(inode.fd)
        if name == b".." and inode.number != ROOT:
            status = os.stat(b"..", dir_fd=inode.fd)
        return pyfuse3.readdir_reply(
            token, name, fill(self._lasting, status.st_ino, status), cookie
        )


def _flush_directory(path: bytes) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
