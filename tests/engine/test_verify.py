"""Sources that lie are found out, honest ones are not accused, and the snapshot is right anyway."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from cloudfs.backup import packs
from cloudfs.backup.job import Difference, SyncResult, Verified
from cloudfs.backup.verify import Explained, Sample
from cloudfs.core.changelist import Changelist, DirChange
from cloudfs.source.btrfs import subvolume
from tests.engine import btrfs
from tests.engine.rig import Rig, contents_of_tree, difference
from tests.engine.test_btrfs import OnBtrfs, OnSeveral, remove
from tests.engine.test_machine import hunt

BLOCK = 4096


@pytest.fixture(scope="module")
def volume() -> Iterator[Path]:
    """A btrfs for all tests of this module."""
    base = Path(tempfile.mkdtemp(prefix="cloudfs-btrfs-", dir="/dev/shm"))
    with btrfs.file_system(base) as place:
        yield place
    shutil.rmtree(base)


@pytest.fixture
def rig(volume: Path) -> Iterator[Rig]:
    """A subvolume that was synced, with everything verified from now on."""
    base = Path(tempfile.mkdtemp(dir=volume))
    tree = btrfs.subvolume(base / "tree")
    for name in ("a", "b/c"):
        (tree / name).mkdir(parents=True)
        for number in range(5):
            (tree / name / f"{number}").write_bytes(os.urandom(3 * BLOCK))
    with (tree / "a" / "sparse").open("wb") as file:
        file.seek(20 * BLOCK)
        file.write(b"end")
    (tree / "a" / "zeros").write_bytes(bytes(2 * BLOCK))
    (tree / "a" / "link").symlink_to("0")
    os.link(tree / "a" / "0", tree / "b" / "again")
    rig = Rig(base, [tree], source="btrfs")
    rig.sync()
    rig.verify = 1.0
    yield rig
    remove(base)


def verified(result: SyncResult) -> Verified:
    assert result.verified is not None
    return result.verified


def is_right(rig: Rig, result: SyncResult) -> None:
    assert result.snapshot is not None
    assert not difference(rig.contents(result.snapshot.number), contents_of_tree(rig.tree))


def lie(monkeypatch: pytest.MonkeyPatch, forget: Callable[[DirChange], None]) -> None:
    """Let every changelist of btrfs go through ``forget`` first."""
    honest = subvolume.changes

    def changes(base: bytes, new: bytes, *within: Sequence[bytes]) -> Changelist:
        found = honest(base, new, *within)
        for change in found.dirs:
            forget(change)
        found.dirs = [change for change in found.dirs if change.names]
        return found

    monkeypatch.setattr(subvolume, "changes", changes)


def _write(tree: Path) -> None:
    with (tree / "b" / "c" / "3").open("r+b") as file:
        file.seek(BLOCK)
        file.write(b"other")


CHANGES: dict[str, tuple[Callable[[Path], object], bytes, str]] = {
    "data": (_write, b"b/c/3", "attributes"),
    "attribute": (lambda tree: (tree / "b/c/3").chmod(0o600), b"b/c/3", "attributes"),
    "xattr": (lambda tree: os.setxattr(tree / "b/c/3", "user.x", b"1"), b"b/c/3", "attributes"),
    "name": (lambda tree: (tree / "b/c/new").write_text("new"), b"b/c/new", "is not on record"),
    "deletion": (lambda tree: (tree / "b/c/3").unlink(), b"b/c/3", "is gone"),
    "directory": (lambda tree: (tree / "b/c").rename(tree / "b/d"), b"b/c", "is gone"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_a_changelist_leaves_out_is_found(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    change, path, what = CHANGES[kind]
    change(rig.tree)
    (rig.tree / "a" / "1").write_text("told")
    lie(monkeypatch, lambda told: told.names.intersection_update({b"1", b"a"}))
    result = rig.sync()
    assert (path, what) in {(d.path, d.what) for d in verified(result).differences}
    assert rig.notes == ["btrfs calls unchanged what is not"]
    is_right(rig, result)
    assert rig.history().view(1).resolve(b"a/1").size == 3 * BLOCK
    monkeypatch.undo()
    result = rig.sync(force=True)
    assert not verified(result).differences
    is_right(rig, result)


def test_a_range_that_is_left_out_is_found(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is named, and only what changed in it is not told whole."""
    with (rig.tree / "a" / "2").open("r+b") as file:
        file.write(b"first")
        file.seek(2 * BLOCK)
        file.write(b"third")
    lie(
        monkeypatch,
        lambda told: told.ranges.update({n: r[:1] for n, r in told.ranges.items()}),
    )
    monkeypatch.setattr("cloudfs.source.btrfs.replay.merged", lambda ranges: [(0, BLOCK)])
    result = rig.sync()
    assert [(d.path, d.what) for d in verified(result).differences] == [(b"a/2", "data")]
    is_right(rig, result)


def test_an_honest_changelist_is_believed(rig: Rig) -> None:
    result = rig.sync()
    assert result.snapshot is None
    counts = verified(result)
    assert (counts.files, counts.directories) == (13, 4)
    assert counts.bytes == 10 * 3 * BLOCK + BLOCK * 2 + BLOCK * 0 + 3 + 3 * BLOCK
    _write(rig.tree)
    (rig.tree / "a").rename(rig.tree / "b" / "moved")
    (rig.tree / "b" / "again").unlink()
    result = rig.sync()
    assert not verified(result).differences
    assert rig.notes == []
    is_right(rig, result)


def test_a_dry_run_says_so_and_changes_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(rig.tree)
    lie(monkeypatch, lambda told: told.names.clear())
    result = rig.sync(dry_run=True)
    assert [d.path for d in verified(result).differences] == [b"b/c/3"]
    assert (result.snapshot, result.changed) == (None, 1)
    rig.verify = 0.0
    assert len(rig.history().snapshots) == 1
    is_right(rig, rig.sync())  # what was found is looked at, though the source is believed


def scribble(path: Path) -> None:
    """Change data so that lstat says nothing of it: through a mapping, on tmpfs."""
    before = path.stat()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[0] ^= 1
    now = path.stat()
    assert (before.st_ctime_ns, before.st_mtime_ns) == (now.st_ctime_ns, now.st_mtime_ns)


@pytest.fixture
def scanned() -> Iterator[Rig]:
    """A tree on tmpfs that was scanned, of four hundred files."""
    base = Path(tempfile.mkdtemp(prefix="cloudfs-verify-", dir="/dev/shm"))
    rig = Rig(base)
    for number in range(400):
        place = rig.tree / str(number % 20)
        place.mkdir(exist_ok=True)
        path = place / str(number)
        path.write_bytes(os.urandom(5000))
        os.utime(path, ns=(10**9, 10**9))
    rig.sync()
    rig.sync()  # the first one doubted time stamps of just then
    yield rig
    shutil.rmtree(base)


def test_data_that_changed_behind_lstat(scanned: Rig) -> None:
    scribble(scanned.tree / "7" / "27")
    assert scanned.sync().snapshot is None
    scanned.verify = 1.0
    result = scanned.sync()
    assert [(d.path, d.what) for d in verified(result).differences] == [(b"7/27", "data")]
    assert verified(result).files == 400
    assert result.changed == 0  # by lstat
    is_right(scanned, result)
    assert not verified(scanned.sync()).differences


def test_a_sample_finds_its_share(scanned: Rig) -> None:
    for path in scanned.tree.rglob("*"):
        if path.is_file():
            scribble(path)
    scanned.verify = 0.1
    found = verified(scanned.sync(dry_run=True, salt=5))
    assert found.files == len(found.differences)
    assert 20 <= found.files <= 60
    scanned.verify = 1.0
    is_right(scanned, scanned.sync())


def test_samples_are_fair_and_see_everything() -> None:
    lins = list(range(1000))
    seen: set[int] = set()
    sizes = []
    for salt in range(100):
        chosen = Sample(0.1, salt << 32).chosen(lins)
        sizes.append(len(chosen))
        seen.update(chosen)
    assert len(seen) == 1000
    assert 60 < min(sizes) < max(sizes) < 140
    assert 9500 < sum(sizes) < 10500
    assert Sample(1.0, 3).chosen(lins) == lins
    assert Sample(0.0, 3).chosen(lins) == []


def test_what_changed_later_is_explained() -> None:
    later = Explained(
        Changelist(
            [
                DirChange(b"a", None, {b"x"}),
                DirChange(b"", b"", {b"moved"}),
                DirChange(b"all", None, whole=True),
            ],
            inodes={77: None},
        )
    )
    for path, inode in ((b"a/x", 1), (b"moved/deep/y", 1), (b"all/z", 1), (b"b", 77)):
        assert later.has(Difference(path, "data", 2, 3, inode)), path
    for path in (b"a/y", b"b", b"x", b"a/x2"):
        assert not later.has(Difference(path, "data", 2, 3, 1)), path


class OnVerified(OnBtrfs):
    """Whatever happens to the tree, btrfs tells of it, and everything is verified."""

    def __init__(self) -> None:
        super().__init__()
        self.rig.verify = 1.0

    def take(self, force: bool) -> SyncResult:
        result = super().take(force)
        assert result.verified is None or not result.verified.differences
        return result


class OnSeveralVerified(OnSeveral):
    """The same with subvolumes within."""

    def __init__(self) -> None:
        super().__init__()
        self.rig.verify = 1.0

    def take(self, force: bool) -> SyncResult:
        result = super().take(force)
        assert result.verified is None or not result.verified.differences
        return result


def prepare(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let frames end everywhere, and the machine work on this file system."""
    monkeypatch.setattr(packs, "FRAME_BYTES", 1000)
    monkeypatch.setattr(OnBtrfs, "volume", volume, raising=False)


def test_honest_btrfs_is_never_accused(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(volume, monkeypatch)
    hunt(8, 40, OnVerified)


@pytest.mark.long
def test_honest_btrfs_is_never_accused_for_long(
    volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(volume, monkeypatch)
    hunt(300, 100, OnVerified)
    hunt(300, 100, OnSeveralVerified)
