"""File systems that do not keep the numbers of their inodes: overlays of several file systems,
whose directories get others when the kernel has forgotten them."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloudfs.backup.files import FileReader
from cloudfs.core.errors import SourceError, UsageError
from cloudfs.source.filters import Filters
from cloudfs.source.numbers import keeps_numbers, kind_keeps_numbers
from cloudfs.source.scan import Scanner
from cloudfs.source.watch import start
from tests.engine import btrfs, loops
from tests.engine.btrfs import run
from tests.engine.living import Living, living
from tests.engine.rig import Rig, contents_of_tree, difference


@contextlib.contextmanager
def overlaid(base: Path, place: Path) -> Iterator[Path]:
    """An overlay of an ext4 and what ``base`` lies on, with files in directories in each other."""
    layers = base / "layers"
    layers.mkdir()
    with loops.file_system(layers, "ext4", 64 << 20) as lower:
        layer = lower / "layer"
        for path in ("a/b/c", "a/d", "e"):
            (layer / path).mkdir(parents=True)
            (layer / path / "file").write_text(path)
        upper, work = layers / "upper", layers / "work"
        for directory in (upper, work, place):
            directory.mkdir(parents=True, exist_ok=True)
        options = f"lowerdir={layer},upperdir={upper},workdir={work}"
        run("mount", "-t", "overlay", "none", "-o", options, place)
        try:
            yield place
        finally:
            run("umount", "-l", place)


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel forgets all inodes before a directory is listed, and before it is read."""
    for place, name in ((Scanner, "visit"), (FileReader, "_items")):
        real = getattr(place, name)

        def forgetting(self: object, *args: Any, _real: Any = real, **more: Any) -> object:
            forget()
            return _real(self, *args, **more)

        monkeypatch.setattr(place, name, forgetting)


def forget() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("2")


def check(rig: Rig, tree: Path) -> None:
    result = rig.sync()
    assert not result.unreadable
    assert result.snapshot is not None
    found = rig.contents(result.snapshot.number)
    assert not difference(found, contents_of_tree(tree))


def test_which_file_systems_do(base: Path, tmp_path: Path) -> None:
    def keeps(path: Path) -> bool:
        fd = os.open(path, os.O_PATH)
        try:
            return keeps_numbers(fd)
        finally:
            os.close(fd)

    assert keeps(base), "tmpfs does"
    for kind in ("ext4", "xfs"):
        with loops.file_system(base, kind) as place:
            assert keeps(place), kind
        place.rmdir()
    with btrfs.file_system(base) as place:
        assert keeps(place), "btrfs"
    with overlaid(base, base / "place") as place:
        assert not keeps(place)
        before = (place / "a/b").stat().st_ino
        forget()
        assert (place / "a/b").stat().st_ino != before, "this test needs an overlay that forgets"
    with living(tmp_path) as rig:
        assert not keeps(rig.tree), "what runs in user space may not"
    kinds = ("ext4", "nfs4", "zfs", "overlay", "vfat", "fuse.sshfs", "fuseblk", "cifs")
    assert [kind_keeps_numbers(kind) for kind in kinds] == [True] * 3 + [False] * 5


@pytest.mark.usefixtures("forgetful")
def test_a_scan(base: Path) -> None:
    with overlaid(base, base / "tree") as tree:
        rig = Rig(base, [tree])
        check(rig, tree)
        (tree / "a/b/c/file").write_text("changed")
        (tree / "a/b/new").mkdir()
        (tree / "a/b/new/file").write_text("new")
        (tree / "a/d/file").rename(tree / "e/moved")
        check(rig, tree)
        shutil.rmtree(tree / "a/b/c")
        check(rig, tree)
        rig.repository.local.close()


def test_it_is_not_watched(base: Path) -> None:
    """Nor where it is only mounted within the tree."""
    with overlaid(base, base / "tree/within") as place:
        for source in (place, base / "tree"):
            with pytest.raises(SourceError, match="is on overlay, where inodes get other numbers"):
                start.job_for("home", base, [os.fsencode(source)], Filters())
        start.job_for("home", base, [os.fsencode(base / "tree")], Filters(one_file_system=True))


def test_it_is_not_mounted_live(base: Path) -> None:
    with overlaid(base, base / "tree"):
        rig = Living(base)
        try:
            with pytest.raises(UsageError, match="where inodes get other numbers"):
                rig.mount()
        finally:
            rig.close()


@pytest.mark.usefixtures("forgetful")
def test_within_a_live_mount_it_is_scanned(base: Path) -> None:
    place = base / "tree/within"
    place.mkdir(parents=True)
    with overlaid(base, place), living(base) as rig:
        for turn in range(3):
            (rig.tree / "within/a/b" / f"new{turn}").mkdir()
            (rig.tree / "within/a/b" / f"new{turn}" / "file").write_text(f"{turn}")
            (rig.tree / "file").write_text(f"{turn}")
            check(rig, rig.tree)
            assert not turn or "is on overlay" in rig.notes[0], rig.notes
