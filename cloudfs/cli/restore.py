"""``cloudfs restore``: bring files and directories of a snapshot back."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from cloudfs.cli import options
from cloudfs.cli.app import App
from cloudfs.cli.errors import EXIT_CODES, FAILED
from cloudfs.cli.output import quote_path
from cloudfs.cli.progress import Progress
from cloudfs.cli.target import parse_target
from cloudfs.core import human
from cloudfs.core.errors import Damaged
from cloudfs.core.policy import MAX_WORKERS

if TYPE_CHECKING:
    from cloudfs.restore.job import RestoreResult
    from cloudfs.restore.values import Totals

SHOWN_FAILURES = 50
STOP_NOTICE = "stopping; what was restored is left there. Ctrl-C again to stop at once."


@click.command()
@click.argument("what", type=options.POLICY, metavar="POLICY[@SNAPSHOT][:PATH]")
@click.option(
    "-t",
    "--target",
    type=click.Path(),
    required=True,
    metavar="DIR",
    help="Where to: a directory that is new or empty.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would be restored, and how.")
@click.option(
    "--owners",
    type=click.Choice(["id", "name", "none"]),
    default="id",
    show_default=True,
    help="Give owners by number, by name where this machine knows it, or not at all.",
)
@click.option(
    "--workers",
    type=click.IntRange(0, MAX_WORKERS),
    default=0,
    metavar="N",
    help="Use N processes; 0 for one a core.",
)
@options.json_option
@options.utc_option
@options.store_options
@options.pass_app
def restore(app: App, what: str, target: str, dry_run: bool, owners: str, workers: int) -> None:
    """Restore what a snapshot holds below PATH into DIR, in parallel and verified.

    The latest snapshot and all of it are meant where none is named. The content of a directory
    comes into DIR itself, a single file into DIR under its own name.
    """
    from cloudfs.repo.pool import WorkerOpening
    from cloudfs.restore.job import RestoreJob
    from cloudfs.restore.restore import restore as run_restore

    wanted = parse_target(what)
    with (
        app.interrupts.deferred(STOP_NOTICE),
        app.history(wanted.place) as history,
        Progress(history.policy.name, app.output) as progress,
    ):
        place, local = app.place(wanted.place), history.repository.local
        opening = WorkerOpening(
            place.url,
            place.options,
            history.repository.opening,
            local.cache_dir,
            local.state_dir,
        )
        job = RestoreJob(
            history,
            history.find(wanted.snapshot).number,
            wanted.path,
            os.fsencode(os.path.abspath(target)),
            opening,
            workers,
            owners,
            dry_run,
            stopped=lambda: app.interrupts.requested,
        )
        result = run_restore(job, progress)
        name = history.policy.name
    report = Report(app, name, result, target, dry_run=dry_run)
    report.show()
    raise click.exceptions.Exit(report.code)


class Report:
    """What is said at the end of a restore."""

    def __init__(
        self, app: App, name: str, result: RestoreResult, target: str, *, dry_run: bool
    ) -> None:
        self._output = app.output
        self._name = name
        self._result = result
        self._raw_target = os.fsencode(os.path.abspath(target))
        self._target = quote_path(os.fsencode(target))
        self._dry_run = dry_run
        self.code = 0
        if result.failures:
            self.code = EXIT_CODES[Damaged] if result.damaged else FAILED

    def show(self) -> None:
        """Say it, in prose or as JSON."""
        if self._output.json:
            self._show_json()
            return
        for line in self._lines():
            self._output.say(line)
        self._show_failures()

    def _lines(self) -> list[str]:
        result, totals = self._result, self._result.totals
        taken = self._output.time(result.snapshot.time_ns)
        snapshot = f"snapshot {result.snapshot.number} of {self._name} ({taken})"
        what = f"{_items(totals)} · {human.size(totals.size)}"
        packs = human.count(totals.packs, "pack")
        if self._dry_run:
            requests = human.count(totals.requests, "request")
            return [
                f"Dry run of {snapshot} to {self._target}: {what}",
                f"  {human.size(totals.stored)} would come from {packs} by {requests}."
                " Nothing was written.",
            ]
        word = "Restored" if not result.failures else "Restored most of"
        cost = (
            f"  {human.size(result.requests.bytes_down)} fetched from {packs}"
            f" · {human.count(result.requests.requests, 'request')}"
            f" · {human.duration(result.duration_ns / 1e9)}"
        )
        lines = [f"{word} {snapshot} to {self._target}", f"  {what}", cost]
        if result.lost:
            lost = ", ".join(
                f"{kind} ({human.count(n)})" for kind, n in sorted(result.lost.items())
            )
            lines.append(f"  Not given, as only root may: {lost}")
        return lines

    def _show_failures(self) -> None:
        failures, output = self._result.failures, self._output
        if not failures:
            return
        what = human.count(len(failures), "item")
        output.warn(f"  {what} could not be restored as before (exit {self.code}):")
        shown = len(failures) if output.verbose else SHOWN_FAILURES
        for path, reason in failures[:shown]:
            output.warn(f"    {quote_path(path)}: {reason}")
        if len(failures) > shown:
            output.warn(f"    … and {len(failures) - shown} more; --verbose lists them all.")

    def _show_json(self) -> None:
        result, totals = self._result, self._result.totals
        for path, reason in result.failures:
            self._output.event(
                {
                    "message_type": "error",
                    "error": {"message": reason},
                    "during": "restore",
                    "item": path,
                }
            )
        summary: dict[str, Any] = {
            "message_type": "summary",
            "policy": self._name,
            "snapshot": result.snapshot.number,
            "time": self._output.exact_time(result.snapshot.time_ns),
            "dry_run": self._dry_run,
            "target": self._raw_target,
            "files": totals.files,
            "directories": totals.dirs,
            "symlinks": totals.symlinks,
            "others": totals.others,
            "hard_links": totals.links,
            "total_bytes": totals.size,
            "packs": totals.packs,
            "planned_requests": totals.requests,
            "planned_bytes": totals.stored,
            "failed": len(result.failures),
            "lost": result.lost,
            "requests": result.requests.requests,
            "gets": result.requests.gets,
            "bytes_downloaded": result.requests.bytes_down,
            "total_duration": result.duration_ns / 1e9,
        }
        self._output.event(summary)


def _items(totals: Totals) -> str:
    counts = (
        (totals.files, "file", "files"),
        (totals.dirs, "directory", "directories"),
        (totals.symlinks, "symlink", "symlinks"),
        (totals.others, "other", "others"),
        (totals.links, "hard link", "hard links"),
    )
    words = [human.count(count, one, many) for count, one, many in counts if count]
    return ", ".join(words) or "nothing"
