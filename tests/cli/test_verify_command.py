"""``cloudfs sync --verify-source``, on a disk whose blocks are changed behind the file system."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Machine
from tests.engine import btrfs
from tests.fuse.compare import assert_same

MARK = os.urandom(4096)


class Disk:
    """An ext4 in an image, which can be changed while it is not mounted."""

    def __init__(self, base: Path) -> None:
        self.image, self.place = base / "ext4.img", base / "ext4"
        self.place.mkdir()
        with self.image.open("wb") as file:
            file.truncate(64 << 20)
        btrfs.run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0", self.image)
        self.mount()

    def mount(self) -> None:
        btrfs.run("mount", "-o", "loop", self.image, self.place)

    def unmount(self) -> None:
        btrfs.run("umount", self.place)

    def rot(self) -> None:
        """Let one byte of MARK, wherever it lies, become another one."""
        self.unmount()
        data = self.image.read_bytes()
        assert data.count(MARK) == 1
        with self.image.open("r+b") as file:
            file.seek(data.index(MARK) + 17)
            file.write(bytes([MARK[17] ^ 1]))
        self.mount()


@pytest.fixture
def disk() -> Iterator[Disk]:
    """A disk with a few files."""
    base = Path(tempfile.mkdtemp(prefix="cloudfs-ext4-", dir="/dev/shm"))
    disk = Disk(base)
    tree = disk.place / "tree"
    (tree / "docs").mkdir(parents=True)
    for number in range(20):
        (tree / "docs" / f"{number}").write_text(f"{number}" * 100)
    (tree / "docs" / "marked").write_bytes(bytes(8192) + MARK)
    os.utime(tree / "docs" / "marked", ns=(10**18, 10**18))
    yield disk
    disk.unmount()
    shutil.rmtree(base)


@pytest.fixture
def synced(machine: Machine, disk: Disk, repo: str) -> Machine:
    """A machine that knows the disk, and doubts no time stamp any more."""
    source = disk.place / "tree"
    machine.run("policy", "create", "p", "--source", source, "--repo", repo)
    machine.run("sync", "p")
    machine.run("sync", "p")
    return machine


def test_nothing_differs(synced: Machine) -> None:
    done = synced.run("sync", "p", "--verify-source", "100%")
    assert done.err == ""
    assert "unchanged since snapshot 1" in done.out
    assert "  21 files verified (15 KB), none differ" in done.out
    summary = synced.run("sync", "p", "--verify-source", "0.5", "--json").objects[-1]
    assert summary["verified"]["differences"] == 0
    assert "verified" not in synced.run("sync", "p", "--json").objects[-1]


def test_what_rotted_is_found_and_backed_up(synced: Machine, disk: Disk, tmp_path: Path) -> None:
    disk.rot()
    assert "unchanged" in synced.run("sync", "p").out  # lstat says so
    done = synced.run("sync", "p", "--dry-run", "--verify-source", "100", "--json", code=1)
    summary = done.objects[-1]
    assert summary["verified"] == {
        "files": 21,
        "bytes": summary["verified"]["bytes"],
        "directories": 0,
        "differences": 1,
    }
    (error,) = [o for o in done.objects if o["message_type"] == "error"]
    assert (error["item"], error["during"]) == ("docs/marked", "verification")
    assert len(synced.run("snapshots", "p", "--json").objects) == 1
    done = synced.run("sync", "p", "--force")
    assert "Snapshot 2" in done.out
    synced.run("restore", "p", "--target", tmp_path / "out")
    assert_same(disk.place / "tree", tmp_path / "out")  # the dry run's finding was not forgotten


def test_the_sentence_and_the_snapshot_of_the_same_command(
    synced: Machine, disk: Disk, tmp_path: Path
) -> None:
    disk.rot()
    done = synced.run("sync", "p", "--verify-source", "100%", "--quiet", code=1)
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("cloudfs: time stamps say that nothing changed in 1 item of p")
    assert "docs/marked (data)" in line
    assert "--verify-source 100%" in line
    assert len(synced.run("snapshots", "p", "--json").objects) == 2
    synced.run("restore", "p", "--target", tmp_path / "out")
    assert_same(disk.place / "tree", tmp_path / "out")
    assert "none differ" in synced.run("sync", "p", "--verify-source", "100%").out


def test_a_policy_may_say_how_much(synced: Machine, disk: Disk) -> None:
    synced.run("policy", "set", "p", "--verify-source", "100%")
    assert 'verify_source = "100%"' in synced.run("policy", "show", "p").out
    disk.rot()
    with synced.start("sync", "p", "--every", "1s", stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        assert "docs/marked (data)" in process.stderr.readline()
        lines = [process.stdout.readline() for _ in range(4)]
        process.terminate()
        process.communicate(timeout=60)
    assert "1 differ" in lines[1]
    assert "none differ" in lines[3]  # it goes on, and all is well
    assert "verified" not in synced.run("sync", "p", "--verify-source", "0%").out


@pytest.mark.parametrize("share", ["x", "", "101%", "-1%", "5 per cent", "nan"])
def test_what_is_no_share(synced: Machine, share: str) -> None:
    said = synced.run("sync", "p", "--verify-source", share, code=2).err
    assert "is no share" in said
