"""``cloudfs mount`` and ``cloudfs umount``: browse backups as directories."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

import click

from cloudfs.cli import options
from cloudfs.cli.app import App
from cloudfs.cli.mounting import LOG_NAME, check_programs, waiting_daemon
from cloudfs.cli.output import quote_path
from cloudfs.core import human
from cloudfs.core.errors import UsageError

if TYPE_CHECKING:
    from cloudfs.fuse.mount import MountJob

DIRECTORY = click.Path()


@click.command()
@click.argument("policy", type=options.POLICY, metavar="POLICY|URL")
@click.argument("directory", required=False, type=DIRECTORY, metavar="[DIR]")
@click.option("--live", is_flag=True, help="Mount the tree itself, and mark what changes in it.")
@click.option("--no-tracking", is_flag=True, hidden=True, help="To measure what marking costs.")
@click.option("-f", "--foreground", is_flag=True, help="Stay until unmounted; Ctrl-C unmounts.")
@click.option("--allow-other", is_flag=True, help="Let other users in, as file modes allow.")
@options.json_option
@options.store_options
@options.pass_app
def mount(
    app: App,
    policy: str,
    directory: str | None,
    live: bool,
    no_tracking: bool,
    foreground: bool,
    allow_other: bool,
) -> None:
    """Show the snapshots of a policy below DIR, read-only, fetching what is read.

    Given the URL of a repository that holds several policies, DIR has a directory for each.

    With --live the tree of the policy is mounted, over itself where no DIR is given, to be read and
    written as before; its syncs then know what changed, and each is one point in time.
    """
    check_programs()
    from cloudfs.fuse import mountpoint

    if live:
        from cloudfs.cli.live import mount_live

        mount_live(app, policy, directory, foreground=foreground, tracking=not no_tracking)
        return
    if directory is None:
        raise UsageError("name a directory to mount on. See `cloudfs mount --help`.")
    mountpoint.check(directory)
    if foreground:
        job, words = _job(app, policy, directory, allow_other=allow_other)
        from cloudfs.fuse.mount import serve

        serve(job, lambda: _announce(app, job, words))
        return
    with waiting_daemon() as daemon:
        job, words = _job(app, policy, directory, allow_other=allow_other)
        log = app.environment.state_dir / LOG_NAME
        daemon.mount(dataclasses.replace(job, log_file=log))
    _announce(app, job, words)


def _job(app: App, policy: str, directory: str, *, allow_other: bool) -> tuple[MountJob, str]:
    """All that the mount's process needs, and what is mounted, in words."""
    from cloudfs.fuse.mount import job_of
    from cloudfs.repo.pool import WorkerOpening

    place = app.place(policy)
    with app.histories(policy) as histories:
        repository = histories[0].repository
        local = repository.local
        opening = WorkerOpening(
            place.url, place.options, repository.opening, local.cache_dir, local.state_dir
        )
        whole = place.file is None and not place.policy_name
        job = job_of(opening, histories, directory, allow_other=allow_other, whole=whole)
        if len(histories) == 1:
            count = human.count(len(histories[0].snapshots), "snapshot")
            return job, f"{histories[0].policy.name} at {_shown(job)}: {count}."
        return job, f"{place.url} at {_shown(job)}: {human.count(len(histories))} policies."


def _shown(job: MountJob) -> str:
    return quote_path(os.fsencode(job.mountpoint))


def _announce(app: App, job: MountJob, words: str) -> None:
    if app.output.json:
        app.output.event(
            {
                "mountpoint": job.mountpoint,
                "repository": job.opening.url,
                "policies": [record.name for record, _ in job.branches],
            }
        )
        return
    app.output.say(
        f"{words} Files are fetched as they are read. To stop: cloudfs umount {_shown(job)}"
    )


@click.command()
@click.argument("directory", type=DIRECTORY, metavar="DIR")
@click.option("--lazy", is_flag=True, help="Hide it now and end it when nobody uses it any more.")
@options.pass_app
def umount(app: App, directory: str, lazy: bool) -> None:
    """End the mount at DIR, even one whose process is gone."""
    from cloudfs.fuse.mountpoint import unmount

    unmount(directory, lazy=lazy)
    app.output.note(f"{quote_path(os.fsencode(directory))} is unmounted.")
