"""``cloudfs snapshots``: what there is to browse and to restore."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import msgspec

from cloudfs.cli import options
from cloudfs.cli.app import App
from cloudfs.cli.output import Output
from cloudfs.core import human

if TYPE_CHECKING:
    from cloudfs.repo.history import History

TITLES = ("no", "taken", "changed", "stored", "tags", "source")


@click.command()
@click.argument("policy", required=False, type=options.POLICY, metavar="[POLICY|URL]")
@options.json_option
@options.utc_option
@options.store_options
@options.pass_app
def snapshots(app: App, policy: str | None) -> None:
    """List the snapshots of a policy, or of all policies of the repository at a URL."""
    with app.histories(policy) as histories:
        for index, history in enumerate(histories):
            if app.output.json:
                _print_objects(app.output, history)
                continue
            if len(histories) > 1:
                app.output.line(("\n" if index else "") + history.policy.name)
            _print_table(app.output, history)


def _print_objects(output: Output, history: History) -> None:
    for snapshot in history.snapshots:
        output.object(
            {
                "number": snapshot.number,
                "time": output.exact_time(snapshot.time_ns),
                "policy": history.policy.name,
                "source": snapshot.source,
                "consistent": snapshot.consistent,
                "host": snapshot.host,
                "tags": snapshot.tags,
                "statistics": msgspec.to_builtins(snapshot.stats),
            }
        )


def _print_table(output: Output, history: History) -> None:
    name = history.policy.name
    if not history.snapshots:
        output.say(f"{name} has no snapshots yet; `cloudfs sync {name}` makes one.")
        return
    rows = []
    for snapshot in history.snapshots:
        stats = snapshot.stats
        changed = stats.new + stats.changed + stats.moved + stats.deleted
        rows.append(
            (
                str(snapshot.number),
                output.time(snapshot.time_ns),
                human.count(changed),
                human.size(stats.bytes_stored),
                ",".join(snapshot.tags),
                snapshot.source,
            )
        )
    output.table(TITLES, rows, right="r rr")
