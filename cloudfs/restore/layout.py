"""The names below the start of a restore: where each LIN goes. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cloudfs.core.errors import Damaged
from cloudfs.core.rows import Entry, ItemType, Meta
from cloudfs.restore.check import check_names
from cloudfs.restore.values import Directory, Link


@dataclass
class Layout:
    """The names below the start: where each LIN goes."""

    directories: list[Directory]
    index_of: dict[int, int]  # LIN of a directory → its index
    places: dict[int, tuple[int, bytes, int]]  # any other LIN → directory, name, type
    links: list[Link]


def lay_out(start: int, entries: Callable[[int], Sequence[Entry]]) -> Layout:
    """The names below the directory ``start``. Raises Damaged for what cannot be a tree."""
    directories = [Directory(-1, b"")]
    index_of = {start: 0}
    places: dict[int, tuple[int, bytes, int]] = {}
    links: list[Link] = []
    order = [start]
    for index, parent in enumerate(order):
        # Large attributes of the directory stand among the names in it.
        found = [entry for entry in entries(parent) if entry.type != ItemType.STREAM]
        check_names(parent, found)
        for entry in found:
            lin = entry.lin
            if entry.type == ItemType.DIRECTORY:
                if lin in index_of:
                    raise Damaged(f"the tables are damaged (directory {lin} has two names).")
                index_of[lin] = len(directories)
                directories.append(Directory(index, entry.name))
                order.append(lin)
            elif lin in places:
                links.append(Link(index, entry.name, *places[lin][:2]))
            else:
                places[lin] = (index, entry.name, entry.type)
    return Layout(directories, index_of, places, links)


def lay_out_one(name: bytes, meta: Meta) -> Layout:
    """A single item that is no directory, by its name."""
    check_names(meta.parent, [Entry(meta.parent, name, meta.snap, meta.lin, meta.type)])
    return Layout([Directory(-1, b"")], {}, {meta.lin: (0, name, meta.type)}, [])
