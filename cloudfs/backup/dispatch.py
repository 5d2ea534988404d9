"""Handing assignments to workers: in this process while there is little to do, else to a pool.

1. The pool is started as soon as the queued work is more than INLINE_WORK, while the walk goes on.
2. While the walk goes on the total is not known and assignments are FIRST_WORK; afterwards each is
   a share of what is left, between bounds, so that all workers end at about the same time and
   still few packs are made.
3. As many assignments are under way as there are workers, and one more so that none waits.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait

import msgspec

from cloudfs.backup.describe import SPARE_LINS
from cloudfs.backup.worker import Assignment, Done, SyncContext, Worker, pack_task, scan_task
from cloudfs.core.assign import WorkQueue
from cloudfs.core.errors import CloudfsError
from cloudfs.repo.pool import WorkerOpening, WorkerPool
from cloudfs.source.scan import ScanOutcome, ScanPart

INLINE_WORK = 32 << 20
FIRST_WORK = 128 << 20
MIN_WORK = 96 << 20
MAX_WORK = 256 << 20
POLL_S = 0.2

_DIED = "a worker process died (out of memory?). What it stored is used by the next sync."


class Dispatcher:
    """Runs assignments and parts of scans, here or in a pool."""

    def __init__(
        self,
        context: SyncContext,
        worker: Worker,
        opening: WorkerOpening,
        workers: int,
        allot: Callable[[int], int],
    ) -> None:
        """``worker`` works in this process; ``allot`` gives the first of so many fresh LINs."""
        self._context = msgspec.msgpack.encode(context)
        self._worker = worker
        self._opening = opening
        self.workers = workers
        self._allot = allot
        self._pool: WorkerPool | None = None
        self._running: set[Future[bytes]] = set()
        self._scans_in_pool = False

    def start_pool(self, *, for_scans: bool = False) -> None:
        """Start the worker processes; returns before they are ready.

        Scans stay in this process unless the pool was started for them.
        """
        if self._pool is None and self.workers > 1:
            self._pool = WorkerPool(self.workers, self._opening)
            self._scans_in_pool = for_scans

    def scan_here(self, part: ScanPart) -> ScanOutcome:
        """Visit directories of a tree that was never backed up, in this process."""
        return self._worker.scan(part)

    def scan(self, parts: list[ScanPart]) -> Iterator[ScanOutcome]:
        """Visit directories; outcomes come in the order of parts."""
        if not self._scans_in_pool:
            for part in parts:
                yield self._worker.scan(part)
            return
        encode = msgspec.msgpack.encode
        assert self._pool is not None
        futures = [self._pool.submit(scan_task, self._context, encode(part)) for part in parts]
        for future in futures:
            yield msgspec.msgpack.decode(self._result(future), type=ScanOutcome)

    def feed(self, queue: WorkQueue, *, walking: bool) -> Iterator[Done]:
        """Start what can be started; yields what is done.

        Waits only when not ``walking``, and never longer than POLL_S, so that whoever feeds can
        look whether it is to stop.
        """
        if queue.work > INLINE_WORK:
            self.start_pool()
        if self._pool is None:
            # Too little to say yet, or so little that a pool would cost more than it saves.
            if not walking and queue:
                yield self._worker.pack(self._assignment(queue, MAX_WORK))
            return
        if walking and not self._pool.started.is_set():
            return  # to submit anything now would wait for the start, and the walk with it
        while (
            queue
            and len(self._running) <= self.workers
            and not (walking and queue.work < FIRST_WORK)
        ):
            assignment = self._assignment(queue, self._share(queue, walking))
            encoded = msgspec.msgpack.encode(assignment)
            self._running.add(self._pool.submit(pack_task, self._context, encoded))
        yield from self._collect(block=not walking)

    def _collect(self, *, block: bool) -> Iterator[Done]:
        if self._running:
            timeout = POLL_S if block else 0
            done, self._running = wait(self._running, timeout, FIRST_COMPLETED)
            for future in done:
                yield msgspec.msgpack.decode(self._result(future), type=Done)

    @property
    def busy(self) -> bool:
        """Whether anything is under way."""
        return bool(self._running)

    def _share(self, queue: WorkQueue, walking: bool) -> int:
        if walking:
            return FIRST_WORK
        return max(MIN_WORK, min(MAX_WORK, int(queue.work / (1.5 * self.workers))))

    def _assignment(self, queue: WorkQueue, work: int) -> Assignment:
        return Assignment(queue.take(work), self._allot(SPARE_LINS))

    @staticmethod
    def _result(future: Future[bytes]) -> bytes:
        try:
            return future.result()
        except BrokenExecutor:
            raise CloudfsError(_DIED) from None

    def close(self, *, cancel: bool) -> None:
        """End the pool; with ``cancel`` at once, whatever is under way.

        A worker may be ended anywhere: a pack is stored whole or not at all.
        """
        if self._pool is not None:
            if cancel:
                for worker in multiprocessing.active_children():
                    worker.terminate()
            self._pool.shutdown(wait=True, cancel_futures=cancel)
