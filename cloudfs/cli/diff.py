"""``cloudfs diff``: what differs between two snapshots."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import click

from cloudfs.cli import options
from cloudfs.cli.app import App
from cloudfs.cli.look import TYPE_WORDS
from cloudfs.cli.output import quote_path
from cloudfs.cli.target import parse_target
from cloudfs.core import human
from cloudfs.core.errors import UsageError

if TYPE_CHECKING:
    from cloudfs.core.snapdiff import Change

_WORDS = {
    "+": "added",
    "-": "removed",
    "M": "modified",
    "m": "of other metadata",
    "T": "of another type",
    "R": "renamed",
}


@click.command()
@click.argument("first", type=options.POLICY, metavar="POLICY@SNAPSHOT[:PATH]")
@click.argument("second", metavar="[POLICY@]SNAPSHOT", required=False)
@click.option("--stat", is_flag=True, help="Only say how much differs.")
@options.json_option
@options.store_options
@options.pass_app
def diff(app: App, first: str, second: str | None, stat: bool) -> None:
    """Show what differs between two snapshots of a policy, from the FIRST to the SECOND.

    SECOND is the latest one where it is left out. Each line begins with + (added), - (removed), M
    (content modified), m (only metadata modified), T (of another type) or R (renamed).
    """
    named = parse_target(first)
    to = _snapshot(named.place, second)
    with app.history(named.place) as history:
        before, after = history.find(named.snapshot).number, history.find(to).number
        from cloudfs.repo.compare import compare

        changes = compare(history, min(before, after), max(before, after))
        if before > after:
            changes = [change.reversed() for change in changes]
    prefix = named.path.rstrip(b"/") + b"/"
    chosen = [c for c in changes if (c.path + b"/").startswith(prefix)]
    if not stat:
        for change in chosen:
            _show(app, change)
    _summary(app, chosen, before, after)


def _snapshot(place: str, second: str | None) -> str:
    if second is None:
        return "latest"
    other, at, snapshot = second.rpartition("@")
    if at and other != place:
        raise UsageError(f"{place} and {other} are two policies; compare snapshots of one.")
    return snapshot


def _show(app: App, change: Change) -> None:
    if app.output.json:
        value = {
            "message_type": "change",
            "path": change.path,
            "modifier": change.kind,
            "type": TYPE_WORDS.get(change.type, "other"),
            "size_before": change.size_before,
            "size_after": change.size_after,
        }
        if change.kind == "R":
            value["old_path"] = change.old_path
        app.output.object(value)
        return
    slash = "/" if change.type == 3 and change.path != b"/" else ""
    shown = quote_path(change.path) + slash
    if change.kind == "R":
        shown = f"{quote_path(change.old_path)}{slash} → {shown}"
    app.output.line(f"{change.kind}  {shown}")


def _summary(app: App, changes: list[Change], before: int, after: int) -> None:
    counts = Counter(change.kind for change in changes)
    grown = sum(change.size_after - change.size_before for change in changes if change.type == 1)
    if app.output.json:
        app.output.object(
            {
                "message_type": "statistics",
                "from": before,
                "to": after,
                "counts": {_WORDS[kind]: counts[kind] for kind in _WORDS},
                "size_change": grown,
            }
        )
        return
    words = [f"{human.count(counts[k])} {word}" for k, word in _WORDS.items() if counts[k]]
    sign = "-" if grown < 0 else "+"
    what = ", ".join(words) or "no differences"
    app.output.say(f"{before} → {after}: {what} · {sign}{human.size(abs(grown))}")
