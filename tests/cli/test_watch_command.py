"""``cloudfs watch`` and the syncs that go by it, through the program, on a real file system."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import PROGRAM, Machine
from tests.engine import loops
from tests.engine.btrfs import run
from tests.fuse.compare import assert_same


@pytest.fixture(scope="module", params=["ext4", "xfs"])
def local_volume(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of each kind."""
    base = Path(tempfile.mkdtemp(prefix="cloudfs-watch-", dir="/dev/shm"))
    with loops.file_system(base, request.param) as place:
        yield place
    shutil.rmtree(base)


@pytest.fixture
def tree(local_volume: Path) -> Path:
    """A few files."""
    tree = local_volume / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    (tree / "docs").mkdir(parents=True)
    (tree / "docs" / "plan").write_bytes(os.urandom(3_000_000))
    for number in range(100):
        (tree / "docs" / f"{number}").write_text(f"{number}" * 100)
    return tree


@pytest.fixture
def watched(machine: Machine, tree: Path, repo: str) -> Iterator[Machine]:
    """A machine that synced the tree, watches it, and synced it again."""
    said = machine.run(
        "policy", "create", "home", "--source", tree, "--repo", repo, "--snapshot", "watch"
    ).out
    assert "cloudfs watch home" in said
    machine.run("sync", "home")
    machine.run("watch", "home")
    machine.run("sync", "home")
    yield machine
    machine.run("watch", "home", "--stop")


def process_of(machine: Machine) -> int:
    return int(machine.run("watch", "home", "--json").objects[0]["pid"])


def test_a_day_of_use(watched: Machine, tree: Path) -> None:
    (tree / "docs" / "plan").rename(tree / "plan")
    with (tree / "plan").open("r+b") as file:
        file.seek(1_500_000)
        file.write(b"changed")
    shutil.rmtree(tree / "docs")
    (tree / "new").mkdir()
    (tree / "new" / "file").write_text("new")
    done = watched.run("sync", "home", "--json")
    assert done.err == ""
    assert done.objects[-1]["source"] == "watch"
    assert done.objects[-1]["consistent"] is False
    out = tree.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    watched.run("restore", "home", "--target", out)
    assert_same(tree, out)
    assert "unchanged" in watched.run("sync", "home").out
    assert "watch" in watched.run("snapshots", "home").out


def test_starting_twice_and_stopping_twice(watched: Machine) -> None:
    process = process_of(watched)
    again = watched.run("watch", "home")
    assert again.out.startswith(f"home is watched already, by process {process}: ")
    assert watched.run("watch", "--stop").out == ""
    gone(process)
    assert watched.run("watch", "--stop").err == "home is not watched.\n"
    assert "Start one: cloudfs watch home" in watched.run("sync", "home").err


def gone(process: int) -> None:
    """Wait until a process has ended."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            os.kill(process, 0)
            time.sleep(0.02)
            continue
        return
    raise AssertionError("the daemon did not end")


def test_how_it_stands(watched: Machine, tree: Path) -> None:
    assert watched.source_state() == ("0 names", "watch, complete")
    for number in range(5):
        (tree / "docs" / f"{number}").write_text("changed")
    assert watched.source_state() == ("5 names", "watch, complete")
    found = watched.run("status", "--json").objects[0]
    assert (found["source"], found["source_complete"], found["source_reason"]) == (
        "watch", True, None
    )  # fmt: skip
    assert (found["changes_since"], found["changes_unit"]) == (5, "name")
    watched.run("policy", "set", "home", "--exclude", "*.tmp")
    assert watched.source_state()[1] == (
        "watch, next sync scans: the policy's sources or filters are others"
    )
    watched.run("sync", "home")
    assert watched.source_state() == ("0 names", "watch, complete")
    os.kill(process_of(watched), signal.SIGKILL)
    assert watched.source_state() == (
        "not known (scan)", "watch, next sync scans: no daemon watches it"
    )  # fmt: skip
    found = watched.run("status", "--json").objects[0]
    assert (found["source_complete"], found["changes_since"]) == (False, None)
    assert found["source_reason"] == "no daemon watches it"
    watched.run("watch", "home")
    assert "has listened only since after the last snapshot" in watched.source_state()[1]
    watched.run("sync", "home")
    assert watched.source_state() == ("0 names", "watch, complete")


def test_how_it_stands_with_a_tree_that_is_gone(watched: Machine, tree: Path) -> None:
    tree.rename(tree.with_name("aside"))
    done = watched.run("status", code=1)
    assert "does not exist. Is its drive mounted?" in done.err
    assert "  1, " in done.out
    tree.with_name("aside").rename(tree)
    assert watched.source_state() == ("2 names", "watch, complete")  # heard of beside the tree


def test_a_file_system_that_got_another_id(machine: Machine, repo: str, tmp_path: Path) -> None:
    """Events go on naming it by the old one."""
    with loops.file_system(tmp_path, "ext4", 64 << 20, "-O", "metadata_csum_seed") as volume:
        tree = volume / "tree"
        tree.mkdir()
        create = ("policy", "create", "home", "--source", tree, "--repo", repo)
        machine.run(*create, "--snapshot", "watch")
        machine.run("watch", "home")
        machine.run("sync", "home")
        device = subprocess.check_output(["findmnt", "-no", "SOURCE", volume], text=True).strip()
        run("tune2fs", "-U", "random", device)
        (tree / "file").write_text("named by the old one")
        assert "(given another id since the daemon started?)" in machine.source_state()[1]
        done = machine.run("sync", "home")
        assert "1 new" in done.out
        assert done.err.endswith("since the daemon started?). Start it anew: cloudfs watch home\n")
        machine.run("watch", "home")
        machine.run("sync", "home")
        (tree / "file").write_text("named by the new one")
        done = machine.run("sync", "home")
        assert "1 changed" in done.out
        assert done.err == ""
        machine.run("watch", "home", "--stop")


def test_what_was_heard_is_removed(watched: Machine, tree: Path) -> None:
    shutil.rmtree(watched.home / "state" / "watch" / "home" / "events")
    assert "Start it anew: cloudfs watch home" in watched.run("sync", "home").err
    assert "is watched now" in watched.run("watch", "home").out
    watched.run("sync", "home")
    (tree / "new").write_text("heard")
    done = watched.run("sync", "home")
    assert "1 new" in done.out
    assert done.err == ""


def test_in_the_foreground(machine: Machine, tree: Path, repo: str) -> None:
    create = ("policy", "create", "home", "--source", tree, "--repo", repo, "--snapshot", "watch")
    machine.run(*create)
    process = machine.start("watch", "home", "--foreground", "--json", stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert f'"pid":{process.pid}' in process.stdout.readline()
    machine.run("sync", "home")
    (tree / "more").write_text("more")
    assert machine.run("sync", "home", "--json").objects[-1]["source"] == "watch"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "", "")
    assert "is scanned: no daemon" in machine.run("sync", "home").err


def test_a_policy_that_goes_by_something_else(machine: Machine, tree: Path, repo: str) -> None:
    machine.run("policy", "create", "home", "--source", tree, "--repo", repo)
    refused = machine.run("watch", "home", code=2)
    assert "`cloudfs policy set home --snapshot watch`" in refused.err
    assert machine.run("watch", "nobody", code=2).err


def test_a_tree_that_cannot_be_watched(machine: Machine, repo: str) -> None:
    create = ("policy", "create", "odd", "--source", "/proc/self/task", "--repo", repo)
    machine.run(*create, "--snapshot", "watch")
    said = machine.fails(1, "watch", "odd")
    assert "keeps no times of birth" in said
    assert said.endswith(" Use another change source: `cloudfs policy set odd --snapshot scan`.")


@pytest.mark.parametrize("kind", ["proc", "ramfs"])
def test_a_file_system_within_that_cannot_be_watched(
    machine: Machine, tree: Path, repo: str, kind: str
) -> None:
    create = ("policy", "create", "odd", "--source", tree, "--repo", repo)
    machine.run(*create, "--snapshot", "watch")
    run("mount", "-t", kind, kind, tree / "docs")
    try:
        said = machine.fails(1, "watch", "odd")
        assert f"{tree}/docs is on a file system that keeps no times of birth" in said
        assert "Leave it out (--exclude, --one-file-system)" in said
        assert "`cloudfs policy set odd --snapshot scan`" in said
        machine.run("policy", "set", "odd", "--exclude", "/docs/")
        machine.run("watch", "odd")
        machine.run("watch", "odd", "--stop")
    finally:
        run("umount", tree / "docs")


def test_whoever_is_not_root_is_told(machine: Machine, tree: Path, repo: str) -> None:
    create = ("policy", "create", "home", "--source", tree, "--repo", repo, "--snapshot", "watch")
    machine.run(*create)
    refused = subprocess.run(
        ["setpriv", "--inh-caps=-all", "--bounding-set=-all", str(PROGRAM), "watch", "home"],
        env=machine.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 1
    assert "It takes root and Linux 5.17" in refused.stderr


def test_another_file_system_is_watched_by_a_daemon_anew(
    watched: Machine, tree: Path, tmp_path: Path
) -> None:
    first = process_of(watched)
    more = tmp_path / "more"
    more.mkdir()
    watched.run("policy", "set", "home", "--source", tree, "--source", more)
    assert process_of(watched) != first
    gone(first)


def test_another_file_system_is_watched_by_a_service_anew(
    watched: Machine, tree: Path, tmp_path: Path
) -> None:
    """It waits for the end of the daemon whose place it takes."""
    first = process_of(watched)
    more = tmp_path / "more"
    more.mkdir()
    watched.run("policy", "set", "home", "--source", tree, "--source", more)
    process = watched.start("watch", "home", "--foreground", "--json")
    assert process.stdout is not None
    assert f'"pid":{process.pid}' in process.stdout.readline()
    gone(first)
    watched.run("watch", "home", "--stop")
    assert process.wait(timeout=30) == 0


@pytest.mark.parametrize(
    "way", [("remove", "home", "--yes"), ("set", "home", "--snapshot", "scan")]
)
def test_a_policy_that_needs_no_daemon_any_more_ends_it(
    watched: Machine, way: tuple[str, ...]
) -> None:
    daemon = process_of(watched)
    watched.run("policy", *way)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{daemon}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
