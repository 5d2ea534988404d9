"""Real programs at work on the live mount."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.engine import postgres
from tests.fuse.compare import assert_same, make_odd_tree
from tests.posix.case import in_process
from tests.posix.mounts import Pair

ME = {
    "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@example.org", "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@example.org", "GIT_CONFIG_GLOBAL": "",
}  # fmt: skip


def run(*command: str | Path, cwd: Path) -> str:
    """What a program prints; the test fails where it does."""
    done = subprocess.run(
        command,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        check=False,
        env=os.environ | ME,
        timeout=1800,
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


# -- git -------------------------------------------------------------------------------------------


def _work_with_git(place: Path, files: int, commits: int) -> None:
    repository = place / "repository"
    repository.mkdir()
    run("git", "init", "-q", "-b", "main", cwd=repository)
    run("git", "config", "gc.auto", "0", cwd=repository)  # a collection of its own, in between
    for number in range(files):
        path = repository / f"d{number % 17}" / f"f{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"content of {number}\n" * (number % 50 + 1))
    for commit in range(commits):
        (repository / "d0" / "f0").write_text(f"commit {commit}\n")
        run("git", "add", "-A", cwd=repository)
        run("git", "mv", f"d1/f{1 + 17 * commit}", f"d2/moved{commit}", cwd=repository)
        run("git", "commit", "-q", "-m", f"{commit}", cwd=repository)
        assert run("git", "status", "--porcelain", cwd=repository) == ""
    run("git", "gc", "-q", "--prune=now", cwd=repository)
    run("git", "fsck", "--full", "--strict", cwd=repository)
    run("git", "clone", "-q", "repository", "clone", cwd=place)
    run("git", "clone", "-q", "--no-local", "repository", "copy", cwd=place)
    head = run("git", "rev-parse", "HEAD", cwd=repository)
    for clone in (place / "clone", place / "copy"):
        assert run("git", "rev-parse", "HEAD", cwd=clone) == head
        run("git", "checkout", "-q", "HEAD~1", cwd=clone)
        run("git", "checkout", "-q", "main", cwd=clone)
        assert run("git", "status", "--porcelain", cwd=clone) == ""
        run("git", "fsck", cwd=clone)


def test_git(pair: Pair) -> None:
    place = pair.live / "git"
    place.mkdir()
    _work_with_git(place, 150, 3)


@pytest.mark.long
def test_git_with_many_files(live_pair: Pair) -> None:
    _work_with_git(live_pair.live, 20_000, 30)


# -- databases -------------------------------------------------------------------------------------


def _insert(database: Path, who: int, rows: int) -> None:
    connection = sqlite3.connect(database, timeout=60, isolation_level=None)
    connection.execute("PRAGMA synchronous = NORMAL")
    for number in range(rows):
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO t VALUES (?, ?, randomblob(400))", (who, number))
        connection.execute("UPDATE counts SET n = n + 1 WHERE who = ?", (who,))
        connection.execute("COMMIT")
    connection.close()


def _fill_sqlite(place: Path, mode: str, writers: int, rows: int) -> None:
    database = place / f"{mode}.db"
    connection = sqlite3.connect(database)
    assert connection.execute(f"PRAGMA journal_mode = {mode}").fetchone()[0] == mode
    connection.execute("CREATE TABLE t (who INTEGER, number INTEGER, data BLOB)")
    connection.execute("CREATE TABLE counts (who INTEGER PRIMARY KEY, n INTEGER)")
    connection.executemany("INSERT INTO counts VALUES (?, 0)", [(w,) for w in range(writers)])
    connection.commit()
    connection.close()
    with ThreadPoolExecutor(writers) as pool:
        work = [
            pool.submit(in_process, lambda w=who: _insert(database, w, rows), 1200)
            for who in range(writers)
        ]
        for done in work:
            done.result()
    connection = sqlite3.connect(database)
    assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    assert connection.execute("SELECT count(*), sum(number) FROM t").fetchone() == (
        writers * rows,
        writers * rows * (rows - 1) // 2,
    )
    assert {n for (n,) in connection.execute("SELECT n FROM counts")} == {rows}
    connection.execute("VACUUM")
    assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    connection.close()


@pytest.mark.parametrize("mode", ["wal", "delete", "truncate"])
def test_sqlite(pair: Pair, mode: str) -> None:
    _fill_sqlite(pair.live, mode, writers=3, rows=60)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["wal", "delete", "persist"])
def test_sqlite_for_long(live_pair: Pair, mode: str) -> None:
    _fill_sqlite(live_pair.live, mode, writers=6, rows=3_000)


def _bench_postgres(pair: Pair, seconds: int) -> None:
    """Initialise, work, stop, start again: what it counts is what it was told."""
    sockets = Path(tempfile.mkdtemp(prefix="pg-"))
    shutil.chown(sockets, postgres.USER)
    try:
        data = postgres.owned(pair.live / "data")
        postgres.make(data, sockets)
        with postgres.server(data, sockets) as running:
            assert running.bench(3, seconds).wait(seconds + 120) == 0
            sums, transactions = running.balances()
            assert len(sums) == 1
        with postgres.server(data, sockets) as running:
            assert running.balances() == (sums, transactions)
            running.ask("SELECT bt_index_check('pgbench_accounts_pkey', true)")
            assert running.bench(2, 1).wait(120) == 0
        postgres.run("pg_checksums", "--check", "-D", data)
        assert transactions > 0
    finally:
        shutil.rmtree(sockets)


@pytest.mark.long
def test_postgres(live_pair: Pair) -> None:
    _bench_postgres(live_pair, 60)


# -- a build ---------------------------------------------------------------------------------------

MAKEFILE = """
objects := $(patsubst %.c,%.o,$(wildcard *.c))
program: lib.a main.o
\t$(CC) -o $@ main.o lib.a
lib.a: $(filter-out main.o,$(objects))
\trm -f $@
\tar rc $@ $^
%.o: %.c all.h
\t$(CC) -O0 -MMD -c -o $@ $<
-include $(objects:.o=.d)
"""


def _build(place: Path, files: int) -> None:
    names = range(files)
    (place / "all.h").write_text("".join(f"int f{n}(int);\n" for n in names))
    for n in names:
        (place / f"f{n}.c").write_text(f'#include "all.h"\nint f{n}(int x) {{ return x + {n}; }}\n')
    calls = "".join(f"x = f{n}(x);" for n in names)
    main = f'#include <stdio.h>\n#include "all.h"\nint main() {{ int x = 0; {calls}'
    (place / "main.c").write_text(main + 'printf("%d\\n", x); return 0; }\n')
    (place / "Makefile").write_text(MAKEFILE)
    wanted = f"{sum(names)}\n"
    run("make", "-s", "-j4", cwd=place)
    assert run("./program", cwd=place) == wanted
    assert "up to date" in run("make", cwd=place)
    time.sleep(0.02)
    os.utime(place / "f1.c")
    made = run("make", "-j4", cwd=place)
    assert made.count("-c -o") == 1
    assert run("./program", cwd=place) == wanted


def test_make(pair: Pair) -> None:
    place = pair.live / "make"
    place.mkdir()
    _build(place, 12)


@pytest.mark.long
def test_make_of_many_files(live_pair: Pair) -> None:
    _build(live_pair.live, 2_000)


# -- copying ---------------------------------------------------------------------------------------


@pytest.fixture
def odd(pair: Pair, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """An odd tree beneath, and a place on the live mount."""
    place, live = (base / request.node.originalname for base in (pair.bare, pair.live))
    place.mkdir()
    live.mkdir()
    make_odd_tree(place / "odd")
    return place / "odd", live


RSYNC = ("rsync", "-aAXH", "--numeric-ids", "--modify-window=-1")  # -1: times to the ns


def test_rsync_both_ways(odd: tuple[Path, Path]) -> None:
    source, live = odd
    run(*RSYNC, f"{source}/", live / "there", cwd=live)
    assert_same(source, live / "there")
    compare = (*RSYNC, "--checksum", "--dry-run", "--itemize-changes", "--delete")
    assert run(*compare, f"{source}/", f"{live}/there/", cwd=live) == ""
    run(*RSYNC, f"{live}/there/", source.parent / "back", cwd=live)
    assert run(*compare, f"{source}/", f"{source.parent}/back/", cwd=live) == ""
    (source / "length-1").write_bytes(b"2")
    shutil.rmtree(live / "there" / "dir" / "in")
    (live / "there" / "more").write_text("to be deleted")
    run(*RSYNC, "--delete", "--inplace", f"{source}/", f"{live}/there/", cwd=live)
    assert_same(source, live / "there")


def test_tar(odd: tuple[Path, Path]) -> None:
    source, live = odd
    keep = ("--xattrs", "--xattrs-include=*", "--acls", "--sparse", "--numeric-owner")
    run("tar", "c", *keep, "-f", live / "odd.tar", "-C", source.parent, "odd", cwd=live)
    run("tar", "xp", *keep, "-f", live / "odd.tar", cwd=live)
    _forget_sockets(source, live / "odd")
    assert_same(source, live / "odd")
    run("tar", "c", *keep, "-f", source.parent / "again.tar", "odd", cwd=live)
    (source.parent / "out").mkdir()
    run("tar", "xp", *keep, "-f", "../again.tar", cwd=source.parent / "out")
    assert_same(live / "odd", source.parent / "out" / "odd")


def _forget_sockets(source: Path, copy: Path) -> None:
    """tar leaves sockets out."""
    times = source.stat()
    (source / "socket").unlink()
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.utime(copy, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_cp_and_mv(odd: tuple[Path, Path]) -> None:
    source, live = odd
    run("cp", "-a", "--sparse=always", source, live / "copy", cwd=live)
    assert_same(source, live / "copy")
    assert (live / "copy" / "sparse").stat().st_blocks * 512 < 64 * 1024
    run("cp", "-a", live / "copy", live / "second", cwd=live)
    assert_same(source, live / "second")
    run("mv", live / "second", source.parent / "moved", cwd=live)
    assert_same(source, source.parent / "moved")
    run("mv", source.parent / "moved", live / "moved back", cwd=live)
    assert_same(source, live / "moved back")
    run("rm", "-r", live / "moved back", cwd=live)


def test_find_and_du(odd: tuple[Path, Path]) -> None:
    source, live = odd
    run("cp", "-a", source, live / "odd", cwd=live)
    for command in (
        ("find", "odd", "-printf", "%P %y %m %U %G %n %T@ %l\\n"),
        ("find", "odd", "-type", "f", "-newermt", "1971-01-01", "-size", "+1k"),
        ("find", "odd", "-links", "+1", "!", "-type", "d"),
        ("du", "-b", "--apparent-size", "-S", "odd/dir/in"),
        ("getfattr", "-dhR", "-m", "-", "odd"),
        ("getfacl", "-Rn", "odd"),
        ("stat", "-c", "%n %s %f %u %g %t %T %Y", "odd/sparse", "odd/device", "odd/dangling"),
    ):
        there, here = (
            sorted(run(*command, cwd=place).splitlines()) for place in (source.parent, live)
        )
        assert there == here, command
    blocks = [run("du", "-k", "odd/sparse", cwd=place) for place in (source.parent, live)]
    assert blocks[0] == blocks[1]


def test_editing_as_programs_do(pair: Pair) -> None:
    """sed -i, a lock file, atomic replacing, appending to a log by many."""
    place = pair.live / "edit"
    place.mkdir()
    (place / "f").write_text("one\ntwo\n")
    run("sed", "-i", "s/two/three/", "f", cwd=place)
    run("flock", "lock", "sh", "-c", "cat f > g && mv g f", cwd=place)
    script = "for i in 1 2 3 4 5 6 7 8; do (for j in $(seq 50); do echo $i.$j; done >> log) & done"
    run("sh", "-c", f"{script}; wait", cwd=place)
    run("truncate", "-s", "100", "f", cwd=place)
    run("dd", "if=f", "of=d", "bs=10", "seek=3", "conv=notrunc,fsync", "status=none", cwd=place)
    assert (place / "f").read_text().startswith("one\nthree\n")
    assert len(set((place / "log").read_text().split())) == 400
    assert (place / "d").stat().st_size == 130
