"""Progress of whatever reports items and bytes: a bar, a line a minute, or JSON.

1. The work reports numbers whenever it likes; that only stores them. A thread of its own shows
   them, so showing costs the work nothing.
2. On a terminal nothing is shown for the first two seconds: most syncs are over by then, and rich
   is not even imported. Without one, a line a minute. With ``--json``, a status object a second.
3. The time left is told from the bytes since the phase began.
"""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from cloudfs.cli.output import Output
from cloudfs.core import human

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from cloudfs.backup.job import Verified

QUIET_S = 2.0
LINE_EVERY_S = 60.0
STATUS_EVERY_S = 1.0
REDRAW_EVERY_S = 0.2


class Progress:
    """Shows how far something is, from the ``with`` statement's beginning to its end.

    Its methods are those of the events of a sync; they may be called from any thread.
    """

    def __init__(self, name: str, output: Output) -> None:
        self._name = name
        self._output = output
        self._phase = "opening"
        self._numbers = (0, 0, 0, 0)
        self._started = self._phase_started = time.monotonic()
        self._phase_bytes = 0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._bar: tuple[Bar, TaskID] | None = None
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True)

    def __enter__(self) -> Self:
        if not self._output.quiet or self._output.json:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    # -- told by the work --------------------------------------------------------------------

    def phase(self, name: str) -> None:
        """A new phase begins."""
        self._phase_bytes = self._numbers[3]
        self._phase_started = time.monotonic()
        self._phase = name

    def progress(
        self, items_found: int, items_done: int, bytes_found: int, bytes_done: int
    ) -> None:
        """How far it is."""
        self._numbers = (items_found, items_done, bytes_found, bytes_done)

    def note(self, text: str) -> None:
        """Something worth a line, above the bar if there is one."""
        with self._lock:
            if self._bar is not None:
                self._bar[0].console.print(text, markup=False, highlight=False)
            elif self._output.json:
                self._output.event({"message_type": "note", "text": text})
            elif not self._output.quiet:
                self._output.warn(text)

    def differs(self, source: str, found: Verified) -> None:
        """What ``source`` calls unchanged is not: said whatever else is to be said."""
        from cloudfs.cli.verified import sentence

        text = f"cloudfs: {sentence(self._name, source, found)}"
        with self._lock:
            if self._bar is not None:
                self._bar[0].console.print(text, markup=False, highlight=False)
            else:
                self._output.warn(text)

    # -- shown by the thread -----------------------------------------------------------------

    def _show(self) -> None:
        if self._output.json:
            while not self._stop.wait(STATUS_EVERY_S):
                self._output.event(self.status())
        elif sys.stderr.isatty():
            if not self._stop.wait(QUIET_S):
                self._draw()
        else:
            while not self._stop.wait(LINE_EVERY_S):
                self._output.warn(f"{self._name}: {self._phase}, {self.summary()}")

    def status(self) -> dict[str, Any]:
        """The numbers under restic's names."""
        items_found, items_done, bytes_found, bytes_done = self._numbers
        status: dict[str, Any] = {
            "message_type": "status",
            "phase": self._phase,
            "seconds_elapsed": int(time.monotonic() - self._started),
            "percent_done": min(bytes_done / bytes_found, 1.0) if bytes_found else 0.0,
            "total_files": items_found,
            "files_done": items_done,
            "total_bytes": bytes_found,
            "bytes_done": bytes_done,
        }
        left = self._seconds_left()
        if left is not None:
            status["seconds_remaining"] = int(left)
        return status

    def summary(self) -> str:
        """The numbers in a few words."""
        items_found, items_done, bytes_found, bytes_done = self._numbers
        if not items_done:
            return f"{human.count(items_found)} items found"
        words = [
            f"{human.size(bytes_done)} of {human.size(bytes_found)}",
            f"{human.count(items_done)} items",
        ]
        seconds = time.monotonic() - self._phase_started
        rate = (bytes_done - self._phase_bytes) / seconds if seconds > 0 else 0
        if rate > 0:
            words.append(f"{human.size(int(rate))}/s")
        left = self._seconds_left()
        if left is not None:
            words.append(f"{human.clock(left)} left")
        return " · ".join(words)

    def _seconds_left(self) -> float | None:
        _, _, bytes_found, bytes_done = self._numbers
        done, seconds = bytes_done - self._phase_bytes, time.monotonic() - self._phase_started
        # While the tree is still being walked nobody knows how much there is.
        if self._phase == "scanning" or done <= 0 or seconds < 1 or bytes_done >= bytes_found:
            return None
        return (bytes_found - bytes_done) * seconds / done

    def _draw(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[words]}", markup=False),
            console=Console(stderr=True),
            transient=True,
            auto_refresh=False,
        )
        with bar:
            task = bar.add_task(self._name, total=None, words="")
            with self._lock:
                self._bar = bar, task
            while True:
                self._redraw(bar, task)
                if self._stop.wait(REDRAW_EVERY_S):
                    break
            with self._lock:
                self._bar = None

    def _redraw(self, bar: Bar, task: TaskID) -> None:
        _, _, bytes_found, bytes_done = self._numbers
        known = self._phase != "scanning" and bytes_found > 0
        percent = f"{min(100 * bytes_done // bytes_found, 100)} % " if known else ""
        bar.update(
            task,
            description=f"{self._name} · {self._phase}",
            total=bytes_found if known else None,
            completed=min(bytes_done, bytes_found),
            words=percent + self.summary(),
        )
        bar.refresh()
