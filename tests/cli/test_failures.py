"""What goes wrong outside: one sentence and its exit code."""

from __future__ import annotations

import os
import pty
import re
import subprocess
from pathlib import Path

from tests import servers
from tests.cli.conftest import PROGRAM, Machine


def test_no_repository(home: Machine, repo: str, tmp_path: Path) -> None:
    (tmp_path / "repo").rename(tmp_path / "away")
    for command in (("sync",), ("snapshots", repo), ("key", "list")):
        sentence = home.fails(10, *command)
        assert f"no repository at {repo}. Is the drive mounted?" in sentence


def test_wrong_passphrase(home: Machine, repo: str) -> None:
    home.variables["CLOUDFS_PASSPHRASE"] = "wrong"
    for command in (("sync",), ("snapshots", repo), ("status",)):
        done = home.run(*command, code=12)
        assert f"that passphrase does not open the only key of {repo}." in done.err


def test_damaged_repository(home: Machine, tmp_path: Path) -> None:
    (tmp_path / "repo" / "cloudfs.json").write_text("{}")
    assert "is damaged" in home.fails(13, "sync")


def test_missing_source(home: Machine, tree: Path) -> None:
    tree.rename(tree.with_name("away"))
    sentence = home.fails(1, "sync")
    assert sentence == (
        f"the source {tree} of home does not exist. Is its drive mounted? Nothing was backed up."
    )


def test_a_state_directory_that_cannot_be_written(home: Machine) -> None:
    (home.home / "file").write_text("")
    home.variables["CLOUDFS_STATE_DIR"] = str(home.home / "file" / "state")
    assert "not a directory" in home.fails(1, "sync")


def test_mountpoints(home: Machine, tmp_path: Path) -> None:
    assert "does not exist" in home.fails(2, "mount", "home", tmp_path / "nowhere")
    assert "is not empty" in home.fails(2, "mount", "home", tmp_path)
    assert "no cloudfs mount at" in home.fails(2, "umount", tmp_path)


def test_mount_and_umount(home: Machine, tree: Path, tmp_path: Path, repo: str) -> None:
    home.run("sync")
    point = tmp_path / "mnt"
    point.mkdir()
    done = home.run("mount", "home", point)
    try:
        assert done.out == (
            f"home at {point}: 1 snapshot. Files are fetched as they are read."
            f" To stop: cloudfs umount {point}\n"
        )
        assert (point / "latest/docs/plan.txt").read_bytes() == (
            tree / "docs/plan.txt"
        ).read_bytes()
        (found,) = [o for o in home.run("status", "--json").objects if o["policy"]]
        assert found["mounted_at"] == [str(point)]
        assert found["last_snapshot"]["number"] == 1
        assert "mounted there already" in home.fails(2, "mount", repo, point)
    finally:
        home.run("umount", point)
    assert list(point.iterdir()) == []


def test_status(home: Machine, tree: Path, repo: str) -> None:
    title, line = home.run("status").out.splitlines()[:2]
    assert title.split("  ")[0] == "policy"
    assert "none yet" in line
    home.run("sync")
    line = home.run("status").out.splitlines()[1]
    assert re.search(r"  1, [\d.]+ s ago +not known \(scan\)  scan", line)
    home.variables["CLOUDFS_PASSPHRASE"] = ""
    done = home.run("status", code=2)
    assert "not known" in done.out
    assert "home: a passphrase is needed and there is no terminal" in done.err


# -- secrets --------------------------------------------------------------------------------------


def test_where_a_passphrase_comes_from(home: Machine, tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_text("correct horse\n")
    bad.write_text("wrong")
    assert "wrong" in bad.read_text()
    home.run("snapshots", "--passphrase-file", good)
    home.fails(12, "snapshots", "--passphrase-file", bad)
    home.variables |= {"CLOUDFS_PASSPHRASE": "", "CLOUDFS_PASSPHRASE_FILE": str(good)}
    home.run("snapshots")
    home.variables |= {
        "CLOUDFS_PASSPHRASE_FILE": "",
        "CLOUDFS_PASSPHRASE_COMMAND": "printf 'correct horse'",
    }
    home.run("snapshots")
    home.variables["CLOUDFS_PASSPHRASE_COMMAND"] = "false"
    assert "CLOUDFS_PASSPHRASE_COMMAND failed (exit code 1)" in home.fails(2, "snapshots")
    home.variables["CLOUDFS_PASSPHRASE_COMMAND"] = "/no/such/program"
    assert "cannot be run" in home.fails(2, "snapshots")
    home.variables["CLOUDFS_PASSPHRASE_COMMAND"] = ""
    assert "there is no terminal to ask for it" in home.fails(2, "snapshots")
    sentence = home.fails(2, "snapshots", "--passphrase-file", tmp_path / "none")
    assert "cannot be read (no such file or directory)" in sentence


def test_keys_come_and_go(home: Machine, tmp_path: Path) -> None:
    key_file, new = tmp_path / "key", tmp_path / "new"
    key_file.write_bytes(os.urandom(32))
    new.write_text("battery staple")
    home.run("key", "add", "home", "--new-key-file", key_file, "--label", "safe")
    first, second = home.run("key", "list", "home", "--json").objects
    assert (second["kind"], second["label"]) == ("file", "safe")
    home.run("snapshots", "--key-file", key_file)
    home.run("key", "change", "--new-passphrase-file", new)
    home.fails(12, "snapshots")
    home.run("snapshots", "--passphrase-file", new)
    home.variables["CLOUDFS_PASSPHRASE"] = "battery staple"
    assert "--yes does it" in home.fails(2, "key", "remove", "--id", second["id"])
    home.run("key", "remove", "--id", second["id"], "--yes")
    home.fails(12, "snapshots", "--key-file", key_file)
    assert "has no key" in home.fails(2, "key", "remove", "--id", first["id"], "--yes")
    (last,) = home.run("key", "list", "--json").objects
    assert "is the only key" in home.fails(2, "key", "remove", "--id", last["id"], "--yes")
    key_file.write_bytes(b"short")
    assert "at least 32" in home.fails(2, "key", "add", "--new-key-file", key_file)


def _on_a_terminal(machine: Machine, arguments: list[str], answers: list[str]) -> tuple[int, str]:
    """Run with a terminal of its own, and answer each question."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", PROGRAM, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=machine.environment,
        cwd=machine.home,
    )
    os.close(theirs)
    said = b""
    try:
        for answer in answers:
            asked = len(said)
            while b": " not in said[asked:]:
                said += os.read(ours, 1024)
            os.write(ours, answer.encode() + b"\n")
        while chunk := os.read(ours, 1024):
            said += chunk
    except OSError:
        pass  # how a terminal says that nobody holds its other side
    finally:
        os.close(ours)
    return process.wait(timeout=60), said.decode()


def test_questions_on_a_terminal(machine: Machine, tree: Path, repo: str) -> None:
    machine.variables["CLOUDFS_PASSPHRASE"] = ""
    create = ["policy", "create", "home", "--source", str(tree), "--repo", repo]
    code, said = _on_a_terminal(machine, create, ["one", "two"])
    assert (code, "The two passphrases differ" in said) == (2, True)
    code, said = _on_a_terminal(machine, create, ["one", "one"])
    assert code == 0, said
    assert "Choose a passphrase (it cannot be recovered)" in said
    assert "one" not in said
    code, said = _on_a_terminal(machine, ["snapshots", "home"], ["wrong"])
    assert (code, "does not open" in said) == (12, True)
    code, said = _on_a_terminal(machine, ["snapshots", "home"], ["one"])
    assert (code, "has no snapshots yet" in said) == (0, True)
    code, said = _on_a_terminal(machine, ["policy", "remove", "home"], ["n"])
    assert code == 130
    assert (machine.home / "config/home.toml").exists()


# -- S3 -------------------------------------------------------------------------------------------


def _s3(machine: Machine, server: servers.S3Server, key: str | None = None) -> list[str]:
    machine.variables |= servers.environment(key or server.access_key, server.secret_key)
    return ["--endpoint-url", server.endpoint_url, "--region", "us-east-1", "--retry-time", "2s"]


def test_s3(
    machine: Machine,
    other_machine: Machine,
    tree: Path,
    seaweedfs_server: servers.S3Server,
    tmp_path: Path,
) -> None:
    reach = _s3(machine, seaweedfs_server)
    _s3(other_machine, seaweedfs_server)
    url = f"s3://{seaweedfs_server.bucket}/{tmp_path.name}"
    machine.run("policy", "create", "home", "--source", tree, "--repo", url, *reach)
    assert "Snapshot 1 of home" in machine.run("sync").out
    unchanged = machine.run("sync", "--json").objects[-1]
    assert unchanged["requests"] <= 8
    (found,) = other_machine.run("snapshots", url, "--json", *reach).objects
    assert found["policy"] == "home"


def test_s3_that_forbids(machine: Machine, tree: Path, seaweedfs_server: servers.S3Server) -> None:
    reach = _s3(machine, seaweedfs_server, servers.WEAK_KEY)
    url = f"s3://{seaweedfs_server.bucket}/forbidden"
    sentence = machine.fails(1, "policy", "create", "x", "--source", tree, "--repo", url, *reach)
    assert seaweedfs_server.bucket in sentence


def test_s3_that_is_down(machine: Machine, tree: Path) -> None:
    (port,) = servers.free_ports(1)
    machine.variables |= servers.environment("k", "s")
    reach = ["--endpoint-url", f"http://127.0.0.1:{port}", "--region", "r", "--retry-time", "1s"]
    arguments = ("policy", "create", "x", "--source", tree, "--repo", "s3://bucket/x", *reach)
    sentence = machine.fails(1, *arguments)
    assert f"127.0.0.1:{port} does not answer" in sentence


def test_s3_that_ignores_conditions(machine: Machine, tree: Path) -> None:
    machine.variables |= servers.environment("k", "s")
    with servers.careless_s3() as url:
        reach = ["--endpoint-url", url, "--region", "r", "--retry-time", "1s"]
        arguments = ["policy", "create", "x", "--source", str(tree), "--repo", "s3://bucket/x"]
        sentence = machine.fails(1, *arguments, *reach)
        assert "ignores conditional writes" in sentence
        assert "--single-writer" in sentence
        assert not (machine.home / "config/x.toml").exists()


def test_a_full_disk(machine: Machine, tree: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", small], check=True)
    try:
        (tree / "large").write_bytes(os.urandom(8 << 20))
        machine.run("policy", "create", "x", "--source", tree, "--repo", small / "repo")
        sentence = machine.fails(1, "sync")
        assert "no room left" in sentence or "no space left" in sentence.lower()
        assert machine.run("snapshots", "--json").out == ""
    finally:
        subprocess.run(["umount", small], check=True)
