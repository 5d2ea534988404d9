"""Which change source a policy uses."""

from __future__ import annotations

import contextlib
import os
import threading

from cloudfs.core.errors import SourceError


def choose(wanted: str, sources: list[bytes]) -> str:
    """The source for a sync: what is wanted, or with "auto" the best that these sources allow.

    Raises SourceError where what is wanted cannot be.
    """
    if wanted == "live" and len(sources) > 1:
        raise SourceError("a live mount shows one source; make a policy for each.")
    if wanted in ("scan", "watch", "live", "external"):
        return wanted
    from cloudfs.source.btrfs import subvolume

    others = [source for source in sources if not subvolume.is_subvolume(source)]
    if wanted == "auto":
        return "scan" if others or not subvolume.available() else "btrfs"
    if others:
        raise SourceError(
            f"{os.fsdecode(others[0])} is no btrfs subvolume. Name one as source, or use"
            " `cloudfs policy set NAME --snapshot scan`."
        )
    if not subvolume.available():
        raise SourceError(
            "btrfs snapshots need root. Sync as root, or use"
            " `cloudfs policy set NAME --snapshot scan`."
        )
    return wanted


def hasten(wanted: str, sources: list[bytes]) -> None:
    """Begin what a sync would wait for later, and return at once.

    Before btrfs takes a snapshot it writes out what it holds in memory. Of little things that
    changed in a large tree that is much, and meanwhile the caller may open the repository.
    """
    if wanted not in ("auto", "btrfs"):
        return
    from cloudfs.source.btrfs import ioctl, subvolume

    def write_out() -> None:
        for source in filter(subvolume.is_subvolume, sources):
            with contextlib.suppress(OSError):  # it is done before the snapshot in any case
                ioctl.write_out(source)

    if subvolume.available():
        threading.Thread(target=write_out, daemon=True).start()
