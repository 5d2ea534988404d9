"""Modes, owners, and what they let whom do."""

from __future__ import annotations

import mmap
import os
import stat
import subprocess
import time
from pathlib import Path

from tests.posix.case import (
    GROUP,
    OTHER,
    USER,
    Answer,
    as_user,
    case,
    facts,
    in_process,
    mode_of,
    opens,
    said,
    write_file,
)

CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")
"""cap_net_raw=ep, as security.capability stores it."""


# -- chmod and chown -------------------------------------------------------------------------------


@case
def chmod_all_bits() -> Answer:
    found: Answer = {}
    os.mkdir("directory")
    write_file("file")
    for path in ("file", "directory"):
        for mode in (0, 0o111, 0o644, 0o777, 0o1755, 0o2755, 0o4755, 0o7777, 0o2644, 0o6000):
            os.chmod(path, mode)
            found[f"{path} {mode:o}"] = mode_of(path)
    return found


@case
def chmod_by_others() -> Answer:
    os.chown(write_file("mine"), USER, USER)
    os.chown(write_file("theirs"), OTHER, OTHER)
    os.chown(write_file("grouped"), USER, GROUP)
    found = as_user(
        lambda: {
            "mine": said(os.chmod, "mine", 0o4711),
            "theirs": said(os.chmod, "theirs", 0o777),
            "setgid of another group": said(os.chmod, "grouped", 0o2755),
        }
    )
    found |= {f"{name} after": mode_of(name) for name in ("mine", "theirs", "grouped")}
    found["setgid of a further group"] = as_user(
        lambda: said(os.chmod, "grouped", 0o2755), groups=[GROUP]
    )
    found["further group after"] = mode_of("grouped")
    return dict(found)


@case
def fchmod_and_symlinks() -> Answer:
    write_file("file")
    os.symlink("file", "link")
    with Path("file").open("rb") as file:
        os.fchmod(file.fileno(), 0o751)
    found: Answer = {"fchmod": mode_of("file")}
    os.chmod("link", 0o711)
    found["through a link"] = (mode_of("file"), mode_of("link"))
    link = os.open("link", os.O_PATH | os.O_NOFOLLOW)
    found["of the link"] = said(os.chmod, f"/proc/self/fd/{link}", 0o700), facts("link")
    return found


@case
def fchmod_of_an_unlinked_file() -> Answer:
    fd = os.open("file", os.O_CREAT | os.O_RDWR, 0o600)
    os.unlink("file")
    os.fchmod(fd, 0o4711)
    os.fchown(fd, USER, GROUP)
    s = os.fstat(fd)
    return {"after": (oct(s.st_mode), s.st_uid, s.st_gid, s.st_nlink)}


@case
def chown_by_root() -> Answer:
    found: Answer = {}
    write_file("file")
    os.symlink("file", "link")
    os.mkdir("directory")
    for path in ("file", "directory", "link"):
        for uid, gid in ((1, 2), (-1, 3), (4, -1), (0xFFFFFFFE, 0xFFFFFFFE), (0, 0)):
            os.lchown(path, uid, gid)
            found[f"{path} {uid} {gid}"] = facts(path)
    os.chown("link", 7, 8)
    found["through the link"] = (facts("file"), facts("link"))
    return found


@case
def chown_by_others() -> Answer:
    os.chown(write_file("mine"), USER, USER)
    os.chown(write_file("theirs"), OTHER, OTHER)

    def run() -> Answer:
        return {
            "give away": said(os.chown, "mine", OTHER, -1),
            "to the same": said(os.chown, "mine", USER, USER),
            "to a further group": said(os.chown, "mine", -1, GROUP),
            "to a foreign group": said(os.chown, "mine", -1, OTHER),
            "another's": said(os.chown, "theirs", USER, -1),
            "another's group": said(os.chown, "theirs", -1, GROUP),
            "nothing of mine": said(os.chown, "mine", -1, -1),
            "nothing of another's": said(os.chown, "theirs", -1, -1),
            "after": [facts("mine"), facts("theirs")],
        }

    return dict(as_user(run, groups=[GROUP]))


# -- what is made ----------------------------------------------------------------------------------


def _make_all() -> None:
    os.mkdir("directory", 0o777)
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, 0o777))
    os.mknod("regular", 0o777 | stat.S_IFREG)
    os.mkfifo("fifo", 0o777)
    os.symlink("x", "link")


MADE = ("directory", "file", "regular", "fifo", "link")


@case
def made_by_users() -> Answer:
    found: Answer = {}
    for umask in (0, 0o022, 0o077, 0o777):
        place = f"with-{umask:o}"
        os.mkdir(place, 0o777)

        def run(place: str = place, umask: int = umask) -> None:
            os.chdir(place)
            os.umask(umask)
            _make_all()

        as_user(run)
        found |= {f"{place} {name}": facts(f"{place}/{name}") for name in MADE}
    return found


@case
def made_with_special_bits() -> Answer:
    found: Answer = {}
    for mode in (0o1777, 0o2777, 0o4777, 0o6755):
        os.close(os.open(f"file-{mode:o}", os.O_CREAT | os.O_WRONLY, mode))
        os.mkdir(f"dir-{mode:o}", mode)
        os.mkfifo(f"fifo-{mode:o}", mode)
        for kind in ("file", "dir", "fifo"):
            found[f"{kind} {mode:o}"] = facts(f"{kind}-{mode:o}")
    return found


@case
def made_in_a_setgid_directory() -> Answer:
    found: Answer = {}
    for name, groups in (("stranger", []), ("member", [GROUP])):
        os.mkdir(name)
        os.chown(name, OTHER, GROUP)
        os.chmod(name, 0o2777)

        def run(name: str = name) -> None:
            os.chdir(name)
            _make_all()
            for mode in (0o2755, 0o2745, 0o6777):
                os.close(os.open(f"{mode:o}", os.O_CREAT | os.O_WRONLY, mode))
                os.mkdir(f"directory-{mode:o}", mode)
                os.mknod(f"node-{mode:o}", mode | stat.S_IFREG)
            os.rename("directory", "renamed")

        as_user(run, groups=groups)
        found |= {f"{name} {entry}": facts(f"{name}/{entry}") for entry in os.listdir(name)}
    return found


@case
def devices() -> Answer:
    found: Answer = {}
    for kind in (stat.S_IFCHR, stat.S_IFBLK):
        for major, minor in ((1, 3), (0, 0), (255, 255), (4095, 0xFFFFF), (8, 0x12345)):
            name = f"{kind:o}-{major}-{minor}"
            os.mknod(name, kind | 0o640, os.makedev(major, minor))
            found[name] = facts(name)
    with Path(f"{stat.S_IFCHR:o}-1-3").open("wb") as null:
        found["null takes"] = null.write(b"anything")
    os.chmod(".", 0o777)
    found["by a user"] = as_user(
        lambda: said(os.mknod, "denied", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    )
    found["whiteout by a user"] = as_user(lambda: said(os.mknod, "white", stat.S_IFCHR | 0o600, 0))
    return found


# -- permissions -----------------------------------------------------------------------------------


@case
def access_by_class() -> Answer:
    found: Answer = {}
    who = {
        "owner": (USER, USER, []),
        "group": (OTHER, GROUP, []),
        "further group": (OTHER, OTHER, [5, GROUP, 6]),
        "others": (OTHER, OTHER, []),
    }
    for mode in (0o000, 0o400, 0o040, 0o004, 0o200, 0o020, 0o002, 0o070, 0o707, 0o666):
        os.chown(write_file(f"{mode:o}", mode=mode), USER, GROUP)
    names = os.listdir(".")

    def run() -> Answer:
        return {
            name: (opens(name, os.O_RDONLY), opens(name, os.O_WRONLY), os.access(name, os.R_OK))
            for name in names
        }

    for person, (uid, gid, groups) in who.items():
        answers = as_user(run, uid, gid, groups)
        found |= {f"{person} {name}": answer for name, answer in answers.items()}
    return found


@case
def directories_by_class() -> Answer:
    found: Answer = {}
    for mode in range(8):
        os.mkdir(f"{mode}")
        write_file(f"{mode}/file")
        os.chmod(f"{mode}", 0o770 | mode)

    def run() -> Answer:
        return {
            f"{mode}": (
                said(os.listdir, f"{mode}"),
                said(lambda m: os.stat(f"{m}/file").st_size, mode),
                said(os.mkdir, f"{mode}/new"),
                said(os.unlink, f"{mode}/file"),
            )
            for mode in range(8)
        }

    found |= as_user(run)
    return found


@case
def sticky_directories() -> Answer:
    found: Answer = {}
    for owner, name in ((USER, "mine"), (OTHER, "theirs")):
        os.mkdir(name)
        for whose, entry in ((USER, "my"), (OTHER, "their"), (0, "root")):
            os.chown(write_file(f"{name}/{entry}"), whose, whose)
            os.mkdir(f"{name}/{entry}-dir")
            os.chown(f"{name}/{entry}-dir", whose, whose)
        os.chown(name, owner, owner)
        os.chmod(name, 0o1777)

    def run() -> Answer:
        answers: Answer = {}
        for name in ("mine", "theirs"):
            for entry in ("my", "their", "root"):
                path = f"{name}/{entry}"
                os.close(os.open(f"{path}-new", os.O_CREAT | os.O_WRONLY))
                answers[path] = [
                    said(os.rename, f"{path}-new", path),
                    said(os.rename, path, f"{path}-away"),
                    said(os.unlink, path),
                    said(os.rmdir, f"{path}-dir"),
                    said(os.link, path, f"{path}-link"),
                ]
        return answers

    found |= as_user(run)
    found["left"] = sorted(os.listdir("mine")), sorted(os.listdir("theirs"))
    return found


@case
def permission_lost_after_open() -> Answer:
    write_file("file", b"before", mode=0o666)
    fd = os.open("file", os.O_RDWR)
    os.chmod("file", 0)

    def run() -> Answer:
        return {
            "write": said(os.pwrite, fd, b"b", 1),
            "read": said(os.pread, fd, 2, 0),
            "open": opens("file", os.O_RDONLY),
            "open again": opens(f"/proc/self/fd/{fd}", os.O_RDONLY),
        }

    return dict(as_user(run))


@case
def scripts_are_run() -> Answer:
    write_file("run", b"#!/bin/sh\necho ran as $(id -u)\n", mode=0o755)
    write_file("cannot", b"#!/bin/sh\necho ran\n", mode=0o644)

    def run(path: str) -> object:
        return said(subprocess.check_output, [path], stdin=subprocess.DEVNULL)

    return {
        "run": run("./run"),
        "cannot": run("./cannot"),
        "by a user": as_user(lambda: run("./run")),
        "cannot by a user": as_user(lambda: run("./cannot")),
    }


@case
def setuid_programs() -> Answer:
    Path("id").write_bytes(Path("/usr/bin/id").read_bytes())
    found: Answer = {}
    for mode in (0o755, 0o4755, 0o6755):
        os.chown("id", OTHER, GROUP)
        os.chmod("id", mode)
        found[f"{mode:o}"] = as_user(lambda: subprocess.check_output(["./id"], text=True))
    return found


@case
def text_busy() -> Answer:
    Path("sleep").write_bytes(Path("/usr/bin/sleep").read_bytes())
    os.chmod("sleep", 0o755)
    with subprocess.Popen(["./sleep", "60"]) as running:
        time.sleep(0.05)
        found: Answer = {
            "write": opens("sleep", os.O_WRONLY),
            "truncate": said(os.truncate, "sleep", 0),
            "open to truncate": opens("sleep", os.O_RDONLY | os.O_TRUNC),
            "read": opens("sleep", os.O_RDONLY),
            "rename": said(os.rename, "sleep", "renamed"),
            "unlink": said(os.unlink, "renamed"),
        }
        running.kill()
    Path("new").write_bytes(Path("/usr/bin/true").read_bytes())
    os.chmod("new", 0o755)
    with Path("new").open("r+b"):
        found["run while written to"] = said(subprocess.call, ["./new"])
    found["run"] = said(subprocess.call, ["./new"])
    return found


# -- privileges of files that are dropped ----------------------------------------------------------


def _privileged(name: str, mode: int) -> str:
    """A file that everyone may write to, with bits, and with a capability."""
    write_file(name, b"privileged", mode=mode | 0o777)
    os.chown(name, OTHER, GROUP)
    os.chmod(name, mode)
    os.setxattr(name, "security.capability", CAPABILITY)
    return name


def _privileges(name: str) -> tuple[str, bool]:
    return mode_of(name), "security.capability" in os.listxattr(name)


def _write(name: str) -> None:
    fd = os.open(name, os.O_WRONLY)
    os.write(fd, b"x")
    os.close(fd)


def _append_nothing(name: str) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_APPEND)
    os.write(fd, b"")
    os.close(fd)


def _ftruncate(name: str) -> None:
    fd = os.open(name, os.O_WRONLY)
    os.ftruncate(fd, 3)
    os.close(fd)


def _copied_into(name: str) -> None:
    source, target = os.open("source", os.O_RDONLY), os.open(name, os.O_WRONLY)
    os.copy_file_range(source, target, 4)


CHANGES = {
    "written": _write,
    "not written": _append_nothing,
    "cut": lambda name: os.truncate(name, 3),
    "not cut": lambda name: os.truncate(name, 10),
    "cut by descriptor": _ftruncate,
    "opened to be cut": lambda name: os.close(os.open(name, os.O_WRONLY | os.O_TRUNC)),
    "copied into": _copied_into,
    "opened": lambda name: os.close(os.open(name, os.O_RDWR)),
    "touched": os.utime,
}


def _dropped(uid: int) -> Answer:
    found: Answer = {}
    write_file("source")
    for what, change in CHANGES.items():
        for mode in (0o4777, 0o2777, 0o2767, 0o6777):
            name = _privileged(f"{what}-{mode:o}", mode)
            os.stat(name)
            done = as_user(lambda c=change, n=name: said(c, n), uid)
            found[f"{what} {mode:o}"] = (done, *_privileges(name))
    return found


@case
def privileges_dropped_by_users() -> Answer:
    return _dropped(USER)


@case
def privileges_kept_by_root() -> Answer:
    return _dropped(0)


@case
def privileges_and_owners() -> Answer:
    found: Answer = {}
    changes = {
        "to another": (USER, USER),
        "to the same": (OTHER, GROUP),
        "group": (-1, USER),
        "nothing": (-1, -1),
    }
    for what, (uid, gid) in changes.items():
        for mode in (0o4755, 0o2755, 0o2745, 0o6755, 0o2644):
            name = _privileged(f"{what}-{mode:o}", mode)
            os.chown(name, uid, gid)
            found[f"{what} {mode:o}"] = _privileges(name)
    for mode in (0o4755, 0o2755, 0o2745):
        name = _privileged(f"by the owner {mode:o}", mode)
        for groups in ([], [GROUP, USER]):
            os.chown(name, OTHER, GROUP)
            os.chmod(name, mode)
            done = as_user(lambda n=name: said(os.chown, n, -1, OTHER), OTHER, groups=groups)
            found[f"by the owner {mode:o} in {groups}"] = (done, *_privileges(name))
    os.mkdir("directory", 0o777)
    os.chmod("directory", 0o6777)
    os.chown("directory", USER, USER)
    found["of a directory"] = mode_of("directory")
    return found


@case
def privileges_are_gone_for_who_runs_it() -> Answer:
    """What runs right after a write has no stale rights: nobody looked at the file meanwhile."""
    Path("id").write_bytes(Path("/usr/bin/id").read_bytes())
    os.chown("id", OTHER, GROUP)
    os.chmod("id", 0o6777)
    os.stat("id")

    def run() -> str:
        fd = os.open("id", os.O_WRONLY)
        os.pwrite(fd, b"\x7f", 0)
        os.close(fd)
        return subprocess.check_output(["./id"], text=True)

    return {"who": as_user(run)}


@case
def privileges_and_a_descriptor_of_root() -> Answer:
    name = _privileged("file", 0o6777)
    fd = os.open(name, os.O_WRONLY)
    as_user(lambda: os.write(fd, b"x"))
    return {"bits": mode_of(name), "capability": _privileges(name)[1]}


@case
def privileges_and_a_descriptor_of_a_user() -> Answer:
    """Opened by a user, and then written to by root."""
    name = _privileged("file", 0o6777)

    def run() -> None:
        os.setresuid(USER, USER, 0)
        fd = os.open(name, os.O_WRONLY)
        os.setresuid(0, 0, 0)
        os.write(fd, b"x")

    in_process(run)
    return {"bits": mode_of(name), "capability": _privileges(name)[1]}


@case
def privileges_and_mappings() -> Answer:
    name = _privileged("file", 0o6777)

    def run() -> None:
        fd = os.open(name, os.O_RDWR)
        with mmap.mmap(fd, 0) as mapped:
            mapped[0:1] = b"x"
            mapped.flush()
        os.close(fd)

    as_user(run)
    return {"bits": mode_of(name), "capability": _privileges(name)[1]}
