"""A sync of the program that is killed two hundred times: nothing that was there is ever lost."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from cloudfs.db.local import LocalState
from cloudfs.repo.history import History
from cloudfs.repo.keys import Secret
from cloudfs.repo.repository import Repository
from cloudfs.store.open import open_store
from tests.cli.conftest import PASSPHRASE, Machine, machine
from tests.engine.rig import contents_of_tree, contents_of_view

__all__ = ["machine"]  # the fixture

KILLS = 200
SLOWEST_S = 1.1

Digests = dict[bytes, bytes]


def digests(contents: dict[bytes, object]) -> Digests:
    """Contents, small enough to keep hundreds of them."""
    return {path: hashlib.sha256(repr(held).encode()).digest() for path, held in contents.items()}


class Reader:
    """Another machine, which only looks; every look is at what the store has then."""

    def __init__(self, url: str, base: Path) -> None:
        local = LocalState(base / "c", base / "s")
        secret = Secret.passphrase(PASSPHRASE.encode())
        repository = Repository.open(open_store(url), secret, local)
        self.history = History(repository, repository.policies()[0])

    def numbers(self) -> list[int]:
        """The snapshots in force, oldest first."""
        self.history.refresh()
        return [record.number for record in self.history.snapshots]

    def contents(self, number: int) -> Digests:
        return digests(contents_of_view(self.history.view(number)))


def grow(tree: Path, rng: random.Random) -> None:
    """Change a tree here and there; some changes are large enough to take a while."""
    for _ in range(rng.choice([1, 20, 60])):
        directory = tree / f"d{rng.randrange(6)}"
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"f{rng.randrange(12)}"
        path.write_bytes(rng.randbytes(rng.choice([10, 3000, 60_000])))
    victims = sorted(path for path in tree.glob("d*/f*") if rng.random() < 0.1)
    for path in victims:
        path.unlink()
    if rng.random() < 0.3:
        moved = tree / f"moved{rng.randrange(4)}"
        shutil.rmtree(moved, ignore_errors=True)
        min(tree.glob("d*")).rename(moved)


def killed(process: subprocess.Popen[str], after_s: float) -> bool:
    """Kill a run then, if it has not ended by itself. Whether it was killed."""
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        process.kill()
    return process.wait() < 0


@pytest.mark.long
def test_killed_two_hundred_times(machine: Machine, tmp_path: Path) -> None:
    """Anywhere: while it starts, walks, packs, commits or tidies up; now and then the machine has
    lost its state too. KILL_SEED in the environment repeats a run, but for the exact moments."""
    seed = int(os.environ.get("KILL_SEED") or random.SystemRandom().randrange(1, 2**32))
    print(f"KILL_SEED={seed}")
    rng, tree = random.Random(seed), tmp_path / "tree"
    tree.mkdir()
    grow(tree, rng)
    url = f"file://{tmp_path}/repo"
    machine.run("policy", "create", "home", "--source", tree, "--repo", url)
    machine.run("sync", "home")
    reader = Reader(url, tmp_path / "reader")
    models = {1: digests(contents_of_tree(tree))}
    kills = 0
    while kills < KILLS:
        where = f"KILL_SEED={seed}, after {kills} kills"
        grow(tree, rng)
        with machine.start("sync", "home", "--workers", str(rng.choice([1, 1, 2]))) as process:
            was_killed = killed(process, rng.uniform(0.1, SLOWEST_S))
            assert was_killed or process.returncode == 0, f"{where}: {process.communicate()[1]}"
        kills += was_killed
        new = max(models) + 1
        if new in reader.numbers():  # it had committed before it was killed, or it ended
            models[new] = digests(contents_of_tree(tree))
        assert was_killed or new in models, f"{where}: success without a snapshot"
        judge(reader, models, {1, new - 1, new, rng.randrange(1, new)}, where)
        if rng.random() < 0.05:
            shutil.rmtree(machine.home / "state", ignore_errors=True)
            shutil.rmtree(machine.home / "cache", ignore_errors=True)
    finish(machine, reader, models, tree, f"KILL_SEED={seed}, at the end")


def judge(reader: Reader, models: dict[int, Digests], some: set[int], where: str) -> None:
    """No snapshot is gone or there twice, and some of them are looked at."""
    assert reader.numbers() == sorted(models), where
    for number in some & models.keys():
        found, model = reader.contents(number), models[number]
        differs = sorted(k for k in found.keys() | model.keys() if found.get(k) != model.get(k))
        assert not differs, f"{where}: snapshot {number} differs in {differs[:5]}"


def finish(
    machine: Machine, reader: Reader, models: dict[int, Digests], tree: Path, where: str
) -> None:
    """The next sync completes, soon, and everything is there."""
    began = time.monotonic()
    machine.run("sync", "home", "--force")
    assert time.monotonic() - began < 30, where
    models[max(models) + 1] = digests(contents_of_tree(tree))
    judge(reader, models, set(models), where)
    reader.history.repository.local.close()
    out = tree.with_name("out")
    machine.run("restore", "home", "--target", out)
    assert digests(contents_of_tree(out)) == models[max(models)], where
