"""Many at work on a tree at the same time: every snapshot is what the tree was at its moment.

Other hunts do one thing after another. Here processes do whatever they like, so what a mount is
asked by one meets what it is asked by others, and much has changed between two snapshots.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudfs.backup import packs
from cloudfs.backup.job import SyncResult
from cloudfs.fuse import daemon
from cloudfs.source.btrfs import session
from cloudfs.source.watch import start
from tests.engine import btrfs, forked
from tests.engine.crowd import Crowd, crowd
from tests.engine.living import Living, Meanwhile, living
from tests.engine.rig import Rig, contents_of_tree, difference
from tests.engine.test_btrfs import remove
from tests.engine.test_live import Contents, file_system
from tests.engine.watched import Watched

MEMBERS = 4
ROUNDS, LONG_ROUNDS = 8, 500
MODELS = 20
"""So many snapshots are compared once more in the end."""

QUICK = pytest.param(ROUNDS, id="quick")
LONG = pytest.param(LONG_ROUNDS, id="long", marks=pytest.mark.long)


@pytest.fixture(autouse=True)
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "FRAME_BYTES", 1000)


@pytest.fixture
def base(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory on a file system of a kind."""
    with file_system(request.param) as place:
        yield Path(tempfile.mkdtemp(dir=place))


class Among:
    """Syncs of a tree at which a crowd is at work but for the moment of each."""

    def __init__(self, rig: Rig, source: str, mood: str = "any") -> None:
        """``source`` is what all syncs but the first have to go by; ``mood`` as of
        :func:`tests.engine.crowd.deed`."""
        self.rig, self.source, self.mood = rig, source, mood
        seed = random.SystemRandom().getrandbits(32)
        print(f"seed {seed}: of what each does, but not of when")
        self.dice = random.Random(seed)
        self.models: dict[int, Contents] = {}

    def run(self, rounds: int) -> None:
        """So many syncs."""
        seeds = [self.dice.getrandbits(32) for _ in range(MEMBERS)]
        with crowd(self.rig.tree, seeds, self.mood) as people:
            for turn in range(rounds):
                people.go_on()
                time.sleep(self.dice.random() / 20)
                self.stop(people)
                model = self.look()
                self.rig.verify = float(self.dice.random() < 0.3)
                result = self.sync(people)
                self.no_alarm(result)
                made = result.snapshot
                assert made is not None
                assert not result.unreadable, result.unreadable
                assert not turn or made.source == self.source, self.rig.notes
                self.compare(made.number, model)
                self.models[made.number] = model
                if len(self.models) > MODELS:
                    self.models.pop(self.dice.choice(sorted(self.models)))
        for number, model in self.models.items():
            self.compare(number, model)

    def compare(self, number: int, model: Contents) -> None:
        differing = difference(self.rig.contents(number), model)
        assert not differing, f"snapshot {number} is not as it was: {differing}"

    @staticmethod
    def no_alarm(result: SyncResult) -> None:
        """What was called unchanged is so."""
        assert not result.verified or not result.verified.differences, result.verified

    def stop(self, people: Crowd) -> None:
        people.stop()

    def look(self) -> Contents:
        return contents_of_tree(self.rig.tree)

    def sync(self, people: Crowd) -> SyncResult:
        return self.rig.sync(force=True)


class AmongLive(Among):
    """The same on a live mount; there they go on when the tree is frozen."""

    rig: Living

    def __init__(self, rig: Living, meanwhile: Meanwhile, mood: str = "any") -> None:
        super().__init__(rig, "live", mood)
        self.meanwhile = meanwhile
        meanwhile.when_reading = lambda: time.sleep(0.05)

    def stop(self, people: Crowd) -> None:
        """And sometimes kill the mount's process."""
        if self.dice.random() < 0.2:
            people.drop()
            self.rig.remount()
        else:
            people.stop()

    def look(self) -> Contents:
        model = contents_of_tree(self.rig.beneath)
        assert not difference(super().look(), model), "not what lies beneath"
        return model

    def sync(self, people: Crowd) -> SyncResult:
        self.meanwhile.when_frozen = people.go_on
        result = self.rig.sync(force=True)
        assert result.snapshot is None or result.snapshot.consistent
        return result


class AmongMoving(Among):
    """The same where nothing stands still for a sync; some look at the tree while they go on."""

    def run(self, rounds: int) -> None:
        """More of a few where they are restless, which takes a quarter of the time."""
        super().run(max(rounds, 4 * ROUNDS) if self.mood == "restless" else rounds)

    def stop(self, people: Crowd) -> None:
        """What changed while a sync looked is seen by the next one. All of what it made can be
        read, be it of no moment."""
        if self.dice.random() < 0.5:
            self.rig.verify = float(self.dice.random() < 0.5)
            result = self.rig.sync()
            self.no_alarm(result)
            if result.snapshot is not None:
                self.rig.contents(result.snapshot.number)
        people.stop()


@pytest.mark.parametrize("rounds", [QUICK, LONG])
@pytest.mark.parametrize(
    ("few", "mood"),
    [(False, "any"), (True, "any"), (True, "restless")],
    ids=["many descriptors", "few descriptors", "few descriptors, restless"],
)
@pytest.mark.parametrize("base", ["tmpfs", "ext4", "xfs", "btrfs"], indirect=True)
def test_live(
    base: Path,
    few: bool,
    mood: str,
    rounds: int,
    meanwhile: Meanwhile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(daemon, "_spawn", forked.live_with_few if few else forked.live)
    with living(base, max_pack_bytes=5000) as rig:
        AmongLive(rig, meanwhile, mood).run(rounds)


@pytest.mark.parametrize("rounds", [QUICK, LONG])
@pytest.mark.parametrize("base", ["tmpfs"], indirect=True)
def test_live_with_little_room(
    base: Path, rounds: int, meanwhile: Meanwhile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many writers wait for the end of the freeze."""
    monkeypatch.setattr(daemon, "_spawn", forked.live)
    with living(base, max_pack_bytes=5000) as rig:
        rig.unmount()
        rig.room_bytes = 100_000
        rig.mount()
        AmongLive(rig, meanwhile).run(rounds)


@pytest.mark.parametrize("mood", ["any", "restless"])
@pytest.mark.parametrize("rounds", [QUICK, LONG])
@pytest.mark.parametrize("base", ["tmpfs"], indirect=True)
def test_scan(base: Path, rounds: int, mood: str) -> None:
    AmongMoving(Rig(base, max_pack_bytes=5000), "scan", mood).run(rounds)


@pytest.mark.parametrize("mood", ["any", "restless"])
@pytest.mark.parametrize("rounds", [QUICK, LONG])
@pytest.mark.parametrize("base", ["ext4", "xfs"], indirect=True)
def test_watch(base: Path, rounds: int, mood: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "_spawn", forked.watch)
    rig = Watched(base, max_pack_bytes=5000)
    rig.start()
    try:
        AmongMoving(rig, "watch", mood).run(rounds)
    finally:
        rig.kill()


@pytest.mark.parametrize("mood", ["any", "restless"])
@pytest.mark.parametrize("rounds", [QUICK, LONG])
@pytest.mark.parametrize("base", ["btrfs"], indirect=True)
def test_btrfs(base: Path, rounds: int, mood: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MUCH", 1_000_000)  # never rather scan
    rig = Rig(base, [btrfs.subvolume(base / "tree")], max_pack_bytes=5000, source="btrfs")
    try:
        Among(rig, "btrfs", mood).run(rounds)
    finally:
        remove(base)
