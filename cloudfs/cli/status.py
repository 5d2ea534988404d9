"""``cloudfs status``: policies, their last snapshots, what is running and what is mounted."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from cloudfs.cli import options
from cloudfs.cli.app import App
from cloudfs.cli.errors import explain
from cloudfs.cli.output import quote_path
from cloudfs.core import human
from cloudfs.core.errors import CloudfsError
from cloudfs.fuse.mountpoint import mounts

if TYPE_CHECKING:
    from pathlib import Path

    from cloudfs.core.manifest import SnapshotRecord
    from cloudfs.fuse.mountpoint import Mounted
    from cloudfs.repo.history import History

TITLES = ("policy", "repository", "last snapshot", "changes since", "source", "mounted at")


@dataclass
class PolicyStatus:
    """What is known of one policy."""

    name: str
    url: str
    error: str = ""
    code: int = 0
    source: str = "scan"
    last: SnapshotRecord | None = None
    syncing: bool = False
    mounted: list[str] = field(default_factory=list)


@click.command()
@options.json_option
@options.utc_option
@options.store_options
@options.pass_app
def status(app: App) -> None:
    """Show the policies of this machine, their last snapshots, and what is mounted."""
    there = mounts()
    found = [_status_of(app, name, there) for name in app.policies.names()]
    known = {status.url for status in found}
    others = [mounted for mounted in there if mounted.url not in known]
    if app.output.json:
        _print_objects(app, found, others)
    else:
        _print_table(app, found, others)
    if any(status.code for status in found):
        raise click.exceptions.Exit(max(status.code for status in found))


def _status_of(app: App, name: str, there: list[Mounted]) -> PolicyStatus:
    from cloudfs.source.choose import choose

    result = PolicyStatus(name, "")
    try:
        place = app.place(name)
        result.url = place.url
        if place.file is not None:
            policy = place.file.policy
            result.source = choose(policy.snapshot, [os.fsencode(s) for s in policy.sources])
        result.mounted = [_shown(mounted) for mounted in there if mounted.url == place.url]
        with app.history(name) as history:
            result.last = history.manifest.last_snapshot
            result.syncing = _is_syncing(history)
    except (CloudfsError, OSError) as error:
        explained = explain(error)
        result.error, result.code = explained if explained is not None else (str(error), 1)
    return result


def _shown(mounted: Mounted) -> str:
    path = quote_path(os.fsencode(mounted.mountpoint))
    return path if mounted.alive else f"{path} (its process is gone)"


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
        last = _age(status.last) if not status.error else "not known"
        if status.syncing:
            last += ", sync running"
        mounted = ", ".join(status.mounted)
        unknown = f"not known ({status.source})"
        rows.append((status.name, status.url, last, unknown, status.source, mounted))
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
            "source": status.source,
            "changes_since": None,
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
