"""``cloudfs restore`` as it is typed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Machine, home, machine, other_machine, repo, tree
from tests.fuse.compare import assert_same
from tests.servers import S3Server

__all__ = ["home", "machine", "other_machine", "repo", "tree"]


@pytest.fixture
def synced(home: Machine) -> Machine:
    """A machine whose policy has one snapshot."""
    home.run("sync", "home")
    return home


def test_all_of_it_by_name(synced: Machine, tree: Path) -> None:
    done = synced.run("restore", "home", "--target", "out")
    assert_same(tree, synced.home / "out")
    lines = done.out.splitlines()
    assert lines[0].startswith("Restored snapshot 1 of home (")
    assert lines[0].endswith(") to out")
    assert lines[1] == "  2 files, 1 directory, 1 symlink · 5.0 KB"
    assert "fetched from 1 pack" in lines[2]


def test_a_part_of_an_older_one_by_url(
    synced: Machine, other_machine: Machine, tree: Path, repo: str
) -> None:
    (tree / "docs" / "plan.txt").write_text("another plan")
    synced.run("sync", "home")
    other_machine.run("restore", f"{repo}@1:/docs", "--target", "out")
    assert (other_machine.home / "out" / "plan.txt").read_text() == "plan\n" * 1000
    other_machine.run("restore", f"{repo}:/docs/plan.txt", "-t", "one")
    assert (other_machine.home / "one" / "plan.txt").read_text() == "another plan"


def test_dry_run_and_json(synced: Machine, tree: Path) -> None:
    done = synced.run("restore", "home", "--target", "out", "--dry-run")
    assert done.out.startswith("Dry run of snapshot 1 of home (")
    assert done.out.endswith("would come from 1 pack by 1 request. Nothing was written.\n")
    assert not (synced.home / "out").exists()
    summary = synced.run("restore", "home", "--target", "out", "--json").objects[-1]
    assert summary["message_type"] == "summary"
    assert (summary["files"], summary["directories"], summary["symlinks"]) == (2, 1, 1)
    assert summary["total_bytes"] == 5001
    assert summary["target"] == str(synced.home / "out")
    assert summary["failed"] == 0


def test_what_is_wrong_is_said(synced: Machine, tree: Path) -> None:
    (synced.home / "full").mkdir()
    (synced.home / "full" / "file").touch()
    assert "full is not empty" in synced.fails(2, "restore", "home", "--target", "full")
    assert "no snapshot 7" in synced.fails(10, "restore", "home@7", "--target", "out")
    assert "no /nowhere" in synced.fails(2, "restore", "home:/nowhere", "--target", "out")
    assert "'--target'" in synced.fails(2, "restore", "home")
    assert not (synced.home / "out").exists()


def test_damage_is_listed(synced: Machine, repo: str) -> None:
    packs = [path for path in Path(repo[7:]).rglob("*") if "pack" in str(path) and path.is_file()]
    assert len(packs) == 1
    data = bytearray(packs[0].read_bytes())
    data[20] ^= 1
    packs[0].chmod(0o600)
    packs[0].write_bytes(data)
    done = synced.run("restore", "home", "--target", "out", code=13)
    assert done.out.startswith("Restored most of snapshot 1")
    assert "items could not be restored as before (exit 13)" in done.err
    assert "docs/plan.txt: " in done.err
    assert os.readlink(synced.home / "out" / "link") == "docs/plan.txt"
    assert not (synced.home / "out" / "docs" / "plan.txt").exists()


@pytest.mark.parametrize(("files", "workers"), [(40, 1), (60, 2)])
def test_interrupted(machine: Machine, tree: Path, repo: str, files: int, workers: int) -> None:
    for number in range(files):
        (tree / f"{number}").write_bytes(os.urandom(1 << 20))
    machine.run("policy", "create", "home", "--source", tree, "--repo", repo)
    machine.run("sync", "home")
    out = machine.home / "out"
    with machine.start(
        "restore", "home", "--target", out, "--workers", str(workers), "--download-limit", "30 MB"
    ) as process:
        deadline = time.monotonic() + 60
        while not out.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "stopping; what was restored is left there." in err
    assert err.rstrip().endswith(f"items were restored and are left in {out}.")


def test_over_s3(machine: Machine, other_machine: Machine, tree: Path, seaweedfs: S3Server) -> None:
    url = f"s3://{seaweedfs.bucket}/restore"
    for number in range(3000):
        path = tree / f"{number % 30}" / f"{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(os.urandom(1000))
    at = ("--endpoint-url", seaweedfs.endpoint_url)
    machine.run("policy", "create", "home", "--source", tree, "--repo", url, *at)
    machine.run("sync", "home")
    done = other_machine.run("restore", url, *at, "--target", "out", "--workers", "2", "--json")
    assert_same(tree, other_machine.home / "out")
    assert done.objects[-1]["gets"] <= 12
