"""Daemons that need not import anything first, for tests that start thousands of them.

A fresh interpreter takes a quarter of a second to import what a daemon needs, many times what all
else in a step of a state machine takes. Here a process that has imported it, and has no threads,
forks one for each that is wanted: processes of their own, which are killed as others are. They are
no children of the test, so it waits for them by descriptor.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import os
import select
import signal
import socket
import subprocess
import sys
from typing import IO


class Forked:
    """A daemon, with what of ``subprocess.Popen`` is asked for."""

    def __init__(self, pid: int, pidfd: int, stdin: IO[bytes], stdout: IO[bytes]) -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self.returncode: int | None = None
        self._pidfd = pidfd

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. What its exit code was is not known; 0 is said."""
        if self.returncode is None:
            if not _readable(self._pidfd, timeout):
                raise subprocess.TimeoutExpired("a forked daemon", timeout or 0)
            self.returncode = 0
        return 0

    def __del__(self) -> None:
        os.close(self._pidfd)

    def terminate(self) -> None:
        """Tell it to end."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)


def live(_environment: object = None) -> Forked:
    """The daemon of a mount (see cloudfs.fuse.daemon)."""
    return _fork(b"m")


def live_with_few(_environment: object = None) -> Forked:
    """One that closes its descriptors as soon as it can, as if there were too many of them."""
    return _fork(b"f")


def watch() -> Forked:
    """The daemon that hears of changes (see cloudfs.source.watch.daemon)."""
    return _fork(b"w")


def wait(pid: int) -> None:
    """Wait for the end of a process, whoever's child it is."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        _readable(pidfd, None)
        os.close(pidfd)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _readable(fd: int, timeout: float | None) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout is None else timeout * 1000))


def _fork(which: bytes) -> Forked:
    given, into = os.pipe()
    out, answered = os.pipe()
    server = _server()
    socket.send_fds(server, [which], [given, answered])
    os.close(given)
    os.close(answered)
    said, fds, _, _ = socket.recv_fds(server, 16, 1)
    return Forked(int(said), fds[0], os.fdopen(into, "wb"), os.fdopen(out, "rb"))


@functools.cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.engine.forked"], stdin=theirs, stdout=subprocess.DEVNULL
    )
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def serve(line: socket.socket) -> None:
    """Fork whenever asked to."""
    from cloudfs.fuse import daemon
    from cloudfs.source.watch import daemon as watcher

    for name in ("cloudfs.fuse.live.serve", "cloudfs.fuse.mount"):  # what daemon.main imports
        importlib.import_module(name)
    gc.freeze()
    while True:
        which, fds, _, _ = socket.recv_fds(line, 1, 2)
        if not which:
            return
        # Only now: until then the number of one that ended is nobody else's, who kills by number.
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        pid = os.fork()
        if not pid:
            line.close()
            os.setsid()
            for fd, standard in zip(fds, (0, 1), strict=True):
                os.dup2(fd, standard)
                os.close(fd)
            if which == b"f":
                _have_few_descriptors()
            os._exit(watcher.main() if which == b"w" else daemon.main())
        for fd in fds:
            os.close(fd)
        pidfd = os.pidfd_open(pid)
        socket.send_fds(line, [b"%d" % pid], [pidfd])
        os.close(pidfd)


def _have_few_descriptors() -> None:
    from cloudfs.core import limits
    from cloudfs.fuse.live import files, freeze, inodes

    limits.raise_file_limit = lambda: 8
    files._AT_ONCE = inodes._EVICTED_AT_ONCE = freeze.READERS = 1
    # By this limit a freeze would be given up with the second item removed: it is not to be.
    freeze.Freeze.lose = lambda _self, _inode: None  # type: ignore[method-assign]


if __name__ == "__main__":
    serve(socket.socket(fileno=os.dup(0)))
