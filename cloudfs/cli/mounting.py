"""What all commands that mount have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cloudfs.core.errors import UsageError

if TYPE_CHECKING:
    from cloudfs.fuse.daemon import Daemon

LOG_NAME = "mount.log"


def check_programs() -> None:
    """Raise UsageError where what mounting needs is not installed."""
    try:
        import pyfuse3  # noqa: F401  # only to learn whether it is there
    except ImportError as error:
        raise UsageError(
            f"mounting needs pyfuse3 and libfuse3, which cannot be loaded ({error})."
            " Install fuse3 and the Python package pyfuse3."
        ) from None


@contextlib.contextmanager
def waiting_daemon() -> Iterator[Daemon]:
    """A mount process that imports while its job is being made; cancelled on any error."""
    from cloudfs.fuse.daemon import Daemon

    daemon = Daemon()  # imports while the repository is being opened here
    try:
        yield daemon
    except BaseException:
        daemon.cancel()
        raise
