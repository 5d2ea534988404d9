"""Listings: the entries of one directory, each with what lstat says of it, sorted by name.

Encoded, they are what a directory's record keeps (:func:`cloudfs.core.changes.decode_listing` reads
that into names of fields).
"""

from __future__ import annotations

import contextlib
import os
import stat as st
from bisect import bisect_left
from operator import itemgetter

import msgspec

from cloudfs.source.numbers import STUB, is_stub

RawEntry = tuple[bytes, int, int, int, int, int, int, int, int, int, bool]
"""The fields of :class:`cloudfs.core.changes.Stat` in order."""

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(list[RawEntry]).decode


def raw_entry(name: bytes, status: os.stat_result, dev: int, mask: int = -1) -> RawEntry:
    """An entry of a listing, in a directory on device ``dev``. ``mask``: what of an inode number
    is the item's own."""
    return (
        name,
        status.st_mode,
        status.st_ino & mask,
        status.st_nlink,
        status.st_uid,
        status.st_gid,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_rdev,
        status.st_dev != dev,
    )


def read_listing(fd: int, dev: int, mask: int, refused: dict[bytes, OSError]) -> list[RawEntry]:
    """The entries of a directory by name. Of what cannot be looked at, which is in ``refused``,
    they have no more than the listing itself says: name, number, and whether it is a directory."""
    entries: list[RawEntry] = []
    append = entries.append
    with os.scandir(fd) as listing:
        for entry in listing:
            name = entry.name.encode("utf-8", "surrogateescape")
            try:
                append(raw_entry(name, entry.stat(follow_symlinks=False), dev, mask))
            except FileNotFoundError:
                continue  # removed since the directory was read
            except OSError as error:
                refused[name] = error
                append(_as_listed(name, entry, mask))
    fix_times_of_stubs(fd, entries)
    entries.sort()
    return entries


def fix_times_of_stubs(fd: int, entries: list[RawEntry]) -> None:
    """In an open directory, let what stands for btrfs subvolumes have no times: the kernel makes
    them up."""
    for index, entry in enumerate(entries):
        if entry[2] == STUB and entry[-1]:  # the device is another one, too
            with contextlib.suppress(OSError):  # gone, or no directory
                flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                stub_fd = os.open(entry[0], flags, dir_fd=fd)
                try:
                    if is_stub(stub_fd, entry[2], entry[1]):
                        entries[index] = (*entry[:7], 0, 0, *entry[9:])
                finally:
                    os.close(stub_fd)


def has_name(entries: list[RawEntry], name: bytes) -> bool:
    """Whether a sorted listing has a name."""
    at = bisect_left(entries, name, key=itemgetter(0))
    return at < len(entries) and entries[at][0] == name


def _as_listed(name: bytes, entry: os.DirEntry[str], mask: int) -> RawEntry:
    try:
        mode = st.S_IFDIR if entry.is_dir(follow_symlinks=False) else 0
    except OSError:  # the file system does not list what it is
        mode = 0
    return name, mode, entry.inode() & mask, 0, 0, 0, 0, 0, 0, 0, False
