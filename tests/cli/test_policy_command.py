"""``cloudfs policy`` and the policies' files."""

from __future__ import annotations

import ctypes
import functools
import os
import pwd  # before a test becomes a user who may not read the interpreter's files
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudfs.cli.policies import PolicyFiles
from cloudfs.core.errors import UsageError
from cloudfs.core.policy import Policy, parse_policy
from tests.cli.conftest import Machine


def _file(machine: Machine, name: str = "home") -> Path:
    return machine.home / "config" / f"{name}.toml"


def test_create_says_what_was_made_and_what_is_next(
    machine: Machine, tree: Path, repo: str
) -> None:
    done = machine.run("policy", "create", "home", "--source", tree, "--repo", repo)
    assert done.err == ""
    assert done.out.splitlines() == [
        f"New repository at {repo}.",
        f'Policy "home": {tree} → {repo}, changes found by scan'
        " (not a btrfs subvolume; see cloudfs-policy(5)).",
        "Next: cloudfs sync home",
    ]
    text = _file(machine).read_text()
    found = parse_policy(text, "home.toml")
    assert (found.name, found.sources, found.repository) == ("home", (str(tree),), repo)
    assert len(found.id) == 32
    assert stat.S_IMODE(_file(machine).stat().st_mode) == 0o644


def test_create_takes_all_keys(machine: Machine, tree: Path, tmp_path: Path) -> None:
    options = "--block-size 64k --pack-size 16MiB --pack-time-limit 90s --compression zstd:9"
    options += " --no-verify-packs --workers 2 --exclude *.o --exclude /tmp --exclude-caches"
    options += " --exclude-if-present .nobackup --one-file-system --tag a --tag b"
    options += " --upload-limit 1MB --download-limit 2MB --snapshot scan --region r --profile p"
    options += " --verify-source 5% --single-writer --mode 0600 --external-timeout 1h"
    options += " --kept-room 2GiB --when-full inconsistent --sync-on write"
    relative = os.path.relpath(tree, machine.home)
    arguments = ["--source", relative, "--repo", str(tmp_path / "r"), *options.split()]
    arguments += [
        "--external-snapshot",
        "zfs 'a b'",
        "--external-changes",
        "c",
        "--external-release=",
    ]
    machine.run("policy", "create", "home", *arguments)
    (found,) = machine.run("policy", "show", "home", "--json").objects
    del found["id"], found["file"]
    assert found == {
        "name": "home",
        "sources": [str(tree)],
        "repository": f"file://{tmp_path}/r",
        "endpoint_url": "",
        "region": "r",
        "profile": "p",
        "single_writer": True,
        "snapshot": "scan",
        "external_snapshot": ["zfs", "a b"],
        "external_changes": ["c"],
        "external_release": [],
        "external_timeout_s": 3600.0,
        "kept_room": 2 << 30,
        "when_full": "inconsistent",
        "sync_on": "write",
        "block_size": 64 << 10,
        "pack_size": 16 << 20,
        "pack_time_limit_s": 90.0,
        "compression": "zstd:9",
        "verify_packs": False,
        "verify_source": 0.05,
        "workers": 2,
        "excludes": ["*.o", "/tmp"],
        "exclude_caches": True,
        "exclude_if_present": [".nobackup"],
        "one_file_system": True,
        "tags": ["a", "b"],
        "upload_limit": 1_000_000,
        "download_limit": 2_000_000,
    }
    assert stat.S_IMODE(_file(machine).stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["a/b"], '"a/b" cannot be a name'),
        (["home", "--block-size", "1k"], "--block-size: a power of two"),
        (["home", "--pack-size", "x"], '--pack-size: "x" is no size'),
        (["home", "--snapshot", "life"], '--snapshot: "life" is no way to find changes'),
        (["home", "--snapshot", "external"], "--snapshot external needs --external-snapshot"),
        (["home", "--external-changes", "a 'b"], "--external-changes: it is no command"),
        (["home", "--compression", "lz4"], '--compression: "lz4" is no compression'),
        (["home", "--repo", "ftp://x"], '--repo: "ftp://x" is no repository'),
        (["home", "--repo", "s3://B_"], "names no bucket"),
        (["home", "--exclude", "!"], '"!" is no pattern'),
        (["home", "--mode", "999"], "an octal mode"),
        (["home", "--owner", "nobody-of-that-name"], "there is no user"),
        (["home", "--retry-time", "x"], '"x" is no duration'),
    ],
)
def test_bad_options_are_named(
    machine: Machine, tree: Path, repo: str, arguments: list[str], sentence: str
) -> None:
    defaults = ["--source", str(tree), "--repo", repo]
    found = machine.fails(2, "policy", "create", *defaults, *arguments)
    assert sentence in found
    assert not _file(machine).exists()


def test_what_is_missing(machine: Machine, tree: Path, repo: str, tmp_path: Path) -> None:
    assert "--source is missing" in machine.fails(2, "policy", "create", "x", "--repo", repo)
    assert "--repo is missing" in machine.fails(2, "policy", "create", "x", "--source", tree)
    gone = tmp_path / "gone"
    sentence = machine.fails(1, "policy", "create", "x", "--source", gone, "--repo", repo)
    assert sentence == f"the source {gone} does not exist. Nothing was done."
    file = tree / "a file"
    sentence = machine.fails(1, "policy", "create", "x", "--source", file, "--repo", repo)
    assert sentence == f"the source '{file}' is not a directory. Name a directory."
    machine.variables["CLOUDFS_REPO"] = repo
    machine.run("policy", "create", "x", "--source", tree)


def test_a_name_is_taken_once(home: Machine, other_machine: Machine, tree: Path, repo: str) -> None:
    arguments = ("policy", "create", "home", "--source", tree, "--repo", repo)
    assert "there is a policy home already" in home.fails(2, *arguments)
    assert "already holds a policy called home" in other_machine.fails(2, *arguments)
    assert not _file(other_machine).exists()


def test_a_repository_within_its_source_is_refused(machine: Machine, tree: Path) -> None:
    arguments = ("policy", "create", "x", "--source", tree, "--repo", f"file://{tree}/docs/repo")
    sentence = machine.fails(2, *arguments)
    assert sentence.endswith("would back itself up. Exclude it: `--exclude /docs/repo`")
    machine.run(*arguments, "--exclude", "/docs/repo")


def test_list_and_show(home: Machine, tree: Path, repo: str) -> None:
    lines = home.run("policy", "list").out.splitlines()
    assert [line.split() for line in lines] == [
        ["policy", "sources", "repository"],
        ["home", str(tree), repo],
    ]
    assert home.run("policy", "show", "home").out == _file(home).read_text()
    (found,) = home.run("policy", "list", "--json").objects
    assert found["name"] == "home"


def test_an_empty_list(machine: Machine) -> None:
    assert "There are no policies" in machine.run("policy", "list").out
    assert machine.run("policy", "list", "--json").out == ""
    assert "there is no policy yet" in machine.fails(2, "sync")


def test_set_keeps_comments_and_says_the_new(home: Machine) -> None:
    path = _file(home)
    path.write_text("# mine\n" + path.read_text())
    path.chmod(0o640)
    home.run("policy", "set", "home", "--workers", "3", "--exclude", "*.o", "--exclude", "b")
    found = parse_policy(path.read_text(), "x")
    assert (found.workers, found.excludes) == (3, ("*.o", "b"))
    assert path.read_text().startswith("# mine\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    home.run("policy", "set", "home", "--clear", "excludes", "--clear", "workers")
    found = parse_policy(path.read_text(), "x")
    assert (found.workers, found.excludes) == (0, ())
    assert "nothing to change" in home.fails(2, "policy", "set", "home")
    assert "no key that can be cleared" in home.fails(2, "policy", "set", "home", "--clear", "id")


def test_set_makes_a_repository_elsewhere(home: Machine, tmp_path: Path) -> None:
    home.run("sync", "home")
    url = f"file://{tmp_path}/second"
    assert "New repository" in home.run("policy", "set", "home", "--repo", url).out
    assert "Snapshot 1 of home" in home.run("sync", "home").out
    assert "Snapshot 1 of home" not in home.run("sync", "home", "--force").out


def test_a_file_that_nobody_may_write_is_not_changed(home: Machine) -> None:
    _file(home).chmod(0o444)
    before = _file(home).read_text()
    for command in (("set", "home", "--workers", "3"), ("remove", "home", "--yes")):
        sentence = home.fails(2, "policy", *command)
        assert "you may not change" in sentence
        assert "has mode 0444" in sentence
    assert _file(home).read_text() == before


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory that all users reach and only root writes."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_who_may_change_a_policy_is_said_by_owner_and_mode(open_dir: Path) -> None:
    """As another user, in another process: reads all, writes what is its own."""
    files = PolicyFiles(open_dir)
    policy = Policy(name="p", sources=("/x",), repository="file:///r")
    mine = files.create(policy, 0o644, (0, 0))
    theirs = files.create(
        Policy(name="q", sources=("/x",), repository="file:///r"), 0o600, (65534, 65534)
    )
    assert pwd.getpwuid(0).pw_name == "root"
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            try:
                files.check_may_change(mine.path)
                os._exit(1)
            except UsageError as error:
                if "belongs to root" not in str(error):
                    os._exit(2)
            changed = Policy(name="q", sources=("/y",), repository="file:///r")
            files.change(files.load("q"), changed)  # the directory is root's, the file is not
            os._exit(0 if files.load("q").policy == changed else 3)
        except BaseException:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert theirs.path.stat().st_uid == 65534


def test_remove_leaves_the_backups(home: Machine, repo: str) -> None:
    home.run("sync", "home")
    assert "--yes does it without asking" in home.fails(2, "policy", "remove", "home")
    home.run("policy", "remove", "home", "--yes")
    assert not _file(home).exists()
    assert "there is no policy home" in home.fails(2, "policy", "remove", "home", "--yes")
    assert len(home.run("snapshots", repo, "--json").objects) == 1


def test_adopting_a_policy_goes_on_with_its_backups(
    home: Machine, other_machine: Machine, repo: str, tree: Path
) -> None:
    home.run("sync", "home")
    home.run("policy", "set", "home", "--tag", "kept")
    home.run("sync", "home", "--force")
    other_machine.run("policy", "create", "home", "--adopt", "--repo", repo)
    assert "kept" in _file(other_machine).read_text()
    (tree / "new").write_text("new")
    done = other_machine.run("sync", "home", "--json").objects[-1]
    assert (done["snapshot"], done["items_new"]) == (3, 1)
    sentence = other_machine.fails(10, "policy", "create", "x", "--adopt", "--repo", repo)
    assert "holds no policy called x; it holds home" in sentence


def test_a_damaged_file_is_named_with_its_line(home: Machine) -> None:
    path = _file(home)
    count = path.read_text().count("\n")
    path.write_text(path.read_text() + 'pack_sise = "1 MiB"\n')
    expected = f'{path}, line {count + 1}: unknown key "pack_sise". Did you mean "pack_size"?'
    for command in (("sync", "home"), ("snapshots", "home"), ("policy", "list")):
        assert home.fails(2, *command) == expected
    path.write_bytes(b"name = 'home'\n\xff\n")
    assert home.fails(2, "sync") == f"{path}, line 2: this is not UTF-8."
    path.write_text("name = 'work'\nsources = ['/x']\nrepository = '/r'\n")
    assert "line 1: the name is" in home.fails(2, "sync")
    path.write_text(
        "name = 'home'\nsources = ['/x']\nrepository = '/r'\nexcludes = [\n'a',\n'!',\n]"
    )
    assert f'{path}, line 6: "!" is no pattern' in home.fails(2, "sync")


def test_a_file_written_by_hand_gets_its_id_at_the_first_sync(
    home: Machine, tree: Path, repo: str
) -> None:
    path = _file(home, "hand")
    path.write_text(f'name = "hand"\nsources = ["{tree}"]\nrepository = "{repo}"\n')
    assert "holds no policy called hand" in home.fails(10, "snapshots", "hand")
    home.run("sync", "hand")
    assert parse_policy(path.read_text(), "x").id
    assert [o["policy"] for o in home.run("snapshots", repo, "--json").objects] == ["hand"]
    copied = _file(home, "home").read_text().splitlines()
    clone = [line for line in copied if not line.startswith("id =")]
    _file(home, "home").write_text("\n".join(clone))
    assert "already holds a policy called home" in home.fails(2, "sync", "home")


def test_typos_of_names_are_answered(home: Machine) -> None:
    assert home.fails(2, "sync", "hmoe").endswith("Did you mean home?")


def test_a_configuration_directory_that_cannot_be(machine: Machine, tree: Path, repo: str) -> None:
    (machine.home / "file").write_text("")
    machine.variables["CLOUDFS_CONFIG_DIR"] = str(machine.home / "file" / "config")
    sentence = machine.fails(1, "policy", "create", "x", "--source", tree, "--repo", repo)
    assert "not a directory" in sentence


def without_a_name() -> None:
    """Let this process be of a user that no list knows, as in a container under any number."""
    assert ctypes.CDLL(None).unshare(0x1000_0000) == 0, "this test needs user namespaces"
    Path("/proc/self/uid_map").write_text("54321 0 1")


def test_a_user_without_a_name(machine: Machine, tree: Path, repo: str) -> None:
    machine.variables |= dict.fromkeys(("LOGNAME", "USER", "LNAME", "USERNAME"), "")
    run = functools.partial(machine.run, preexec_fn=without_a_name)
    run("policy", "create", "home", "--source", tree, "--repo", repo)
    new = machine.home / "new"
    new.write_text("battery staple\n")
    run("key", "add", "home", "--new-passphrase-file", new)
    run("sync", "home")
    assert run("key", "list", "home").out.count("54321@") == 2
