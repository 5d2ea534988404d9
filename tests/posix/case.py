"""Cases: small functions that do something in a directory and tell what came of it.

1. A case runs in a process of its own, as root, with the umask 0, in an empty directory: once on
   the file system and once on the live mount of it. What it returns must be equal.
2. It returns a dictionary, so that an exception can be named by one key of it; see
   :mod:`tests.posix.exceptions`.
3. A process that does not come back in time is killed, which also ends a question to the mount.
"""

from __future__ import annotations

import errno
import os
import pickle
import select
import signal
import stat
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Answer = dict[str, Any]
Case = Callable[[], Answer]

CASES: dict[str, Case] = {}
USER, OTHER, GROUP = 61234, 61235, 61240
"""Two users, each with a group of its own number, and a group that users can be in besides."""

TICK_S = 0.012
"""Longer than the clock of file times stands still."""

TIMEOUT_S = 30.0


def case(function: Case) -> Case:
    """Make a function a case, under its name."""
    assert function.__name__ not in CASES, function.__name__
    CASES[function.__name__] = function
    return function


def said(function: Callable[..., object], *args: object, **kwargs: object) -> object:
    """What a call returns, or the name of its error."""
    try:
        found = function(*args, **kwargs)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return "ok" if found is None else found


def opens(path: str, flags: int, mode: int = 0o666) -> str:
    """Whether a file can be opened; it is closed again."""
    found = said(os.open, path, flags, mode)
    if isinstance(found, int):
        os.close(found)
        return "ok"
    return str(found)


def facts(path: str) -> object:
    """What lstat says of an item that does not depend on when and where."""
    try:
        s = os.lstat(path)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    size = None if stat.S_ISDIR(s.st_mode) else s.st_size
    links = None if stat.S_ISDIR(s.st_mode) else s.st_nlink
    return (stat.filemode(s.st_mode), s.st_uid, s.st_gid, links, size, s.st_rdev)


def mode_of(path: str) -> str:
    """The permissions, in octal."""
    return oct(os.lstat(path).st_mode & 0o7777)


def touches(paths: Sequence[str], function: Callable[[], object]) -> Answer:
    """Which times of which items a call changes: "a", "m" and "c" for each path."""
    before = {path: _times(path) for path in paths}
    time.sleep(TICK_S)
    found: Answer = {"said": said(function)}
    for path in paths:
        pairs = zip("amc", before[path], _times(path), strict=True)
        found[path] = "".join(letter for letter, was, now in pairs if was != now)
    return found


def _times(path: str) -> tuple[int, int, int]:
    s = os.lstat(path) if os.path.lexists(path) else os.lstat(".")
    return s.st_atime_ns, s.st_mtime_ns, s.st_ctime_ns


def write_file(path: str, data: bytes = b"data", mode: int = 0o644) -> str:
    """Make a file with content; returns its path."""
    Path(path).write_bytes(data)
    os.chmod(path, mode)
    return path


# -- processes -------------------------------------------------------------------------------------


def as_user(
    function: Callable[[], object],
    uid: int = USER,
    gid: int | None = None,
    groups: Iterable[int] = (),
) -> Any:
    """What a function returns that runs as another user, in a process of its own."""

    def run() -> object:
        os.setgroups(list(groups))
        os.setresgid(*[uid if gid is None else gid] * 3)
        os.setresuid(uid, uid, uid)
        return function()

    return in_process(run)


def in_process(
    function: Callable[[], object], timeout_s: float = TIMEOUT_S, *, leads: bool = False
) -> Any:
    """What a function returns that runs in a process of its own. Raises AssertionError.

    ``leads``: when it does not end in time, its own children are killed with it.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        if leads:
            os.setpgid(0, 0)
        _child(function, reader, writer)
    os.close(writer)
    try:
        data = _read_all(reader, timeout_s)
    finally:
        os.close(reader)
        if not _ended(pid):
            (os.killpg if leads else os.kill)(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    fine, found = pickle.loads(data) if data else (False, "the process died")
    assert fine, found
    return found


def _child(function: Callable[[], object], reader: int, writer: int) -> None:
    """Run, tell, and end without what the test's process would do at its end."""
    try:
        os.close(reader)
        try:
            answer = (True, function())
        except BaseException:
            answer = (False, traceback.format_exc())
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(pickle.dumps(answer))
    finally:
        os._exit(0)


def _read_all(reader: int, timeout_s: float) -> bytes:
    data, deadline = b"", time.monotonic() + timeout_s
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return pickle.dumps((False, "the process did not end in time"))
        more = os.read(reader, 1 << 16)
        if not more:
            return data
        data += more


def _ended(pid: int) -> bool:
    """Whether a child has ended, or does so within a moment."""
    for _ in range(200):
        if os.waitpid(pid, os.WNOHANG)[0]:
            return True
        time.sleep(0.001)
    return False


def run_case(function: Case, directory: Path) -> Answer:
    """Rules 1 and 3."""
    directory.mkdir()
    directory.chmod(0o777)

    def run() -> Answer:
        os.umask(0)
        os.chdir(directory)
        return function()

    found: Answer = in_process(run, leads=True)
    return found
