"""A store that tries again.

1. Only Unavailable is tried again; every other error is an answer.
2. Between two tries it waits a random part of a time that doubles, so that many clients of one
   store do not come back all at once. When the next wait would pass the time limit, it gives up.
3. A conditional ``put`` that failed may yet have arrived. If a later try finds the name taken, the
   object is read back: the very bytes that were sent mean that an earlier try won.
4. A listing goes on after the last name that was handed out; each object that arrives renews the
   time limit.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from cloudfs.core.errors import AlreadyExists, NotFound, Unavailable
from cloudfs.store.base import Buffer, ObjectInfo, Store
from cloudfs.store.wrapper import StoreWrapper, size_of

FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 15.0

T = TypeVar("T")


class RetryStore(StoreWrapper):
    """Tries again for up to ``limit_s`` seconds. ``chance`` returns numbers from 0 up to 1."""

    def __init__(
        self,
        inner: Store,
        *,
        limit_s: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        chance: Callable[[], float] = random.random,
    ) -> None:
        super().__init__(inner)
        self._limit_s = limit_s
        self._clock = clock
        self._sleep = sleep
        self._chance = chance

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See :meth:`Store.get`."""
        return self._repeat(lambda _: self.inner.get(name, offset, length))

    def put(self, name: str, chunks: Sequence[Buffer], *, if_absent: bool = False) -> None:
        """See :meth:`Store.put`."""

        def attempt(number: int) -> None:
            try:
                self.inner.put(name, chunks, if_absent=if_absent)
            except AlreadyExists:
                if number == 0 or not self._holds(name, chunks):
                    raise

        self._repeat(attempt)

    def _holds(self, name: str, chunks: Sequence[Buffer]) -> bool:
        """Is what lies under ``name`` what we sent (rule 3)?"""
        try:
            there = memoryview(self.inner.get(name))
        except NotFound:
            return False  # another's, and removed since
        if len(there) != size_of(chunks):
            return False
        at = 0
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            if there[at : at + len(view)] != view:
                return False
            at += len(view)
        return True

    def list(self, prefix: str, *, limit: int | None = None) -> Iterator[ObjectInfo]:
        """See :meth:`Store.list`."""
        last = ""
        left = limit
        tries = Tries(self)
        while True:
            try:
                # After a failure the names up to `last` come again, and they count.
                for info in self.inner.list(prefix, limit=limit if not last else None):
                    if info.name <= last:
                        continue
                    yield info
                    last = info.name
                    tries = Tries(self)
                    if left is not None:
                        left -= 1
                        if left == 0:
                            return
                return
            except Unavailable as error:
                tries.wait_after(error)

    def delete(self, names: Iterable[str]) -> None:
        """See :meth:`Store.delete`."""
        gone = list(names)
        self._repeat(lambda _: self.inner.delete(gone))

    def _repeat(self, attempt: Callable[[int], T]) -> T:
        tries = Tries(self)
        while True:
            try:
                return attempt(tries.failed)
            except Unavailable as error:
                tries.wait_after(error)


class Tries:
    """The tries at one request: how many failed, since when, and how long to wait."""

    def __init__(self, policy: RetryStore) -> None:
        self._policy = policy
        self._began = policy._clock()
        self.failed = 0

    def wait_after(self, error: Unavailable) -> None:
        """Sleep before the next try, or raise when there is to be none."""
        policy = self._policy
        longest = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**self.failed)
        self.failed += 1
        wait = longest * (0.5 + policy._chance() / 2)
        spent = policy._clock() - self._began
        if spent + wait > policy._limit_s:
            text = str(error).rstrip(".")
            raise Unavailable(f"{text}, tried for {_duration(spent)}. Try again later.") from error
        policy._sleep(wait)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
