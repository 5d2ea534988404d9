"""The names in one directory, as they were when it was opened, with their metadata in bulk.

A position in a listing is the number of names before it: what is listed does not change, so that
is a cookie which stays true for as long as the directory is open.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Protocol

from cloudfs.core.rows import ItemType, Meta
from cloudfs.fuse.inodes import LIN_BITS, MAX_LIN
from cloudfs.repo.view import SnapshotView

log = logging.getLogger(__name__)

BATCH = 512
"""Names whose metadata is looked up at once."""

Item = tuple[bytes, int, Meta | None]
"""Name, inode number, metadata; None where the tables are damaged and have none."""


class Listing(Protocol):
    """An open directory."""

    made_up: bool

    def batch(self, start: int) -> Sequence[Item]:
        """The names from position ``start`` on, some of them; none at the end."""


class MadeUpListing:
    """A directory that no snapshot holds."""

    made_up = True

    def __init__(self, names: list[tuple[bytes, int]], meta: Callable[[int], Meta | None]) -> None:
        self._names = names
        self._meta = meta

    def batch(self, start: int) -> list[Item]:
        """See :meth:`Listing.batch`."""
        return [(n, i, self._meta(i)) for n, i in self._names[start : start + BATCH]]


class SnapshotListing:
    """A directory of a snapshot. Only names and LINs are held, and the batch last asked for."""

    made_up = False

    def __init__(self, view: SnapshotView, slot: int, lin: int) -> None:
        entries = view.entries(lin)
        self._view = view
        self._slot_bits = slot << LIN_BITS
        self._names = [entry.name for entry in entries if entry.type != ItemType.STREAM]
        self._lins = [entry.lin for entry in entries if entry.type != ItemType.STREAM]
        if not _plain(self._names) or max(self._lins, default=0) > MAX_LIN:
            self._drop_impossible(lin)
        self._first = 0
        self._batch: list[Item] = []

    def _drop_impossible(self, lin: int) -> None:
        """Pass over what cannot be shown: the kernel would refuse the whole directory for it."""
        kept = []
        for name, child in zip(self._names, self._lins, strict=True):
            if _plain([name]) and child <= MAX_LIN:
                kept.append((name, child))
            else:
                log.error("LIN %d holds %r (LIN %d), which cannot be shown.", lin, name, child)
        self._names = [name for name, _ in kept]
        self._lins = [child for _, child in kept]

    def batch(self, start: int) -> Sequence[Item]:
        """See :meth:`Listing.batch`."""
        first = self._first
        if not first <= start < first + len(self._batch):
            lins = self._lins[start : start + BATCH]
            bits = self._slot_bits
            metas = self._view.metas(lins)
            names = islice(self._names, start, start + BATCH)
            self._batch = [
                (name, bits | child, meta)
                for name, child, meta in zip(names, lins, metas, strict=True)
            ]
            self._first = first = start
        return self._batch if start == first else self._batch[start - first :]


def _plain(names: list[bytes]) -> bool:
    """Whether all of these can be names in a directory."""
    joined = b"".join(names)
    return (
        b"/" not in joined
        and b"\0" not in joined
        and {b"", b".", b".."}.isdisjoint(names)
        and (len(joined) <= 255 or max(map(len, names)) <= 255)
    )
