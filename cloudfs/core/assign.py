"""Cutting directory tasks into assignments: about one pack of work each, one neighbourhood each.

Work is counted in bytes of source plus ITEM_COST for each item, since a small file costs its
opening and its row far more than its bytes. Directories whose work exceeds an assignment are cut
between their items, and files larger than PART_BYTES by ranges of bases, so that several workers
share them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from cloudfs.core.changelist import Range
from cloudfs.core.changes import DirTask, Stat, decode_listing
from cloudfs.core.rows import BASE_BLOCKS

ITEM_COST = 8 * 1024
MAX_TASK_ITEMS = 16 * 1024


class WorkQueue:
    """Tasks in order, given out as assignments of about the work that is asked for."""

    def __init__(self, block_size: int, part_bytes: int) -> None:
        base_bytes = block_size * BASE_BLOCKS
        self._base_bytes = base_bytes
        self._part_bases = max(1, part_bytes // base_bytes)
        self._queue: deque[tuple[DirTask, int]] = deque()
        self.work = 0
        self.listing_bytes = 0

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, task: DirTask, items: int, size: int) -> None:
        """Add a task; ``items`` and ``size`` (bytes) say at most how much is to be done in it."""
        part_bytes = self._part_bases * self._base_bytes
        if items <= MAX_TASK_ITEMS and size <= part_bytes:
            self._push(task, size + items * ITEM_COST)
            return
        for piece, work in self._cut(task):
            self._push(piece, work)

    def _push(self, task: DirTask, work: int) -> None:
        self._queue.append((task, work))
        self.work += work
        self.listing_bytes += len(task.listing)

    def take(self, work: int) -> list[DirTask]:
        """The next tasks, of about ``work`` together; at least one if there is any."""
        taken: list[DirTask] = []
        left = work
        while self._queue and (not taken or self._queue[0][1] <= left):
            task, cost = self._queue.popleft()
            taken.append(task)
            left -= cost
            self.work -= cost
            self.listing_bytes -= len(task.listing)
        return taken

    def _cut(self, task: DirTask) -> Iterator[tuple[DirTask, int]]:
        """Cut one task into pieces, in listing order."""
        stats = decode_listing(task.listing)
        items = range(len(stats)) if task.items is None else task.items
        naming = set(range(len(stats)) if task.names is None else task.names)
        chosen: list[int] = []
        work = 0
        for index in items:
            stat = stats[index]
            if stat.is_file and stat.size > self._part_bases * self._base_bytes:
                yield from self._parts(task, index, stat, naming)
                naming.discard(index)
                continue
            chosen.append(index)
            work += ITEM_COST + bytes_of(task, index, stat)
            if work >= self._part_bases * self._base_bytes or len(chosen) >= MAX_TASK_ITEMS:
                yield self._piece(task, stats, chosen, naming), work
                naming.difference_update(chosen)
                chosen, work = [], 0
        if chosen or naming:
            yield self._piece(task, stats, chosen, naming, rest=True), work

    @staticmethod
    def _piece(
        task: DirTask, stats: list[Stat], items: list[int], naming: set[int], rest: bool = False
    ) -> DirTask:
        names = sorted(naming if rest else naming.intersection(items))
        return _narrow(task, stats, items, names, None)

    def _parts(
        self, task: DirTask, index: int, stat: Stat, naming: set[int]
    ) -> Iterator[tuple[DirTask, int]]:
        bases = -(-stat.size // self._base_bytes)
        names = [index] if index in naming else []
        ranges = task.ranges.get(index)
        for first in range(0, bases, self._part_bases):
            last = first + self._part_bases >= bases
            size = self._part_bases * self._base_bytes
            if ranges is not None:
                size = _overlap(ranges, first * self._base_bytes, size)
                if not size and first and not last:
                    continue  # nothing of this part changed
            # The last part has no end: the file may have grown since it was listed.
            part = (first, 0 if last else self._part_bases)
            piece = _narrow(task, [stat], [index], names if first == 0 else [], part)
            yield piece, size


def bytes_of(task: DirTask, index: int, stat: Stat) -> int:
    """How many bytes of an item are to be read, at most."""
    if not stat.is_file:
        return 0
    ranges = task.ranges.get(index)
    return stat.size if ranges is None else _overlap(ranges, 0, stat.size)


def _narrow(
    task: DirTask,
    stats: list[Stat],
    items: list[int],
    names: list[int],
    part: tuple[int, int] | None,
) -> DirTask:
    """The same task for a few of its items, with a listing of just those."""
    from cloudfs.core.changes import collapse, encode_listing, expand

    chosen = sorted(set(items) | set(names))
    place = {index: new for new, index in enumerate(chosen)}
    by_index = stats if part is None else {items[0]: stats[0]}
    lins = expand(task.lins)
    return DirTask(
        task.lin,
        task.path,
        encode_listing([by_index[index] for index in chosen]),
        collapse([lins[index] for index in chosen]),
        [place[index] for index in items],
        [place[index] for index in names],
        {place[i]: lin for i, lin in task.bases.items() if i in place},
        part,
        {place[i]: found for i, found in task.ranges.items() if i in place},
    )


def _overlap(ranges: list[Range], start: int, length: int) -> int:
    """How many bytes of the ranges lie in ``length`` bytes from ``start`` on."""
    end = start + length
    return sum(max(0, min(stop, end) - max(first, start)) for first, stop in ranges)
