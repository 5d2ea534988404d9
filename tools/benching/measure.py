"""Running a command and finding out what it cost: time, memory of the whole tree, processor."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

SAMPLE_S = 0.05
OUTPUT_BYTES = 4000


@dataclass(frozen=True)
class Cost:
    """Seconds, peak proportional set size in MB, and processor seconds of all processes."""

    wall_s: float
    peak_mb: int
    cpu_s: float
    output: str = ""
    """The end of what was printed."""


class Failed(Exception):
    """A command that was to be measured did not succeed."""


def _tree(pid: int) -> list[int]:
    found = [pid]
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            children = Path(f"/proc/{pid}/task/{task}/children").read_text().split()
            for child in children:
                found += _tree(int(child))
    except OSError:
        pass
    return found


def memory_mb(pids: list[int]) -> int:
    """Proportional set size of these processes and all below them, in MB."""
    total = 0
    for pid in {p for root in pids for p in _tree(root)}:
        try:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
        except OSError:
            continue
    return total // 1000


def processor_s(pids: list[int]) -> dict[int, float]:
    """Processor seconds so far of each of these processes and all below them."""
    found = {}
    for pid in {p for root in pids for p in _tree(root)}:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


class _Sampler(threading.Thread):
    """Looks, many times a second, at processes and all below them, until it is told to stop."""

    def __init__(self, pid: int, watch: Sequence[int]) -> None:
        super().__init__(daemon=True)
        self._pids = [pid, *watch]
        self._before = processor_s(list(watch))
        self._spent: dict[int, float] = {}
        self._done = threading.Event()
        self.peak_mb = 0
        self.start()

    def run(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self.peak_mb = max(self.peak_mb, memory_mb(self._pids))
            self._spent |= processor_s(self._pids)

    def stop(self) -> tuple[float, float]:
        """Processor seconds of the processes that were there before, and of the others."""
        self._done.set()
        self.join()
        old = {pid: spent for pid, spent in self._spent.items() if pid in self._before}
        watched = sum(old.values()) - sum(self._before[pid] for pid in old)
        return watched, sum(self._spent.values()) - sum(old.values())


def run(
    command: list[str],
    env: dict[str, str],
    *,
    cwd: Path | None = None,
    watch: Sequence[int] = (),
    timeout_s: float | None = None,
) -> Cost:
    """Run a command to its end; what the processes ``watch`` cost meanwhile is part of its cost.

    Raises Failed when it does not succeed, or not in time.
    """
    before = os.times()
    started = time.perf_counter()
    with subprocess.Popen(
        command, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        sampler = _Sampler(process.pid, watch)
        timer = threading.Timer(timeout_s or 0, process.kill)
        if timeout_s is not None:
            timer.start()
        assert process.stdout is not None
        output = b""
        for line in process.stdout:
            output = (output + line)[-OUTPUT_BYTES:]
        process.wait()
        wall = time.perf_counter() - started
        timer.cancel()
        watched, spent = sampler.stop()
    after = os.times()
    shown = output.decode(errors="replace")
    if timeout_s is not None and wall > timeout_s:
        raise Failed(f"{' '.join(command[:4])} … took more than {timeout_s:g} s")
    if process.returncode != 0:
        raise Failed(f"{' '.join(command[:4])} … ended with {process.returncode}: {shown}")
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    # A process whose parent did not wait for it is only in the samples.
    return Cost(wall, sampler.peak_mb, max(cpu, spent) + watched, shown)


@dataclass
class Results:
    """All figures, by scenario, step and program."""

    rows: dict[tuple[str, str], dict[str, Cost]] = field(default_factory=dict)
    numbers: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    asked: dict[tuple[str, str], float] = field(default_factory=dict)
    """At most so much of a figure."""
    asked_least: dict[tuple[str, str], float] = field(default_factory=dict)
    """At least so much of it."""

    def add(
        self, scenario: str, step: str, program: str, cost: Cost, asked: float | None = None
    ) -> None:
        """Keep the cheaper of this and what an earlier run took. ``asked``: seconds at most."""
        print(f"  {scenario}: {step}: {program}: {cost.wall_s:.2f} s", file=sys.stderr, flush=True)
        row = self.rows.setdefault((scenario, step), {})
        if program not in row or cost.wall_s < row[program].wall_s:
            row[program] = cost
        if asked is not None:
            self.asked[scenario, step] = asked

    def number(
        self,
        scenario: str,
        step: str,
        program: str,
        value: float,
        asked: float | None = None,
        *,
        at_least: float | None = None,
    ) -> None:
        """Keep a figure that is no time: MB, requests. ``asked``: so much at most."""
        print(f"  {scenario}: {step}: {program}: {value:g}", file=sys.stderr, flush=True)
        self.numbers.setdefault((scenario, step), {})[program] = value
        if asked is not None:
            self.asked[scenario, step] = asked
        if at_least is not None:
            self.asked_least[scenario, step] = at_least

    def figure(self, scenario: str, step: str) -> float | None:
        """What cloudfs took of this, in seconds or whatever else it is; None if not measured."""
        row = self.rows.get((scenario, step), {})
        if "cloudfs" in row:
            return row["cloudfs"].wall_s
        return self.numbers.get((scenario, step), {}).get("cloudfs")

    def print(self, scenario: str) -> None:
        """A table of one scenario. The ratio is the best peer's figure over that of cloudfs."""
        print(f"\n{scenario}")
        for (name, step), row in self.rows.items():
            if name == scenario:
                shown = "  ".join(
                    f"{program} {cost.wall_s:.2f} s {cost.peak_mb} MB {cost.cpu_s:.1f} cpu"
                    for program, cost in row.items()
                )
                self._print(scenario, step, shown, {p: c.wall_s for p, c in row.items()})
        for (name, step), values in self.numbers.items():
            if name == scenario:
                shown = "  ".join(f"{program} {value:g}" for program, value in values.items())
                self._print(scenario, step, shown, values)
        sys.stdout.flush()

    def _print(self, scenario: str, step: str, shown: str, values: dict[str, float]) -> None:
        most = self.asked.get((scenario, step))
        least = self.asked_least.get((scenario, step))
        verdict = ""
        if most is not None and "cloudfs" in values:
            verdict += f"  asked ≤ {most:g}: {'yes' if values['cloudfs'] <= most else 'NO'}"
        if least is not None and "cloudfs" in values:
            verdict += f"  asked ≥ {least:g}: {'yes' if values['cloudfs'] >= least else 'NO'}"
        print(f"  {step:46} {shown}{_ratio(values)}{verdict}")

    def as_json(self) -> list[dict[str, object]]:
        """The same for programs."""
        found: list[dict[str, object]] = []
        for (scenario, step), row in self.rows.items():
            for program, cost in row.items():
                figures = {"wall_s": cost.wall_s, "peak_mb": cost.peak_mb, "cpu_s": cost.cpu_s}
                found.append({"scenario": scenario, "step": step, "program": program, **figures})
        for (scenario, step), values in self.numbers.items():
            for program, value in values.items():
                found.append(
                    {"scenario": scenario, "step": step, "program": program, "value": value}
                )
        return found


def _ratio(values: dict[str, float]) -> str:
    peers = [value for program, value in values.items() if not program.startswith("cloudfs")]
    if "cloudfs" not in values or not peers or not values["cloudfs"]:
        return ""
    return f"  best peer / cloudfs {min(peers) / values['cloudfs']:.2f}"
