"""What the live mount answers differently from the file system beneath, and why.

An exception is named by a case and the keys of what it returns. A test fails where one is missing,
and where one is no longer one.
"""

from __future__ import annotations

from typing import NamedTuple


class Excepted(NamedTuple):
    """What of one case differs; ``only``: on a file system of this kind beneath."""

    case: str
    keys: tuple[str, ...]
    why: str
    only: str = ""


NO_ALLOCATION = "pyfuse3 has no handler for fallocate, so programs fall back to writes"
NO_SEEKING = "pyfuse3 has no handler for lseek, so the kernel calls everything data"
UMASK = (
    "the kernel takes the umask off before it asks, as pyfuse3 cannot have it leave that to the"
    " file system (FUSE_CAP_DONT_MASK), so it counts in a directory with a default ACL too"
)
NOT_WHO_WRITES = (
    "a write says by which descriptor it is made and not by whom, so setuid and setgid go or stay"
    " by who opened the file"
)
LATE_WRITES = f"what was written to a mapping comes as a write, and {NOT_WHO_WRITES}"
NO_NAMELESS = "FUSE knows O_TMPFILE, but pyfuse3 does not; programs fall back to names"
NO_FLAGS = "pyfuse3 has no handler for ioctl, by which file flags are told"
ANY_ALIGNMENT = "the live mount takes direct reads and writes that are not aligned"
LINK_LIMIT = "the C library asks ext4 by its magic number, and knows no limit of FUSE"
TIME_OF_DAY = (
    "pyfuse3 looks at the clock itself when a time is set to now, and does not say so; the change"
    " time is that of the kernel's tick"
)
NOTHING_TO_SET = "the kernel asks for nothing to be set, so no change time is either"

EXCEPTIONS = (
    Excepted(
        "allocating",
        ("allocate", "allocate beyond", "allocate: left", "keep size", "keep size beyond", "punch",
         "punch beyond"),
        NO_ALLOCATION,
    ),
    Excepted(
        "allocating",
        ("collapse", "collapse beyond", "collapse: left", "insert", "insert beyond",
         "insert: left", "zero", "zero beyond", "zero: left"),
        NO_ALLOCATION,
        only="ext4",
    ),
    Excepted("default_lists_with_umask", ("directory", "fifo", "file", "node", "program"), UMASK),
    Excepted("direct_access_not_aligned", ("length", "offset"), ANY_ALIGNMENT, only="ext4"),
    Excepted("flags_of_files", ("get",), NO_FLAGS),
    Excepted("holes", ("data", "data at the end", "hole"), NO_SEEKING),
    Excepted("nameless_files", ("open",), NO_NAMELESS),
    Excepted("privileges_and_a_descriptor_of_a_user", ("bits",), NOT_WHO_WRITES),
    Excepted("privileges_and_a_descriptor_of_root", ("bits",), NOT_WHO_WRITES),
    Excepted("privileges_and_mappings", ("bits", "capability"), LATE_WRITES),
    Excepted("space", ("limits",), LINK_LIMIT, only="ext4"),
    Excepted("times_now", ("ctime",), TIME_OF_DAY),
    Excepted("times_that_change", ("chown to nobody else",), NOTHING_TO_SET),
)  # fmt: skip


def keys_of(case: str, kind: str) -> set[str]:
    """The keys of a case that differ on a file system of a kind."""
    return {key for e in EXCEPTIONS if e.case == case and e.only in ("", kind) for key in e.keys}
