"""What a restore does not believe a repository: names and metadata that no file system has."""

from __future__ import annotations

from collections.abc import Sequence

from cloudfs.core.errors import Damaged
from cloudfs.core.rows import Entry, ItemType, Meta

MAX_BLOCK = 64 << 20
_MAX_ID = (1 << 32) - 2  # the one above means "leave it as it is" to chown(2)
_MAX_63 = (1 << 63) - 1
_TYPES = frozenset(ItemType) - {
    ItemType.STREAM,
    ItemType.DELETED_FILE,
    ItemType.DELETED_DIRECTORY,
}


def check_names(parent: int, entries: Sequence[Entry]) -> None:
    """Raise Damaged unless these can be the names in one directory."""
    for entry in entries:
        name = entry.name
        if not name or b"/" in name or b"\0" in name or name in (b".", b".."):
            shown = name.decode(errors="backslashreplace")
            raise Damaged(
                f"the tables are damaged (directory {parent} has an entry called {shown!r})."
                " Nothing was restored."
            )
    if len({entry.name for entry in entries}) != len(entries):
        raise Damaged(f"the tables are damaged (directory {parent} has a name twice).")


def check_meta(meta: Meta, type_of_entry: int) -> None:
    """Raise Damaged unless this can be the metadata of what a name calls of this type."""
    if meta.type == ItemType.REGULAR == type_of_entry and 0 < meta.block_size <= MAX_BLOCK:
        sound = _sound(meta)
    else:
        sound = (
            meta.type == type_of_entry
            and meta.type in _TYPES
            and (meta.type != ItemType.REGULAR or not meta.size)
            and b"\0" not in meta.target
            and _sound(meta)
        )
    if not sound:
        raise Damaged(f"the tables are damaged (the metadata of LIN {meta.lin} cannot be).")


def _sound(meta: Meta) -> bool:
    return (
        0 <= meta.mode <= 0o7777
        and 0 <= meta.uid <= _MAX_ID
        and 0 <= meta.gid <= _MAX_ID
        and 0 <= meta.size <= _MAX_63
        and -_MAX_63 <= meta.mtime_ns <= _MAX_63
        and 0 <= meta.rdev <= _MAX_63
        and 0 <= meta.flags < 1 << 32
        and (meta.xattrs is None or not any(b"\0" in name for name in meta.xattrs))
    )
