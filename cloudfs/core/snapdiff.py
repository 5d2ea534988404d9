"""What names that went and names that came between two snapshots mean.

A *name* is a directory's LIN with a name in it, at the path that it has in its snapshot. The caller
finds those that went and those that came; this module says what became of each:

1. An item that lost a name and got another was renamed. Where both have one path (what was around
   it was made anew), nothing is told.
2. What went and what came in the same place are one change: of content, of metadata only, or of
   type. Two places are the same when their directories are, or when those were found to be the
   same place before; so a directory that was removed and made anew is compared name by name.
3. All other names were removed or added.

So renames, removals and additions applied to the older tree give the newer one, name for name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from cloudfs.core.rows import ItemType, Meta

ADDED, REMOVED, MODIFIED, METADATA, TYPE, RENAMED = "+", "-", "M", "m", "T", "R"

_ORDER = REMOVED + ADDED + RENAMED + TYPE + MODIFIED + METADATA

Edge = tuple[int, bytes]
"""A directory's LIN and a name in it."""


class Name(NamedTuple):
    """One name of one item, with its path in its snapshot."""

    edge: Edge
    path: bytes
    meta: Meta


class Change(NamedTuple):
    """One difference: kind, newer and older path, sizes in bytes and item types.

    What is only in one of the snapshots has that path as both paths, that type as both types, and
    0 as the other size.
    """

    kind: str
    path: bytes
    old_path: bytes
    size_before: int
    size_after: int
    type: int
    old_type: int

    @property
    def order(self) -> tuple[bytes, int]:
        """By path; what was removed stands before what took its place."""
        return self.path, _ORDER.index(self.kind)

    def reversed(self) -> Change:
        """The same difference, looked at from the newer snapshot."""
        kind = {ADDED: REMOVED, REMOVED: ADDED}.get(self.kind, self.kind)
        sizes, types = (self.size_after, self.size_before), (self.old_type, self.type)
        return Change(kind, self.old_path, self.path, *sizes, *types)


def told(kind: str, old: Name, new: Name) -> Change:
    """A change of something that has a name in both snapshots."""
    sizes, types = (old.meta.size, new.meta.size), (new.meta.type, old.meta.type)
    return Change(kind, new.path, old.path, *sizes, *types)


def judge_names(
    gone: Iterable[Name], came: Iterable[Name], same_content: Callable[[Meta, Meta], bool]
) -> Iterator[Change]:
    """What became of names; ``same_content`` compares two items of one type.

    Each of ``gone`` and ``came`` holds an edge once, and never the same edge with the same LIN.
    """
    lost = {name.edge: name for name in sorted(gone, key=_path)}
    fresh = {name.edge: name for name in sorted(came, key=_path)}
    yield from _renamed(lost, fresh)
    places: dict[int, int] = {}  # LIN of a directory that is gone → of the one in its place
    for old in lost.values():  # by path, so what holds a name is judged before the name
        parent, name = old.edge
        new = fresh.pop((places.get(parent, parent), name), None)
        if new is None:
            meta = old.meta
            yield Change(REMOVED, old.path, old.path, meta.size, 0, meta.type, meta.type)
        elif new.meta.type != old.meta.type:
            yield told(TYPE, old, new)
        elif new.meta.type == ItemType.DIRECTORY:
            places[old.meta.lin] = new.meta.lin
            yield told(METADATA, old, new)
        else:
            yield told(METADATA if same_content(old.meta, new.meta) else MODIFIED, old, new)
    for new in fresh.values():
        meta = new.meta
        yield Change(ADDED, new.path, new.path, 0, meta.size, meta.type, meta.type)


def _renamed(lost: dict[Edge, Name], fresh: dict[Edge, Name]) -> Iterator[Change]:
    """Take the names of items that have names in both out, and tell those whose path differs."""
    by_lin: dict[int, list[Name]] = {}
    for old in lost.values():
        by_lin.setdefault(old.meta.lin, []).append(old)
    both = [new for new in fresh.values() if new.meta.lin in by_lin]
    stay = {(new.meta.lin, new.path) for new in both}
    for olds in by_lin.values():  # those that stay are taken first, the others in order of path
        olds.sort(key=lambda old: ((old.meta.lin, old.path) not in stay, old.path))
    where = {(old.meta.lin, old.path) for olds in by_lin.values() for old in olds}
    both.sort(key=lambda new: ((new.meta.lin, new.path) not in where, new.path))
    for new in both:
        olds = by_lin[new.meta.lin]
        if olds:
            old = olds.pop(0)
            del lost[old.edge], fresh[new.edge]
            if old.path != new.path:
                yield told(RENAMED, old, new)


def _path(name: Name) -> bytes:
    return name.path
