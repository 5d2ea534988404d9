"""``cloudfs sync`` and ``cloudfs snapshots``."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import time
from pathlib import Path

from tests.cli.conftest import Machine


def test_the_first_three_syncs(home: Machine, tree: Path) -> None:
    lines = home.run("sync", "home").out.splitlines()
    assert re.fullmatch(r"Snapshot 1 of home, \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", lines[0])
    assert "2 files, " in lines[1]
    assert "1 symlink" in lines[1]
    assert re.search(r"\d+ requests · \d+\.\d s", lines[2])
    assert lines[3] == "Browse: cloudfs mount home DIR"
    (line,) = home.run("sync").out.splitlines()
    assert line.startswith("home is unchanged since snapshot 1 (")
    (tree / "docs" / "plan.txt").write_text("other")
    (tree / "new").write_text("new")
    (tree / "a file").unlink()
    (line,) = home.run("sync", "home").out.splitlines()
    assert line.startswith("Snapshot 2 of home: 1 new, ")
    assert "1 deleted · " in line


def test_a_dry_run_stores_nothing(home: Machine, tree: Path) -> None:
    home.run("sync")
    (tree / "new").write_text("new")
    (line,) = home.run("sync", "--dry-run").out.splitlines()
    assert line.startswith("Dry run of home: 1 new")
    assert len(home.run("snapshots", "--json").objects) == 1
    assert "Snapshot 2 of home: 1 new" in home.run("sync").out


def test_json(home: Machine) -> None:
    done = home.run("sync", "--json", "--tag", "a", "--tag", "b", "--tag", "a")
    summary = done.objects[-1]
    assert summary["message_type"] == "summary"
    assert summary["snapshot"] == 1
    assert summary["total_files_processed"] == 2
    assert summary["requests"] > 0
    assert done.err == ""
    (found,) = home.run("snapshots", "home", "--json").objects
    assert (found["number"], found["policy"], found["tags"]) == (1, "home", ["a", "b"])
    assert found["time"] == summary["time"]
    assert found["statistics"]["files"] == 2
    assert home.run("sync", "--json").objects[-1]["snapshot"] is None


def test_quiet(home: Machine) -> None:
    assert home.run("sync", "--quiet").out == ""
    assert home.run("-q", "sync", "--force").out == ""


def test_snapshots_as_a_table(home: Machine) -> None:
    assert (
        home.run("snapshots").out == "home has no snapshots yet; `cloudfs sync home` makes one.\n"
    )
    home.run("sync", "--tag", "x")
    title, line = home.run("snapshots").out.splitlines()
    assert title.split() == ["no", "taken", "changed", "stored", "tags", "source"]
    assert re.fullmatch(r" 1  \d{4}-\d\d-\d\d [\d:]{8} +5  +[\d.]+ K?B  x     scan", line)


def test_local_time_and_utc(home: Machine) -> None:
    home.run("sync")
    (utc,) = home.run("snapshots", "--json", "--utc").objects
    home.variables["TZ"] = "Asia/Kolkata"
    (local,) = home.run("snapshots", "--json").objects
    assert utc["time"].endswith("+00:00")
    assert local["time"].endswith("+05:30")


def test_what_cannot_be_read_is_listed_and_the_code_is_3(machine: Machine, repo: str) -> None:
    # Write-only attributes of the kernel: not even root can read them.
    source, probe = "/sys/bus/platform", "drivers_probe"
    excludes = ["--exclude", "/devices", "--exclude", "/drivers", "--exclude", "/drivers_autoprobe"]
    machine.run("policy", "create", "p", "--source", source, "--repo", repo, *excludes)
    done = machine.run("sync", code=3)
    assert "Snapshot 1 of p" in done.out
    assert "could not be read (exit 3):" in done.err
    assert re.search(rf"^    {probe}: \S", done.err, re.MULTILINE)
    found = machine.run("sync", "--json", "--force", code=3).objects
    errors = [o for o in found if o["message_type"] == "error"]
    assert probe in {error["item"] for error in errors}
    assert found[-1]["unreadable"] == len(errors)


def test_two_policies_in_one_repository(
    home: Machine, other_machine: Machine, tree: Path, repo: str
) -> None:
    home.run("policy", "create", "docs", "--source", tree / "docs", "--repo", repo)
    assert "there are several policies; name one of docs, home." in home.fails(2, "sync")
    home.run("sync", "home")
    home.run("sync", "docs")
    home.run("sync", "docs", "--force")
    found = other_machine.run("snapshots", repo, "--json").objects
    assert [(o["policy"], o["number"]) for o in found] == [("docs", 1), ("docs", 2), ("home", 1)]
    found = other_machine.run("snapshots", f"{repo}#home", "--json").objects
    assert [o["policy"] for o in found] == ["home"]
    lines = other_machine.run("snapshots", "--repo", repo).out.splitlines()
    assert (lines[0], lines[4], lines[5]) == ("docs", "", "home")
    other_machine.variables["CLOUDFS_REPO"] = repo
    assert len(other_machine.run("snapshots", "docs", "--json").objects) == 2
    assert "holds no policy called x; it holds docs, home" in other_machine.fails(
        10, "snapshots", f"{repo}#x"
    )


def test_the_environment_goes_before_the_policy_and_the_command_line_before_both(
    home: Machine, tmp_path: Path, tree: Path
) -> None:
    for name in ("second", "third"):
        home.run("policy", "create", name, "--source", tree, "--repo", tmp_path / name)
    home.run("sync", "home")
    home.variables["CLOUDFS_REPO"] = str(tmp_path / "second")
    assert "Snapshot 1 of home" in home.run("sync", "home").out
    third = ("--repo", str(tmp_path / "third"))
    assert "Snapshot 1 of home" in home.run("sync", "home", *third).out
    found = home.run("snapshots", *third, "--json").objects
    assert [o["policy"] for o in found] == ["home"]


def test_another_sync_holds_the_policy(home: Machine) -> None:
    home.run("sync")
    (lock,) = (home.home / "state").glob("policies/*/lock")
    with lock.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        sentence = home.fails(11, "sync")
        assert "is being synced by this machine" in sentence
        assert "`cloudfs sync home --wait`" in sentence
        assert "sync running" in home.run("status").out
        with home.start("sync", "--wait", "--force") as waiting:
            time.sleep(1)
            assert waiting.poll() is None
            fcntl.flock(file, fcntl.LOCK_UN)
            out, _ = waiting.communicate(timeout=60)
    assert (waiting.returncode, out.startswith("Snapshot 2 of home")) == (0, True)
    assert "sync running" not in home.run("status").out


def test_again_and_again(home: Machine, tree: Path) -> None:
    assert "--every must be" in home.fails(2, "sync", "--every", "0.1s")
    with home.start("sync", "--every", "1s", stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Snapshot 1 of home")
        kept = tree.rename(tree.with_name("away"))
        assert process.stderr is not None
        assert "does not exist. Is its drive mounted?" in process.stderr.readline()
        kept.rename(tree)
        (tree / "new").write_text("new")
        line = ""
        while not line.startswith("Snapshot 2 of home"):
            line = process.stdout.readline()
            assert line
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130


def test_a_repository_that_is_away_is_tried_again(home: Machine, tmp_path: Path) -> None:
    place = tmp_path / "repo"
    away = place.rename(tmp_path / "away")
    assert "no repository at" in home.fails(10, "sync", "--every", "1s"), "it was never synced"
    away.rename(place)
    home.run("sync")
    place.rename(away)
    with home.start("sync", "--every", "1s", "--force") as process:
        assert process.stderr is not None
        assert process.stdout is not None
        assert "Is the drive mounted?" in process.stderr.readline()
        away.rename(place)
        line = ""
        while not line.startswith("Snapshot 2 of home"):
            line = process.stdout.readline()
            assert line
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130


def _large_tree(tree: Path) -> None:
    """More than two workers are given at once, so that something is left to be stopped."""
    data = os.urandom(8 << 20)
    for index in range(6):
        (tree / f"large{index}").write_bytes(data * 8)


def test_interrupted_once_it_stops_cleanly_and_the_next_sync_completes(
    home: Machine, tree: Path
) -> None:
    _large_tree(tree)
    with home.start("sync", "--json", "--workers", "2", "--upload-limit", "60 MB") as process:
        assert process.stdout is not None
        while '"packing"' not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    first, second = err.splitlines()
    assert first == "cloudfs: stopping; what was stored is kept. Ctrl-C again to stop at once."
    assert second.startswith("cloudfs: stopped. Snapshot 1 was not made")
    assert '"summary"' not in out
    assert home.run("snapshots", "--json").out == ""
    assert "Snapshot 1 of home" in home.run("sync").out


def test_interrupted_twice_it_stops_at_once(home: Machine, tree: Path) -> None:
    _large_tree(tree)
    with home.start("sync", "--json", "--upload-limit", "1 MB") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while '"status"' not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert "stopping" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "Snapshot 1 of home" in home.run("sync").out


def test_a_sync_needs_a_policy_of_this_machine(
    other_machine: Machine, home: Machine, repo: str
) -> None:
    assert "needs a policy on this machine" in other_machine.fails(2, "sync", repo)
