"""A real PostgreSQL, run as its own user as it wants to be."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

USER = "postgres"
TIMEOUT_S = 120

BALANCES = """
SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers),
    (SELECT sum(bbalance) FROM pgbench_branches), (SELECT coalesce(sum(delta), 0) FROM
    pgbench_history), (SELECT count(*) FROM pgbench_history)
"""


def program(name: str) -> Path:
    """One of PostgreSQL's programs; without them the test fails."""
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    assert places, f"this test needs PostgreSQL's {name} (Debian's package postgresql)"
    return places[-1]


def run(name: str, *arguments: str | Path) -> str:
    """Run a program as PostgreSQL's user. Returns what it prints."""
    done = subprocess.run(
        as_user(name, *arguments),
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd="/",
    )
    assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
    return done.stdout


def as_user(name: str, *arguments: str | Path) -> list[str | Path]:
    """The command that runs a program as PostgreSQL's user."""
    who = ["--reuid", USER, "--regid", USER, "--init-groups"]
    return ["setpriv", *who, "--", program(name), *arguments]


@dataclass
class Server:
    """A server that runs on a data directory; reached by a socket in ``place`` only."""

    place: Path
    log: Path

    def ask(self, question: str) -> list[str]:
        """The only row that is the answer to a question."""
        said = run("psql", "-h", self.place, "-d", USER, "-XAtc", " ".join(question.split()))
        return said.strip().split("|")

    def bench(self, clients: int, seconds: int) -> subprocess.Popen[bytes]:
        """pgbench, at work."""
        return subprocess.Popen(
            as_user("pgbench", "-h", self.place, "-n", f"-c{clients}", f"-T{seconds}", USER),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
        )

    def balances(self) -> tuple[set[int], int]:
        """The sums of all that pgbench counts alike, which are one in any consistent state, and
        the number of transactions."""
        *sums, transactions = map(int, self.ask(BALANCES))
        return set(sums), transactions


def owned(path: Path) -> Path:
    """A directory for PostgreSQL's user."""
    path.mkdir()
    shutil.chown(path, USER, USER)
    return path


def make(data: Path, place: Path) -> None:
    """A cluster with checksums in ``data``, filled for pgbench."""
    run("initdb", "-D", data, "-k", "-A", "trust", "--no-locale", "-E", "UTF8")
    with (data / "postgresql.conf").open("a") as file:
        file.write("listen_addresses = ''\nshared_buffers = 16MB\ncheckpoint_timeout = 30s\n")
    with server(data, place) as running:
        run("pgbench", "-h", running.place, "-i", "-q", "-s", "2", USER)
        running.ask("CREATE EXTENSION amcheck")


@contextlib.contextmanager
def server(data: Path, place: Path) -> Iterator[Server]:
    """Run a server on a data directory, after recovery where that needs it."""
    log = data.with_name(data.name + ".log")
    log.touch()
    shutil.chown(log, USER, USER)
    try:
        run("pg_ctl", "-D", data, "-w", "-l", log, "-o", f"-k {place}", "start")
    except AssertionError as error:
        raise AssertionError(f"{error}: {log.read_text()}") from None
    try:
        yield Server(place, log)
    finally:
        run("pg_ctl", "-D", data, "-w", "-m", "fast", "stop")
