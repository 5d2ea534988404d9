"""Changes told by commands: every snapshot is what the tree was, whatever they say."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import strategies as hs
from hypothesis.stateful import RuleBasedStateMachine, rule

from cloudfs.backup import packs
from cloudfs.backup.job import SyncResult
from cloudfs.source.external.command import Commands
from tests.engine import snapshotter
from tests.engine.rig import Rig
from tests.engine.test_machine import Tree, hunt

WAYS = ("full", "plain", "tops", "lists", "inodes")
TOP = Path(__file__).parents[2]


def commands(base: Path) -> Commands:
    """Those of the made-up snapshotter."""
    program = (sys.executable, snapshotter.__file__, str(base))
    return Commands(
        snapshot=(*program, "snapshot"),
        changes=(*program, "changes"),
        release=(*program, "release"),
        timeout_s=60,
        environment={"PATH": os.environ["PATH"], "PYTHONPATH": str(TOP)},
    )


class Snapshotted(Tree):
    """The state machine of the engine on an ext4 with made-up snapshots."""

    def __init__(self) -> None:
        RuleBasedStateMachine.__init__(self)
        self.base = Path(tempfile.mkdtemp(prefix="cloudfs-external-", dir="/dev/shm"))
        tree = snapshotter.make(self.base / "fs")
        self.rig = Rig(self.base, [tree], max_pack_bytes=5000, source="external")
        self.rig.external = commands(self.base / "fs")
        self.models = {}
        self.reasons: list[str] = []

    @rule(way=hs.sampled_from(WAYS))
    def tell_in_another_way(self, way: str) -> None:
        (self.base / "fs" / "way").write_text(way)

    def take(self, force: bool) -> SyncResult:
        known = bool(self.models) and (self.base / "machines" / self.rig.machine).exists()
        result = self.rig.sync(force=force)
        if known and (self.base / "fs" / "way").read_text() == "full":
            assert not self.rig.notes, self.rig.notes
        self.reasons.extend(self.rig.notes)
        if result.snapshot is not None:
            assert result.snapshot.source == "external"
            assert result.snapshot.consistent
        return result

    def remove_all(self) -> None:
        left = list((self.base / "fs" / "snapshots").glob("*.img"))
        snapshotter.remove(self.base / "fs")
        shutil.rmtree(self.base)
        assert len(left) <= 1 + self.forgotten, "snapshots were left behind"

    forgotten = 0

    @rule()
    def lose_local_state(self) -> None:
        self.forgotten += 1
        self.rig.forget_local()


@pytest.fixture(autouse=True)
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that frames and packs end in the middle of these small trees too."""
    monkeypatch.setattr(packs, "FRAME_BYTES", 1000)


def test_snapshots_are_what_the_tree_was() -> None:
    hunt(10, 30, Snapshotted)


@pytest.mark.long
def test_snapshots_are_what_the_tree_was_for_long() -> None:
    hunt(500, 100, Snapshotted)
