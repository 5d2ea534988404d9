"""What a sync and a live mount say to each other.

Messages are msgpack, each after its length in four bytes, over a Unix socket in a directory that
only its owner may enter; the mount answers its own user and root alone. A freeze lasts until it is
confirmed, or as long as the connection that asked for it: when the sync dies, the freeze ends.
"""

from __future__ import annotations

import msgspec

SOCKET = "socket"
LOCK = "lock"
MARKS = "marks"
"""Names in the mount's directory: the socket, what the mount locks, what it marked."""

MAX_BYTES = 1 << 26
HEAD_BYTES = 4

FROZEN_PREFIX = b".cloudfs-frozen-"
"""The name at the top of the mount, with the number of a freeze, that leads to what is frozen."""

STATUS_ATTRIBUTE = b"trusted.cloudfs.status"
EXTENTS_ATTRIBUTE = b"trusted.cloudfs.extents"
"""What no other call tells of a frozen item: :class:`MoreStatus`; where its data lies."""


OTHERS = 1 << 47
"""From here on are the numbers that the mount gives what lies on other file systems, or has too
large a number."""


class Base(msgspec.Struct, frozen=True):
    """The snapshot since which everything was marked: its number and time."""

    snapshot: int
    taken_ns: int


class Question(msgspec.Struct, frozen=True):
    """``ask`` is one of:

    * "state": nothing but the answer.
    * "freeze": let the tree stand still for this connection, all of it or (``marked``) only what
      was marked since the base, where that can be told.
    * "reached": what is frozen is held open; from now on who overwrites it may have to wait.
    * "missed": not all that changes from the freeze on is marked, for the reason in ``words``.
    * "changes": all that was marked up to the freeze; answered by Directory and Item messages, and
      an End.
    * "confirm": all up to the freeze is in the snapshot that ``base`` names; the freeze ends.
    * "stop": unmount and end.
    """

    ask: str
    base: Base | None = None
    marked: bool = False
    words: str = ""


class Answer(msgspec.Struct, frozen=True):
    """How it stands with the mount. ``lost`` says why what was marked is not complete."""

    pid: int
    mountpoint: bytes
    source: bytes
    lost: str
    base: Base | None
    pending: int  # names and items marked since the base
    quiet_s: float  # since the last change
    waiting_s: float  # since the first change that no snapshot holds; 0: there is none
    frozen: int = 0  # the number of the freeze; 0: of none
    frozen_ns: int = 0
    top_fd: int = -1  # descriptors of that process: of the tree beneath, of what was touched
    touched_fd: int = -1
    error: str = ""
    given_up: str = ""  # why what is frozen is no longer one point in time


class Directory(msgspec.Struct, frozen=True, tag=True):
    """A directory in which names changed: its path at the freeze, without a slash at either end;
    for names of files what of their data can be others (empty: nothing)."""

    path: bytes
    inode: int
    names: list[tuple[bytes, list[tuple[int, int]]]]


class Item(msgspec.Struct, frozen=True, tag=True):
    """An item that changed under whichever names it has."""

    inode: int
    ranges: list[tuple[int, int]]


class End(msgspec.Struct, frozen=True, tag=True):
    """That was all. ``lost``: why it is not all after all."""

    lost: str = ""


Change = Directory | Item | End


class MoreStatus(msgspec.Struct, frozen=True, array_like=True):
    """What statx(2) and FS_IOC_GETFLAGS tell of an item beneath."""

    btime_ns: int
    flags: int
    dev: int
