"""Live mounts of a directory, beside a bare directory on the same file system."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from cloudfs.fuse import daemon as daemons
from cloudfs.fuse import mountpoint as places
from cloudfs.fuse.daemon import Daemon
from cloudfs.fuse.live.job import LiveJob
from tests.engine import loops

MEMORY = "/dev/shm"
BLOCK = 64 * 1024


@dataclass
class Pair:
    """Two directories on one file system: one mounted live over itself, one as it is."""

    kind: str  # of the file system beneath
    base: Path
    log: Path
    daemon: Daemon
    state: Path

    @property
    def live(self) -> Path:
        """The tree that is mounted live, over itself."""
        return self.base / "live"

    @property
    def bare(self) -> Path:
        """Its neighbour."""
        return self.base / "bare"


def job(source: Path, state: Path, **changes: object) -> LiveJob:
    """The job to mount a directory over itself."""
    made = LiveJob(
        str(source),
        str(source),
        state,
        "home",
        block_size=BLOCK,
        room_bytes=64 << 20,
        waits=True,
        log_file=state / "log",
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]  # a test's shorthand


@contextlib.contextmanager
def mounted(wanted: LiveJob) -> Iterator[Daemon]:
    """Mount, and take the mount away at the end, even where its process hangs."""
    daemon = Daemon()
    try:
        daemon.mount(wanted)
        yield daemon
    finally:
        daemon.cancel()
        if any(found.mountpoint == wanted.mountpoint for found in places.mounts()):
            places.unmount(wanted.mountpoint, lazy=True)


@contextlib.contextmanager
def pair(kind: str, size: int = 400 << 20) -> Iterator[Pair]:
    """A pair on "tmpfs" or "ext4". Everyone may go in."""
    work = Path(tempfile.mkdtemp(prefix="cloudfs-posix-", dir=MEMORY))
    work.chmod(0o755)
    try:
        with _beneath(work, kind, size) as base:
            for name in ("live", "bare"):
                (base / name).mkdir()
                (base / name).chmod(0o777)
            state = work / "state"
            with mounted(job(base / "live", state)) as daemon:
                yield Pair(kind, base, state / "log", daemon, state)
    finally:
        shutil.rmtree(work)


@contextlib.contextmanager
def _beneath(work: Path, kind: str, size: int) -> Iterator[Path]:
    if kind == "tmpfs":
        base = work / "tree"
        base.mkdir()
        yield base
        return
    with loops.file_system(work, kind, size) as base:
        base.chmod(0o755)
        yield base


def few_descriptors(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let the process of every mount from now on have no more descriptors than these."""
    spawn = daemons._spawn

    def with_few(environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        process = spawn(environment)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (count, count))
        return process

    monkeypatch.setattr(daemons, "_spawn", with_few)


def complaints(pair: Pair) -> str:
    """What the mount's process wrote into its log."""
    return pair.log.read_text() if pair.log.exists() else ""


def number_of_open_files(daemon: Daemon) -> int:
    """How many descriptors the mount's process holds."""
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))
