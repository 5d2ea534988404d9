"""Changes heard of by a watch daemon, on real ext4 and xfs: every snapshot is what the tree was."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import strategies as hs
from hypothesis.stateful import RuleBasedStateMachine, rule

from cloudfs.backup import packs
from cloudfs.backup.job import SyncResult
from cloudfs.source.inode import FICLONE
from cloudfs.source.watch import start
from tests.engine import forked
from tests.engine.test_machine import PLACES, SEEDS, SIZES, Tree, hunt
from tests.engine.watched import Watched

RENAME_EXCHANGE = 2
_libc = ctypes.CDLL(None, use_errno=True)


class OnWatch(Tree):
    """The state machine of the engine, with what such file systems can do, under a daemon."""

    volume: Path
    rig: Watched

    def __init__(self) -> None:
        RuleBasedStateMachine.__init__(self)
        self.base = Path(tempfile.mkdtemp(dir=self.volume))
        self.rig = Watched(self.base, max_pack_bytes=5000)
        self.rig.start()
        self.heard = False  # whether the daemon has listened since the last snapshot
        self.models = {}

    @rule(force=hs.booleans())
    def sync_more_often(self, force: bool) -> None:
        """Or most syncs would follow the death of a daemon."""
        self.sync(force)

    @rule()
    def sync_after_a_sync(self) -> None:
        """With what happened in between heard of."""
        self.sync(False)
        self.write([b"a"], 4097, len(self.models))
        self.sync(False)

    @rule(a=PLACES, b=PLACES)
    def clone(self, a: list[bytes], b: list[bytes]) -> None:
        if os.path.isfile(self.path(a)) and not os.path.isdir(self.path(b)):
            with contextlib.suppress(OSError), open(self.path(a), "rb") as source:
                if os.path.exists(self.path(b)) and not os.path.isfile(self.path(b)):
                    return
                with open(self.path(b), "wb") as target:
                    fcntl.ioctl(target, FICLONE, source.fileno())

    @rule(parts=PLACES, offset=SIZES, size=SIZES)
    def punch(self, parts: list[bytes], offset: int, size: int) -> None:
        if os.path.isfile(self.path(parts)) and size:
            with open(self.path(parts), "r+b") as file:
                keep_size_and_punch = 3
                _libc.fallocate(
                    file.fileno(),
                    keep_size_and_punch,
                    ctypes.c_int64(offset),
                    ctypes.c_int64(size),
                )

    @rule(parts=PLACES, size=SIZES, seed=SEEDS)
    def append(self, parts: list[bytes], size: int, seed: int) -> None:
        if os.path.isfile(self.path(parts)):
            with open(self.path(parts), "ab") as file:
                file.write(random.Random(seed).randbytes(min(size, 5000)))

    @rule(a=PLACES, b=PLACES)
    def exchange(self, a: list[bytes], b: list[bytes]) -> None:
        at_cwd = -100
        _libc.renameat2(at_cwd, self.path(a), at_cwd, self.path(b), RENAME_EXCHANGE)

    @rule(parts=PLACES)
    def put_times_back(self, parts: list[bytes]) -> None:
        with contextlib.suppress(OSError):
            os.utime(self.path(parts), ns=(1, 1), follow_symlinks=False)

    @rule(graceful=hs.booleans())
    def restart_daemon(self, graceful: bool) -> None:
        if graceful and self.rig.daemon:
            start.stop(self.rig.place)
            forked.wait(self.rig.daemon)
            self.rig.daemon = 0
        self.rig.kill()
        self.rig.start()
        self.heard = False

    @rule()
    def kill_daemon(self) -> None:
        self.rig.kill()
        self.heard = False

    @rule()
    def lose_local_state(self) -> None:
        self.rig.kill()
        self.rig.forget_local()
        self.rig.start()
        self.heard = False

    def take(self, force: bool) -> SyncResult:
        if not self.rig.daemon:
            result = self.rig.sync(force=force)
            assert any("no daemon" in note for note in self.rig.notes)
            self.rig.start()
            return result
        result = self.rig.sync(force=force)
        words = ("scanned", "made anew")
        scanned = [note for note in self.rig.notes if any(word in note for word in words)]
        assert not (self.heard and scanned), "what was heard of was not gone by"
        if self.models:
            assert self.heard or scanned
            if result.snapshot is not None:
                assert result.snapshot.source == ("watch" if self.heard else "scan")
        self.heard = True
        return result

    def remove_all(self) -> None:
        self.rig.kill()
        shutil.rmtree(self.base)


def prepare(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let frames end everywhere, and the machine work on this file system."""
    monkeypatch.setattr(start, "_spawn", forked.watch)
    monkeypatch.setattr(packs, "FRAME_BYTES", 1000)
    monkeypatch.setattr(OnWatch, "volume", volume, raising=False)


SHARES, LONG_SHARES = 1, 4
"""How many tests each hunt is, for several processes to run at once; each finds sequences of its
own."""


@pytest.mark.parametrize("_share", range(SHARES))
def test_snapshots_are_what_the_tree_was(
    local_volume: Path, monkeypatch: pytest.MonkeyPatch, _share: int
) -> None:
    prepare(local_volume, monkeypatch)
    hunt(25, 100, OnWatch)


@pytest.mark.long
@pytest.mark.parametrize("_share", range(LONG_SHARES))
def test_snapshots_are_what_the_tree_was_for_long(
    local_volume: Path, monkeypatch: pytest.MonkeyPatch, _share: int
) -> None:
    prepare(local_volume, monkeypatch)
    hunt(250, 100, OnWatch)
