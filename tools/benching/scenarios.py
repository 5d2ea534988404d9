"""What is measured, step by step, for every program on the same data."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benching import changed, data, live, remote, upgrade
from benching.measure import Results, run
from benching.programs import Cloudfs, Program
from benching.steps import attempt, check_room, cold_mount, copy, mounted, restore

Scenario = Callable[[Path, list[Program], Results], None]


def _tree(name: str, source: Path, base: Path, program: Program, results: Results) -> None:
    """First backup, size, unchanged, restore."""
    program.fresh(source)
    results.add(name, "first backup", program.name, program.backup(source))
    results.number(name, "repository, MB", program.name, program.repository_mb())
    results.add(name, "unchanged", program.name, program.backup(source))


def _browse(name: str, base: Path, program: Program, results: Results, directory: str) -> None:
    """Look at everything in the mounted backup, and copy a directory of it where one is named."""
    with mounted(program, base) as found:
        if found is None:
            return
        cost, top = found
        results.add(name, "mount ready", program.name, cost)
        command = ["find", str(top), "-ls"]
        cost = run(command, program.env, watch=program.processes())
        results.add(name, "find -ls, memory of mount and find", program.name, cost)
        if directory:
            cost = copy(program, top / directory, base)
            results.add(name, f"cp -r {directory}", program.name, cost)


def _restore(name: str, source: Path, base: Path, program: Program, results: Results) -> None:
    results.add(name, "restore", program.name, restore(program, source, base))


def kernel(base: Path, programs: list[Program], results: Results) -> None:
    """A kernel tree, and the next one in its place."""
    old, new = data.kernel(base, "6.1"), data.kernel(base, "6.12")
    live = base / "data" / "live"
    live.mkdir(parents=True, exist_ok=True)
    for program in programs:
        subprocess.run(["rsync", "-a", "--delete", f"{old}/", f"{live}/"], check=True)
        _tree("kernel", live, base, program, results)
        attempt("mount", program, partial(_browse, "kernel", base, program, results, "drivers/net"))
        subprocess.run(["rsync", "-a", "--delete", f"{new}/", f"{live}/"], check=True)
        results.add("kernel", "tree becomes 6.12", program.name, program.backup(live))
        attempt("restore", program, partial(_restore, "kernel", live, base, program, results))
        shutil.rmtree(program.base)


def vm(base: Path, programs: list[Program], results: Results) -> None:
    """A disk of 2 GiB, and 4 KiB of it changed."""
    disk = data.disk(base, 2 << 30)
    for program in programs:
        program.fresh(disk)
        results.add("vm", "2 GiB random file, first", program.name, program.backup(disk))
        data.change_disk(disk)
        results.add("vm", "4 KiB of it changed", program.name, program.backup(disk))
        shutil.rmtree(program.base)
    shutil.rmtree(disk)


def million(base: Path, programs: list[Program], results: Results) -> None:
    """A million small files."""
    source = data.million(base)
    for program in programs:
        _tree("million", source, base, program, results)
        attempt("mount", program, partial(_browse, "million", base, program, results, ""))
        attempt("restore", program, partial(_restore_million, source, base, program, results))
        attempt("cold mount", program, partial(cold_mount, "million", program, base, results))
        shutil.rmtree(program.base)


def _restore_million(source: Path, base: Path, program: Program, results: Results) -> None:
    check_room(program, base, data.DIRECTORIES * (data.FILES_EACH + 1))
    _restore("million", source, base, program, results)


def help_(base: Path, programs: list[Program], results: Results) -> None:
    """How long the program takes to say what it is."""
    command = [Cloudfs(base).path, "--help"]
    best = min((run(command, dict(os.environ)) for _ in range(5)), key=lambda cost: cost.wall_s)
    results.add("help", "cloudfs --help", "cloudfs", best)


ALL: dict[str, Scenario] = {
    "kernel": kernel,
    "vm": vm,
    "s3": remote.s3,
    "requests": remote.requests,
    "latency": remote.latency,
    "million": million,
    "help": help_,
    "changed": changed.changed,
    "bigfile": changed.bigfile,
    "upgrade": upgrade.upgrade,
    "live": live.live,
}
