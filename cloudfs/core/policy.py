"""Policies: what is backed up, to where and how; a TOML file each.

1. A policy file is flat: one key a line, every key listed in KEYS below with how it is read,
   written and explained. What is not in KEYS is refused, with the key that was probably meant.
2. Every complaint names the file and the line.
3. Sizes and durations are written for people ("32 MiB", "15 min") and kept in bytes and seconds.
4. Who may change a policy is not written in it: the owner and the mode of its file say that.
"""

from __future__ import annotations

import difflib
import json
import os.path
import re
import shlex
import tomllib
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from cloudfs.core import human
from cloudfs.core.errors import UsageError
from cloudfs.core.toml_lines import replace_values, statements, syntax_error

KIB, MIB = 1 << 10, 1 << 20
DEFAULT_BLOCK_SIZE = 128 * KIB
MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = 64 * KIB, 256 * KIB
DEFAULT_PACK_SIZE = 32 * MIB
MIN_PACK_SIZE, MAX_PACK_SIZE = 4 * MIB, 256 * MIB
DEFAULT_PACK_TIME_LIMIT_S = 300.0
DEFAULT_EXTERNAL_TIMEOUT_S = 600.0
DEFAULT_KEPT_ROOM = 1024 * MIB
MAX_WORKERS = 1024
SOURCES = ("auto", "scan", "btrfs", "watch", "live", "external")
_SHOWN_SOURCES = ", ".join(f'"{word}"' for word in SOURCES[:-1]) + f' or "{SOURCES[-1]}"'

_NAME = re.compile(r"\w[\w.-]*")
_MAX_NAME_BYTES = 100


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """One policy. Sizes in bytes, limits in bytes a second (0: none), durations in seconds."""

    name: str
    sources: tuple[str, ...]
    repository: str
    id: str = ""  # 32 hexadecimal digits by which the repository knows it; "" before it does
    endpoint_url: str = ""
    region: str = ""
    profile: str = ""
    single_writer: bool = False
    snapshot: str = "auto"
    external_snapshot: tuple[str, ...] = ()  # a command: program and arguments
    external_changes: tuple[str, ...] = ()
    external_release: tuple[str, ...] = ()
    external_timeout_s: float = DEFAULT_EXTERNAL_TIMEOUT_S
    kept_room: int = DEFAULT_KEPT_ROOM
    when_full: str = "wait"  # or "inconsistent"
    sync_on: str = "batch"  # or "write", or a duration as it was written
    block_size: int = DEFAULT_BLOCK_SIZE
    pack_size: int = DEFAULT_PACK_SIZE
    pack_time_limit_s: float = DEFAULT_PACK_TIME_LIMIT_S
    compression: str = "zstd:3"
    verify_packs: bool = True
    verify_source: float = 0.0  # a share, 0 to 1
    workers: int = 0  # 0: as many as there are cores
    excludes: tuple[str, ...] = ()
    exclude_caches: bool = False
    exclude_if_present: tuple[str, ...] = ()
    one_file_system: bool = False
    tags: tuple[str, ...] = ()
    upload_limit: int = 0
    download_limit: int = 0

    @property
    def level(self) -> int:
        """The zstd level; 0 stores uncompressed."""
        return 0 if self.compression == "none" else int(self.compression.partition(":")[2])


# -- reading values: each takes what TOML gave and raises ValueError with a clear sentence ------


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("a string in quotes is wanted")
    if "\0" in value:
        raise ValueError("it holds a NUL")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{value!r} is not UTF-8; name a directory above it") from None
    return value


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError('a list is wanted, like ["one", "two"]')
    return tuple(_text(item) for item in value)


def _file_names(value: object) -> tuple[str, ...]:
    names = _texts(value)
    for name in names:
        if "/" in name or name in ("", ".", ".."):
            raise ValueError(f'"{name}" is no name of a file in a directory')
    return names


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false is wanted")
    return value


def check_name(value: object) -> str:
    """A policy's name. Raises ValueError for what cannot be one."""
    name = _text(value)
    if not _NAME.fullmatch(name) or len(name.encode()) > _MAX_NAME_BYTES:
        raise ValueError(
            f'"{name}" cannot be a name; use up to {_MAX_NAME_BYTES} letters, digits and . _ -,'
            " beginning with a letter or digit"
        )
    return name


def _id(value: object) -> str:
    text = _text(value)
    if not re.fullmatch(r"[0-9a-f]{32}", text):
        raise ValueError(f'"{text}" is no id; it is given by cloudfs and must not be changed')
    return text


def _sources(value: object) -> tuple[str, ...]:
    sources = tuple(os.path.normpath(source) for source in _texts(value) if source)
    if not sources:
        raise ValueError("at least one directory is wanted")
    for source in sources:
        if not os.path.isabs(source):
            raise ValueError(f'"{source}" is not an absolute path')
    names = [os.path.basename(source) for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f'two of the directories are called "{name}", by which the backup would show them;'
                " make a policy for each"
            )
    return sources


def check_url(value: object) -> str:
    """A repository's URL; an absolute path means file://. Raises ValueError for what is none."""
    url = _text(value)
    if url.startswith("/"):
        url = f"file://{url}"
    if not re.fullmatch(r"file:///.+|s3://[^/]+(/.*)?", url):
        raise ValueError(f'"{url}" is no repository; write file:///path or s3://bucket/prefix')
    return url


def _snapshot(value: object) -> str:
    word = _text(value)
    if word not in SOURCES:
        raise ValueError(f'"{word}" is no way to find changes; write {_SHOWN_SOURCES}')
    return word


def _when_full(value: object) -> str:
    word = _text(value)
    if word not in ("wait", "inconsistent"):
        raise ValueError(f'"{word}" is neither "wait" nor "inconsistent"')
    return word


def _sync_on(value: object) -> str:
    word = _text(value)
    if word not in ("batch", "write"):
        try:
            seconds = human.parse_duration(word)
        except ValueError:
            raise ValueError(f'"{word}" is neither "batch", "write" nor a time') from None
        if seconds < 1:
            raise ValueError("a second or more is wanted")
    return word


def _command(value: object) -> tuple[str, ...]:
    """A program and its arguments: a list, or one string split as a shell would; () for none."""
    if isinstance(value, list | tuple):
        words = _texts(value)
    else:
        try:
            words = tuple(shlex.split(_text(value)))
        except ValueError as error:
            raise ValueError(f"it is no command ({str(error).lower()})") from None
    if words and not words[0]:
        raise ValueError("the name of its program is empty")
    return words


def _size(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return human.parse_size(_text(value))


def _block_size(value: object) -> int:
    size = _size(value)
    if not MIN_BLOCK_SIZE <= size <= MAX_BLOCK_SIZE or size & (size - 1):
        raise ValueError("a power of two from 64 KiB to 256 KiB is wanted")
    return size


def _pack_size(value: object) -> int:
    size = _size(value)
    if not MIN_PACK_SIZE <= size <= MAX_PACK_SIZE:
        raise ValueError("4 MiB to 256 MiB are wanted")
    return size


def _time_limit(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    seconds = human.parse_duration(_text(value))
    if not 1 <= seconds <= 86400:
        raise ValueError("1 second to 1 day is wanted")
    return seconds


def _share(value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = f"{value:.10g}"
    return human.parse_share(_text(value))


def _compression(value: object) -> str:
    word = _text(value)
    match = re.fullmatch(r"zstd(?::(\d{1,2}))?", word, re.ASCII)
    if match:
        level = int(match[1] or 3)
        if 1 <= level <= 19:
            return f"zstd:{level}"
    elif word == "none":
        return word
    raise ValueError(f'"{word}" is no compression; write "none" or "zstd:1" to "zstd:19"')


def _workers(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_WORKERS:
        raise ValueError(f"a number from 0 (one a core) to {MAX_WORKERS} is wanted")
    return value


# -- writing values -----------------------------------------------------------------------------


def _quoted(text: object) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _quoted_list(items: Any) -> str:
    return "[" + ", ".join(_quoted(item) for item in items) + "]"


def _written_flag(value: object) -> str:
    return "true" if value else "false"


def _written_size(value: Any) -> str:
    return _quoted(human.exact_size(value))


def _written_share(value: Any) -> str:
    return _quoted(human.share(value))


def _written_seconds(value: Any) -> str:
    return _quoted(f"{value:.15g} s" if value % 60 else f"{value // 60:.15g} min")


class Key(NamedTuple):
    """One key of the file: the field it fills, how it is read and written, what it means."""

    field: str
    read: Callable[[object], Any]
    write: Callable[[Any], str]
    comment: str


KEYS: dict[str, Key] = {
    "name": Key("name", check_name, _quoted, "What the policy is called; the file's name too."),
    "id": Key("id", _id, _quoted, "By this the repository knows the policy: leave it alone."),
    "sources": Key("sources", _sources, _quoted_list, "The directories that are backed up."),
    "repository": Key("repository", check_url, _quoted, "file:///path or s3://bucket/prefix."),
    "endpoint_url": Key("endpoint_url", _text, _quoted, "An S3 server other than Amazon's."),
    "region": Key("region", _text, _quoted, "Region of the S3 bucket."),
    "profile": Key("profile", _text, _quoted, "Which credentials of ~/.aws to use."),
    "single_writer": Key(
        "single_writer", _flag, _written_flag, "For a store that ignores conditional writes."
    ),
    "snapshot": Key("snapshot", _snapshot, _quoted, 'How changes are found; "auto" for the best.'),
    "external_snapshot": Key(
        "external_snapshot", _command, _quoted_list, "Command that makes a snapshot of a source."
    ),
    "external_changes": Key(
        "external_changes", _command, _quoted_list, "Command that tells what changed between two."
    ),
    "external_release": Key(
        "external_release", _command, _quoted_list, "Command that gives a snapshot up."
    ),
    "external_timeout": Key(
        "external_timeout_s", _time_limit, _written_seconds, "How long each of them may take."
    ),
    "kept_room": Key(
        "kept_room", _size, _written_size, "What a live mount may keep of what is overwritten."
    ),
    "when_full": Key("when_full", _when_full, _quoted, 'Then: "wait", or "inconsistent".'),
    "sync_on": Key("sync_on", _sync_on, _quoted, 'Continuous syncs: "batch", "write", "15 min".'),
    "block_size": Key(
        "block_size", _block_size, _written_size, "64, 128 or 256 KiB, for files new from now on."
    ),
    "pack_size": Key("pack_size", _pack_size, _written_size, "At most this much in one object."),
    "pack_time_limit": Key(
        "pack_time_limit_s", _time_limit, _written_seconds, "When an unfilled pack is uploaded."
    ),
    "compression": Key("compression", _compression, _quoted, '"zstd:1" to "zstd:19", or "none".'),
    "verify_packs": Key(
        "verify_packs", _flag, _written_flag, "Whether packs are decoded once before upload."
    ),
    "verify_source": Key(
        "verify_source", _share, _written_share, "How much of the unchanged each sync looks at."
    ),
    "workers": Key("workers", _workers, str, "Processes; 0 for one a core."),
    "excludes": Key("excludes", _texts, _quoted_list, "Patterns as in .gitignore."),
    "exclude_caches": Key(
        "exclude_caches", _flag, _written_flag, "Leave out what CACHEDIR.TAG marks as a cache."
    ),
    "exclude_if_present": Key(
        "exclude_if_present",
        _file_names,
        _quoted_list,
        "Leave out directories that hold such a file.",
    ),
    "one_file_system": Key(
        "one_file_system", _flag, _written_flag, "Stay out of what is mounted below the sources."
    ),
    "tags": Key("tags", _texts, _quoted_list, "Words that every snapshot carries."),
    "upload_limit": Key("upload_limit", _size, _written_size, "Bytes a second; 0 for no limit."),
    "download_limit": Key(
        "download_limit", _size, _written_size, "Bytes a second; 0 for no limit."
    ),
}
REQUIRED = ("name", "sources", "repository")
_DEFAULTS = Policy(name="", sources=(), repository="")


def read_value(key: str, value: object) -> Any:
    """The checked value of one key. Raises ValueError with a clear sentence."""
    return KEYS[key].read(value)


def parse_policy(text: str, filename: str) -> Policy:
    """The policy that a file's text says. Raises UsageError that names file and line."""
    try:
        given = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line, message = syntax_error(text, str(error))
        raise UsageError(f"{filename}, line {line}: this is not TOML ({message}).") from None
    except RecursionError:
        raise UsageError(f"{filename}, line 1: this is nested too deeply to be a policy.") from None
    lines = {s.key: s.line for s in reversed(statements(text.replace("\r\n", "\n")))}
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in KEYS:
            raise UsageError(_unknown(key, filename, lines))
        try:
            values[KEYS[key].field] = KEYS[key].read(value)
        except ValueError as error:
            where = f"{filename}, line {_line_of(key, lines)}"
            raise UsageError(f"{where}: bad value of {key}: {error}.") from None
    for key in REQUIRED:
        if key not in given:
            raise UsageError(f"{filename}, line 1: {key} is missing.")
    policy = Policy(**values)
    if policy.snapshot == "external" and not policy.external_snapshot:
        line = _line_of("snapshot", lines)
        raise UsageError(f'{filename}, line {line}: "external" needs external_snapshot as well.')
    return policy


def _line_of(key: str, lines: dict[str, int]) -> int:
    """The line of a key, or of the header of a table of that name."""
    if key in lines:
        return lines[key]
    for shown, line in lines.items():
        if shown.startswith("[") and re.match(rf"\[[\s\"']*{re.escape(key)}\b", shown):
            return line
    return 1


def _unknown(key: str, filename: str, lines: dict[str, int]) -> str:
    message = f'{filename}, line {_line_of(key, lines)}: unknown key "{key}".'
    near = difflib.get_close_matches(key.lower().replace("-", "_"), KEYS, n=1)
    return f'{message} Did you mean "{near[0]}"?' if near else message


def format_policy(policy: Policy) -> str:
    """The text of a policy's file; :func:`parse_policy` reads the same policy from it.

    Keys that have their default are there as comments, to be found and changed.
    """
    lines = [f"# The cloudfs policy {_quoted(policy.name)}. See cloudfs-policy(5).", ""]
    for name, key in KEYS.items():
        value = getattr(policy, key.field)
        is_default = name not in REQUIRED and value == getattr(_DEFAULTS, key.field)
        lines.append(f"# {key.comment}")
        lines.append(f"{'# ' if is_default else ''}{name} = {key.write(value)}")
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def edit_policy(text: str, policy: Policy, filename: str) -> str:
    """The text changed so that it says ``policy``; comments and order stay as they are."""
    old = parse_policy(text, filename)
    changes: dict[str, str | None] = {}
    for name, key in KEYS.items():
        value = getattr(policy, key.field)
        if value != getattr(old, key.field):
            changes[name] = key.write(value)
            if name not in REQUIRED and value == getattr(_DEFAULTS, key.field):
                changes[name] = None
    return replace_values(text, changes)
