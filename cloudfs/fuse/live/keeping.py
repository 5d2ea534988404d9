"""Before data changes: keeping what a freeze needs of it, and waiting where there is no room."""

from __future__ import annotations

import trio

from cloudfs.fuse.live.freeze import Freeze, Full
from cloudfs.fuse.live.inodes import Inode
from cloudfs.fuse.live.tree import LiveTree
from cloudfs.fuse.turns import Turns

TASKS = 128
MAX_WAITING = TASKS // 2
"""Questions at the same time, and how many of them may wait for a freeze to end: what is frozen
must still be read meanwhile. Before more would wait, it is given up as a point in time."""


class Keeper:
    """Keeps data for the freeze that is on, if one is."""

    def __init__(self, tree: LiveTree, turns: Turns) -> None:
        self._tree = tree
        self._turns = turns
        self._waiting = 0

    async def keep(self, inode: Inode, start: int, end: int, *, cut: bool = False) -> None:
        """Keep what is needed of some bytes; when this returns they may change at once. ``cut``:
        by being cut off."""
        frozen_by, at = self._tree.freeze, start
        while (freeze := self._tree.freeze) is not None and at < end:
            if freeze is not frozen_by:
                frozen_by, at = freeze, start
            try:
                at = self._tree.keep(inode, at, end, cut=cut)
            except Full:
                await self._wait_for_release(freeze)
                continue
            if at < end:
                with self._turns.away():
                    await trio.lowlevel.checkpoint()

    async def _wait_for_release(self, freeze: Freeze) -> None:
        if self._waiting >= MAX_WAITING:
            freeze.give_up("too many writers wait for it")
            return
        self._waiting += 1
        try:
            with self._turns.away():
                await freeze.released.wait()
        finally:
            self._waiting -= 1
