"""A machine of one's own: directories for configuration, state and cache, and the program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(sys.executable).with_name("cloudfs")
PASSPHRASE = "correct horse"
TIMEOUT_S = 120


@dataclass
class Done:
    """What a run of the program came to."""

    code: int
    out: str
    err: str

    @property
    def objects(self) -> list[dict[str, Any]]:
        """The JSON objects that it printed; fails where anything else stands between them."""
        return [json.loads(line) for line in self.out.splitlines()]


@dataclass
class Machine:
    """One machine. ``variables`` are what its environment has beside the usual."""

    home: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """The whole environment of a run; an empty variable is left out."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CLOUDFS_", "COV_"))}
        own = {
            "CLOUDFS_CONFIG_DIR": str(self.home / "config"),
            "CLOUDFS_STATE_DIR": str(self.home / "state"),
            "CLOUDFS_CACHE_DIR": str(self.home / "cache"),
            "CLOUDFS_PASSPHRASE": PASSPHRASE,
            "TZ": "UTC",
        }
        return {k: v for k, v in {**kept, **own, **self.variables}.items() if v}

    def start(self, *arguments: str | Path, **settings: Any) -> subprocess.Popen[str]:
        """Begin a run."""
        given: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            "env": self.environment,
            "cwd": self.home,
        }
        return subprocess.Popen([PROGRAM, *arguments], **(given | settings))

    def run(self, *arguments: str | Path, code: int | None = 0, **settings: Any) -> Done:
        """Run the program to its end; ``code`` is what it must exit with (None: anything)."""
        with self.start(*arguments, **settings) as process:
            out, err = process.communicate(timeout=TIMEOUT_S)
        done = Done(process.returncode, out, err)
        assert "Traceback" not in err, err
        assert "internal error" not in err, err
        assert code is None or done.code == code, done
        return done

    def fails(self, code: int, *arguments: str | Path, **settings: Any) -> str:
        """Run what must fail with one sentence on stderr, nothing on stdout. Returns it."""
        done = self.run(*arguments, code=code, **settings)
        assert done.out == ""
        lines = done.err.splitlines()
        assert len(lines) == 1, done.err
        assert lines[0].startswith("cloudfs: ")
        assert lines[0].endswith((".", "?", "!", ")", "`", "'"))
        return lines[0].removeprefix("cloudfs: ")

    def source_state(self) -> tuple[str, str]:
        """What the table of ``status`` says of the first policy's changes, and of its source."""
        title, line = self.run("status").out.splitlines()[:2]
        words = ("changes since", "source", "mounted at")
        changes, source, end = (title.index(word) for word in words)
        return line[changes:source].strip(), line[source:end].strip()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine that has never seen cloudfs."""
    home = tmp_path / "machine"
    home.mkdir()
    return Machine(home)


@pytest.fixture
def other_machine(tmp_path: Path) -> Machine:
    """A second one."""
    home = tmp_path / "other"
    home.mkdir()
    return Machine(home)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small tree to back up."""
    top = tmp_path / "tree"
    (top / "docs").mkdir(parents=True)
    (top / "docs" / "plan.txt").write_text("plan\n" * 1000)
    (top / "a file").write_text("x")
    (top / "link").symlink_to("docs/plan.txt")
    return top


@pytest.fixture
def repo(tmp_path: Path) -> str:
    """Where a repository may be made."""
    return f"file://{tmp_path}/repo"


@pytest.fixture
def home(machine: Machine, tree: Path, repo: str) -> Machine:
    """A machine with the policy "home" and its repository."""
    machine.run("policy", "create", "home", "--source", tree, "--repo", repo)
    return machine
