"""The change sources that hold something between two syncs: made for a policy, and left by it.

A policy that goes by something else from now on, or is removed, needs what they hold no more: the
snapshots that the next sync would have counted from.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cloudfs.backup.job import SyncSettings
from cloudfs.source.roots import HOLDING

if TYPE_CHECKING:
    from cloudfs.source.btrfs.session import BtrfsSource
    from cloudfs.source.external.command import Commands
    from cloudfs.source.external.session import ExternalSource

_BTRFS_NOTE = "btrfs"
_EXTERNAL_NOTE = "external"

Tell = Callable[[str], None]


def btrfs_source(
    settings: SyncSettings, policy_id: str, directory: Path, tell: Tell = lambda text: None
) -> BtrfsSource:
    """The btrfs side of a policy, whose state of syncs lies in ``directory``; see
    :class:`BtrfsSource`."""
    from cloudfs.source.btrfs.session import BtrfsSource

    leaves_out = settings.filters.leaves_out
    return BtrfsSource(settings.sources, policy_id, directory / _BTRFS_NOTE, leaves_out, tell)


def external_source(
    settings: SyncSettings,
    policy_id: str,
    directory: Path,
    commands: Commands,
    tell: Tell = lambda text: None,
    check_stop: Callable[[], None] = lambda: None,
) -> ExternalSource:
    """The side of a policy that runs its commands; see :class:`ExternalSource`."""
    from cloudfs.source.external.session import ExternalSource

    return ExternalSource(
        settings.sources,
        policy_id,
        directory / _EXTERNAL_NOTE,
        commands,
        settings.filters,
        tell,
        check_stop,
    )


def leave(
    settings: SyncSettings, policy_id: str, directory: Path, tell: Tell, *, used: str = ""
) -> None:
    """Give back what sources hold for a policy, but for the one that it uses from now on.

    ``tell`` is told what could not be given back. To be called under the policy's local lock.
    """
    holding = (os.path.join(source, HOLDING) for source in settings.sources)
    if used != "btrfs" and ((directory / _BTRFS_NOTE).exists() or any(map(os.path.isdir, holding))):
        btrfs_source(settings, policy_id, directory).leave(tell)
    commands = settings.external
    if used != "external" and commands and (directory / _EXTERNAL_NOTE).exists():
        external_source(settings, policy_id, directory, commands, tell).leave()
