"""``cloudfs mount --live``: the tree itself, with what changes in it marked."""

from __future__ import annotations

import contextlib
import dataclasses
import os

from cloudfs.cli.app import App
from cloudfs.cli.mounting import LOG_NAME, waiting_daemon
from cloudfs.cli.output import quote_path
from cloudfs.core.errors import CloudfsError, UsageError
from cloudfs.fuse.job import MountJob
from cloudfs.fuse.live.job import LiveJob
from cloudfs.repo.history import History
from cloudfs.repo.pool import WorkerOpening
from cloudfs.source.live.session import LiveSource

SHOWN_PAST = 5
"""Of processes that go past the mount no more are named."""


def mount_live(
    app: App, name: str, directory: str | None, *, foreground: bool, tracking: bool
) -> None:
    """Mount a policy's tree, and return when it is there or (``foreground``) when it has ended."""
    job = _job(app, name, directory, tracking=tracking)
    job = dataclasses.replace(job, backups=_backups(app, name, job.mountpoint))
    if foreground:
        from cloudfs.fuse.live.serve import serve

        serve(job, lambda: _announce(app, job))
        return
    with waiting_daemon() as daemon:
        daemon.mount(dataclasses.replace(job, log_file=app.environment.state_dir / LOG_NAME))
    _announce(app, job)
    past = LiveSource([os.fsencode(job.source)], job.directory).who_goes_past()
    for sentence in past[:SHOWN_PAST]:
        app.output.warn(f"cloudfs: {sentence}")
    if len(past) > SHOWN_PAST:
        app.output.warn(f"cloudfs: and {len(past) - SHOWN_PAST} more")


def _job(app: App, name: str, directory: str | None, *, tracking: bool) -> LiveJob:
    if os.geteuid() != 0:
        raise UsageError("a live mount needs root: it acts as whoever uses it.")
    policy = app.policies.load(name).policy
    if policy.snapshot != "live":
        raise UsageError(
            f"{name} finds what changed by {policy.snapshot}; `cloudfs policy set {name}"
            " --snapshot live` lets its syncs go by a live mount."
        )
    if len(policy.sources) != 1:
        raise UsageError(
            f"{name} has {len(policy.sources)} sources, and a live mount shows one; make a policy"
            " for each."
        )
    source = os.path.realpath(policy.sources[0])
    mountpoint = source if directory is None else os.path.realpath(directory)
    _check_mountpoint(source, mountpoint)
    for tree in {source, mountpoint}:
        _check_places(app, tree)
    return LiveJob(
        source,
        mountpoint,
        app.local_state().live_dir(name),
        name,
        policy.block_size,
        policy.kept_room,
        policy.when_full == "wait",
        policy.one_file_system,
        tracking,
    )


def _backups(app: App, name: str, mountpoint: str) -> MountJob | None:
    """What ``.snapshot`` shows; None, and a word about it, where the repository cannot be opened:
    the tree must be there all the same."""
    place = app.place(name)
    assert place.file is not None
    try:
        with app.repository(place) as repository:
            record = app.register(repository, place.file)[1]
            with contextlib.closing(History(repository, record)) as history:
                local = repository.local
                opening = WorkerOpening(
                    place.url, place.options, repository.opening, local.cache_dir, local.state_dir
                )
                return MountJob(opening, [(history.policy, history.manifest)], mountpoint)
    except CloudfsError as error:
        app.output.warn(f"cloudfs: .snapshot is not shown: {error}")
        return None


def _check_places(app: App, tree: str) -> None:
    """What a sync writes to while it holds the tree frozen must not be frozen with it."""
    environment = app.environment
    for what, place in (("state", environment.state_dir), ("cache", environment.cache_dir)):
        if os.path.commonpath([tree, os.path.realpath(place)]) == tree:
            raise UsageError(
                f"cloudfs keeps its {what} in {place}, within the tree that is to be mounted live;"
                f" set CLOUDFS_{what.upper()}_DIR to a place outside of it."
            )


def _check_mountpoint(source: str, mountpoint: str) -> None:
    from cloudfs.fuse import mountpoint as places

    dead = any(
        mounted.mountpoint == mountpoint and mounted.live and mounted.health() is places.Health.DEAD
        for mounted in places.mounts()
    )
    if mountpoint != source and not dead:
        places.check(mountpoint)
        if os.path.commonpath([source, mountpoint]) == source:
            raise UsageError(f"{mountpoint} is within {source}; mount elsewhere, or over {source}.")


def _announce(app: App, job: LiveJob) -> None:
    shown = quote_path(os.fsencode(job.mountpoint))
    if app.output.json:
        app.output.event(
            {"mountpoint": job.mountpoint, "source": job.source, "policies": [job.name]}
        )
        return
    where = "over itself" if job.over_source else f"at {shown}"
    app.output.say(
        f"{job.name} is mounted live {where}: what changes there is marked, and syncs read one"
        f" point in time. To stop: cloudfs umount {shown}"
    )
