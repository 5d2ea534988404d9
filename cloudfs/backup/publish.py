"""From what the workers stored to a snapshot that exists: segment, merge, manifest.

1. The coordinator's own rows (tombstones, a made-up root) go into a pack like all others.
2. The pages of all packs become a run; runs are merged if they are too many.
3. The manifest that names them is committed. Before that nothing was changed. Then the newest
   manifest is looked at: a process that was stopped for long may have committed under a number
   that others used and deleted since, and that makes no snapshot.
4. Segments that a merge replaced are named as retired, and deleted by a commit at least GRACE_NS
   later: who reads by an older manifest has that long to end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import msgspec

from cloudfs.backup.coalesce import PageSpool, RunWriter, merge_runs
from cloudfs.backup.packs import Packer, PackSettings
from cloudfs.backup.worker import Done
from cloudfs.core.changes import Absent
from cloudfs.core.errors import Held, StoreError
from cloudfs.core.manifest import Manifest, Retired, Run, SnapshotRecord
from cloudfs.core.rows import Entry, Meta, PackRow, Table
from cloudfs.format import names
from cloudfs.repo.history import History
from cloudfs.repo.lease import Lease
from cloudfs.store.count import Counts as Requests

GRACE_NS = 3600 * 1_000_000_000


@dataclass
class Collected:
    """What the assignments of one sync brought together. Sizes in bytes."""

    spool: PageSpool
    packs: list[PackRow] = field(default_factory=list)
    errors: list[tuple[bytes, str]] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)
    adopted: set[bytes] = field(default_factory=set)
    parts: dict[int, set[tuple[int, int, int]]] = field(default_factory=dict)
    requests: Requests = field(default_factory=Requests)
    items: int = 0
    bytes_read: int = 0
    bytes_stored: int = 0

    def take(self, done: Done) -> None:
        """Add what came of one assignment."""
        self.spool.add(done.pages)
        self.packs.extend(done.packs)
        self.errors.extend(done.errors)
        self.absent.extend(done.absent)
        self.adopted.update(done.adopted)
        for lin, mtime_ns, ctime_ns, size in done.parts:
            self.parts.setdefault(lin, set()).add((mtime_ns, ctime_ns, size))
        self.requests += done.requests
        self.items += done.items
        self.bytes_read += done.bytes_read
        self.bytes_stored += done.bytes_stored

    def torn_files(self) -> list[int]:
        """LINs of files whose parts were read in different states."""
        return [lin for lin, versions in self.parts.items() if len(versions) > 1]


class Publisher:
    """Writes what makes a snapshot, in the order in which it must be written."""

    def __init__(self, history: History, lease: Lease, settings: PackSettings) -> None:
        self._history = history
        self._repository = history.repository
        self._lease = lease
        self._settings = settings

    def store_rows(self, rows: Sequence[Meta | Entry], collected: Collected) -> None:
        """Store the coordinator's own rows."""
        if not rows:
            return
        with ThreadPoolExecutor(1) as uploader:
            packer = Packer(
                self._repository.store,
                self._repository.keyring,
                self._settings,
                entropy=self._repository.entropy,
                clock_ns=self._repository.clock_ns,
                uploader=uploader,
            )
            for row in rows:
                if isinstance(row, Meta):
                    packer.rows.metas.append(row)
                else:
                    packer.rows.entries.append(row)
            packer.finish()
        collected.spool.add(packer.pages)
        collected.packs.extend(packer.pack_rows)
        collected.bytes_stored += packer.bytes_stored

    def publish(
        self,
        collected: Collected,
        adopted: list[PackRow],
        next_lin: int,
        record: Callable[[], SnapshotRecord],
    ) -> Manifest:
        """Write segments and commit; ``record`` is asked when all but the manifest is stored.

        Raises Held when the lease was lost; then nothing has changed.
        """
        snapshot = self._settings.snapshot
        rows = [msgspec.structs.replace(pack, snap=snapshot) for pack in adopted]
        rows = sorted([*collected.packs, *rows], key=lambda pack: pack.name)
        collected.spool.add_rows(Table.PACKS, list(rows))
        writer = RunWriter(self._repository, self._settings.policy_id)
        run = writer.write(collected.spool.ordered(), snapshot, snapshot)
        before = self._history.manifest
        runs = [*before.runs, run] if run.segments else before.runs
        runs = merge_runs(self._history, runs, writer, collected.spool.directory)
        collected.bytes_stored += writer.bytes_stored
        self._lease.check()
        now_ns = self._repository.clock_ns()
        due = [old for old in before.retired if old.time_ns + GRACE_NS < now_ns]
        manifest = Manifest(
            before.number + 1,
            self._lease.epoch,
            next_lin,
            runs,
            [*before.snapshots, record()],
            [old for old in before.retired if old not in due]
            + [Retired(name, now_ns) for name in _segments(before.runs) - _segments(runs)],
        )
        self._history.commit(manifest)
        self._confirm(manifest.snapshots[-1])
        if due:
            # What is not deleted now is garbage that nothing names: reclaiming finds it.
            with contextlib.suppress(StoreError):
                policy_id = self._settings.policy_id
                self._repository.store.delete([names.segment(policy_id, o.name) for o in due])
        return manifest

    def _confirm(self, record: SnapshotRecord) -> None:
        """Raise Held when the snapshot is not among those that the repository shows (rule 3)."""
        self._history.refresh()
        if record not in self._history.snapshots:
            raise Held(
                f"another machine took over {self._history.policy.name} while this sync was stopped"
                " or without a connection. Its snapshot was not made; run the sync again."
            )


def _segments(runs: list[Run]) -> set[bytes]:
    return {segment.name for run in runs for segment in run.segments}
