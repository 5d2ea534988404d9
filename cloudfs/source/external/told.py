"""What a changes command prints: a JSON object a line, the last of which says that it is all.

1. A line says of one item, by its path or its inode number (*lin*), what became of it. The last
   line is ``{"complete": true}``. Without it nothing of what was said is believed, since a command
   that dies half-way has said too little.
2. Paths are below the source, as they are in the new snapshot; only what is deleted, and where
   something was renamed from, is named as it was in the last one.
3. Whatever else is printed makes all of it worthless. Saying a thing twice is no harm: what is told
   in two ways is looked at in both.
4. Names that are not UTF-8 are JSON strings with the bytes as they are, or as lone surrogates
   (``\\udcff`` for byte FF), or stand in base64 under ``path_base64`` and ``from_base64``.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from cloudfs.core.changelist import Range, merged
from cloudfs.core.errors import SourceError

MAX_LINES = 1_000_000
"""With more changes than these a scan is quicker, and needs less memory."""

MAX_RANGES = 4096
"""A file that changed in more places is read whole."""

_LAST_BYTE = 1 << 62

Kind = Literal["changed", "created", "deleted", "renamed", "attributes"]
Ranges = list[Range] | None
"""Where the data of a file can be others: [start, end) of each stretch, sorted and apart from each
other once all is told; None for everywhere."""


class Line(msgspec.Struct):
    """One line, as it was printed."""

    path: str | None = None
    path_base64: str | None = None
    lin: int | None = None
    kind: Kind | None = None
    origin: str | None = msgspec.field(default=None, name="from")
    from_base64: str | None = None
    ranges: list[tuple[int, int]] | None = None  # start, length
    complete: bool | None = None
    reason: str = ""


_decode = msgspec.json.Decoder(Line).decode


@dataclass
class Told:
    """All that was told. Paths as in the lines; ``renamed`` by the new path."""

    created: set[bytes] = field(default_factory=set)
    deleted: set[bytes] = field(default_factory=set)
    renamed: dict[bytes, bytes] = field(default_factory=dict)
    data: dict[bytes, Ranges] = field(default_factory=dict)
    attributes: set[bytes] = field(default_factory=set)
    inodes: dict[int, set[str]] = field(default_factory=dict)  # kinds
    inode_data: dict[int, Ranges] = field(default_factory=dict)

    def take(self, line: Line) -> None:
        """Take one line in. Raises ValueError with what is wrong with it."""
        if line.kind is None:
            raise ValueError("it has no kind")
        ranges = _ranges(line.ranges)
        path = _path(line.path, line.path_base64)
        if path is None:
            self._take_inode(line, line.kind, ranges)
            return
        if not path and line.kind in ("created", "deleted", "renamed"):
            raise ValueError("the source itself cannot come or go")
        if line.kind == "created":
            self.created.add(path)
        elif line.kind == "deleted":
            self.deleted.add(path)
        elif line.kind == "attributes":
            self.attributes.add(path)
        elif line.kind == "renamed":
            origin = _path(line.origin, line.from_base64)
            if origin is None:
                raise ValueError('it is renamed without "from"')
            if not origin:
                raise ValueError("the source itself cannot come or go")
            if self.renamed.setdefault(path, origin) != origin:
                raise ValueError("it was renamed from two places")
        if line.kind == "changed" or (line.kind == "renamed" and line.ranges is not None):
            _add_ranges(self.data, path, ranges)

    def end(self) -> None:
        """All was told."""
        self.data = {path: _joined(ranges) for path, ranges in self.data.items()}
        self.inode_data = {ino: _joined(ranges) for ino, ranges in self.inode_data.items()}

    def _take_inode(self, line: Line, kind: Kind, ranges: Ranges) -> None:
        if line.lin is None or line.lin <= 0:
            raise ValueError("it has neither path nor lin")
        self.inodes.setdefault(line.lin, set()).add(kind)
        if kind == "changed":
            _add_ranges(self.inode_data, line.lin, ranges)


def read_told(lines: Iterable[bytes], name: str) -> Told:
    """All lines of a command. Raises SourceError where they are not what they must be."""
    told = Told()
    complete = False
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        if complete:
            raise SourceError(f"{name} went on after it had said that it was done.")
        if number > MAX_LINES:
            raise SourceError(f"{name} told more than {MAX_LINES:,} changes.")
        try:
            line = _read(text)
            if line.complete is not None:
                complete = line.complete
                if not complete:
                    said = line.reason.strip().rstrip(".") or "for no reason told"
                    raise SourceError(f"{name} cannot tell what changed ({said}).")
            else:
                told.take(line)
        except ValueError as error:
            shown = text[:60].decode(errors="replace")
            shown = "".join(c if c.isprintable() else "?" for c in shown)
            raise SourceError(f"{name} printed {shown} in line {number}: {error}.") from None
    if not complete:
        raise SourceError(f'{name} ended before it had said {{"complete": true}}.')
    told.end()
    return told


def _read(text: bytes) -> Line:
    try:
        return _decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    try:  # lone surrogates and bytes that are not UTF-8, which the quick decoder refuses
        found = json.loads(text.decode("utf-8", "surrogateescape"))
        return msgspec.convert(found, Line)
    except msgspec.ValidationError as error:
        raise ValueError(str(error).lower()) from None
    except (ValueError, RecursionError):
        raise ValueError("that is no JSON") from None


def _path(text: str | None, encoded: str | None) -> bytes | None:
    """A path below the source, b"" for the source itself."""
    if encoded is not None:
        path = base64.b64decode(encoded, validate=True)
    elif text is None:
        return None
    else:
        try:
            path = os.fsencode(text)
        except UnicodeEncodeError:
            raise ValueError("its path has characters that no name has") from None
    if path in (b"", b"."):
        return b""
    if b"\0" in path:
        raise ValueError("its path holds a NUL")
    if path.startswith(b"/"):
        raise ValueError("its path must be below the source, without a / before it")
    for part in path.split(b"/"):
        if part in (b"", b".", b".."):
            raise ValueError('its path has "", "." or ".." between slashes')
        if len(part) > 255:
            raise ValueError("its path has a name of more than 255 bytes")
    return path


def _ranges(given: list[tuple[int, int]] | None) -> Ranges:
    if given is None:
        return None
    found = []
    for start, length in given:
        if not 0 <= start <= _LAST_BYTE or not 0 <= length <= _LAST_BYTE:
            raise ValueError("a range has a bad start or length")
        if length:
            found.append((start, start + length))
    return found


def _add_ranges(
    known: dict[bytes, Ranges] | dict[int, Ranges], key: bytes | int, more: Ranges
) -> None:
    data: dict[bytes | int, Ranges] = known  # type: ignore[assignment]  # either kind of key
    before = data.setdefault(key, [])
    if before is None or more is None:
        data[key] = None
        return
    before.extend(more)
    if len(before) > 2 * MAX_RANGES:  # not sooner: there may be a line for each
        data[key] = _joined(before)


def _joined(ranges: Ranges) -> Ranges:
    """The same ranges, sorted and apart from each other; None if they are too many."""
    if ranges is None:
        return None
    found = merged(ranges)
    return found if len(found) <= MAX_RANGES else None
