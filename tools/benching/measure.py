"""Running a command and finding out what it cost: time, memory of the whole tree, processor."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

SAMPLE_S = 0.05


@dataclass(frozen=True)
class Cost:
    """Seconds, peak proportional set size in MB, and processor seconds of all processes."""

    wall_s: float
    peak_mb: int
    cpu_s: float


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


def run(
    command: list[str], env: dict[str, str], *, cwd: Path | None = None, watch: int = 0
) -> Cost:
    """Run a command to its end; ``watch`` is a further process whose memory counts."""
    before = os.times()
    started = time.perf_counter()
    with subprocess.Popen(
        command, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        peak = 0
        spent: dict[int, float] = {}
        done = threading.Event()

        def sample() -> None:
            nonlocal peak
            while not done.wait(SAMPLE_S):
                spent.update(processor_s([process.pid]))
                peak = max(peak, memory_mb([process.pid, *([watch] if watch else [])]))

        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
        assert process.stdout is not None
        output = b""
        for line in process.stdout:
            output = (output + line)[-2000:]
        process.wait()
        wall = time.perf_counter() - started
        done.set()
        sampler.join()
    after = os.times()
    if process.returncode != 0:
        shown = output.decode(errors="replace")
        raise Failed(f"{' '.join(command[:4])} … ended with {process.returncode}: {shown}")
    cpu = after.children_user + after.children_system - before.children_user
    # A process whose parent did not wait for it is only in the samples.
    return Cost(wall, peak, max(cpu - before.children_system, sum(spent.values())))


@dataclass
class Results:
    """All figures, by scenario, step and program."""

    rows: dict[tuple[str, str], dict[str, Cost]] = field(default_factory=dict)
    numbers: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)

    def add(self, scenario: str, step: str, program: str, cost: Cost) -> None:
        """Keep the cheaper of this and what an earlier run took."""
        print(f"  {scenario}: {step}: {program}: {cost.wall_s:.2f} s", file=sys.stderr, flush=True)
        row = self.rows.setdefault((scenario, step), {})
        if program not in row or cost.wall_s < row[program].wall_s:
            row[program] = cost

    def number(self, scenario: str, step: str, program: str, value: float) -> None:
        """Keep a figure that is no time: MB, requests."""
        print(f"  {scenario}: {step}: {program}: {value:g}", file=sys.stderr, flush=True)
        self.numbers.setdefault((scenario, step), {})[program] = value

    def print(self, scenario: str) -> None:
        """A table of one scenario. The ratio is the best peer's figure over that of cloudfs."""
        print(f"\n{scenario}")
        for (name, step), row in self.rows.items():
            if name == scenario:
                shown = "  ".join(
                    f"{program} {cost.wall_s:.2f} s {cost.peak_mb} MB {cost.cpu_s:.1f} cpu"
                    for program, cost in row.items()
                )
                print(f"  {step:34} {shown}{_ratio({p: c.wall_s for p, c in row.items()})}")
        for (name, step), values in self.numbers.items():
            if name == scenario:
                shown = "  ".join(f"{program} {value:g}" for program, value in values.items())
                print(f"  {step:34} {shown}{_ratio(values)}")
        sys.stdout.flush()

    def as_json(self) -> list[dict[str, object]]:
        """The same for programs."""
        found: list[dict[str, object]] = []
        for (scenario, step), row in self.rows.items():
            for program, cost in row.items():
                found.append({"scenario": scenario, "step": step, "program": program} | vars(cost))
        for (scenario, step), values in self.numbers.items():
            for program, value in values.items():
                found.append(
                    {"scenario": scenario, "step": step, "program": program, "value": value}
                )
        return found


def _ratio(values: dict[str, float]) -> str:
    peers = [value for program, value in values.items() if program != "cloudfs"]
    if "cloudfs" not in values or not peers or not values["cloudfs"]:
        return ""
    return f"  best peer / cloudfs {min(peers) / values['cloudfs']:.2f}"
