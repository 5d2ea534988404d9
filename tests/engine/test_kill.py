"""Syncs that are killed anywhere: old snapshots stay whole, the next sync goes on from there."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Machine, machine
from tests.engine.rig import contents_of_tree, difference

__all__ = ["machine"]  # the fixture


def grow(tree: Path, rng: random.Random, turn: int) -> None:
    """Change a tree here and there, with enough data that a sync takes a while."""
    for number in range(60):
        directory = tree / f"d{rng.randrange(8)}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"f{number}-{rng.randrange(40)}").write_bytes(rng.randbytes(150_000))
    (tree / "turn").write_text(str(turn))


def restored(machine: Machine, spec: str, target: Path) -> dict[bytes, object]:
    machine.run("restore", spec, "--target", target)
    return contents_of_tree(target)


@pytest.mark.parametrize("seed", [pytest.param(1), pytest.param(2, marks=pytest.mark.long)])
def test_killed_at_random_points(
    machine: Machine, tmp_path: Path, seed: int, request: pytest.FixtureRequest
) -> None:
    rng = random.Random(seed)
    tree = tmp_path / "tree"
    grow(tree, rng, 0)
    repo = f"file://{tmp_path}/repo"
    machine.run("policy", "create", "home", "--source", tree, "--repo", repo)
    machine.run("sync", "home")
    model = contents_of_tree(tree)
    kills = 100 if request.node.get_closest_marker("long") else 12
    for turn in range(kills):
        grow(tree, rng, turn + 1)
        with machine.start("sync", "home") as process:
            time.sleep(rng.uniform(0.05, 0.8))
            process.kill()
        if turn % 6 == 0:
            first = restored(machine, "home@1", tmp_path / f"first-{turn}")
            assert not difference(first, model), f"seed {seed}, turn {turn}"
    machine.run("sync", "home")
    found = restored(machine, "home", tmp_path / "last")
    assert not difference(found, contents_of_tree(tree)), f"seed {seed}"
    assert not difference(restored(machine, "home@1", tmp_path / "first"), model)


def test_what_a_killed_sync_stored_is_not_stored_again(machine: Machine, tmp_path: Path) -> None:
    """A sync that uploaded packs and died before its commit leaves them to the next one."""
    tree, repository = tmp_path / "tree", tmp_path / "repo"
    grow(tree, random.Random(3), 0)
    machine.run("policy", "create", "home", "--source", tree, "--repo", f"file://{repository}")

    def packs() -> set[str]:
        return {str(path) for path in repository.rglob("pack/*/*") if path.is_file()}

    def stored() -> int:
        return sum(os.path.getsize(path) for path in packs())

    # Whatever wants to commit finds that it may not: the packs are there, the snapshot is not.
    machine.run("sync", "home")
    whole = stored()
    for path in repository.rglob("manifest-*"):
        path.unlink()
    for path in repository.rglob("segment/*"):
        path.unlink()
    for place in (machine.home / "state", machine.home / "cache"):
        os.rename(place, place.with_name(place.name + "-lost"))
    before = packs()
    summary = machine.run("sync", "home", "--json").objects[-1]
    assert summary["snapshot"] == 1
    assert before <= packs()
    assert stored() - whole < whole / 20
    found = restored(machine, "home", tmp_path / "out")
    assert not difference(found, contents_of_tree(tree))
