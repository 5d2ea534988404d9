"""The send stream and its replay, without a file system."""

from __future__ import annotations

import io
import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudfs.core.changelist import Changelist, DirChange, merged
from cloudfs.core.errors import SourceError
from cloudfs.source.btrfs.replay import Replay
from cloudfs.source.btrfs.stream import MAGIC, Command, Kind, commands

PATH, PATH_TO, PATH_LINK, OFFSET, SIZE = 15, 16, 17, 18, 4


def attribute(number: int, value: bytes | int) -> bytes:
    data = value if isinstance(value, bytes) else struct.pack("<Q", value)
    return struct.pack("<HH", number, len(data)) + data


def command(kind: int, *attributes: bytes) -> bytes:
    body = b"".join(attributes)
    return struct.pack("<IHI", len(body), kind, 0) + body


def stream(*parts: bytes, version: int = 1) -> io.BytesIO:
    return io.BytesIO(MAGIC + struct.pack("<I", version) + b"".join(parts))


END = command(Kind.END)
PARTS = (
    command(Kind.SNAPSHOT, attribute(PATH, b"new")),
    command(Kind.RENAME, attribute(PATH, b"a"), attribute(PATH_TO, b"b")),
    command(Kind.UPDATE_EXTENT, attribute(PATH, b"b/f"), attribute(OFFSET, 9), attribute(SIZE, 4)),
)


def test_commands_are_read() -> None:
    assert list(commands(stream(*PARTS, END))) == [
        Command(Kind.SNAPSHOT, b"new", b"", 0, 0),
        Command(Kind.RENAME, b"a", b"b", 0, 0),
        Command(Kind.UPDATE_EXTENT, b"b/f", b"", 9, 4),
    ]


def test_a_stream_that_is_cut_anywhere_is_refused() -> None:
    whole = stream(*PARTS, END).getvalue()
    for length in range(len(whole)):
        with pytest.raises(SourceError):
            list(commands(io.BytesIO(whole[:length])))


@pytest.mark.parametrize(
    "bad",
    [
        stream(END, version=9),
        stream(command(99), END),
        stream(command(Kind.WRITE, attribute(PATH, b"f")), END),
        stream(struct.pack("<IHI", 1 << 30, Kind.MKDIR, 0)),
        stream(command(Kind.TRUNCATE, attribute(SIZE, b"123")), END),
        stream(command(Kind.MKDIR, struct.pack("<HH", PATH, 9) + b"short"), END),
    ],
)
def test_what_cannot_be_is_refused(bad: io.BytesIO) -> None:
    with pytest.raises(SourceError):
        list(commands(bad))


def replay(*told: tuple[Kind, bytes] | tuple[Kind, bytes, bytes]) -> Changelist:
    return Replay().run(
        Command(kind, path, other[0] if other else b"", 0, 10) for kind, path, *other in told
    )


def test_a_renamed_directory_keeps_its_old_path() -> None:
    found = replay(
        (Kind.RENAME, b"a", b"o257-1-0"),
        (Kind.RENAME, b"b", b"a"),
        (Kind.RENAME, b"o257-1-0", b"b"),
        (Kind.UPDATE_EXTENT, b"b/f"),
    )
    top, below = found.dirs
    assert top.names == {b"a", b"b", b"o257-1-0"}
    assert below == DirChange(b"b", b"a", {b"f"}, {b"f": [(0, 10)]})


def test_what_is_in_a_new_directory_is_not_told() -> None:
    found = replay((Kind.MKDIR, b"new"), (Kind.MKFILE, b"new/f"), (Kind.RENAME, b"old/g", b"new/g"))
    assert [(d.path, d.names) for d in found.dirs] == [(b"", {b"new"}), (b"old", {b"g"})]


def test_another_name_of_a_file_is_looked_at_too() -> None:
    found = replay((Kind.LINK, b"d/new", b"e/old"), (Kind.UPDATE_EXTENT, b"d/new"))
    assert [(d.path, d.names, d.ranges) for d in found.dirs] == [
        (b"d", {b"new"}, {b"new": [(0, 10)]}),
        (b"e", {b"old"}, {b"old": [(0, 10)]}),
    ]


@pytest.mark.parametrize(
    "told",
    [
        [(Kind.UNLINK, b"a"), (Kind.CHMOD, b"a")],
        [(Kind.RENAME, b"a", b"b"), (Kind.UTIMES, b"a/f")],
        [(Kind.MKDIR, b"a"), (Kind.UTIMES, b"a/f")],
        [(Kind.UNLINK, b"")],
        [(Kind.MKDIR, b"")],
    ],
)
def test_what_cannot_be_there_is_refused(told: list[tuple[Kind, bytes]]) -> None:
    with pytest.raises(SourceError):
        replay(*told)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9))))
def test_merged_ranges_hold_the_same_bytes(found: list[tuple[int, int]]) -> None:
    ranges = [(start, start + length) for start, length in found]
    result = merged(ranges)
    assert {b for s, e in ranges for b in range(s, e)} == {
        b for s, e in result for b in range(s, e)
    }
    assert all(a[1] < b[0] for a, b in itertools.pairwise(result))
