"""Marking what is about to change, and cutting time into epochs.

1. Every change is marked before it happens: names by their directory, data by blocks, attributes by
   item; see :mod:`cloudfs.db.marked`. What is marked already costs a look into memory.
2. A sync freezes: the epoch ends and another begins. When its snapshot is committed it confirms,
   and all up to that epoch is forgotten; if it fails, the next sync gets that epoch too.
3. Marks count from the *base* on, the last snapshot that was confirmed. They are believed by a
   mount that is started anew if it takes the place of one that died in this boot and still stood
   where it was, so that nobody could go past it. Else there is no base, and the next sync scans:
   marks are disowned when a mount ends, and before one begins that replaces none.
4. What cannot be marked (the disk is full, the state is gone) is never an error to who writes: the
   epoch is *lost*, and the next sync scans and says why. Where not even that can be written down,
   what is on disk is no longer called complete, and no other process believes it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator

import msgspec

from cloudfs.core.marks import Blocks
from cloudfs.db import marked
from cloudfs.db.marked import MarkedSet, Marks, Row
from cloudfs.fuse.live.inodes import Inode
from cloudfs.source.handles import handle_of
from cloudfs.source.live.protocol import Base

log = logging.getLogger(__name__)

AHEAD = 8
"""Blocks that are marked with the one that is written to, in a file that is being overwritten from
one end to the other."""

MOST_HELD = 1000
"""Directories on other file systems that are held from when they are marked to when they are in a
snapshot."""

FIRST_TIME = "no snapshot was taken since it was mounted live"
INCOMPLETE = "changes could not be noted before the mount's process ended"


class State(msgspec.Struct, frozen=True):
    """What outlives the process."""

    boot: str
    identity: str  # of the source
    mount: str  # by which it is known from all others; "": it has ended
    base: Base | None
    first: int
    epoch: int
    lost: str


class Tracker:
    """The marks of one mount. For the thread that serves the kernel."""

    def __init__(
        self,
        kept: MarkedSet,
        block_size: int,
        *,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kept = kept
        self._block_size = block_size
        self._clock_s = clock_s
        self.base: Base | None = None
        self.first = 1
        self.epoch = 1
        self.lost: dict[int, str] = {}  # by epoch
        self._names: dict[int, set[bytes]] = {}  # marked in this epoch
        self._items: set[int] = set()
        self._blocks: dict[int, Blocks] = {}
        self._where: dict[int, bytes] = {}
        self._before: dict[int, Marks] = {}  # by epoch
        self._held: list[tuple[int, Inode]] = []  # the epoch in which each was marked
        self._identity = ("", "", "")
        self._complete = False  # what is on disk: see rule 4
        self.last_change_s = 0.0
        self.first_change_s = 0.0

    # -- beginning -----------------------------------------------------------------------------

    def disown(self) -> None:
        """No mount that comes is to believe what is there. Raises OSError."""
        state = self._saved()
        if state is None:
            return
        ended = msgspec.structs.replace(state, mount="")
        try:
            self._kept.save_state(msgspec.msgpack.encode(ended))
        except OSError:  # there is no room even for that
            self._kept.drop_state()

    def begin(self, boot: str, identity: str, mount: str, covered: str) -> None:
        """Take up what an earlier mount left, where rule 3 allows it.

        ``covered``: the dead mount that this one, ``mount``, replaced; "" for none.
        """
        state = self._saved()
        self._identity = (boot, identity, mount)
        known = state is not None and (state.boot, state.identity) == (boot, identity)
        if state is not None and known and covered and state.mount == covered:
            self.base, self.first, self.epoch = state.base, state.first, state.epoch + 1
            self.lost = {state.epoch: state.lost} if state.lost else {}
            if not self._kept.complete:
                self.lost = {state.epoch: INCOMPLETE}
            for epoch in range(self.first, self.epoch):
                self._before[epoch] = self._kept.load(epoch, epoch)
        else:
            words = "the tree could be changed while it was not mounted live"
            self.lost = {0: FIRST_TIME if state is None or state.base is None else words}
            with self._or_lost():
                self._kept.clear()
        self.save()

    def _saved(self) -> State | None:
        try:
            return msgspec.msgpack.decode(self._kept.state(), type=State)
        except (msgspec.DecodeError, OSError):
            return None

    def save(self) -> None:
        """Keep what is believed."""
        boot, identity, mount = self._identity
        lost = next(iter(self.lost.values()), "")
        state = State(boot, identity, mount, self.base, self.first, self.epoch, lost)
        with self._or_lost():
            self._kept.save_state(msgspec.msgpack.encode(state))
            if not self._complete:
                self._kept.set_complete(True)
                self._complete = True

    # -- marking -------------------------------------------------------------------------------

    def name(self, directory: Inode, name: bytes) -> None:
        """A name in a directory is about to change."""
        self._touch()
        names = self._names.get(directory.number)
        if names is None:
            names = self._names[directory.number] = set()
            self._add([*self._whereabouts(directory), marked.name_row(directory.number, name)])
        elif name not in names:
            self._add([marked.name_row(directory.number, name)])
        names.add(name)

    def item(self, inode: Inode) -> None:
        """The attributes of an item are about to change."""
        self._touch()
        if inode.number not in self._items:
            self._add([marked.item_row(inode.number)])
            self._items.add(inode.number)

    def data(self, inode: Inode, start: int, end: int, size: int) -> None:
        """The bytes from ``start`` to before ``end`` of a file of ``size`` are about to change."""
        if end > size:
            # All behind the old end is new, however far away it is that something is written.
            self.data_from(inode, min(start, size))
            return
        blocks = self._blocks_of(inode)
        first, last = start // self._block_size, (end - 1) // self._block_size
        if blocks.covers(first, last):
            self.last_change_s = self._clock_s()
            return
        if first and blocks.covers(first - 1, first - 1):
            last += AHEAD
        groups = blocks.add(first, last)
        number = inode.number
        self._add([marked.group_row(number, g, blocks.groups[g]) for g in groups])
        self._touch()

    def data_from(self, inode: Inode, start: int) -> None:
        """All bytes from ``start`` on are about to change."""
        blocks = self._blocks_of(inode)
        first = start // self._block_size
        if blocks.cut(first):
            self._add([marked.tail_row(inode.number, first)])
        self._touch()

    def covers(self, inode: Inode, start: int, end: int) -> bool:
        """Whether these bytes are marked in this epoch, so that :meth:`data` need not be called."""
        blocks = inode.blocks
        if inode.epoch != self.epoch or blocks is None:
            return False
        self.last_change_s = self._clock_s()
        return blocks.covers(start // self._block_size, (end - 1) // self._block_size)

    def _blocks_of(self, inode: Inode) -> Blocks:
        if inode.epoch != self.epoch or inode.blocks is None:
            inode.blocks = self._blocks.setdefault(inode.number, Blocks())
            inode.epoch = self.epoch
        return inode.blocks

    def _add(self, rows: Iterable[Row]) -> None:
        try:  # and not _or_lost, which would be a quarter of what a mark costs
            self._kept.add(self.epoch, rows)
        except OSError as error:
            self._lose(error)

    @contextlib.contextmanager
    def _or_lost(self) -> Iterator[None]:
        """Rule 4."""
        try:
            yield
        except OSError as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        if self.epoch not in self.lost:
            self.lost[self.epoch] = f"changes could not be noted ({error})"
            log.error("Changes can no longer be noted: %s", error)
        self._complete = False
        with contextlib.suppress(OSError):
            self._kept.set_complete(False)

    def miss(self, words: str) -> None:
        """Not all that changes in this epoch is marked."""
        self.lost.setdefault(self.epoch, words)
        self.save()

    def _touch(self) -> None:
        now = self.last_change_s = self._clock_s()
        self.first_change_s = self.first_change_s or now

    # -- epochs --------------------------------------------------------------------------------

    def close_epoch(self) -> int:
        """End the epoch and begin another; returns the one that ended."""
        closed = self.epoch
        self._before[closed] = self._marks()
        self.epoch += 1
        self._names, self._items, self._blocks, self._where = {}, set(), {}, {}
        self.first_change_s = 0.0
        self.save()
        return closed

    def _marks(self) -> Marks:
        found = Marks()
        found.names, found.items, found.blocks = self._names, self._items, self._blocks
        found.where = self._where
        return found

    def _whereabouts(self, directory: Inode) -> list[Row]:
        """How a directory is found again when it is no longer known. Where it has no handle on the
        tree's own file system it is held, so that it is; of those that cannot be, the next sync
        scans if one is not known."""
        if directory.nested:
            if len(self._held) < MOST_HELD:
                directory.uses += 1
                self._held.append((self.epoch, directory))
            return []
        if not directory.handle:
            with contextlib.suppress(OSError):
                directory.handle = handle_of(directory.fd)
        if not directory.handle:
            return []
        self._where[directory.number] = directory.handle
        return [marked.where_row(directory.number, directory.handle)]

    def marks_through(self, epoch: int) -> Marks:
        """All that was marked since the base, up to an epoch that was closed."""
        found = Marks()
        for number, marks in self._before.items():
            if number <= epoch:
                _merge(found, marks)
        return found

    def why_lost(self, epoch: int) -> str:
        """Why the marks up to an epoch are not complete; "" if they are."""
        return next((words for at, words in self.lost.items() if at <= epoch), "")

    def confirm(self, epoch: int, base: Base) -> list[Inode]:
        """All up to an epoch is in a snapshot. Returns what need not be used any more for that."""
        done = [inode for at, inode in self._held if at <= epoch]
        self._held = [(at, inode) for at, inode in self._held if at > epoch]
        self.base, self.first = base, epoch + 1
        self._before = {at: marks for at, marks in self._before.items() if at > epoch}
        self.lost = {at: words for at, words in self.lost.items() if at > epoch}
        with self._or_lost():
            self._kept.drop_through(epoch)
        self.save()
        return done

    @property
    def pending(self) -> int:
        """How many names and items were marked since the base."""
        return self._marks().count + sum(marks.count for marks in self._before.values())


def _merge(into: Marks, marks: Marks) -> None:
    for inode, names in marks.names.items():
        into.names.setdefault(inode, set()).update(names)
    for inode, blocks in marks.blocks.items():
        into.blocks.setdefault(inode, Blocks()).merge(blocks)
    into.items |= marks.items
    into.where |= marks.where
