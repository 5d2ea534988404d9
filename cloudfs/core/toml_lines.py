"""Where things stand in a flat TOML file: the lines and the spans of its top-level keys.

The standard library reads TOML and tells no positions. This finds the statements of a text that is
known to be valid TOML, by knowing just enough of the syntax to not take a key for what stands in a
string, a comment or an array:

1. A statement begins on a fresh line, outside of brackets. It is ``key = value`` or ``[header]``.
2. Strings and comments are passed over whole; brackets count, and newlines inside them do not end
   the statement.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

_TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}'  # a multi-line string may end in up to two quotes of its own
    r"|'''.*?'{3,5}"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*'"
    r"|#[^\n]*"
    r"|\n|[\[\]{}]"
    r"|[^\"'#\n\[\]{}]+",
    re.DOTALL,
)
_KEY = re.compile(r"[ \t]*(?:([A-Za-z0-9_-]+)|\"((?:\\.|[^\"\\\n])*)\"|'([^'\n]*)')[ \t]*[.=]")
_HEADER = re.compile(r"[ \t]*\[\[?[ \t]*([^\]\n]*?)[ \t]*\]")
_AT_LINE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")


class Statement(NamedTuple):
    """One top-level statement: its key (its first part), and where it stands in the text."""

    key: str
    line: int  # from 1
    start: int
    end: int  # just behind the value and a comment that follows it on the line


def statements(text: str) -> list[Statement]:
    """The statements of a valid TOML text, in order. A header's key is ``[name]``."""
    found: list[Statement] = []
    position, line = 0, 1
    while position < len(text):
        key = _key_at(text, position)
        end = _statement_end(text, position)
        if key is not None:
            found.append(Statement(key, line, position, end))
        line += text.count("\n", position, end + 1)
        position = end + 1
    return found


def _key_at(text: str, position: int) -> str | None:
    match = _KEY.match(text, position)
    if match:
        bare, basic, literal = match.groups()
        if basic is not None:
            return _unescape(basic)
        return bare if bare is not None else literal
    header = _HEADER.match(text, position)
    return f"[{header[1]}]" if header else None


def _unescape(inner: str) -> str:
    try:
        return str(json.loads(f'"{inner}"'))
    except ValueError:
        return inner  # an escape that only TOML has: shown as it is written


def _statement_end(text: str, position: int) -> int:
    """The place of the newline that ends the statement, or the end of the text."""
    depth = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            position += 1
            continue
        token = match[0]
        if token in "[{":
            depth += 1
        elif token in "]}":
            depth -= 1
        elif token == "\n" and depth <= 0:
            return position
        position = match.end()
    return len(text)


def syntax_error(text: str, message: str) -> tuple[int, str]:
    """Line and plain sentence of what ``tomllib.TOMLDecodeError`` says."""
    match = _AT_LINE.search(message)
    if match is None:
        return 1, message
    lines = text.count("\n", 0, len(text.rstrip())) + 1
    return int(match[1]) if match[1] else lines, message[: match.start()]


def replace_values(text: str, values: dict[str, str | None]) -> str:
    """The text with each of these keys set to a value (TOML source), or removed where it is None.

    Everything else stays as it was written. A key that is missing takes the place of a line that
    only shows it (``# key = …``), or goes to the end.
    """
    spans = {statement.key: statement for statement in statements(text)}
    edits: list[tuple[int, int, str]] = []
    added: list[str] = []
    for key, value in values.items():
        new = None if value is None else f"{key} = {value}"
        if key in spans:
            start, end = spans[key].start, spans[key].end
            edits.append((start, end, new) if new is not None else (start, end + 1, ""))
        elif new is not None:
            shown = _shown(text, key, list(spans.values()))
            if shown is None:
                added.append(new + "\n")
            else:
                edits.append((*shown, new))
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    if added and text and not text.endswith("\n"):
        text += "\n"
    return text + "".join(added)


def _shown(text: str, key: str, taken: list[Statement]) -> tuple[int, int] | None:
    for match in re.finditer(rf"^#[ \t]*{re.escape(key)}[ \t]*=[^\n]*", text, re.MULTILINE):
        if not any(s.start <= match.start() < s.end for s in taken):
            return match.span()
    return None
