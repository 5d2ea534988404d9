"""From a view to a plan: which rows are read, and how.

A restore of everything reads each table through once, in large requests. A restore of a part looks
up the directories, items and files that it needs, in the order in which they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from cloudfs.core.rows import ROOT_LIN, BlockRow, Entry, ItemType, Meta, Table
from cloudfs.repo.view import SnapshotView
from cloudfs.restore.layout import Layout, lay_out, lay_out_one
from cloudfs.restore.plan import Planner
from cloudfs.restore.values import Plan

_AT_ONCE = 1024


def make_plan(view: SnapshotView, path: bytes, workers: int) -> Plan:
    """The plan to restore what lies at ``path``. Raises UsageError, Damaged, StoreError."""
    if path == b"/":
        return _of_everything(view, workers)
    start = view.resolve(path)
    if start.type == ItemType.DIRECTORY:
        layout = lay_out(start.lin, view.entries)
    else:
        layout = lay_out_one(path.rpartition(b"/")[2], start)
    planner = Planner(layout)
    lins = sorted((*layout.places, *layout.index_of))
    files = sorted(lin for lin, place in layout.places.items() if place[2] == ItemType.REGULAR)
    planner.join(_metas(view, lins), _block_rows(view, files))
    return planner.plan(workers)


def _of_everything(view: SnapshotView, workers: int) -> Plan:
    layout = _whole_layout(view)
    planner = Planner(layout)
    metas = cast("Iterator[Meta]", view.rows(Table.METADATA))
    planner.join(metas, cast("Iterator[BlockRow]", view.rows(Table.BLOCKS)))
    return planner.plan(workers)


def _whole_layout(view: SnapshotView) -> Layout:
    tree: dict[int, list[Entry]] = {}
    for entry in cast("Iterator[Entry]", view.rows(Table.ENTRIES)):
        if entry.lin:
            tree.setdefault(entry.parent, []).append(entry)
    return lay_out(ROOT_LIN, lambda lin: tree.pop(lin, ()))


def _metas(view: SnapshotView, lins: list[int]) -> Iterator[Meta]:
    for start in range(0, len(lins), _AT_ONCE):
        for meta in view.metas(lins[start : start + _AT_ONCE]):
            if meta is not None:
                yield meta


def _block_rows(view: SnapshotView, files: list[int]) -> Iterator[BlockRow]:
    for lin in files:
        rows = view.block_rows(lin)
        for base in sorted(rows):
            yield rows[base]
