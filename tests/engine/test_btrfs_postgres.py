"""PostgreSQL under pgbench on btrfs: every snapshot of its data directory starts, and is sound."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from cloudfs.repo.pool import WorkerOpening
from cloudfs.restore.job import RestoreJob
from cloudfs.restore.restore import restore
from cloudfs.store.open import StoreOptions
from tests.engine import btrfs, postgres
from tests.engine.rig import Quiet, Rig

pytestmark = pytest.mark.long

SYNCS = 6
KIB, MIB = 1 << 10, 1 << 20


def bring_back(rig: Rig, number: int, target: Path) -> None:
    """Restore a snapshot on another machine."""
    history = rig.history()
    repository = history.repository
    local = repository.local
    opening = WorkerOpening(
        rig.url, StoreOptions(), repository.opening, local.cache_dir, local.state_dir
    )
    result = restore(RestoreJob(history, number, b"/", os.fsencode(target), opening), Quiet())
    history.close()
    local.close()
    assert (result.failures, result.lost, result.damaged) == ([], {}, False)


def test_every_snapshot_is_a_database(base: Path, volume: Path) -> None:
    volume.parent.chmod(0o755)
    tree, sockets = btrfs.subvolume(volume / "tree"), postgres.owned(base / "sockets")
    data = postgres.owned(tree / "data")
    postgres.make(data, sockets)
    rig = Rig(base, [tree], block_size=128 * KIB, max_pack_bytes=48 * MIB, source="btrfs")
    done_before: dict[int, int] = {}
    with postgres.server(data, sockets) as server, server.bench(4, 300) as bench:
        try:
            for _ in range(SYNCS):
                time.sleep(1)
                _, transactions = server.balances()
                made = rig.sync().snapshot
                assert made is not None
                assert (made.source, made.consistent, rig.notes) == ("btrfs", True, [])
                assert bench.poll() is None, "pgbench ended"
                done_before[made.number] = transactions
        finally:
            bench.terminate()
    assert len(set(done_before.values())) == SYNCS
    for number, transactions in done_before.items():
        out = base / f"out{number}"
        bring_back(rig, number, out)
        (out / "data" / "postmaster.pid").unlink()  # on this machine that process was there
        # As after the power failed: what had been committed is there, and what is there is sound.
        with postgres.server(out / "data", sockets) as server:
            assert "automatic recovery in progress" in server.log.read_text()
            sums, found = server.balances()
            assert len(sums) == 1, sums
            assert found >= transactions
            postgres.run("pg_amcheck", "-h", sockets, "--heapallindexed", "--all")
        postgres.run("pg_checksums", "--check", "-D", out / "data")
        shutil.rmtree(out)
