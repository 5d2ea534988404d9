"""Answering syncs: freezing for as long as they hold the line, telling what changed, stopping.

1. Only the mount's own user is answered (the kernel tells who asks).
2. A freeze begins in one step: the epoch ends, and from the next change on everything is kept. It
   ends when it is confirmed, or with the connection that asked for it, however that comes about.
   There is one at a time. The kernel is not told: a process with a thread that tells it something
   cannot be killed while that thread waits for who waits for an answer. Whoever looks at the name
   of what was frozen finds it gone.
3. What changed is told after the freeze, in steps between which others have their turn: it is told
   as it was then.
4. Names of files come with what of their data can be others, so that a file that was moved and
   changed is read where it was changed.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import msgspec
import pyfuse3
import trio

from cloudfs.core.errors import SourceError
from cloudfs.core.marks import NEVER, Blocks
from cloudfs.db.marked import Marks
from cloudfs.fuse.live.freeze import Freeze
from cloudfs.fuse.live.frozen import FrozenTree
from cloudfs.fuse.live.inodes import Inode
from cloudfs.fuse.live.operations import LiveMount
from cloudfs.fuse.live.tracking import Tracker
from cloudfs.fuse.live.tree import LiveTree
from cloudfs.source.live.protocol import (
    HEAD_BYTES,
    MAX_BYTES,
    Answer,
    Base,
    Change,
    Directory,
    End,
    Item,
    Question,
)
from cloudfs.source.live.touched import Touched

log = logging.getLogger(__name__)

AT_ONCE = 100
"""Names that are told before others have their turn."""

Range = tuple[int, int]


@dataclass(frozen=True)
class Terms:
    """What a freeze is given: see :class:`Freeze`. ``unfollowed`` says why what lies within the
    tree cannot be gone by its marks; "" where it can."""

    room_bytes: int
    waits: bool
    block_size: int
    store_fd: Callable[[], int]
    crosses: Callable[[Inode], bool]
    unfollowed: Callable[[], str]


class Control:
    """The side of one mount that speaks to syncs."""

    def __init__(
        self,
        mount: LiveMount,
        tree: LiveTree,
        tracker: Tracker,
        terms: Terms,
        *,
        mountpoint: bytes,
        source: bytes,
    ) -> None:
        self._mount = mount
        self._tree = tree
        self._tracker = tracker
        self._terms = terms
        self._mountpoint = mountpoint
        self._source = source
        # They go on from a number that nobody can guess: what is frozen is found by it, and a user
        # of the tree could make something of that name there.
        self._freezes = secrets.randbits(60)

    async def serve(self, listener: socket.socket) -> None:
        """Answer until cancelled."""
        trio_listener = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
        await trio.serve_listeners(self._answer_one, [trio_listener])

    async def _answer_one(self, stream: trio.SocketStream) -> None:
        connection = _Connection(self, stream)
        try:
            if _uid_of(stream) == os.geteuid():
                await connection.run()
        except (trio.BrokenResourceError, trio.ClosedResourceError, msgspec.DecodeError):
            pass
        except Exception:
            log.exception("A question was not answered")
        finally:
            connection.close()
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)

    # -- freezing ------------------------------------------------------------------------------

    def freeze(self, *, marked: bool) -> tuple[Freeze, FrozenTree, int]:
        """Rule 2. Raises SourceError where another sync holds a freeze."""
        if self._tree.freeze is not None:
            raise SourceError("another sync holds the tree frozen.")
        epoch = self._tracker.close_epoch()
        wanted = None
        if marked and not self._why_lost(epoch):
            wanted = self._tracker.marks_through(epoch)
        self._freezes += 1
        terms = self._terms
        made = Freeze(
            self._freezes,
            self._tree.inodes,
            terms.room_bytes,
            waits=terms.waits,
            wanted=wanted,
            block_size=terms.block_size,
            store_fd=terms.store_fd,
            touched=Touched(),
        )
        frozen = FrozenTree(made, self._tree.inodes, terms.crosses)
        self._tree.freeze, self._mount.frozen.tree = made, frozen
        return made, frozen, epoch

    def thaw(self, freeze: Freeze, frozen: FrozenTree) -> None:
        """Let go of a freeze."""
        if self._tree.freeze is freeze:
            self._tree.freeze, self._mount.frozen.tree = None, None
            frozen.end()
            freeze.end()

    def answer(self, freeze: Freeze | None, frozen_ns: int, epoch: int, error: str = "") -> Answer:
        """How it stands."""
        tracker, now = self._tracker, time.monotonic()
        return Answer(
            os.getpid(),
            self._mountpoint,
            self._source,
            self._why_lost(epoch),
            tracker.base,
            tracker.pending,
            now - tracker.last_change_s,
            now - tracker.first_change_s if tracker.first_change_s else 0.0,
            freeze.number if freeze is not None else 0,
            frozen_ns,
            self._tree.inodes.root.fd,
            freeze.touched_fd if freeze is not None else -1,
            error,
            freeze.given_up if freeze is not None else "",
        )

    def _why_lost(self, epoch: int) -> str:
        """Why marks are not all that changed, or cannot be gone by; "" if they can."""
        return self._tracker.why_lost(epoch) or self._terms.unfollowed()

    @property
    def epoch(self) -> int:
        """The epoch that is open."""
        return self._tracker.epoch

    def miss(self, words: str) -> None:
        """Not all is marked in the epoch that is open."""
        self._tracker.miss(words)

    def confirm(self, epoch: int, base: Base) -> None:
        """All up to an epoch is in a snapshot."""
        for inode in self._tracker.confirm(epoch, base):
            self._tree.inodes.unuse(inode)
        self._mount.expect_news()

    async def changes(self, frozen: FrozenTree, epoch: int) -> AsyncIterator[Change]:
        """Rules 3 and 4."""
        teller = _Teller(frozen, self._tracker.marks_through(epoch))
        lost, count = "", 0
        try:
            for number in teller.directories():
                for change in teller.directory(number):
                    yield change
                    self._tree.inodes.trim()
                    count += len(change.names) if isinstance(change, Directory) else 0
                    if count >= AT_ONCE:
                        count = 0
                        await trio.lowlevel.checkpoint()
        except (OSError, SourceError) as error:
            lost = f"what changed can no longer be found ({error})"
        for item in teller.items():
            yield item
        yield End(lost)


class _Teller:
    """Puts marks into the words of the protocol."""

    def __init__(self, frozen: FrozenTree, marks: Marks) -> None:
        self._frozen = frozen
        self._marks = marks
        self._paths: dict[int, bytes | None] = {}

    def directories(self) -> list[int]:
        return list(self._marks.names)

    def directory(self, number: int) -> Iterator[Change]:
        """One directory with its names, some at a time, and its own name in the one above, as its
        times changed."""
        frozen = self._frozen
        inode = frozen.by_handle(number, self._marks.where.get(number, b""))
        if inode is None or not inode.is_dir:
            return
        inode.uses += 1
        try:
            path = frozen.path(inode, self._paths)
            if path is None:
                return
            names = iter(self._marks.names[number])
            while some := [(name, self._ranges(inode, name)) for name in islice(names, AT_ONCE)]:
                yield Directory(path, inode.shown, some)
            if path:
                yield Item(inode.shown, [])
        finally:
            inode.uses -= 1
            frozen.release(inode)

    def _ranges(self, directory: Inode, name: bytes) -> list[Range]:
        """What of the data behind a name can be others."""
        child = self._frozen.look_up(directory, name)
        if child is None:
            return []
        blocks = self._marks.blocks.get(child.number) if child.is_file else None
        self._frozen.release(child)
        return self._told(blocks) if blocks is not None else []

    def items(self) -> Iterator[Item]:
        """All items that are known by number alone. (The top is looked at by every sync.)"""
        marks = self._marks
        for number, blocks in marks.blocks.items():
            yield Item(number, self._told(blocks))
        for number in marks.items - marks.blocks.keys():
            yield Item(number, [])

    def _told(self, blocks: Blocks) -> list[Range]:
        return [(start, min(end, NEVER)) for start, end in blocks.ranges(self._frozen.block_size)]


class _Connection:
    """One line to a sync."""

    def __init__(self, control: Control, stream: trio.SocketStream) -> None:
        self._control = control
        self._stream = stream
        self._received = bytearray()
        self._freeze: Freeze | None = None
        self._frozen: FrozenTree | None = None
        self._frozen_ns = 0
        self._epoch = 0

    async def run(self) -> None:
        """Answer question after question until the line ends."""
        while (question := await self._next()) is not None:
            await self._answer(question)

    async def _answer(self, question: Question) -> None:
        control, error = self._control, ""
        if question.ask == "freeze":
            self._thaw()
            try:
                self._frozen_ns = time.time_ns()
                self._freeze, self._frozen, self._epoch = control.freeze(marked=question.marked)
            except SourceError as refused:
                error = str(refused)
        elif question.ask == "reached" and self._freeze is not None:
            self._freeze.reached = True
        elif question.ask == "missed":
            control.miss(question.words)
        elif question.ask == "changes" and self._frozen is not None:
            async for change in control.changes(self._frozen, self._epoch):
                await self._send(change)
            return
        elif question.ask == "confirm" and question.base is not None and self._freeze is not None:
            control.confirm(self._epoch, question.base)
            self._thaw()
        elif question.ask == "stop":
            pyfuse3.terminate()
        epoch = self._epoch or control.epoch
        await self._send(control.answer(self._freeze, self._frozen_ns, epoch, error))

    def close(self) -> None:
        """Rule 2."""
        self._thaw()

    def _thaw(self) -> None:
        if self._freeze is not None and self._frozen is not None:
            self._control.thaw(self._freeze, self._frozen)
            self._freeze = self._frozen = None

    async def _next(self) -> Question | None:
        head = await self._receive(HEAD_BYTES)
        length = int.from_bytes(head, "big")
        if not head or length > MAX_BYTES:
            return None
        return msgspec.msgpack.decode(await self._receive(length), type=Question)

    async def _receive(self, length: int) -> bytes:
        while len(self._received) < length:
            part = await self._stream.receive_some(1 << 16)
            if not part:
                return b""
            self._received += part
        found = bytes(self._received[:length])
        del self._received[:length]
        return found

    async def _send(self, message: Answer | Change) -> None:
        encoded = msgspec.msgpack.encode(message)
        await self._stream.send_all(len(encoded).to_bytes(HEAD_BYTES, "big") + encoded)


def _uid_of(stream: trio.SocketStream) -> int:
    credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("=iii", credentials)[1])
