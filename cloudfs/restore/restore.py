"""A restore: from a snapshot to a directory.

1. The plan is made from the tables alone. A dry run ends here, and so does whatever the tables
   hold that cannot be a tree: nothing is written then.
2. The target is made, or is an empty directory. It and all directories below are for their owner
   alone until they are finished.
3. Directories are made, and files that several workers will share, with their full size.
4. Workers make everything else, part by part, in any order. The pool is started while the plan is
   still being made; what is small is done in this process.
5. Then come further names of hard links, the metadata of shared files, flags that lock, and the
   directories' metadata, from the deepest up: each of these would be undone, or made impossible,
   by what comes before it.
6. An item that fails is listed; the rest is restored. What fails for everything ends the restore;
   what is there by then stays. Nothing is flushed to the disk.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from dataclasses import replace

import msgspec

from cloudfs.core.errors import CloudfsError, UsageError
from cloudfs.repo.pool import WorkerPool
from cloudfs.restore.finish import Finisher
from cloudfs.restore.job import Interrupted, RestoreEvents, RestoreJob, RestoreResult
from cloudfs.restore.metadata import forget_inherited
from cloudfs.restore.rows import make_plan
from cloudfs.restore.values import Part, Plan
from cloudfs.restore.worker import (
    Done,
    Failure,
    RestoreContext,
    RestoreWorker,
    restore_task,
)

POOL_ITEMS, POOL_BYTES = 2500, 48 << 20
"""Less than this is restored sooner than a pool is started."""


def restore(job: RestoreJob, events: RestoreEvents) -> RestoreResult:
    """Run one restore. Raises CloudfsError or OSError where nothing more could be restored."""
    with contextlib.closing(_Restore(job, events)) as running:
        return running.run()


class _Restore:
    """The steps of one restore, in order."""

    def __init__(self, job: RestoreJob, events: RestoreEvents) -> None:
        self._job = job
        self._events = events
        self._store = job.history.repository.store
        self._view = job.history.view(job.snapshot)
        self._result = RestoreResult(self._view.record, Plan([], []).totals)
        self._workers = job.workers or os.cpu_count() or 1
        self._pool: WorkerPool | None = None
        self._failures: list[Failure] = []
        self._lost: Counter[str] = Counter()
        self._done = (0, 0)

    def run(self) -> RestoreResult:
        """All steps."""
        started = time.monotonic_ns()
        job, result = self._job, self._result
        self._events.phase("planning")
        check_target(job.target)
        stats = self._view.record.stats
        if job.path == b"/" and (stats.files >= POOL_ITEMS or stats.bytes_total >= POOL_BYTES):
            self._start_pool()
        with _without_collections():
            plan = make_plan(self._view, job.path, self._workers)
        result.totals = totals = plan.totals
        if not job.dry_run:
            if totals.items >= POOL_ITEMS or totals.size >= POOL_BYTES:
                self._start_pool()
            with _no_room(job.target, self):
                self._execute(plan)
        result.failures = [
            (plan.path(found.directory, found.name), found.reason) for found in self._failures
        ]
        result.damaged = any(found.damaged for found in self._failures)
        result.lost = dict(self._lost)
        result.requests += self._store.counts()
        result.duration_ns = time.monotonic_ns() - started
        return result

    @property
    def items_done(self) -> int:
        """How many items there are by now."""
        return self._done[0]

    def _start_pool(self) -> None:
        if self._pool is None and self._workers > 1 and not self._job.dry_run:
            opening = self._job.opening
            options = opening.options.shared_by(self._workers)
            self._pool = WorkerPool(self._workers, replace(opening, options=options))

    def _execute(self, plan: Plan) -> None:
        job = self._job
        identity = make_target(job.target)
        context = RestoreContext(
            job.history.policy,
            job.history.manifest,
            job.snapshot,
            job.target,
            identity,
            job.owners,
        )
        worker = RestoreWorker(job.history.repository, context, job.history)
        try:
            self._events.phase("restoring")
            self._report(plan, 0, 0)
            finisher = Finisher(plan, worker)
            finisher.make_directories()
            finisher.begin_split()
            for done in self._run(plan.parts, context, worker):
                self._failures += done.failures
                self._lost.update(done.lost)
                self._report(plan, done.items, done.size)
            self._events.phase("finishing")
            finisher.finish(self._failures)
            self._failures += finisher.failures
            self._lost.update(worker.dresser.lost)
        finally:
            worker.close()

    def _report(self, plan: Plan, items: int, size: int) -> None:
        self._done = self._done[0] + items, self._done[1] + size
        totals = plan.totals
        items_done = min(self._done[0], totals.items)  # pieces of one file count as one each
        self._events.progress(totals.items, items_done, totals.size, self._done[1])

    def _run(
        self, parts: list[Part], context: RestoreContext, worker: RestoreWorker
    ) -> Iterator[Done]:
        """Do all parts, here or in the pool."""
        if self._pool is None:
            for part in parts:
                yield worker.run(part, self._job.stopped)
                self._check_stopped()
            worker.dresser.lost.clear()
            return
        encode, coded = msgspec.msgpack.encode, msgspec.msgpack.encode(context)
        waiting = iter(parts)
        running: set[Future[bytes]] = set()
        while True:
            for part in waiting:
                running.add(self._pool.submit(restore_task, coded, encode(part)))
                if len(running) > self._workers:  # one more than can run, so that none waits
                    break
            if not running:
                return
            finished, running = wait(running, None, FIRST_COMPLETED)
            for future in finished:
                done = msgspec.msgpack.decode(self._outcome(future), type=Done)
                self._result.requests += done.requests
                yield done
            self._check_stopped()

    @staticmethod
    def _outcome(future: Future[bytes]) -> bytes:
        try:
            return future.result()
        except BrokenExecutor:
            raise CloudfsError(
                "a worker process died (out of memory?). What it restored is left there;"
                " restore into another directory with fewer --workers."
            ) from None

    def _check_stopped(self) -> None:
        if self._job.stopped():
            raise Interrupted(
                f"stopped. {self.items_done:,} items were restored and are left in"
                f" {os.fsdecode(self._job.target)}."
            )

    def close(self) -> None:
        """End the pool."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """A plan is many small values without cycles: looking for cycles among them takes a third."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.freeze()
            gc.enable()


# -- the target ----------------------------------------------------------------------------------


def check_target(target: bytes) -> None:
    """Raise UsageError unless the target is not there, or is an empty directory."""
    shown = os.fsdecode(target)
    try:
        with os.scandir(target) as found:
            if next(found, None) is not None:
                raise UsageError(
                    f"{shown} is not empty, and a restore overwrites nothing."
                    " Name a directory that is new or empty with --target."
                )
    except FileNotFoundError:
        above = os.path.dirname(os.path.abspath(target))
        if not os.path.isdir(above):
            raise UsageError(
                f"{os.fsdecode(above)}, in which {shown} is to be made, is no directory."
                " Make it, or name another --target."
            ) from None
    except NotADirectoryError:
        raise UsageError(f"{shown} is no directory. Name one with --target.") from None


def make_target(target: bytes) -> tuple[int, int]:
    """Make the target, if need be, for its owner alone. Returns its device and inode."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(target, 0o700)
    fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        with contextlib.suppress(PermissionError):  # another's directory in which we may write
            os.fchmod(fd, 0o700)
        forget_inherited(fd)
    finally:
        os.close(fd)
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _no_room(target: bytes, running: _Restore) -> Iterator[None]:
    """Say of a full disk what it means for the restore."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CloudfsError(
            f"there is no room left for {os.fsdecode(target)}: {running.items_done:,} items were"
            " restored and are left there. Free some space, remove them, and restore again."
        ) from None
