"""The live mount through the program: mounting, syncing, ``.snapshot``, status, what goes wrong."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudfs.fuse.mountpoint import Health, mounts
from tests.cli.conftest import Machine
from tests.fuse.compare import assert_same


@pytest.fixture
def live(machine: Machine, tree: Path, repo: str) -> Iterator[Machine]:
    """A machine whose tree is mounted live over itself, and synced once."""
    said = machine.run(
        "policy", "create", "home", "--source", tree, "--repo", repo, "--snapshot", "live"
    ).out
    assert "cloudfs mount --live home" in said
    machine.run("mount", "--live", "home")
    machine.run("sync", "home")
    yield machine
    while any(m.mountpoint == str(tree) for m in mounts()):
        machine.run("umount", tree, "--lazy")


def process_of(machine: Machine, tree: Path) -> int:
    """The process behind the mount: the one whose job lock is beside the socket."""
    place = machine.home / "state" / "live" / "home" / "lock"
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(entry) == str(place):
                return int(entry.parts[2])
        except OSError:
            continue
    raise AssertionError("no process holds the mount")


def synced(machine: Machine) -> dict[str, object]:
    """Sync, and return what it says of itself."""
    done = machine.run("sync", "home", "--json")
    assert "scanned" not in done.err
    return done.objects[-1]


def test_a_sync_goes_by_the_marks(live: Machine, tree: Path) -> None:
    (tree / "docs" / "plan.txt").write_text("another plan\n")
    (tree / "new").write_text("new")
    (tree / "a file").rename(tree / "docs" / "moved")
    summary = synced(live)
    assert summary["source"] == "live"
    assert summary["consistent"]
    counts = [summary[f"items_{what}"] for what in ("new", "moved", "deleted")]
    assert counts == [1, 1, 0]
    assert live.run("cat", "home:/docs/plan.txt").out == "another plan\n"
    live.run("restore", "home", "--target", live.home / "restored")
    live.run("umount", tree)
    assert_same(tree, live.home / "restored")


def test_nothing_changed(live: Machine) -> None:
    assert "is unchanged since snapshot 1" in live.run("sync", "home").out


def test_only_changed_blocks_are_read(live: Machine, tree: Path) -> None:
    with (tree / "disk").open("wb") as file:
        for _ in range(64):
            file.write(os.urandom(1 << 20))
    synced(live)
    with (tree / "disk").open("r+b") as file:
        file.seek(40 << 20)
        file.write(b"changed")
    summary = synced(live)
    assert isinstance(summary["bytes_read"], int)
    assert summary["bytes_read"] <= 2 * 128 * 1024


def test_mistakes_are_undone_by_copying_within_the_mount(live: Machine, tree: Path) -> None:
    plan = tree / "docs" / "plan.txt"
    before = plan.read_text()
    (tree / "docs").rename(tree / "papers")
    synced(live)
    plan = tree / "papers" / "plan.txt"
    plan.write_text("spoilt")
    backups = tree / "papers" / ".snapshot"
    assert ".snapshot" not in os.listdir(tree / "papers")
    assert ".snapshot" in os.listdir(tree)
    names = sorted(os.listdir(backups))
    assert names[-1] == "latest"
    assert len(names) == 3, "the directory has another name in the older snapshot"
    assert os.readlink(backups / "latest") == names[-2]
    for name in names:
        assert (backups / name / "plan.txt").read_text() == before
    shutil.copy2(backups / "latest" / "plan.txt", plan)
    assert plan.read_text() == before
    with pytest.raises(OSError, match="Read-only"):
        (backups / "latest" / "plan.txt").write_text("x")
    with pytest.raises(OSError, match=r"Read-only|not permitted|denied"):
        (backups / "another").mkdir()
    assert not (tree / "papers" / ".snapshot" / "never").exists()


@pytest.fixture
def shared(machine: Machine, repo: str) -> Iterator[Path]:
    """A tree that all users may enter, mounted live and synced: in it one user's own directory, and
    a program that is setuid."""
    top = Path(tempfile.mkdtemp(prefix="cloudfs-shared-", dir="/dev/shm"))
    docs = top / "share" / "first" / "docs"
    docs.mkdir(parents=True)
    (docs / "plan").write_text("secret")
    (top / "program").write_text("")
    (top / "program").chmod(0o4755)
    os.setxattr(top / "program", "security.capability", CAPABILITY)
    for path, mode in ((top, 0o755), (top / "share", 0o1777), (docs.parent, 0o700), (docs, 0o755)):
        path.chmod(mode)
    os.chown(docs.parent, *[FIRST] * 2)
    machine.run("policy", "create", "home", "--source", top, "--repo", repo, "--snapshot", "live")
    machine.run("mount", "--live", "home")
    machine.run("sync", "home")
    yield top
    machine.run("umount", top, "--lazy")
    shutil.rmtree(top)


FIRST, SECOND = 1001, 1002
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")


def listed_by(user: int, place: Path) -> list[str] | None:
    """What a user sees in a directory; None where he may not."""
    done = subprocess.run(
        ["ls", f"{place}/"], user=user, group=user, extra_groups=[], capture_output=True, text=True,
        check=False, cwd="/",
    )  # fmt: skip
    return done.stdout.split() if done.returncode == 0 else None


def test_backups_are_shown_to_whom_could_have_walked_there(shared: Path) -> None:
    """Not to somebody who made directories of these names since."""
    docs = shared / "share" / "first" / "docs"
    assert listed_by(FIRST, docs / ".snapshot/latest") == ["plan"]
    assert listed_by(SECOND, docs / ".snapshot/latest") is None
    docs.parent.rename(shared / "share" / "old")
    docs.mkdir(parents=True)
    docs.parent.chmod(0o755)
    assert listed_by(0, docs / ".snapshot/latest") == ["plan"]
    assert listed_by(FIRST, docs / ".snapshot/latest") == ["plan"]
    assert listed_by(SECOND, docs / ".snapshot") == []
    assert listed_by(SECOND, docs / ".snapshot/latest") is None
    assert len(listed_by(SECOND, shared / "share" / ".snapshot") or ()) == 2


def test_backups_give_no_rights(shared: Path) -> None:
    program = shared / ".snapshot" / "latest" / "program"
    assert program.stat().st_mode == stat.S_IFREG | 0o755
    with pytest.raises(OSError, match="No data"):
        os.getxattr(program, "security.capability")
    assert (shared / "program").stat().st_mode == stat.S_IFREG | 0o4755


def test_new_directories_have_no_backups_yet(live: Machine, tree: Path) -> None:
    (tree / "fresh").mkdir()
    assert os.listdir(tree / "fresh" / ".snapshot") == []
    synced(live)
    assert len(os.listdir(tree / "fresh" / ".snapshot")) == 2


def test_an_own_item_of_that_name_is_shown_instead(live: Machine, tree: Path) -> None:
    with pytest.raises(IsADirectoryError):
        (tree / "docs" / ".snapshot").write_text("mine")
    live.run("umount", tree)
    (tree / "docs" / ".snapshot").write_text("mine")
    live.run("mount", "--live", "home")
    assert (tree / "docs" / ".snapshot").read_text() == "mine"
    live.run("sync", "home")
    assert live.run("cat", "home:/docs/.snapshot").out == "mine"


def test_status(live: Machine, tree: Path) -> None:
    changes, source = live.source_state()
    assert (changes, source) == ("0 items", "live, complete")
    (tree / "new").write_text("new")
    changes, source = live.source_state()
    assert changes != "0 items"
    assert f"{tree} (live)" in live.run("status").out
    live.run("umount", tree)
    assert live.source_state()[1] == "live, next sync scans: it is not mounted live"


def test_without_the_mount_a_sync_scans_and_says_so(live: Machine, tree: Path) -> None:
    live.run("umount", tree)
    (tree / "new").write_text("new")
    done = live.run("sync", "home")
    assert "the tree is scanned as it changes: it is not mounted live" in done.err
    assert "1 new" in done.out
    live.run("mount", "--live", "home")
    done = live.run("sync", "home")
    assert "could be changed while it was not mounted live" in done.err
    (tree / "newer").write_text("newer")
    assert synced(live)["source"] == "live"


def test_a_mount_that_was_killed_is_replaced_and_its_marks_are_good(
    live: Machine, tree: Path
) -> None:
    (tree / "before").write_text("before")
    os.kill(process_of(live, tree), signal.SIGKILL)
    while any(m.mountpoint == str(tree) and m.health() is Health.ALIVE for m in mounts()):
        time.sleep(0.05)
    done = live.run("status", code=1)
    assert "its process is gone" in done.out
    assert "`cloudfs mount --live home` puts another in its place" in done.err
    assert "is gone. `cloudfs mount --live home`" in live.fails(1, "sync", "home")
    live.run("mount", "--live", "home")
    assert (tree / "before").read_text() == "before"
    (tree / "after").write_text("after")
    summary = synced(live)
    assert (summary["source"], summary["items_new"]) == ("live", 2)


def test_continuous(live: Machine, tree: Path) -> None:
    live.run("policy", "set", "home", "--sync-on", "write")
    with live.start("sync", "home", "--continuous", stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert "is unchanged" in process.stdout.readline()
        (tree / "one").write_text("1")
        assert "Snapshot 2 of home" in process.stdout.readline()
        (tree / "two").write_text("2")
        assert "Snapshot 3 of home" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130


def test_continuous_wants_a_live_mount(machine: Machine, tree: Path, repo: str) -> None:
    machine.run("policy", "create", "home", "--source", tree, "--repo", repo)
    assert "use --every, or a live mount" in machine.fails(2, "sync", "home", "--continuous")
    both = ("--continuous", "--every", "15m")
    assert "exclude each other" in machine.fails(2, "sync", "home", *both)


def test_what_cannot_be_mounted(machine: Machine, tree: Path, repo: str, tmp_path: Path) -> None:
    machine.run("policy", "create", "home", "--source", tree, "--repo", repo)
    said = machine.fails(2, "mount", "--live", "home")
    assert "`cloudfs policy set home --snapshot live`" in said
    machine.run("policy", "set", "home", "--snapshot", "live")
    (tree / "docs" / "empty").mkdir()
    assert "is within" in machine.fails(2, "mount", "--live", "home", tree / "docs" / "empty")
    inside = Machine(machine.home, {"CLOUDFS_CACHE_DIR": str(tree / "cache")})
    said = inside.fails(2, "mount", "--live", "home")
    assert "set CLOUDFS_CACHE_DIR to a place outside of it" in said
    (tmp_path / "other").mkdir()
    more = ("--source", tree, "--source", tmp_path / "other")
    said = machine.fails(1, "policy", "create", "two", *more, "--repo", repo, "--snapshot", "live")
    assert "make a policy for each" in said


def test_it_is_mounted_once(live: Machine, tree: Path, tmp_path: Path) -> None:
    assert "is mounted live already" in live.fails(2, "mount", "--live", "home")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert "is mounted live already" in live.fails(2, "mount", "--live", "home", elsewhere)


def test_elsewhere(machine: Machine, tree: Path, repo: str, tmp_path: Path) -> None:
    """With a directory of its own the mount leaves the source where it is."""
    machine.run("policy", "create", "home", "--source", tree, "--repo", repo, "--snapshot", "live")
    place = tmp_path / "elsewhere"
    place.mkdir()
    said = machine.run("mount", "--live", "home", place).out
    assert f"at {place}" in said
    machine.run("sync", "home")
    (place / "new").write_text("new")
    assert (tree / "new").read_text() == "new"
    assert synced(machine)["items_new"] == 1
    machine.run("umount", place)
    assert (tree / "new").exists()


def test_json(machine: Machine, tree: Path, repo: str) -> None:
    machine.run("policy", "create", "home", "--source", tree, "--repo", repo, "--snapshot", "live")
    (said,) = machine.run("mount", "--live", "home", "--json").objects
    assert said == {"mountpoint": str(tree), "source": str(tree), "policies": ["home"]}
    machine.run("umount", tree)


def test_the_tree_is_there_without_the_repository(
    machine: Machine, tree: Path, repo: str, tmp_path: Path
) -> None:
    machine.run("policy", "create", "home", "--source", tree, "--repo", repo, "--snapshot", "live")
    (tmp_path / "repo").rename(tmp_path / "away")
    done = machine.run("mount", "--live", "home")
    assert ".snapshot is not shown" in done.err
    (tree / "new").write_text("new")
    assert ".snapshot" not in os.listdir(tree)
    (tmp_path / "away").rename(tmp_path / "repo")
    machine.run("sync", "home")
    machine.run("umount", tree)


def test_a_policy_is_not_removed_while_its_tree_is_mounted(live: Machine, tree: Path) -> None:
    unmount_first = f"home is mounted live at {tree}; `cloudfs umount {tree}` first."
    assert live.fails(2, "policy", "remove", "home", "--yes") == unmount_first
    for change in (("--snapshot", "btrfs"), ("--snapshot", "scan"), ("--source", tree.parent)):
        assert live.fails(2, "policy", "set", "home", *change) == unmount_first
    live.run("policy", "set", "home", "--compression", "zstd:4", "--snapshot", "live")
    live.run("umount", tree)
    live.run("policy", "set", "home", "--snapshot", "scan")
    live.run("policy", "remove", "home", "--yes")
