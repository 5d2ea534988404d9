"""A live mount under random changes: it is what a plain directory is, and every snapshot is what it
was when it was frozen, whatever is done to it while the sync reads."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import strategies as hs
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from cloudfs.backup import dispatch, packs
from cloudfs.fuse import daemon
from cloudfs.source import unseen
from tests.engine import btrfs, forked, loops
from tests.engine.hands import OPERATIONS, Hands, Operation
from tests.engine.living import Living, Meanwhile
from tests.engine.rig import contents_of_tree, difference
from tests.engine.test_machine import hunt

SOME = hs.lists(OPERATIONS, min_size=1, max_size=4)
LONG_AGO_NS = 10**15

Contents = dict[bytes, object]


class OnLive(RuleBasedStateMachine):
    """The same on a live mount and on a plain directory beside it."""

    volume: Path
    meanwhile: Meanwhile
    workers = 1

    def __init__(self) -> None:
        super().__init__()
        self.base = Path(tempfile.mkdtemp(prefix="cloudfs-live-", dir=self.volume))
        self.rig = Living(self.base, max_pack_bytes=5000, workers=self.workers)
        self.plain = self.base / "plain"
        self.plain.mkdir()
        self.live_hands = Hands(os.fsencode(self.rig.tree))
        self.plain_hands = Hands(os.fsencode(self.plain))
        self.believed = False  # whether the next sync has to go by the marks
        self.models: dict[int, Contents] = {}

    def do(self, operations: list[Operation]) -> None:
        for operation in operations:
            self.live_hands.do(operation)
            self.plain_hands.do(operation)

    def let_go(self) -> None:
        """Have nothing open, and nothing dirty, since both would die with the mount."""
        self.rig.flush()
        self.live_hands.let_go()
        self.plain_hands.let_go()

    @initialize(operations=hs.lists(OPERATIONS, min_size=5, max_size=20), few=hs.booleans())
    def begin(self, operations: list[Operation], few: bool) -> None:
        daemon._spawn = forked.live_with_few if few else forked.live  # type: ignore[assignment]
        self.rig.mount()
        self.do(operations)

    @rule(operations=SOME)
    def change(self, operations: list[Operation]) -> None:
        self.do(operations)

    @rule(operations=SOME)
    def change_more(self, operations: list[Operation]) -> None:
        self.do(operations)

    @rule(operations=SOME)
    def change_still_more(self, operations: list[Operation]) -> None:
        self.do(operations)

    @rule()
    def kill_and_remount(self) -> None:
        self.let_go()
        self.rig.remount()

    @rule(operations=SOME)
    def unmount_and_mount(self, operations: list[Operation]) -> None:
        """With changes in between that nobody marks."""
        self.let_go()
        self.rig.unmount()
        self.do(operations)
        self.let_go()
        self.believed = False
        self.rig.mount()

    @rule()
    def lose_local_state(self) -> None:
        self.let_go()
        self.rig.unmount()
        self.rig.forget_local()
        self.believed = False
        self.rig.mount()

    @rule()
    def kernel_forgets(self) -> None:
        Path("/proc/sys/vm/drop_caches").write_text("2")

    @rule(force=hs.booleans())
    def sync(self, force: bool) -> None:
        self.take(force, [], [])

    @rule(force=hs.booleans(), frozen=SOME, reading=hs.lists(OPERATIONS, max_size=4))
    def sync_meanwhile(
        self, force: bool, frozen: list[Operation], reading: list[Operation]
    ) -> None:
        self.take(force, frozen, reading)

    def take(self, force: bool, frozen: list[Operation], reading: list[Operation]) -> None:
        """A sync, with what is done after its freeze."""
        model, times = self.look(), times_of(self.rig.beneath)
        self.meanwhile.when_frozen = lambda: self.do(frozen)
        self.meanwhile.when_reading = lambda: self.do(reading)
        result = self.rig.sync(force=force)
        assert not result.unreadable, result.unreadable
        if result.snapshot is not None:
            self.models[result.snapshot.number] = model
            assert result.snapshot.consistent
            wanted = "live" if self.believed else "scan"
            assert result.snapshot.source == wanted, self.rig.notes
        words = ("scanned", "made anew", "mounted")
        noted = [note for note in self.rig.notes if any(word in note for word in words)]
        assert not (self.believed and noted), "what was marked was not gone by"
        self.believed = True
        last = max(self.models)
        same(self.models[last], model, "a change was missed")
        same(self.rig.contents(last), model, "not as it was")
        self.check_times(last, times)
        self.look()

    def look(self) -> Contents:
        """The tree, which is the same from above, from beneath, and beside."""
        self.rig.flush()
        self.plain_hands.settle()
        model = contents_of_tree(self.rig.beneath)
        above, plain = contents_of_tree(self.rig.tree), contents_of_tree(self.plain)
        same(above, model, "not what lies beneath")
        same(without_now(model), without_now(plain), "not as without the mount")
        return model

    def check_times(self, number: int, there: Contents) -> None:
        """A scan compares inode numbers and times of change: it must find them up to date."""
        history = self.rig.history()
        found: Contents = {}
        for path, _, meta in history.view(number).walk():
            size = 0 if stat.S_ISDIR(meta.mode) or meta.type == 3 else meta.size
            found[path] = (meta.ino, meta.ctime_ns, size)
        history.repository.local.close()
        found.pop(b"", None)
        found.pop(b"/", None)
        same(found, there, "a scan would have found more")

    def teardown(self) -> None:
        try:
            if self.rig.daemon is not None:
                self.take(False, [], [])
            for number, model in self.models.items():
                same(self.rig.contents(number), model, f"snapshot {number}")
        finally:
            self.live_hands.let_go()
            self.plain_hands.let_go()
            self.rig.close()
            shutil.rmtree(self.base)


def same(found: Contents, expected: Contents, words: str) -> None:
    """Fail with the words and what differs."""
    differing = difference(found, expected)
    assert not differing, f"{words}: {differing}"


def times_of(root: Path) -> Contents:
    """Inode number, time of change and size, by path."""
    found: Contents = {}
    top = os.fsencode(root)
    for directory, names, files in os.walk(top):
        for name in (*names, *files):
            full = os.path.join(directory, name)
            status = os.lstat(full)
            size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
            found[full[len(top) :]] = (status.st_ino, status.st_ctime_ns, size)
    return found


def without_now(contents: Contents) -> Contents:
    """Times but for those that were set: the same thing is not done twice at the same time."""
    found: Contents = {}
    for path, value in contents.items():
        if isinstance(value, tuple):
            mtime_ns = value[4] if value[4] < LONG_AGO_NS else None
            value = (*value[:4], mtime_ns, *value[5:])  # noqa: PLW2901
        found[path] = value
    return found


@contextmanager
def file_system(kind: str) -> Iterator[Path]:
    """A file system of a kind, in memory."""
    base = Path(tempfile.mkdtemp(prefix="cloudfs-live-", dir="/dev/shm"))
    try:
        if kind == "tmpfs":
            yield base
        elif kind == "btrfs":
            with btrfs.file_system(base) as place:
                yield place
        else:
            with loops.file_system(base, kind) as place:
                yield place
    finally:
        shutil.rmtree(base)


def own_maps() -> Iterator[tuple[str, bytes]]:
    """The mappings of this process, as if there were no others: all are looked at hundreds of times
    in a sequence."""
    yield "self", Path("/proc/self/maps").read_bytes()


@pytest.fixture(params=["tmpfs", "ext4", "xfs", "btrfs"])
def machine(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, meanwhile: Meanwhile
) -> Iterator[None]:
    """The machine on a file system of each kind, with frames that end everywhere."""
    monkeypatch.setattr(packs, "FRAME_BYTES", 1000)
    monkeypatch.setattr(daemon, "_spawn", forked.live)  # and back to what it was in the end
    monkeypatch.setattr(unseen, "_all_maps", own_maps)
    monkeypatch.setattr(OnLive, "meanwhile", meanwhile, raising=False)
    with file_system(request.param) as place:
        monkeypatch.setattr(OnLive, "volume", place, raising=False)
        yield


@pytest.mark.usefixtures("machine")
def test_snapshots_are_what_the_tree_was() -> None:
    hunt(25, 100, OnLive)


@pytest.mark.long
@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("share", range(10))
def test_snapshots_are_what_the_tree_was_for_long(share: int) -> None:
    """Shares, so that they are spread over processes: 2,000 sequences in all."""
    hunt(50, 100, OnLive)


@pytest.mark.parametrize("machine", ["tmpfs"], indirect=True)
@pytest.mark.usefixtures("machine")
def test_snapshots_are_what_the_tree_was_with_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same read by worker processes."""
    monkeypatch.setattr(dispatch, "INLINE_WORK", 0)
    monkeypatch.setattr(OnLive, "workers", 2)
    hunt(2, 20, OnLive)
