"""Syncs again and again: every so often, or as soon as a live mount has something to sync.

What may pass by itself (a store that is down, a source that is not there, another sync) is said,
and the next turn tries again; anything else ends it. Where there is no repository, its drive may be
away; but not if this machine never synced the policy, which is most likely misspelt then.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from cloudfs.cli.app import App
from cloudfs.cli.errors import FAILED, explain
from cloudfs.core import human
from cloudfs.core.errors import Held, NoRepository, SourceError, StoreError, UsageError
from cloudfs.core.policy import Policy
from cloudfs.source.live.client import Line
from cloudfs.source.live.protocol import Answer, Question

LOOK_S = 0.25
"""How often the mount is asked whether something changed."""

RETRY_S = 5.0
"""How long it is left alone after a sync that failed, or while it is not mounted."""

SETTLED_S = 3.0
LONGEST_S = 60.0
"""A batch is synced when nothing changed for so long, or this long after its first change."""

Sync = Callable[[], object]


def every(app: App, name: str, period_s: float, sync: Sync) -> None:
    """Sync a policy once a period, for ever. Raises what ends it."""
    while True:
        started = time.monotonic()
        _try(app, name, sync)
        # Late by less than one period after a long sync, rather than twice in a row.
        time.sleep(period_s - math.fmod(time.monotonic() - started, period_s))


def continuously(app: App, policy: Policy, sync: Sync) -> None:
    """Sync as the policy's ``sync_on`` says, for ever. Raises what ends it."""
    if policy.sync_on not in ("batch", "write"):
        every(app, policy.name, human.parse_duration(policy.sync_on), sync)
    if policy.snapshot != "live":
        raise UsageError(
            f"{policy.name} finds what changed by {policy.snapshot}, which tells of nothing as it"
            " happens; use --every, or a live mount."
        )
    directory = app.local_state().live_dir(policy.name)
    settled_s = SETTLED_S if policy.sync_on == "batch" else 0.0
    while True:
        if not _try(app, policy.name, sync):
            time.sleep(RETRY_S)
        _wait(app, directory, settled_s)


def _try(app: App, name: str, sync: Sync) -> bool:
    """One sync; False if it failed for a reason that may pass by itself, which is said."""
    try:
        sync()
        return True
    except (NoRepository, StoreError, SourceError, Held) as error:
        never_there = isinstance(error, NoRepository) and _is_new(app, name)
        if app.interrupts.requested or never_there:
            raise
        app.output.warn(f"cloudfs: {(explain(error) or (str(error), FAILED))[0]}")
        return False


def _is_new(app: App, name: str) -> bool:
    return app.local_state().is_new(app.policies.load(name).policy.id)


def _wait(app: App, directory: Path, settled_s: float) -> None:
    """Until there is something to sync."""
    said = ""
    while True:
        try:
            with Line(directory) as line:
                while not _due(line.ask(Question("state")), settled_s):
                    time.sleep(LOOK_S)
            return
        except SourceError as error:
            if str(error) != said:
                said = str(error)
                app.output.warn(f"cloudfs: {said}; waiting until it is.")
            time.sleep(RETRY_S)


def _due(now: Answer, settled_s: float) -> bool:
    if not now.pending:
        return False
    return now.quiet_s >= settled_s or now.waiting_s >= LONGEST_S
