"""Snapshots by commands of the policy, through the program."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Machine
from tests.engine import snapshotter
from tests.engine.test_external import held, processes
from tests.fuse.compare import assert_same


@pytest.fixture
def fs() -> Iterator[Path]:
    """A file system with made-up snapshots, and a tree on it."""
    base = Path(tempfile.mkdtemp(prefix="cloudfs-external-", dir="/dev/shm"))
    tree = snapshotter.make(base / "fs")
    (tree / "docs").mkdir()
    (tree / "docs" / "plan").write_bytes(os.urandom(3_000_000))
    for number in range(50):
        (tree / "docs" / f"{number}").write_text(f"{number}" * 100)
    yield base / "fs"
    snapshotter.remove(base / "fs")
    shutil.rmtree(base)


def options(fs: Path, **other: str) -> list[str]:
    """What a policy with the made-up snapshotter is made with."""
    top = Path(__file__).parents[2]
    program = [sys.executable, snapshotter.__file__, str(fs)]
    found = ["--snapshot", "external"]
    for name in ("snapshot", "changes", "release"):
        command = ["env", f"PYTHONPATH={top}", *program, name]
        found += [f"--external-{name}", other.get(name, shlex.join(command))]
    return found


def script(fs: Path, text: str) -> str:
    """A command that is a shell script, to be changed by ``fs / "script"``."""
    (fs / "script").write_text(text)
    return f"sh {fs}/script"


@pytest.fixture
def tree(fs: Path) -> Path:
    return fs / "live" / "tree"


@pytest.fixture
def synced(machine: Machine, fs: Path, tree: Path, repo: str) -> Machine:
    """A machine that synced the tree once."""
    said = machine.run(
        "policy", "create", "ext", "--source", tree, "--repo", repo, *options(fs)
    ).out
    assert "changes found by external commands" in said
    machine.run("sync", "ext")
    return machine


def test_only_what_is_told_is_read(synced: Machine, fs: Path, tree: Path, tmp_path: Path) -> None:
    with (tree / "docs" / "plan").open("r+b") as file:
        file.seek(1_500_000)
        file.write(b"changed")
    (tree / "docs" / "7").rename(tree / "seven")
    (tree / "docs").rename(tree / "papers")
    done = synced.run("sync", "ext", "--json")
    assert done.err == ""
    (summary,) = done.objects
    assert summary["source"] == "external"
    assert summary["consistent"] is True
    assert summary["bytes_read"] < 200_000  # one block, and what moved alone
    assert len(held(fs)) == 1
    synced.run("restore", "ext", "--target", tmp_path / "out")
    assert_same(tree, tmp_path / "out")
    assert "unchanged" in synced.run("sync", "ext").out
    assert "external" in synced.run("snapshots", "ext").out
    view = tmp_path / "view"
    view.mkdir()
    synced.run("mount", "ext", view)
    try:
        assert_same(tree, view / "latest")
        assert (view / "by-number" / "1" / "docs" / "7").exists()
    finally:
        synced.run("umount", view)


def test_how_it_stands(synced: Machine, fs: Path, tree: Path) -> None:
    """Said without running a command."""
    before = sorted(os.listdir(fs))
    assert synced.source_state() == ("not known", "external, complete")
    found = synced.run("status", "--json").objects[0]
    assert (found["source_complete"], found["changes_since"]) == (True, None)
    synced.run("policy", "set", "ext", "--external-snapshot", "false")
    reason = "external, next sync scans: the policy's commands or sources are others"
    assert synced.source_state() == ("not known (scan)", reason)
    assert sorted(os.listdir(fs)) == before


def test_a_sync_killed_anywhere_leaves_nothing_behind(
    synced: Machine, fs: Path, tree: Path, tmp_path: Path
) -> None:
    (tree / "large").write_bytes(os.urandom(20_000_000))
    for seconds in (0.1, 0.3, 0.45, 0.6, 0.8):
        with synced.start("sync", "ext", "--workers", "1") as process:
            time.sleep(seconds)
            process.send_signal(signal.SIGKILL)
    (tree / "docs" / "7").unlink()
    synced.run("sync", "ext")
    assert len(held(fs)) == 1
    assert processes(fs) == []
    synced.run("restore", "ext", "--target", tmp_path / "out")
    assert_same(tree, tmp_path / "out")


def test_ctrl_c_ends_the_command_and_releases_the_snapshot(
    machine: Machine, fs: Path, tree: Path, repo: str
) -> None:
    hanging = script(fs, "echo '{\"complete\": true}'")
    arguments = options(fs, changes=hanging)
    machine.run("policy", "create", "ext", "--source", tree, "--repo", repo, *arguments)
    machine.run("sync", "ext")
    base = held(fs)
    script(fs, f"sleep 1000 & touch {fs}/begun; wait")
    with machine.start("sync", "ext") as process:
        deadline = time.monotonic() + 20
        while not (fs / "begun").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Snapshot 2 was not made" in err
    assert held(fs) == base
    assert processes(fs) == []


def test_commands_get_no_secrets(machine: Machine, fs: Path, tree: Path, repo: str) -> None:
    machine.variables |= {"AWS_SECRET_ACCESS_KEY": "top", "OTHER": "kept"}
    snapshot = script(fs, f'env > {fs}/seen; echo "$@" >> {fs}/seen; exit 1')
    arguments = options(fs, snapshot=f"{snapshot} '$HOME; two words'")
    machine.run("policy", "create", "ext", "--source", tree, "--repo", repo, *arguments)
    done = machine.run("sync", "ext")
    assert "no snapshot could be taken, so the tree itself is scanned" in done.err
    seen = (fs / "seen").read_text()
    assert "PASSPHRASE" not in seen
    assert "AWS_" not in seen
    assert "OTHER=kept\n" in seen
    assert "CLOUDFS_POLICY=ext\n" in seen
    assert f"CLOUDFS_SOURCE={tree}\n" in seen
    assert f"\n$HOME; two words {tree} cloudfs-" in seen


def test_commands_that_others_could_have_written_are_not_run(
    synced: Machine, fs: Path, tree: Path
) -> None:
    path = synced.home / "config" / "ext.toml"
    path.chmod(0o664)
    sentence = synced.fails(2, "sync", "ext")
    assert sentence.startswith(f"the commands in {path} are not run")
    path.chmod(0o644)
    os.chown(path, 1000, 1000)
    assert "are not run" in synced.fails(2, "sync", "ext")
    os.chown(path, 0, 0)
    synced.run("sync", "ext")


def test_commands_are_given_changed_and_taken_away(
    machine: Machine, other_machine: Machine, fs: Path, tree: Path, repo: str
) -> None:
    create = ("policy", "create", "ext", "--source", tree, "--repo", repo, "--snapshot", "external")
    assert "needs --external-snapshot" in machine.fails(2, *create)
    said = machine.fails(2, *create, "--external-snapshot", "no-such-program x")
    assert said == "--external-snapshot: there is no program no-such-program that can be run."
    said = machine.run(*create, "--external-snapshot", "true", "--external-timeout", "5m").out
    assert "changes found by scan of external snapshots" in said
    path = machine.home / "config" / "ext.toml"
    assert 'external_snapshot = ["true"]' in path.read_text()
    machine.run("policy", "set", "ext", "--external-changes", "sh -c 'exit 1'")
    assert 'external_changes = ["sh", "-c", "exit 1"]' in path.read_text()
    assert "needs --external-snapshot" in machine.fails(
        2, "policy", "set", "ext", "--clear", "external_snapshot"
    )
    machine.run("policy", "set", "ext", "--clear", "external_changes")
    assert not any(line.startswith("external_changes") for line in path.read_text().splitlines())
    assert "printed 0 lines" in machine.run("sync", "ext").err
    said = other_machine.run("policy", "create", "ext", "--adopt", "--repo", repo).out
    assert "It has commands, which every sync runs" in said


@pytest.mark.parametrize(
    "way",
    [
        ("remove", "ext", "--yes"),
        ("set", "ext", "--snapshot", "scan"),
        ("set", "ext", "--repo", "../second"),
        ("set", "ext", "--source", "."),
    ],
)
def test_a_policy_that_needs_no_snapshot_any_more_releases_it(
    synced: Machine, fs: Path, way: tuple[str, ...]
) -> None:
    assert len(held(fs)) == 1
    synced.run("policy", *way)
    assert held(fs) == []


def test_a_snapshot_that_cannot_be_released_keeps_no_policy(
    machine: Machine, fs: Path, tree: Path, repo: str
) -> None:
    failing = options(fs, release="false")
    machine.run("policy", "create", "ext", "--source", tree, "--repo", repo, *failing)
    machine.run("sync", "ext")
    assert "could not be released" in machine.run("policy", "remove", "ext", "--yes").err
    assert "there is no policy" in machine.fails(2, "sync", "ext")
