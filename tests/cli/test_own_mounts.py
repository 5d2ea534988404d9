"""Mounts of cloudfs within what is backed up: backups do not end in backups."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Machine
from tests.engine import loops


@pytest.fixture
def volume() -> Iterator[Path]:
    """A file system that can be watched."""
    base = Path(tempfile.mkdtemp(prefix="cloudfs-own-", dir="/dev/shm"))
    with loops.file_system(base, "ext4") as place:
        yield place
    shutil.rmtree(base)


@contextlib.contextmanager
def mounted(machine: Machine, place: Path, *arguments: str | Path) -> Iterator[Path]:
    """A mount of cloudfs, until the end of the block."""
    place.mkdir(exist_ok=True)
    machine.run("mount", *arguments)
    try:
        yield place
    finally:
        machine.run("umount", place)


def names(machine: Machine, policy: str) -> list[str]:
    """All that a policy's last snapshot holds."""
    lines = machine.run("ls", "--recursive", policy).out.splitlines()
    return sorted(line.strip("'/") for line in lines)


def made(machine: Machine, name: str, tree: Path, repo: str, how: str) -> None:
    """A policy that has been synced."""
    options = ("--source", tree, "--repo", repo, "--snapshot", how)
    machine.run("policy", "create", name, *options)
    machine.run("sync", name)


def test_a_view_within_the_tree_counts_as_empty(home: Machine, tree: Path) -> None:
    home.run("sync", "home")
    plain = names(home, "home")
    with mounted(home, tree / "view", "home", tree / "view") as view:
        assert (view / "latest" / "docs" / "plan.txt").exists()
        home.run("sync", "home")
        assert names(home, "home") == sorted([*plain, "view"])
        (tree / "a file").write_text("another")
        assert "1 changed" in home.run("sync", "home").out, (
            "the new snapshot is shown, and not seen"
        )
        assert names(home, "home") == sorted([*plain, "view"])
        home.run("sync", "home", "--verify-source", "100%", "--force")


def test_a_view_is_backed_up_where_it_is_the_source(
    home: Machine, tree: Path, tmp_path: Path
) -> None:
    home.run("sync", "home")
    with mounted(home, tmp_path / "view", "home", tmp_path / "view") as view:
        made(home, "copy", view / "latest", f"file://{tmp_path}/second", "scan")
    assert names(home, "copy") == names(home, "home")


def test_the_backups_that_a_live_mount_shows_are_left_out(
    machine: Machine, tree: Path, tmp_path: Path
) -> None:
    made(machine, "plans", tree / "docs", f"file://{tmp_path}/first", "live")
    repo = f"file://{tmp_path}/second"
    with mounted(machine, tree / "docs", "--live", "plans") as docs:
        assert (docs / ".snapshot" / "latest" / "plan.txt").exists()
        made(machine, "all", tree, repo, "scan")
        made(machine, "only", docs, repo, "scan")
        assert names(machine, "all") == ["a file", "docs", "docs/plan.txt", "link"]
        assert names(machine, "only") == ["plan.txt"]
        made(machine, "outer", tree, repo, "live")
        with mounted(machine, tree, "--live", "outer"):
            machine.run("sync", "outer", "--force")
            assert names(machine, "outer") == names(machine, "all")


def test_an_own_item_of_that_name_is_backed_up(
    machine: Machine, tree: Path, tmp_path: Path
) -> None:
    (tree / "docs" / ".snapshot").write_text("of the user")
    made(machine, "plans", tree / "docs", f"file://{tmp_path}/first", "live")
    with mounted(machine, tree / "docs", "--live", "plans"):
        made(machine, "all", tree, f"file://{tmp_path}/second", "scan")
    assert "docs/.snapshot" in names(machine, "all")


def test_a_view_is_no_matter_to_the_marks_of_a_live_mount(
    machine: Machine, tree: Path, repo: str
) -> None:
    made(machine, "home", tree, repo, "live")
    plain = names(machine, "home")
    with (
        mounted(machine, tree / "view", "home", tree / "view"),
        mounted(machine, tree, "--live", "home"),
    ):
        machine.run("sync", "home", "--force")
        (tree / "a file").write_text("another")
        done = machine.run("sync", "home")
        assert "scanned" not in done.err
        assert "1 changed" in done.out
        assert names(machine, "home") == sorted([*plain, "view"])


def test_a_view_is_no_matter_to_a_watch(machine: Machine, volume: Path, repo: str) -> None:
    tree = volume / "tree"
    tree.mkdir()
    (tree / "file").write_text("one")
    (tree / "view").mkdir()
    made(machine, "home", tree, repo, "watch")
    with mounted(machine, tree / "view", "home", tree / "view"):
        machine.run("watch", "home")
        try:
            machine.run("sync", "home", "--force")
            (tree / "file").write_text("two")
            done = machine.run("sync", "home")
            assert done.err == ""
            assert "1 changed" in done.out
            assert names(machine, "home") == ["file", "view"]
        finally:
            machine.run("watch", "home", "--stop")
