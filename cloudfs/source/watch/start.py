"""Starting and stopping the watch daemon of a policy."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import lmdb
import msgspec

from cloudfs.core.errors import SourceError
from cloudfs.db.watched import WatchedSet
from cloudfs.source.filters import Filters
from cloudfs.source.numbers import kind_keeps_numbers
from cloudfs.source.watch import client
from cloudfs.source.watch.daemon import Daemon, WatchJob
from cloudfs.source.watch.places import Place, places_of
from cloudfs.source.watch.protocol import EVENTS, LOCK, Question

END_TIMEOUT_S = 30.0
PAUSE_S = 0.01
_SECRETS = "CLOUDFS_PASSPHRASE"


def job_for(name: str, directory: Path, sources: list[bytes], filters: Filters) -> WatchJob:
    """What the daemon of a policy is to do. Raises SourceError where the tree cannot be watched."""
    places: dict[int, Place] = {}
    for place in sorted(places_of(sources, filters).found, key=lambda place: not place.is_source):
        _check(place, name)
        _check_alone(place, places.values(), name)
        places.setdefault(place.device, place)
    return WatchJob(
        str(directory),
        [place.path for place in places.values()],
        {device: place.fsid for device, place in places.items()},
        [_advice(place, name) for place in places.values()],
    )


def _check(place: Place, name: str) -> None:
    shown = os.fsdecode(place.path)
    if place.kind == "btrfs" and place.is_source:
        raise SourceError(
            f"{shown} is on btrfs, which tells by itself what changed. Make a subvolume the source"
            f" and use `cloudfs policy set {name} --snapshot btrfs`."
        )
    if place.kind == "btrfs":
        raise SourceError(f"{shown} is on btrfs, which is not watched. {_advice(place, name)}")
    if not kind_keeps_numbers(place.kind):
        raise SourceError(
            f"{shown} is on {place.kind}, where inodes get other numbers at any time, so what"
            f" changes there cannot be followed. {_advice(place, name)}"
        )
    if not place.has_births:
        raise SourceError(
            f"{shown} is on a file system that keeps no times of birth, so a directory is not told"
            f" from a later one that got its inode number. {_advice(place, name)}"
        )


def _check_alone(place: Place, others: Iterable[Place], name: str) -> None:
    for other in others:
        if other.fsid == place.fsid and other.device != place.device:
            raise SourceError(
                f"{os.fsdecode(place.path)} has the id of the file system of"
                f" {os.fsdecode(other.path)}, as a copy of it, so what changes in one is not told"
                f" from what changes in the other. {_advice(place, name)}"
            )


def _advice(place: Place, name: str) -> str:
    """What to do where a place cannot be watched."""
    scan = f"`cloudfs policy set {name} --snapshot scan`"
    if place.is_source:
        return f"Use another change source: {scan}."
    return f"Leave it out (--exclude, --one-file-system), or use another change source: {scan}."


def start(job: WatchJob) -> int:
    """Start a daemon and return its process id when it listens. Raises SourceError."""
    process = _spawn()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(msgspec.json.encode(job))
    process.stdin.close()
    said = process.stdout.readline()
    process.stdout.close()
    if not said:
        process.wait()
        raise SourceError(f"the watch daemon ended at once (exit code {process.returncode}).")
    error: str = msgspec.json.decode(said)
    if error:
        process.wait()
        raise SourceError(error)
    return process.pid


def _spawn() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "cloudfs.source.watch.daemon"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        cwd="/",
        env={name: value for name, value in os.environ.items() if not name.startswith(_SECRETS)},
    )


def serve(job: WatchJob, announce: Callable[[], None]) -> None:
    """Be the daemon, in this process, until told to stop. Raises SourceError."""
    daemon = Daemon(job)
    announce()
    daemon.run()


def is_readable(directory: Path) -> bool:
    """Whether syncs can read what the daemon of a directory heard."""
    try:
        WatchedSet(directory / EVENTS, writer=False).close()
    except (lmdb.Error, OSError):
        return False
    return True


def stop(directory: Path) -> int:
    """Stop the daemon of a directory, and wait till another one can take its place; its process
    id. Raises :class:`client.NoDaemon`."""
    pid = client.ask(directory, Question("stop")).pid
    deadline = time.monotonic() + END_TIMEOUT_S
    with contextlib.suppress(FileNotFoundError), open(directory / LOCK, "rb") as lock:
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                break
            time.sleep(PAUSE_S)
    return pid
