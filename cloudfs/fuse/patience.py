"""Telling what is at hand from what must be waited for.

The view answers everything that is in memory or in the local cache at once, on the thread that
serves the kernel; a hop to another thread and back costs more than most answers. That thread must
never wait for the store, or every reader of the mount would wait with it. So the store that it
works on refuses: :class:`PatientStore` raises :class:`WouldBlock` there, and whoever catches it
asks again on another thread.

Of a store that did not answer nobody asks again for a while, but gets the same error at once: the
kernel lets few reads wait at a time, and all others, of whatever is on the mount, wait for these.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from cloudfs.core.errors import Unavailable
from cloudfs.store.base import ObjectInfo
from cloudfs.store.count import Counts
from cloudfs.store.open import OpenedStore
from cloudfs.store.wrapper import StoreWrapper

T = TypeVar("T")

PAUSE_S = 5.0
"""How long nobody asks again."""


class WouldBlock(Exception):
    """This needs the store; ask again on a thread that may wait. Never leaves the view."""


class PatientStore(OpenedStore):
    """A store that one thread may not use. Until one is named, all may."""

    impatient_thread: int | None = None

    def __init__(self, opened: OpenedStore, clock_s: Callable[[], float] = time.monotonic) -> None:
        StoreWrapper.__init__(self, opened)
        self._opened = opened
        self._clock_s = clock_s
        self._down: Unavailable | None = None
        self._down_until_s = 0.0

    def counts(self) -> Counts:
        """See :meth:`OpenedStore.counts`."""
        return self._opened.counts()

    def refuse_here(self) -> None:
        """From now on the calling thread gets WouldBlock instead of an answer."""
        self.impatient_thread = threading.get_ident()

    def _check(self) -> None:
        if threading.get_ident() == self.impatient_thread:
            raise WouldBlock

    def _asked(self, question: Callable[[], T]) -> T:
        self._check()
        if self._down is not None and self._clock_s() < self._down_until_s:
            raise Unavailable(str(self._down))
        try:
            answer = question()
        except Unavailable as error:
            self._down, self._down_until_s = error, self._clock_s() + PAUSE_S
            raise
        self._down = None
        return answer

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See :meth:`Store.get`."""
        return self._asked(lambda: self.inner.get(name, offset, length))

    def list(self, prefix: str, *, limit: int | None = None) -> Iterator[ObjectInfo]:
        """See :meth:`Store.list`."""
        return self._asked(lambda: self.inner.list(prefix, limit=limit))
