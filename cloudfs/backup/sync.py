"""A sync: from the live tree to a snapshot in the repository.

1. Only one sync of a policy runs at a time: a lock on this machine, a lease in the repository.
2. The local state is brought to the repository's last snapshot, by rebuilding it if need be. If a
   sync did not end, what it stored is offered to this one.
3. The tree is walked; what is new, changed, moved or gone becomes tasks and tombstones. Where a
   sample of the rest is looked at, and something in it differs, all is given up and begun anew,
   without the source's changelist.
4. Workers turn tasks into packs, which are durable when a task is done.
5. The rows of all of it become a segment, and runs are merged if they are too many.
6. The next manifest is committed: only now the snapshot exists. If anything fails before, nothing
   was changed, and what was stored is found by the next sync.
7. The local state follows. If that fails, the next sync rebuilds it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from cloudfs.backup.attempt import Attempt
from cloudfs.backup.coalesce import PageSpool
from cloudfs.backup.exclusive import held_lease, local_lock
from cloudfs.backup.job import SyncEvents, SyncJob, SyncResult, SyncSettings
from cloudfs.backup.sources import btrfs_source, external_source, leave
from cloudfs.backup.trust import signature_of, why_not_trusted
from cloudfs.backup.verify import Differs, doubt
from cloudfs.core.errors import SourceError
from cloudfs.db.state import SyncState
from cloudfs.repo.history import History
from cloudfs.source.choose import choose
from cloudfs.source.ready import Ready, scanned
from cloudfs.source.roots import RootPlaces, Roots


def sync(job: SyncJob, events: SyncEvents) -> SyncResult:
    """Run one sync. Raises CloudfsError; then the old snapshots are whole and nothing is new."""
    directory = job.state_dir
    with contextlib.ExitStack() as stack:
        stack.enter_context(local_lock(directory, job.settings.name, job.wait_s, events.note))
        history = stack.enter_context(contextlib.closing(History(job.repository, job.record)))
        lease, took_over = stack.enter_context(held_lease(job, history, events))
        state = stack.enter_context(contextlib.closing(SyncState(directory, writer=True)))
        source = stack.enter_context(_ready(job, directory, state, history, events))
        places = RootPlaces(
            job.settings.sources, source.at, source.nested, source.through_mount, source.beneath
        )
        roots = stack.enter_context(contextlib.closing(Roots(places)))

        def begin() -> Attempt:
            spool = PageSpool(job.repository.local.state_dir / "spool")
            stack.enter_context(contextlib.closing(spool))
            return Attempt(job, events, source, places, roots, history, state, lease, spool)

        running = begin()
        try:
            result = running.run(took_over)
        except Differs as found:
            # What was begun is given up, as if it had not ended; this one looks for itself.
            events.differs(source.kind if found.changelist else "scan", found.verified)
            doubt(state, found.verified.differences)
            source.changes = None
            running = begin()
            running.verified = found.verified
            result = running.run(took_over=True)
    result.requests = running.requests()  # giving the lease back was one more
    return result


def _ready(
    job: SyncJob, directory: Path, state: SyncState, history: History, events: SyncEvents
) -> contextlib.AbstractContextManager[Ready]:
    """The tree as the policy's source gives it."""
    settings = job.settings
    chosen = choose(settings.source, settings.sources)
    if not job.dry_run:  # a policy may have been changed by hand
        leave(settings, job.record.id, directory, events.note, used=chosen)
    if chosen == "external":
        return _external(job, directory, state, history, events)
    if chosen == "btrfs":
        btrfs = btrfs_source(settings, job.record.id, directory, events.note)
        head = state.head
        return btrfs.ready(head.snapshot, head.taken_ns, head.counts.items)
    if chosen == "live":
        from cloudfs.source.live.protocol import Base
        from cloudfs.source.live.session import LiveSource

        directory = job.repository.local.live_dir(settings.name)
        live = LiveSource(settings.sources, directory, settings.filters.leaves_out)
        head, last = state.head, history.manifest.last_snapshot
        base = Base(head.snapshot, head.taken_ns)
        marked_only = (
            not settings.verify
            and not head.again
            and not why_not_trusted(head, signature_of(settings))
            and not settings.filters.by_name  # what was left out can come in by being moved
            and last is not None
            and base == Base(last.number, last.time_ns)
        )
        return live.ready(settings.name, base, whole=not marked_only)
    if chosen == "watch":
        from cloudfs.source.watch.session import WatchSource

        directory = job.repository.local.watch_dir(settings.name)
        watch = WatchSource(settings.name, settings.sources, directory, settings.filters)
        return watch.ready(state.head.snapshot, state.head.taken_ns)
    return contextlib.nullcontext(scanned(settings.sources, _no_btrfs(settings, history)))


def _no_btrfs(settings: SyncSettings, history: History) -> list[str]:
    """What is to be said where a policy went by btrfs and does not now, though nobody chose so."""
    last = history.manifest.last_snapshot
    if settings.source != "auto" or last is None or last.source != "btrfs":
        return []
    from cloudfs.source.btrfs.subvolume import is_subvolume

    return [
        f"the last snapshot was taken by btrfs, but {os.fsdecode(source)} is no subvolume now, so"
        " the tree is scanned. Is its drive mounted?"
        for source in settings.sources
        if not is_subvolume(source)
    ][:1]


def _external(
    job: SyncJob, directory: Path, state: SyncState, history: History, events: SyncEvents
) -> contextlib.AbstractContextManager[Ready]:
    """The tree as the policy's commands give it."""
    settings, last = job.settings, history.manifest.last_snapshot
    if settings.external is None:
        raise SourceError("the policy has no commands. Give it external_snapshot, at least.")
    view = history.view(last.number) if last is not None else None

    def born_ns(lin: int) -> int | None:
        meta = view.meta(lin) if view is not None else None
        return meta.btime_ns if meta is not None else None

    external = external_source(
        settings,
        job.record.id,
        directory,
        settings.external,
        events.note,
        lambda: job.check_stop(last.number + 1 if last is not None else 1),
    )
    return external.ready(state, born_ns)
