"""How many system calls a sync makes on a tree, by strace."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from benching.measure import Failed

STRACE = ["strace", "-f", "-y", "-qq", "-s", "0", "-e", "trace=%file,%desc"]
"""All calls that take a path or a descriptor, each descriptor with its path beside it."""
ATTACH_S = 10.0


def calls(
    command: list[str], env: dict[str, str], daemons: list[int], tree: Path, base: Path
) -> int | None:
    """Calls of a command and of the daemons that serve it on anything at or below ``tree``.

    None, with a word of it, where there is no strace.
    """
    if shutil.which("strace") is None:
        print("  strace is missing: system calls are left out", file=sys.stderr, flush=True)
        return None
    found = 0
    own = base / "strace.command"
    with contextlib.ExitStack() as stack:
        logs = [own]
        for pid in daemons:
            logs.append(base / f"strace.{pid}")
            stack.enter_context(_attached(pid, logs[-1]))
        done = subprocess.run(
            [*STRACE, "-o", str(own), *command], env=env, capture_output=True, check=False
        )
        if done.returncode:
            raise Failed(f"strace {command[0]}: {done.stderr.decode()[-500:]}")
    for log in logs:
        with log.open(errors="replace") as lines:
            found += count(lines, str(tree))
        log.unlink()
    return found


def count(lines: Iterable[str], tree: str) -> int:
    """The lines of a trace that speak of a path at or below ``tree``."""
    return sum(f"{tree}/" in line or f"{tree}>" in line or f'{tree}"' in line for line in lines)


@contextlib.contextmanager
def _attached(pid: int, log: Path) -> Iterator[None]:
    command = [*STRACE, "-o", str(log), "-p", str(pid)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as tracer:
        try:
            _wait_for_tracer(pid)
            yield
        finally:
            tracer.send_signal(signal.SIGINT)


def _wait_for_tracer(pid: int) -> None:
    """Until each thread of it is traced."""
    ends = time.monotonic() + ATTACH_S
    while time.monotonic() < ends:
        tasks = [f"/proc/{pid}/task/{task}/status" for task in os.listdir(f"/proc/{pid}/task")]
        if not any("TracerPid:\t0\n" in Path(status).read_text() for status in tasks):
            return
        time.sleep(0.05)
    raise Failed(f"strace did not attach to process {pid}")
