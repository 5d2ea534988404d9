"""Subvolumes, their read-only snapshots, and what differs between two of these."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from cloudfs.core.changelist import Changelist
from cloudfs.core.errors import SourceError
from cloudfs.source.btrfs import ioctl
from cloudfs.source.btrfs.ioctl import SubvolumeInfo
from cloudfs.source.btrfs.replay import Replay
from cloudfs.source.btrfs.stream import commands

ROOT_INODE = 256

_WHY = {
    errno.ETXTBSY: "a swap file in it is in use: let that lie in a subvolume that is left out",
}
"""What an error means, where its name does not say."""


def available() -> bool:
    """Whether snapshots can be taken here: by root."""
    return os.geteuid() == 0


def is_subvolume(path: bytes) -> bool:
    """Whether a path is the top of a btrfs subvolume."""
    try:
        if os.stat(path).st_ino != ROOT_INODE:
            return False
        ioctl.info(path)
    except OSError:
        return False
    return True


def snapshot(source: bytes, target: bytes) -> None:
    """Take a read-only snapshot. Raises SourceError."""
    with _told("take a snapshot of", source):
        ioctl.snapshot(source, target)


def delete(path: bytes) -> None:
    """Delete a snapshot. Raises SourceError."""
    with _told("delete", path):
        ioctl.delete(path)


def identity(path: bytes) -> SubvolumeInfo:
    """What a snapshot is. Raises SourceError."""
    with _told("tell what is at", path):
        return ioctl.info(path)


def below(path: bytes) -> list[bytes]:
    """The paths, below ``path``, of all subvolumes in it, each before those within it. Raises
    SourceError."""
    with _told("list the subvolumes in", path):
        return list(_below(path, b""))


def _below(path: bytes, prefix: bytes) -> Iterator[bytes]:
    for child in ioctl.children(path):
        yield prefix + child
        yield from _below(path + b"/" + child, prefix + child + b"/")


def changes(
    base: bytes, new: bytes, before: Sequence[bytes] = (), now: Sequence[bytes] = ()
) -> Changelist:
    """What differs between two snapshots of one subvolume, and the subvolumes directly in it:
    ``before`` and ``now`` are their paths. Raises SourceError."""
    with contextlib.ExitStack() as stack:
        with _told("compare the last snapshot with", new):
            stream = stack.enter_context(tempfile.TemporaryFile())
            ioctl.send(new, ioctl.info(base).number, stream)
            stream.seek(0)
        return Replay().run(commands(stream), before, now)


class Changed(NamedTuple):
    """So many inodes changed. ``kept_bytes`` is the size of the files among them that were there
    before, of which no more than a part need be another."""

    inodes: int = 0
    kept_bytes: int = 0

    def plus(self, other: Changed) -> Changed:
        """Both together."""
        return Changed(self.inodes + other.inodes, self.kept_bytes + other.kept_bytes)


def count_changed(
    path: bytes, made: int, enough: int | None = None, apart: Collection[int] = ()
) -> Changed:
    """What changed in a subvolume after transaction ``made``, without the inodes set ``apart``;
    counting ends when it is ``enough``. Raises SourceError."""
    found = Changed()
    with _told("count what changed in", path):
        for inodes in ioctl.inodes_since(path, made):
            told = [inode for inode in inodes if inode.number not in apart]
            kept = (i.size for i in told if i.made <= made and stat.S_ISREG(i.mode))
            found = found.plus(Changed(len(told), sum(kept)))
            if enough is not None and found.inodes >= enough:
                break
    return found


@contextlib.contextmanager
def _told(what: str, path: bytes) -> Iterator[None]:
    """Let an OSError say what could not be done."""
    try:
        yield
    except OSError as error:
        why = _WHY.get(error.errno or 0, error.strerror)
        raise SourceError(f"btrfs could not {what} {os.fsdecode(path)} ({why}).") from None
