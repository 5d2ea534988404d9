"""Granular errors: every call that takes a path, on every kind of path that can be wrong."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

from tests.posix.case import CASES, OTHER, USER, Answer, facts, opens, said, write_file

LONG = "n" * 256
DEEP = "d/" * 2100 + "x"

CALLS: dict[str, Callable[[str], object]] = {
    "access": lambda p: os.access(p, os.W_OK),
    "chdir": os.chdir,
    "chmod": lambda p: os.chmod(p, 0o640),
    "chown": lambda p: os.chown(p, USER, USER),
    "chown_nothing": lambda p: os.chown(p, -1, -1),
    "create": lambda p: opens(p, os.O_CREAT | os.O_WRONLY | os.O_NONBLOCK, 0o644),
    "create_new": lambda p: opens(p, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600),
    "getxattr": lambda p: os.getxattr(p, "user.none"),
    "lchown": lambda p: os.lchown(p, -1, USER),
    "link_from": lambda p: os.link(p, "made", follow_symlinks=False),
    "link_to": lambda p: os.link("file", p),
    "listdir": lambda p: sorted(os.listdir(p))[:3],
    "listxattr": lambda p: len(os.listxattr(p)),
    "lstat": lambda p: stat.S_IFMT(os.lstat(p).st_mode),
    "mkdir": lambda p: os.mkdir(p, 0o750),
    "mkfifo": lambda p: os.mkfifo(p, 0o640),
    "mknod": lambda p: os.mknod(p, 0o600 | stat.S_IFREG),
    "mknod_device": lambda p: os.mknod(p, 0o600 | stat.S_IFCHR, os.makedev(1, 3)),
    "open": lambda p: opens(p, os.O_RDONLY | os.O_NONBLOCK),
    "open_directory": lambda p: opens(p, os.O_RDONLY | os.O_DIRECTORY),
    "open_nofollow": lambda p: opens(p, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK),
    "open_path": lambda p: opens(p, os.O_PATH),
    "open_write": lambda p: opens(p, os.O_WRONLY | os.O_NONBLOCK),
    "readlink": lambda p: os.readlink(p).rpartition("/")[2],
    "removexattr": lambda p: os.removexattr(p, "user.none"),
    "rename_from": lambda p: os.rename(p, "made"),
    "rename_to": lambda p: os.rename("file", p),
    "rename_directory_to": lambda p: os.rename("tree", p),
    "rmdir": os.rmdir,
    "setxattr": lambda p: os.setxattr(p, "user.new", b"value"),
    "stat": lambda p: stat.S_IFMT(os.stat(p).st_mode),
    "statvfs": lambda p: os.statvfs(p).f_namemax,
    "symlink_to": lambda p: os.symlink("anywhere", p),
    "truncate": lambda p: os.truncate(p, 3),
    "unlink": os.unlink,
    "utime": lambda p: os.utime(p, (1, 2)),
    "utime_now": os.utime,
}

PATHS = {
    "file": "file",
    "slash after a file": "file/",
    "beneath a file": "file/x",
    "missing": "missing",
    "beneath what is missing": "missing/x",
    "slash after what is missing": "missing/",
    "long name": LONG,
    "beneath a long name": LONG + "/x",
    "longest name": LONG[:255],
    "long path": DEEP,
    "empty": "",
    "loop": "loop",
    "through a loop": "loop/x",
    "dangling": "dangling",
    "link to a file": "link",
    "link to a directory": "treelink",
    "slash after a link to a directory": "treelink/",
    "through a link to a directory": "treelink/file",
    "directory": "tree",
    "slash after a directory": "tree/",
    "dot": "tree/.",
    "dot dot": "tree/..",
    "full directory": "full",
    "beneath itself": "tree/sub",
    "locked directory": "locked",
    "beneath a locked directory": "locked/file",
    "name without search": "listed/file",
    "new in a read-only directory": "fixed/new",
    "old in a read-only directory": "fixed/file",
    "another's in a sticky directory": "sticky/theirs",
    "own in a sticky directory": "sticky/ours",
    "fifo": "fifo",
    "device": "device",
    "unreadable file": "secret",
    "read-only file": "readonly",
    "top": "/proc/self/cwd",
}


def _set_up(directory: str) -> None:
    """One of each, in a directory of its own which everyone may change."""
    os.mkdir(directory)
    os.chmod(directory, 0o777)
    os.chdir(directory)
    write_file("file", mode=0o666)
    os.symlink("loop", "loop")
    os.symlink("nowhere", "dangling")
    os.symlink("file", "link")
    os.symlink("tree", "treelink")
    for name, mode in (
        ("tree", 0o777), ("full", 0o777), ("locked", 0o700), ("listed", 0o744), ("fixed", 0o755),
        ("sticky", 0o1777),
    ):  # fmt: skip
        os.mkdir(name)
        os.chmod(name, mode)
    for name in ("full/file", "locked/file", "listed/file", "fixed/file"):
        write_file(name, mode=0o666)
    for name, owner in (("sticky/theirs", OTHER), ("sticky/ours", USER), ("file", USER)):
        os.chown(write_file(name, mode=0o666), owner, owner)
    os.chown("tree", USER, USER)
    os.mkfifo("fifo")
    os.mknod("device", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    write_file("secret", mode=0o600)
    write_file("readonly", mode=0o444)
    os.chdir("..")


def _left() -> list[tuple[str, object]]:
    """What is there after a call."""
    found = []
    for place, names, files in os.walk("."):
        found += [(f"{place}/{name}", facts(f"{place}/{name}")) for name in names + files]
    return sorted(found, key=lambda pair: pair[0])


def _call_as(user: int, call: Callable[[str], object], path: str) -> object:
    """What a call says to another user, who this process is only meanwhile."""
    os.setresgid(user, user, user)
    os.setresuid(user, user, 0)
    try:
        return said(call, path)
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)


def _case(call: Callable[[str], object], user: int) -> Answer:
    """Call for each path; where that changes something, all is made anew before the next."""
    found: Answer = {}
    os.setgroups([])
    top, changed, number, untouched = Path.cwd(), True, 0, _left()
    for name, path in PATHS.items():
        if changed:
            number += 1
            _set_up(str(number))
        os.chdir(top / str(number))
        if changed:
            untouched = _left()
        found[name] = _call_as(user, call, path)
        os.chdir(top / str(number))
        changed = found[name] not in errno.errorcode.values() and _left() != untouched
        if changed:
            found[f"{name}: left"] = _left()
        os.chdir(top)
    return found


for _name, _call in CALLS.items():
    for _who, _user in (("root", 0), ("user", USER)):
        CASES[f"{_name}_errors_as_{_who}"] = lambda call=_call, user=_user: _case(call, user)
