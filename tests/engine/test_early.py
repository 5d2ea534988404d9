"""What cannot have moved is handed out during the walk; what moved amid it is known again."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from cloudfs.backup import revisit, walk
from cloudfs.backup import sync as engine
from cloudfs.core.changelist import Changelist, DirChange
from cloudfs.core.changes import DirTask, Visit
from cloudfs.core.treediff import TreeDiff
from cloudfs.source.ready import Ready
from tests.engine.rig import Rig, contents_of_tree, difference


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """A tree that was synced; whatever appears in it is judged early."""
    monkeypatch.setattr(walk, "EARLY_ITEMS", 1)
    monkeypatch.setattr(walk, "EARLY_SHARE", 1_000_000)
    rig = Rig(tmp_path)
    for name in ("a", "m", "z"):
        (rig.tree / name).mkdir()
        for number in range(4):
            (rig.tree / name / f"file{number}").write_text(f"{name}{number}" * 2000)
    rig.sync()
    return rig


def replace(path: Path, text: str) -> None:
    """Put another inode in a file's place; the old one is not free before the new one is there."""
    path.with_name("temporary").write_text(text)
    path.with_name("temporary").rename(path)


def lins(rig: Rig, snapshot: int) -> dict[bytes, int]:
    history = rig.history()
    found = {path: entry.lin for path, entry, _ in history.view(snapshot).walk()}
    history.close()
    return found


def test_what_moved_keeps_its_lin_and_the_rest_is_new(rig: Rig) -> None:
    before = lins(rig, 1)
    # Where the walk comes early: things from where it comes late, and things that are new.
    (rig.tree / "z" / "file0").rename(rig.tree / "a" / "from-z")
    (rig.tree / "m").rename(rig.tree / "a" / "m")
    (rig.tree / "a" / "new").write_text("new")
    (rig.tree / "a" / "fresh").mkdir()
    (rig.tree / "a" / "fresh" / "below").write_text("below")
    replace(rig.tree / "a" / "file1", "another")
    result = rig.sync()
    assert (result.moved, result.new, result.deleted) == (2, 4, 1)
    after = lins(rig, 2)
    assert after[b"/a/from-z"] == before[b"/z/file0"]
    assert after[b"/a/m"] == before[b"/m"]
    assert after[b"/a/m/file2"] == before[b"/m/file2"]
    assert after[b"/a/new"] not in before.values()
    assert not difference(rig.contents(2), contents_of_tree(rig.tree))
    rig.repository.local.close()


def test_the_same_where_a_changelist_names_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot have moved is handed out while the names are looked at."""
    monkeypatch.setattr(revisit, "QUOTA", 1)
    judged = []
    real = TreeDiff.judge_early

    def judging(self: TreeDiff, known: set[int]) -> tuple[list[DirTask], list[Visit]]:
        tasks, visits = real(self, known)
        judged.extend(path for _, path, _ in visits)
        return tasks, visits

    monkeypatch.setattr(TreeDiff, "judge_early", judging)
    before = lins(rig, 1)
    (rig.tree / "z" / "file0").rename(rig.tree / "a" / "from-z")
    (rig.tree / "m").rename(rig.tree / "a" / "m")
    (rig.tree / "a" / "fresh").mkdir()
    (rig.tree / "a" / "fresh" / "below").write_text("below")
    changes = [
        DirChange(b"", b"", {b"a", b"m", b"z"}),
        DirChange(b"a", b"a", {b"from-z", b"m", b"fresh"}),
        DirChange(b"z", b"z", {b"file0"}),
    ]
    ready = Ready("told", rig.settings().sources, changes=Changelist(changes))
    monkeypatch.setattr(engine, "_ready", lambda *_: contextlib.nullcontext(ready))
    result = rig.sync()
    assert judged == [b"a/fresh"]
    assert (result.moved, result.new, result.deleted) == (2, 2, 0)
    after = lins(rig, 2)
    assert after[b"/a/from-z"] == before[b"/z/file0"]
    assert after[b"/a/m/file2"] == before[b"/m/file2"]
    assert not difference(rig.contents(2), contents_of_tree(rig.tree))
    rig.repository.local.close()


def test_a_tree_that_is_written_anew_uploads_what_differs(rig: Rig) -> None:
    """As an archive unpacked over it does: every file is another inode, most hold the same."""
    for path in sorted(rig.tree.glob("*/file*")):
        data = path.read_text()
        replace(path, data if path.name != "file3" else "changed")
    result = rig.sync()
    assert result.snapshot is not None
    assert (result.new, result.deleted) == (12, 12)
    assert result.snapshot.stats.bytes_stored < 8_000
    assert not difference(rig.contents(2), contents_of_tree(rig.tree))
    rig.repository.local.close()
