"""How fast the live mount is, beside what lies beneath it and beside bindfs, all on tmpfs.

"live" is the mount as it is used, "untracked" the same one with its tracking off. Each load is put
on each of them by load.py, one after the other, several times over; the best time of each counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benching import data
from benching.measure import Cost, Failed, Results, run
from benching.options import chosen
from benching.programs import Cloudfs, Program
from benching.volumes import quietly, unmount

ROUNDS = 3
NAME = "live"
LOAD = str(Path(__file__).with_name("load.py"))
TRACKING_PERCENT = 15
Mounting = Callable[[], contextlib.AbstractContextManager[Path]]


@dataclass(frozen=True)
class Load:
    """One kind of load, and how fast the live mount is asked to be, as a share of bindfs."""

    name: str
    words: str
    unit: float
    share: float
    size: int = 1 << 30
    count: int = 20_000


LOADS = {
    load.name: load
    for load in (
        Load("write", "sequential write, MB/s", 1e6, 5),
        Load("read", "sequential read, cold, MB/s", 1e6, 0.6),
        Load("random", "random 4 KiB writes/s", 1, 1.2, size=256 << 20, count=40_000),
        Load("create", "creates/s", 1, 0.4),
        Load("stat", "stats/s, cold", 1, 0.4),
        Load("unlink", "unlinks/s", 1, 0.4),
    )
}
MOUNTED = (("write",), ("read", "random", "create"), ("stat", "unlink"))
"""Loads by the mount that they share; a new one knows and caches nothing."""


@dataclass
class Rates:
    """The best rate of each load on each kind of mount."""

    best: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, load: str, mount: str, rate: float) -> None:
        """Keep it where it is the best one yet."""
        row = self.best.setdefault(load, {})
        row[mount] = max(rate, row.get(mount, 0))

    def share(self, load: str, of: str) -> float | None:
        """The rate of the live mount as a share of another's; None where one is missing."""
        row = self.best.get(load, {})
        return row["live"] / row[of] if {"live", of} <= row.keys() else None


@contextlib.contextmanager
def _bare(beneath: Path) -> Iterator[Path]:
    yield beneath


@contextlib.contextmanager
def _bindfs(beneath: Path, place: Path) -> Iterator[Path]:
    quietly("bindfs", beneath, place)
    try:
        yield place
    finally:
        unmount(place)


def _ways(base: Path, beneath: Path) -> dict[str, Mounting]:
    """How each of the chosen mounts is made."""
    place = base / "mount"
    place.mkdir(exist_ok=True)
    if "bindfs" in chosen.mounts and shutil.which("bindfs") is None:
        sys.exit("Missing bindfs: install Debian's package bindfs.")
    ways: dict[str, Mounting] = {
        "bare": partial(_bare, beneath),
        "bindfs": partial(_bindfs, beneath, place),
    }
    if {"live", "untracked"} & set(chosen.mounts):
        cloudfs = _policy(base, beneath, place)
        ways["live"] = partial(cloudfs.live, beneath, place)
        ways["untracked"] = partial(cloudfs.live, beneath, place, tracking=False)
    return {name: ways[name] for name in chosen.mounts}


def _policy(base: Path, beneath: Path, place: Path) -> Cloudfs:
    """A policy with a snapshot: without one there would be nothing to track against."""
    cloudfs = Cloudfs(base)
    cloudfs.snapshot = "live"
    cloudfs.fresh(beneath)
    (beneath / "seed").write_text("so that there is something to back up\n")
    with cloudfs.live(beneath, place):
        cloudfs.backup(beneath)
    return cloudfs


def _load(load: Load, top: Path) -> float:
    """Run it; returns its rate."""
    command = [sys.executable, LOAD, load.name, str(top)]
    command += ["--bytes", str(load.size), "--count", str(load.count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"load.py {load.name}: {done.stderr[-500:]}")
    answer = json.loads(done.stdout)
    return float(answer["amount"] / answer["seconds"] / load.unit)


def live(base: Path, programs: list[Program], results: Results) -> None:
    """Single loads, and then real programs."""
    with contextlib.ExitStack() as stack:
        beneath = base / "beneath"
        beneath.mkdir()
        stack.callback(shutil.rmtree, beneath, ignore_errors=True)
        stack.callback(shutil.rmtree, Cloudfs(base).base, ignore_errors=True)
        ways = _ways(base, beneath)
        _show(_rates(ways, beneath), results)
        _real(base, beneath, ways, results)


def _rates(ways: dict[str, Mounting], beneath: Path) -> Rates:
    rates = Rates()
    for _ in range(ROUNDS):
        for name, mounting in ways.items():
            for loads in MOUNTED:
                with mounting() as top:
                    for load in loads:
                        rates.add(load, name, _load(LOADS[load], top))
            _empty(beneath)
    return rates


def _empty(beneath: Path) -> None:
    for entry in beneath.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _show(rates: Rates, results: Results) -> None:
    for load in LOADS.values():
        for mount, rate in rates.best.get(load.name, {}).items():
            results.number(NAME, load.words, mount, round(rate))
        share = rates.share(load.name, "bindfs")
        if share is not None:
            words = f"{load.words}: live / bindfs"
            results.number(NAME, words, "cloudfs", round(share, 2), at_least=load.share)
        share = rates.share(load.name, "untracked")
        if share is not None:
            words = f"{load.words}: cost of tracking, percent"
            results.number(NAME, words, "cloudfs", round(100 * (1 - share), 1), TRACKING_PERCENT)


def _real(base: Path, beneath: Path, ways: dict[str, Mounting], results: Results) -> None:
    """Untar the kernel tree, put it under git, and ask git what has changed."""
    archive = base / "data" / "kernel.tar"
    archive.parent.mkdir(parents=True, exist_ok=True)
    quietly("tar", "cf", archive, "-C", data.kernel(base, "6.1"), ".")
    try:
        for name, mounting in ways.items():
            for step, cost in _git(archive, mounting):
                results.add(NAME, step, name, cost)
            _empty(beneath)
    finally:
        archive.unlink()


def _git(archive: Path, mounting: Mounting) -> Iterator[tuple[str, Cost]]:
    env = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null"}
    # What is measured is the mount, not the compression.
    git = ["git", "-c", "core.compression=0", "-c", "gc.auto=0", "-c", "safe.directory=*"]
    with mounting() as top:
        tree = top / "linux"
        tree.mkdir()
        yield "untar the kernel tree", run(["tar", "xf", str(archive), "-C", str(tree)], env)
        quietly("git", "init", "-q", tree)
        yield "git add of it", run([*git, "add", "--all", "--force"], env, cwd=tree)
    with mounting() as top:
        status = [*git, "status", "--porcelain"]
        yield "git status, cold", run(status, env, cwd=top / "linux")
        yield "git status, again", run(status, env, cwd=top / "linux")
