"""``cloudfs tables``: the tables of a policy, as US 10,089,187 draws them (FIG. 3 and FIG. 11).

Paths are derived while rows are printed; nothing is held but what the last directories need.
"""

from __future__ import annotations

import itertools
import stat as st
from typing import TYPE_CHECKING, Any

import click

from cloudfs.cli import options
from cloudfs.cli.app import App
from cloudfs.cli.look import mode_of
from cloudfs.cli.output import Output, quote_path

if TYPE_CHECKING:
    from cloudfs.core.rows import BlockRow, Entry, Meta, PackRow, Row
    from cloudfs.repo.history import History
    from cloudfs.repo.paths import PathFinder

Cells = dict[str, Any]

WIDTHS = {
    "metadata": {"policy": 6, "lin": 7, "path": 32, "snapshot": 8, "time": 19, "permissions": 11}
    | {"type": 4, "gid": 5, "uid": 5, "mtime": 19, "parent": 7, "size": 10},
    "blocks": {"policy": 6, "lin": 7, "base": 6, "snapshot": 8, "blocks": 0},
    "packs": {"policy": 6, "pack": 32, "snapshot": 8, "size": 10, "live": 10, "class": 8}
    | {"node": 12, "time": 19},
    "entries": {"policy": 6, "parent": 7, "name": 32, "snapshot": 8, "lin": 7, "type": 4},
}
"""The columns of each table, with the width that they have at least."""


@click.command()
@click.argument("table", type=click.Choice(list(WIDTHS)))
@click.argument("policy", type=options.POLICY, metavar="POLICY|URL")
@click.option("--snapshot", metavar="SNAPSHOT", help="Only what is in force at this snapshot.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Stop after N rows.")
@options.json_option
@options.utc_option
@options.store_options
@options.pass_app
def tables(app: App, table: str, policy: str, snapshot: str | None, limit: int | None) -> None:
    """Print the rows of a table: metadata, blocks, packs or entries.

    All rows of all snapshots are printed in key order, or those in force at one SNAPSHOT.
    """
    from cloudfs.core.rows import Table

    with app.history(policy) as history:
        number = history.find(snapshot).number if snapshot is not None else None
        output = app.output
        if not output.json:
            output.line(_line(table, {name: name for name in WIDTHS[table]}))
        if not history.snapshots:
            return
        rows = history.rows(Table[table.upper()], number)
        describe = _Describer(history, output)
        for row in itertools.islice(rows, limit):
            cells = {"policy": history.policy.name} | describe.row(row)
            if output.json:
                output.object(cells)
            else:
                output.line(_line(table, cells))


def _line(table: str, cells: Cells) -> str:
    shown = (str(cells[name]).ljust(width) for name, width in WIDTHS[table].items())
    return "  ".join(shown).rstrip()


class _Describer:
    """Turns rows into cells."""

    def __init__(self, history: History, output: Output) -> None:
        self._history = history
        self._output = output
        self._finders: dict[int, PathFinder] = {}
        self._times = {record.number: record.time_ns for record in history.snapshots}

    def row(self, row: Row) -> Cells:
        """The cells of any row."""
        from cloudfs.core.rows import BlockRow, Entry, Meta

        if isinstance(row, Meta):
            return self._meta(row)
        if isinstance(row, Entry):
            return self._entry(row)
        if isinstance(row, BlockRow):
            return self._blocks(row)
        return self._pack(row)

    def _time(self, time_ns: int) -> str:
        if self._output.json:
            return self._output.exact_time(time_ns)
        return self._output.time(time_ns)

    def _path(self, row: Meta) -> bytes:
        """Where an item was when the row was made; for what is gone, where it was before."""
        from cloudfs.core.rows import DELETED_TYPES
        from cloudfs.repo.paths import PathFinder

        gone = row.type in DELETED_TYPES
        number = row.snap - 1 if gone else row.snap
        if number not in self._finders:
            if number not in self._times:
                return b""
            if len(self._finders) > 8:
                self._finders.clear()
            self._finders[number] = PathFinder(self._history.view(number))
        meta = self._history.view(number).meta(row.lin) if gone else row
        return (self._finders[number].path(meta) if meta is not None else None) or b""

    def _meta(self, row: Meta) -> Cells:
        path = self._path(row)
        return {
            "lin": row.lin,
            "path": path if self._output.json else quote_path(path),
            "snapshot": row.snap,
            "time": self._time(self._times.get(row.snap, 0)),
            "permissions": st.filemode(mode_of(row))[1:],
            "type": row.type,
            "gid": row.gid,
            "uid": row.uid,
            "mtime": self._time(row.mtime_ns),
            "parent": row.parent,
            "size": row.size,
        }

    def _entry(self, row: Entry) -> Cells:
        return {
            "parent": row.parent,
            "name": row.name if self._output.json else quote_path(row.name),
            "snapshot": row.snap,
            "lin": row.lin,
            "type": row.type,
        }

    def _blocks(self, row: BlockRow) -> Cells:
        from cloudfs.core.rows import locations

        cells: Cells = {"lin": row.lin, "base": row.base, "snapshot": row.snap}
        found = locations(row)
        if self._output.json:
            cells["blocks"] = [
                None
                if place is None
                else {
                    "pack": place.pack.hex(),
                    "frame_offset": place.frame_offset,
                    "frame_length": place.frame_length,
                    "offset": place.offset,
                    "length": place.length,
                    "digest": place.digest.hex(),
                }
                for place in found
            ]
            return cells
        shown = (
            f"B{index}=hole"
            if place is None
            else f"B{index}={place.pack.hex()[:8]}:{place.frame_offset}"
            f"/{place.offset}+{place.length}"
            for index, place in enumerate(found)
        )
        return cells | {"blocks": " ".join(shown) or "none"}

    def _pack(self, row: PackRow) -> Cells:
        return {
            "pack": row.name.hex(),
            "snapshot": row.snap,
            "size": row.size,
            "live": row.live,
            "class": row.storage_class or "standard",
            "node": row.node,
            "time": self._time(row.time_ns) if row.time_ns else "",
        }
