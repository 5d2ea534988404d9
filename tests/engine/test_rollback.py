"""A store that was set back on purpose, and then went on elsewhere under the same numbers."""

from __future__ import annotations

import shutil
from pathlib import Path

from cloudfs.format import names
from tests.engine.rig import Rig, contents_of_tree, difference


def test_the_local_state_of_a_snapshot_that_is_another_now_is_not_believed(tmp_path: Path) -> None:
    one = Rig(tmp_path)
    (one.tree / "base").write_bytes(b"base" * 3000)
    one.sync()
    (one.tree / "d").mkdir()
    (one.tree / "d" / "n").write_bytes(b"n" * 9000)
    one.sync()
    one.store.delete([names.manifest(one.record.id, 2)])
    shutil.rmtree(one.local().state_dir / "seen")  # as the message says that one may
    (one.tree / "a").mkdir()
    (one.tree / "a" / "x").write_bytes(b"x" * 5000)
    Rig(tmp_path, machine="two").sync()
    (one.tree / "d" / "n").unlink()
    one = Rig(tmp_path)
    one.sync()
    assert any("made anew" in note for note in one.notes)
    assert not difference(one.contents(3), contents_of_tree(one.tree))
    one.repository.local.close()
