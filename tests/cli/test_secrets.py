"""Secrets do not stay in the environment of any process, where others can read them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from cloudfs.cli.environment import forget_secrets
from cloudfs.fuse import mountpoint as places
from tests.cli.conftest import PASSPHRASE, Machine
from tests.fuse.conftest import wait_until


def environments(machine: Machine) -> dict[int, bytes]:
    """What the kernel shows of the environments of all processes of a machine, by process id."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                shown = (entry / "environ").read_bytes()
            except OSError:
                continue
            if f"CLOUDFS_STATE_DIR={machine.home}/".encode() in shown:
                found[int(entry.name)] = shown
    return found


def is_mounted(directory: Path) -> bool:
    return str(directory) in {mounted.mountpoint for mounted in places.mounts()}


@pytest.mark.parametrize("options", [[], ["--foreground"]])
def test_no_passphrase_in_the_process_of_a_mount(
    home: Machine, tmp_path: Path, options: list[str]
) -> None:
    home.run("sync")
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    with home.start("mount", "home", mnt, *options) as process:
        try:
            wait_until(lambda: is_mounted(mnt), 60)
            if not options:
                assert process.wait(60) == 0
            assert (mnt / "latest" / "a file").read_text() == "x"
            found = environments(home)
            assert found
            for shown in found.values():
                assert PASSPHRASE.encode() not in shown
        finally:
            home.run("umount", mnt)


def test_programs_get_no_secret(home: Machine, tmp_path: Path) -> None:
    script = tmp_path / "say"
    script.write_text(f"#!/bin/sh\nenv > {tmp_path}/environment\necho {PASSPHRASE}\n")
    script.chmod(0o755)
    home.variables = {"CLOUDFS_PASSPHRASE": "", "CLOUDFS_PASSPHRASE_COMMAND": str(script)}
    home.run("snapshots")
    assert "CLOUDFS_STATE_DIR" in (tmp_path / "environment").read_text()
    assert "CLOUDFS_PASSPHRASE" not in (tmp_path / "environment").read_text()


def test_workers_have_no_passphrase(home: Machine, tree: Path) -> None:
    """A sync with worker processes, stopped while they run."""
    for number in range(3000):
        (tree / f"{number}").write_bytes(os.urandom(20_000))
    with home.start("sync", "--workers", "2", start_new_session=True) as process:
        try:
            wait_until(lambda: len(environments(home)) >= 3, 60)
            for shown in environments(home).values():
                assert PASSPHRASE.encode() not in shown
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_only_secrets_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", "_FILE", "_COMMAND"):
        monkeypatch.setenv(f"CLOUDFS_PASSPHRASE{name}", "x")
    before = dict(os.environ)
    forget_secrets()
    left = {k: v for k, v in before.items() if not k.startswith("CLOUDFS_PASSPHRASE")}
    assert dict(os.environ) == left
