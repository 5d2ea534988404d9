"""Syncs by a changelist, with a source that says what the test tells it to."""

from __future__ import annotations

import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from cloudfs.backup import sync as engine
from cloudfs.backup.files import FileReader
from cloudfs.backup.revisit import Revisit
from cloudfs.core.changelist import Changelist, DirChange
from cloudfs.source.filters import Filters
from cloudfs.source.ready import Ready
from cloudfs.source.scan import Scanner
from tests.engine import loops
from tests.engine.rig import Rig, contents_of_tree, difference

Tell = Callable[[Changelist | None], None]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.repository.local.close()


@pytest.fixture
def tell(monkeypatch: pytest.MonkeyPatch) -> Tell:
    """Sets what the source says at each of the following syncs; None: nothing, so they scan."""
    import contextlib

    said: list[Changelist | None] = [Changelist()]

    def ready(job: engine.SyncJob, *_: object) -> contextlib.AbstractContextManager[Ready]:
        return contextlib.nullcontext(Ready("told", job.settings.sources, changes=said[0]))

    monkeypatch.setattr(engine, "_ready", ready)

    def setting(changes: Changelist | None) -> None:
        said[0] = changes

    return setting


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The directories that were listed whole, by path."""
    found: list[bytes] = []
    real = Scanner.visit

    def visiting(self: Scanner, lin: int, path: bytes, *rest: object) -> object:
        found.append(path)
        return real(self, lin, path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Scanner, "visit", visiting)
    return found


def refuse_to_open(patch: pytest.MonkeyPatch, paths: set[bytes]) -> None:
    real = os.open

    def refusing(path: bytes, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path in paths:
            raise PermissionError(13, "Permission denied")
        return real(path, flags, mode, dir_fd=dir_fd)

    patch.setattr(os, "open", refusing)


def let_be_gone(patch: pytest.MonkeyPatch, names: set[bytes]) -> None:
    """When they are read, items of these names are not there."""
    real = FileReader._item

    def gone(self: FileReader, *args: Any) -> None:
        _, _, _, _, stat, _ = args
        if stat.name in names:
            raise FileNotFoundError(2, "No such file or directory")
        real(self, *args)

    patch.setattr(FileReader, "_item", gone)


def check(rig: Rig) -> None:
    last = rig.history().snapshots[-1].number
    assert not difference(rig.contents(last), contents_of_tree(rig.tree))


def test_what_could_not_be_read_is_read_next_time_and_nothing_else(
    rig: Rig, tell: Tell, listed: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("far/a", "near/b", "near/c"):
        (rig.tree / path).parent.mkdir(exist_ok=True)
        (rig.tree / path).write_text(path)
    rig.sync()
    (rig.tree / "near/b").write_text("changed")
    (rig.tree / "near/d").write_text("new")
    tell(Changelist([DirChange(b"near", b"near", {b"b", b"d"}), DirChange(b"", b"", {b"near"})]))
    with monkeypatch.context() as patch:
        refuse_to_open(patch, {b"b", b"d"})
        assert len(rig.sync().unreadable) == 2
        tell(Changelist())
        assert len(rig.sync().unreadable) == 2, "what is still unreadable must be reported again"
    listed.clear()
    assert not rig.sync().unreadable
    assert listed == [b"near"]
    assert not rig.notes
    check(rig)
    listed.clear()
    assert rig.sync().snapshot is None
    assert listed == []


def test_a_directory_that_could_not_be_listed_is_listed_next_time(
    rig: Rig, tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("known", "other"):
        (rig.tree / name).mkdir()
        (rig.tree / name / "file").write_text(name)
    rig.sync()
    (rig.tree / "known/file").write_text("changed")
    (rig.tree / "new/below").mkdir(parents=True)
    (rig.tree / "new/below/file").write_text("new")
    tell(Changelist([DirChange(b"known", b"known", {b"file"}), DirChange(b"", b"", {b"new"})]))
    with monkeypatch.context() as patch:
        real = Scanner.revisit
        real_visit = Scanner.visit

        def failing(self: Scanner, lin: int, change: DirChange, *rest: object, **more: object):
            if change.path == b"known":
                raise OSError(5, "Input/output error")
            return real(self, lin, change, *rest, **more)  # type: ignore[arg-type]

        def failing_visit(self: Scanner, lin: int, path: bytes, *rest: object):
            if path == b"new/below":
                raise OSError(5, "Input/output error")
            return real_visit(self, lin, path, *rest)  # type: ignore[arg-type]

        patch.setattr(Scanner, "revisit", failing)
        patch.setattr(Scanner, "visit", failing_visit)
        assert {path for path, _ in rig.sync().unreadable} == {b"known", b"new/below"}
    os.rename(rig.tree / "new", rig.tree / "moved")
    tell(Changelist([DirChange(b"", b"", {b"new", b"moved"})]))
    assert not rig.sync().unreadable
    assert not rig.notes
    check(rig)


@pytest.mark.parametrize("then", ["nothing", "moved", "taken apart", "exchanged", "again"])
def test_what_is_below_a_directory_that_a_scan_could_not_list(
    rig: Rig, tell: Tell, listed: list[bytes], monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """Nothing of it was looked at by then, and what is told later begins there."""
    known, names = rig.tree / "known", {b"known"}
    for path in ("known/sub/deep/file", "known/other/file", "beside/below/file"):
        (rig.tree / path).parent.mkdir(parents=True)
        (rig.tree / path).write_text(path)
    rig.sync()
    (known / "sub/deep/file").write_text("changed")
    if then == "exchanged":
        for old, new in (("sub", "aside"), ("other", "sub"), ("aside", "other")):
            (known / old).rename(known / new)
    tell(None)
    with monkeypatch.context() as patch:
        refuse_to_open(patch, {b"known"})
        assert rig.sync().unreadable == [(b"known", "permission denied")]
        tell(Changelist())
        if then == "again":
            assert rig.sync().unreadable == [(b"known", "permission denied")]
    told = []
    if then == "moved":
        known.rename(rig.tree / "moved")
        names.add(b"moved")
    elif then == "taken apart":
        (known / "sub").rename(rig.tree / "beside/sub")
        shutil.rmtree(known)
        names.add(b"beside")
        told = [DirChange(b"beside", b"beside", {b"sub"})]
    elif then == "exchanged":
        (known / "sub/file").write_text("changed, too")
        told = [DirChange(b"known/sub", b"known/sub", {b"file"})]
    tell(Changelist([DirChange(b"", b"", names), *told]))
    listed.clear()
    assert not rig.sync().unreadable
    assert not rig.notes
    assert not any(path.startswith(b"beside/below") for path in listed)
    check(rig)
    listed.clear()
    tell(Changelist())
    assert rig.sync().snapshot is None
    assert listed == []


def test_a_directory_that_is_on_record_twice(
    rig: Rig, tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it was could not be listed when it was found where it is."""
    (rig.tree / "known/sub").mkdir(parents=True)
    (rig.tree / "known/sub/file").write_text("file")
    (rig.tree / "other").mkdir()
    rig.sync()
    (rig.tree / "known/sub").rename(rig.tree / "other/sub")
    tell(None)
    with monkeypatch.context() as patch:
        refuse_to_open(patch, {b"known"})
        assert rig.sync().unreadable == [(b"known", "permission denied")]
    (rig.tree / "other/sub/file").write_text("changed")
    inode = (rig.tree / "other/sub").stat().st_ino
    tell(Changelist([DirChange(b"other/sub", None, {b"file"}, inode=inode)], {}, True))
    assert not rig.sync().unreadable
    check(rig)


def test_a_directory_known_by_inode_that_cannot_be_opened_is_reported(
    rig: Rig, tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not taken for one that is not on record, whose changes others see to."""
    (rig.tree / "above/known").mkdir(parents=True)
    (rig.tree / "above/known/file").write_text("before")
    rig.sync()
    (rig.tree / "above/known/file").write_text("after and longer")
    inode = (rig.tree / "above/known").stat().st_ino
    tell(Changelist([DirChange(b"above/known", None, {b"file"}, inode=inode)], {}))
    with monkeypatch.context() as patch:
        refuse_to_open(patch, {b"above/known"})
        assert [path for path, _ in rig.sync().unreadable] == [b"above/known"]
    tell(Changelist([], {}))
    assert not rig.sync().unreadable
    check(rig)


def test_files_known_by_inode_alone(rig: Rig, tell: Tell) -> None:
    """All their names are found, wherever they moved with a directory."""
    (rig.tree / "a/b").mkdir(parents=True)
    (rig.tree / "c").mkdir()
    (rig.tree / "a/b/one").write_text("first")
    os.link(rig.tree / "a/b/one", rig.tree / "c/two")
    (rig.tree / "c/alone").write_text("alone")
    rig.sync()
    inode = (rig.tree / "c/two").stat().st_ino
    with (rig.tree / "c/two").open("a") as file:
        file.write(" and more")
    os.rename(rig.tree / "a", rig.tree / "z")
    moved = DirChange(b"", None, {b"a", b"z"}, inode=rig.tree.stat().st_ino)
    tell(Changelist([moved], {inode: None}, reread=True))
    result = rig.sync()
    assert (result.new, result.deleted, result.moved) == (0, 0, 1)
    check(rig)
    # One of the names goes away; nobody names the other one.
    os.unlink(rig.tree / "z/b/one")
    gone = DirChange(b"z/b", None, {b"one"}, inode=(rig.tree / "z/b").stat().st_ino)
    within = DirChange(b"z", None, {b"b"}, inode=(rig.tree / "z").stat().st_ino)
    tell(Changelist([gone, within], {inode: None}, reread=True))
    assert rig.sync().deleted == 0
    check(rig)
    # It gets another one, in a new directory.
    (rig.tree / "new").mkdir()
    os.link(rig.tree / "c/two", rig.tree / "new/three")
    tell(Changelist([DirChange(b"", None, {b"new"}, inode=rig.tree.stat().st_ino)], {}))
    rig.sync()
    check(rig)


def test_what_changed_deep_within_what_moved_into_something_new(rig: Rig, tell: Tell) -> None:
    """When the new directory is looked at, all that the moved one held has vanished already."""
    (rig.tree / "old/b/c").mkdir(parents=True)
    (rig.tree / "old/b/c/file").write_text("before")
    rig.sync()
    file, directory = rig.tree / "old/b/c/file", rig.tree / "old/b/c"
    file.write_text("after and longer")
    directory.chmod(0o700)
    inodes = {file.stat().st_ino: [(0, 4096)], directory.stat().st_ino: []}
    (rig.tree / "new/newer").mkdir(parents=True)
    os.rename(rig.tree / "old", rig.tree / "new/newer/moved")
    tell(Changelist([DirChange(b"", None, {b"old", b"new"}, inode=rig.tree.stat().st_ino)], inodes))
    result = rig.sync()
    assert (result.moved, result.deleted) == (1, 0)
    check(rig)


def test_what_changed_within_what_moves_when_others_are_looked_at(rig: Rig, tell: Tell) -> None:
    """Where a directory went is seen only when a further name of a file is looked for."""
    (rig.tree / "a/b").mkdir(parents=True)
    (rig.tree / "z").mkdir()
    (rig.tree / "a/b/file").write_text("before")
    (rig.tree / "z/known").write_text("known")
    rig.sync()
    file = rig.tree / "a/b/file"
    file.write_text("after and longer")
    inodes = {file.stat().st_ino: [(0, 4096)], (rig.tree / "z").stat().st_ino: []}
    os.rename(rig.tree / "a", rig.tree / "z/a")
    (rig.tree / "z").rename(rig.tree / "y")
    top = DirChange(b"", None, {b"a", b"z", b"y"}, inode=rig.tree.stat().st_ino)
    there = DirChange(b"y", None, {b"a"}, inode=(rig.tree / "y").stat().st_ino)
    tell(Changelist([top, there], inodes))
    result = rig.sync()
    assert (result.moved, result.deleted) == (2, 0)
    check(rig)


@pytest.mark.parametrize("source", ["scan", "told"])
def test_a_name_that_leaves_the_tree_with_its_directory(
    rig: Rig, request: pytest.FixtureRequest, source: str
) -> None:
    """The file has another one where nothing changed, and is not deleted."""
    for name in ("a", "b/below", "c"):
        (rig.tree / name).mkdir(parents=True)
    (rig.tree / "a/one").write_text("data")
    (rig.tree / "c/gone").write_text("gone")
    os.link(rig.tree / "a/one", rig.tree / "b/below/two")
    os.link(rig.tree / "c/gone", rig.tree / "a/gone-too")
    rig.sync()
    (rig.tree / "a").rename(rig.base / "outside")
    (rig.tree / "c").rename(rig.base / "outside too")
    if source == "told":
        top = DirChange(b"", None, {b"a", b"c"}, inode=rig.tree.stat().st_ino)
        request.getfixturevalue("tell")(Changelist([top], {}))
    result = rig.sync()
    assert result.deleted == 3, "two directories and one file"
    check(rig)


def test_data_that_changed_behind_the_same_times(rig: Rig, tell: Tell) -> None:
    """Where a source says so, data is compared though lstat says that nothing changed."""
    for name in ("told", "untold"):
        (rig.tree / name).write_bytes(b"before")
    rig.sync()
    state = contents_of_tree(rig.tree)
    import cloudfs.source.scan as scanning

    real = scanning.raw_entry

    def unmoved(name: bytes, status: os.stat_result, dev: int, mask: int = -1) -> scanning.RawEntry:
        found = real(name, status, dev, mask)
        return found if name not in (b"told", b"untold") else known[name]

    known = {
        name: real(name, os.lstat(os.fsencode(rig.tree) + b"/" + name), rig.tree.stat().st_dev)
        for name in (b"told", b"untold")
    }
    for name in ("told", "untold"):
        times = os.stat(rig.tree / name)
        (rig.tree / name).write_bytes(b"after!")
        os.utime(rig.tree / name, ns=(times.st_atime_ns, times.st_mtime_ns))
    tell(Changelist([DirChange(b"", None, {b"told"}, inode=rig.tree.stat().st_ino)], {}, True))
    scanning.raw_entry = unmoved
    try:
        rig.sync()
    finally:
        scanning.raw_entry = real
    found = rig.contents(2)
    assert found[b"/told"][-1] == b"after!"  # type: ignore[index]
    assert found[b"/untold"] == state[b"/untold"]


def test_another_directory_in_the_place_of_one(rig: Rig, tell: Tell) -> None:
    """A directory that is swapped for another while a sync looks there is not taken for it."""
    for name in ("x", "y"):
        (rig.tree / name).mkdir()
        (rig.tree / name / "file").write_text(name)
    rig.sync()
    inode = (rig.tree / "x").stat().st_ino
    os.rename(rig.tree / "x", rig.tree / "aside")
    os.rename(rig.tree / "y", rig.tree / "x")
    (rig.tree / "aside/file").write_text("x changed")
    top = rig.tree.stat().st_ino
    # The source said where it was before the renames, of which it does not know yet.
    tell(Changelist([DirChange(b"x", b"x", {b"file"}, inode=inode)], {}))
    assert rig.sync().unreadable == [(b"x", "is gone")]
    tell(Changelist([DirChange(b"", None, {b"x", b"y", b"aside"}, inode=top)], {}))
    assert not rig.sync().unreadable
    check(rig)


@pytest.mark.parametrize("full", [False, True])
def test_directories_in_each_other_that_got_the_numbers_of_old_ones(
    rig: Rig, tell: Tell, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """They are looked at whole, each: nobody tells what was in the old ones."""
    below = rig.tree / "a/b/c"
    below.mkdir(parents=True)
    for path in ("a", "a/b", "a/b/c") if full else ():
        (rig.tree / path / "file").write_text("of the old one")
    rig.sync()
    paths = (b"a", b"a/b", b"a/b/c")
    inodes = {(rig.tree / os.fsdecode(path)).stat().st_ino: None for path in paths}
    if full:
        inodes |= {(below / "file").stat().st_ino: None}
        for path in paths:
            (rig.tree / os.fsdecode(path) / "file").unlink()
    (below / "new").write_text("of the new one")
    dirs = [DirChange(path, None, inode=ino) for path, ino in zip(paths, inodes, strict=False)]
    dirs[2].names = {b"new"}
    top = DirChange(b"", None, {b"a"}, inode=rig.tree.stat().st_ino)
    tell(Changelist([top, *dirs], inodes))
    real = Revisit._same_directory

    def born_later(self: Revisit, lin: int, path: bytes) -> bool:
        return path not in paths and real(self, lin, path)

    with monkeypatch.context() as patch:
        patch.setattr(Revisit, "_same_directory", born_later)
        assert not rig.sync().unreadable
    check(rig)


@pytest.mark.parametrize("step", ["listed", "read"])
def test_directories_that_are_exchanged_for_a_moment(
    rig: Rig, tell: Tell, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """What is found under another one's name then is not taken for what was listed there: nobody
    would look at it again."""
    (rig.tree / "known").write_text("known")
    rig.sync()
    for name in ("x", "y"):
        (rig.tree / name).mkdir()
        (rig.tree / name / "file").write_text(f"of {name}")
        (rig.tree / name / f"only in {name}").write_text(name)
    told = Changelist([DirChange(b"", None, {b"x", b"y"}, inode=rig.tree.stat().st_ino)], {}, True)
    tell(told)

    def exchange() -> None:
        for old, new in (("x", "aside"), ("y", "x"), ("aside", "y")):
            os.rename(rig.tree / old, rig.tree / new)

    if step == "listed":
        place: type = Scanner
        method, at = "visit", lambda args: args[1] == b"x"
    else:
        place = FileReader
        method, at = "_items", lambda args: args[1].path == b"x"
    real = getattr(place, method)

    def exchanged(self: object, *args: object) -> object:
        if not at(args):
            return real(self, *args)
        exchange()
        try:
            return real(self, *args)
        finally:
            exchange()

    with monkeypatch.context() as patch:
        patch.setattr(place, method, exchanged)
        assert rig.sync().unreadable
    tell(told)
    assert not rig.sync().unreadable
    check(rig)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("gone", [{b"one"}, {b"one", b"two"}, {b"one", b"two", b"three"}])
def test_a_new_file_that_is_gone_from_the_name_by_which_it_was_to_be_read(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, first: bool, gone: set[bytes]
) -> None:
    """It is read under another, or described without data if there is none: names lead to it."""
    if not first:
        rig.sync()
    for name in ("a", "b", "c"):
        (rig.tree / name).mkdir()
    (rig.tree / "a/one").write_bytes(b"data" * 3000)
    for name in ("b/two", "c/three"):
        os.link(rig.tree / "a/one", rig.tree / name)
    with monkeypatch.context() as patch:
        let_be_gone(patch, gone)
        result = rig.sync()
    assert {path.rpartition(b"/")[2] for path, _ in result.unreadable} == gone
    assert result.snapshot is not None
    found = rig.contents(result.snapshot.number)
    assert found.keys() >= {b"/b/two", b"/c/three"}
    assert b"/a/one" not in found
    if len(gone) < 3:
        assert b"data" * 3000 in cast(tuple[object, ...], found[b"/b/two"])
    assert not rig.sync().unreadable
    check(rig)


@pytest.mark.parametrize("told", [None, "a name", "a number"])
@pytest.mark.parametrize("then", ["removed", "left"])
def test_a_known_file_that_cannot_be_read_under_a_name_that_goes(
    rig: Rig, tell: Tell, monkeypatch: pytest.MonkeyPatch, told: str | None, then: str
) -> None:
    """What is known of its other names is as old as what was known of that one."""
    for name in ("a", "b", "c"):
        (rig.tree / name).mkdir()
        (rig.tree / name / "file").write_text(name)
    os.link(rig.tree / "a/file", rig.tree / "b/other")
    time.sleep(0.05)  # so that nothing is read just because it is fresh
    rig.sync()
    (rig.tree / "a/file").write_text("changed")
    time.sleep(0.05)
    inodes: dict[int, Any] | None = None
    if told == "a number":
        inodes = {(rig.tree / "a/file").stat().st_ino: None}
    tell(Changelist([DirChange(b"a", b"a", {b"file"})], inodes) if told else None)
    with monkeypatch.context() as patch:
        let_be_gone(patch, {b"file", b"other"})
        assert rig.sync().unreadable == [(b"a/file", "is gone")]
    changes = Changelist([DirChange(b"", b"", {b"a"})])
    if then == "removed":
        (rig.tree / "a/file").unlink()
        changes.dirs.append(DirChange(b"a", b"a", {b"file"}))
    else:
        (rig.tree / "a").rename(rig.base / "outside")
    tell(changes if told else None)
    assert not rig.sync().unreadable
    check(rig)


def test_a_directory_that_is_gone_when_it_is_described_leaves_nothing_behind(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (rig.tree / "beside").write_text("beside")
    rig.sync()
    (rig.tree / "directory/below").mkdir(parents=True)
    (rig.tree / "directory/below/file").write_text("data")
    with monkeypatch.context() as patch:
        let_be_gone(patch, {b"directory"})
        result = rig.sync()
    assert result.unreadable == [(b"directory", "is gone")]
    assert result.snapshot is not None
    assert (result.snapshot.stats.files, result.snapshot.stats.dirs) == (1, 1)
    result = rig.sync()
    assert result.snapshot is not None
    assert (result.snapshot.stats.files, result.snapshot.stats.dirs) == (2, 3)
    check(rig)


def test_what_moved_and_is_gone_when_it_is_described_stays_as_it_was(
    rig: Rig, tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under its new name, so that nothing below it is read anew; and is found there."""
    (rig.tree / "directory/below").mkdir(parents=True)
    file = rig.tree / "directory/below/file"
    file.write_bytes(os.urandom(50_000))
    (rig.tree / "alone").write_bytes(b"alone" * 10_000)
    (rig.tree / "other").mkdir()
    rig.sync()
    (rig.tree / "directory").rename(rig.tree / "other/moved")
    (rig.tree / "alone").rename(rig.tree / "other/moved-too")
    top, other = (path.stat().st_ino for path in (rig.tree, rig.tree / "other"))
    told = [
        DirChange(b"", None, {b"directory", b"alone", b"other"}, inode=top),
        DirChange(b"other", None, {b"moved", b"moved-too"}, inode=other),
    ]
    tell(Changelist(told, {}))
    with monkeypatch.context() as patch:
        let_be_gone(patch, {b"moved", b"moved-too"})
        result = rig.sync()
    assert len(result.unreadable) == 2
    assert (result.moved, result.deleted) == (2, 0)
    assert result.snapshot is not None
    check(rig)
    file = rig.tree / "other/moved/below/file"
    file.write_bytes(b"changed")
    tell(Changelist([], {file.stat().st_ino: None}))
    result = rig.sync()
    assert not result.unreadable
    assert result.snapshot is not None
    assert result.snapshot.stats.bytes_read < 100_000
    assert (result.new, result.deleted) == (0, 0)
    check(rig)


@pytest.mark.parametrize("excludes", [(), ("doc/",)])
def test_a_name_that_cannot_be_looked_at(rig: Rig, tell: Tell, excludes: tuple[str, ...]) -> None:
    """What it is decides whether the patterns leave it out."""
    place = rig.tree / "cache" / "doc"
    place.mkdir(parents=True)
    (place / "hidden").write_text("as it was")
    (rig.tree / "cache" / "file").write_text("text")
    rig.filters = Filters(excludes)
    rig.sync()
    with loops.mount_of_another(place):
        tell(Changelist([DirChange(b"cache", b"cache", {b"doc"})], {}, reread=True))
        result = rig.sync(force=True)
        assert result.unreadable == ([] if excludes else [(b"cache/doc", "permission denied")])
        assert rig.notes == []
    assert (b"/cache/doc/hidden" in rig.contents(2)) == (not excludes)


def test_data_that_changed_without_a_time(rig: Rig, tell: Tell) -> None:
    """A write that takes long moves the times when it begins, and a clock ticks slowly: what is
    told is read whatever they say, and no more of it than is told."""
    file = rig.tree / "file"
    file.write_bytes(bytes(100_000))
    with file.open("r+b") as opened:
        mapped = mmap.mmap(opened.fileno(), 0)
    mapped[0] = mapped[50_000] = 1  # of these pages the next writes move no times
    rig.sync()
    mapped[0] = mapped[50_000] = 2
    mapped.close()
    tell(Changelist([DirChange(b"", b"", {b"file"}, {b"file": [(50_000, 50_001)]})]))
    result = rig.sync()
    assert result.changed == 1
    assert result.snapshot is not None
    assert result.snapshot.stats.bytes_read == rig.block_size
    tell(Changelist([DirChange(b"", b"", {b"file"}, {b"file": [(0, 1)]})]))
    rig.sync()
    assert not difference(rig.contents(3), contents_of_tree(rig.tree))


def test_files_of_which_nothing_was_told(
    rig: Rig, tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read only where lstat says that they are others."""
    inodes = set()
    for name in ("same", "other"):
        (rig.tree / name).write_text("text")
        inodes.add((rig.tree / name).stat().st_ino)
    time.sleep(0.05)  # so that they are not read just because they are fresh
    rig.sync()
    (rig.tree / "other").write_text("another")
    read, real = [], FileReader._item

    def reading(*what: Any) -> None:
        read.append(what[5].name)
        real(*what)

    monkeypatch.setattr(FileReader, "_item", reading)
    tell(Changelist([], {}, reread=True, looks=inodes))
    rig.sync()
    assert read == [b"other"]
    assert not difference(rig.contents(2), contents_of_tree(rig.tree))


@pytest.mark.parametrize(
    ("excludes", "whole"),
    [
        (("*.tmp", "cache/"), False),
        (("*.tmp", "/moved/below/extra"), True),
        (("below/extra",), True),
        (("moved", "!moved/"), True),
    ],
)
def test_what_moved_is_looked_at_whole_only_where_patterns_go_by_paths(
    rig: Rig, tell: Tell, listed: list[bytes], excludes: tuple[str, ...], whole: bool
) -> None:
    place = rig.tree / "known" / "below"
    place.mkdir(parents=True)
    for name in ("file", "extra", "left.tmp"):
        (place / name).write_text(name)
    rig.filters = Filters(excludes)
    rig.sync()
    (rig.tree / "known").rename(rig.tree / "moved")
    listed.clear()
    tell(Changelist([DirChange(b"", b"", {b"known", b"moved"})]))
    rig.sync()
    assert set(listed) == ({b"moved", b"moved/below"} if whole else set())
    found = rig.contents(2)
    rig.forget_local()  # so that the tree is scanned
    rig.sync(force=True)
    assert any("is scanned" in note for note in rig.notes)
    assert found == rig.contents(3)
