"""What is printed, and how.

1. Results go to stdout and everything said about them to stderr. With ``--json`` stdout holds one
   object a line and nothing else.
2. Nothing depends on the width of a terminal, and nothing is coloured but progress.
3. Paths are printed so that a shell takes them back.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TextIO

import click

_PLAIN = re.compile(r"[\w@%+=:,./-]+")
_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\", "'": "\\'"}


@dataclass
class Output:
    """Where a command prints to."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    utc: bool = False

    def say(self, text: str) -> None:
        """A sentence about what was done; nothing with ``--quiet``."""
        if not self.quiet:
            _write(sys.stderr if self.json else sys.stdout, text)

    def note(self, text: str) -> None:
        """Something that only matters to the curious: with ``--verbose``."""
        if self.verbose:
            _write(sys.stderr, text)

    def warn(self, text: str) -> None:
        """Something that must be seen."""
        _write(sys.stderr, text)

    def line(self, text: str) -> None:
        """One line of a result. Ends the command when nobody reads any more."""
        if not _write(sys.stdout, text):
            raise click.exceptions.Exit(0)

    def object(self, value: dict[str, Any]) -> None:
        """One object of a result, as JSON."""
        self.line(to_json(value))

    def event(self, value: dict[str, Any]) -> None:
        """One object on the way; that nobody reads it stops nothing."""
        _write(sys.stdout, to_json(value))

    def table(self, titles: Sequence[str], rows: Iterable[Sequence[str]], right: str = "") -> None:
        """A table; ``right`` holds an ``r`` for each column whose values are numbers."""
        everything = [list(titles), *(list(row) for row in rows)]
        widths = [max(len(row[i]) for row in everything) for i in range(len(titles))]
        for row in everything:
            cells = [
                cell.rjust(width) if right[i : i + 1] == "r" else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            self.line("  ".join(cells).rstrip())

    def time(self, time_ns: int) -> str:
        """A moment for people, to the second."""
        return self._moment(time_ns).strftime("%Y-%m-%d %H:%M:%S")

    def exact_time(self, time_ns: int) -> str:
        """A moment for programs: ISO 8601 with nanoseconds and the offset from UTC."""
        moment = self._moment(time_ns)
        offset = moment.strftime("%z")
        return f"{moment:%Y-%m-%dT%H:%M:%S}.{time_ns % 10**9:09}{offset[:3]}:{offset[3:]}"

    def _moment(self, time_ns: int) -> datetime:
        moment = datetime.fromtimestamp(time_ns // 10**9, UTC)
        return moment if self.utc else moment.astimezone()


def to_json(value: dict[str, Any]) -> str:
    """One line of JSON. Names that are not UTF-8 keep their bytes as lone surrogates."""
    return json.dumps(value, separators=(",", ":"), default=_plain)


def _plain(value: object) -> str:
    if isinstance(value, bytes):
        return os.fsdecode(value)
    raise TypeError(f"no JSON for {type(value)}")


def _write(stream: TextIO, text: str) -> bool:
    """Write a line at once; False when the reader has gone."""
    try:
        stream.write(text + "\n")
        stream.flush()
    except BrokenPipeError:
        # What is still buffered would fail again when the interpreter ends.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False
    return True


def quote_path(path: bytes) -> str:
    """A path as a shell takes it back: plain where it can be, else in ``'…'`` or ``$'…'``."""
    try:
        text = path.decode()
    except UnicodeDecodeError:
        text = ""
    if text.isprintable() and (text or not path):
        return text if _PLAIN.fullmatch(text) else shlex.quote(text)
    shown = []
    for char in path.decode("utf-8", "surrogateescape"):
        if char in _ESCAPES:
            shown.append(_ESCAPES[char])
        elif char.isprintable():
            shown.append(char)
        else:
            shown.extend(f"\\x{byte:02x}" for byte in os.fsencode(char))
    return "$'" + "".join(shown) + "'"
