"""A sync: from the live tree to a snapshot in the repository.

1. Only one sync of a policy runs at a time: a lock on this machine, a lease in the repository.
2. The local state is brought to the repository's last snapshot, by rebuilding it if need be. If a
   sync did not end, what it stored is offered to this one.
3. The tree is walked; what is new, changed, moved or gone becomes tasks and tombstones.
4. Workers turn tasks into packs, which are durable when a task is done.
5. The rows of all of it become a segment, and runs are merged if they are too many.
6. The next manifest is committed: only now the snapshot exists. If anything fails before, nothing
   was changed, and what was stored is found by the next sync.
7. The local state follows. If that fails, the next sync rebuilds it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import xxhash

from cloudfs.backup.adopt import adopt
from cloudfs.backup.coalesce import PageSpool, RunWriter, merge_runs
from cloudfs.backup.dispatch import Dispatcher
from cloudfs.backup.job import SyncEvents, SyncJob, SyncResult
from cloudfs.backup.packs import Packer, PackSettings
from cloudfs.backup.rebuild import rebuild
from cloudfs.backup.walk import QUOTA, Walk
from cloudfs.backup.worker import Done, SyncContext, Worker
from cloudfs.core.assign import WorkQueue
from cloudfs.core.errors import CloudfsError, Held
from cloudfs.core.manifest import Manifest, SnapshotRecord, SnapshotStats
from cloudfs.core.rows import Entry, Meta, PackRow, Table
from cloudfs.db.state import Head, SyncState
from cloudfs.repo.history import History
from cloudfs.repo.lease import Lease, acquire
from cloudfs.repo.pool import WorkerOpening
from cloudfs.repo.view import SnapshotView
from cloudfs.source.roots import Roots
from cloudfs.source.scan import ScanOutcome, ScanPart
from cloudfs.store.count import Counts as Requests

PART_BYTES = 64 << 20
"""Files larger than this are shared by several workers."""

MAX_QUEUED_LISTINGS = 32 << 20
PARALLEL_SCAN_ITEMS = 150_000
"""From so many items on (as of the last snapshot) the walk itself is shared by the workers."""


class Interrupted(CloudfsError):
    """The user asked the sync to stop."""


def sync(job: SyncJob, events: SyncEvents) -> SyncResult:
    """Run one sync. Raises CloudfsError; then the old snapshots are whole and nothing is new."""
    roots = Roots(job.settings.sources)
    directory = job.repository.local.policy_dir(job.repository.id, job.record.id)
    try:
        with _local_lock(job, directory, events):
            history = History(job.repository, job.record, manifest=None)
            with contextlib.closing(history), _lease(job, history, events) as held:
                state = SyncState(directory, writer=not job.dry_run or not directory.exists())
                with contextlib.closing(state):
                    return _Sync(job, events, roots, history, state, *held).run()
    finally:
        roots.close()


@contextlib.contextmanager
def _local_lock(job: SyncJob, directory: Path, events: SyncEvents) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + job.wait_s
        said = False
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                who = os.pread(fd, 64, 0).decode(errors="replace").strip() or "another process"
                name = job.settings.name
                text = (
                    f"{name} is being synced by this machine ({who})."
                    f" Wait for it, or `cloudfs sync {name} --wait`."
                )
                if time.monotonic() >= deadline:
                    raise Held(text) from None
                if not said:
                    events.note(text)
                    said = True
                time.sleep(0.2)
        os.ftruncate(fd, 0)
        since = time.strftime("%H:%M:%S")
        os.pwrite(fd, f"process {os.getpid()}, since {since}".encode(), 0)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _lease(
    job: SyncJob, history: History, events: SyncEvents
) -> Iterator[tuple[Lease | None, bool]]:
    if job.dry_run:
        yield None, False
        return
    lease, took_over = acquire(history, wait_s=job.wait_s, on_wait=events.note)
    try:
        yield lease, took_over
    finally:
        lease.release()


class _Sync:
    """The steps of one sync, in order."""

    def __init__(
        self,
        job: SyncJob,
        events: SyncEvents,
        roots: Roots,
        history: History,
        state: SyncState,
        lease: Lease | None,
        took_over: bool,
    ) -> None:
        self._job = job
        self._settings = job.settings
        self._events = events
        self._roots = roots
        self._history = history
        self._state = state
        self._lease = lease
        self._took_over = took_over
        self._started_ns = job.repository.clock_ns()
        self._previous = history.manifest.last_snapshot
        self._snapshot = self._previous.number + 1 if self._previous else 1
        self._signature = _signature(job)
        self._trust = True
        self._view: SnapshotView | None = None
        self._orphans: dict[bytes, PackRow] = {}
        self._adopted: set[bytes] = set()
        self._packs: list[PackRow] = []
        self._parts: dict[int, set[tuple[int, int, int]]] = {}
        self._absent: list[tuple[int, bytes, bool]] = []
        self._errors: list[tuple[bytes, str]] = []
        self._requests = Requests()
        self._items_done = self._bytes_read = self._bytes_stored = 0
        self._spool_dir = job.repository.local.state_dir / "spool"
        self._spool = PageSpool(self._spool_dir)

    def run(self) -> SyncResult:
        """All steps."""
        self._events.phase("scanning")
        self._prepare()
        queue = WorkQueue(self._settings.block_size, PART_BYTES)
        walk = Walk(
            self._roots,
            self._state,
            self._view,
            self._history.manifest.next_lin,
            queue,
            trust=self._trust,
        )
        context = self._context(walk)
        worker = Worker(self._job.repository, context)
        worker.use_state(self._state)
        worker.use_view(self._view)
        dispatcher = self._dispatcher(context, worker, walk)
        finished = False
        try:
            self._work(walk, queue, dispatcher)
            finished = True
        finally:
            dispatcher.close(cancel=not finished)
            worker.close()
        return self._conclude(walk)

    # -- before ----------------------------------------------------------------------------------

    def _prepare(self) -> None:
        state, manifest = self._state, self._history.manifest
        head = state.head
        unclean = head.running or self._took_over
        if self._previous is not None:
            self._view = self._history.view(self._previous.number)
        fits = head.snapshot == (self._previous.number if self._previous else 0)
        if not fits or (self._previous and not head.counts.items):
            unclean = True
            if self._view is not None:
                self._events.note("the local state is made anew from the repository")
                rebuild(state, self._view, manifest, self._signature)
            else:
                state.clear()
        elif unclean and self._lease is not None:
            state.drop_unfinished()
        self._trust = state.head.signature == self._signature
        if self._lease is None:
            return
        if unclean or not self._previous:
            state.clear_adopted()
            self._orphans = adopt(self._history, state)
        state.save_head(msgspec.structs.replace(state.head, running=True))

    def _context(self, walk: Walk) -> SyncContext:
        settings = self._settings
        packing = PackSettings(
            self._job.record.id,
            self._snapshot,
            settings.block_size,
            settings.max_pack_bytes,
            settings.level,
            settings.verify_packs,
            settings.pack_time_limit_s,
            self._job.host,
        )
        return SyncContext(
            self._job.record,
            packing,
            settings.sources,
            settings.filters,
            self._history.manifest,
            0 if self._view is None else self._view.number,
            walk.diff.next_lin,
            str(self._state_dir()),
            bool(self._orphans),
        )

    def _state_dir(self) -> Path:
        repository = self._job.repository
        return repository.local.policy_dir(repository.id, self._job.record.id)

    def _dispatcher(self, context: SyncContext, worker: Worker, walk: Walk) -> Dispatcher:
        repository, local = self._job.repository, self._job.repository.local
        workers = self._settings.workers or len(os.sched_getaffinity(0))
        opening = WorkerOpening(
            self._settings.url,
            self._settings.options.shared_by(workers),
            repository.opening,
            local.cache_dir,
            local.state_dir,
        )
        return Dispatcher(context, worker, opening, workers, walk.diff.allot)

    # -- walking and packing ---------------------------------------------------------------------

    def _work(self, walk: Walk, queue: WorkQueue, dispatcher: Dispatcher) -> None:
        trust = self._trust
        if walk.first:
            walking = True
            while walking:
                if queue.listing_bytes < MAX_QUEUED_LISTINGS:
                    walking = walk.step_first(dispatcher.scan_here)
                self._step(walk, queue, dispatcher, walking=walking)
        else:
            shared = self._state.head.counts.items >= PARALLEL_SCAN_ITEMS
            if shared and dispatcher.workers > 1:
                dispatcher.start_pool()
            pieces = 4 * dispatcher.workers if shared else 1
            walk.run(
                lambda parts: self._scan(dispatcher, parts, walk, trust),
                pieces,
                4 * QUOTA if shared else QUOTA,
            )
        self._events.phase("packing")
        while not self._job.dry_run and (queue or dispatcher.busy):
            self._step(walk, queue, dispatcher, walking=False)

    def _scan(
        self, dispatcher: Dispatcher, parts: list[ScanPart], walk: Walk, trust: bool
    ) -> Iterator[ScanOutcome]:
        for outcome in dispatcher.scan(parts, trust=trust):
            self._check_stop()
            self._tell(walk)
            yield outcome

    def _step(self, walk: Walk, queue: WorkQueue, dispatcher: Dispatcher, *, walking: bool) -> None:
        self._check_stop()
        if not self._job.dry_run:
            for done in dispatcher.feed(queue, walking=walking):
                self._take(done)
        elif queue.listing_bytes >= MAX_QUEUED_LISTINGS:
            queue.take(queue.work)
        self._tell(walk)

    def _check_stop(self) -> None:
        if self._job.stopped():
            raise Interrupted(
                f"stopped. Snapshot {self._snapshot} was not made; what was stored is used by the"
                " next sync."
            )

    def _tell(self, walk: Walk) -> None:
        self._events.progress(
            walk.items_seen, self._items_done, walk.counts.bytes, self._bytes_read
        )

    def _take(self, done: Done) -> None:
        self._spool.add(done.pages)
        self._packs.extend(done.packs)
        self._errors.extend(done.errors)
        self._absent.extend(done.absent)
        self._adopted.update(done.adopted)
        for lin, *identity in done.parts:
            mtime_ns, ctime_ns, size = identity
            self._parts.setdefault(lin, set()).add((mtime_ns, ctime_ns, size))
        self._items_done += done.items
        self._bytes_read += done.bytes_read
        self._bytes_stored += done.bytes_stored
        self._requests += done.requests

    # -- after -----------------------------------------------------------------------------------

    def _conclude(self, walk: Walk) -> SyncResult:
        metas, entries = walk.bury(self._snapshot)
        made_up: list[Meta | Entry] = [*walk.made_up, *metas, *entries]
        self._errors.extend(walk.errors)
        for lin, versions in self._parts.items():
            if len(versions) > 1:
                self._errors.append((b"LIN %d" % lin, "changed while it was read"))
        changed = bool(self._spool or made_up or walk.first)
        if self._job.dry_run:
            return self._result(None, walk)
        self._mark_unread()
        if not changed and not self._job.force:
            self._state.amend(self._snapshot, walk.changed)
            head = self._state.head
            self._state.save_head(
                Head(head.manifest, head.snapshot, False, walk.counts, self._signature, 0)
            )
            return self._result(None, walk)
        record = self._publish(walk, made_up)
        return self._result(record, walk)

    def _mark_unread(self) -> None:
        """Note in the records what could not be read, so that the next sync tries again."""
        by_directory: dict[int, list[tuple[bytes, bool]]] = {}
        for lin, name, new in self._absent:
            by_directory.setdefault(lin, []).append((name, new))
        for lin, names in by_directory.items():
            record = self._state.staged(lin, self._snapshot)
            if record is not None:
                record.mark_unread(
                    {n for n, new in names if new}, {n for n, new in names if not new}
                )
                self._state.put_records(self._snapshot, [(lin, record)])

    def _publish(self, walk: Walk, made_up: list[Meta | Entry]) -> SnapshotRecord:
        self._events.phase("committing")
        job, history = self._job, self._history
        self._store_rows(made_up)
        packs = [*self._packs, *(self._orphans[name] for name in self._adopted_orphans())]
        rows = sorted(
            (msgspec.structs.replace(pack, snap=self._snapshot) for pack in packs),
            key=lambda pack: pack.name,
        )
        self._spool.add_rows(Table.PACKS, list(rows))
        writer = RunWriter(job.repository, job.record.id)
        run = writer.write(self._spool.ordered(), self._snapshot, self._snapshot)
        self._spool.close()
        runs = history.manifest.runs
        if run.segments:
            runs = merge_runs(history, [*runs, run], writer, self._spool_dir)
        self._bytes_stored += writer.bytes_stored
        assert self._lease is not None
        self._lease.check()
        record = self._record(walk)
        manifest = Manifest(
            history.manifest.number + 1,
            self._lease.epoch,
            walk.diff.next_lin,
            runs,
            [*history.manifest.snapshots, record],
        )
        history.commit(manifest)
        head = Head(manifest.number, self._snapshot, False, walk.counts, self._signature, 0)
        self._state.clear_adopted()
        self._state.finish(head, walk.changed)
        return record

    def _adopted_orphans(self) -> list[bytes]:
        return sorted(self._adopted.intersection(self._orphans))

    def _store_rows(self, made_up: list[Meta | Entry]) -> None:
        """Write the coordinator's own rows into a pack, like all rows."""
        if not made_up:
            return
        from concurrent.futures import ThreadPoolExecutor

        repository = self._job.repository
        with ThreadPoolExecutor(1) as uploader:
            packer = Packer(
                repository.store,
                repository.keyring,
                PackSettings(
                    self._job.record.id,
                    self._snapshot,
                    self._settings.block_size,
                    self._settings.max_pack_bytes,
                    self._settings.level,
                    self._settings.verify_packs,
                    self._settings.pack_time_limit_s,
                    self._job.host,
                ),
                entropy=repository.entropy,
                clock_ns=repository.clock_ns,
                uploader=uploader,
            )
            for row in made_up:
                if isinstance(row, Meta):
                    packer.rows.metas.append(row)
                else:
                    packer.rows.entries.append(row)
            packer.finish()
        self._spool.add(packer.pages)
        self._packs.extend(packer.pack_rows)
        self._bytes_stored += packer.bytes_stored

    def _record(self, walk: Walk) -> SnapshotRecord:
        now_ns = self._job.repository.clock_ns()
        tally, counts = walk.diff.tally, walk.counts
        stats = SnapshotStats(
            counts.files,
            counts.dirs,
            counts.symlinks,
            counts.others,
            counts.bytes,
            tally.new,
            tally.changed,
            tally.moved,
            tally.deleted,
            len(self._errors),
            self._bytes_read,
            self._bytes_stored,
            len(self._packs),
            (self._all_requests()).requests,
            now_ns - self._started_ns,
        )
        taken_ns = self._started_ns
        if self._previous is not None:
            taken_ns = max(taken_ns, self._previous.time_ns + 1)
        tags = list(self._settings.tags)
        return SnapshotRecord(self._snapshot, taken_ns, "scan", False, self._job.host, tags, stats)

    def _all_requests(self) -> Requests:
        return self._job.repository.store.counts() + self._requests

    def _result(self, record: SnapshotRecord | None, walk: Walk) -> SyncResult:
        tally = walk.diff.tally
        return SyncResult(
            record,
            self._previous,
            sorted(self._errors),
            self._all_requests(),
            tally.new,
            tally.changed,
            tally.moved,
            tally.deleted,
            self._job.repository.clock_ns() - self._started_ns,
        )


def _signature(job: SyncJob) -> bytes:
    """A digest of what decides which items a walk sees: another one, and all is looked at."""
    settings = job.settings
    return xxhash.xxh3_128_digest(msgspec.msgpack.encode([settings.sources, settings.filters]))
