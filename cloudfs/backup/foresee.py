"""What the next sync of a policy would go by, told without taking a snapshot or seeing the tree.

1. The source itself is asked, as a sync would ask it: whether what it knows counts from the last
   snapshot, and how much that is.
2. The local state must be at that snapshot, with the sources and filters of the policy as they are
   now; otherwise the sync scans, whatever the source knows.
"""

from __future__ import annotations

from dataclasses import replace

from cloudfs.backup.job import SyncSettings
from cloudfs.backup.sources import btrfs_source, external_source
from cloudfs.backup.trust import signature_of, why_not_trusted
from cloudfs.core.manifest import SnapshotRecord
from cloudfs.db.local import LocalState
from cloudfs.db.state import read_head
from cloudfs.repo.repository import PolicyRecord
from cloudfs.source.choose import choose
from cloudfs.source.state import SourceState, scanning


def foresee(
    settings: SyncSettings,
    record: PolicyRecord,
    repository_id: str,
    local: LocalState,
    last: SnapshotRecord | None,
) -> SourceState:
    """How it stands with the source of a policy whose last snapshot is ``last``. Raises SourceError
    where the policy's source cannot be had at all."""
    kind = choose(settings.source, settings.sources)
    if kind == "scan":
        return scanning(kind, "time stamps are compared")
    if last is None:
        return scanning(kind, "it is the first")
    directory = local.policy_dir(repository_id, record.id)
    head = read_head(directory)
    items = head.counts.items if head is not None else 0
    found = _asked(kind, settings, record, local, repository_id, last, items)
    if not found.complete:
        return found
    if head is None or (head.snapshot, head.taken_ns) != (last.number, last.time_ns):
        reason = "the local state is not that of the last snapshot"
    else:
        reason = why_not_trusted(head, signature_of(settings))
    return replace(found, complete=False, reason=reason) if reason else found


def _asked(
    kind: str,
    settings: SyncSettings,
    record: PolicyRecord,
    local: LocalState,
    repository_id: str,
    last: SnapshotRecord,
    items: int,
) -> SourceState:
    """What the source itself says."""
    directory = local.policy_dir(repository_id, record.id)
    at = last.number, last.time_ns
    if kind == "watch":
        from cloudfs.source.watch.session import WatchSource

        place = local.watch_dir(settings.name)
        watch = WatchSource(settings.name, settings.sources, place, settings.filters)
        return watch.state(*at)
    if kind == "btrfs":
        return btrfs_source(settings, record.id, directory).state(*at, items)
    if kind == "live":
        from cloudfs.source.live.session import LiveSource

        return LiveSource(settings.sources, local.live_dir(settings.name)).state(*at)
    if settings.external is None:
        return scanning(kind, "the policy has no commands")
    return external_source(settings, record.id, directory, settings.external).state(*at)
