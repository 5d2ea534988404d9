"""The kernel tree in a real S3 server on the loopback, seen through a proxy or not."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benching import data
from benching.measure import Cost, Failed, Results
from benching.programs import Program
from benching.proxy import Exchange, Proxy, Tally
from benching.steps import COLD, attempt, cold_mount, copy, mounted, restore
from tests.servers import S3Server, seaweedfs  # what the tests use

COPIED = "drivers/net"
COPY = f"cp -r {COPIED}"
RESTORE = "restore"
DELAY_S = 0.05
LIMIT_S = 120.0
"""How long a step may take that waits for many requests, one after the other."""


@contextlib.contextmanager
def _server(program: Program, source: Path) -> Iterator[None]:
    """A server with an empty repository."""
    with seaweedfs() as server:
        program.fresh(source, server.bucket, _environment(server, server.endpoint_url))
        yield
    shutil.rmtree(program.base)


@contextlib.contextmanager
def _proxied(program: Program, source: Path) -> Iterator[Proxy]:
    """The same behind a proxy."""
    with seaweedfs() as server, Proxy(server.endpoint_url) as proxy:
        program.fresh(source, server.bucket, _environment(server, proxy.url))
        yield proxy
    shutil.rmtree(program.base)


def _environment(server: S3Server, endpoint_url: str) -> dict[str, str]:
    return {**server.environment, "ENDPOINT": endpoint_url}


def s3(base: Path, programs: list[Program], results: Results) -> None:
    """First backup, unchanged, restore, cold mount."""
    source = data.kernel(base, "6.1")
    for program in programs:
        if not program.speaks_s3:
            continue
        with _server(program, source):
            results.add("s3", "first backup", program.name, program.backup(source))
            results.add("s3", "unchanged", program.name, program.backup(source))
            results.add("s3", "restore", program.name, restore(program, source, base))
            attempt("cold mount", program, partial(cold_mount, "s3", program, base, results))


class _Counting:
    """One program, whose requests are counted step by step."""

    def __init__(self, program: Program, proxy: Proxy, results: Results) -> None:
        self.program, self.proxy, self.results = program, proxy, results

    def number(self, step: str, value: float, asked: float | None = None) -> None:
        self.results.number("requests", step, self.program.name, value, asked)

    def own(self, step: str, tally: Tally, cost: Cost) -> None:
        """Compare with what the program says of itself: nothing should be left over."""
        for kind, value in self.program.requests(cost).items():
            difference = abs(getattr(tally, kind) - value)
            self.number(f"{step}: {kind}, off its own count", difference, 0)

    def backups(self, source: Path) -> None:
        self.proxy.take()
        cost = self.program.backup(source)
        tally = Tally.of(self.proxy.take())
        self.number("first sync: PUTs", tally.puts, 21)
        self.number("first sync: requests", tally.requests)
        self.own("first sync", tally, cost)
        cost = self.program.backup(source)
        exchanges = self.proxy.take()
        self.show("unchanged sync", exchanges)
        tally = Tally.of(exchanges)
        self.number("unchanged sync: requests", tally.requests, 8)
        self.own("unchanged sync", tally, cost)

    def browse(self, base: Path) -> None:
        self.program.forget()
        self.proxy.take()
        with mounted(self.program, base) as found:
            exchanges = self.proxy.take()
            if found is None:
                return
            self.show(COLD, exchanges)
            tally = Tally.of(exchanges)
            self.number(f"{COLD}: requests", tally.requests, 10)
            self.number(f"{COLD}: MB", round(tally.bytes_down / 1e6, 3), 1)
            copy(self.program, found[1] / COPIED, base)
            tally = Tally.of(self.proxy.take())
            self.number(f"{COPY}: GETs", tally.gets, 100)
            self.number(f"{COPY}: MB", round(tally.bytes_down / 1e6, 1))

    def restore(self, source: Path, base: Path, step: str) -> None:
        cost = restore(self.program, source, base, begin=self.proxy.take)
        tally = Tally.of(self.proxy.take())
        self.number(f"{step}: GETs", tally.gets, 30)
        self.number(f"{step}: requests", tally.requests)
        self.own(step, tally, cost)

    def show(self, step: str, exchanges: list[Exchange]) -> None:
        for one in exchanges:
            since_s = one.at_s - exchanges[0].at_s
            print(f"    {step}: {self.program.name}: {since_s:.3f} s: {one}", file=sys.stderr)


def requests(base: Path, programs: list[Program], results: Results) -> None:
    """How many requests and bytes each step takes."""
    source = data.kernel(base, "6.1")
    for program in programs:
        if not program.speaks_s3:
            continue
        with _proxied(program, source) as proxy:
            counting = _Counting(program, proxy, results)
            counting.backups(source)
            counting.restore(source, base, RESTORE)
            attempt("mount", program, partial(counting.browse, base))
            program.forget()
            counting.restore(source, base, "cold restore")


def latency(base: Path, programs: list[Program], results: Results) -> None:
    """How much longer each step takes when every request takes 50 ms more."""
    source = data.kernel(base, "6.1")
    for program in programs:
        if not program.speaks_s3:
            continue
        with _proxied(program, source) as proxy:
            results.add("latency", "first backup", program.name, program.backup(source))
            restored = partial(_cold_restore, program, source, base)
            copied = partial(_cold_copy, program, base)
            for step, asked, action in ((RESTORE, 2, restored), (COPY, 5, copied)):
                slowed = _Slowed(step, asked, action)
                attempt(step, program, partial(slowed.compare, program, proxy, results))


def _cold_restore(program: Program, source: Path, base: Path) -> Cost:
    program.forget()  # or the second time would find what the first one cached
    return restore(program, source, base, timeout_s=LIMIT_S)


def _cold_copy(program: Program, base: Path) -> Cost:
    program.forget()
    with mounted(program, base) as found:
        if found is None:
            raise Failed("cannot mount")
        return copy(program, found[1] / COPIED, base, timeout_s=LIMIT_S)


@dataclass(frozen=True)
class _Slowed:
    """A step that is taken without and with waiting for the network."""

    step: str
    asked: float
    """So many seconds more, at most."""
    action: Callable[[], Cost]

    def compare(self, program: Program, proxy: Proxy, results: Results) -> None:
        walls_s = []
        for proxy.delay_s in (0.0, DELAY_S):
            cost = self.action()
            step = f"{self.step}, +{proxy.delay_s * 1000:g} ms"
            results.add("latency", step, program.name, cost)
            walls_s.append(cost.wall_s)
        longer_s = round(walls_s[1] - walls_s[0], 2)
        results.number("latency", f"{self.step}: s longer", program.name, longer_s, self.asked)
