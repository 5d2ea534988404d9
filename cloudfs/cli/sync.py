"""``cloudfs sync``: take a snapshot, once or again and again."""

from __future__ import annotations

import errno
import math
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
import msgspec

from cloudfs.cli import options, verified
from cloudfs.cli.app import App, Place
from cloudfs.cli.commands import external_commands
from cloudfs.cli.errors import FAILED, SOME_UNREADABLE
from cloudfs.cli.output import quote_path
from cloudfs.cli.progress import Progress
from cloudfs.core import human
from cloudfs.core.errors import SourceError, UsageError
from cloudfs.core.policy import MAX_WORKERS, Policy

if TYPE_CHECKING:
    from cloudfs.backup.job import SyncResult, SyncSettings
    from cloudfs.repo.repository import PolicyRecord, Repository
    from cloudfs.source.filters import Filters

SHOWN_UNREADABLE = 50
STOP_NOTICE = "stopping; what was stored is kept. Ctrl-C again to stop at once."


@dataclass(frozen=True)
class SyncWishes:
    """What the command line asks of a sync."""

    dry_run: bool = False
    force: bool = False
    wait: bool = False
    workers: int | None = None
    tags: tuple[str, ...] = ()
    verify: float | None = None


@click.command()
@click.argument("policy", required=False, type=options.POLICY)
@click.option("-n", "--dry-run", is_flag=True, help="Only say what has changed; store nothing.")
@click.option("--force", is_flag=True, help="Make a snapshot even if nothing has changed.")
@click.option("--wait", is_flag=True, help="Wait for another sync of this policy to end.")
@click.option(
    "--every", type=options.DURATION, metavar="DURATION", help="Sync again and again, like 15m."
)
@click.option(
    "--continuous", is_flag=True, help="Sync what changes in a live mount, as the policy says when."
)
@click.option(
    "--workers",
    type=click.IntRange(0, MAX_WORKERS),
    metavar="N",
    help="Use N processes; 0 for one a core.",
)
@click.option(
    "--verify-source",
    "verify",
    type=options.SHARE,
    metavar="N%",
    help="Look at N% of what is called unchanged; if it is not, scan, and exit with 1.",
)
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="A word for the snapshot.")
@options.json_option
@options.utc_option
@options.store_options
@options.pass_app
def sync(
    app: App,
    policy: str | None,
    dry_run: bool,
    force: bool,
    wait: bool,
    every: float | None,
    continuous: bool,
    workers: int | None,
    verify: float | None,
    tags: tuple[str, ...],
) -> None:
    """Take a snapshot of a policy's tree and upload what changed since the last one.

    POLICY may be left out where there is only one. Exit code 3 means that the snapshot was made
    but some files could not be read; they are listed.
    """
    wishes = SyncWishes(dry_run, force, wait, workers, tags, verify)
    name = policy if policy is not None else app.policies.only()
    if continuous and every is not None:
        raise UsageError("--every and --continuous exclude each other.")
    if every is not None and every < 1:
        raise UsageError("--every must be a second or more.")
    if every is None and not continuous:
        raise click.exceptions.Exit(sync_once(app, name, wishes))
    from cloudfs.cli import again

    if every is not None:
        again.every(app, name, every, lambda: sync_once(app, name, wishes))
    again.continuously(app, app.policies.load(name).policy, lambda: sync_once(app, name, wishes))


def sync_once(app: App, name: str, wishes: SyncWishes) -> int:
    """Run one sync and say what came of it. Returns the exit code."""
    from cloudfs.backup.job import SyncJob
    from cloudfs.backup.sync import sync as run_sync

    place = app.place(name)
    if place.file is None:
        raise UsageError(f"a sync needs a policy on this machine, and {name} is none.")
    check_sources(place.file.policy)
    _hasten(place.file.policy)
    if app.local_state().is_new(place.file.policy.id) and wishes.workers != 1:
        # A first backup is most likely large: its workers import while the key is derived.
        from cloudfs.repo import pool

        pool.prepare()
    with (
        app.interrupts.deferred(STOP_NOTICE),
        app.repository(place) as repository,
        Progress(name, app.output) as progress,
    ):
        record = _record(app, repository, place, dry_run=wishes.dry_run)
        settings = settings_of(place, wishes)
        commands = external_commands(place.file, app.environment)
        job = SyncJob(
            msgspec.structs.replace(settings, external=commands),
            record,
            repository,
            socket.gethostname(),
            dry_run=wishes.dry_run,
            force=wishes.force,
            wait_s=math.inf if wishes.wait else 0.0,
            salt=int.from_bytes(repository.entropy(8), "big"),
            stopped=lambda: app.interrupts.requested,
        )
        result = run_sync(job, progress)
    Report(app, name, result, wishes).show()
    if result.verified is not None and result.verified.differences:
        return FAILED
    return SOME_UNREADABLE if result.unreadable else 0


def _is_dead_mount(source: str) -> bool:
    try:
        os.lstat(source)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def check_sources(policy: Policy) -> None:
    """Before the repository is opened: what is wrong with the sources is wrong anyway."""
    for source in policy.sources:
        if _is_dead_mount(source):
            raise SourceError(
                f"the process behind the live mount at {quote_path(os.fsencode(source))} is gone."
                f" `cloudfs mount --live {policy.name}` puts another in its place; nothing was"
                " backed up."
            )
        if not os.path.lexists(source):
            raise SourceError(
                f"the source {quote_path(os.fsencode(source))} of {policy.name} does not exist."
                " Is its drive mounted? Nothing was backed up."
            )


def _hasten(policy: Policy) -> None:
    from cloudfs.source.choose import hasten

    hasten(policy.snapshot, [os.fsencode(source) for source in policy.sources])


def _record(app: App, repository: Repository, place: Place, *, dry_run: bool) -> PolicyRecord:
    assert place.file is not None
    if dry_run and place.file.policy.id:
        return app.records(repository, place)[0]
    return app.register(repository, place.file)[1]


def settings_of(place: Place, wishes: SyncWishes) -> SyncSettings:
    """The part of a policy that a sync needs, with what the command line says instead."""
    from cloudfs.backup.job import SyncSettings

    assert place.file is not None
    policy = place.file.policy
    return SyncSettings(
        name=policy.name,
        sources=[os.fsencode(source) for source in policy.sources],
        url=place.url,
        options=place.options,
        source=policy.snapshot,
        filters=filters_of(policy),
        block_size=policy.block_size,
        max_pack_bytes=policy.pack_size,
        pack_time_limit_s=policy.pack_time_limit_s,
        level=policy.level,
        verify_packs=policy.verify_packs,
        workers=policy.workers if wishes.workers is None else wishes.workers,
        tags=list(dict.fromkeys((*policy.tags, *wishes.tags))),
        verify=policy.verify_source if wishes.verify is None else wishes.verify,
    )


def filters_of(policy: Policy) -> Filters:
    """What a policy leaves out."""
    from cloudfs.source.filters import Filters

    return Filters(
        policy.excludes, policy.exclude_caches, policy.exclude_if_present, policy.one_file_system
    )


class Report:
    """What is said at the end of a sync."""

    def __init__(self, app: App, name: str, result: SyncResult, wishes: SyncWishes) -> None:
        self._app = app
        self._output = app.output
        self._name = name
        self._result = result
        self._wishes = wishes

    def show(self) -> None:
        """Say it, in prose or as JSON."""
        if self._output.json:
            self._show_json()
            return
        for note in self._result.notes:
            self._output.note(note)
        for line in self._lines():
            self._output.say(line)
        if self._result.verified is not None:
            self._output.say(f"  {verified.summary(self._result.verified)}")
        self._show_unreadable()

    def _lines(self) -> list[str]:
        result = self._result
        cost = (
            f"{human.count(result.requests.requests, 'request')}"
            f" · {human.duration(result.duration_ns / 1e9)}"
        )
        if self._wishes.dry_run:
            return [f"Dry run of {self._name}: {self._changes()}. Nothing was stored. · {cost}"]
        if result.snapshot is None:
            return [self._unchanged() + f" · {human.duration(result.duration_ns / 1e9)}"]
        stats = result.snapshot.stats
        head = f"Snapshot {result.snapshot.number} of {self._name}"
        if result.previous is not None:
            stored = human.size(stats.bytes_stored)
            return [f"{head}: {self._changes()} · {stored} stored · {cost}"]
        return [
            f"{head}, {self._output.time(result.snapshot.time_ns)}",
            f"  {_items(stats)} · {human.size(stats.bytes_read)} read, {_stored(stats)}",
            f"  {cost}",
            f"Browse: cloudfs mount {self._name} DIR",
        ]

    def _unchanged(self) -> str:
        previous = self._result.previous
        if previous is None:
            return f"{self._name} is empty. No snapshot was made; --force makes one."
        return (
            f"{self._name} is unchanged since snapshot {previous.number}"
            f" ({self._output.time(previous.time_ns)}). No new snapshot; --force makes one."
        )

    def _changes(self) -> str:
        result = self._result
        counts = (
            (result.new, "new"),
            (result.changed, "changed"),
            (result.moved, "moved"),
            (result.deleted, "deleted"),
        )
        words = [f"{human.count(count)} {word}" for count, word in counts if count]
        return ", ".join(words) or "nothing changed"

    def _show_unreadable(self) -> None:
        unreadable = self._result.unreadable
        if not unreadable:
            return
        output = self._output
        what = human.count(len(unreadable), "item")
        output.warn(f"  {what} could not be read (exit {SOME_UNREADABLE}):")
        shown = len(unreadable) if output.verbose else SHOWN_UNREADABLE
        for path, reason in unreadable[:shown]:
            output.warn(f"    {quote_path(path)}: {reason}")
        if len(unreadable) > shown:
            output.warn(f"    … and {len(unreadable) - shown} more; --verbose lists them all.")

    def _show_json(self) -> None:
        result = self._result
        for path, reason in result.unreadable:
            self._output.event(
                {
                    "message_type": "error",
                    "error": {"message": reason},
                    "during": "archival",
                    "item": path,
                }
            )
        summary: dict[str, Any] = {
            "message_type": "summary",
            "policy": self._name,
            "dry_run": self._wishes.dry_run,
            "snapshot": result.snapshot.number if result.snapshot else None,
            "previous": result.previous.number if result.previous else None,
            "items_new": result.new,
            "items_changed": result.changed,
            "items_moved": result.moved,
            "items_deleted": result.deleted,
            "unreadable": len(result.unreadable),
            "requests": result.requests.requests,
            "gets": result.requests.gets,
            "puts": result.requests.puts,
            "lists": result.requests.lists,
            "deletes": result.requests.deletes,
            "bytes_uploaded": result.requests.bytes_up,
            "bytes_downloaded": result.requests.bytes_down,
            "total_duration": result.duration_ns / 1e9,
        }
        if result.verified is not None:
            summary["verified"] = verified.show_json(self._output, result.verified)
        if result.snapshot is not None:
            stats = result.snapshot.stats
            summary |= {
                "time": self._output.exact_time(result.snapshot.time_ns),
                "source": result.snapshot.source,
                "consistent": result.snapshot.consistent,
                "total_files_processed": stats.files,
                "total_bytes_processed": stats.bytes_total,
                "bytes_read": stats.bytes_read,
                "data_added_packed": stats.bytes_stored,
                "packs": stats.packs,
            }
        self._output.event(summary)


def _items(stats: Any) -> str:
    counts = (
        (stats.files, "file", "files"),
        (stats.dirs, "directory", "directories"),
        (stats.symlinks, "symlink", "symlinks"),
        (stats.others, "other", "others"),
    )
    words = [human.count(count, one, many) for count, one, many in counts if count]
    return ", ".join(words) or "nothing"


def _stored(stats: Any) -> str:
    ratio = stats.bytes_read / stats.bytes_stored if stats.bytes_stored else 0
    compared = f" ({ratio:.1f} : 1)" if ratio >= 1.05 else ""
    packs = human.count(stats.packs, "pack")
    return f"{human.size(stats.bytes_stored)} stored{compared} in {packs}"
