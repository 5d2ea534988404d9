"""The process that serves a mount after the command has returned.

1. It is a fresh interpreter, not a fork: threads, LMDB environments and the state of the TLS
   library do not survive one. It is started early, so that it imports while the command still
   opens the repository.
2. The job, which holds keys, goes to its standard input; nothing secret stands in its arguments
   or its environment, which can be read for as long as the mount is there. End of file without a
   job ends it.
3. It answers on its standard output with None when the mount is there, or with the error that the
   command is to show. After that it belongs to itself: own session, no terminal, errors to the
   log file.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from logging.handlers import RotatingFileHandler
from typing import TYPE_CHECKING

from cloudfs.core.errors import CloudfsError

if TYPE_CHECKING:
    from cloudfs.fuse.job import MountJob
    from cloudfs.fuse.live.job import LiveJob

LOG_BYTES = 1 << 20
SECRETS = "CLOUDFS_PASSPHRASE"

_M_ARENA_MAX = -8  # malloc.h
_M_MMAP_THRESHOLD = -3


class Daemon:
    """A mount process that waits for its job."""

    def __init__(self, *, environment: Mapping[str, str] | None = None) -> None:
        """Start the process; returns at once.

        ``environment``: its own, if not this process's; passphrases in it are left out.
        """
        self._process = _spawn(os.environ if environment is None else environment)

    @property
    def pid(self) -> int:
        """The process id, by which the mount can be told to end (SIGTERM)."""
        return self._process.pid

    def mount(self, job: MountJob | LiveJob) -> None:
        """Hand the job over and return when the mount is there. Raises what kept it from that."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            try:
                self._process.stdin.write(pickle.dumps(job))
                self._process.stdin.close()
                answer = self._process.stdout.read()
            except BrokenPipeError:
                answer = b""
        except BaseException:
            self.cancel()
            raise
        self._process.stdout.close()
        if not answer:
            self._process.wait()
            raise CloudfsError(
                f"the mount's process ended (exit code {self._process.returncode}) before it was"
                " ready; run `cloudfs mount --foreground` to see why."
            )
        error = pickle.loads(answer)
        if error is not None:
            self._process.wait()
            raise error

    def cancel(self) -> None:
        """End the process, mounted or not."""
        assert self._process.stdin is not None
        if not self._process.stdin.closed:
            self._process.stdin.close()
        self._process.terminate()
        self._process.wait()

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait until the mount has ended; its exit code."""
        return self._process.wait(timeout_s)


def _spawn(environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "cloudfs.fuse.daemon"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        env={name: value for name, value in environment.items() if not name.startswith(SECRETS)},
    )


def log_to(job: MountJob | LiveJob) -> None:
    """Send what goes wrong from now on to the job's log file, if it has one."""
    if job.log_file is None:
        return
    job.log_file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handler = RotatingFileHandler(job.log_file, maxBytes=LOG_BYTES, backupCount=1, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)


def main() -> int:
    """The process itself. Returns its exit code."""
    from cloudfs.fuse.live.serve import serve as serve_live
    from cloudfs.fuse.mount import MountJob, serve  # while the command opens the repository

    received = sys.stdin.buffer.read()
    if not received:
        return 0
    _return_memory()
    job: MountJob | LiveJob = pickle.loads(received)
    del received
    os.chdir("/")
    answered = False

    def answer(error: Exception | None) -> None:
        nonlocal answered
        if not answered:
            sys.stdout.buffer.write(pickle.dumps(error))
            sys.stdout.buffer.flush()
            _let_go()
        answered = True

    try:
        log_to(job)
        if isinstance(job, MountJob):
            serve(job, lambda: answer(None))
        else:
            serve_live(job, lambda: answer(None))
    except CloudfsError as error:
        answer(error)
        logging.getLogger(__name__).error("%s", error)
        return 1
    except OSError as error:
        answer(CloudfsError(f"{job.mountpoint} could not be mounted: {error}."))
        logging.getLogger(__name__).error("%s", error)
        return 1
    return 0


def _return_memory() -> None:
    """Have malloc give large blocks back at once, and keep no pool of them for each thread.

    The process lives long and handles frames of a MiB in many threads; left to itself, glibc
    holds on to several times what is in use. Other C libraries have no such call, nor the need.
    """
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, 2)
        mallopt(_M_MMAP_THRESHOLD, 128 * 1024)


def _let_go() -> None:
    """No longer use the terminal and pipes of the command."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (2, 0, 1):  # the command goes on as soon as 1 is closed
        os.dup2(null, fd)
    os.close(null)


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    os._exit(code)  # a thread that waits for the store must not keep the process (serve, rule 4)
