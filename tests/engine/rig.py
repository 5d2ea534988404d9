"""A tree, a repository and the engine between them, without the command line."""

from __future__ import annotations

import os
import shutil
import stat as st
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from cloudfs.backup.job import SyncJob, SyncResult, SyncSettings, Verified
from cloudfs.backup.sync import sync
from cloudfs.core.changes import MODES
from cloudfs.core.rows import ItemType
from cloudfs.db.local import LocalState
from cloudfs.repo.history import History
from cloudfs.repo.keys import Secret
from cloudfs.repo.repository import Repository
from cloudfs.repo.view import SnapshotView
from cloudfs.source.external.command import Commands
from cloudfs.source.filters import Filters
from cloudfs.source.roots import HOLDING
from cloudfs.store.open import OpenedStore, StoreOptions, open_store

SECRET = Secret.key_file(b"k" * 32)  # a key file needs no stretching, so tests are quick


class Quiet:
    """Sync events that nobody listens to; notes are kept."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def phase(self, name: str) -> None:
        pass

    def progress(
        self, items_found: int, items_done: int, bytes_found: int, bytes_done: int
    ) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)

    def differs(self, source: str, found: Verified) -> None:
        self.notes.append(f"{source} calls unchanged what is not")


@dataclass
class Rig:
    """One policy of one repository, with small blocks so that little data crosses all borders."""

    base: Path
    sources: list[Path] = field(default_factory=list)
    block_size: int = 4096
    max_pack_bytes: int = 64 * 1024
    filters: Filters = field(default_factory=Filters)
    machine: str = "one"
    workers: int = 1
    source: str = "scan"
    external: Commands | None = None
    verify: float = 0.0
    notes: list[str] = field(default_factory=list)  # of the last sync

    def __post_init__(self) -> None:
        self.url = f"file://{self.base}/repository"
        if not self.sources:
            self.sources = [self.base / "tree"]
            self.sources[0].mkdir(parents=True, exist_ok=True)
        self.store = open_store(self.url)
        if (self.base / "repository").exists():
            self.repository = Repository.open(self.store, SECRET, self.local())
            self.record = self.repository.policies()[0]
        else:
            self.repository = Repository.create(self.store, SECRET, self.local(), label="test")
            self.record = self.repository.save_policy("home", "")

    @property
    def tree(self) -> Path:
        """The (first) source."""
        return self.sources[0]

    def local(self) -> LocalState:
        """The local state of the machine that is played."""
        place = self.base / "machines" / self.machine
        return LocalState(place / "cache", place / "state", cache_bytes=64 << 20)

    def settings(self) -> SyncSettings:
        return SyncSettings(
            name="home",
            sources=[os.fsencode(source) for source in self.sources],
            url=self.url,
            options=StoreOptions(),
            source=self.source,
            verify=self.verify,
            filters=self.filters,
            block_size=self.block_size,
            max_pack_bytes=self.max_pack_bytes,
            workers=self.workers,
            external=self.external,
        )

    def sync(self, store: OpenedStore | None = None, **wishes: object) -> SyncResult:
        """Run a sync as a process of its own would."""
        repository = self.repository
        if store is not None:
            repository = Repository.open(store, SECRET, self.local())
        job = SyncJob(self.settings(), self.record, repository, "host", **wishes)  # type: ignore[arg-type]
        try:
            quiet = Quiet()
            self.notes = quiet.notes
            return sync(job, quiet)
        finally:
            repository.local.close()

    def forget_local(self) -> None:
        """Lose everything that the machine kept, as a new machine has nothing."""
        self.repository.local.close()
        shutil.rmtree(self.base / "machines" / self.machine, ignore_errors=True)

    def history(self) -> History:
        """The history as another machine sees it."""
        place = self.base / "machines" / "reader"
        local = LocalState(place / "cache", place / "state", cache_bytes=64 << 20)
        store = open_store(self.url)
        return History(Repository.open(store, SECRET, local), self.record)

    def contents(self, number: int) -> dict[bytes, object]:
        """What a snapshot holds, by path; see :func:`contents_of_tree`."""
        history = self.history()
        try:
            return contents_of_view(history.view(number))
        finally:
            history.repository.local.close()


def contents_of_view(view: SnapshotView) -> dict[bytes, object]:
    """Everything that can be compared, by path."""
    found: dict[bytes, object] = {}
    groups: dict[int, list[bytes]] = {}
    for path, _, meta in view.walk():
        data: object = None
        if meta.type == ItemType.REGULAR:
            data = view.blocks_reader.read(view, meta, 0, meta.size)
        elif meta.type == ItemType.SYMLINK:
            data = meta.target
        if meta.nlink > 1 and meta.type != ItemType.DIRECTORY:
            groups.setdefault(meta.lin, []).append(path)
        found[path] = (
            MODES[meta.type] | meta.mode,
            meta.uid,
            meta.gid,
            0 if meta.type == ItemType.DIRECTORY else meta.nlink,
            meta.mtime_ns,
            meta.rdev,
            tuple(sorted(view.xattrs(meta).items())),
            data,
        )
    found[b"links"] = sorted(sorted(names) for names in groups.values())
    return found


class LeftOut(NamedTuple):
    """What a policy leaves out of a tree, and how a test knows of it."""

    filters: Filters
    by_path: Callable[[bytes, bool], bool] = lambda path, is_dir: False
    tag: bytes = b""  # a directory that holds this name counts as empty


ALL = LeftOut(Filters())


def contents_of_tree(root: Path, left_out: LeftOut = ALL) -> dict[bytes, object]:
    """The same of a live tree, without the directory that holds snapshots of it."""
    found: dict[bytes, object] = {}
    groups: dict[tuple[int, int], list[bytes]] = {}
    top = os.fsencode(root)
    stack = [b""]
    while stack:
        directory = stack.pop()
        names = os.listdir(top + directory)
        for name in () if left_out.tag and left_out.tag in names else names:
            path = directory + b"/" + name
            if path == b"/" + HOLDING:
                continue
            full = top + path
            s = os.lstat(full)
            if left_out.by_path(path, st.S_ISDIR(s.st_mode)):
                continue
            data: object = None
            if st.S_ISREG(s.st_mode):
                data = Path(os.fsdecode(full)).read_bytes()
            elif st.S_ISLNK(s.st_mode):
                data = os.readlink(full)
            elif st.S_ISDIR(s.st_mode):
                stack.append(path)
            if s.st_nlink > 1 and not st.S_ISDIR(s.st_mode):
                groups.setdefault((s.st_dev, s.st_ino), []).append(path)
            attributes = {
                os.fsencode(n): os.getxattr(full, n, follow_symlinks=False)
                for n in os.listxattr(full, follow_symlinks=False)
            }
            found[path] = (
                s.st_mode,
                s.st_uid,
                s.st_gid,
                0 if st.S_ISDIR(s.st_mode) else s.st_nlink,
                s.st_mtime_ns,
                s.st_rdev,
                tuple(sorted(attributes.items())),
                data,
            )
    found[b"links"] = sorted(sorted(names) for names in groups.values())
    return found


def difference(a: dict[bytes, object], b: dict[bytes, object]) -> list[str]:
    """What differs, for a message."""
    keys = sorted(set(a) | set(b))
    return [
        f"{key!r}: {str(a.get(key))[:200]} != {str(b.get(key))[:200]}"
        for key in keys
        if a.get(key) != b.get(key)
    ]
