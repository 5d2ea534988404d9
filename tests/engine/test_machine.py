"""A state machine: random changes to a tree, syncs in between, every snapshot as the tree was."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import shutil
import stat
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as hs
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from cloudfs.backup import dispatch, packs, revisit, walk
from cloudfs.backup.job import SyncResult
from cloudfs.source.filters import Filters
from tests.engine.rig import ALL, LeftOut, Rig, contents_of_tree, difference

NAMES = hs.sampled_from([b"a", b"b", b"c\n", b"\xff\xfe", b"long-name" * 8])
PLACES = hs.lists(NAMES, min_size=1, max_size=3)
SIZES = hs.sampled_from([0, 1, 4095, 4096, 4097, 9000, 40_000, 300_000, 4096 * 64 + 5])
SEEDS = hs.integers(0, 2**32)


LEFT_OUT = [
    ALL,
    LeftOut(Filters(excludes=("b",)), lambda path, is_dir: path.endswith(b"/b")),
    LeftOut(Filters(excludes=("a/",)), lambda path, is_dir: is_dir and path.endswith(b"/a")),
    LeftOut(Filters(excludes=("/a/b",)), lambda path, is_dir: path == b"/a/b"),
    LeftOut(Filters(exclude_if_present=("b",)), tag=b"b"),
]


@pytest.fixture(autouse=True)
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that frames and packs end in the middle of these small trees too."""
    monkeypatch.setattr(packs, "FRAME_BYTES", 1000)


class Tree(RuleBasedStateMachine):
    """Operations on a real directory; what the tree was at each sync is kept and compared."""

    left_out = ALL

    def __init__(self) -> None:
        super().__init__()
        self.base = Path(tempfile.mkdtemp(prefix="cloudfs-machine-", dir="/dev/shm"))
        self.rig = Rig(self.base, max_pack_bytes=5000)
        self.models: dict[int, dict[bytes, object]] = {}

    @initialize(left_out=hs.sampled_from(LEFT_OUT))
    def begin(self, left_out: LeftOut) -> None:
        self.left_out = left_out
        self.rig.filters = left_out.filters
        self.prepare()

    def prepare(self) -> None:
        """What comes before all rules."""

    @property
    def mapped(self) -> list[mmap.mmap]:
        """The mappings that are there; they end with the machine."""
        return self.__dict__.setdefault("_mapped", [])

    def path(self, parts: list[bytes]) -> bytes:
        return os.path.join(os.fsencode(self.rig.tree), *parts)

    @rule(parts=PLACES, size=SIZES, seed=SEEDS)
    def write(self, parts: list[bytes], size: int, seed: int) -> None:
        path = self.path(parts)
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if os.path.exists(path) and not os.path.isfile(path):
                return  # opening a fifo would wait for somebody to read it
            with open(path, "wb") as file:
                file.write(random.Random(seed).randbytes(size))

    @rule(parts=PLACES, size=SIZES, seed=SEEDS, offset=SIZES)
    def overwrite(self, parts: list[bytes], size: int, seed: int, offset: int) -> None:
        if not os.path.isfile(self.path(parts)):
            return
        with contextlib.suppress(OSError), open(self.path(parts), "r+b") as file:
            file.seek(offset)
            file.write(random.Random(seed).randbytes(min(size, 5000)))

    @rule(parts=PLACES, size=SIZES)
    def truncate(self, parts: list[bytes], size: int) -> None:
        with contextlib.suppress(OSError):
            if not os.path.islink(self.path(parts)):
                os.truncate(self.path(parts), size)

    @rule(parts=PLACES, size=SIZES)
    def change_keeping_mtime(self, parts: list[bytes], size: int) -> None:
        path = self.path(parts)
        if not os.path.isfile(path):
            return
        with contextlib.suppress(OSError), open(path, "r+b") as file:
            before = os.fstat(file.fileno())
            file.write(b"changed" + bytes([size % 256]))
            file.flush()
            os.utime(file.fileno(), ns=(before.st_atime_ns, before.st_mtime_ns))

    @rule(a=PLACES, b=PLACES)
    def rename(self, a: list[bytes], b: list[bytes]) -> None:
        with contextlib.suppress(OSError):
            os.rename(self.path(a), self.path(b))

    @rule(a=PLACES, b=PLACES, name=NAMES, seed=SEEDS)
    def rename_and_change(self, a: list[bytes], b: list[bytes], name: bytes, seed: int) -> None:
        """A directory, and what is in it, also by files of several names."""
        with contextlib.suppress(OSError):
            os.makedirs(self.path(a), exist_ok=True)
            os.rename(self.path(a), self.path(b))
            self.write([*b, b"in", name], 4097, seed)
            self.link([*b, b"in", name], [*b, b"further"])

    @property
    def aside(self) -> bytes:
        """A place beside the tree."""
        return os.fsencode(self.base / "aside")

    @rule(parts=PLACES)
    def move_out(self, parts: list[bytes]) -> None:
        """Out of the tree, unless that is another file system."""
        with contextlib.suppress(OSError):
            if not os.path.lexists(self.aside):
                os.rename(self.path(parts), self.aside)

    @rule(parts=PLACES)
    def move_in(self, parts: list[bytes]) -> None:
        with contextlib.suppress(OSError):
            os.rename(self.aside, self.path(parts))

    @property
    def outside(self) -> bytes:
        """A further name of a file, beside the tree."""
        return os.fsencode(self.base / "outside")

    @rule(parts=PLACES)
    def link_out(self, parts: list[bytes]) -> None:
        with contextlib.suppress(OSError):
            if os.path.lexists(self.outside):
                os.unlink(self.outside)
            os.link(self.path(parts), self.outside, follow_symlinks=False)

    @rule(parts=PLACES)
    def link_in(self, parts: list[bytes]) -> None:
        with contextlib.suppress(OSError):
            os.link(self.outside, self.path(parts), follow_symlinks=False)

    @rule(seed=SEEDS, mode=hs.integers(0o400, 0o777))
    def change_outside(self, seed: int, mode: int) -> None:
        if os.path.isfile(self.outside) and not os.path.islink(self.outside):
            with open(self.outside, "r+b") as file:
                file.write(random.Random(seed).randbytes(20))
            os.chmod(self.outside, mode)

    @property
    def hidden(self) -> bytes:
        """A name in the tree that all of LEFT_OUT but the first leave out."""
        return self.path([b"a", b"b"])

    @rule(parts=PLACES)
    def link_hidden(self, parts: list[bytes]) -> None:
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(self.hidden), exist_ok=True)
            os.link(self.path(parts), self.hidden, follow_symlinks=False)

    @rule(seed=SEEDS, mode=hs.integers(0o400, 0o777))
    def change_hidden(self, seed: int, mode: int) -> None:
        self.overwrite([b"a", b"b"], 20, seed, 0)
        if os.path.isfile(self.hidden) and not os.path.islink(self.hidden):
            os.chmod(self.hidden, mode)

    @rule(a=PLACES, b=PLACES)
    def link(self, a: list[bytes], b: list[bytes]) -> None:
        with contextlib.suppress(OSError):
            os.link(self.path(a), self.path(b), follow_symlinks=False)

    @rule(parts=PLACES)
    def remove(self, parts: list[bytes]) -> None:
        path = self.path(parts)
        with contextlib.suppress(OSError):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)

    @rule(parts=PLACES, kind=hs.sampled_from(["dir", "link", "fifo", "device"]))
    def replace(self, parts: list[bytes], kind: str) -> None:
        self.remove(parts)
        path = self.path(parts)
        with contextlib.suppress(OSError):
            if kind == "dir":
                os.makedirs(path)
            elif kind == "link":
                os.symlink(b"target/" + parts[0], path)
            elif kind == "fifo":
                os.mkfifo(path)
            else:
                os.mknod(path, 0o20600, os.makedev(1, 3))

    @rule(parts=PLACES, mode=hs.sampled_from([0o600, 0o755, 0o4711, 0o1777]), uid=hs.integers(0, 9))
    def attributes(self, parts: list[bytes], mode: int, uid: int) -> None:
        path = self.path(parts)
        with contextlib.suppress(OSError):
            os.chown(path, uid, uid + 1, follow_symlinks=False)
            if not os.path.islink(path):
                os.chmod(path, mode)

    @rule(parts=PLACES, size=hs.sampled_from([0, 10, 5000]), remove=hs.booleans())
    def xattr(self, parts: list[bytes], size: int, remove: bool) -> None:
        path = self.path(parts)
        with contextlib.suppress(OSError):
            if remove:
                os.removexattr(path, b"trusted.x", follow_symlinks=False)
            else:
                os.setxattr(path, b"trusted.x", b"v" * size, follow_symlinks=False)

    @rule(parts=PLACES)
    def storm(self, parts: list[bytes]) -> None:
        """Inodes come and go, and their numbers are used again."""
        directory = self.path(parts)
        with contextlib.suppress(OSError):
            os.makedirs(directory, exist_ok=True)
            for turn in range(3):  # names that no other rule uses, so no fifo is among them
                for number in range(5):
                    with open(os.path.join(directory, b"s%d" % number), "wb") as file:
                        file.write(b"%d" % turn * number)
                for number in range(turn, 5):
                    os.unlink(os.path.join(directory, b"s%d" % number))

    @rule(parts=PLACES, seed=SEEDS, keep=hs.booleans())
    def write_through_a_mapping(self, parts: list[bytes], seed: int, keep: bool) -> None:
        path = self.path(parts)
        if not os.path.isfile(path) or not os.path.getsize(path):
            return
        with open(path, "r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
        mapped[seed % len(mapped)] = seed % 256
        if keep:
            self.mapped.append(mapped)
        else:
            mapped.close()

    @rule(seed=SEEDS)
    def write_through_mappings_that_are_there(self, seed: int) -> None:
        for mapped in self.mapped:
            # What was cut off since has no pages any more, and writing there is a SIGBUS.
            with contextlib.suppress(ValueError):
                if mapped.size():
                    mapped[seed % min(len(mapped), mapped.size())] = seed % 256

    @rule()
    def unmap(self) -> None:
        while self.mapped:
            self.mapped.pop().close()

    @rule()
    def lose_local_state(self) -> None:
        self.rig.forget_local()

    def take(self, force: bool) -> SyncResult:
        """Sync, as the rules mean it."""
        return self.rig.sync(force=force)

    def model(self) -> dict[bytes, object]:
        """What the tree is now."""
        return contents_of_tree(self.rig.tree, self.left_out)

    @rule(force=hs.booleans())
    def sync(self, force: bool) -> None:
        result = self.take(force)
        assert not result.unreadable
        model = self.model()
        if result.snapshot is not None:
            self.models[result.snapshot.number] = model
        last = max(self.models)
        assert not difference(self.models[last], model), "a change was missed"
        assert not difference(self.rig.contents(last), model)
        self.check_times(last)

    def check_times(self, number: int) -> None:
        """A scan compares inode numbers and times of change: it must find them up to date."""
        history = self.rig.history()
        found, there = {}, {}
        for path, _, meta in history.view(number).walk():
            status = os.lstat(os.fsencode(self.rig.tree) + path)
            found[path] = (meta.ino,)
            there[path] = (status.st_ino,)
            if self.keeps_ctime(status):
                found[path] += (meta.ctime_ns,)
                there[path] += (status.st_ctime_ns,)
            if not stat.S_ISDIR(status.st_mode):
                found[path] += (meta.size,)
                there[path] += (status.st_size,)
        history.repository.local.close()
        assert not difference(found, there), "a scan would have found more"

    def keeps_ctime(self, status: os.stat_result) -> bool:
        """Whether the file system keeps the time of change that it shows."""
        return True

    def teardown(self) -> None:
        try:
            if self.models:
                self.sync(False)
            for number, model in self.models.items():
                assert not difference(self.rig.contents(number), model), f"snapshot {number}"
        finally:
            self.unmap()
            self.rig.repository.local.close()
            self.remove_all()

    def remove_all(self) -> None:
        """Remove what the machine made."""
        shutil.rmtree(self.base)


def change_at_random(machine: Tree, choose: random.Random) -> None:
    """One of the operations of the state machine, but more often such as move things."""
    names = [b"a", b"b", b"c\n", b"\xff\xfe", b"long-name" * 8]
    sizes = [0, 1, 4095, 4096, 4097, 9000, 40_000, 300_000, 4096 * 64 + 5]

    def place() -> list[bytes]:
        return [choose.choice(names) for _ in range(choose.randint(1, 3))]

    size, seed = choose.choice(sizes), choose.randrange(1 << 30)
    choose.choice(
        [
            lambda: machine.write(place(), size, seed),
            lambda: machine.overwrite(place(), size, seed, choose.choice(sizes)),
            lambda: machine.truncate(place(), size),
            lambda: machine.change_keeping_mtime(place(), size),
            *[lambda: machine.rename(place(), place())] * 4,
            *[lambda: machine.link(place(), place())] * 2,
            lambda: machine.remove(place()),
            lambda: machine.replace(place(), choose.choice(["dir", "dir", "link", "fifo"])),
            lambda: machine.attributes(place(), choose.choice([0o600, 0o1777]), seed % 9),
            lambda: machine.xattr(place(), choose.choice([0, 10, 5000]), remove=seed % 3 == 0),
            lambda: machine.storm(place()),
        ]
    )()


def hunt(examples: int, steps: int, machine: type[Tree] = Tree) -> None:
    """Run a state machine; a failure prints what repeats it."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )


def test_snapshots_are_what_the_tree_was() -> None:
    hunt(40, 40)


@pytest.mark.long
def test_snapshots_are_what_the_tree_was_for_long() -> None:
    hunt(1500, 100)


def test_snapshots_are_what_the_tree_was_when_judged_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, with all that cannot have moved handed out during the walk."""
    judge_early(monkeypatch)
    hunt(30, 40)


@pytest.mark.long
def test_snapshots_are_what_the_tree_was_when_judged_early_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judge_early(monkeypatch)
    hunt(1000, 100)


def judge_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if much appeared in every sync, and others had their turn after each directory."""
    monkeypatch.setattr(revisit, "QUOTA", 1)
    monkeypatch.setattr(walk, "EARLY_ITEMS", 1)
    monkeypatch.setattr(walk, "EARLY_SHARE", 1_000_000)


def test_snapshots_are_what_the_tree_was_with_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same through worker processes, for every sync."""
    monkeypatch.setattr(dispatch, "INLINE_WORK", 0)
    rig_workers = 2
    original = Rig.settings

    def with_workers(self: Rig):
        self.workers = rig_workers
        return original(self)

    monkeypatch.setattr(Rig, "settings", with_workers)
    hunt(4, 25)
