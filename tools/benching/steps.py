"""The steps that scenarios are made of."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benching.measure import Cost, Failed, Results, run
from benching.programs import Cloudfs, Program

COLD = "cold mount to first ls"
COLD_S = 2.0


def compare(source: Path, restored: Path) -> None:
    """Raise Failed where a restored tree is not its source: content, modes, owners, times."""
    done = subprocess.run(
        ["rsync", "-anic", "--delete", f"{source}/", f"{restored}/"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    if any(not line.startswith(".d") for line in done.stdout.splitlines()):
        raise Failed(f"what was restored differs: {done.stdout[:500]}")


def restore(
    program: Program,
    source: Path,
    base: Path,
    *,
    begin: Callable[[], object] = lambda: None,
    timeout_s: float | None = None,
) -> Cost:
    """Restore all of the last backup, and compare it. ``begin`` is called when all is prepared."""
    target = base / "restored"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    try:
        command = program.restore_command(source, target)
        begin()
        cost = run(command, program.env, timeout_s=timeout_s)
        compare(source, target)
    finally:
        shutil.rmtree(target)
    return cost


def check_room(program: Program, base: Path, files: int) -> None:
    """Raise Failed where restoring so many small files would fill a file system that others use."""
    wanted = files * program.files_each * 11 // 10
    free = os.statvfs(base)
    if free.f_favail < wanted or free.f_bavail * free.f_frsize < wanted * 4096:
        raise Failed(f"{base} has no room for {wanted:,} more files; see --data")


def copy(program: Program, top: Path, base: Path, timeout_s: float | None = None) -> Cost:
    """``cp -r`` of a directory of a mounted backup."""
    target = base / "copied"
    try:
        command = ["cp", "-r", str(top), str(target)]
        return run(command, program.env, watch=program.processes(), timeout_s=timeout_s)
    finally:
        shutil.rmtree(target, ignore_errors=True)


@contextlib.contextmanager
def mounted(program: Program, base: Path) -> Iterator[tuple[Cost, Path] | None]:
    """Mount the backups: what it cost until the last one could be listed, and where that lies."""
    mountpoint = base / "mount"
    mountpoint.mkdir(exist_ok=True)
    try:
        yield program.mount(mountpoint)
    finally:
        program.unmount(mountpoint)


def cold_mount(name: str, program: Program, base: Path, results: Results) -> None:
    """Mount on a machine that has nothing but the place and the secret.

    Twice, and the better one counts: the first one may wait for the disk that holds the program.
    """
    for _ in range(2):
        program.forget()
        with mounted(program, base) as found:
            if found is not None:
                results.add(name, COLD, program.name, found[0], asked=COLD_S)


def attempt(step: str, program: Program, action: Callable[[], None]) -> None:
    """A peer that cannot do a step leaves a gap; cloudfs must do every one."""
    try:
        action()
    except (Failed, OSError) as error:
        if isinstance(program, Cloudfs):
            raise
        print(f"  {step}: {program.name}: {error}", file=sys.stderr, flush=True)
