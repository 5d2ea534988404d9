"""Times: what changes which, and what can be set."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from tests.posix.case import OTHER, TICK_S, USER, Answer, as_user, case, said, touches, write_file
from tests.posix.cases.names import EXCHANGE, rename_with

NS = 1_000_000_000


def _set_up() -> None:
    write_file("f", b"content")
    write_file("g", b"other")
    os.link("f", "h")
    os.symlink("f", "s")
    os.mkdir("d")
    os.mkdir("e")
    write_file("d/in")
    for path in (".", "d", "e", "f", "g", "d/in", "s"):
        os.utime(path, (NS, NS), follow_symlinks=False)


def _opened(path: str, flags: int, change: Callable[[int], object]) -> None:
    fd = os.open(path, flags)
    try:
        change(fd)
    finally:
        os.close(fd)


CHANGES: dict[str, tuple[list[str], Callable[[], object]]] = {
    "chmod": (["f", "."], lambda: os.chmod("f", 0o600)),
    "chmod to the same": (["f"], lambda: os.chmod("f", 0o644)),
    "chmod of a directory": (["d", "."], lambda: os.chmod("d", 0o700)),
    "chown": (["f", "."], lambda: os.chown("f", 1, 1)),
    "chown to the same": (["f"], lambda: os.chown("f", 0, 0)),
    "chown to nobody else": (["f"], lambda: os.chown("f", -1, -1)),
    "chown of a symlink": (["s", "f"], lambda: os.lchown("s", 1, 1)),
    "link": (["f", "d", "."], lambda: os.link("f", "d/new")),
    "unlink of one name": (["h", "f", "."], lambda: os.unlink("f")),
    "unlink": (["g", "."], lambda: os.unlink("g")),
    "mkdir": (["d", "."], lambda: os.mkdir("d/new")),
    "rmdir": (["e", "."], lambda: os.rmdir("e")),
    "mknod": (["d", "."], lambda: os.mknod("d/new")),
    "symlink": (["d", "."], lambda: os.symlink("x", "d/new")),
    "create": (["d", "."], lambda: os.close(os.open("d/new", os.O_CREAT))),
    "open": (["f", "."], lambda: os.close(os.open("f", os.O_RDWR))),
    "open to create what is there": (["f", "."], lambda: os.close(os.open("f", os.O_CREAT))),
    "open to cut": (["f", "."], lambda: os.close(os.open("f", os.O_WRONLY | os.O_TRUNC))),
    "rename": (["g", "d", "d/new", "."], lambda: os.rename("g", "d/new")),
    "rename over": (["h", "g", "d", "."], lambda: os.rename("g", "f")),
    "rename of a directory": (["d", "d/in", "e", "."], lambda: os.rename("d", "e/d")),
    "rename to its other name": (["f", "."], lambda: os.rename("f", "h")),
    "exchange": (["f", "d", "d/in", "."], lambda: rename_with("f", "d/in", EXCHANGE)),
    "write": (["f", "."], lambda: _opened("f", os.O_WRONLY, lambda fd: os.write(fd, b"x"))),
    "write of nothing": (["f"], lambda: _opened("f", os.O_WRONLY, lambda fd: os.write(fd, b""))),
    "truncate": (["f", "."], lambda: os.truncate("f", 3)),
    "truncate to grow": (["f"], lambda: os.truncate("f", 30)),
    "truncate to the same": (["f"], lambda: os.truncate("f", 7)),
    "ftruncate to the same": (["f"], lambda: _opened("f", 2, lambda fd: os.ftruncate(fd, 7))),
    "setxattr": (["f", "."], lambda: os.setxattr("f", "user.x", b"1")),
    "utime": (["f", "."], lambda: os.utime("f", (5, 5))),
    "utime of a symlink": (["s", "f"], lambda: os.utime("s", (5, 5), follow_symlinks=False)),
    "read": (["f"], lambda: Path("f").read_bytes()),
    "listing": (["d"], lambda: os.listdir("d")),
    "readlink": (["f"], lambda: os.readlink("s")),
}


@case
def times_that_change() -> Answer:
    found: Answer = {}
    for number, (what, (paths, change)) in enumerate(CHANGES.items()):
        os.mkdir(f"{number}")
        os.chdir(f"{number}")
        _set_up()
        found[what] = touches(paths, change)
        os.chdir("..")
    return found


@case
def times_that_change_again() -> Answer:
    """The same on a file that is open, whose attributes the kernel knows already."""
    with Path("f").open("w+b", buffering=0) as file:
        return {
            "write": touches(["f"], lambda: file.write(b"1")),
            "write again": touches(["f"], lambda: file.write(b"2")),
            "fchmod": touches(["f"], lambda: os.fchmod(file.fileno(), 0o600)),
            "ftruncate": touches(["f"], lambda: os.ftruncate(file.fileno(), 1)),
            "fsync": touches(["f"], lambda: os.fsync(file.fileno())),
            "unlink": touches(["."], lambda: os.unlink("f")),
        }


@case
def times_that_are_set() -> Answer:
    write_file("f")
    os.symlink("f", "s")
    os.mkdir("d")
    found: Answer = {}
    moments = (0, 1, NS - 1, NS, 1_700_000_000_123_456_789, -1, -NS, -5 * NS + 1, (1 << 31) * NS,
               (1 << 32) * NS + 7, (1 << 33) * NS, (1 << 34) * NS, -(1 << 31) * NS)  # fmt: skip
    for path in ("f", "d", "s"):
        for moment in moments:
            done = said(os.utime, path, ns=(moment, moment + 5), follow_symlinks=False)
            s = os.lstat(path)
            found[f"{path} {moment}"] = done, s.st_atime_ns, s.st_mtime_ns
    return found


@case
def times_that_are_set_by_users() -> Answer:
    for name, owner, mode in (
        ("mine", USER, 0o600), ("theirs", OTHER, 0o644), ("open", OTHER, 0o666),
    ):  # fmt: skip
        os.chown(write_file(name, mode=mode), owner, owner)

    def run() -> Answer:
        return {
            name: (said(os.utime, name, (1, 2)), said(os.utime, name))
            for name in ("mine", "theirs", "open")
        }

    return dict(as_user(run))


@case
def times_now() -> Answer:
    """Now is now, to the clock of the file system, and in the order in which things happened."""
    write_file("f")
    os.utime("f", (1, 1))
    before = time.time_ns()
    os.utime("f")
    time.sleep(TICK_S)
    after = time.time_ns()
    s = os.stat("f")
    found: Answer = {
        "now": before - 20_000_000 <= s.st_mtime_ns <= after,
        "alike": s.st_atime_ns == s.st_mtime_ns,
        "ctime": s.st_ctime_ns == s.st_mtime_ns,
    }
    write_file("new")
    s = os.stat("new")
    found["of what is new"] = s.st_mtime_ns >= after - 20_000_000
    return found


@case
def times_that_stay() -> Answer:
    """What touch sets is there after what the kernel writes late."""
    with Path("f").open("wb") as file:
        file.write(b"x" * 100_000)
    os.utime("f", ns=(111, 222))
    os.sync()
    time.sleep(TICK_S)
    with Path("f").open("rb"):
        pass
    s = os.stat("f")
    return {"mtime": s.st_mtime_ns, "size": s.st_size}
