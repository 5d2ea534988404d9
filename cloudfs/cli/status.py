"""``cloudfs status``: policies, last snapshots, what the next sync goes by, and what is mounted."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from cloudfs.cli import options
from cloudfs.cli.app import App, Place
from cloudfs.cli.commands import external_commands
from cloudfs.cli.errors import explain
from cloudfs.cli.output import quote_path
from cloudfs.core import human
from cloudfs.core.errors import CloudfsError
from cloudfs.fuse.mountpoint import Health, mounts

if TYPE_CHECKING:
    from pathlib import Path

    from cloudfs.core.manifest import SnapshotRecord
    from cloudfs.fuse.mountpoint import Mounted
    from cloudfs.repo.history import History
    from cloudfs.source.state import SourceState

TITLES = ("policy", "repository", "last snapshot", "changes since", "source", "mounted at")


@dataclass
class PolicyStatus:
    """What is known of one policy."""

    name: str
    url: str
    error: str = ""
    code: int = 0
    kind: str = ""  # of the source, or what the policy says of it
    source: SourceState | None = None  # None: not known
    last: SnapshotRecord | None = None
    syncing: bool = False
    mounted: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)


@click.command()
@options.json_option
@options.utc_option
@options.store_options
@options.pass_app
def status(app: App) -> None:
    """Show the policies of this machine, their last snapshots, and what is mounted.

    For each it is said how its next sync finds what changed, and how much that is so far. Nothing
    is looked at in the tree itself.
    """
    there = mounts()
    found = [_status_of(app, name, there) for name in app.policies.names()]
    known = {place for status in found for place in (status.url, *status.sources)}
    others = [mounted for mounted in there if mounted.url not in known]
    if app.output.json:
        _print_objects(app, found, others)
    else:
        _print_table(app, found, others)
    if any(status.code for status in found):
        raise click.exceptions.Exit(max(status.code for status in found))


def _status_of(app: App, name: str, there: list[Mounted]) -> PolicyStatus:
    result = PolicyStatus(name, "")
    try:
        place = app.place(name)
        result.url = place.url
        if place.file is not None:
            result.kind = place.file.policy.snapshot
            result.sources = [os.path.realpath(source) for source in place.file.policy.sources]
        result.mounted = [
            _shown(mounted)
            for mounted in there
            if mounted.url in (result.sources if mounted.live else [place.url])
        ]
        with app.history(name) as history:
            result.last = history.manifest.last_snapshot
            result.syncing = _is_syncing(history)
            if place.file is not None:
                result.source = _foreseen(app, place, history)
                result.kind = result.source.kind
    except (CloudfsError, OSError) as error:
        explained = explain(error)
        result.error, result.code = explained if explained is not None else (str(error), 1)
    return result


def _foreseen(app: App, place: Place, history: History) -> SourceState:
    """What the next sync goes by. Raises CloudfsError where it could not even begin."""
    import msgspec

    from cloudfs.backup.foresee import foresee
    from cloudfs.cli.sync import SyncWishes, check_sources, settings_of

    assert place.file is not None
    check_sources(place.file.policy)
    settings = settings_of(place, SyncWishes(False, False, False, None, ()))
    commands = external_commands(place.file, app.environment)
    return foresee(
        msgspec.structs.replace(settings, external=commands),
        history.policy,
        history.repository.id,
        history.repository.local,
        history.manifest.last_snapshot,
    )


def _shown(mounted: Mounted) -> str:
    path = quote_path(os.fsencode(mounted.mountpoint))
    health = mounted.health()
    if health is Health.ALIVE:
        return f"{path} (live)" if mounted.live else path
    return f"{path} ({'its process is gone' if health is Health.DEAD else 'it does not answer'})"


def _is_syncing(history: History) -> bool:
    """Whether a sync runs on this machine: it holds a lock beside its state."""
    repository = history.repository
    directory: Path = repository.local.policy_dir(repository.id, history.policy.id)
    with contextlib.suppress(FileNotFoundError), (directory / "lock").open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _print_table(app: App, found: list[PolicyStatus], others: list[Mounted]) -> None:
    rows = []
    for status in found:
        last = _age(status.last) if status.last or not status.error else "not known"
        if status.syncing:
            last += ", sync running"
        mounted = ", ".join(status.mounted)
        rows.append((status.name, status.url, last, _pending(status), _source(status), mounted))
    rows += [("", mounted.url, "", "", "", _shown(mounted)) for mounted in others]
    if rows:
        app.output.table(TITLES, rows)
    else:
        app.output.say(
            f"There are no policies in {app.policies.directory}; make one with"
            " `cloudfs policy create NAME --source PATH --repo URL`."
        )
    for status in found:
        if status.error:
            app.output.warn(f"cloudfs: {status.name}: {status.error}")


def _source(status: PolicyStatus) -> str:
    """How the next sync finds what changed."""
    source = status.source
    if source is None or source.kind == "scan":
        return status.kind or "not known"
    if source.complete:
        return f"{source.kind}, complete"
    return f"{source.kind}, next sync scans: {source.reason}"


def _pending(status: PolicyStatus) -> str:
    """How much changed since the last snapshot, as far as that is known."""
    source = status.source
    if source is None or source.pending is None:
        scans = source is not None and not source.complete
        return "not known (scan)" if scans else "not known"
    shown = human.count(source.pending, source.unit)
    if source.at_least:
        return f"{shown} or more"
    return shown if source.complete else f"{shown}, and what is not known"


def _age(last: SnapshotRecord | None) -> str:
    if last is None:
        return "none yet"
    seconds = max(time.time() - last.time_ns / 1e9, 0.0)
    return f"{last.number}, {human.duration(seconds)} ago"


def _print_objects(app: App, found: list[PolicyStatus], others: list[Mounted]) -> None:
    for status in found:
        value: dict[str, Any] = {
            "policy": status.name,
            "repository": status.url,
            "source": status.kind or None,
            **_source_object(status.source),
            "syncing": status.syncing,
            "mounted_at": status.mounted,
            "last_snapshot": None,
        }
        if status.last is not None:
            value["last_snapshot"] = {
                "number": status.last.number,
                "time": app.output.exact_time(status.last.time_ns),
            }
        if status.error:
            value["error"] = status.error
        app.output.object(value)
    for mounted in others:
        app.output.object(
            {"policy": None, "repository": mounted.url, "mounted_at": [mounted.mountpoint]}
        )


def _source_object(source: SourceState | None) -> dict[str, Any]:
    """What programs are told of a source: nulls where nothing is known."""
    if source is None:
        names = ("source_complete", "source_reason", "changes_since", "changes_unit")
        return {**dict.fromkeys(names), "changes_more": False}
    return {
        "source_complete": source.complete,
        "source_reason": source.reason or None,
        "changes_since": source.pending,
        "changes_unit": source.unit if source.pending is not None else None,
        "changes_more": source.at_least,
    }
