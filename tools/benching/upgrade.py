"""A kernel tree on btrfs becomes the next one: an incremental that is large."""

from __future__ import annotations

import shutil
from pathlib import Path

from benching import data
from benching.changed import check_source
from benching.measure import Results
from benching.programs import Cloudfs, Program
from benching.steps import restore
from benching.volumes import SNAPSHOTS, drop_snapshots, quietly, settle, volume

ROOM = 6 << 30
NAME = "upgrade"
STEP = "6.1 becomes 6.12, on btrfs"


def upgrade(base: Path, programs: list[Program], results: Results) -> None:
    """cloudfs by btrfs and by a scan, and the peers, all on one subvolume.

    Nothing of the tree is in memory when a backup begins: what was just written would be there for
    who reads the tree, and not for who reads a snapshot of it, which has pages of its own.
    """
    old, new = data.kernel(base, "6.1"), data.kernel(base, "6.12")
    programs = [*ways(base, programs), *(p for p in programs if not isinstance(p, Cloudfs))]
    with volume(base, "btrfs", ROOM) as tree:
        for program in programs:
            _becomes(tree, old)
            program.fresh(tree)
            results.add(NAME, "first backup, on btrfs", program.name, program.backup(tree))
            _becomes(tree, new)
            cost = program.backup(tree)
            results.add(NAME, STEP, program.name, cost)
            if isinstance(program, Cloudfs):
                check_source(program.summary(cost), program.snapshot)
                cost = restore(program, new, base)  # in the tree itself lie snapshots
                results.add(NAME, "restore, compared", program.name, cost)
            drop_snapshots(tree)
            shutil.rmtree(program.base)


def ways(base: Path, programs: list[Program]) -> list[Program]:
    """cloudfs twice: as it is measured, and beside it by a scan."""
    if not any(isinstance(program, Cloudfs) for program in programs):
        return []
    by_btrfs, by_scan = Cloudfs(base), Cloudfs(base, "cloudfs-scan")
    by_btrfs.snapshot, by_scan.snapshot = "btrfs", "scan"
    return [by_btrfs, by_scan]


def _becomes(tree: Path, version: Path) -> None:
    quietly("rsync", "-a", "--delete", f"--exclude=/{SNAPSHOTS}", f"{version}/", f"{tree}/")
    settle(tree)
    Path("/proc/sys/vm/drop_caches").write_text("3")
