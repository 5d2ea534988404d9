"""What a live mount goes by, each against a model: sets of blocks, marks on disk, a freeze."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as hs
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from cloudfs.core.marks import GROUP, NEVER, Blocks
from cloudfs.db import marked
from cloudfs.db.marked import MarkedSet, Marks
from cloudfs.fuse.live import tree as trees
from cloudfs.fuse.live.caller import By, without
from cloudfs.fuse.live.files import OpenFiles
from cloudfs.fuse.live.freeze import CHUNK, Freeze, Full
from cloudfs.fuse.live.frozen import FrozenTree
from cloudfs.fuse.live.inodes import Inode, Inodes
from cloudfs.fuse.live.tracking import Tracker
from cloudfs.fuse.live.tree import LiveTree, Wanted
from cloudfs.source.live.protocol import Base
from cloudfs.source.live.touched import Touched
from tests.engine.test_machine import hunt

END = 3 * GROUP + 7
"""Blocks from here on are taken for all the others."""

NUMBERS = hs.one_of(hs.integers(0, END), hs.sampled_from([GROUP - 1, GROUP, 2 * GROUP - 1]))
RANGES = hs.tuples(NUMBERS, NUMBERS).map(lambda ends: (min(ends), max(ends)))
CUTS = NUMBERS.map(lambda first: (first, NEVER))
CHANGES = hs.lists(hs.one_of(RANGES, RANGES, RANGES, CUTS), max_size=12)


def blocks_and_set(changes: list[tuple[int, int]]) -> tuple[Blocks, set[int]]:
    """The same set in both ways."""
    blocks, plain = Blocks(), set[int]()
    for first, last in changes:
        before = set(plain)
        plain.update(range(first, min(last, END) + 1))
        if last == NEVER:
            blocks.cut(first)
        else:
            changed = blocks.add(first, last)
            assert (plain != before) <= bool(changed)
    return blocks, plain


@given(CHANGES, RANGES)
def test_blocks_cover_what_was_added(
    changes: list[tuple[int, int]], asked: tuple[int, int]
) -> None:
    blocks, plain = blocks_and_set(changes)
    first, last = asked
    assert blocks.covers(first, last) == plain.issuperset(range(first, last + 1))
    assert blocks.touches(first, last) == (not plain.isdisjoint(range(first, last + 1)))


@given(CHANGES)
def test_ranges_are_what_was_added(changes: list[tuple[int, int]]) -> None:
    blocks, plain = blocks_and_set(changes)
    ranges = blocks.ranges(10)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges))
    told = {n for start, end in ranges for n in range(start // 10, min(end // 10, END + 1))}
    assert told == plain


@given(CHANGES, CHANGES)
def test_merged_blocks_are_the_union(
    one: list[tuple[int, int]], two: list[tuple[int, int]]
) -> None:
    merged, plain = blocks_and_set(one)
    other, more = blocks_and_set(two)
    merged.merge(other)
    assert merged.ranges(10) == blocks_and_set(one + two)[0].ranges(10)
    for number in range(0, END, 97):
        assert merged.covers(number, number) == (number in plain | more)


INODES = hs.integers(1, 5)
ROWS = hs.one_of(
    hs.tuples(hs.just("name"), INODES, hs.binary(min_size=1, max_size=255)),
    hs.tuples(hs.just("item"), INODES, hs.none()),
    hs.tuples(hs.just("where"), INODES, hs.binary(min_size=1, max_size=100)),
    hs.tuples(hs.just("blocks"), INODES, hs.one_of(RANGES, CUTS)),
)
EPOCHS = hs.lists(hs.lists(ROWS, max_size=8), max_size=4)


def rows_of(marks: Marks, done: list[tuple]) -> list[marked.Row]:  # type: ignore[type-arg]
    """What is put on disk for what is marked, as the tracker does it; marked in ``marks`` too."""
    rows = []
    for kind, inode, what in done:
        if kind == "name":
            marks.names.setdefault(inode, set()).add(what)
            rows.append(marked.name_row(inode, what))
        elif kind == "item":
            marks.items.add(inode)
            rows.append(marked.item_row(inode))
        elif kind == "where":
            marks.where[inode] = what
            rows.append(marked.where_row(inode, what))
        else:
            blocks = marks.blocks.setdefault(inode, Blocks())
            if what[1] == NEVER:
                blocks.cut(what[0])
                rows.append(marked.tail_row(inode, blocks.tail))
            else:
                for group in blocks.add(*what):
                    rows.append(marked.group_row(inode, group, blocks.groups[group]))
    return rows


def told(marks: Marks) -> tuple[object, ...]:
    blocks = {inode: found.ranges(1) for inode, found in marks.blocks.items()}
    return marks.names, marks.items, marks.where, {i: r for i, r in blocks.items() if r}


@settings(max_examples=40, deadline=None)
@given(EPOCHS, hs.integers(0, 4), hs.binary(max_size=50))
def test_marks_outlive_their_writer(
    epochs: list[list[tuple]],  # type: ignore[type-arg]
    dropped: int,
    state: bytes,
) -> None:
    directory = Path(tempfile.mkdtemp(prefix="cloudfs-marked-", dir="/dev/shm"))
    kept = MarkedSet(directory)
    expected = []
    for epoch, done in enumerate(epochs, 1):
        marks = Marks()
        kept.add(epoch, rows_of(marks, done))
        expected.append(marks)
    kept.save_state(state)
    kept.drop_through(dropped)
    kept.close()
    again = MarkedSet(directory)
    assert again.state() == state
    for epoch, marks in enumerate(expected, 1):
        found = again.load(epoch, epoch)
        assert told(found) == told(marks if epoch > dropped else Marks())
    again.clear()
    assert told(again.load(0, 10)) == told(Marks())
    assert again.state() == b""
    again.close()
    shutil.rmtree(directory)


def test_rows_that_are_not_whole_are_passed_over(tmp_path: Path) -> None:
    """A process died while it wrote them; who comes next goes on before them."""
    rows = [marked.name_row(7, b"%d" % number * number) for number in range(1, 20)]
    MarkedSet(tmp_path).add(1, rows)
    (file,) = tmp_path.glob("*.marks")
    whole = file.read_bytes()
    for cut in range(len(whole) + 1):
        file.write_bytes(whole[:cut])
        kept = MarkedSet(tmp_path)
        names = kept.load(1, 1).names.get(7, set())
        assert names == {row[0][9:] for row in rows[: len(names)]}
        kept.add(1, [marked.name_row(8, b"more")])
        found = MarkedSet(tmp_path).load(1, 1).names
        assert found == ({7: names} if names else {}) | {8: {b"more"}}
        kept.close()
    assert len(names) == len(rows)


def test_rows_for_which_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of them may be there or not, but no others, and later ones are."""
    long, short = marked.name_row(1, b"long" * 50), marked.name_row(2, b"a")
    real = os.pwrite
    for size in range(len(long[0]) + 30):
        kept = MarkedSet(tmp_path / f"{size}")
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", lambda fd, data, at, n=size: real(fd, data[:n], at))
            with contextlib.suppress(OSError):
                kept.add(1, [short, long])
        kept.add(1, [marked.name_row(3, b"later")])
        found = MarkedSet(tmp_path / f"{size}").load(1, 1).names
        assert found.pop(3) == {b"later"}
        assert all(names <= {b"a", long[0][9:]} for names in found.values())
        kept.close()


# -- who the thread is -----------------------------------------------------------------------------

CALLER = """
from pathlib import Path
from cloudfs.fuse.live.caller import By, Caller

def show():
    lines = dict(line.split(":\t", 1) for line in Path("/proc/thread-self/status").open())
    uid, gid = lines["Uid"].split()[3], lines["Gid"].split()[3]
    print(uid, gid, int(lines["CapEff"], 16))

caller = Caller()
show()
for by, keeps in ((By(7, 8), None), (By(7, 9), True), (By(0, 8), None), (By(0, 0), None)):
    with caller.acting(by, keeps=keeps):
        show()
    show()
"""
FSETID, RESOURCE = 1 << 4, 1 << 24


def test_a_change_is_made_as_by_the_caller_and_all_else_by_the_mount() -> None:
    done = subprocess.run([sys.executable, "-c", CALLER], check=True, stdout=subprocess.PIPE)
    found = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    every = found[0][2]
    assert every & FSETID
    own = (0, 0, every)
    assert found[0::2] == [own] * 5
    assert found[1::2] == [
        (7, 8, every & ~FSETID & ~RESOURCE),
        (7, 9, every & ~RESOURCE),
        (0, 8, every),
        own,
    ]


def test_capabilities_that_are_lowered() -> None:
    """This machine's root may not have all of them."""
    every = struct.pack("=6I", *[0xFFFF_FFFF] * 6)
    lowered = struct.unpack("=6I", without(every, RESOURCE | FSETID))
    assert lowered == (0xFFFF_FFFF & ~RESOURCE & ~FSETID, *[0xFFFF_FFFF] * 5)


ME = By(0, 0)
NAMES = hs.sampled_from([b"a", b"b", b"c", b"d"])
OFFSETS = hs.sampled_from([0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 5 * CHUNK + 7])


class Anybody:
    """In the place of acting as others, which would change this process for good."""

    def acting(self, by: By, *, keeps: bool | None = None) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()


class Freezing(RuleBasedStateMachine):
    """Changes to a tree without a kernel in between, and what is frozen of it meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.base = tempfile.mkdtemp(prefix="cloudfs-freeze-", dir="/dev/shm")
        self.inodes = Inodes(os.open(self.base, os.O_PATH | os.O_DIRECTORY), 1000)
        self.tree = LiveTree(self.inodes, OpenFiles(self.inodes, 1000), None)
        self.frozen: FrozenTree | None = None
        self.model: dict[bytes, object] = {}
        self.freezes = 0

    @initialize()
    def begin(self) -> None:
        for name in (b"a", b"b"):
            self.make_directory(b"", name)
        self.make(b"", b"c", 5)
        self.freeze()

    def inode(self, path: bytes) -> Inode | None:
        """The item at a path, known as the kernel would know it."""
        inode = self.inodes.root
        for name in path.split(b"/") if path else ():
            try:
                inode, _ = self.inodes.look_up(inode, name)
            except OSError:
                return None
            inode.lookups = max(inode.lookups, 1)
        return inode

    def directory(self, name: bytes) -> Inode:
        inode = self.inode(name)
        return inode if inode is not None and inode.is_dir else self.inodes.root

    @rule(above=NAMES, name=NAMES)
    def make_directory(self, above: bytes, name: bytes) -> None:
        with contextlib.suppress(OSError):
            self.tree.mkdir(self.directory(above), name, 0o755, ME)[0].lookups += 1

    @rule(above=NAMES, name=NAMES, size=OFFSETS)
    def make(self, above: bytes, name: bytes, size: int) -> None:
        with contextlib.suppress(OSError):
            opened, _ = self.tree.create(self.directory(above), name, 0o644, os.O_RDWR, ME)
            opened.inode.lookups += 1
            self.tree.write(opened, 0, b"x" * size)
            self.tree.files.close(opened)

    @rule(above=NAMES, name=NAMES, offset=OFFSETS, size=OFFSETS, byte=hs.integers(0, 255))
    def write(self, above: bytes, name: bytes, offset: int, size: int, byte: int) -> None:
        inode = self.inode(above + b"/" + name) or self.inode(name)
        if inode is None or not inode.is_file:
            return
        opened = self.tree.open(inode, os.O_RDWR, ME)
        self.keep(inode, offset, offset + size)
        self.tree.write(opened, offset, bytes([byte]) * size)
        self.tree.files.close(opened)

    def keep(self, inode: Inode, start: int, end: int, *, cut: bool = False) -> None:
        while start < end:
            start = self.tree.keep(inode, start, end, cut=cut)

    @rule(above=NAMES, name=NAMES, size=OFFSETS)
    def cut(self, above: bytes, name: bytes, size: int) -> None:
        inode = self.inode(above + b"/" + name) or self.inode(name)
        if inode is not None and inode.is_file:
            self.keep(inode, size, os.fstat(inode.fd).st_size, cut=True)
            self.tree.set_attributes(inode, -1, Wanted(size=size, mode=0o600), ME)
            self.tree.set_xattr(inode, b"trusted.x", b"%d" % size, ME)

    @rule(above=NAMES, name=NAMES)
    def remove(self, above: bytes, name: bytes) -> None:
        directory = self.directory(above)
        with contextlib.suppress(OSError):
            self.tree.unlink(directory, name)
        with contextlib.suppress(OSError):
            self.tree.rmdir(directory, name)

    @rule(a=NAMES, old=NAMES, b=NAMES, new=NAMES, flags=hs.sampled_from([0, 0, 1, 2]))
    def rename(self, a: bytes, old: bytes, b: bytes, new: bytes, flags: int) -> None:
        with contextlib.suppress(OSError):
            self.tree.rename(self.directory(a), old, self.directory(b), new, flags, ME)

    @rule(name=NAMES, b=NAMES, new=NAMES)
    def link(self, name: bytes, b: bytes, new: bytes) -> None:
        inode = self.inode(name)
        if inode is not None and inode.is_file:
            with contextlib.suppress(OSError):
                self.tree.link(inode, self.directory(b), new, ME)

    @rule()
    def kernel_forgets(self) -> None:
        for inode in list(self.inodes.all()):
            self.inodes.forget(inode.number, inode.lookups)

    @rule()
    def freeze(self) -> None:
        self.thaw()
        self.freezes += 1
        made = Freeze(
            self.freezes,
            self.inodes,
            1 << 30,
            waits=True,
            wanted=None,
            block_size=4096,
            store_fd=lambda: os.open(self.base, os.O_TMPFILE | os.O_RDWR),
            touched=Touched(),
        )
        self.tree.freeze = made
        self.frozen = FrozenTree(made, self.inodes, lambda inode: False)
        self.model = self.seen()

    def thaw(self) -> None:
        """What was frozen is as it was, till the end."""
        if self.frozen is not None and self.tree.freeze is not None:
            found = self.seen()
            assert found == self.model
            self.frozen.end()
            self.tree.freeze.end()
            self.tree.freeze = self.frozen = None

    @rule()
    def look(self) -> None:
        assert self.seen() == self.model

    def seen(self) -> dict[bytes, object]:
        """All that is frozen."""
        found: dict[bytes, object] = {}
        self.walk(self.inodes.root, b"", found)
        return found

    def walk(self, directory: Inode, path: bytes, found: dict[bytes, object]) -> None:
        frozen = self.frozen
        assert frozen is not None
        found[path] = frozen.freeze.status(directory).st_mtime_ns
        for name in sorted(frozen.names(directory)):
            inode = frozen.look_up(directory, name)
            assert inode is not None, name
            frozen.count(inode)
            inode = frozen.get(frozen.number(inode))
            if inode.is_dir:
                self.walk(inode, path + b"/" + name, found)
                continue
            status = frozen.freeze.status(inode)
            fd = os.open(inode.proc, os.O_RDONLY)
            data = frozen.freeze.read(inode, fd, 0, status.st_size)
            os.close(fd)
            described = (status.st_mode, status.st_nlink, status.st_ino, status.st_ctime_ns)
            found[path + b"/" + name] = (described, frozen.xattrs(inode), data)

    def teardown(self) -> None:
        try:
            self.thaw()
        finally:
            os.close(self.inodes.root.fd)
            shutil.rmtree(self.base)


def test_marks_are_disowned_on_a_full_disk_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(MarkedSet(tmp_path)) as marks:
        tracker = Tracker(marks, CHUNK)
        tracker.begin("boot", "tree", "mount", "")
        tracker.confirm(tracker.close_epoch(), Base(1, 1))

        def fail(value: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(marks, "save_state", fail)
        tracker.disown()
        monkeypatch.undo()
        after = Tracker(marks, CHUNK)
        after.begin("boot", "tree", "another", "mount")
        assert after.base is None


def test_nobody_waits_before_the_freeze_is_reached_and_after_it_was_given_up(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_bytes(bytes(4 * CHUNK))
    inodes = Inodes(os.open(tmp_path, os.O_PATH | os.O_DIRECTORY), 1000)
    file = inodes.look_up(inodes.root, b"file")[0]
    freeze = Freeze(
        1, inodes, CHUNK, waits=True, wanted=None, block_size=CHUNK, touched=Touched(),
        store_fd=lambda: os.open(tmp_path, os.O_TMPFILE | os.O_RDWR),
    )  # fmt: skip
    freeze.keep_chunks(file, [0, 1])
    freeze.reached = True
    with pytest.raises(Full):
        freeze.keep_chunks(file, [2])
    assert not freeze.released.is_set()
    freeze.give_up("as this test wants it")
    assert freeze.released.is_set()
    assert freeze.missing(file, 0, 4 * CHUNK) == []
    freeze.end()


def test_the_number_of_an_item_that_was_given_up_is_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To another one, which is known by it in marks and snapshots."""
    inodes = Inodes(os.open(tmp_path, os.O_PATH | os.O_DIRECTORY), 1000)
    for name in ("gone", "known", "new"):
        (tmp_path / name).write_text(name)
    gone, known = (inodes.look_up(inodes.root, name)[0] for name in (b"gone", b"known"))
    known.lookups = 1
    for inode in (gone, known):
        inode.pins += 1
        inodes.abandon(inode)
    assert (gone.fd, known.fd >= 0) == (-1, True)
    monkeypatch.setattr(inodes, "number_of", lambda status: gone.number)
    new = inodes.take(os.open(tmp_path / "new", os.O_PATH))[0]
    assert new is not gone
    assert new.number == gone.number
    new.lookups = 1
    inodes.unpin(gone)
    assert inodes.get(gone.number) is new


def test_what_is_frozen_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "Caller", Anybody)
    hunt(40, 40, Freezing)  # type: ignore[arg-type]


@pytest.mark.long
def test_what_is_frozen_stays_as_it_was_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "Caller", Anybody)
    hunt(2000, 100, Freezing)  # type: ignore[arg-type]
