"""What is mounted where, as the kernel lists it (proc_pid_mountinfo(5)). No mount is asked."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

_ESCAPED = re.compile(rb"\\([0-7]{3})")


class Mount(NamedTuple):
    """One mount."""

    number: int
    parent: int  # the number of the mount that it is mounted on
    device: int  # as st_dev
    top: bytes  # what of the file system is mounted
    place: bytes
    kind: str
    of: bytes  # the device or whatever else was mounted
    options: frozenset[str]  # of the mount
    given: bytes  # options of its file system, as that writes them


def mounts(pid: str = "self") -> list[Mount]:
    """All that this process sees, or another one, oldest first. Raises OSError."""
    found = []
    # Names hold what other breaks of lines and other encodings there are: only "\n" is escaped.
    for line in Path(f"/proc/{pid}/mountinfo").read_bytes().split(b"\n")[:-1]:
        fields, _, rest = line.partition(b" - ")
        number, parent, device, top, place, options = fields.split(b" ")[:6]
        kind, of, given = rest.split(b" ")[:3]
        major, _, minor = device.partition(b":")
        made = os.makedev(int(major), int(minor))
        words = frozenset(os.fsdecode(options).split(","))
        what = (os.fsdecode(kind), _plain(of), words, _plain(given))
        found.append(Mount(int(number), int(parent), made, _plain(top), _plain(place), *what))
    return found


def mount_at(fd: int, all_mounts: list[Mount]) -> Mount | None:
    """The mount that an open item is on; None where it is not listed: only those are that the root
    directory leads to, and not the one that it lies within, as in a chroot."""
    with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
        number = next(int(line.split()[1]) for line in file if line.startswith(b"mnt_id:"))
    return next((mount for mount in all_mounts if mount.number == number), None)


def shown_twice(top: bytes, fd: int, all_mounts: list[Mount]) -> tuple[bytes, bytes] | None:
    """Two places in a directory, which is open and may be one of them, of which one shows what the
    other does, as with bind mounts; None where there are none."""
    own = mount_at(fd, all_mounts)
    if own is None:
        return None
    inside = own.top.rstrip(b"/") + top.removeprefix(own.place.rstrip(b"/"))
    parts = [own._replace(top=inside, place=top), *seen_within(top, own.number, all_mounts)]
    for number, one in enumerate(parts):
        for other in parts[:number]:
            if one.device == other.device and overlap(one.top, other.top):
                return one.place, other.place
    return None


def overlap(one: bytes, other: bytes) -> bool:
    """Whether one of two directories is, or lies in, the other."""
    one, other = one.rstrip(b"/") + b"/", other.rstrip(b"/") + b"/"
    return one.startswith(other) or other.startswith(one)


def within(top: bytes, all_mounts: list[Mount]) -> list[Mount]:
    """What is mounted below a directory; of several in one place the last, which hides the rest."""
    prefix = top.rstrip(b"/") + b"/"
    last = {mount.place: mount for mount in all_mounts if mount.place.startswith(prefix)}
    return list(last.values())


def seen_within(top: bytes, number: int, all_mounts: list[Mount]) -> list[Mount]:
    """What is mounted below a directory that is on the mount of this number, and not hidden by what
    is mounted over it or above."""
    prefix = top.rstrip(b"/") + b"/"
    below = {mount.number: mount for mount in all_mounts if mount.place.startswith(prefix)}
    covered = {(mount.parent, mount.place) for mount in below.values()}

    def is_seen(mount: Mount) -> bool:
        parts = mount.place[len(prefix) :].split(b"/")
        above = [prefix + b"/".join(parts[:end]) for end in range(1, len(parts))]
        if any((mount.parent, place) in covered for place in above):
            return False
        return mount.parent == number or (mount.parent in below and is_seen(below[mount.parent]))

    tops = [mount for mount in below.values() if (mount.number, mount.place) not in covered]
    return [mount for mount in tops if is_seen(mount)]


def _plain(escaped: bytes) -> bytes:
    """Without the octal escapes of blanks, line breaks and backslashes."""
    return _ESCAPED.sub(lambda match: bytes([int(match[1], 8)]), escaped)
