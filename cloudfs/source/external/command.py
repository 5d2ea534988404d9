"""Running a command of a policy: without a shell, within limits, and never for ever.

1. A command gets its arguments as they are (no shell sees them), no input, and an environment
   without anything that opens a repository or a store.
2. It runs in a session of its own. When its time is over, or the user stops the sync, or it prints
   what it must not, all of its processes are ended: asked first, then killed.
3. What it prints is handed on line by line and never held whole. Of its errors the last line is
   kept, to be shown when it fails.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from typing import IO

import msgspec

from cloudfs.core.errors import SourceError
from cloudfs.core.policy import DEFAULT_EXTERNAL_TIMEOUT_S

MAX_LINE = 1 << 20
_CHUNK = 1 << 16
_ERRORS_KEPT = 4096
_LOOK_S = 0.1
_GRACE_S = 2.0


class Commands(msgspec.Struct, frozen=True, kw_only=True):
    """The commands of a policy, each a program and its first arguments; () where there is none.

    ``environment`` is all that they get, beside what a source adds.
    """

    snapshot: tuple[str, ...]
    changes: tuple[str, ...] = ()
    release: tuple[str, ...] = ()
    timeout_s: float = DEFAULT_EXTERNAL_TIMEOUT_S
    environment: dict[str, str] = {}


class Command:
    """One run of a command."""

    def __init__(
        self,
        arguments: list[bytes],
        environment: dict[bytes, bytes],
        timeout_s: float,
        check_stop: Callable[[], None] = lambda: None,
    ) -> None:
        """``check_stop`` raises what ends the command before its time."""
        self._arguments = arguments
        self._environment = environment
        self._timeout_s = timeout_s
        self._check_stop = check_stop
        self._said = b""

    @property
    def name(self) -> str:
        """How it is called in messages."""
        return os.fsdecode(os.path.basename(self._arguments[0]))

    def lines(
        self, max_bytes: int, started: Callable[[int], None] | None = None
    ) -> Generator[bytes, None, None]:
        """What it prints, line by line, without the ends of lines; to be closed if not read out.

        ``started`` is told its process. Raises SourceError where it cannot be run, fails, prints
        more than ``max_bytes``, a line of more than MAX_LINE, or is not done in time.
        """
        try:
            process = subprocess.Popen(
                self._arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=self._environment,
                cwd="/",
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            words = getattr(error, "strerror", None) or str(error)
            raise SourceError(f"{self.name} cannot be run ({words.lower()}).") from None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            if started is not None:
                started(process.pid)
            rest = b""
            for chunk in self._chunks(process, process.stdout, process.stderr, max_bytes):
                *whole, rest = (rest + chunk).split(b"\n")
                if len(rest) > MAX_LINE or any(len(line) > MAX_LINE for line in whole):
                    raise SourceError(f"{self.name} printed a line that is far too long.")
                yield from whole
            if rest:
                yield rest
            if process.returncode:
                raise SourceError(f"{self.name} failed ({self._words(process.returncode)}).")
        except BaseException:
            end_group(process.pid)
            raise
        finally:
            process.stdout.close()
            process.stderr.close()
            process.wait()

    def _chunks(
        self, process: subprocess.Popen[bytes], out: IO[bytes], err: IO[bytes], max_bytes: int
    ) -> Iterator[bytes]:
        """What comes out until the process has ended; its errors are taken in meanwhile."""
        deadline = time.monotonic() + self._timeout_s
        left = max_bytes
        with selectors.DefaultSelector() as selector:
            for pipe in (out, err):
                os.set_blocking(pipe.fileno(), False)
                selector.register(pipe, selectors.EVENT_READ)
            ended = False
            while True:
                ready = selector.select(0 if ended else _LOOK_S) if selector.get_map() else []
                for key, _ in ready:
                    chunk = os.read(key.fd, _CHUNK)
                    if not chunk:
                        selector.unregister(key.fileobj)
                    elif key.fileobj is err:
                        self._said = (self._said + chunk)[-_ERRORS_KEPT:]
                    else:
                        left -= len(chunk)
                        if left < 0:
                            raise SourceError(f"{self.name} printed far too much.")
                        yield chunk
                self._check_stop()
                if not ready and ended:
                    return  # what it started may still hold the pipes, and is not waited for
                if time.monotonic() > deadline:
                    raise SourceError(f"{self.name} was not done after {self._timeout_s:g} s.")
                if not selector.get_map() and not ended:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(_LOOK_S)
                ended = process.poll() is not None

    def _words(self, code: int) -> str:
        lines = self._said.decode(errors="replace").strip().splitlines()
        if lines:
            return "".join(c if c.isprintable() else "?" for c in lines[-1])[:200].rstrip(".")
        return f"exit code {code}" if code > 0 else f"killed by {_signal_name(-code)}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most of the real-time signals have none
        return f"signal {number}"


def end_group(leader: int) -> None:
    """End all processes of a session's first group: asked to, then killed."""
    for number, grace_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, _GRACE_S)):
        deadline = time.monotonic() + grace_s
        try:
            os.killpg(leader, number)
            while time.monotonic() < deadline:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(leader, os.WNOHANG)
                os.killpg(leader, 0)
                time.sleep(0.01)
        except (ProcessLookupError, PermissionError):
            return
