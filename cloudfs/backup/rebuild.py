"""Making the local state again out of the repository: records of the last snapshot's directories.

Needed on a new machine, after the local state was lost, and when another machine synced since.
The rows hold everything that a listing compares (inode, links, sizes, times), so a tree that did
not change since the snapshot is found unchanged without reading a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import cast

import xxhash

from cloudfs.core.changes import MODES, Counts, DirRecord, Stat, collapse, encode_listing
from cloudfs.core.errors import Damaged
from cloudfs.core.manifest import Manifest
from cloudfs.core.rows import DELETED_TYPES, ROOT_LIN, Entry, ItemType, Meta, Table
from cloudfs.db.state import Head, SyncState
from cloudfs.repo.view import SnapshotView
from cloudfs.source.scan import is_fresh

TOP = 0
"""The LIN under which the record of the made-up directory above the root is kept."""

_BATCH = 512


def rebuild(state: SyncState, view: SnapshotView, manifest: Manifest, signature: bytes) -> None:
    """Fill the state from a snapshot. Reads the whole metadata and directory entry tables."""
    state.clear()
    counts = Counts()
    batch: list[tuple[int, DirRecord | None]] = []
    for lin, record in _records(view):
        counts.add(record.counts)
        batch.append((lin, record))
        if len(batch) >= _BATCH:
            state.put_records(view.number, batch)
            batch = []
    state.put_records(view.number, batch)
    taken_ns = view.record.time_ns
    state.save_head(
        Head(manifest.number, view.number, False, counts, signature, taken_ns, apart=True)
    )


def _records(view: SnapshotView) -> Iterator[tuple[int, DirRecord]]:
    root = view.need(ROOT_LIN)
    top = _stat(Entry(TOP, b"", 1, ROOT_LIN, root.type), root)
    top.ino = 0
    yield TOP, _record([top], [ROOT_LIN], view.record.time_ns)
    rows = cast("Iterator[Entry]", view.rows(Table.ENTRIES))
    seen = {ROOT_LIN}
    for parent, group in groupby(rows, key=lambda entry: entry.parent):
        entries = [entry for entry in group if entry.lin and entry.type != ItemType.STREAM]
        owner = view.meta(parent)
        if owner is None or owner.type != ItemType.DIRECTORY:
            continue  # names in a directory that is gone, or large attributes of a file
        metas = view.metas([entry.lin for entry in entries])
        stats = [_stat(entry, meta) for entry, meta in zip(entries, metas, strict=True)]
        seen.add(parent)
        yield parent, _record(stats, [entry.lin for entry in entries], view.record.time_ns)
    for meta in cast("Iterator[Meta]", view.rows(Table.METADATA)):
        if meta.type == ItemType.DIRECTORY and meta.lin not in seen:
            yield meta.lin, _record([], [], view.record.time_ns)


def _stat(entry: Entry, meta: Meta | None) -> Stat:
    if meta is None or meta.type in DELETED_TYPES:
        raise Damaged(f"the tables are damaged (LIN {entry.lin} has a name but no metadata).")
    return Stat(
        entry.name,
        MODES[meta.type] | meta.mode,
        meta.ino,
        meta.nlink,
        meta.uid,
        meta.gid,
        meta.size,
        meta.mtime_ns,
        meta.ctime_ns,
        meta.rdev,
        False,
    )


def _record(stats: list[Stat], lins: list[int], taken_ns: int) -> DirRecord:
    counts = Counts()
    for stat in stats:
        counts.count(stat)
    doubtful = [
        index
        for index, stat in enumerate(stats)
        if is_fresh(stat.ctime_ns, taken_ns, stat.size if stat.is_file else 0)
    ]
    listing = encode_listing(stats)
    return DirRecord(
        b"" if doubtful else xxhash.xxh3_128_digest(listing),
        listing,
        collapse(lins),
        [(stat.name, lin) for stat, lin in zip(stats, lins, strict=True) if stat.is_dir],
        counts,
        doubtful,
    )
