"""A small repository made by real syncs, held in memory so that it can be damaged cheaply.

:func:`read_all` is what a user could do with a repository: open it, list its policies and their
snapshots, and read everything in them.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import msgspec

from cloudfs.backup.job import SyncJob, SyncResult, SyncSettings
from cloudfs.backup.sync import sync
from cloudfs.core.rows import Table
from cloudfs.db.cache import BlobCache
from cloudfs.db.local import LocalState, Seen
from cloudfs.format import names
from cloudfs.repo.history import History
from cloudfs.repo.keys import Secret
from cloudfs.repo.lease import LeaseContent, _write
from cloudfs.repo.repository import PolicyRecord, Repository
from cloudfs.store.count import CountStore
from cloudfs.store.memory import MemoryStore
from cloudfs.store.open import OpenedStore, StoreOptions
from tests.engine.rig import Quiet, contents_of_view

SECRET = Secret.key_file(b"k" * 32)  # a key file needs no stretching, so tests are quick
BLOCK = 4096
POLICIES = ("home", "work")

Objects = dict[str, bytes]
Contents = dict[str, dict[int, object]]
"""By policy and snapshot, what the snapshot holds."""


class FakeCache:
    """The cache as a dictionary: what the tests do to its values is plain to see."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}

    def get(self, key: bytes) -> bytes | None:
        return self.values.get(key)

    def put(self, items: Iterator[tuple[bytes, bytes]]) -> None:
        for key, value in items:
            self.values.setdefault(key, value)

    def discard(self, key: bytes) -> None:
        self.values.pop(key, None)

    def close(self) -> None:
        pass


class Machine(LocalState):
    """A machine without disks: cache and rollback memory live as long as this value."""

    def __init__(self, directory: Path | None = None) -> None:
        nowhere = Path("/nonexistent")
        super().__init__(directory or nowhere, directory or nowhere)
        self.fake = FakeCache()
        self.memory: dict[tuple[str, str], Seen] = {}

    def cache(self, repository_id: str) -> BlobCache:
        return cast(BlobCache, self.fake)

    def seen(self, repository_id: str, policy_id: str) -> Seen:
        return self.memory.get((repository_id, policy_id), Seen(0, ""))

    def remember_seen(self, repository_id: str, policy_id: str, manifest: Seen) -> None:
        self.memory[repository_id, policy_id] = manifest


def opened(objects: Mapping[str, bytes], url: str = "memory:") -> OpenedStore:
    """A store that holds copies of these objects."""
    memory = MemoryStore(url)
    for name, data in objects.items():
        memory.put(name, [data])
    counter = CountStore(memory)
    return OpenedStore(counter, counter)


def objects_of(store: OpenedStore) -> Objects:
    """All that a store holds."""
    return {info.name: store.get(info.name) for info in store.list("")}


def run_sync(
    repository: Repository, record: PolicyRecord, tree: Path, **settings: object
) -> SyncResult:
    """A sync in this process."""
    base = SyncSettings(
        name=record.name,
        sources=[os.fsencode(tree)],
        url=repository.url,
        options=StoreOptions(),
        block_size=BLOCK,
        max_pack_bytes=64 * 1024,
        workers=1,
    )
    changed = msgspec.structs.replace(base, **settings)
    return sync(SyncJob(changed, record, repository, "host"), Quiet())


def grow(tree: Path, seed: int) -> None:
    """Make or change a small tree: several blocks, small files, a large attribute, a symlink."""
    dice = random.Random(seed)
    (tree / "below").mkdir(parents=True, exist_ok=True)
    (tree / "big").write_bytes(dice.randbytes(2 * BLOCK + 77))
    (tree / "small").write_bytes(b"small %d" % seed)
    (tree / "below" / "text").write_text("the same line\n" * 40 + str(seed))
    os.setxattr(tree / "small", b"user.large", dice.randbytes(4500))
    link = tree / f"link{seed}"
    link.symlink_to("below/text")


def make(base: Path) -> tuple[Objects, Objects, Contents]:
    """A repository with two policies of two snapshots, the objects as they were after the first
    snapshot of each, and what it holds."""
    store = opened({})
    repository = Repository.create(store, SECRET, LocalState(base / "c", base / "s"), label="test")
    truth: Contents = {}
    early: Objects = {}
    for turn in (1, 2):
        for place, name in enumerate(POLICIES):
            tree = base / name
            if turn == 1:
                repository.save_policy(name, "some text")
            grow(tree, 10 * place + turn)
            record = next(r for r in repository.policies() if r.name == name)
            run_sync(repository, record, tree)
        if turn == 1:
            early = objects_of(store)
    for record in repository.policies():
        history = History(repository, record)
        _write(history, 7, dead_holder(), if_absent=True)
        history.close()
    repository.local.close()
    found = objects_of(store)
    truth = read_all(found, Machine())
    assert {name: sorted(held) for name, held in truth.items()} == {n: [1, 2] for n in POLICIES}
    return early, found, truth


def dead_holder() -> LeaseContent:
    """The lease of a process of this host that is no more."""
    import socket

    return LeaseContent(socket.gethostname(), "another boot", 1, 1, 0, 0)


def read_all(objects: Mapping[str, bytes], local: LocalState, url: str = "memory:") -> Contents:
    """Open, list and read everything. Raises what any of it raises."""
    repository = Repository.open(opened(objects, url), SECRET, local)
    found: Contents = {}
    for record in repository.policies():
        with contextlib.closing(History(repository, record)) as history:
            for table in Table:  # tombstones too, which no snapshot shows
                for _ in history.rows(table):
                    pass
            found[record.name] = {
                snapshot.number: contents_of_view(history.view(snapshot.number))
                for snapshot in history.snapshots
            }
    return found


def part_of(found: Contents, truth: Contents) -> bool:
    """Whether all that was found is true, though something may be missing."""
    return all(
        truth[name][number] == content
        for name, held in found.items()
        for number, content in held.items()
    )


def kind_of(name: str) -> str:
    """What kind of object has this name."""
    if name == names.CONFIG:
        return "config"
    if name.startswith(names.POLICIES):
        return "policy"
    for kind in ("lease-", "manifest-", "/segment/", "/pack/"):
        if kind in name:
            return kind.strip("/-")
    raise AssertionError(f"{name} is of no kind")


KINDS = ("config", "policy", "lease", "manifest", "segment", "pack")
