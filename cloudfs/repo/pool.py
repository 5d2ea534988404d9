"""Worker processes: how they start, what each of them holds, how they end.

Workers are forked, but only from a server process that imported the modules and did nothing else
(multiprocessing's "forkserver"): no LMDB environment, no key and no thread is ever carried over a
fork, imports are paid for once, and the pages of the interpreter are shared between workers. Each
worker then opens the repository for itself from what came over a pipe.

A worker ends when the coordinator does, however that ends: a thread of its own waits for that. The
server does not end before its last worker (they hold its pipe open), and a worker asks the kernel
to be killed with the server, so that nothing is left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cloudfs.db.local import LocalState
from cloudfs.repo.repository import Opening, Repository
from cloudfs.store.open import StoreOptions, open_store

_SAFE_PATH = "PYTHONSAFEPATH"
PRELOAD = ["cloudfs.backup.worker", "cloudfs.restore.worker"]
_PR_SET_PDEATHSIG = 1
_QUIET_TRACKER = "ignore::UserWarning:multiprocessing.resource_tracker"
"""When the coordinator is killed, the interpreter's helper would tell the user of semaphores."""


@dataclass(frozen=True)
class WorkerOpening:
    """All that a worker needs to open the same repository. Goes over a pipe only."""

    url: str
    options: StoreOptions
    opening: Opening
    cache_dir: Path
    state_dir: Path


_repository: Repository | None = None


def repository() -> Repository:
    """The repository as this worker opened it."""
    assert _repository is not None, "only to be called in a worker"
    return _repository


def open_for_worker(given: WorkerOpening) -> Repository:
    """Open a repository from what another process handed over."""
    store = open_store(given.url, given.options)
    local = LocalState(given.cache_dir, given.state_dir)
    return Repository.reopen(store, given.opening, local)


def _start(given: WorkerOpening) -> None:
    global _repository  # noqa: PLW0603  # a worker process is made for one repository
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        os._exit(1)  # the server died before the line above took effect
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    # Workers make many small values and hardly any cycles: what was imported need never be looked
    # at again, and the rest seldom.
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the coordinator decides what Ctrl-C means
    _repository = open_for_worker(given)


def _end_with_parent() -> None:
    """End this process when the coordinator has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "only to be called in a worker"
    parent.join()
    os._exit(1)


def prepare() -> None:
    """Start the server of worker processes, for who knows early that there will be a pool.

    Does not wait for its imports.
    """
    from multiprocessing import forkserver

    if _QUIET_TRACKER not in sys.warnoptions:
        sys.warnoptions.append(_QUIET_TRACKER)  # handed down to helpers when they are started
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    # The server would look for modules in the current directory first, which may be anybody's.
    # Who starts it has no other process to start meanwhile.
    kept = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    try:
        forkserver.ensure_running()
    finally:
        if kept is None:
            del os.environ[_SAFE_PATH]
        else:
            os.environ[_SAFE_PATH] = kept


class WorkerPool(ProcessPoolExecutor):
    """A pool of processes that hold the repository open.

    It is made at once; the processes are started by a thread, since each start waits for the
    server's imports. A task that is submitted before ``started`` is set waits for that.
    """

    def __init__(self, workers: int, given: WorkerOpening) -> None:
        prepare()
        super().__init__(workers, multiprocessing.get_context("forkserver"), _start, (given,))
        self.started = threading.Event()
        threading.Thread(target=self._start_all, args=(workers,), name="start", daemon=True).start()

    def _start_all(self, workers: int) -> None:
        """Start the processes. What fails here fails again for who submits a task."""
        # A worker would otherwise import the program's main module, which it has no use for.
        main = sys.modules["__main__"]
        kept = main.__dict__.pop("__file__", None)
        try:
            with contextlib.suppress(RuntimeError, OSError):
                for _ in range(workers):
                    self.submit(_nothing)
        finally:
            if kept is not None:
                main.__dict__["__file__"] = kept
            self.started.set()


def _nothing() -> None:
    """What starts a worker."""
