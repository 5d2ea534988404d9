"""Whether a sync can go by what a source tells, from where the local state is."""

from __future__ import annotations

import msgspec
import xxhash

from cloudfs.backup.job import SyncSettings
from cloudfs.db.state import Head


def signature_of(settings: SyncSettings) -> bytes:
    """A digest of what decides which items a walk sees: another one, and all is looked at."""
    return xxhash.xxh3_128_digest(msgspec.msgpack.encode([settings.sources, settings.filters]))


def why_not_trusted(head: Head, signature: bytes) -> str:
    """Why a sync that begins at ``head`` cannot go by a changelist; "" if it can."""
    if head.signature != signature:
        return "the policy's sources or filters are others"
    if head.unread:
        return "some files could not be read last time"
    return ""
