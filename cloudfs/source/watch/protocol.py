"""What a sync and a watch daemon say to each other: one question and one answer a connection.

Both are JSON on a line, over a Unix socket in a directory that only its owner may enter; the daemon
answers its own user and root alone.
"""

from __future__ import annotations

import msgspec

SOCKET = "socket"
LOCK = "lock"
EVENTS = "events"
"""Names in the daemon's directory: the socket, what the daemon locks, the set of what it heard."""

MAX_BYTES = 1 << 16


class Base(msgspec.Struct, frozen=True):
    """The snapshot since which everything was heard: its number and time, and the layout of the
    tree (:class:`cloudfs.source.watch.places.Places`) as it was then."""

    snapshot: int
    taken_ns: int
    token: str


class Question(msgspec.Struct, frozen=True):
    """``ask`` is one of:

    * "close": read all events up to now, end the epoch and begin another.
    * "confirm": all up to ``epoch``, which the daemon that listens since ``since_ns`` closed, is in
      the snapshot that ``base`` names.
    * "state": nothing but the answer.
    * "stop": end.
    """

    ask: str
    epoch: int = 0
    base: Base | None = None
    since_ns: int = 0


class Answer(msgspec.Struct, frozen=True):
    """How it stands with the daemon, and for "close" the epoch that it closed.

    Epochs count from ``first`` on. ``lost`` says why what was heard is not complete, "" if it is.
    """

    pid: int
    epoch: int
    first: int
    base: Base | None
    lost: str
    devices: dict[int, bytes]  # the file systems that are watched: st_dev, and their id in events
    pending: int  # names and items heard of, since the base
    since_ns: int  # when the daemon began to listen
