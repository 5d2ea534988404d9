"""What a change source knows between two syncs, for people who ask how it stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SourceState:
    """What the next sync would go by, as far as that can be told without looking at the tree.

    ``complete`` says that there is a changelist that holds all changes since the last snapshot;
    without one the next sync scans, for ``reason``. ``pending`` is how much is on it, in ``unit``s
    (a noun in the singular); None: not known before the sync looks. With ``at_least`` there may be
    more.
    """

    kind: str
    complete: bool
    reason: str = ""
    pending: int | None = None
    unit: str = "item"
    at_least: bool = False


def scanning(kind: str, reason: str) -> SourceState:
    """The next sync scans."""
    return SourceState(kind, False, reason)
