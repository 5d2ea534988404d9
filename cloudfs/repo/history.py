"""The history of one policy: its manifest, read and committed, and the snapshots in it.

Committing is one conditional write of the next manifest (see :mod:`cloudfs.core.manifest`). A
store may lose the answer to a write that it did: after a conflict the manifest that is there is
read back, and if it is the very one that was to be written, the commit has succeeded.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from datetime import datetime, timedelta

import msgspec

from cloudfs.core.errors import AlreadyExists, Damaged, Held, NoRepository, StoreError, UsageError
from cloudfs.core.manifest import EMPTY, Manifest, SnapshotRecord
from cloudfs.core.rows import Row, Table
from cloudfs.db.local import Seen
from cloudfs.format import names
from cloudfs.format.envelope import SALT_SIZE, Kind, open_object, seal_object
from cloudfs.repo.blocks import BlockReader
from cloudfs.repo.repository import PolicyRecord, Repository
from cloudfs.repo.tables import TableReader
from cloudfs.repo.view import SnapshotView, all_versions

KEEP_MANIFESTS = 16
"""Older manifests than this many before the newest are deleted, KEEP_MANIFESTS at a time."""

HEAD_LIMIT = 2 * KEEP_MANIFESTS + 8


class History:
    """One policy's manifest and what can be read through it."""

    def __init__(
        self, repository: Repository, policy: PolicyRecord, *, manifest: Manifest | None = None
    ) -> None:
        """Reads the newest manifest: two requests, none where ``manifest`` is given."""
        self.repository = repository
        self.policy = policy
        self.url = repository.url
        cache = repository.local.cache(repository.id)
        near = repository.url.startswith("file:")
        self.tables = TableReader(repository.store, repository.keyring, cache, policy.id)
        self.reader = BlockReader(
            repository.store, repository.keyring, None if near else cache, policy.id
        )
        self.leases: list[int] = []
        self.manifest = EMPTY
        if manifest is not None:
            self.manifest = manifest
        else:
            self.refresh(first=True)

    @property
    def snapshots(self) -> list[SnapshotRecord]:
        """The snapshots in force, oldest first."""
        return self.manifest.snapshots

    def refresh(self, *, first: bool = False) -> bool:
        """Take the newest manifest up; True if it is newer than the one at hand.

        One request, and one more when there is something new. Also notes the epochs of the leases
        that lie beside it. Raises RolledBack when the store offers an older one than was seen, or
        another one of that number.
        """
        newest, all_seen = self._look(HEAD_LIMIT)
        if not newest and not all_seen:  # leases of dead syncs, or a stranger's objects, in front
            newest, _ = self._look(None)
        local = self.repository.local
        local.check_seen(self.repository.id, self.policy.id, newest, self.url)
        if newest <= self.manifest.number:
            return False
        manifest, seen = self._read(newest)
        local.check_same(self.repository.id, self.policy.id, seen, self.url)
        self.manifest = manifest
        local.remember_seen(self.repository.id, self.policy.id, seen)
        return True

    def _look(self, limit: int | None) -> tuple[int, bool]:
        """List the head: the number of the newest manifest, 0 for none; whether that was all."""
        self.leases, newest, count = [], 0, 0
        for info in self.repository.store.list(names.head(self.policy.id), limit=limit):
            count += 1
            kind, number = names.parse_head(self.policy.id, info.name) or ("", 0)
            if kind == "lease":
                self.leases.append(number)
            elif kind == "manifest":
                newest = max(newest, number)
        return newest, count != limit

    def _read(self, number: int) -> tuple[Manifest, Seen]:
        """A manifest, and what is to be remembered of it."""
        name = names.manifest(self.policy.id, number)
        data = self.repository.store.get(name)
        plain = open_object(self.repository.keyring, Kind.MANIFEST, name, data)
        try:
            manifest = msgspec.msgpack.decode(plain, type=Manifest)
        except (msgspec.DecodeError, msgspec.ValidationError):
            raise Damaged(f"{name} is damaged (it holds no manifest).") from None
        if manifest.number != number:
            raise Damaged(f"{name} is damaged (it says it is number {manifest.number}).")
        return manifest, Seen(number, _digest(data))

    def commit(self, manifest: Manifest) -> None:
        """Put the next manifest in force. Durable when it returns; raises Held when raced.

        ``manifest.number`` must be one above the one at hand.
        """
        assert manifest.number == self.manifest.number + 1
        name = names.manifest(self.policy.id, manifest.number)
        plain = msgspec.msgpack.encode(manifest)
        salt = self.repository.entropy(SALT_SIZE)
        sealed = seal_object(self.repository.keyring, Kind.MANIFEST, name, plain, salt)
        try:
            self.repository.store.put(name, [sealed], if_absent=self.repository.config.conditional)
        except AlreadyExists:
            if self.repository.store.get(name) != sealed:
                raise Held(
                    f"another machine synced {self.policy.name} meanwhile and took over."
                    " Nothing was changed by this sync; run it again."
                ) from None
        self.manifest = manifest
        seen = Seen(manifest.number, _digest(sealed))
        self.repository.local.remember_seen(self.repository.id, self.policy.id, seen)
        self._drop_old()

    def _drop_old(self) -> None:
        """Delete manifests long superseded. What fails is left: garbage that nobody reads."""
        number = self.manifest.number - KEEP_MANIFESTS
        if number > 0 and number % KEEP_MANIFESTS == 0:
            old = range(number - KEEP_MANIFESTS + 1, number + 1)
            with contextlib.suppress(StoreError):
                self.repository.store.delete([names.manifest(self.policy.id, n) for n in old])

    # -- snapshots -------------------------------------------------------------------------

    def view(self, number: int) -> SnapshotView:
        """One snapshot as a tree."""
        for record in self.snapshots:
            if record.number == number:
                return SnapshotView(self.tables, self.reader, self.manifest.runs, record)
        raise NoRepository(f"{self.policy.name} has no snapshot {number}; {self._hint()}")

    def _hint(self) -> str:
        return f"`cloudfs snapshots {self.policy.name}` lists them."

    def find(self, spec: str) -> SnapshotRecord:
        """The snapshot that is named "latest", "latest~2", by number, or by local time.

        A time means the newest snapshot at or before it; a date, the newest of that day or before.
        Raises NoRepository when there is none and UsageError for what names none.
        """
        if not self.snapshots:
            raise NoRepository(
                f"{self.policy.name} has no snapshots yet;"
                f" `cloudfs sync {self.policy.name}` makes one."
            )
        word, _, back = spec.partition("~")
        steps = _decimal(back) if back else 0
        if word == "latest" and steps is not None:
            if steps >= len(self.snapshots):
                raise NoRepository(f"{self.policy.name} has no {spec}; {self._hint()}")
            return self.snapshots[-1 - steps]
        number = _decimal(spec)
        if number is not None:
            for record in self.snapshots:
                if record.number == number:
                    return record
            raise NoRepository(f"{self.policy.name} has no snapshot {spec}; {self._hint()}")
        end_ns = _end_of(spec)
        for record in reversed(self.snapshots):
            if record.time_ns < end_ns:
                return record
        raise NoRepository(f"{self.policy.name} has no snapshot as old as {spec}; {self._hint()}")

    def rows(self, table: Table, snapshot: int | None = None) -> Iterator[Row]:
        """A whole table in key order: all versions, or what is in force at a snapshot."""
        if snapshot is not None:
            return self.view(snapshot).rows(table)
        return all_versions(self.tables, self.manifest.runs, table)

    def close(self) -> None:
        """Stop what runs in the background."""
        self.reader.close()


def _digest(stored: bytes) -> str:
    """By which a machine knows a manifest again: its salt is fresh, so no two are the same."""
    return hashlib.sha256(stored).hexdigest()


def _decimal(text: str) -> int | None:
    """The number that ASCII digits are; None for anything else. Longer than any is as 10^18."""
    if not (text.isascii() and text.isdigit()):
        return None
    return int(text) if len(text) <= 18 else 10**18


def _end_of(spec: str) -> int:
    """The moment in ns just after the time that ``spec`` names to its own precision."""
    for pattern, precision in (
        ("%Y-%m-%d", timedelta(days=1)),
        ("%Y-%m-%dT%H:%M", timedelta(minutes=1)),
        ("%Y-%m-%d %H:%M", timedelta(minutes=1)),
        ("%Y-%m-%dT%H:%M:%S", timedelta(seconds=1)),
        ("%Y-%m-%d %H:%M:%S", timedelta(seconds=1)),
    ):
        try:
            moment = datetime.strptime(spec, pattern) + precision
            return int(moment.timestamp()) * 1_000_000_000
        except (ValueError, OverflowError):
            continue
    raise UsageError(
        f"{spec!r} names no snapshot: use latest, latest~2, a number, 2026-11-23 or"
        " 2026-11-23T10:12:03."
    )
