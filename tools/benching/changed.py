"""A little changes in a tree that is large: what does it cost to find it?

Each source of changes has a file system of its own on a loop device. The peers back up the same
tree, after the same changes; those that share a file system share the figures of the peers.
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benching import data, trace
from benching.measure import Cost, Failed, Results
from benching.options import chosen
from benching.programs import Cloudfs, Program
from benching.volumes import KINDS, drop_deleted, drop_snapshots, roomy, settle, volume

CHANGED = 100
"""Files that are changed; as many directories stand at the top of the tree, one file in each."""
FILES_EACH = 100
BLOCK = 4096
ROUNDS = 3
"""Of a peer, which takes long."""
SYNCS = 7
"""Of cloudfs, each way: the best counts."""
SYNC_S = 0.7
TIMES_FASTER = 5
LARGE = 1_000_000
"""Files of a tree from which on that is asked."""
GROWTH = 1.3
"""How much dearer a sync may be in the largest tree than in the smallest."""
BIG_READ = 2 * 128 * 1024
ROOM_FILE = 8 << 10
"""Bytes of the file system for each small file: a block, an inode, and something over."""
FIGURES = ("sync", "sync at once", "requests", "bytes read", "system calls on the tree")


def directory(tree: Path, number: int) -> Path:
    """Where the directory of this number lies."""
    return tree / f"{number % CHANGED:02}" / f"{number // CHANGED:03}"


def _fill(tree: str, words: list[str], number: int) -> None:
    rng = random.Random(number)
    place = directory(Path(tree), number)
    place.mkdir(parents=True)
    for index in range(FILES_EACH):
        with open(f"{place}/{index:02}.txt", "w") as file:
            file.write(data.text(rng, words))


def make(tree: Path, files: int) -> None:
    """Small files of text, a hundred in each directory."""
    fill = partial(_fill, str(tree), data.licence_words())
    data.in_parallel(fill, range(files // FILES_EACH))
    settle(tree)


def change(tree: Path, files: int) -> None:
    """Write a block into each of a hundred files, far from each other."""
    tops = files // FILES_EACH // CHANGED
    for index in range(CHANGED):
        place = directory(tree, index + CHANGED * (index * tops // CHANGED))
        with (place / f"{index % FILES_EACH:02}.txt").open("r+b") as file:
            file.write(os.urandom(BLOCK))


@contextlib.contextmanager
def tracked(cloudfs: Cloudfs, source: str, tree: Path) -> Iterator[None]:
    """The tree is backed up, and what changes from now on is told by this source."""
    cloudfs.snapshot = source
    cloudfs.fresh(tree)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, cloudfs.base, ignore_errors=True)
        stack.callback(drop_snapshots, tree)
        if source == "live":
            stack.enter_context(cloudfs.live(tree))
        cloudfs.backup(tree)
        if source == "watch":
            stack.enter_context(cloudfs.watched())
            cloudfs.backup(tree)  # the first sync after the start of the daemon scans
        yield


@dataclass(frozen=True)
class Asked:
    """What is asked of a sync."""

    files: int
    """Files that changed: it must have found so many."""
    read: float | None = None
    """Bytes read, at most."""
    faster: float | None = None
    """Times faster than the best peer, at least."""


class Changes:
    """Changes of one kind, in one tree, and what each program makes of them."""

    def __init__(
        self, scenario: str, what: str, tree: Path, act: Callable[[], None], results: Results
    ) -> None:
        self.scenario, self.what, self.tree, self.act = scenario, what, tree, act
        self.results = results

    def step(self, source: str, figure: str) -> str:
        """How a row is called."""
        return step(source, self.what, figure)

    def all(self, programs: list[Program], sources: list[str], asked: Asked, rounds: int) -> None:
        """Each program; a peer makes so many rounds of changes."""
        for program in programs:
            if isinstance(program, Cloudfs):
                for source in sources:
                    self.cloudfs(program, source, asked)
            else:
                self.peer(program, sources, rounds)
        for source in sources:
            self.compare(source, asked.faster)

    def cloudfs(self, cloudfs: Cloudfs, source: str, asked: Asked) -> None:
        """Sync them, a few times, and once more to count system calls."""
        with tracked(cloudfs, source, self.tree):
            for _ in range(SYNCS):
                self._sync(cloudfs, source, asked)
            for _ in range(SYNCS):
                self._sync(cloudfs, source, asked, at_once=True)
            self._trace(cloudfs, source)

    def _change(self, *, written_out: bool = True) -> None:
        """Make the changes, when nothing of earlier ones is left for the kernel to do."""
        drop_deleted(self.tree)
        settle(self.tree)
        self.act()
        if written_out:
            settle(self.tree)

    def _sync(self, cloudfs: Cloudfs, source: str, asked: Asked, *, at_once: bool = False) -> None:
        """One sync; at once: before what changed was written out."""
        self._change(written_out=not at_once)
        figure = "sync at once" if at_once else "sync"
        cost = cloudfs.backup(self.tree)
        self.results.add(self.scenario, self.step(source, figure), "cloudfs", cost, SYNC_S)
        summary = cloudfs.summary(cost)
        check(summary, source, asked.files)
        self.number(source, "requests", summary["requests"])
        self.number(source, "bytes read", summary["bytes_read"], asked.read)

    def _trace(self, cloudfs: Cloudfs, source: str) -> None:
        self._change()
        place = self.tree.parent  # a snapshot may lie beside the tree
        calls = trace.calls(
            cloudfs.sync_command, cloudfs.env, cloudfs.processes(), place, cloudfs.base
        )
        if calls is not None:
            self.number(source, "system calls on the tree", calls)

    def number(self, source: str, figure: str, value: float, asked: float | None = None) -> None:
        self.results.number(self.scenario, self.step(source, figure), "cloudfs", value, asked)

    def peer(self, program: Program, sources: list[str], rounds: int) -> None:
        """Back them up by another program, which knows nothing of sources."""
        program.fresh(self.tree)
        program.backup(self.tree)
        for _ in range(rounds):
            self._change()
            cost = program.backup(self.tree)
            for source in sources:
                self.results.add(self.scenario, self.step(source, "sync"), program.name, cost)
        shutil.rmtree(program.base)

    def compare(self, source: str, faster: float | None) -> None:
        """How many times faster than the best peer a sync was. ``faster``: at least."""
        walls = {p: c.wall_s for p, c in self.row(source).items()}
        peers = [wall for program, wall in walls.items() if program != "cloudfs"]
        if peers:
            self.results.number(
                self.scenario, self.step(source, "times faster than the best peer"), "cloudfs",
                round(min(peers) / walls["cloudfs"], 1), at_least=faster,
            )  # fmt: skip

    def row(self, source: str) -> dict[str, Cost]:
        """What the sync took each program."""
        return self.results.rows[self.scenario, self.step(source, "sync")]


def step(source: str, what: str, figure: str) -> str:
    """How a row is called."""
    return f"{source}, {what}: {figure}"


def check(summary: dict[str, object], source: str, files: int) -> None:
    """Raise Failed where a sync did not go by its source, or missed something."""
    check_source(summary, source)
    if summary["items_changed"] != files:
        raise Failed(f"{files} files were changed, and {summary['items_changed']} were found")


def check_source(summary: dict[str, object], source: str) -> None:
    """Raise Failed where a sync went another way than it was told to."""
    if summary.get("source") != source:
        raise Failed(f"this sync went by {summary.get('source')}, not by {source}")


def on_kinds() -> dict[str, list[str]]:
    """The chosen sources, by the file system that they share."""
    kinds: dict[str, list[str]] = {}
    for source in chosen.sources:
        kinds.setdefault(KINDS[source], []).append(source)
    return kinds


def changed(base: Path, programs: list[Program], results: Results) -> None:
    """A hundred files, in a small tree and in a large one."""
    for kind, sources in on_kinds().items():
        for files in chosen.sizes:
            with volume(base, kind, files * ROOM_FILE + (1 << 30)) as tree:
                make(tree, files)
                act = partial(change, tree, files)
                changes = Changes("changed", f"{files:,} files", tree, act, results)
                asked = Asked(CHANGED, faster=TIMES_FASTER if files >= LARGE else None)
                changes.all(programs, sources, asked, ROUNDS)
    for source in chosen.sources:
        _growth(source, results)


def _growth(source: str, results: Results) -> None:
    """Each figure of the largest tree over that of the smallest."""
    small, large = (f"{chosen.sizes[end]:,} files" for end in (0, -1))
    if small == large:
        return
    for figure in FIGURES:
        least = results.figure("changed", step(source, small, figure))
        most = results.figure("changed", step(source, large, figure))
        if least and most is not None:
            name = f"{source}: {figure}, {large} / {small}"
            results.number("changed", name, "cloudfs", round(most / least, 2), GROWTH)


def bigfile(base: Path, programs: list[Program], results: Results) -> None:
    """4 KiB of one big file. The peers are asked once only: they read all of it."""
    size = chosen.big_bytes
    # The file, its repository, and the file once more in the page cache.
    with roomy(base, 3 * size + (2 << 30)) as place:
        moved = [moved_to(place, program) for program in programs]
        for kind, sources in on_kinds().items():
            if "watch" in sources:
                sources.remove("watch")  # which is not told where in a file something changed
            if not sources:
                continue
            with volume(place, kind, size * 5 // 4 + (1 << 30)) as tree:
                data.random_file(tree / "disk.img", size)
                settle(tree)
                act = partial(data.change_disk, tree)
                changes = Changes("bigfile", f"{size / (1 << 30):g} GiB", tree, act, results)
                changes.all(moved, sources, Asked(1, read=BIG_READ), rounds=1)


def moved_to(place: Path, program: Program) -> Program:
    """The same program, working below another place."""
    program = copy.copy(program)
    program.base = place / program.name
    return program
