"""A kernel tree on btrfs becomes the next one: an incremental that is large."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from benching import data
from benching.changed import check_source
from benching.measure import Results
from benching.programs import Cloudfs, Program
from benching.steps import restore
from benching.volumes import settle, volume

ROOM = 6 << 30
NAME = "upgrade"
STEP = "6.1 becomes 6.12, on btrfs"


def upgrade(base: Path, programs: list[Program], results: Results) -> None:
    """cloudfs by btrfs and by a scan, and the peers, all on one subvolume."""
    old, new = data.kernel(base, "6.1"), data.kernel(base, "6.12")
    programs = [*ways(base, programs), *(p for p in programs if not isinstance(p, Cloudfs))]
    with volume(base, "btrfs", ROOM) as tree:
        _becomes(tree, old)
        for program in programs:
            program.fresh(tree)
            results.add(NAME, "first backup, on btrfs", program.name, program.backup(tree))
        _becomes(tree, new)
        for program in programs:
            cost = program.backup(tree)
            results.add(NAME, STEP, program.name, cost)
            if isinstance(program, Cloudfs):
                check_source(program.summary(cost), program.snapshot)
                cost = restore(program, tree, base)
                results.add(NAME, "restore, compared", program.name, cost)
            shutil.rmtree(program.base)


def ways(base: Path, programs: list[Program]) -> list[Program]:
    """cloudfs twice: as it is measured, and beside it by a scan."""
    if not any(isinstance(program, Cloudfs) for program in programs):
        return []
    by_btrfs, by_scan = Cloudfs(base), Cloudfs(base, "cloudfs-scan")
    by_btrfs.snapshot, by_scan.snapshot = "btrfs", "scan"
    return [by_btrfs, by_scan]


def _becomes(tree: Path, version: Path) -> None:
    subprocess.run(["rsync", "-a", "--delete", f"{version}/", f"{tree}/"], check=True)
    settle(tree)
