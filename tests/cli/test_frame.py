"""What all commands share: help, versions, pages, errors, completion."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from cloudfs import __version__
from cloudfs.cli.main import COMMANDS, LazyGroup
from cloudfs.core.policy import KEYS
from tests.cli.conftest import PROGRAM, Machine

MAN = Path(__file__).parents[2] / "man"
HEAVY = ["boto3", "botocore", "rich", "trio", "pyfuse3", "lmdb", "cryptography", "msgspec"]
HEAVY += ["zstandard", "pathspec", "platformdirs", "multiprocessing", "cloudfs.repo"]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from cloudfs.cli.main import run; run(['--help']);"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_importing_the_main_module_imports_nothing_of_cloudfs() -> None:
    code = (
        "import sys, cloudfs.__main__; print([n for n in sys.modules if n.startswith('cloudfs')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['cloudfs', 'cloudfs.__main__']"


def test_help_is_quick(machine: Machine) -> None:
    def once() -> float:
        started = time.perf_counter()
        machine.run("--help")
        return time.perf_counter() - started

    assert min(once() for _ in range(8)) <= 0.15


def test_version(machine: Machine) -> None:
    assert machine.run("--version").out == f"cloudfs {__version__}\n"


def test_help_needs_no_sound_environment(machine: Machine) -> None:
    machine.variables["CLOUDFS_CONFIG_DIR"] = "not/absolute"
    assert "Commands:" in machine.run("--help").out
    assert "CLOUDFS_CONFIG_DIR must be an absolute path" in machine.fails(2, "policy", "list")


def _command(name: str) -> click.Command:
    group = LazyGroup()
    command = group.get_command(click.Context(group), name)
    assert command is not None
    return command


def _page(name: str) -> str:
    text = (MAN / name).read_text()
    while match := re.search(r"^\.\. include:: (\S+)$", text, re.MULTILINE):
        text = text[: match.start()] + (MAN / match[1]).read_text() + text[match.end() :]
    return text


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_page_with_all_its_options(name: str) -> None:
    command = _command(name)
    page = _page(f"cloudfs-{name}.1.rst")
    leaves = [command]
    if isinstance(command, click.Group):
        leaves = list(command.commands.values())
        for leaf in leaves:
            assert f"**cloudfs {name} {leaf.name}**" in page
    else:
        assert f"**cloudfs {name}**" in page
    for leaf in leaves:
        for param in leaf.params:
            if isinstance(param, click.Option) and not param.hidden:
                for option in (*param.opts, *param.secondary_opts):
                    assert re.search(rf"^(-\w, |\*\*)?{option}\b(?!-)", page, re.MULTILINE), option


@pytest.mark.parametrize("name", COMMANDS)
def test_each_page_has_only_options_that_exist(name: str) -> None:
    command = _command(name)
    leaves = command.commands.values() if isinstance(command, click.Group) else [command]
    known = {"-h", "--help"}
    for leaf in leaves:
        for param in leaf.params:
            known.update((*param.opts, *param.secondary_opts))
    page = _page(f"cloudfs-{name}.1.rst")
    for line in re.findall(r"^(-{1,2}\w[^ ].*?)(?:  |$)", page, re.MULTILINE):
        if set(line) != {"-"}:
            for option in re.findall(r"(?:^|, )(--?\w[\w-]*)", line):
                assert option in known, line


def test_the_root_page_names_each_command() -> None:
    page = _page("cloudfs.1.rst")
    for name in COMMANDS:
        assert f"**cloudfs-{name}**\\(1)" in page


def test_the_page_of_the_policy_file_explains_each_key() -> None:
    page = _page("cloudfs-policy.5.rst")
    for name in KEYS:
        assert re.search(rf"^(\w+, )*{name}(, \w+)*\n    \S", page, re.MULTILINE), name


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself(machine: Machine, name: str) -> None:
    assert f"Usage: cloudfs {name}" in machine.run(name, "--help").out
    command = _command(name)
    if isinstance(command, click.Group):
        for sub in command.commands:
            assert f"Usage: cloudfs {name} {sub}" in machine.run(name, sub, "--help").out


def test_usage_errors_are_one_sentence(machine: Machine) -> None:
    assert "No such command 'snyc'" in machine.fails(2, "snyc")
    assert "No such option" in machine.fails(2, "sync", "--nope")
    assert machine.fails(2, "mount", "home").endswith("See `cloudfs mount --help`.")
    assert machine.run(code=2).err.startswith("Usage: cloudfs")


def test_an_unforeseen_error_is_one_sentence_too(capsys: pytest.CaptureFixture[str]) -> None:
    from cloudfs.cli.interrupt import Interrupts
    from cloudfs.cli.main import _report

    error = ZeroDivisionError("division by zero")
    assert _report(error, Interrupts(), debug=False) == 1
    assert capsys.readouterr().err == (
        "cloudfs: internal error (ZeroDivisionError: division by zero);"
        " run with --debug to see where.\n"
    )
    assert _report(error, Interrupts(), debug=True) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_debug_shows_where_an_error_comes_from(machine: Machine) -> None:
    with machine.start("sync", "nope", "--debug") as process:
        _, err = process.communicate()
    assert process.returncode == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("cloudfs: there is no policy nope")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(machine: Machine, shell: str) -> None:
    assert "_CLOUDFS_COMPLETE" in machine.run("completion", shell).out


def test_names_of_policies_are_completed(home: Machine) -> None:
    home.variables |= {
        "_CLOUDFS_COMPLETE": "bash_complete",
        "COMP_WORDS": "cloudfs sync h",
        "COMP_CWORD": "2",
    }
    assert home.run().out == "plain,home\n"


def test_a_reader_that_leaves_is_no_error(home: Machine) -> None:
    home.run("sync", "home")
    command = f"{PROGRAM} snapshots home --json | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], env=home.environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
