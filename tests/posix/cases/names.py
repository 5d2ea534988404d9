"""Making, linking, renaming, removing and listing names."""

from __future__ import annotations

import ctypes
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

from cloudfs.fuse.live import calls
from tests.posix.case import USER, Answer, as_user, case, facts, opens, said, write_file

NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
CWD = -100


def rename_with(old: str, new: str, flags: int) -> None:
    """**renameat2**\\(2)."""
    calls.rename(CWD, os.fsencode(old), CWD, os.fsencode(new), flags)


def _kinds() -> list[str]:
    """One of each kind, to be renamed over one another."""
    write_file("file", b"of the file")
    os.link("file", "other name")
    os.mkdir("empty")
    os.mkdir("full")
    write_file("full/in", b"of the file within")
    os.symlink("file", "link")
    os.mkfifo("fifo")
    return ["file", "other name", "empty", "full", "link", "fifo", "missing", "full/in", "full/no"]


def _all_facts() -> list[tuple[str, object, int]]:
    found = []
    for place, names, files in os.walk("."):
        for name in names + files:
            path = f"{place}/{name}"
            found.append((path, facts(path), os.lstat(path).st_nlink))
    return sorted(found)


def _renames(rename: Callable[[str, str], None]) -> Answer:
    found: Answer = {}
    os.mkdir("names")
    os.chdir("names")
    names = _kinds()
    os.chdir("..")
    for old in names:
        for new in names:
            place = f"{old}-{new}".replace("/", "-")
            os.mkdir(place)
            os.chdir(place)
            _kinds()
            said_to_be = said(rename, old, new)
            found[f"{old} to {new}"] = (said_to_be, _all_facts())
            os.chdir("..")
    return found


@case
def rename_of_each_kind_to_each() -> Answer:
    return _renames(os.rename)


@case
def rename_without_replacing() -> Answer:
    return _renames(lambda old, new: rename_with(old, new, NOREPLACE))


@case
def rename_that_exchanges() -> Answer:
    return _renames(lambda old, new: rename_with(old, new, EXCHANGE))


@case
def rename_with_odd_flags() -> Answer:
    write_file("a", b"a")
    write_file("b", b"b")
    found: Answer = {}
    for flags in (WHITEOUT, WHITEOUT | NOREPLACE, NOREPLACE | EXCHANGE, 8, 1 << 20):
        found[f"{flags}"] = (said(rename_with, "a", f"new {flags}", flags), sorted(os.listdir(".")))
        if os.path.lexists(f"new {flags}"):
            os.rename(f"new {flags}", "a")
    return found


@case
def rename_of_directories_into_themselves() -> Answer:
    os.makedirs("a/b/c")
    return {
        "into itself": said(os.rename, "a", "a/b/c/d"),
        "onto what is above": said(os.rename, "a/b/c", "a"),
        "exchange with what is below": said(rename_with, "a", "a/b", EXCHANGE),
        "dot": said(os.rename, "a/.", "b"),
        "dot dot": said(os.rename, "a/b/..", "b"),
        "to itself": said(os.rename, "a", "a"),
        "left": _all_facts(),
    }


@case
def rename_of_directories_between_directories() -> Answer:
    """The links of both parents, and where ".." leads."""
    os.makedirs("from/moved/in")
    os.mkdir("to")
    for name in ("from", "to"):
        os.stat(name)
    os.rename("from/moved", "to/moved")
    found: Answer = {"after": _all_facts()}
    found["dot dot"] = os.path.samefile("to/moved/..", "to")
    os.mkdir("from/other")
    rename_with("from/other", "to/moved", EXCHANGE)
    found["exchanged"] = _all_facts()
    return found


@case
def rename_by_users() -> Answer:
    """A directory of another's cannot be moved elsewhere: that would write to its ".."."""
    for name in ("from", "to"):
        os.mkdir(name, 0o777)
    os.mkdir("from/theirs", 0o755)
    os.mkdir("from/open", 0o777)
    write_file("from/file")
    os.mkdir("closed", 0o755)
    write_file("closed/file", mode=0o666)

    def run() -> Answer:
        return {
            "directory elsewhere": said(os.rename, "from/theirs", "to/theirs"),
            "directory here": said(os.rename, "from/theirs", "from/renamed"),
            "open directory elsewhere": said(os.rename, "from/open", "to/open"),
            "file elsewhere": said(os.rename, "from/file", "to/file"),
            "out of a closed one": said(os.rename, "closed/file", "to/stolen"),
            "into a closed one": said(os.rename, "to/file", "closed/new"),
            "exchange with a closed one": said(rename_with, "to/file", "closed/file", EXCHANGE),
        }

    return dict(as_user(run)) | {"left": _all_facts()}


@case
def rename_of_open_files() -> Answer:
    found: Answer = {}
    with Path("a").open("w+b", buffering=0) as a, Path("b").open("w+b", buffering=0) as b:
        a.write(b"of a")
        b.write(b"of b")
        os.rename("a", "b")
        a.write(b" and more")
        b.write(b", unnamed")
        found["contents"] = os.pread(a.fileno(), 99, 0), os.pread(b.fileno(), 99, 0)
        found["links"] = os.fstat(a.fileno()).st_nlink, os.fstat(b.fileno()).st_nlink
        found["by name"] = Path("b").read_bytes()
        found["cut"] = said(os.ftruncate, b.fileno(), 2), os.fstat(b.fileno()).st_size
        found["again"] = opens(f"/proc/self/fd/{b.fileno()}", os.O_RDWR)
        found["linked again"] = said(
            os.link, f"/proc/self/fd/{b.fileno()}", "back", follow_symlinks=True
        )
    return found


@case
def hard_links() -> Answer:
    write_file("a", b"one")
    os.mkdir("d")
    os.symlink("a", "s")
    found: Answer = {"file": said(os.link, "a", "d/b"), "links": facts("a")}
    found["same"] = os.path.samefile("a", "d/b")
    Path("d/b").write_bytes(b"other")
    found["content"] = Path("a").read_bytes(), facts("a")
    os.chmod("d/b", 0o600)
    found["mode"] = facts("a")
    os.unlink("a")
    found["one gone"] = facts("d/b")
    found["directory"] = said(os.link, "d", "e")
    found["symlink"] = said(os.link, "s", "t", follow_symlinks=False), facts("t"), facts("s")
    found["exists"] = said(os.link, "d/b", "s")
    os.mkfifo("fifo")
    found["fifo"] = said(os.link, "fifo", "fifo2"), facts("fifo")
    found["renamed to its other name"] = said(os.rename, "fifo", "fifo2"), sorted(os.listdir("."))
    return found


@case
def hard_links_by_users() -> Answer:
    for name, owner, mode in (("mine", USER, 0o600), ("theirs", 0, 0o644), ("open", 0, 0o666)):
        os.chown(write_file(name, mode=mode), owner, owner)
    os.chown(write_file("special", mode=0o4777), 0, 0)
    names = ("mine", "theirs", "open", "special")
    return dict(as_user(lambda: {name: said(os.link, name, f"{name}-2") for name in names}))


@case
def symlinks() -> Answer:
    found: Answer = {}
    for length in (1, 255, 256, 1023, 4000, 4094, 4095, 4096):
        target = "t" * length
        found[f"{length}"] = said(os.symlink, target, f"l{length}"), facts(f"l{length}")
        if os.path.lexists(f"l{length}"):
            found[f"{length}"] += (os.readlink(f"l{length}") == target,)
    found["empty"] = said(os.symlink, "", "empty")
    os.symlink(os.fsdecode(b"\xff\n\x01"), "odd")
    found["odd"] = os.readlink(b"odd")
    os.mkdir("d")
    write_file("d/f")
    os.symlink("../d/f", "d/up")
    found["through"] = Path("d/up").read_bytes()
    os.symlink("d/up", "chain")
    found["chain"] = Path("chain").read_bytes()
    for number in range(45):
        os.symlink(f"c{number + 1}", f"c{number}")
    write_file("c45")
    found["long chains"] = [opens(f"c{number}", os.O_RDONLY) for number in (0, 4, 5, 6, 40)]
    found["create through"] = said(os.symlink, "made", "maker"), opens("maker", os.O_CREAT)
    found["made"] = facts("made")
    return found


@case
def names_of_all_bytes() -> Answer:
    found: Answer = {}
    for number in range(1, 256):
        if number != ord("/"):
            name = b"n" + bytes([number])
            os.close(os.open(name, os.O_CREAT))
    found["listed"] = sorted(os.listdir(b"."))
    for name in (b"\n", b" ", b"\xff\xfe", b"*", b"-rf", b".hidden", b"..."):
        found[repr(name)] = said(os.mkdir, name), said(os.stat, name) != "ENOENT"
    return found


@case
def unlinked_files_go_on() -> Answer:
    with Path("f").open("w+b", buffering=0) as file:
        file.write(b"before")
        os.unlink("f")
        found: Answer = {"gone": facts("f")}
        file.write(b", after")
        os.ftruncate(file.fileno(), 9)
        found["read"] = os.pread(file.fileno(), 99, 0)
        found["stat"] = os.fstat(file.fileno()).st_nlink, os.fstat(file.fileno()).st_size
        os.fchmod(file.fileno(), 0o604)
        os.utime(file.fileno(), (5, 6))
        found["set"] = oct(os.fstat(file.fileno()).st_mode), os.fstat(file.fileno()).st_mtime
        os.setxattr(file.fileno(), "user.x", b"y")
        found["xattrs"] = os.listxattr(file.fileno())
        write_file("f", b"another")
        found["both"] = os.pread(file.fileno(), 99, 0), Path("f").read_bytes()
    return found


@case
def removed_directories_go_on() -> Answer:
    os.mkdir("d")
    fd = os.open("d", os.O_RDONLY)
    os.chdir("d")
    os.rmdir("../d")
    return {
        "links": os.fstat(fd).st_nlink,
        "list": said(os.listdir, fd),
        "create": opens("new", os.O_CREAT),
        "mkdir": said(os.mkdir, "new"),
        "stat": said(os.stat, "new"),
        "dot": said(os.listdir, "."),
        "up": said(os.lstat, "../d"),
        "chmod": said(os.fchmod, fd, 0o700),
    }


@case
def rmdir_of_full_directories() -> Answer:
    os.makedirs("a/b")
    found: Answer = {"full": said(os.rmdir, "a"), "dot": said(os.rmdir, "a/b/.")}
    found["dot dot"] = said(os.rmdir, "a/b/..")
    with Path("a/b/f").open("w"):
        found["open file in it"] = said(os.rmdir, "a/b")
        os.unlink("a/b/f")
        found["unlinked open file in it"] = said(os.rmdir, "a/b")
    found["now"] = said(os.rmdir, "a")
    return found


@case
def sockets() -> Answer:
    found: Answer = {}
    os.umask(0o027)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as caller:
        listener.bind("socket")
        listener.listen()
        found["made"] = facts("socket")
        found["connect"] = said(caller.connect, "socket")
        found["connect as a user"] = as_user(
            lambda: said(socket.socket(socket.AF_UNIX).connect, "socket")
        )
        found["again"] = said(socket.socket(socket.AF_UNIX).bind, "socket")
        found["open"] = opens("socket", os.O_RDWR)
    os.rename("socket", "moved")
    found["moved"] = facts("moved")
    return found


@case
def fifos() -> Answer:
    os.mkfifo("fifo", 0o644)
    found: Answer = {"nobody reads": opens("fifo", os.O_WRONLY | os.O_NONBLOCK)}
    reader = os.open("fifo", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open("fifo", os.O_WRONLY)
    found["wrote"] = os.write(writer, b"through")
    found["read"] = os.read(reader, 99)
    found["after"] = facts("fifo")
    return found


# -- listing ---------------------------------------------------------------------------------------


def _entries(fd: int) -> list[tuple[bytes, int, int]]:
    """Names, inode numbers and types, as **getdents64**\\(2) tells them."""
    libc, found = ctypes.CDLL(None, use_errno=True), []
    buffer = ctypes.create_string_buffer(4096)
    while (length := libc.syscall(217, fd, buffer, len(buffer))) > 0:
        data = buffer.raw[:length]
        while data:
            size = int.from_bytes(data[16:18], "little")
            name = data[19:size].split(b"\0")[0]
            found.append((name, int.from_bytes(data[:8], "little"), data[18]))
            data = data[size:]
    return sorted(found)


@case
def listing_of_each_kind() -> Answer:
    """With "." and "..", whose numbers are those that stat says."""
    _kinds()
    os.mkdir("sub")
    fd = os.open("sub", os.O_RDONLY)
    found: Answer = {"sub": [name for name, _, _ in _entries(fd)]}
    numbers = {name: number for name, number, _ in _entries(os.open("sub", os.O_RDONLY))}
    found["dot"] = numbers[b"."] == os.stat("sub").st_ino
    found["dot dot"] = numbers[b".."] == os.stat(".").st_ino
    entries = _entries(os.open(".", os.O_RDONLY))
    found["types"] = [(name, kind) for name, _, kind in entries]
    found["numbers"] = all(os.lstat(name).st_ino == number for name, number, _ in entries[2:])
    return found


@case
def listing_again() -> Answer:
    """From the start, a directory is listed as it is then."""
    os.mkdir("d")
    fd = os.open("d", os.O_RDONLY)
    write_file("d/one")
    found: Answer = {"made since it was opened": sorted(os.listdir(fd))}
    write_file("d/two")
    os.unlink("d/one")
    found["again"] = sorted(os.listdir(fd))
    os.rename("d/two", "d/three")
    found["renamed"] = sorted(os.listdir(fd))
    return found


@case
def listing_while_all_is_removed() -> Answer:
    os.mkdir("d")
    for number in range(3000):
        os.mknod(f"d/{number}")
    removed = 0
    with os.scandir("d") as entries:
        for entry in entries:
            os.unlink(entry)
            removed += 1
    return {"removed": removed, "left": os.listdir("d"), "rmdir": said(os.rmdir, "d")}


@case
def listing_by_position() -> Answer:
    """Every name comes once, also when a listing is taken up at a position."""
    os.mkdir("d")
    names = {f"name-{number}" for number in range(500)}
    for name in names:
        os.mknod(f"d/{name}")
    libc = ctypes.CDLL(None)
    libc.opendir.restype = libc.readdir64.restype = ctypes.c_void_p
    libc.telldir.restype = ctypes.c_long
    stream = ctypes.c_void_p(libc.opendir(b"d"))

    def rest() -> list[str]:
        found = []
        while entry := libc.readdir64(stream):
            found.append(ctypes.string_at(entry + 19).decode())
        return found

    first = [ctypes.string_at(libc.readdir64(stream) + 19).decode() for _ in range(100)]
    position = libc.telldir(stream)
    second = rest()
    libc.seekdir(stream, ctypes.c_long(position))
    third = rest()
    libc.rewinddir(stream)
    return {
        "once": len(first + second) == len(set(first + second)) == 502,
        "all": set(first + second) == names | {".", ".."},
        "again": second == third,
        "from the start": len(rest()),
    }


@case
def numbers_are_the_same_by_all_ways() -> Answer:
    write_file("f")
    number, device = os.stat("f").st_ino, os.stat("f").st_dev
    with Path("f").open() as file:
        found: Answer = {"fstat": os.fstat(file.fileno()).st_ino == number}
    os.rename("f", "g")
    os.link("g", "h")
    found["renamed"] = os.stat("g").st_ino == number
    found["linked"] = os.stat("h").st_ino == number
    found["device"] = os.stat("h").st_dev == os.stat(".").st_dev == device
    return found


@case
def storms_of_the_same_name() -> Answer:
    """Number and content belong together, however often a name is given again."""
    wrong = 0
    for number in range(300):
        kind = number % 3
        if kind == 0:
            write_file("x", b"%d" % number)
            wrong += Path("x").read_bytes() != b"%d" % number
            os.unlink("x")
        elif kind == 1:
            os.mkdir("x")
            wrong += not stat.S_ISDIR(os.lstat("x").st_mode)
            os.rmdir("x")
        else:
            os.symlink(f"{number}", "x")
            wrong += os.readlink("x") != f"{number}"
            os.unlink("x")
    return {"wrong": wrong}
