"""What a live mount needs to know, found out by the command before its process takes over."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cloudfs.fuse.job import MountJob


@dataclass(frozen=True)
class LiveJob:
    """Which tree to mount where. ``backups``, what ``.snapshot`` shows, holds keys: the job goes
    over a pipe only."""

    source: str
    mountpoint: str
    directory: Path  # of the mount's state
    name: str  # the policy's
    block_size: int  # in which data is marked, in bytes
    room_bytes: int
    waits: bool  # what happens when the room is full: see cloudfs.fuse.live.freeze
    one_file_system: bool = False
    tracking: bool = True
    log_file: Path | None = None
    backups: MountJob | None = None

    @property
    def over_source(self) -> bool:
        """Whether the tree is mounted over itself, so that nothing can go past the mount."""
        return self.source == self.mountpoint
