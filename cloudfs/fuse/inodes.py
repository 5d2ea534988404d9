"""Inode numbers of the view: nothing is remembered for them, everything is read off them.

1. An inode number is ``slot << 40 | number``. Slots from 1 on stand for one snapshot of one
   policy each, and ``number`` is then the LIN. Hard links share it, and so does every later mount
   that meets the snapshots in the same order.
2. Slot 0 holds what is made up: ``policy << 28 | kind << 26 | snapshot``. Policies count from 1.
3. The kernel wants the root to be inode 1. It stands for the directory of the policies, or, where
   there is one policy only, for the directory of that one's snapshots.
"""

from __future__ import annotations

from enum import IntEnum

from cloudfs.core.errors import UsageError

ROOT_INO = 1
LIN_BITS = 40
MAX_LIN = (1 << LIN_BITS) - 1
MAX_SLOT = (1 << 24) - 1

_KIND_SHIFT = 26
_POLICY_SHIFT = 28
MAX_SNAPSHOT = (1 << _KIND_SHIFT) - 1
MAX_POLICY = (1 << (LIN_BITS - _POLICY_SHIFT)) - 1


class Kind(IntEnum):
    """What a made-up inode is."""

    SNAPSHOTS = 0  # the directory of one policy's snapshots
    LATEST = 1  # the symlink to the newest of them
    BY_NUMBER = 2  # the directory of symlinks by number
    NUMBER = 3  # one of those


def lin_ino(slot: int, lin: int) -> int:
    """The inode number of a LIN in the snapshot of a slot. Raises UsageError beyond 2^40."""
    if not 0 < lin <= MAX_LIN:
        raise UsageError(f"LIN {lin} is too large to be shown in a mount; restore it instead.")
    return slot << LIN_BITS | lin


def split(ino: int) -> tuple[int, int]:
    """(slot, LIN or made-up number)."""
    return ino >> LIN_BITS, ino & MAX_LIN


def made_up(policy: int, kind: Kind, snapshot: int = 0) -> int:
    """The inode number of something made up for the policy of that number (from 1 on)."""
    return policy << _POLICY_SHIFT | kind << _KIND_SHIFT | snapshot


def split_made_up(ino: int) -> tuple[int, Kind, int]:
    """(policy, kind, snapshot) of a made-up inode number other than the root's."""
    return (
        ino >> _POLICY_SHIFT,
        Kind(ino >> _KIND_SHIFT & 3),
        ino & MAX_SNAPSHOT,
    )
