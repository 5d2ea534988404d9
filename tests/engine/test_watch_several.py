"""What a watch daemon tells once and concerns several: files of several names, directories of one
number in several places, and what a file in a directory leaves out."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloudfs.core.changelist import Changelist
from cloudfs.core.errors import SourceError
from cloudfs.source.filters import Filters
from cloudfs.source.watch.resolve import Resolver
from tests.engine import loops
from tests.engine.btrfs import run
from tests.engine.rig import contents_of_tree, difference
from tests.engine.watched import Watched, heard, settle

# -- files of several names -------------------------------------------------------------------


def test_a_file_changed_under_a_name_outside_of_the_source(watched: Watched) -> None:
    outside = watched.base / "outside"
    (watched.tree / "file").write_text("one")
    os.link(watched.tree / "file", outside)
    settle(watched)
    outside.write_text("two")
    heard(watched)
    outside.chmod(0o600)
    heard(watched)
    with outside.open("a") as file:
        file.write("three")
    outside.rename(watched.base / "elsewhere")
    heard(watched)
    (watched.base / "elsewhere").write_text("four")
    (watched.base / "elsewhere").unlink()
    heard(watched)


@pytest.mark.parametrize("pattern", ["cache/", "/cache/name"])
def test_a_file_changed_under_a_name_that_is_left_out(watched: Watched, pattern: str) -> None:
    (watched.tree / "cache").mkdir()
    (watched.tree / "file").write_text("one")
    os.link(watched.tree / "file", watched.tree / "cache" / "name")
    watched.filters = Filters(excludes=(pattern,))
    settle(watched)
    for change in (lambda path: path.write_text("two"), lambda path: path.chmod(0o600)):
        change(watched.tree / "cache" / "name")
        result = watched.sync()
        assert result.snapshot is not None
        assert result.snapshot.source == "watch"
        found = watched.contents(result.snapshot.number)
        assert found[b"/file"] == contents_of_tree(watched.tree)[b"/file"]


def test_a_name_that_came_in_with_its_directory(watched: Watched) -> None:
    """Neither it nor the name that is on record was touched."""
    outside = watched.base / "outside"
    outside.mkdir()
    known = watched.tree / "known"
    (known / "below").mkdir(parents=True)
    (known / "file").write_text("one")
    os.link(known / "file", outside / "name")
    (known / "below" / "file").write_text("one")
    settle(watched)
    (known / "below" / "file").write_text("two")  # so the directory above is looked at already
    outside.rename(watched.tree / "inside")
    heard(watched)
    (watched.tree / "inside" / "name").write_text("two")
    heard(watched)


# -- one number in several places -------------------------------------------------------------


@pytest.fixture
def nested_sources(local_volume: Path) -> Iterator[Watched]:
    """A source within another, so that each directory there is on record twice."""
    base = Path(tempfile.mkdtemp(dir=local_volume))
    outer = base / "outer"
    (outer / "inner" / "old").mkdir(parents=True)
    (outer / "inner" / "old" / "file").write_text("one")
    made = Watched(base, sources=[outer, outer / "inner"])
    made.start()
    yield made
    made.kill()
    made.repository.local.close()
    shutil.rmtree(base)


def check_both(rig: Watched) -> None:
    result = rig.sync()
    assert rig.notes == []
    assert result.snapshot is not None
    found = rig.contents(result.snapshot.number)
    for source in rig.sources:
        name = b"/" + os.fsencode(source.name)
        part = {p.removeprefix(name): found[p] for p in found if p.startswith(name + b"/")}
        there = contents_of_tree(source)
        del there[b"links"]
        assert not difference(part, there)


def test_a_directory_renamed_in_a_source_within_another(nested_sources: Watched) -> None:
    rig = nested_sources
    settle(rig)
    inner = rig.sources[1]
    (inner / "old").rename(inner / "new")
    (inner / "new" / "file").write_text("two")
    check_both(rig)
    (inner / "new").rename(inner / "newest")
    (inner / "newest" / "file").write_text("three")
    check_both(rig)


def test_a_directory_that_moves_between_two_sources(local_volume: Path) -> None:
    """It is the same, as both are on one file system."""
    base = Path(tempfile.mkdtemp(dir=local_volume))
    sources = [base / "first", base / "second"]
    (sources[0] / "directory/below").mkdir(parents=True)
    sources[1].mkdir()
    (sources[0] / "directory/below/file").write_text("text")
    rig = Watched(base, sources=sources)
    try:
        rig.start()
        settle(rig)
        (sources[0] / "directory").rename(sources[1] / "renamed")
        check_both(rig)
        stats = rig.history().snapshots[-1].stats
        assert (stats.new, stats.moved, stats.bytes_read) == (0, 1, 0)
    finally:
        rig.kill()
        rig.repository.local.close()
        shutil.rmtree(base)


def test_directories_of_one_number_on_two_file_systems(base: Path) -> None:
    """Copies of one image: directories of the same number and birth time, in both of which the
    same is done."""
    image, copy = base / "image", base / "copy"
    with loops.file_system(base, "ext4", 32 << 20) as place:
        (place / "old").mkdir()
        (place / "old" / "file").write_text("one")
        run("sync", "-f", place)
        run("fsfreeze", "-f", place)
        shutil.copy(base / "ext4.img", image)
        run("fsfreeze", "-u", place)
    shutil.copy(image, copy)
    run("e2fsck", "-f", "-y", copy)
    run("tune2fs", "-U", "random", copy)
    sources = [base / "first", base / "second"]
    for source, of in zip(sources, (image, copy), strict=True):
        source.mkdir()
        run("mount", "-o", "loop", of, source)
    rig = Watched(base, sources=sources)
    try:
        rig.start()
        settle(rig)
        for source in sources:
            (source / "old").rename(source / "new")
            (source / "new" / "file").write_text(source.name)
        check_both(rig)
    finally:
        rig.kill()
        rig.repository.local.close()
        for source in sources:
            run("umount", "-l", source)


def test_copies_of_a_file_system_are_refused(base: Path) -> None:
    """What is told of one might be of the other."""
    with loops.file_system(base, "ext4", 32 << 20) as first:
        copy, second = base / "copy", base / "second"
        run("fsfreeze", "-f", first)
        shutil.copy(base / "ext4.img", copy)
        run("fsfreeze", "-u", first)
        second.mkdir()
        run("mount", "-o", "loop", copy, second)
        rig = Watched(base, sources=[first, second])
        try:
            with pytest.raises(SourceError, match="has the id of the file system of"):
                rig.start()
        finally:
            rig.repository.local.close()
            run("umount", "-l", second)


def test_a_file_system_without_times_of_birth_is_refused(base: Path) -> None:
    """A directory that got the number of one that was removed would be taken for that one."""
    with loops.file_system(base, "ext4", 32 << 20, "-I", "128") as place:
        rig = Watched(base, sources=[place])
        with pytest.raises(SourceError, match="keeps no times of birth"):
            rig.start()
        rig.repository.local.close()


# -- what a file leaves out -------------------------------------------------------------------


def test_what_changed_in_a_directory_that_is_left_out_since(watched: Watched) -> None:
    """By a file that was made in it, or in one above it, meanwhile: then none of it is read."""
    watched.filters = Filters(exclude_if_present=(".nobackup",))
    (watched.tree / "in" / "below").mkdir(parents=True)
    (watched.tree / "moves" / "below").mkdir(parents=True)
    for name in ("in", "moves"):
        (watched.tree / name / "below" / "file").write_text("one")
    (watched.tree / "out").mkdir()
    (watched.tree / "out" / ".nobackup").touch()
    settle(watched)
    for name in ("in", "moves"):
        (watched.tree / name / "below" / "file").write_text("two")
        (watched.tree / name / "below" / "secret").write_text("three")
    (watched.tree / "in" / ".nobackup").touch()
    (watched.tree / "moves").rename(watched.tree / "out" / "moves")
    result = watched.sync()
    assert watched.notes == []
    assert result.snapshot is not None
    assert result.snapshot.stats.bytes_read == 0
    assert (result.snapshot.stats.files, result.snapshot.stats.dirs) == (0, 3)
    assert watched.contents(result.snapshot.number).keys() == {b"/in", b"/out", b"links"}
    (watched.tree / "in" / ".nobackup").unlink()
    (watched.tree / "out" / ".nobackup").unlink()
    heard(watched)
    (watched.tree / "afterwards").touch()
    watched.kill()
    result = watched.sync()  # a scan counts the same
    assert result.snapshot is not None
    assert (result.snapshot.stats.files, result.snapshot.stats.dirs) == (5, 6)


# -- several places on one file system --------------------------------------------------------


@pytest.fixture
def in_doubt(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """The directories that each sync could not find, and leaves to the next one."""
    found: list[set[int]] = []
    real = Resolver.changelist

    def changelist(self: Resolver) -> Changelist:
        changes = real(self)
        found.append(changes.elsewhere)
        return changes

    monkeypatch.setattr(Resolver, "changelist", changelist)
    return found


@pytest.mark.parametrize("mounted", ["tree/part", "outside"])
def test_a_directory_is_in_one_of_two_places(
    watched: Watched, in_doubt: list[set[int]], mounted: str
) -> None:
    """It is not looked for in the other one."""
    for path in ("tree/part", "tree/place", "tree/in", "outside"):
        (watched.base / path).mkdir()
    run("mount", "--bind", watched.base / mounted, watched.tree / "place")
    try:
        settle(watched)
        changed = [watched.base / path for path in ("tree/in", "tree/part", "tree/place")]
        for directory in changed:
            (directory / "file").write_text("text")
        heard(watched)
        assert in_doubt.pop().isdisjoint(directory.stat().st_ino for directory in changed)
    finally:
        run("umount", watched.tree / "place")


def test_a_directory_that_leaves_one_of_two_places(
    local_volume: Path, in_doubt: list[set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is where one of them holds the other, and goes when it was found in the first."""
    base = Path(tempfile.mkdtemp(dir=local_volume))
    inner = base / "tree" / "inner"
    (inner / "in").mkdir(parents=True)
    rig = Watched(base, sources=[base / "tree", inner])
    rig.start()
    settle(rig)
    (inner / "in" / "file").write_text("text")
    real = Resolver._find

    def move_then(*args: Any) -> Any:
        found = real(*args)
        if found is not None and found.below == b"inner/in":
            (inner / "in").rename(base / "in")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Resolver, "_find", move_then)
        rig.sync()
    assert (base / "in").stat().st_ino in in_doubt.pop()
    (base / "in").rename(inner / "in")
    rig.sync()
    found = rig.contents(rig.history().snapshots[-1].number)
    for path in (b"/tree/inner/in/file", b"/inner/in/file"):
        assert found[path][-1] == b"text"  # type: ignore[index]
    rig.kill()
    rig.repository.local.close()
