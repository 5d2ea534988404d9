"""A store that keeps to a bandwidth.

Objects go in one request each and a request is not slowed down once it runs, so what is limited
is the average: each request waits until the ones before it have been paid for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from cloudfs.store.base import Buffer, Store
from cloudfs.store.wrapper import StoreWrapper, size_of

Clock = Callable[[], float]
Sleep = Callable[[float], None]


class Throttle:
    """Lets ``bytes_per_s`` pass on average; None lets everything pass. Thread safe."""

    def __init__(self, bytes_per_s: float | None, clock: Clock, sleep: Sleep) -> None:
        self._rate = bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._paid_at = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Sleep until all that passed is paid for."""
        if self._rate is not None:
            with self._lock:
                delay = self._paid_at - self._clock()
            if delay > 0:
                self._sleep(delay)

    def passed(self, size_bytes: int) -> None:
        """Charge for bytes that pass now."""
        if self._rate is not None:
            with self._lock:
                start = max(self._paid_at, self._clock())
                self._paid_at = start + size_bytes / self._rate


class LimitStore(StoreWrapper):
    """Limits uploaded and downloaded bytes a second, each on its own."""

    def __init__(
        self,
        inner: Store,
        *,
        upload_bytes_s: float | None,
        download_bytes_s: float | None,
        clock: Clock = time.monotonic,
        sleep: Sleep = time.sleep,
    ) -> None:
        super().__init__(inner)
        self._up = Throttle(upload_bytes_s, clock, sleep)
        self._down = Throttle(download_bytes_s, clock, sleep)

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See :meth:`Store.get`. Pays when the bytes are here: only then is their number known."""
        self._down.wait()
        data = self.inner.get(name, offset, length)
        self._down.passed(len(data))
        return data

    def put(self, name: str, chunks: Sequence[Buffer], *, if_absent: bool = False) -> None:
        """See :meth:`Store.put`."""
        self._up.wait()
        self._up.passed(size_of(chunks))
        self.inner.put(name, chunks, if_absent=if_absent)
