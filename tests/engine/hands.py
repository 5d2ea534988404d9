"""What can be done to a tree: the operations that are done alike on a live mount and beside it."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import random
import shutil
import socket
from collections.abc import Iterator

from hypothesis import strategies as hs

from cloudfs.source.inode import FICLONE
from tests.engine.test_machine import PLACES, SEEDS, SIZES, Tree

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
_AT_CWD = -100
_libc = ctypes.CDLL(None, use_errno=True)

Operation = tuple[str, dict[str, object]]


class Hands:
    """Does things to one tree. What fails is not done, as on the other tree."""

    write = Tree.write
    overwrite = Tree.overwrite
    truncate = Tree.truncate
    rename = Tree.rename
    link = Tree.link
    remove = Tree.remove
    replace = Tree.replace
    attributes = Tree.attributes
    xattr = Tree.xattr
    storm = Tree.storm
    write_through_a_mapping = Tree.write_through_a_mapping
    write_through_mappings_that_are_there = Tree.write_through_mappings_that_are_there
    unmap = Tree.unmap

    def __init__(self, top: bytes) -> None:
        self.top = top
        self.mapped: list[mmap.mmap] = []
        self.held: list[int] = []

    def path(self, parts: list[bytes]) -> bytes:
        return os.path.join(self.top, *parts)

    def do(self, operation: Operation) -> None:
        """Do one thing."""
        name, arguments = operation
        getattr(self, name)(**arguments)

    def let_go(self) -> None:
        """Have nothing open any more."""
        self.unmap()
        while self.held:
            os.close(self.held.pop())

    def settle(self) -> None:
        """Write what is dirty in mappings, which else would move mtime at another time here."""
        for mapped in self.mapped:
            mapped.flush()

    @contextlib.contextmanager
    def file(self, parts: list[bytes], flags: int) -> Iterator[int]:
        """An open file, if there is one; else what is done with it is not done."""
        path = self.path(parts)
        if not os.path.isfile(path):
            yield -1
            return
        fd = os.open(path, flags)
        try:
            yield fd
        finally:
            os.close(fd)

    # -- data ----------------------------------------------------------------------------------

    def append(self, parts: list[bytes], size: int, seed: int) -> None:
        with self.file(parts, os.O_WRONLY | os.O_APPEND) as fd:
            if fd >= 0:
                os.write(fd, random.Random(seed).randbytes(min(size, 5000)))

    def append_by_two(self, parts: list[bytes], seed: int) -> None:
        flags = os.O_WRONLY | os.O_APPEND
        with self.file(parts, flags) as one, self.file(parts, flags) as other:
            if one >= 0:
                for number in range(6):
                    os.write((one, other)[number % 2], b"%d " % (seed + number))

    def cut_on_opening(self, parts: list[bytes]) -> None:
        with self.file(parts, os.O_WRONLY | os.O_TRUNC):
            pass

    def change_keeping_mtime(self, parts: list[bytes], size: int) -> None:
        self.settle()
        with self.file(parts, os.O_RDWR) as fd:
            if fd >= 0:
                before = os.fstat(fd)
                os.pwrite(fd, b"changed" + bytes([size % 256]), 0)
                os.utime(fd, ns=(before.st_atime_ns, before.st_mtime_ns))

    def write_far_beyond(self, parts: list[bytes], size: int, seed: int) -> None:
        with self.file(parts, os.O_WRONLY) as fd:
            if fd >= 0:
                at = os.fstat(fd).st_size + size * 4
                if at < 3_000_000:
                    os.pwrite(fd, random.Random(seed).randbytes(100), at)

    def punch(self, parts: list[bytes], offset: int, size: int) -> None:
        """Or write zeros, where the file system cannot. Behind the end that would do nothing, while
        a hole there moves the file's times."""
        with self.file(parts, os.O_RDWR) as fd:
            if fd >= 0 and size and offset < os.fstat(fd).st_size:
                keep_size_and_punch = 3
                ends = ctypes.c_int64(offset), ctypes.c_int64(size)
                if _libc.fallocate(fd, keep_size_and_punch, *ends):
                    there = os.fstat(fd).st_size
                    os.pwrite(fd, bytes(max(0, min(size, there - offset))), offset)

    def copy_range(self, a: list[bytes], b: list[bytes], size: int) -> None:
        with self.file(a, os.O_RDONLY) as source, self.file(b, os.O_WRONLY) as target:
            if source >= 0 and target >= 0:
                done = 0
                with contextlib.suppress(OSError):  # within one file, overlapping
                    # Where blocks are shared, whole ones go first, and fewer bytes than asked.
                    while got := os.copy_file_range(source, target, size - done, done, done):
                        done += got

    def clone(self, a: list[bytes], b: list[bytes]) -> None:
        """Or copy, where the file system cannot."""
        with self.file(a, os.O_RDONLY) as source, self.file(b, os.O_WRONLY) as target:
            if source < 0 or target < 0 or os.path.samestat(os.fstat(source), os.fstat(target)):
                return
            os.ftruncate(target, 0)
            try:
                fcntl.ioctl(target, FICLONE, source)
            except OSError:
                with (
                    open(source, "rb", closefd=False) as a_file,
                    open(target, "wb", closefd=False) as b_file,
                ):
                    shutil.copyfileobj(a_file, b_file)

    # -- what is held open ---------------------------------------------------------------------

    def hold(self, parts: list[bytes], append: bool) -> None:
        if os.path.isfile(self.path(parts)) and len(self.held) < 8:
            flags = os.O_RDWR | (os.O_APPEND if append else 0)
            self.held.append(os.open(self.path(parts), flags))

    def write_held(self, seed: int, offset: int, size: int) -> None:
        for fd in self.held[seed % 3 :: 3]:
            os.lseek(fd, offset, os.SEEK_SET)
            os.write(fd, random.Random(seed).randbytes(min(size, 5000)))

    def cut_held(self, seed: int, size: int) -> None:
        for fd in self.held[seed % 3 :: 3]:
            os.ftruncate(fd, size)

    def change_held(self, seed: int, mode: int) -> None:
        for fd in self.held[seed % 3 :: 3]:
            os.fchmod(fd, mode)
            os.setxattr(fd, b"trusted.held", b"%d" % seed)

    # -- names and attributes ------------------------------------------------------------------

    def exchange(self, a: list[bytes], b: list[bytes]) -> None:
        _libc.renameat2(_AT_CWD, self.path(a), _AT_CWD, self.path(b), RENAME_EXCHANGE)

    def rename_to_free(self, a: list[bytes], b: list[bytes]) -> None:
        _libc.renameat2(_AT_CWD, self.path(a), _AT_CWD, self.path(b), RENAME_NOREPLACE)

    def make_socket(self, parts: list[bytes]) -> None:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as made:
            at = os.open(os.path.dirname(self.path(parts)), os.O_PATH | os.O_DIRECTORY)
            try:
                made.bind(b"/proc/self/fd/%d/%s" % (at, parts[-1]))
            finally:
                os.close(at)

    @property
    def aside(self) -> bytes:
        """A place beside the tree."""
        return b"%s-aside-%d" % (self.top, os.getpid())

    move_out = Tree.move_out
    move_in = Tree.move_in

    def put_times_back(self, parts: list[bytes]) -> None:
        self.settle()
        with contextlib.suppress(OSError):
            os.utime(self.path(parts), ns=(1, 1), follow_symlinks=False)


def _of(name: str, **arguments: hs.SearchStrategy[object]) -> hs.SearchStrategy[Operation]:
    return hs.tuples(hs.just(name), hs.fixed_dictionaries(arguments))


OFFSETS = hs.sampled_from([0, 1, 4095, 4096, 9000, 16_384, 20_000, 33_000, 40_000, 150_000])
"""In the blocks of a backup and in the larger ones that a freeze keeps, at each border."""

MODES = hs.sampled_from([0o600, 0o755, 0o4711, 0o1777])
KINDS = hs.sampled_from(["dir", "link", "fifo", "device"])

OPERATIONS: hs.SearchStrategy[Operation] = hs.one_of(
    _of("write", parts=PLACES, size=SIZES, seed=SEEDS),
    _of("overwrite", parts=PLACES, size=SIZES, seed=SEEDS, offset=OFFSETS),
    _of("append", parts=PLACES, size=SIZES, seed=SEEDS),
    _of("append_by_two", parts=PLACES, seed=SEEDS),
    _of("truncate", parts=PLACES, size=SIZES),
    _of("cut_on_opening", parts=PLACES),
    _of("change_keeping_mtime", parts=PLACES, size=SIZES),
    _of("write_far_beyond", parts=PLACES, size=SIZES, seed=SEEDS),
    _of("punch", parts=PLACES, offset=OFFSETS, size=SIZES),
    _of("copy_range", a=PLACES, b=PLACES, size=SIZES),
    _of("clone", a=PLACES, b=PLACES),
    _of("hold", parts=PLACES, append=hs.booleans()),
    _of("write_held", seed=SEEDS, offset=OFFSETS, size=SIZES),
    _of("cut_held", seed=SEEDS, size=SIZES),
    _of("change_held", seed=SEEDS, mode=MODES),
    _of("let_go"),
    _of("write_through_a_mapping", parts=PLACES, seed=SEEDS, keep=hs.booleans()),
    _of("write_through_mappings_that_are_there", seed=SEEDS),
    _of("unmap"),
    _of("rename", a=PLACES, b=PLACES),
    _of("rename_to_free", a=PLACES, b=PLACES),
    _of("exchange", a=PLACES, b=PLACES),
    _of("link", a=PLACES, b=PLACES),
    _of("remove", parts=PLACES),
    _of("replace", parts=PLACES, kind=KINDS),
    _of("make_socket", parts=PLACES),
    _of("attributes", parts=PLACES, mode=MODES, uid=hs.integers(0, 9)),
    _of("put_times_back", parts=PLACES),
    _of("xattr", parts=PLACES, size=hs.sampled_from([0, 10, 5000]), remove=hs.booleans()),
    _of("storm", parts=PLACES),
)
