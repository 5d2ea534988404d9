"""Only one sync of a policy at a time: a lock on this machine, a lease in the repository."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cloudfs.backup.job import SyncEvents, SyncJob
from cloudfs.core.errors import Held
from cloudfs.repo.history import History
from cloudfs.repo.lease import Lease, acquire

_POLL_S = 0.2


@contextlib.contextmanager
def local_lock(
    directory: Path, name: str, wait_s: float, on_wait: Callable[[str], None]
) -> Iterator[None]:
    """Hold the lock of the policy of this name on this machine; it ends with the process, however
    that ends. Raises Held where somebody else has it for ``wait_s``."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + wait_s
        said = False
        while not _try_lock(fd):
            text = _held_text(name, fd)
            if time.monotonic() >= deadline:
                raise Held(text)
            if not said:
                on_wait(text)
                said = True
            time.sleep(_POLL_S)
        os.ftruncate(fd, 0)
        who = f"process {os.getpid()}, since {time.strftime('%H:%M:%S')}"
        os.pwrite(fd, who.encode(), 0)
        yield
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _held_text(name: str, fd: int) -> str:
    who = os.pread(fd, 64, 0).decode(errors="replace").strip() or "another process"
    return (
        f"{name} is being synced by this machine ({who})."
        f" Wait for it, or `cloudfs sync {name} --wait`."
    )


@contextlib.contextmanager
def held_lease(
    job: SyncJob, history: History, events: SyncEvents
) -> Iterator[tuple[Lease | None, bool]]:
    """Hold the lease in the repository; the second value says it was taken over from somebody.

    A dry run writes nothing, so it holds none.
    """
    if job.dry_run:
        yield None, False
        return
    lease, took_over = acquire(history, wait_s=job.wait_s, on_wait=events.note)
    try:
        yield lease, took_over
    finally:
        lease.release()
