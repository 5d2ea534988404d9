"""Writers that never stop while syncs run: every snapshot is a prefix of what they did."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.engine import postgres
from tests.engine.living import Living, living
from tests.engine.test_btrfs_postgres import bring_back

WRITERS = 3
FILES = 5
SYNCS = 12
KIB, MIB = 1 << 10, 1 << 20

WRITER = """
import os, sys
top, files = sys.argv[1], int(sys.argv[2])
os.makedirs(top)
logs = [os.open(f"{top}/log{n}", os.O_WRONLY | os.O_CREAT | os.O_APPEND) for n in range(files)]
book = os.open(f"{top}/book", os.O_RDWR | os.O_CREAT)
os.ftruncate(book, files * 8192)
os.close(os.open(f"{top}/mark-0", os.O_CREAT))
step = 0
while True:
    step += 1
    os.write(logs[step % files], b"%9d\\n" % step)
    os.pwrite(book, b"%9d\\n" % step, step % files * 8192)
    os.rename(f"{top}/mark-{step - 1}", f"{top}/mark-{step}")
"""
"""Each step is noted in one of several files, then in place in one, then by a name."""


@contextmanager
def writers(rig: Living) -> Iterator[None]:
    """Processes that write for as long as this lasts."""
    arguments = [sys.executable, "-c", WRITER]
    running = [
        subprocess.Popen([*arguments, rig.tree / f"w{n}", str(FILES)]) for n in range(WRITERS)
    ]
    try:
        while not all((rig.tree / f"w{n}" / "book").exists() for n in range(WRITERS)):
            time.sleep(0.01)
        yield
        assert not any(process.poll() for process in running), "a writer met an error"
    finally:
        for process in running:
            process.kill()
            process.wait()


def steps_seen(contents: dict[bytes, object], writer: int) -> int:
    """How many steps of a writer a snapshot holds; fails where it holds one without another that
    came before."""
    top = b"/w%d/" % writer

    def data(name: bytes) -> bytes:
        return contents[top + name][-1]  # type: ignore[index]

    noted = sorted(int(line) for n in range(FILES) for line in data(b"log%d" % n).split())
    assert noted == list(range(1, len(noted) + 1)), "a record without one before it"
    [mark] = [path for path in contents if path.startswith(top + b"mark-")]
    named = int(mark.removeprefix(top + b"mark-"))
    in_place = max(
        int(data(b"book")[n * 8192 : n * 8192 + 10].strip(b"\0 \n") or b"0") for n in range(FILES)
    )
    assert named <= in_place <= len(noted) <= named + 1, "not in order"
    return len(noted)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_snapshot_is_a_prefix_of_history(
    base: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if workers > 1:
        monkeypatch.setattr("cloudfs.backup.dispatch.INLINE_WORK", 0)
    with living(base, workers=workers) as rig:
        made = []
        with writers(rig):
            for _ in range(SYNCS):
                made.append(rig.sync().snapshot)
        assert all(record is not None and record.consistent for record in made)
        assert [record.source for record in made if record] == ["scan"] + ["live"] * (SYNCS - 1)
        before = [0] * WRITERS
        for record in made:
            assert record is not None
            contents = rig.contents(record.number)
            now = [steps_seen(contents, n) for n in range(WRITERS)]
            assert all(a <= b for a, b in zip(before, now, strict=True))
            before = now
        assert min(before) > SYNCS
        rig.sync()
        rig.check()


@pytest.mark.long
def test_every_snapshot_is_a_database(base: Path) -> None:
    """PostgreSQL under pgbench: what is restored recovers as after a power cut, and is sound."""
    sockets = postgres.owned(base / "sockets")
    with living(base, block_size=128 * KIB, max_pack_bytes=48 * MIB) as rig:
        data = postgres.owned(rig.tree / "data")
        postgres.make(data, sockets)
        done_before: dict[int, int] = {}
        with postgres.server(data, sockets) as server, server.bench(4, 300) as bench:
            try:
                for _ in range(6):
                    time.sleep(1)
                    _, transactions = server.balances()
                    made = rig.sync().snapshot
                    assert made is not None
                    assert (made.consistent, rig.notes) == (True, [])
                    assert bench.poll() is None, "pgbench ended"
                    done_before[made.number] = transactions
            finally:
                bench.terminate()
        assert len(set(done_before.values())) == len(done_before)
        for number, transactions in done_before.items():
            check_database(rig, number, transactions, sockets)


def check_database(rig: Living, number: int, transactions: int, sockets: Path) -> None:
    """A snapshot starts as a database, holds what was committed before it, and is sound."""
    out = rig.base / f"out{number}"
    bring_back(rig, number, out)
    (out / "data" / "postmaster.pid").unlink()  # on this machine that process was there
    with postgres.server(out / "data", sockets) as server:
        assert "automatic recovery in progress" in server.log.read_text()
        sums, found = server.balances()
        assert len(sums) == 1, sums
        assert found >= transactions
        postgres.run("pg_amcheck", "-h", sockets, "--heapallindexed", "--all")
    postgres.run("pg_checksums", "--check", "-D", out / "data")
    shutil.rmtree(out)
