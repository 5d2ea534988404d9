"""A tree of odd things, and comparing two trees in all that a user can see of them."""

from __future__ import annotations

import os
import socket
import stat
import struct
from pathlib import Path

from tests.fuse.conftest import BLOCK

ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, permissions, who)
    for tag, permissions, who in (
        (0x01, 6, 0xFFFFFFFF),
        (0x02, 4, 1234),
        (0x04, 4, 0xFFFFFFFF),
        (0x10, 6, 0xFFFFFFFF),
        (0x20, 0, 0xFFFFFFFF),
    )
)
"""rw for the owner, r for user 1234 and the group, as system.posix_acl_access stores it."""


def make_odd_tree(root: Path) -> None:
    """One of each kind of item, and files of every length around the edges of blocks."""
    root.mkdir()
    for blocks in range(4):
        for off in (-1, 0, 1):
            length = blocks * BLOCK + off
            if length >= 0:
                data = os.urandom(length // 2) + bytes(length - length // 2)
                (root / f"length-{length}").write_bytes(data)
    deep = root / "dir" / "in" / "dir"
    deep.mkdir(parents=True)
    (deep / "file").write_text("deep")
    (root / "empty-dir").mkdir(mode=0o700)
    os.link(root / "length-1", deep / "hard-link")
    os.symlink("length-1", root / "link")
    os.symlink(b"\xff\xfe nowhere", root / "dangling")
    (root / os.fsdecode(b"not utf-8 \xff")).write_text("1")
    (root / "new\nline").write_text("2")
    (root / ("n" * 255)).write_text("3")
    os.mkfifo(root / "fifo", 0o640)
    os.mknod(root / "device", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "socket"))
    with (root / "sparse").open("wb") as file:
        file.truncate(50 * BLOCK)
        file.seek(20 * BLOCK)
        file.write(b"island")
    old = root / "old"
    old.write_text("before the epoch")
    os.utime(old, ns=(-5, -1_500_000_001))
    (root / "script").write_text("#!/bin/sh\n")
    (root / "script").chmod(0o6751)
    os.chown(root / "script", 1000, 1001)
    tagged = root / "tagged"
    tagged.write_text("xattrs")
    os.setxattr(tagged, "user.small", b"value")
    os.setxattr(tagged, "user.empty", b"")
    os.setxattr(root / "dir", "trusted.dir", b"on a directory")
    os.setxattr(root / "link", "trusted.link", b"on a link", follow_symlinks=False)
    os.setxattr(tagged, "system.posix_acl_access", ACL)


def assert_same(one: Path, other: Path) -> int:
    """Both trees are alike in names, metadata and content. The number of items compared."""
    return _compare(one.resolve(), other.resolve())


def _compare(one: Path, other: Path) -> int:
    assert_same_item(one, other)
    count = 1
    if not one.is_symlink() and one.is_dir():
        names = sorted(os.listdir(one))
        assert sorted(os.listdir(other)) == names
        count += sum(_compare(one / name, other / name) for name in names)
    return count


def assert_same_item(one: Path, other: Path) -> None:
    """Both are alike in metadata and content."""
    a, b = one.lstat(), other.lstat()
    for field in ("st_mode", "st_uid", "st_gid", "st_size", "st_nlink", "st_mtime_ns", "st_rdev"):
        if field == "st_size" and stat.S_ISDIR(a.st_mode):
            continue  # what a directory's names take up is each file system's own affair
        assert getattr(a, field) == getattr(b, field), (one, field)
    names = sorted(os.listxattr(one, follow_symlinks=False))
    assert sorted(os.listxattr(other, follow_symlinks=False)) == names, one
    for name in names:
        value = os.getxattr(one, name, follow_symlinks=False)
        assert os.getxattr(other, name, follow_symlinks=False) == value, (one, name)
    if stat.S_ISLNK(a.st_mode):
        assert os.readlink(os.fsencode(one)) == os.readlink(os.fsencode(other))
    elif stat.S_ISREG(a.st_mode):
        assert one.read_bytes() == other.read_bytes(), one
