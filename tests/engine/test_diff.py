"""What is told of two snapshots, applied to the older one, gives the newer one; and each case."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudfs.core.rows import ItemType
from cloudfs.core.snapdiff import Change
from cloudfs.repo.compare import compare
from cloudfs.repo.history import History
from cloudfs.repo.view import SnapshotView
from tests.engine.rig import Rig
from tests.engine.test_machine import Tree, hunt


class Node:
    """An item under one of its names."""

    def __init__(self, lin: int) -> None:
        self.lin = lin
        self.children: dict[bytes, Node] = {}

    def at(self, path: bytes) -> Node:
        node = self
        for part in path.strip(b"/").split(b"/") if path != b"/" else ():
            node = node.children[part]
        return node

    def put(self, path: bytes, node: Node) -> None:
        parent, _, name = path.rpartition(b"/")
        children = self.at(parent or b"/").children
        assert name not in children, path
        children[name] = node

    def take(self, path: bytes) -> Node:
        parent, _, name = path.rpartition(b"/")
        return self.at(parent or b"/").children.pop(name)

    def names(self, prefix: bytes = b"") -> Iterator[tuple[bytes, int]]:
        for name, child in self.children.items():
            yield prefix + b"/" + name, child.lin
            yield from child.names(prefix + b"/" + name)


class Snapshot:
    """One snapshot by full walk: names as a tree, and what belongs to each LIN."""

    def __init__(self, view: SnapshotView) -> None:
        self.root = Node(1)
        self.items = {1: self.item(view, 1)}
        for path, entry, _ in view.walk():
            self.root.put(path, Node(entry.lin))
            self.items[entry.lin] = self.item(view, entry.lin)

    @staticmethod
    def item(view: SnapshotView, lin: int) -> tuple[object, ...]:
        meta = view.need(lin)
        data: object = meta.target
        if meta.type == ItemType.REGULAR:
            data = view.blocks_reader.read(view, meta, 0, meta.size)
        links = 0 if meta.type == ItemType.DIRECTORY else meta.nlink
        xattrs = tuple(sorted(view.xattrs(meta).items()))
        return meta.type, data, meta.mode, meta.uid, meta.mtime_ns, meta.rdev, links, xattrs


def replay(old: Snapshot, new: Snapshot, changes: list[Change]) -> None:
    """Apply what is told to the older snapshot, which then must be the newer one."""
    root, items = old.root, dict(old.items)
    renamed = {c.path: root.at(c.old_path) for c in changes if c.kind == "R"}
    for change in sorted(changes, key=lambda c: c.old_path, reverse=True):
        if change.kind in "-R":
            taken = root.take(change.old_path)
            if change.kind == "-":
                assert not taken.children, "something in it was not told"
    for change in sorted(changes, key=lambda c: c.path):
        if change.kind in "+R":
            root.put(change.path, renamed.get(change.path) or Node(0))
        if change.kind in "+TMm":
            node, lin = root.at(change.path), new.root.at(change.path).lin
            if change.kind == "M":
                assert old.items[node.lin][1] != new.items[lin][1], f"{change} of equal content"
            node.lin = lin
            items[lin] = new.items[lin]
    assert dict(root.names()) == dict(new.root.names())
    for path, lin in new.root.names():
        assert items[lin] == new.items[lin], path


def check(history: History, before: int, after: int) -> list[Change]:
    """The differences, after a proof that they are right."""
    changes = compare(history, before, after)
    replay(Snapshot(history.view(before)), Snapshot(history.view(after)), changes)
    return changes


class Compared(Tree):
    """The state machine of the engine; at its end each pair of snapshots is compared."""

    def teardown(self) -> None:
        try:
            if not self.models:
                return
            self.sync(False)
            history = self.rig.history()
            numbers = sorted(self.models)[-4:]
            for before in numbers:
                for after in numbers:
                    check(history, before, after)
            history.repository.local.close()
        finally:
            self.rig.repository.local.close()
            self.remove_all()


def test_what_is_told_gives_the_other_snapshot() -> None:
    hunt(25, 40, Compared)


@pytest.mark.long
def test_what_is_told_gives_the_other_snapshot_for_long() -> None:
    hunt(1000, 80, Compared)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    """A tree of a few directories, not synced yet."""
    rig = Rig(tmp_path)
    for path, text in {
        "d/x": "1",
        "d/sub/y": "2",
        "e/x": "1",
        "e/k": "keep",
        "f": "f" * 9000,
    }.items():
        (rig.tree / path).parent.mkdir(parents=True, exist_ok=True)
        (rig.tree / path).write_text(text)
    return rig


def differences(rig: Rig, before: int = 1) -> set[str]:
    """Sync, and tell what differs from a snapshot; what only says that times differ is left out."""
    rig.sync()
    history = rig.history()
    changes = check(history, before, history.snapshots[-1].number)
    history.repository.local.close()
    rig.repository.local.close()
    return {
        f"{c.kind} {os.fsdecode(c.old_path + b'>' if c.kind == 'R' else b'')}{os.fsdecode(c.path)}"
        for c in changes
        if c.kind != "m" or c.type != ItemType.DIRECTORY
    }


def test_a_directory_that_became_a_file_took_all_in_it_along(rig: Rig) -> None:
    rig.sync()
    shutil.rmtree(rig.tree / "d")
    (rig.tree / "d").write_text("file")
    assert differences(rig) == {"T /d", "- /d/x", "- /d/sub", "- /d/sub/y"}


def test_a_directory_made_anew_is_compared_name_by_name(rig: Rig) -> None:
    rig.sync()
    shutil.rmtree(rig.tree / "e")
    (rig.tree / "e").mkdir()
    (rig.tree / "e" / "x").write_text("2")
    (rig.tree / "e" / "new").write_text("n")
    assert differences(rig) == {"M /e/x", "- /e/k", "+ /e/new"}


def test_a_file_written_anew_with_equal_content_is_of_other_metadata(rig: Rig) -> None:
    rig.sync()
    shutil.copyfile(rig.tree / "f", rig.tree / "copy")
    (rig.tree / "copy").rename(rig.tree / "f")
    assert differences(rig) == {"m /f"}


def test_what_was_renamed_and_changed_is_told_as_both(rig: Rig) -> None:
    rig.sync()
    before = (rig.tree / "f").stat()
    (rig.tree / "f").rename(rig.tree / "g")
    with (rig.tree / "g").open("r+b") as file:
        file.seek(5000)
        file.write(b"x")
    os.utime(rig.tree / "g", ns=(0, before.st_mtime_ns))  # by which the scan knows it again
    assert differences(rig) == {"R /f>/g", "M /g"}


def test_rotated_logs_are_renamed(rig: Rig) -> None:
    (rig.tree / "log.1").write_text("older")
    rig.sync()
    (rig.tree / "log.1").rename(rig.tree / "log.2")
    (rig.tree / "f").rename(rig.tree / "log.1")
    (rig.tree / "f").write_text("new")
    assert differences(rig) == {"R /log.1>/log.2", "R /f>/log.1", "+ /f"}


def test_directories_that_change_places_are_two_renames(rig: Rig) -> None:
    rig.sync()
    (rig.tree / "d").rename(rig.tree / "t")
    (rig.tree / "e").rename(rig.tree / "d")
    (rig.tree / "t").rename(rig.tree / "e")
    assert differences(rig) == {"R /d>/e", "R /e>/d"}


def test_what_came_and_went_in_between_is_not_told(rig: Rig) -> None:
    """Rows of names in a directory that is gone are no sign of damage."""
    rig.sync()
    (rig.tree / "d" / "late").write_text("late")
    rig.sync()
    shutil.rmtree(rig.tree / "d")
    assert differences(rig) == {"- /d", "- /d/x", "- /d/sub", "- /d/sub/y"}
