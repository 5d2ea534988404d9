"""One attempt at a sync: rules 2 to 7 of :mod:`cloudfs.backup.sync`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence

import msgspec

from cloudfs.backup.adopt import adopt
from cloudfs.backup.coalesce import PageSpool
from cloudfs.backup.dispatch import Dispatcher
from cloudfs.backup.job import (
    SyncEvents,
    SyncJob,
    SyncResult,
    Verified,
)
from cloudfs.backup.packs import PackSettings
from cloudfs.backup.publish import Collected, Publisher
from cloudfs.backup.rebuild import rebuild
from cloudfs.backup.revisit import Revisit
from cloudfs.backup.trust import signature_of, why_not_trusted
from cloudfs.backup.unread import Unread
from cloudfs.backup.verify import Against, Differs, NotingQueue, Sample, Verifier
from cloudfs.backup.walk import QUOTA, Walk
from cloudfs.backup.worker import SyncContext, Worker
from cloudfs.core.assign import WorkQueue
from cloudfs.core.changelist import Changelist
from cloudfs.core.manifest import SnapshotRecord, SnapshotStats
from cloudfs.core.rows import Entry, Meta, PackRow
from cloudfs.db.state import Head, SyncState
from cloudfs.repo.history import History
from cloudfs.repo.lease import Lease
from cloudfs.repo.pool import WorkerOpening
from cloudfs.repo.view import SnapshotView
from cloudfs.source.ready import Ready
from cloudfs.source.roots import RootPlaces, Roots
from cloudfs.source.scan import Scanner, ScanOutcome, ScanPart
from cloudfs.source.unseen import mapped
from cloudfs.store.count import Counts as Requests

PART_BYTES = 64 << 20
"""Files larger than this are shared by several workers."""

MAX_QUEUED_LISTINGS = 32 << 20
PARALLEL_SCAN_ITEMS = 150_000
"""From so many items on (as of the last snapshot) the walk itself is shared by the workers."""

POOL_ITEMS = 2000
"""When a walk has met so many items that differ, workers are started while it goes on."""


class Attempt:
    """The steps of one sync, in order."""

    def __init__(
        self,
        job: SyncJob,
        events: SyncEvents,
        source: Ready,
        places: RootPlaces,
        roots: Roots,
        history: History,
        state: SyncState,
        lease: Lease | None,
        spool: PageSpool,
    ) -> None:
        self._job = job
        self._events = events
        self._source = source
        self._places = places
        self._roots = roots
        self._history = history
        self._state = state
        self._lease = lease
        self._started_ns = job.repository.clock_ns()
        self._previous = history.manifest.last_snapshot
        self._view: SnapshotView | None = None
        if self._previous is not None:
            self._view = history.view(self._previous.number)
        self._signature = signature_of(job.settings)
        self._orphans: dict[bytes, PackRow] = {}
        self._collected = Collected(spool)
        self._packing = self._pack_settings()
        self._rebuilt = False  # the local state, from the repository
        self._was_running = False  # a sync before a dry run
        self.verified: Verified | None = None  # given, where that was done before this attempt

    @property
    def _snapshot(self) -> int:
        return self._packing.snapshot

    def run(self, took_over: bool) -> SyncResult:
        """All steps. Raises CloudfsError, or Differs, before anything is committed."""
        self._events.phase("scanning")
        self._prepare(took_over)
        settings, state = self._job.settings, self._state
        queue: WorkQueue = self._queue()
        trust = state.head.signature == self._signature
        next_lin = self._history.manifest.next_lin
        changes = self._changes(trust=trust)
        walk = (Walk if changes is None else Revisit)(
            self._roots,
            state,
            self._view,
            next_lin,
            queue,
            now_ns=self._source.frozen_ns or time.time_ns(),
            trust=trust,
            stable_inodes=changes is not None and self._source.stable_inodes,
        )
        context = SyncContext(
            self._job.record,
            self._packing,
            self._places,
            settings.filters,
            self._history.manifest,
            0 if self._view is None else self._view.number,
            str(self._job.state_dir),
            bool(self._orphans),
            self._source.frozen_ns,
            sorted(mapped()) if self._source.frozen_ns is None else [],
        )
        worker = Worker(self._job.repository, context)
        worker.use_state(state)
        worker.use_view(self._view)
        dispatcher = self._dispatcher(context, worker, walk)
        finished = False
        try:
            if changes is not None and isinstance(walk, Revisit):
                self._walk_changes(walk, queue, dispatcher, worker.scanner, changes)
            else:
                self._walk_all(walk, queue, dispatcher)
            if isinstance(queue, NotingQueue):
                self._verify(queue, changelist=changes is not None)
            self._pack(walk, queue, dispatcher)
            finished = True
        finally:
            dispatcher.close(cancel=not finished)
            worker.close()
        return self._conclude(walk)

    # -- before ----------------------------------------------------------------------------------

    def _pack_settings(self) -> PackSettings:
        settings = self._job.settings
        return PackSettings(
            self._job.record.id,
            self._previous.number + 1 if self._previous else 1,
            self._history.manifest.next_lin,
            settings.block_size,
            settings.max_pack_bytes,
            settings.level,
            settings.verify_packs,
            settings.pack_time_limit_s,
            self._job.host,
        )

    def _prepare(self, took_over: bool) -> None:
        """Bring the local state to the last snapshot; find what unfinished syncs stored."""
        state = self._state
        unclean = state.head.running or took_over or self._view is None
        head, record = state.head, self._view.record if self._view else None
        at = (record.number, record.time_ns) if record else (0, 0)
        if (head.snapshot, head.taken_ns) != at:
            unclean = self._rebuilt = True
            if self._view is None:
                state.clear()
            else:
                self._events.note("the local state is made anew from the repository")
                rebuild(state, self._view, self._history.manifest, self._signature)
        elif state.head.running:
            state.drop_unfinished()
        if self._lease is not None and unclean:
            state.clear_adopted()
            self._orphans = adopt(self._history, state)
        self._was_running = state.head.running
        state.save_head(msgspec.structs.replace(state.head, running=True))

    def _queue(self) -> WorkQueue:
        block_size = self._job.settings.block_size
        if self._job.settings.verify and self._view is not None and self.verified is None:
            return NotingQueue(block_size, PART_BYTES, self._history.manifest.next_lin)
        return WorkQueue(block_size, PART_BYTES)

    def _dispatcher(self, context: SyncContext, worker: Worker, walk: Walk) -> Dispatcher:
        settings, repository = self._job.settings, self._job.repository
        workers = settings.workers or len(os.sched_getaffinity(0))
        opening = WorkerOpening(
            settings.url,
            settings.options.shared_by(workers),
            repository.opening,
            repository.local.cache_dir,
            repository.local.state_dir,
        )
        return Dispatcher(context, worker, opening, workers, walk.diff.allot)

    # -- walking and packing ---------------------------------------------------------------------

    def _changes(self, *, trust: bool) -> Changelist | None:
        """The source's changelist, where this sync can go by it."""
        for note in self._source.notes:
            self._events.note(note)
        if self._source.changes is None or self._view is None:
            return None
        reason = "the local state was not that of the last snapshot"
        if not self._rebuilt:
            reason = why_not_trusted(self._state.head, self._signature)
        if reason:
            self._events.note(f"the snapshot is scanned: {reason}")
            return None
        return self._source.changes

    def _walk_changes(
        self,
        walk: Revisit,
        queue: WorkQueue,
        dispatcher: Dispatcher,
        scanner: Scanner,
        changes: Changelist,
    ) -> None:
        def turn() -> None:
            self._step_walking(walk, queue, dispatcher)

        def scan(parts: list[ScanPart]) -> Iterator[ScanOutcome]:
            for outcome in dispatcher.scan(parts):
                yield outcome
                turn()

        walk.run_changes(changes, scanner, scan, QUOTA, turn)

    def _walk_all(self, walk: Walk, queue: WorkQueue, dispatcher: Dispatcher) -> None:
        if walk.first:
            walking = True
            while walking:
                if queue.listing_bytes < MAX_QUEUED_LISTINGS:
                    walking = walk.step_first(dispatcher.scan_here)
                self._step(walk, queue, dispatcher, walking=walking)
        else:
            shared = self._state.head.counts.items >= PARALLEL_SCAN_ITEMS
            if shared:
                dispatcher.start_pool(for_scans=True)

            def scan(parts: list[ScanPart]) -> Iterator[ScanOutcome]:
                for outcome in dispatcher.scan(parts):
                    yield outcome
                    self._step_walking(walk, queue, dispatcher)

            if shared:
                walk.run(scan, 4 * dispatcher.workers, 4 * QUOTA)
            else:
                walk.run(scan, 1, QUOTA)

    def _step_walking(self, walk: Walk, queue: WorkQueue, dispatcher: Dispatcher) -> None:
        """A step while the walk goes on; workers are started where there will be much to do."""
        if walk.diff.waiting >= POOL_ITEMS and not self._job.dry_run:
            dispatcher.start_pool()
        self._step(walk, queue, dispatcher, walking=True)

    def _verify(self, noted: NotingQueue, *, changelist: bool) -> None:
        """Look at a sample of what is called unchanged. Raises Differs."""
        settings, counts = self._job.settings, self._state.head.counts
        items, size = int(counts.items * settings.verify), int(counts.bytes * settings.verify)

        def tell(found: Verified) -> None:
            self._check_stop()
            done = found.files + found.directories
            self._events.progress(max(items, done), done, max(size, found.bytes), found.bytes)

        assert self._view is not None
        self._events.phase("verifying")
        against = Against(
            self._roots,
            Scanner(self._roots, settings.filters),
            self._state,
            self._view,
            self._job.repository.keyring.digest_seed,
            noted,
            changelist,
            self._source.changed_since,
        )
        sample = Sample(settings.verify, self._job.salt)
        threads = settings.workers or len(os.sched_getaffinity(0))
        self.verified = Verifier(against, sample, threads, tell).run()
        if self.verified.differences:
            raise Differs(self.verified, changelist=changelist)

    def _pack(self, walk: Walk, queue: WorkQueue, dispatcher: Dispatcher) -> None:
        """Hand out what is queued, and collect what comes of it."""
        if not walk.first and not self._job.dry_run:
            self._step(walk, queue, dispatcher, walking=True)  # workers begin meanwhile
        self._events.phase("packing")
        self._bury(walk)
        if self._job.dry_run:
            return
        unread = Unread(self._state, self._packing, walk)
        while queue or dispatcher.busy or self._try_others(unread, queue):
            self._step(walk, queue, dispatcher, walking=False)
        self._store(unread.given_up)
        unread.mark()

    def _try_others(self, unread: Unread, queue: WorkQueue) -> bool:
        """Queue what is to be tried instead of what could not be read; whether there is any."""
        absent, self._collected.absent = self._collected.absent, []
        for task in unread.take(absent):
            queue.add(task, 1, 0)
        return bool(queue)

    def _bury(self, walk: Walk) -> None:
        """Store the coordinator's own rows: tombstones, a made-up root."""
        metas, entries = walk.bury(self._snapshot)
        self._store([*walk.made_up, *metas, *entries])

    def _store(self, rows: Sequence[Meta | Entry]) -> None:
        """Store rows of the coordinator's own."""
        if self._lease is not None and rows:
            Publisher(self._history, self._lease, self._packing).store_rows(rows, self._collected)

    def _step(self, walk: Walk, queue: WorkQueue, dispatcher: Dispatcher, *, walking: bool) -> None:
        self._check_stop()
        if self._job.dry_run:
            queue.take(queue.work)  # the tally is all that a dry run wants
        else:
            for done in dispatcher.feed(queue, walking=walking):
                self._collected.take(done)
        self._tell(walk)

    def _check_stop(self) -> None:
        self._job.check_stop(self._snapshot)

    def _tell(self, walk: Walk) -> None:
        collected = self._collected
        self._events.progress(
            walk.items_seen, collected.items, walk.counts.bytes, collected.bytes_read
        )

    # -- after -----------------------------------------------------------------------------------

    def _conclude(self, walk: Walk) -> SyncResult:
        told = len(self._source.notes)
        self._source.intact()
        for note in self._source.notes[told:]:
            self._events.note(note)
        collected = self._collected
        collected.errors.extend(set(walk.errors).difference(collected.errors))
        collected.errors.extend(
            (b"(LIN %d)" % lin, "changed while it was read") for lin in collected.torn_files()
        )
        if self._lease is None:  # a dry run leaves nothing behind
            self._state.drop_unfinished()
            running = self._was_running
            self._state.save_head(msgspec.structs.replace(self._state.head, running=running))
            return self._result(None, walk)
        previous = self._previous
        if previous is not None and not collected.spool and not self._job.force:
            self._state.amend(self._snapshot, walk.changed)
            self._state.save_head(self._head(self._state.head.manifest, previous, walk))
            self._source.keep(previous)
            return self._result(None, walk)
        self._check_stop()
        self._events.phase("committing")
        publisher = Publisher(self._history, self._lease, self._packing)
        adopted = [self._orphans[name] for name in sorted(collected.adopted & set(self._orphans))]
        manifest = publisher.publish(
            collected, adopted, walk.diff.next_lin, lambda: self._record(walk)
        )
        made = manifest.snapshots[-1]
        self._state.clear_adopted()
        self._state.finish(self._head(manifest.number, made, walk), walk.changed)
        self._source.keep(made)
        return self._result(made, walk)

    def _head(self, manifest: int, record: SnapshotRecord, walk: Walk) -> Head:
        return Head(
            manifest,
            record.number,
            False,
            walk.counts,
            self._signature,
            record.time_ns,
            again=sorted(walk.unread - {0}),
            unvisited=sorted(walk.unvisited),
            apart=self._state.head.apart or bool(walk.unvisited),
        )

    def _record(self, walk: Walk) -> SnapshotRecord:
        now_ns = self._job.repository.clock_ns()
        tally, counts, collected = walk.diff.tally, walk.counts, self._collected
        stats = SnapshotStats(
            files=counts.files,
            dirs=counts.dirs,
            symlinks=counts.symlinks,
            others=counts.others,
            bytes_total=counts.bytes,
            new=tally.new,
            changed=tally.changed,
            moved=tally.moved,
            deleted=tally.deleted,
            unreadable=len(collected.errors),
            bytes_read=collected.bytes_read,
            bytes_stored=collected.bytes_stored,
            packs=len(collected.packs),
            requests=self.requests().requests,
            duration_ns=now_ns - self._started_ns,
        )
        source = self._source
        taken_ns = source.frozen_ns or self._started_ns
        if self._previous is not None:  # a clock set back must not put snapshots out of order
            taken_ns = max(taken_ns, self._previous.time_ns + 1)
        tags = list(self._job.settings.tags)
        frozen = source.frozen_ns is not None and source.consistent
        return SnapshotRecord(
            self._snapshot, taken_ns, source.kind, frozen, self._job.host, tags, stats
        )

    def requests(self) -> Requests:
        """What was asked of the store up to now."""
        return self._job.repository.store.counts() + self._collected.requests

    def _result(self, record: SnapshotRecord | None, walk: Walk) -> SyncResult:
        tally = walk.diff.tally
        return SyncResult(
            record,
            self._previous,
            sorted(self._collected.errors),
            self.requests(),
            tally.new,
            tally.changed,
            tally.moved,
            tally.deleted,
            self._job.repository.clock_ns() - self._started_ns,
            verified=self.verified,
        )
