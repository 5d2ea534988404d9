"""What lies within a source on btrfs: a snapshot of it holds what a scan of the tree would."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cloudfs.core.errors import SourceError
from cloudfs.source import roots
from cloudfs.source.btrfs import subvolume
from cloudfs.source.filters import Filters
from tests.engine import btrfs
from tests.engine.rig import Rig, difference

HOLDING = os.fsdecode(roots.HOLDING)
Make = Callable[..., Rig]


@pytest.fixture
def make(volume: Path) -> Make:
    """Makes policies, each with a repository of its own, for a source or several."""

    def made(name: str, *sources: Path, source: str = "btrfs", **filters: object) -> Rig:
        base = volume / f"of-{name}"
        base.mkdir()
        return Rig(base, list(sources), source=source, filters=Filters(**filters))  # type: ignore[arg-type]

    return made


def held(rig: Rig, number: int) -> set[str]:
    """The paths in a snapshot."""
    return {os.fsdecode(path) for path in rig.contents(number) if path.startswith(b"/")}


def write(*paths: Path) -> None:
    """Write files, in directories that are made for them."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)


@pytest.mark.parametrize("several", [False, True])
def test_patterns_count_from_the_top_of_the_source(
    volume: Path, make: Make, *, several: bool
) -> None:
    """Not from that of a subvolume within it; whether all is looked at, or what btrfs told."""
    tree, other = btrfs.subvolume(volume / "tree"), btrfs.subvolume(volume / "other")
    within = btrfs.subvolume(tree / "within")
    sources = [tree, other] if several else [tree]
    filters = {"excludes": ("/cache", "/within/tmp"), "exclude_if_present": ("tag",)}
    rigs = [make(way, *sources, source=way, **filters) for way in ("btrfs", "scan")]
    for number in range(1, 4):
        write(tree / f"cache/out{number}", within / f"tmp/out{number}")
        write(within / f"cache/{number}/in", within / "tagged" / f"{number}")
        if number == 3:
            write(within / "tagged/tag")
        for rig in rigs:
            rig.sync()
            assert not rig.notes
        found = held(rigs[0], number)
        assert not difference(rigs[0].contents(number), rigs[1].contents(number))
        assert sum(path.endswith("/in") for path in found) == number
        assert not any("out" in path for path in found)
        assert any("/tagged/" in path for path in found) == (number < 3)


def test_what_a_file_above_a_subvolume_leaves_out(volume: Path, make: Make) -> None:
    """Is left out of the subvolume too."""
    tree = btrfs.subvolume(volume / "tree")
    (tree / "above").mkdir()
    within = btrfs.subvolume(tree / "above/within")
    write(within / "deep/first")
    rig = make("btrfs", tree, exclude_if_present=("tag",))
    rig.sync()
    assert "/above/within/deep/first" in held(rig, 1)
    write(within / "deep/second", tree / "above/tag")
    rig.sync()
    assert held(rig, 2) == {"/above"}


def test_the_source_of_another_policy_within(volume: Path, make: Make) -> None:
    """Its snapshots are no part of this one's, whose own they do not disturb."""
    tree = btrfs.subvolume(volume / "tree")
    write(tree / "a/file", tree / "a" / HOLDING / "kept")
    within = btrfs.subvolume(tree / "a/within")
    write(within / "file")
    inner, outer = make("inner", within), make("outer", tree)
    scanning = make("scan", tree, source="scan")
    for number in range(1, 4):
        inner.sync()
        assert inner.notes == []
        for rig in (outer, scanning):
            rig.sync()
            assert rig.notes == []
            found = held(rig, number)
            assert {path for path in found if HOLDING in path} == {
                f"/a/{HOLDING}",
                f"/a/{HOLDING}/kept",
            }
            assert f"/a/within/file{number - 1 or ''}" in found
        assert len(os.listdir(tree / HOLDING)) == 2
        write(within / f"file{number}")


def mount(what: Path | str, place: Path) -> None:
    """Mount a directory, or a file system in memory, at a directory that is made for it. It goes
    with the file system around it."""
    place.mkdir(exist_ok=True)
    if isinstance(what, Path):
        btrfs.run("mount", "--bind", what, place)
    else:
        btrfs.run("mount", "-t", "tmpfs", what, place)


def test_subvolumes_that_are_mounted_within(volume: Path, make: Make) -> None:
    """As /home often is in /. They are snapshotted with the source, and so is what they hold."""
    tree, home = btrfs.subvolume(volume / "tree"), btrfs.subvolume(volume / "home")
    left_out = btrfs.subvolume(volume / "left-out")
    write(home / "file", btrfs.subvolume(home / "within") / "file", left_out / "out")
    beneath = btrfs.subvolume(tree / "home")
    write(btrfs.subvolume(beneath / "unseen") / "out", tree / "file")
    mount(home, tree / "home")
    mount(left_out, tree / "left-out")
    rigs = [make(way, tree, source=way, excludes=("/left-out",)) for way in ("btrfs", "scan")]
    for number in range(1, 4):
        for rig in rigs:
            result = rig.sync()
            assert rig.notes == []
        assert not difference(rigs[0].contents(number), rigs[1].contents(number))
        assert not any("out" in path for path in held(rigs[0], number))
        write(home / f"file{number}", home / "within" / f"file{number}", left_out / f"out{number}")
        home.chmod(0o700 + number)
    assert (result.new, result.changed) == (2, 2)
    btrfs.run("umount", tree / "home")
    rigs[0].sync()
    assert rigs[0].notes == ["the snapshot is scanned: a subvolume came, went or moved."]
    assert "/home/unseen/out" in held(rigs[0], 4)


def test_a_mount_that_is_hidden_above_a_source(volume: Path, make: Make) -> None:
    """It says nothing of what is mounted within."""
    tree, home = btrfs.subvolume(volume / "tree"), btrfs.subvolume(volume / "home")
    place, beneath = volume / "place", volume / "beneath"
    for directory in (tree / "home", place / "tree", beneath):
        directory.mkdir(parents=True)
    write(home / "file")
    mount(beneath, place / "tree")
    mount(volume, place)
    mount(home, place / "tree/home")
    rig = make("btrfs", place / "tree")
    rig.sync()
    assert held(rig, 1) == {"/home", "/home/file"}
    btrfs.run("umount", "-l", place)


def test_what_changes_beneath_a_subvolume_that_is_mounted_within(volume: Path, make: Make) -> None:
    """Nobody sees it, under paths at which other things changed too."""
    tree, home = btrfs.subvolume(volume / "tree"), btrfs.subvolume(volume / "home")
    write(tree / "home/a/file", home / "a/file", home / "b/kept", home / "b/file")
    (home / "large").write_bytes(os.urandom(700_000))
    (volume / "aside").mkdir()
    mount(tree, volume / "aside")
    mount(home, tree / "home")
    rigs = [make(way, tree, source=way) for way in ("btrfs", "scan")]
    for number in range(1, 4):
        for rig in rigs:
            rig.sync()
            assert rig.notes == []
        assert not difference(rigs[0].contents(number), rigs[1].contents(number))
        if number == 1:
            beneath = volume / "aside/home"
            (beneath / "a").rename(beneath / "b")
            write(beneath / "new", beneath / "b/kept")
            with (home / "large").open("r+b") as file:
                file.seek(300_000)
                file.write(b"changed" * 1000)
        (home / "b/file").write_text(f"changed {number}")


def test_what_else_is_mounted_within_is_named(volume: Path, make: Make) -> None:
    """It is in no snapshot; a sync that scans the tree itself backs it up."""
    tree, other = btrfs.subvolume(volume / "tree"), volume / "other"
    other.mkdir()
    write(other / "file")
    mount(other, tree / "plain")
    mount("memory", tree / "memory")
    mount(btrfs.subvolume(volume / "unseen"), tree / "memory/within")
    mount("memory", tree / "left-out")
    mount("memory", tree / "hidden")
    mount("memory", tree / "hidden/below")
    mount(btrfs.subvolume(volume / "over"), tree / "hidden")
    rig = make("btrfs", tree, excludes=("/left-out",))
    missing = f"no btrfs snapshot holds what is mounted at {tree}/memory, {tree}/plain, so that"
    rig.sync()
    assert [note.startswith(missing) for note in rig.notes] == [True]
    assert held(rig, 1) == {"/memory", "/plain", "/hidden"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subvolume, "snapshot", refuse)
        rig.sync()
    assert "the tree itself is scanned" in rig.notes[0]
    assert "/plain/file" in held(rig, 2)
    rig.sync()
    assert sum(note.startswith(missing) for note in rig.notes) == 1
    rig.filters = Filters(one_file_system=True)
    rig.sync()
    assert not any("mounted" in note for note in rig.notes)


def refuse(*_: bytes) -> None:
    raise SourceError("no room.")


def test_subvolumes_that_are_stayed_out_of(volume: Path, make: Make) -> None:
    """They are empty directories without times, and which there are is always known."""
    tree = btrfs.subvolume(volume / "tree")
    (tree / "d/e").mkdir(parents=True)
    for name in ("kept", "gone", "moved", "e/moved-with-it", "e/gone-too"):
        write(btrfs.subvolume(tree / "d" / name) / "file")
    rig = make("btrfs", tree, one_file_system=True)
    rig.sync()
    time.sleep(0.05)
    rig.verify = 1.0
    assert rig.sync().snapshot is None
    btrfs.run("btrfs", "subvolume", "delete", tree / "d/gone")
    btrfs.run("btrfs", "subvolume", "delete", tree / "d/e/gone-too")
    (tree / "d/moved").rename(tree / "moved")
    (tree / "d/e").rename(tree / "e")
    btrfs.subvolume(tree / "d/new")
    write(tree / "d/gone/a directory")
    os.chown(tree / "d", 7, 7)
    rig.sync()
    assert rig.notes == []
    now = {os.fsencode(f"/{path.relative_to(tree)}") for path in below(tree)}
    found = rig.contents(2)
    assert {path for path in found if path.startswith(b"/")} == now
    assert found[b"/d/kept"][1:5] == (7, 7, 0, 0)  # type: ignore[index]
    assert found[b"/d/gone"][4]  # type: ignore[index]
    assert rig.sync().snapshot is None


def below(top: Path) -> Iterator[Path]:
    """What a sync that stays out of subvolumes backs up."""
    for path in top.iterdir():
        if path.name != HOLDING:
            yield path
            if path.is_dir() and path.stat().st_dev == top.stat().st_dev:
                yield from below(path)


def test_more_subvolumes_than_a_process_may_have_open(volume: Path, make: Make) -> None:
    tree = btrfs.subvolume(volume / "tree")
    for number in range(60):
        write(btrfs.subvolume(tree / f"{number}") / "file")
    rig = make("btrfs", tree)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, before[1]))
    try:
        rig.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert "/59/file" in held(rig, 1)
