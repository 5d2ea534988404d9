"""Extended attributes and access control lists."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

from tests.posix.case import (
    GROUP,
    OTHER,
    USER,
    Answer,
    as_user,
    case,
    facts,
    mode_of,
    opens,
    said,
    write_file,
)


def setfacl(*arguments: str) -> str:
    """What setfacl(1) says."""
    command = ["setfacl", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr.strip() or "ok"


def getfacl(path: str) -> str:
    """What getfacl(1) says."""
    return subprocess.check_output(["getfacl", "-cpn", path], text=True)


@case
def attributes_of_each_kind() -> Answer:
    found: Answer = {}
    write_file("file")
    os.mkdir("directory")
    os.symlink("file", "link")
    os.mkfifo("fifo")
    for path in ("file", "directory", "link", "fifo"):
        for name in ("user.x", "trusted.x", "security.x", "other.x", "system.x", "user."):
            found[f"{path} {name}"] = (
                said(os.setxattr, path, name, b"value", follow_symlinks=False),
                said(os.getxattr, path, name, follow_symlinks=False),
            )
        found[f"{path} list"] = sorted(os.listxattr(path, follow_symlinks=False))
        found[f"{path} remove"] = said(os.removexattr, path, "trusted.x", follow_symlinks=False)
        found[f"{path} missing"] = said(os.removexattr, path, "user.no", follow_symlinks=False)
    return found


@case
def attributes_of_each_size() -> Answer:
    found: Answer = {}
    write_file("f")
    for size in (0, 1, 100, 3000, 5000, 65_535, 65_536, 65_537):
        done = said(os.setxattr, "f", "user.x", b"v" * size)
        got = said(os.getxattr, "f", "user.x")
        found[f"{size}"] = done, len(got) if isinstance(got, bytes) else got
        said(os.removexattr, "f", "user.x")
    for length in (249, 250, 251):
        found[f"name of {length}"] = said(os.setxattr, "f", "user." + "n" * length, b"")
    os.setxattr("f", "user.bytes", bytes(range(256)))
    found["bytes"] = os.getxattr("f", "user.bytes")
    return found


@case
def attributes_by_flags() -> Answer:
    write_file("f")
    return {
        "replace what is missing": said(os.setxattr, "f", "user.x", b"1", os.XATTR_REPLACE),
        "create": said(os.setxattr, "f", "user.x", b"2", os.XATTR_CREATE),
        "create again": said(os.setxattr, "f", "user.x", b"3", os.XATTR_CREATE),
        "replace": said(os.setxattr, "f", "user.x", b"4", os.XATTR_REPLACE),
        "value": os.getxattr("f", "user.x"),
    }


@case
def attributes_by_users() -> Answer:
    for name, owner, mode in (("mine", USER, 0o600), ("theirs", OTHER, 0o644), ("no", OTHER, 0)):
        os.chown(write_file(name, mode=mode), owner, owner)
        os.setxattr(name, "user.there", b"1")
        os.setxattr(name, "trusted.there", b"1")
        os.setxattr(name, "security.there", b"1")
    os.mkdir("sticky", 0o777)
    os.chmod("sticky", 0o1777)

    def run() -> Answer:
        found: Answer = {"sticky": said(os.setxattr, "sticky", "user.x", b"")}
        for name in ("mine", "theirs", "no"):
            found[f"{name} list"] = said(lambda n: sorted(os.listxattr(n)), name)
            for space in ("user", "trusted", "security"):
                found[f"{name} {space}"] = [
                    said(os.getxattr, name, f"{space}.there"),
                    said(os.setxattr, name, f"{space}.new", b"2"),
                    said(os.removexattr, name, f"{space}.there"),
                ]
        return found

    return dict(as_user(run))


@case
def access_lists() -> Answer:
    """Who is on the list may, who is not may not, and the mask is the group's bits."""
    os.chown(write_file("f", mode=0o600), OTHER, OTHER)
    found: Answer = {"set": setfacl("-m", f"u:{USER}:rw,g:{GROUP}:r", "f"), "got": getfacl("f")}
    found["mode"] = mode_of("f")

    def run() -> list[str]:
        return [opens("f", flags) for flags in (os.O_RDONLY, os.O_WRONLY)]

    found["user"] = as_user(run)
    found["member"] = as_user(run, 60_000, groups=[GROUP])
    found["stranger"] = as_user(run, 60_000)
    os.chmod("f", 0o620)
    found["masked"] = as_user(run), getfacl("f")
    os.chmod("f", 0o604)
    found["masked all"] = as_user(run), getfacl("f")
    found["removed"] = setfacl("-b", "f"), getfacl("f"), sorted(os.listxattr("f"))
    found["afterwards"] = as_user(run)
    return found


@case
def access_lists_of_directories() -> Answer:
    os.mkdir("d", 0o700)
    write_file("d/f", mode=0o644)
    found: Answer = {"before": as_user(lambda: opens("d/f", os.O_RDONLY))}
    found["set"] = setfacl("-m", f"u:{USER}:rx", "d")
    found["read"] = as_user(lambda: opens("d/f", os.O_RDONLY))
    found["list"] = as_user(lambda: os.listdir("d"))
    found["make"] = as_user(lambda: opens("d/new", os.O_CREAT))
    found["taken away"] = setfacl("-x", f"u:{USER}", "d")
    found["after"] = as_user(lambda: opens("d/f", os.O_RDONLY))
    return found


@case
def access_lists_by_users() -> Answer:
    for name, owner in (("mine", USER), ("theirs", OTHER)):
        os.chown(write_file(name), owner, owner)
    os.mkdir("mine-dir")
    os.chown("mine-dir", USER, USER)

    def run() -> Answer:
        return {
            "mine": setfacl("-m", f"u:{OTHER}:r", "mine"),
            "theirs": setfacl("-m", f"u:{USER}:rw", "theirs"),
            "read theirs": getfacl("theirs"),
            "default on a directory": setfacl("-d", "-m", f"u:{OTHER}:r", "mine-dir"),
            "default on a file": setfacl("-d", "-m", f"u:{OTHER}:r", "mine"),
        }

    return dict(as_user(run)) | {"after": [getfacl("mine"), getfacl("mine-dir")]}


@case
def access_lists_that_are_mere_modes() -> Answer:
    """A list that says no more than a mode is one."""
    write_file("f", mode=0o640)
    found: Answer = {"set": setfacl("--set", "u::rwx,g::r,o::r", "f"), "mode": mode_of("f")}
    found["names"] = os.listxattr("f")
    found["invalid"] = said(os.setxattr, "f", "system.posix_acl_access", b"nonsense")
    found["on a link"] = (
        said(os.symlink, "f", "l"),
        said(os.setxattr, "l", "system.posix_acl_access", b"\x02\0\0\0", follow_symlinks=False),
    )
    return found


@case
def access_lists_and_setgid() -> Answer:
    """Who is not in a file's group cannot keep it setgid while giving it a list."""
    found: Answer = {}
    for name, groups in (("stranger", []), ("member", [GROUP])):
        os.chown(write_file(name), USER, GROUP)
        for number, wanted in enumerate((f"u:{OTHER}:rx", "u::rwx,g::rx,o::rx")):
            os.chmod(name, 0o2755)
            done = as_user(lambda n=name, w=wanted: setfacl("-m", w, n), groups=groups)
            found[f"{name} {number}"] = done, mode_of(name)
    write_file("root")
    os.chown("root", USER, GROUP)
    os.chmod("root", 0o2755)
    found["root"] = setfacl("-m", f"u:{OTHER}:rx", "root"), mode_of("root")
    return found


def _made(umask: int) -> None:
    os.umask(umask)
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, 0o666))
    os.close(os.open("program", os.O_CREAT | os.O_WRONLY, 0o777))
    os.close(os.open("secret", os.O_CREAT | os.O_WRONLY, 0o600))
    os.mkdir("directory", 0o777)
    os.mknod("node", 0o666 | stat.S_IFREG)
    os.mkfifo("fifo", 0o666)
    os.symlink("x", "link")


def _inherited(umask: int) -> Answer:
    os.mkdir("d", 0o777)
    setfacl("-d", "-m", f"u:{USER}:rwx,g:{GROUP}:rx,g::rwx,o::r", "d")
    os.chdir("d")
    as_user(lambda: _made(umask))
    found: Answer = {}
    for name in ("file", "program", "secret", "directory", "node", "fifo"):
        found[name] = facts(name), getfacl(name)
    found["link"] = facts("link")
    return found


@case
def default_lists_without_umask() -> Answer:
    return _inherited(0)


@case
def default_lists_with_umask() -> Answer:
    return _inherited(0o077)


@case
def lists_are_seen_in_time() -> Answer:
    """What the kernel remembers of a list is what was set last, whichever way."""
    write_file("f", mode=0o600)
    found: Answer = {}
    reads = lambda: as_user(lambda: opens("f", os.O_RDONLY))  # noqa: E731
    found["none"] = reads()
    setfacl("-m", f"u:{USER}:r", "f")
    found["set"] = reads()
    os.link("f", "g")
    setfacl("-m", f"u:{USER}:-", "g")
    found["by another name"] = reads()
    with Path("f").open("rb") as file:
        os.removexattr(file.fileno(), "system.posix_acl_access")
    found["removed by descriptor"] = reads(), mode_of("f")
    return found
