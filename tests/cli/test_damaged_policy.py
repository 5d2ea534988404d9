"""One damaged copy of a policy: the others go on, and it is said once what to do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cli.conftest import Machine
from tests.fuse.conftest import wait_until


@pytest.fixture
def two(home: Machine, tmp_path: Path, repo: str) -> tuple[Machine, str]:
    """A machine with two policies that were synced; then home's copy in the repository is damaged.
    The second value is that object's name."""
    home.run("sync", "home")
    objects = tmp_path / "repo" / "policy"
    (copy,) = objects.iterdir()
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "file").write_text("of work")
    home.run("policy", "create", "work", "--source", tmp_path / "work", "--repo", repo)
    home.run("sync", "work")
    data = bytearray(copy.read_bytes())
    data[-3] ^= 1
    copy.write_bytes(data)
    return home, f"policy/{copy.name}"


def mend(machine: Machine) -> None:
    """What the sentence says."""
    machine.run("policy", "set", "home", "--tag", "again")
    machine.run("sync", "home")


def test_the_others_are_there_on_any_machine(
    two: tuple[Machine, str], other_machine: Machine, repo: str, tmp_path: Path
) -> None:
    name = two[1]
    assert name in other_machine.fails(13, "snapshots", f"{repo}#home")
    for arguments in (
        ["snapshots", repo],
        ["snapshots", f"{repo}#work"],
        ["ls", f"{repo}#work:/"],
        ["cat", f"{repo}#work:/file"],
    ):
        done = other_machine.run(*arguments)
        assert done.out
        assert done.err.count(name) == 1 and done.err.count("\n") == 1
        assert "is damaged; its snapshots are not touched" in done.err
    (tmp_path / "mnt").mkdir()
    done = other_machine.run("mount", repo, tmp_path / "mnt")
    try:
        assert done.err.count(name) == 1
        assert (tmp_path / "mnt" / "latest" / "file").read_text() == "of work"
        mend(two[0])
        wait_until(lambda: "home" in os.listdir(tmp_path / "mnt"))
        assert (tmp_path / "mnt" / "home" / "latest" / "a file").read_text() == "x"
    finally:
        other_machine.run("umount", tmp_path / "mnt")


def test_a_machine_with_the_policies_does_not_need_the_copies(two: tuple[Machine, str]) -> None:
    machine = two[0]
    for arguments in (["sync", "work"], ["sync", "home"], ["status"], ["snapshots", "home"]):
        assert two[1] not in machine.run(*arguments).err


def test_what_the_sentence_says_mends_it(two: tuple[Machine, str], repo: str) -> None:
    machine, name = two
    mend(machine)
    done = machine.run("snapshots", f"{repo}#home")
    assert name not in done.err and done.out


def test_a_new_policy_can_be_made_beside_it(two: tuple[Machine, str], repo: str) -> None:
    machine = two[0]
    machine.run("policy", "create", "third", "--source", machine.home, "--repo", repo)
    machine.run("sync", "third")
