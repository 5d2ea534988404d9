"""Reading what a live mount holds frozen.

The mount gives frozen items numbers of its own, which have the items' own ones in their lower bits,
and tells by extended attributes what no other call can ask a mount for.
"""

from __future__ import annotations

import os

import msgspec

from cloudfs.source.inode import StatReader, Status
from cloudfs.source.live.protocol import EXTENTS_ATTRIBUTE, OTHERS, STATUS_ATTRIBUTE, MoreStatus

_more = msgspec.msgpack.Decoder(MoreStatus)
_extents = msgspec.msgpack.Decoder(list[tuple[int, int]])


class FrozenReader(StatReader):
    """Reads items as :class:`StatReader` would read those beneath."""

    inode_mask = (1 << 48) - 1

    def vouches(self, fd: int, number: int) -> bool:
        """See :meth:`StatReader.vouches`. What the mount has a number of its own for may lie on a
        file system that does not keep its numbers."""
        return number < OTHERS

    def __init__(self) -> None:
        super().__init__()
        self._flags = 0

    def of(self, fd: int, name: bytes = b"") -> Status:
        """See :meth:`StatReader.of`."""
        status = super().of(fd, name)
        target: int | bytes = b"/proc/self/fd/%d/%s" % (fd, name) if name else fd
        told = os.getxattr(target, STATUS_ATTRIBUTE, follow_symlinks=not name)
        more = _more.decode(told)
        self._flags = more.flags
        return status._replace(
            ino=status.ino & self.inode_mask, btime_ns=more.btime_ns, dev=more.dev
        )

    def flags(self, fd: int, status: Status) -> int:
        """Of the item that :meth:`of` told of last."""
        return self._flags

    def extents(self, fd: int, size: int) -> list[tuple[int, int]]:
        """See :meth:`StatReader.extents`."""
        return _extents.decode(os.getxattr(fd, EXTENTS_ATTRIBUTE))
