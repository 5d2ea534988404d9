"""A real tree and a real upgrade through the program: Debian's kernel sources 6.1 and 6.12."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests import servers
from tests.cli.conftest import Machine
from tests.fuse.compare import assert_same

pytestmark = pytest.mark.long

ITEMS = 80_000
"""Both trees have more."""


def unpack(version: str, target: Path) -> Path:
    """The tree of Debian's package of this version."""
    archive = Path(f"/usr/src/linux-source-{version}.tar.xz")
    assert archive.exists(), f"{archive} is missing: install Debian's linux-source-{version}"
    target.mkdir()
    command = ["tar", "xf", archive, "--strip-components=1", "-C", target]
    subprocess.run(command, check=True)
    return target


@pytest.fixture(params=["file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """Where the repository is, as options."""
    if request.param == "file":
        return ["--repo", f"file://{tmp_path}/repo"]
    server: servers.S3Server = request.getfixturevalue("seaweedfs")
    return ["--repo", f"s3://{server.bucket}/kernel", "--endpoint-url", server.endpoint_url]


def test_a_kernel_tree_and_its_upgrade_come_back(
    machine: Machine, other_machine: Machine, tmp_path: Path, place: list[str]
) -> None:
    live, mnt = tmp_path / "live", tmp_path / "mnt"
    old, new = unpack("6.1", tmp_path / "old"), unpack("6.12", tmp_path / "new")
    subprocess.run(["rsync", "-a", f"{old}/", f"{live}/"], check=True)
    machine.run("policy", "create", "kernel", "--source", live, *place)
    assert "Snapshot 1" in machine.run("sync", "kernel").out
    assert "unchanged" in machine.run("sync", "kernel").out
    subprocess.run(["rsync", "-a", "--delete", f"{new}/", f"{live}/"], check=True)
    assert "Snapshot 2" in machine.run("sync", "kernel").out
    mnt.mkdir()
    # On a machine that has only the place and the passphrase.
    url, options = place[1], place[2:]
    other_machine.run("mount", url, mnt, *options)
    try:
        for number, tree in ((1, old), (2, new)):
            shown = (mnt / "by-number" / str(number)).resolve()
            assert assert_same(tree, shown) > ITEMS
            if not options:  # once is enough: the view is the same over any store
                command = ["diff", "-r", "--no-dereference", tree, shown]
                assert subprocess.run(command, capture_output=True, check=True).stdout == b""
    finally:
        other_machine.run("umount", mnt)
    for number, tree in ((1, old), (2, new)):
        out = tmp_path / "out"
        machine.run("restore", f"kernel@{number}", "--target", out)
        assert assert_same(tree, out) > ITEMS
        shutil.rmtree(out)
