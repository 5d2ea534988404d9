"""Locks between processes."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import time
from pathlib import Path

from tests.posix.case import Answer, case, in_process, said, write_file

NOW = fcntl.LOCK_NB
OFD_GETLK, OFD_SETLK = 36, 37


def _try(lock: int) -> object:
    """Whether another process can have the whole file."""

    def run() -> object:
        with Path("f").open("r+b") as file:
            return said(fcntl.flock, file, lock | NOW)

    return in_process(run)


def _try_range(lock: int, start: int, length: int) -> object:
    def run() -> object:
        with Path("f").open("r+b") as file:
            return said(fcntl.lockf, file, lock | NOW, length, start)

    return in_process(run)


@case
def whole_files() -> Answer:
    write_file("f")
    found: Answer = {}
    with Path("f").open("r+b") as file:
        for name, lock in (("shared", fcntl.LOCK_SH), ("exclusive", fcntl.LOCK_EX)):
            fcntl.flock(file, lock)
            found[f"{name}: another shared"] = _try(fcntl.LOCK_SH)
            found[f"{name}: another exclusive"] = _try(fcntl.LOCK_EX)
        with Path("f").open("r+b") as again:
            found["a second time"] = said(fcntl.flock, again, fcntl.LOCK_EX | NOW)
        fcntl.flock(file, fcntl.LOCK_UN)
        found["unlocked"] = _try(fcntl.LOCK_EX)
        fcntl.flock(file, fcntl.LOCK_EX)
    found["closed"] = _try(fcntl.LOCK_EX)
    return found


@case
def ranges() -> Answer:
    write_file("f", b"x" * 100)
    found: Answer = {}
    with Path("f").open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 10, 20)
        fcntl.lockf(file, fcntl.LOCK_SH, 10, 50)
        for start, length in ((0, 20), (15, 10), (29, 1), (30, 20), (50, 5), (60, 0), (0, 0)):
            for name, lock in (("read", fcntl.LOCK_SH), ("write", fcntl.LOCK_EX)):
                found[f"{name} {start}+{length}"] = _try_range(lock, start, length)
        fcntl.lockf(file, fcntl.LOCK_UN, 5, 22)
        found["split"] = _try_range(fcntl.LOCK_EX, 22, 5), _try_range(fcntl.LOCK_EX, 27, 1)
        with Path("f").open("rb"):
            pass
        found["lost by closing another descriptor"] = _try_range(fcntl.LOCK_EX, 20, 2)
    return found


@case
def ranges_of_descriptors() -> Answer:
    """Open file description locks."""
    write_file("f", b"x" * 100)
    wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 10, 0)
    with Path("f").open("r+b") as one, Path("f").open("r+b") as other:
        return {
            "first": isinstance(said(fcntl.fcntl, one, OFD_SETLK, wanted), bytes),
            "second": said(fcntl.fcntl, other, OFD_SETLK, wanted),
            "by a process": _try_range(fcntl.LOCK_EX, 5, 1),
        }


@case
def waiting_for_a_lock() -> Answer:
    """Who waits gets it when it is free, and can be interrupted meanwhile."""
    write_file("f")
    file = os.open("f", os.O_RDWR)
    fcntl.flock(file, fcntl.LOCK_EX)
    waiter = os.fork()
    if not waiter:
        fd = os.open("f", os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.write(fd, b"had it")
        os._exit(7)
    time.sleep(0.05)
    found: Answer = {"waits": os.waitpid(waiter, os.WNOHANG)[0] == 0}
    found["meanwhile"] = Path("f").read_bytes()
    fcntl.flock(file, fcntl.LOCK_UN)
    found["then"] = os.waitstatus_to_exitcode(os.waitpid(waiter, 0)[1]), Path("f").read_bytes()
    fcntl.lockf(file, fcntl.LOCK_EX)
    waiter = os.fork()
    if not waiter:
        fcntl.lockf(os.open("f", os.O_RDWR), fcntl.LOCK_EX)
        os._exit(0)
    time.sleep(0.05)
    os.kill(waiter, signal.SIGTERM)
    found["interrupted"] = os.waitstatus_to_exitcode(os.waitpid(waiter, 0)[1])
    return found


@case
def locks_of_who_dies() -> Answer:
    write_file("f")
    child = os.fork()
    if not child:
        fcntl.lockf(os.open("f", os.O_RDWR), fcntl.LOCK_EX)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    return {"free": _try_range(fcntl.LOCK_EX, 0, 0)}


@case
def leases() -> Answer:
    with Path(write_file("f")).open("rb") as file:
        return {"read": said(fcntl.fcntl, file, fcntl.F_SETLEASE, fcntl.F_RDLCK)}
