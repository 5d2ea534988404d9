"""What a mount needs to know, found out by the command before the mount's process takes over.

Imports nothing of FUSE, so that making a job costs a command no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cloudfs.core.manifest import Manifest
from cloudfs.fuse import mountpoint as places
from cloudfs.repo.history import History
from cloudfs.repo.pool import WorkerOpening
from cloudfs.repo.repository import PolicyRecord


@dataclass(frozen=True)
class MountJob:
    """What to mount, and where. Holds keys: it goes over a pipe only."""

    opening: WorkerOpening
    branches: list[tuple[PolicyRecord, Manifest]]
    mountpoint: str
    allow_other: bool = False
    log_file: Path | None = None
    whole: bool = False
    """Whether the repository is meant as such, with policies that are yet to come."""


def job_of(
    opening: WorkerOpening,
    histories: Sequence[History],
    mountpoint: str,
    *,
    allow_other: bool = False,
    whole: bool = False,
) -> MountJob:
    """The job to mount these policies. Raises UsageError where the mountpoint cannot be used."""
    return MountJob(
        opening,
        [(history.policy, history.manifest) for history in histories],
        places.check(mountpoint),
        allow_other,
        whole=whole,
    )
