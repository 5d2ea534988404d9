"""What a worker process does: assignments into packs and rows, parts of a scan.

A worker keeps nothing between assignments but what is open, so any assignment can be run again by
any worker. Results carry encoded pages: rows are encoded and sorted here, not by the coordinator.
"""

from __future__ import annotations

import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from cloudfs.backup.data import DataReader
from cloudfs.backup.describe import Describer
from cloudfs.backup.files import FileReader
from cloudfs.backup.packs import Packer, PackSettings
from cloudfs.core.changes import Absent, DirRecord, DirTask
from cloudfs.core.manifest import Manifest
from cloudfs.core.rows import PackRow
from cloudfs.db.state import SyncState
from cloudfs.format.tables import Page
from cloudfs.repo.history import History
from cloudfs.repo.repository import PolicyRecord, Repository
from cloudfs.repo.view import SnapshotView
from cloudfs.source.filters import Filters
from cloudfs.source.inode import Inode, Status
from cloudfs.source.roots import RootPlaces, Roots
from cloudfs.source.scan import Lookup, Scanner, ScanOutcome, ScanPart
from cloudfs.store.count import Counts as Requests

ADOPTED_KEY = struct.Struct(">QQqq")
"""Inode, size, mtime and ctime in ns: by these a file is known that an earlier sync packed."""


class SyncContext(msgspec.Struct, frozen=True):
    """What all assignments of one sync share; the same for every worker."""

    policy: PolicyRecord
    settings: PackSettings
    places: RootPlaces
    filters: Filters
    manifest: Manifest
    base: int  # snapshot to compare with; 0 for none
    state_dir: str
    adopting: bool
    frozen_ns: int | None  # when what is read stood still; None: it is the tree itself
    mapped: list[Inode]  # files that are mapped shared and writable


class Assignment(msgspec.Struct, array_like=True):
    """Tasks, and the first of the LINs kept for large attributes."""

    tasks: list[DirTask]
    spare_lins: int


class Done(msgspec.Struct, array_like=True):
    """What came of an assignment. Sizes in bytes."""

    pages: list[Page]
    packs: list[PackRow]
    errors: list[tuple[bytes, str]]
    absent: list[Absent]
    adopted: list[bytes]
    parts: list[tuple[int, int, int, int]]
    items: int
    bytes_read: int
    bytes_stored: int
    requests: Requests


class Worker:
    """One process's side of one sync; also used by the coordinator itself for small syncs."""

    def __init__(self, repository: Repository, context: SyncContext) -> None:
        self._repository = repository
        self._context = context
        self._roots = Roots(context.places)
        frozen_ns = context.frozen_ns
        clock_ns = time.time_ns if frozen_ns is None else lambda: frozen_ns
        mapped = frozenset(context.mapped)
        self.scanner = Scanner(self._roots, context.filters, clock_ns, mapped)
        self._uploader = ThreadPoolExecutor(1, "upload")
        self._state: SyncState | None = None
        self._view: SnapshotView | None = None

    @property
    def state(self) -> SyncState:
        """The local state, opened for reading."""
        if self._state is None:
            self._state = SyncState(Path(self._context.state_dir), writer=False)
        return self._state

    def use_state(self, state: SyncState) -> None:
        """Share the state that this very process has open: LMDB allows it to be opened once."""
        self._state = state

    def use_view(self, view: SnapshotView | None) -> None:
        """Share the view of the last snapshot."""
        self._view = view

    def _base_view(self) -> SnapshotView | None:
        context = self._context
        if self._view is None and context.base:
            history = History(self._repository, context.policy, manifest=context.manifest)
            self._view = history.view(context.base)
        return self._view

    def _adopted(self, status: Status) -> dict[int, bytes]:
        key = ADOPTED_KEY.pack(status.ino, status.size, status.mtime_ns, status.ctime_ns)
        found = {}
        for value in self.state.adopted(key):
            found[int.from_bytes(value[:8], "big")] = value[8:]
        return found

    def pack(self, assignment: Assignment) -> Done:
        """Run one assignment; all its packs are durable when this returns."""
        context, repository = self._context, self._repository
        before = repository.store.counts()
        packer = Packer(
            repository.store,
            repository.keyring,
            context.settings,
            entropy=repository.entropy,
            clock_ns=repository.clock_ns,
            uploader=self._uploader,
        )
        snapshot, block_size = context.settings.snapshot, context.settings.block_size
        seed, view = repository.keyring.digest_seed, self._base_view()
        describer = Describer(
            packer,
            snapshot,
            block_size,
            seed,
            view,
            assignment.spare_lins,
            context.settings.first_new_lin,
        )
        data = DataReader(
            packer, block_size, seed, view, self._adopted if context.adopting else None
        )
        reader = FileReader(packer, snapshot, block_size, describer, data, self._roots.reader())
        items = 0
        for task in assignment.tasks:
            reader.run(self._roots, task)
            items += sum(count for _, count in task.lins) if task.items is None else len(task.items)
        packer.finish()
        outcome = reader.outcome
        return Done(
            packer.pages,
            packer.pack_rows,
            outcome.errors,
            outcome.absent,
            sorted(data.packs_adopted),
            outcome.parts,
            items,
            data.bytes_read,
            packer.bytes_stored,
            repository.store.counts() - before,
        )

    def scan(self, part: ScanPart) -> ScanOutcome:
        """Visit directories."""
        lookup: Lookup = self.state.record if part.trust else self._unlike_any
        return self.scanner.run(part, lookup)

    def _unlike_any(self, lin: int) -> DirRecord | None:
        """The record of a directory, as one that no listing is like."""
        record = self.state.record(lin)
        return None if record is None else msgspec.structs.replace(record, signature=b"")

    def close(self) -> None:
        """Close directories; wait for uploads."""
        self._uploader.shutdown(wait=True)
        self._roots.close()


_worker: tuple[bytes, Worker] | None = None


def _current(context: bytes) -> Worker:
    """This process's worker for a sync, made when its first task comes."""
    global _worker  # noqa: PLW0603  # a worker process serves one sync
    from cloudfs.repo.pool import repository

    if _worker is None or _worker[0] != context:
        decoded = msgspec.msgpack.decode(context, type=SyncContext)
        _worker = (context, Worker(repository(), decoded))
    return _worker[1]


def pack_task(context: bytes, assignment: bytes) -> bytes:
    """Entry point in a worker process: :meth:`Worker.pack` over encoded values."""
    decoded = msgspec.msgpack.decode(assignment, type=Assignment)
    return msgspec.msgpack.encode(_current(context).pack(decoded))


def scan_task(context: bytes, part: bytes) -> bytes:
    """Entry point in a worker process: :meth:`Worker.scan` over encoded values."""
    decoded = msgspec.msgpack.decode(part, type=ScanPart)
    return msgspec.msgpack.encode(_current(context).scan(decoded))
