"""One file, read and written in every way at once, stays what it should be."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.rig import Rig, contents_of_tree, difference
from tests.posix import fsx, mounts
from tests.posix.mounts import Pair

SEEDS = (1, 2)
"""On each of two file systems: four in all."""

STEPS = 2_500_000
QUICK = STEPS // 100
TIMEOUT_S = 3600


@contextlib.contextmanager
def exercising(
    place: Path, seeds: tuple[int, ...], steps: int
) -> Iterator[list[subprocess.Popen[str]]]:
    """Exercise a file for each seed, in a process of its own; fails where one finds something."""
    script = Path(fsx.__file__)
    running = [
        subprocess.Popen(
            [
                sys.executable,
                "-X",
                "faulthandler",
                script,
                place / f"fsx-{seed}",
                f"--seed={seed}",
                f"--steps={steps}",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for seed in seeds
    ]
    try:
        yield running
        for process in running:
            said = process.communicate(timeout=TIMEOUT_S)[0]
            print(said)
            assert process.returncode == 0, f"{said} (exit code {process.returncode})"
    finally:
        for process in running:
            process.kill()
            process.wait()


def test_one_hundredth(pair: Pair) -> None:
    with exercising(pair.live, SEEDS, QUICK):
        pass


@pytest.mark.long
def test_ten_million_steps(pair: Pair) -> None:
    with exercising(pair.live, SEEDS, STEPS):
        pass


def _exercise_beside_syncs(base: Path, steps: int) -> int:
    """How many syncs there were meanwhile."""
    rig = Rig(base, source="live")
    with mounts.mounted(mounts.job(rig.tree, rig.local().live_dir("home"), block_size=4096)):
        syncs = 0
        with exercising(rig.tree, SEEDS, steps) as running:
            while any(process.poll() is None for process in running):
                made = rig.sync()
                assert made.snapshot is None or made.snapshot.consistent
                syncs += 1
        rig.sync()
        number = rig.history().snapshots[-1].number
        assert not difference(rig.contents(number), contents_of_tree(rig.tree))
    return syncs


def test_beside_syncs(tmp_path: Path) -> None:
    assert _exercise_beside_syncs(tmp_path, QUICK // 3) >= 2


@pytest.mark.long
def test_long_beside_syncs(tmp_path: Path) -> None:
    assert _exercise_beside_syncs(tmp_path, 20 * QUICK) >= 20


def test_what_is_lost_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exerciser sees writes of which one byte is another, and says how to see it again."""
    exerciser = fsx.Exerciser(str(tmp_path / "file"), 7)
    written = itertools.count()
    pwrite = fsx.os.pwrite

    def losing(fd: int, data: bytes, offset: int) -> int:
        if next(written) % 50 == 0:
            data = data[:-1] + bytes([data[-1] ^ 1])
        return pwrite(fd, data, offset)

    monkeypatch.setattr(fsx.os, "pwrite", losing)
    with pytest.raises(fsx.Differs, match=r"seed 7, step \d+: \d+ bytes from"):
        exerciser.run(5000)
