"""Much cannot be read for a while: what can be is backed up as it is, and once all can be read,
nothing was lost."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import stat as st
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis.stateful import RuleBasedStateMachine

from cloudfs.backup import packs
from cloudfs.backup.job import SyncResult
from cloudfs.fuse import daemon
from cloudfs.fuse.live.caller import without
from cloudfs.source import inode
from tests.engine import btrfs, forked, test_btrfs, test_watch
from tests.engine.living import Living
from tests.engine.rig import contents_of_tree, difference
from tests.engine.test_btrfs import OnBtrfs
from tests.engine.test_external import Snapshotted
from tests.engine.test_machine import LEFT_OUT, Tree, change_at_random
from tests.engine.test_watch import OnWatch
from tests.engine.watched import Watched, settle

CAN_READ_ALL = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
CAPABILITY_VERSION_3 = 0x2008_0522
INODE_BITS = (1 << 48) - 1  # what is frozen has others above
MODES = (0, 0, 0o400, 0o100, 0o200)

_libc = ctypes.CDLL(None, use_errno=True)


class Failing:
    """As if a disk had bad sectors: nothing that a file system tells of begins it or ends it."""

    def __init__(self, base: Path, tree: bytes) -> None:
        self.base, self.tree = os.fsencode(base), tree
        self.inodes: set[int] = set()

    def withhold(self, path: bytes, choose: random.Random) -> None:
        self.inodes.add(os.lstat(path).st_ino)

    def give_back(self) -> None:
        self.inodes.clear()

    @contextlib.contextmanager
    def withheld(self) -> Iterator[None]:
        real = os.open
        others = tuple(self.base + name for name in (b"/repository", b"/machines"))

        def failing(
            path: bytes, flags: int, mode: int = 0o777, *, dir_fd: int | None = None
        ) -> int:
            fd = real(path, flags, mode, dir_fd=dir_fd)
            if os.fstat(fd).st_ino & INODE_BITS in self.inodes and not flags & os.O_PATH:
                at = os.readlink(b"/proc/self/fd/%d" % fd)
                # Also in a snapshot of the tree, wherever that is.
                if at.startswith(self.base) and not at.startswith(others) and at != self.tree:
                    os.close(fd)
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
            return fd

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "open", failing)
            yield


class Forbidden:
    """By their modes, to one who is not almighty."""

    def __init__(self, base: Path, tree: bytes) -> None:
        self.tree = tree

    def withhold(self, path: bytes, choose: random.Random) -> None:
        if not os.path.islink(path):
            os.chmod(path, choose.choice(MODES))

    def give_back(self) -> None:
        for top, directories, files in os.walk(self.tree):
            for name in directories + files:
                path = os.path.join(top, name)
                if not os.path.islink(path):
                    os.chown(path, 0, 0)
                    os.chmod(path, 0o755)

    @contextlib.contextmanager
    def withheld(self) -> Iterator[None]:
        header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
        full = ctypes.create_string_buffer(24)
        assert not _libc.capget(header, full)
        assert not _libc.capset(header, without(full.raw, CAN_READ_ALL))
        try:
            yield
        finally:
            assert not _libc.capset(header, full.raw)


How = type[Failing] | type[Forbidden]
"""How some of a tree is withheld."""


class Withheld(Tree):
    """The tree of the state machines, of which some cannot be opened while syncs run."""

    how: Failing | Forbidden

    def withhold_some(self, choose: random.Random) -> None:
        there = sorted(set(self.model()) - {b"links"})
        for _ in range(choose.randint(0, 2) if there else 0):
            self.how.withhold(self.path([choose.choice(there)[1:]]), choose)

    def sync(self, force: bool) -> None:
        with self.how.withheld():
            result = self.take(force)
        model = self.model()
        if result.snapshot is not None:
            self.models[result.snapshot.number] = self.rig.contents(result.snapshot.number)
        last = max(self.models)
        found = dict(self.models[last])
        hidden = self.hidden(model)
        if hidden:
            for rows in (found, model):
                del rows[b"links"]
                for path in [path for path in rows if _is_in(path, hidden)]:
                    del rows[path]
            assert not difference(found, model), "a change was missed that could be seen"
            return
        assert not result.unreadable
        assert not difference(found, model), "a change was missed"
        self.check_times(last)

    def hidden(self, model: dict[bytes, object]) -> set[bytes]:
        """The paths of what cannot be opened now; what is below is in them."""
        found: set[bytes] = set()
        with self.how.withheld():
            for path in sorted(set(model) - {b"links"}):
                if not _is_in(path, found) and not _is_readable(self.path([path[1:]])):
                    found.add(path)
        return found

    def teardown(self) -> None:
        self.how.give_back()
        super().teardown()


class WithheldOnBtrfs(Withheld, OnBtrfs):
    pass


class WithheldOnWatch(Withheld, OnWatch):
    pass


class WithheldExternal(Withheld, Snapshotted):
    def take(self, force: bool) -> SyncResult:
        return self.rig.sync(force=force)  # which may scan


class WithheldOnLive(Withheld):
    def __init__(self) -> None:
        RuleBasedStateMachine.__init__(self)
        self.base = Path(tempfile.mkdtemp(prefix="cloudfs-withheld-", dir="/dev/shm"))
        self.rig = self.living = Living(self.base, max_pack_bytes=5000)
        self.living.mount()
        self.models = {}

    def model(self) -> dict[bytes, object]:
        self.living.flush()
        return contents_of_tree(self.living.beneath, self.left_out)

    def remove_all(self) -> None:
        self.living.close()
        super().remove_all()


def _is_in(path: bytes, others: set[bytes]) -> bool:
    """Whether a path is one of these, or below one."""
    while path:
        if path in others:
            return True
        path = path.rpartition(b"/")[0]
    return False


def _is_readable(path: bytes) -> bool:
    """Whether an item, or what a directory holds, can be read."""
    mode = os.lstat(path).st_mode
    try:
        if st.S_ISREG(mode) or st.S_ISDIR(mode):
            os.close(os.open(path, os.O_RDONLY))
        if st.S_ISDIR(mode):
            os.lstat(path + b"/.")
    except OSError:
        return False
    return True


def hunt(machine: type[Withheld], seeds: range, how: How = Failing) -> None:
    """Much happens between two syncs, and during most of them something is withheld."""
    for seed in seeds:
        print("seed", seed)
        choose = random.Random(seed)
        tree = machine()
        tree.how = how(tree.base, tree.path([])[:-1])
        tree.begin(choose.choice(LEFT_OUT))
        for _ in range(15):
            change_at_random(tree, choose)
        tree.sync(False)
        for _ in range(10):
            if choose.random() < 0.3:
                tree.how.give_back()
            tree.withhold_some(choose)
            for _ in range(choose.randint(0, 8)):
                change_at_random(tree, choose)
            tree.sync(False)
        tree.teardown()


@pytest.fixture(autouse=True)
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that frames and packs end in the middle of these small trees too."""
    monkeypatch.setattr(packs, "FRAME_BYTES", 1000)


@pytest.fixture(scope="module")
def volume() -> Iterator[Path]:
    with btrfs.volume() as place:
        yield place


@pytest.mark.parametrize("how", [Failing, Forbidden])
def test_scan(how: How) -> None:
    hunt(Withheld, range(6), how)


@pytest.mark.long
@pytest.mark.parametrize("how", [Failing, Forbidden])
def test_scan_for_long(how: How) -> None:
    hunt(Withheld, range(100, 600), how)


@pytest.mark.parametrize("how", [Failing, Forbidden])
def test_external(how: How) -> None:
    hunt(WithheldExternal, range(1), how)


@pytest.mark.long
@pytest.mark.parametrize("how", [Failing, Forbidden])
def test_external_for_long(how: How) -> None:
    hunt(WithheldExternal, range(100, 250), how)


def test_on_btrfs(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test_btrfs.prepare(volume, monkeypatch)
    hunt(WithheldOnBtrfs, range(3))


@pytest.mark.long
def test_on_btrfs_for_long(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test_btrfs.prepare(volume, monkeypatch)
    hunt(WithheldOnBtrfs, range(100, 400))


def test_on_watch(local_volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test_watch.prepare(local_volume, monkeypatch)
    hunt(WithheldOnWatch, range(3))


@pytest.mark.long
def test_on_watch_for_long(local_volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test_watch.prepare(local_volume, monkeypatch)
    hunt(WithheldOnWatch, range(100, 300))


def test_on_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "_spawn", forked.live)
    hunt(WithheldOnLive, range(2))


@pytest.mark.long
def test_on_live_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "_spawn", forked.live)
    hunt(WithheldOnLive, range(100, 300))


@pytest.mark.parametrize("passed", [os.O_PATH, 0])
def test_what_changed_in_a_directory_that_could_not_be_read(watched: Watched, passed: int) -> None:
    """It is where it was heard of: its own times are looked at as well. Where its name cannot even
    be looked up, that is not known, and the tree is scanned."""
    directory = watched.tree / "directory"
    directory.mkdir()
    settle(watched)
    (directory / "new").write_text("new")
    with pytest.MonkeyPatch.context() as patch:
        real = os.open

        def failing(path: bytes, flags: int, *rest: int, dir_fd: int | None = None) -> int:
            if path == b"directory" and not flags & passed:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(path, flags, *rest, dir_fd=dir_fd)

        patch.setattr(os, "open", failing)
        assert watched.sync().unreadable == [(b"directory", "input/output error")]
        assert ["input/output error" in note for note in watched.notes] == [True] * (not passed)
    assert not watched.sync().unreadable
    assert not watched.notes
    watched.check()


def test_a_directory_below_others_that_cannot_be_read(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They need only be searched, also where the path is so long that it takes several steps."""
    monkeypatch.setattr(inode, "PATH_STEP", 12)
    (base / "above/below/deep").mkdir(parents=True)
    for name in ("above", "above/below"):
        (base / name).chmod(0o100)
    top = os.open(base, os.O_PATH)
    with Forbidden(base, os.fsencode(base)).withheld():
        found = inode.open_directory(top, b"above/below/deep")
    assert os.path.samestat(os.fstat(found), os.stat(base / "above/below/deep"))
    os.close(found)
    os.close(top)
