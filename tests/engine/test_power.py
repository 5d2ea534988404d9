"""The power is cut: what was reported is there, and what was there before is whole.

The repository lies on an ext4 of its own, in an image. The image is copied while it is mounted,
with nothing flushed: the copy is what a disk holds whose machine died at that moment. It is
mounted, which replays the journal, and looked at by a machine that knows nothing. The kernel is
asked to commit and to write back as late as it can, so that only what was flushed on purpose is
there; the local state lies elsewhere, since flushing it would flush the repository too.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cloudfs.core.errors import CloudfsError
from cloudfs.db.local import LocalState
from cloudfs.repo import lease as leases
from cloudfs.repo.history import History
from cloudfs.repo.repository import PolicyRecord, Repository
from cloudfs.store.open import OpenedStore, open_store
from tests.engine.rig import contents_of_tree, contents_of_view, difference
from tests.repo.sample import SECRET, run_sync

Contents = dict[bytes, object]

IMAGE_BYTES = 40 << 20
STEPS = ("fsync", "link", "replace", "unlink", "mkdir")
"""The calls of the store after each of which the power may be cut."""


def command(*arguments: str | Path) -> None:
    """Run a program; its words are in the failure."""
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert not done.returncode, f"{arguments}: {done.stderr}"


@contextlib.contextmanager
def mounted(image: Path, place: Path) -> Iterator[None]:
    """Mount an image so that the kernel does nothing of its own accord for minutes."""
    place.mkdir(exist_ok=True)
    command("mount", "-o", "loop,commit=300,noauto_da_alloc", image, place)
    try:
        yield
    finally:
        command("umount", place)


class Disk:
    """A repository on a disk of its own, and a machine that syncs a tree to it."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.image, self.place, self.tree = base / "image", base / "disk", base / "tree"
        with self.image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        now = "lazy_itable_init=0,lazy_journal_init=0"
        command("mkfs.ext4", "-q", "-F", "-m", "0", "-E", now, self.image)
        self.tree.mkdir()
        self.known: dict[int, Contents] = {}
        self.record: PolicyRecord | None = None

    def store(self) -> OpenedStore:
        return open_store(f"file://{self.place}/repo")

    def begin(self) -> None:
        """Make the repository."""
        local = self.local()
        repository = Repository.create(self.store(), SECRET, local, label="x")
        self.record = repository.save_policy("home", "")

    def local(self, name: str = "machine") -> LocalState:
        place = self.base / name
        return LocalState(place / "c", place / "s", cache_bytes=8 << 20)

    def grow(self, turn: int) -> None:
        """Make or change the tree."""
        dice = random.Random(turn)
        for number in range(4):
            (self.tree / f"d{number}").mkdir(exist_ok=True)
            (self.tree / f"d{number}" / f"f{turn % 3}").write_bytes(dice.randbytes(70_000))
        (self.tree / "turn").write_text(str(turn))

    def sync(self) -> None:
        """A sync; when it returns it was reported."""
        assert self.record is not None
        local = self.local()
        try:
            result = run_sync(Repository.open(self.store(), SECRET, local), self.record, self.tree)
        finally:
            local.close()
        assert result.snapshot is not None
        self.known[result.snapshot.number] = contents_of_tree(self.tree)

    def cut(self, name: str = "copy") -> Path:
        """What the disk holds if the power is cut now."""
        return Path(shutil.copyfile(self.image, self.base / name))

    def judge(self, image: Path, known: dict[int, Contents], doubtful: Contents | None) -> None:
        """On the disk that lost its power the snapshots are as they were, and a sync goes on.

        ``doubtful`` is what a snapshot holds that was under way: it is there whole, or not there.
        """
        assert self.record is not None
        with mounted(image, self.base / "after"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(leases, "boot_id", lambda: "after the cut")  # whoever held one is dead
            store = open_store(f"file://{self.base}/after/repo")
            reader = self.local("reader")
            try:
                repository = Repository.open(store, SECRET, reader)
                found = contents(repository, self.record)
                expected = dict(known)
                if doubtful is not None and len(found) > len(known):
                    expected[len(known) + 1] = doubtful
                assert sorted(found) == sorted(expected)
                for number, content in found.items():
                    assert not difference(content, expected[number]), f"snapshot {number}"
                run_sync(repository, self.record, self.tree)
                last = contents(repository, self.record)
                assert not difference(last[max(last)], contents_of_tree(self.tree))
            finally:
                reader.close()
                shutil.rmtree(self.base / "reader", ignore_errors=True)


def contents(repository: Repository, record: PolicyRecord) -> dict[int, Contents]:
    """All snapshots and what they hold."""
    with contextlib.closing(History(repository, record)) as history:
        return {s.number: contents_of_view(history.view(s.number)) for s in history.snapshots}


@pytest.fixture
def disk() -> Iterator[Disk]:
    """A disk with a repository, mounted."""
    with tempfile.TemporaryDirectory(prefix="cloudfs-power-", dir="/dev/shm") as base:
        made = Disk(Path(base))
        with mounted(made.image, made.place):
            made.begin()
            yield made


@pytest.mark.parametrize("if_absent", [False, True])
def test_every_write_is_there_when_it_returns(disk: Disk, if_absent: bool) -> None:
    """Each for itself: a sync's later writes would hide that an earlier one was not flushed."""
    store = disk.store()
    for number, name in enumerate(("one", "deep/er/one", "deep/er/two", "deep/two", "two")):
        store.put(name, [b"data of " * 1000, name.encode()], if_absent=if_absent)
        if number and number % 2 == 0:
            store.delete(["one"])
        image = disk.cut()
        with mounted(image, disk.base / "after"):
            found = open_store(f"file://{disk.base}/after/repo")
            assert found.get(name) == b"data of " * 1000 + name.encode()
            there = {info.name for info in found.list("")}
            assert ("one" in there) == (number < 2)


def test_what_was_reported_is_there(disk: Disk) -> None:
    for turn in range(3):
        disk.grow(turn)
        disk.sync()
        disk.judge(disk.cut(), disk.known, None)
        if turn == 1:
            shutil.rmtree(disk.base / "machine")  # the next one makes its state anew


def test_the_machine_that_lost_its_power_goes_on(disk: Disk) -> None:
    """Its own state, however old, is no hindrance."""
    disk.grow(0)
    disk.sync()
    early = disk.base / "early"
    shutil.copytree(disk.base / "machine", early)
    disk.grow(1)
    disk.sync()
    image = disk.cut()
    shutil.rmtree(disk.base / "machine")
    early.rename(disk.base / "machine")
    with mounted(image, disk.base / "after"):
        disk.place = disk.base / "after"
        disk.grow(2)
        disk.sync()
        local = disk.local("reader")
        assert disk.record is not None
        found = contents(Repository.open(disk.store(), SECRET, local), disk.record)
        local.close()
    assert not any(difference(found[number], disk.known[number]) for number in (1, 2, 3))


@pytest.mark.parametrize("forgotten", ["files", "directories", "all"])
def test_this_file_would_notice(
    disk: Disk, forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that does not flush loses what it reported, and the tests above see it."""
    real = os.fsync

    def fsync(fd: int) -> None:
        directory = os.path.isdir(f"/proc/self/fd/{fd}")
        if forgotten != "all" and directory != (forgotten == "directories"):
            real(fd)

    disk.grow(0)
    disk.sync()
    disk.grow(1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        disk.sync()
        image = disk.cut()
    assert not survives(disk, image)


def survives(disk: Disk, image: Path) -> bool:
    try:
        disk.judge(image, disk.known, None)
    except (AssertionError, CloudfsError):
        return False
    return True


def cuts(disk: Disk, patch: pytest.MonkeyPatch, wanted: Callable[[int], bool]) -> Iterator[Path]:
    """Sync, and cut the power after each step of the store that is wanted, and after the last."""
    step = 0
    found: list[Path] = []

    def wrap(name: str) -> Callable[..., object]:
        real = getattr(os, name)

        def call(*arguments: object, **settings: object) -> object:
            nonlocal step
            try:
                return real(*arguments, **settings)
            finally:
                if wanted(step):
                    found.append(disk.cut(f"cut-{step}"))
                step += 1

        return call

    with patch.context() as inner:
        for name in STEPS:
            inner.setattr(os, name, wrap(name))
        disk.sync()
    yield from found


def cut_everywhere(disk: Disk, patch: pytest.MonkeyPatch, every: int) -> None:
    """Two syncs, cut after each ``every``-th step."""
    steps = 0
    for turn in range(2):
        disk.grow(turn)
        before = dict(disk.known)
        for image in cuts(disk, patch, lambda step: step % every == every - 1):
            try:
                disk.judge(image, before, disk.known[turn + 1])
            except (AssertionError, CloudfsError) as error:
                raise AssertionError(f"sync {turn + 1}, {image.name}: {error}") from error
            image.unlink()
            steps += 1
    assert steps >= 40 // every


def test_cut_in_the_middle(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_everywhere(disk, monkeypatch, 7)


@pytest.mark.long
def test_cut_after_every_step(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_everywhere(disk, monkeypatch, 1)
