"""Ctrl-C and SIGTERM: once to stop cleanly, twice to stop now.

1. Outside of ``deferred`` the first one raises KeyboardInterrupt, wherever the program is.
2. Inside, it only sets ``requested``, and whoever works there looks at that between steps.
3. The second one ends the process on the spot. What other processes see of it is what they would
   see of a crash, and nothing is lost by that.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

from cloudfs.cli.errors import INTERRUPTED

_SHOW_CURSOR = b"\x1b[?25h"


class Interrupts:
    """The one handler of the process."""

    def __init__(self) -> None:
        self.requested = False
        self._deferred = b""

    def install(self) -> None:
        """Handle SIGINT and SIGTERM from now on, unless they were to be ignored."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    @contextlib.contextmanager
    def deferred(self, notice: str) -> Iterator[None]:
        """Inside, the first interrupt only says ``notice`` on stderr and sets ``requested``."""
        self._deferred = f"cloudfs: {notice}\n".encode()
        try:
            yield
        finally:
            self._deferred = b""

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if os.isatty(2):
                _write(_SHOW_CURSOR)
            os._exit(INTERRUPTED)
        self.requested = True
        if not self._deferred:
            raise KeyboardInterrupt
        _write(self._deferred)


def _write(data: bytes) -> None:
    # Not through sys.stderr: the main program may be in the middle of writing to it.
    with contextlib.suppress(OSError):
        os.write(2, data)
