"""What every mount needs: the way into the kernel, and its read-ahead."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyfuse3
import trio

from cloudfs.core.errors import CloudfsError

READ_AHEAD_KIB = 4096

GRACE_S = 2.0
"""How long open questions may take when a mount is to end."""


def init(operations: pyfuse3.Operations, path: str, options: set[str]) -> None:
    """Mount. What the libraries print on failure becomes part of the sentence."""
    if not os.path.exists("/dev/fuse"):
        raise CloudfsError("there is no /dev/fuse; load the kernel module: `modprobe fuse`.")
    with _stderr() as said:
        try:
            pyfuse3.init(operations, path, options)
        except RuntimeError as error:
            reason = said() or str(error)
            raise CloudfsError(f"{path} could not be mounted: {reason}.") from None


@contextlib.contextmanager
def _stderr() -> Iterator[Callable[[], str]]:
    """Catch what is written to file descriptor 2, by child processes too."""
    with tempfile.TemporaryFile() as caught:
        kept = os.dup(2)
        os.dup2(caught.fileno(), 2)
        try:
            yield lambda: _last_line(os.pread(caught.fileno(), 4096, 0))
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _last_line(said: bytes) -> str:
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1].rstrip(".") if lines else ""


def raise_read_ahead(device: str | None) -> None:
    """Let the kernel read more than 128 KiB ahead from a mount ("major:minor"). Only root may;
    others read more slowly."""
    if not device:
        return
    with contextlib.suppress(OSError):
        Path(f"/sys/class/bdi/{device}/read_ahead_kb").write_text(str(READ_AHEAD_KIB))


async def end_on_signal(nursery: trio.Nursery) -> None:
    """Unmount when told to stop, and give open questions a little time."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as received:
        async for _ in received:
            pyfuse3.terminate()
            await trio.sleep(GRACE_S)
            nursery.cancel_scope.cancel()
