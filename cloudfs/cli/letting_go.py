"""What a policy holds on this machine is given back when the policy needs it no more.

It may be removed, or go by something else: then nobody needs its watch daemon, nor the snapshots
of a file system that its next sync would have counted from. Of other sources, or for another
repository, the next sync counts from none either.
"""

from __future__ import annotations

import contextlib

import msgspec

from cloudfs.cli.app import App, Place
from cloudfs.cli.commands import external_commands
from cloudfs.cli.output import quote_path
from cloudfs.cli.policies import PolicyFile
from cloudfs.core.errors import CloudfsError, Held, UsageError
from cloudfs.core.policy import Policy


def check_not_mounted(app: App, name: str) -> None:
    """Raise UsageError where a tree is mounted live: the mount belongs to its policy."""
    from cloudfs.source.live.client import Line, NotMounted
    from cloudfs.source.live.protocol import Question

    with contextlib.suppress(NotMounted), Line(app.local_state().live_dir(name)) as line:
        place = quote_path(line.ask(Question("state")).mountpoint)
        raise UsageError(f"{name} is mounted live at {place}; `cloudfs umount {place}` first.")


def let_go_of_removed(app: App, name: str) -> None:
    """End and delete what a policy has that is to be removed. What cannot be is warned of; raises
    Held where it is being synced."""
    try:
        file = app.policies.load(name)
    except UsageError as error:  # it may be removed for that
        app.output.warn(f"cloudfs: what its syncs may have held is left as it is: {error}")
        _end_daemon(app, name)
        return
    let_go(app, file, None)


def let_go(app: App, old: PolicyFile, new: Policy | None) -> None:
    """The same for a policy that is another from now on; None: it is to be removed."""
    policy, used = old.policy, new.snapshot if new is not None else ""
    if used != "watch":
        _end_daemon(app, policy.name)
    if new is not None and (new.sources, new.repository) != (policy.sources, policy.repository):
        used = ""  # the next sync has nothing to count from, by whatever it goes
    try:
        _leave(app, old, "btrfs" if used == "auto" else used)
    except CloudfsError as error:
        if isinstance(error, Held) and new is None:
            raise
        app.output.warn(f"cloudfs: what its syncs held is left as it is: {error}")


def _leave(app: App, old: PolicyFile, used: str) -> None:
    policy = old.policy
    directories = app.local_state().policy_dirs(policy.id) if policy.id else []
    if not directories:
        return
    from cloudfs.backup.exclusive import local_lock
    from cloudfs.backup.sources import leave
    from cloudfs.cli.sync import SyncWishes, settings_of

    place = Place(policy.repository, app.store_options(policy), old, policy.name)
    settings = settings_of(place, SyncWishes())
    commands = external_commands(old, app.environment)
    settings = msgspec.structs.replace(settings, external=commands)

    def tell(text: str) -> None:
        app.output.warn(f"cloudfs: {text}")

    for directory in directories:
        with local_lock(directory, policy.name, 0, tell):
            leave(settings, policy.id, directory, tell, used=used)


def _end_daemon(app: App, name: str) -> None:
    from cloudfs.source.watch import client
    from cloudfs.source.watch.start import stop

    with contextlib.suppress(client.NoDaemon):
        stop(app.local_state().watch_dir(name))
        app.output.note(f"{name} is no longer watched.")
