"""What is measured, step by step, for every program on the same data."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benching import data
from benching.measure import Cost, Failed, Results, memory_mb, run
from benching.programs import Cloudfs, Program

Scenario = Callable[[Path, list[Program], Results], None]


def _compare(source: Path, restored: Path) -> None:
    done = subprocess.run(
        ["rsync", "-anic", "--delete", f"{source}/", f"{restored}/"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    if any(not line.startswith(".d") for line in done.stdout.splitlines()):
        raise Failed(f"what was restored differs: {done.stdout[:500]}")


def _restore(program: Program, source: Path, base: Path) -> Cost:
    target = base / "restored"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    cost = run(program.restore_command(source, target), program.env)
    _compare(source, program.restore(source, target))
    shutil.rmtree(target)
    return cost


@contextlib.contextmanager
def _mounted(program: Program, base: Path) -> Iterator[tuple[Cost, Path] | None]:
    mountpoint = base / "mount"
    mountpoint.mkdir(exist_ok=True)
    try:
        yield program.mount(mountpoint)
    finally:
        program.unmount(mountpoint)


def _attempt(step: str, program: Program, action: Callable[[], None]) -> None:
    """A peer that cannot do a step leaves a gap; cloudfs must do every one."""
    try:
        action()
    except (Failed, OSError) as error:
        if isinstance(program, Cloudfs):
            raise
        print(f"  {step}: {program.name}: {error}", file=sys.stderr)


def _tree(name: str, source: Path, base: Path, program: Program, results: Results) -> None:
    """First backup, size, unchanged, restore."""
    program.fresh(source)
    results.add(name, "first backup", program.name, program.backup(source))
    results.number(name, "repository, MB", program.name, program.repository_mb())
    results.add(name, "unchanged", program.name, program.backup(source))


def _browse(name: str, base: Path, program: Program, results: Results, copy: str) -> None:
    with _mounted(program, base) as mounted:
        if mounted is None:
            return
        cost, top = mounted
        results.add(name, "mount ready", program.name, cost)
        pid = program.serving_pid()
        results.add(name, "find -ls", program.name, run(["find", str(top), "-ls"], program.env))
        if pid:
            results.number(name, "mount's memory, MB", program.name, memory_mb([pid]))
        if copy:
            target = base / "copied"
            cost = run(["cp", "-r", str(top / copy), str(target)], program.env)
            results.add(name, f"cp -r {copy}", program.name, cost)
            shutil.rmtree(target)


def kernel(base: Path, programs: list[Program], results: Results) -> None:
    """A kernel tree, and the next one in its place."""
    old, new = data.kernel(base, "6.1"), data.kernel(base, "6.12")
    live = base / "data" / "live"
    for program in programs:
        subprocess.run(["rsync", "-a", "--delete", f"{old}/", f"{live}/"], check=True)
        _tree("kernel", live, base, program, results)

        def browse(program: Program = program) -> None:
            _browse("kernel", base, program, results, "drivers/net")

        _attempt("mount", program, browse)
        subprocess.run(["rsync", "-a", "--delete", f"{new}/", f"{live}/"], check=True)
        results.add("kernel", "tree becomes 6.12", program.name, program.backup(live))

        def restore(program: Program = program) -> None:
            results.add("kernel", "restore", program.name, _restore(program, live, base))

        _attempt("restore", program, restore)
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

        def browse(program: Program = program) -> None:
            _browse("million", base, program, results, "")

        _attempt("mount", program, browse)
        shutil.rmtree(program.base)


def s3(base: Path, programs: list[Program], results: Results) -> None:
    """The kernel tree over a real S3 server on the loopback."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from tests.servers import seaweedfs  # what the tests use

    source = data.kernel(base, "6.1")
    for program in programs:
        if program.name in ("rustic", "borg"):
            continue
        with seaweedfs() as server:
            env = {**server.environment, "ENDPOINT": server.endpoint_url}
            program.fresh(source, server.bucket, env)
            results.add("s3", "first backup", program.name, program.backup(source))
            if isinstance(program, Cloudfs):
                for kind, count in program.requests_of_backup().items():
                    results.number("s3", f"unchanged: {kind}", program.name, count)
                program.forget_local()
                with _mounted(program, base) as mounted:
                    assert mounted is not None
                    results.add("s3", "cold mount to first ls", program.name, mounted[0])
            results.add("s3", "restore", program.name, _restore(program, source, base))
        shutil.rmtree(program.base)


def help_(base: Path, programs: list[Program], results: Results) -> None:
    """How long the program takes to say what it is."""
    command = [Cloudfs(base).program, "--help"]
    best = min((run(command, dict(os.environ)) for _ in range(5)), key=lambda cost: cost.wall_s)
    results.add("help", "cloudfs --help", "cloudfs", best)


ALL: dict[str, Scenario] = {
    "kernel": kernel,
    "vm": vm,
    "s3": s3,
    "million": million,
    "help": help_,
}
