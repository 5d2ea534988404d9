"""``cloudfs watch``: a daemon that hears what changes, so that syncs visit only that."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cloudfs.cli import options
from cloudfs.cli.app import App
from cloudfs.cli.output import quote_path
from cloudfs.core.errors import UsageError

if TYPE_CHECKING:
    from cloudfs.source.watch.daemon import WatchJob

LOG_NAME = "watch.log"


@click.command()
@click.argument("policy", required=False, type=options.POLICY)
@click.option("-f", "--foreground", is_flag=True, help="Stay, as a service manager wants it.")
@click.option("--stop", is_flag=True, help="End the daemon; the next sync scans.")
@options.json_option
@options.pass_app
def watch(app: App, policy: str | None, foreground: bool, stop: bool) -> None:
    """Listen to the file systems of a policy's tree, so that its syncs visit only what changed.

    The policy must say so: `cloudfs policy set POLICY --snapshot watch`. POLICY may be left out
    where there is only one. The first sync after the start scans; those after it go by what was
    heard.
    """
    name = policy if policy is not None else app.policies.only()
    directory = app.local_state().watch_dir(name)
    if stop:
        _stop(app, name, directory)
        return
    job = _job(app, name, directory)
    running = _running(app, name, job, directory)
    if running:
        _announce(app, name, job, running, "is watched already, by process")
        return
    if foreground:
        from cloudfs.source.watch.start import serve

        words = "is watched by this process,"
        serve(job, lambda: _announce(app, name, job, os.getpid(), words))
        return
    from cloudfs.source.watch.start import start

    _announce(app, name, job, start(job), "is watched now, by process")


def _job(app: App, name: str, directory: Path) -> WatchJob:
    import msgspec

    from cloudfs.cli.sync import filters_of
    from cloudfs.source.choose import choose
    from cloudfs.source.watch.start import job_for

    policy = app.policies.load(name).policy
    sources = [os.fsencode(source) for source in policy.sources]
    if policy.snapshot != "watch":
        found_by = choose(policy.snapshot, sources)
        if found_by == "btrfs":
            raise UsageError(f"{name} finds what changed by btrfs snapshots and needs no daemon.")
        raise UsageError(
            f"{name} finds what changed by {found_by}; `cloudfs policy set {name}"
            " --snapshot watch` lets its syncs go by a daemon."
        )
    job = job_for(name, directory, sources, filters_of(policy))
    return msgspec.structs.replace(job, log_file=str(app.environment.state_dir / LOG_NAME))


def _running(app: App, name: str, job: WatchJob, directory: Path) -> int:
    """The process id of the daemon that watches all of this already; 0 for none.

    One that watches other file systems is ended, and one of which syncs cannot read what it heard.
    """
    from cloudfs.source.watch import client, start
    from cloudfs.source.watch.protocol import Question

    try:
        answer = client.ask(directory, Question("state"))
    except client.NoDaemon:
        return 0
    if not job.devices.items() <= answer.devices.items():
        words = f"{name} lies on other file systems than its daemon watches; it starts anew."
    elif not start.is_readable(directory):
        words = f"What the daemon of {name} wrote down cannot be read; it starts anew."
    else:
        return answer.pid
    app.output.note(words)
    start.stop(directory)
    return 0


def _stop(app: App, name: str, directory: Path) -> None:
    from cloudfs.source.watch import client
    from cloudfs.source.watch.start import stop

    try:
        stop(directory)
    except client.NoDaemon:
        app.output.warn(f"{name} is not watched.")
        return
    app.output.note(f"{name} is no longer watched.")


def _announce(app: App, name: str, job: WatchJob, pid: int, words: str) -> None:
    paths = [os.fsdecode(path) for path in job.paths]
    if app.output.json:
        app.output.event({"policy": name, "pid": pid, "file_systems_of": paths})
        return
    shown = ", ".join(quote_path(path) for path in job.paths)
    app.output.say(
        f"{name} {words} {pid}: the file system of {shown}. To stop: cloudfs watch {name} --stop"
    )
