"""Reading, writing, mapping, cutting and sharing the data of files."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

from tests.posix.case import USER, Answer, as_user, case, facts, in_process, opens, said, write_file

PAGE = 4096
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO, INSERT = 1, 3, 8, 16, 32

_libc = ctypes.CDLL(None, use_errno=True)


def fallocate(fd: int, mode: int, start: int, length: int) -> None:
    """**fallocate**\\(2)."""
    if _libc.fallocate(fd, mode, ctypes.c_long(start), ctypes.c_long(length)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _pattern(size: int) -> bytes:
    return bytes(range(1, 252)) * (size // 251 + 1)


# -- opening ---------------------------------------------------------------------------------------


@case
def open_with_each_flag() -> Answer:
    found: Answer = {}
    os.mkdir("d")
    flags = {
        name: getattr(os, name)
        for name in ("O_APPEND", "O_CREAT", "O_EXCL", "O_TRUNC", "O_SYNC", "O_DSYNC", "O_NONBLOCK",
                     "O_NOATIME", "O_NOFOLLOW", "O_DIRECTORY", "O_PATH", "O_NOCTTY", "O_ASYNC")
    }  # fmt: skip
    for name, flag in flags.items():
        for access in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_ACCMODE):
            write_file("f", b"12345")
            for path in ("f", "d", "new"):
                found[f"{name} {access} {path}"] = opens(path, access | flag), facts(path)
            if os.path.exists("new"):
                os.unlink("new")
    return found


@case
def open_of_many_flags_together() -> Answer:
    write_file("f", b"12345")
    os.symlink("nowhere", "s")
    new = os.O_CREAT | os.O_EXCL
    return {
        "new over a file": opens("f", new),
        "new over a symlink": opens("s", new),
        "create of a directory": opens("d/", os.O_CREAT),
        "directory to create": opens("d", os.O_CREAT | os.O_DIRECTORY),
        "cut for reading": (opens("f", os.O_RDONLY | os.O_TRUNC), facts("f")),
        "append and cut": opens("f", os.O_WRONLY | os.O_APPEND | os.O_TRUNC),
        "no access for who makes it": said(_written_without_access),
    }


def _written_without_access() -> tuple[int, str]:
    fd = os.open("closed", os.O_CREAT | os.O_RDWR, 0)
    return os.write(fd, b"x"), as_user(lambda: opens("closed", os.O_RDONLY))


@case
def open_without_access_as_a_user() -> Answer:
    def run() -> Answer:
        fd = os.open("new", os.O_CREAT | os.O_RDWR | os.O_EXCL, 0)
        return {"write": os.write(fd, b"x"), "again": opens("new", os.O_RDONLY)}

    return dict(as_user(run))


@case
def read_and_write_by_access() -> Answer:
    write_file("f", b"12345")
    reader, writer = os.open("f", os.O_RDONLY), os.open("f", os.O_WRONLY)
    return {
        "write to a reader": said(os.write, reader, b"x"),
        "read from a writer": said(os.read, writer, 1),
        "cut a reader": said(os.ftruncate, reader, 1),
        "cut a writer": said(os.ftruncate, writer, 1),
        "read a directory": said(os.read, os.open(".", os.O_RDONLY), 1),
        "negative": said(os.ftruncate, writer, -1),
        "negative by path": said(os.truncate, "f", -1),
        "beyond": said(os.pread, reader, 5, 1 << 40),
        "negative offset": said(os.pread, reader, 5, -1),
    }


@case
def noatime_by_users() -> Answer:
    write_file("f", mode=0o666)
    return {"open": as_user(lambda: opens("f", os.O_RDONLY | os.O_NOATIME))}


@case
def nameless_files() -> Answer:
    """O_TMPFILE."""
    found = said(os.open, ".", os.O_TMPFILE | os.O_RDWR, 0o600)
    return {"open": "ok" if isinstance(found, int) else found}


# -- writing ---------------------------------------------------------------------------------------


@case
def appending() -> Answer:
    write_file("f", b"12345")
    one, other = os.open("f", os.O_WRONLY | os.O_APPEND), os.open("f", os.O_RDWR | os.O_APPEND)
    for fd, data in ((one, b"a"), (other, b"b"), (one, b"c")):
        os.write(fd, data)
    found: Answer = {"in turn": Path("f").read_bytes()}
    found["at a position"] = os.pwrite(one, b"d", 0), Path("f").read_bytes()
    os.truncate("f", 2)
    os.write(other, b"e")
    found["after a cut"] = Path("f").read_bytes(), os.lseek(other, 0, os.SEEK_CUR)
    return found


@case
def appending_by_many() -> Answer:
    """Every record of every process is there, whole."""
    pids = []
    for who in range(4):
        pid = os.fork()
        if not pid:
            fd = os.open("f", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            for number in range(100):
                os.write(fd, b"%d:%04d:%s\n" % (who, number, b"x" * 90))
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    lines = Path("f").read_bytes().splitlines()
    return {
        "records": len(lines),
        "whole": len({line for line in lines if len(line) == 97}),
        "size": os.stat("f").st_size,
    }


@case
def writing_and_cutting() -> Answer:
    """A file that is cut and grown again shows zeros."""
    write_file("f", _pattern(3 * PAGE))
    found: Answer = {}
    fd = os.open("f", os.O_RDWR)
    for size in (PAGE + 7, 2 * PAGE + 3, 5, 5 * PAGE, 0, 9):
        os.ftruncate(fd, size)
        data = os.pread(fd, 10 * PAGE, 0)
        found[f"{len(found)}: {size}"] = len(data), data.rstrip(b"\0")[-9:], os.stat("f").st_size
    os.pwrite(fd, b"far", 3 * PAGE)
    found["beyond the end"] = os.pread(fd, 4 * PAGE, 0)
    return found


@case
def holes() -> Answer:
    fd = os.open("f", os.O_CREAT | os.O_RDWR)
    os.pwrite(fd, b"x" * 100_000, 10 << 20)
    os.ftruncate(fd, 30 << 20)
    found: Answer = {"size": os.fstat(fd).st_size, "small": os.fstat(fd).st_blocks < 2000}
    found["zeros"] = os.pread(fd, 5, 5 << 20), os.pread(fd, 5, (10 << 20) + 99_998)
    found["data"] = said(os.lseek, fd, 0, os.SEEK_DATA)
    found["hole"] = said(os.lseek, fd, 10 << 20, os.SEEK_HOLE)
    found["data at the end"] = said(os.lseek, fd, 29 << 20, os.SEEK_DATA)
    found["beyond the end"] = said(os.lseek, fd, 31 << 20, os.SEEK_DATA)
    return found


@case
def large_offsets() -> Answer:
    fd = os.open("f", os.O_CREAT | os.O_RDWR)
    found: Answer = {}
    for place in ((1 << 31) - 1, (1 << 32) + 1, (1 << 40) - 3, (1 << 43)):
        found[f"{place}"] = said(os.pwrite, fd, b"here", place), said(os.pread, fd, 9, place - 2)
    for size in ((1 << 44) - 4096, 1 << 45, (1 << 63) - 1):
        found[f"cut to {size}"] = said(os.ftruncate, fd, size)
        found[f"size of {size}"] = os.fstat(fd).st_size
    return found


@case
def allocating() -> Answer:
    found: Answer = {}
    modes = {
        "allocate": 0, "keep size": KEEP_SIZE, "punch": PUNCH_HOLE, "zero": ZERO,
        "collapse": COLLAPSE, "insert": INSERT, "odd": 1 << 20,
    }  # fmt: skip
    for what, mode in modes.items():
        write_file("f", _pattern(4 * PAGE))
        with Path("f").open("r+b") as file:
            found[what] = said(fallocate, file.fileno(), mode, PAGE, PAGE)
            found[f"{what} beyond"] = said(fallocate, file.fileno(), mode, 8 * PAGE, PAGE)
        found[f"{what}: left"] = facts("f")
    with Path("f").open("r+b") as file:
        found["the library's"] = said(os.posix_fallocate, file.fileno(), 0, 20 * PAGE)
        found["the library's: left"] = facts("f")
    return found


@case
def copying_within_the_kernel() -> Answer:
    write_file("a", _pattern(300_000))
    found: Answer = {}
    ways: dict[str, Callable[[int, int], int]] = {
        "copy_file_range": lambda a, b: os.copy_file_range(a, b, 250_000, 1000, 500),
        "sendfile": lambda a, b: os.sendfile(b, a, 1000, 250_000),
    }
    for name, copy in ways.items():
        with Path("a").open("rb") as a, Path(name).open("w+b") as b:
            got = said(copy, a.fileno(), b.fileno())
            found[name] = got == 250_000, facts(name), hash(Path(name).read_bytes())
    with Path("a").open("r+b") as a:
        found["overlap"] = said(os.copy_file_range, a.fileno(), a.fileno(), 100, 0, 50)
    with Path("a").open("rb") as a, Path("b").open("wb") as b:
        found["clone"] = said(fcntl.ioctl, b.fileno(), 0x40049409, a.fileno())
    return found


@case
def direct_access() -> Answer:
    """O_DIRECT, beside what goes through the page cache."""
    write_file("f", _pattern(4 * PAGE))
    found: Answer = {}
    fd, plain = os.open("f", os.O_RDWR | os.O_DIRECT), os.open("f", os.O_RDWR)
    buffer = mmap.mmap(-1, 2 * PAGE)
    found["read"] = (
        said(os.preadv, fd, [buffer], PAGE),
        buffer[:] == _pattern(4 * PAGE)[PAGE : 3 * PAGE],
    )
    os.pwrite(plain, b"plain", PAGE)
    found["what was written plainly"] = said(os.preadv, fd, [buffer], PAGE), buffer[:5]
    buffer[:] = b"D" * len(buffer)
    found["write"] = said(os.pwritev, fd, [buffer], 3 * PAGE), os.pread(plain, 4, 3 * PAGE)
    found["size"] = os.stat("f").st_size
    found["at the end"] = said(os.preadv, fd, [buffer], 4 * PAGE)
    return found


@case
def direct_access_not_aligned() -> Answer:
    write_file("f", _pattern(4 * PAGE))
    fd = os.open("f", os.O_RDWR | os.O_DIRECT)
    buffer = mmap.mmap(-1, 2 * PAGE)
    found: Answer = {"offset": said(os.preadv, fd, [buffer], 100)}
    found["length"] = said(os.preadv, fd, [memoryview(buffer)[:100]], 0)
    return found


@case
def vectors() -> Answer:
    fd = os.open("f", os.O_CREAT | os.O_RDWR)
    one, other = bytearray(3), bytearray(5)
    found: Answer = {"write": os.pwritev(fd, [b"abc", b"", b"defgh"], 2)}
    found["read"] = os.preadv(fd, [one, other], 1), bytes(one), bytes(other)
    found["append"] = said(os.pwritev, fd, [b"!"], 0, os.RWF_APPEND)
    found["durable"] = said(os.pwritev, fd, [b"?"], 0, os.RWF_DSYNC)
    found["after"] = os.pread(fd, 99, 0)
    return found


@case
def large_reads_and_writes() -> Answer:
    data = os.urandom(1 << 20) * 9 + b"end"
    fd = os.open("f", os.O_CREAT | os.O_RDWR)
    found: Answer = {"write": os.write(fd, data) == len(data)}
    found["read"] = os.pread(fd, len(data) + 5, 0) == data
    found["sync"] = said(os.fsync, fd), said(os.fdatasync, fd), said(os.sync)
    found["advice"] = said(os.posix_fadvise, fd, 0, 0, os.POSIX_FADV_DONTNEED)
    found["read again"] = os.pread(fd, len(data) + 5, 0) == data
    found["odd places"] = [os.pread(fd, 10, place) == data[place : place + 10]
                           for place in (131_071, 1_048_575, 4_194_301)]  # fmt: skip
    return found


@case
def limits_of_size() -> Answer:
    """RLIMIT_FSIZE: a short write, then an error and a signal."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    fd = os.open("f", os.O_CREAT | os.O_RDWR)
    return {
        "short": said(os.pwrite, fd, b"x" * 20_000, 0),
        "over": said(os.pwrite, fd, b"x", 10_000),
        "cut": said(os.ftruncate, fd, 20_000),
        "cut by path": said(os.truncate, "f", 20_000),
        "after": facts("f"),
    }


@case
def syncing_directories() -> Answer:
    os.mkdir("d")
    fd = os.open("d", os.O_RDONLY)
    path = os.open("d", os.O_PATH)
    return {
        "fsync": said(os.fsync, fd),
        "fdatasync": said(os.fdatasync, fd),
        "by path only": said(os.fsync, path),
    }


# -- mapping ---------------------------------------------------------------------------------------


@case
def mappings_shared_between_processes() -> Answer:
    write_file("f", bytes(3 * PAGE))
    fd = os.open("f", os.O_RDWR)
    with mmap.mmap(fd, 0) as mapped:

        def run() -> bytes:
            other = os.open("f", os.O_RDWR)
            with mmap.mmap(other, 0) as theirs:
                seen = theirs[:5]
                theirs[PAGE : PAGE + 6] = b"theirs"
            os.pwrite(other, b"written", 2 * PAGE)
            return seen

        mapped[:4] = b"ours"
        found: Answer = {"they see": in_process(run)}
        found["we see"] = mapped[PAGE : PAGE + 6], mapped[2 * PAGE : 2 * PAGE + 7]
        found["read"] = os.pread(fd, 6, 0), os.pread(fd, 6, PAGE)
        mapped.flush()
    found["after"] = Path("f").read_bytes()
    return found


@case
def mappings_outlive_descriptors() -> Answer:
    write_file("f", bytes(2 * PAGE))
    fd = os.open("f", os.O_RDWR)
    mapped = mmap.mmap(fd, 0)
    os.close(fd)
    os.unlink("f")
    mapped[:4] = b"kept"
    mapped.flush()
    write_file("f", b"other")
    found: Answer = {"mapped": mapped[:5], "named": Path("f").read_bytes()}
    mapped.close()
    return found


@case
def mappings_of_files_that_are_cut() -> Answer:
    write_file("f", _pattern(3 * PAGE))
    fd = os.open("f", os.O_RDWR)
    mapped = mmap.mmap(fd, 3 * PAGE)
    mapped[PAGE : PAGE + 4] = b"late"
    os.ftruncate(fd, PAGE + 2)
    found: Answer = {"within": mapped[PAGE : PAGE + 4]}

    def touch() -> None:
        mapped[2 * PAGE] = 1

    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        touch()
        os._exit(0)
    found["beyond"] = os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGBUS
    os.ftruncate(fd, 3 * PAGE)
    found["grown"] = mapped[PAGE : PAGE + 4], mapped[2 * PAGE : 2 * PAGE + 4]
    mapped.flush()
    found["after"] = Path("f").read_bytes()[PAGE : PAGE + 8]
    return found


@case
def mappings_by_access() -> Answer:
    write_file("f", _pattern(PAGE))
    reader, writer = os.open("f", os.O_RDONLY), os.open("f", os.O_WRONLY)
    ways = {
        "shared write by a reader": (reader, mmap.MAP_SHARED, mmap.PROT_WRITE),
        "private write by a reader": (reader, mmap.MAP_PRIVATE, mmap.PROT_WRITE),
        "shared read by a reader": (reader, mmap.MAP_SHARED, mmap.PROT_READ),
        "shared write by a writer": (writer, mmap.MAP_SHARED, mmap.PROT_WRITE),
    }
    return {
        name: "ok"
        if isinstance(found := said(mmap.mmap, fd, PAGE, way, access), mmap.mmap)
        else found
        for name, (fd, way, access) in ways.items()
    }


@case
def private_mappings_stay_private() -> Answer:
    write_file("f", _pattern(PAGE))
    fd = os.open("f", os.O_RDONLY)
    with mmap.mmap(fd, PAGE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        mapped[:4] = b"mine"
        return {"mapped": mapped[:5], "file": os.pread(fd, 5, 0)}


# -- other calls -----------------------------------------------------------------------------------


@case
def space() -> Answer:
    """df, as it is beneath."""
    here = os.statvfs(".")
    return {
        "sizes": (here.f_bsize, here.f_frsize, here.f_blocks, here.f_files, here.f_namemax),
        "free": here.f_bfree // 5_000,
        "limits": [
            os.pathconf(".", name) for name in ("PC_NAME_MAX", "PC_PATH_MAX", "PC_LINK_MAX")
        ],
    }


@case
def flags_of_files() -> Answer:
    """chattr's flags, by FS_IOC_GETFLAGS."""
    fd = os.open(write_file("f"), os.O_RDONLY)
    found = said(fcntl.ioctl, fd, 0x80086601, bytes(8))
    return {"get": found if isinstance(found, str) else "ok"}


@case
def handles_of_files() -> Answer:
    """name_to_handle_at."""
    from cloudfs.source.handles import handle_of

    fd = os.open(write_file("f"), os.O_PATH)
    found = said(handle_of, fd)
    return {"handle": found if isinstance(found, str) else "ok"}


@case
def unknown_ioctls() -> Answer:
    fd = os.open(write_file("f"), os.O_RDONLY)
    return {"terminal": said(fcntl.ioctl, fd, 0x5401, bytes(64)) == errno.errorcode[errno.ENOTTY]}


@case
def owner_of_what_a_user_writes() -> Answer:
    write_file("f", mode=0o666)
    as_user(lambda: Path("f").write_bytes(b"theirs"))
    as_user(lambda: Path("new").write_bytes(b"theirs"), USER, USER)
    return {"old": facts("f"), "new": facts("new")}
