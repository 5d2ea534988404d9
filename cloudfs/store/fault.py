"""A store that goes wrong where it is told to: for tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cloudfs.core.errors import StoreError
from cloudfs.store.base import Buffer, ObjectInfo, Store
from cloudfs.store.wrapper import StoreWrapper

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong with one request.

    It begins ``delay_s`` late. ``error`` is raised instead of doing it or, with ``after``, when
    it has been done. ``truncate`` keeps only so many first bytes of what is got or put, or so
    many first objects of a listing.
    """

    error: StoreError | None = None
    after: bool = False
    truncate: int | None = None
    delay_s: float = 0.0


Decide = Callable[[int, str, str], Fault | None]
"""Given a request's number (from 0), its kind (get, put, list, delete) and its name."""


class FaultStore(StoreWrapper):
    """Asks ``decide`` about every request. Thread safe if ``decide`` is."""

    def __init__(
        self, inner: Store, decide: Decide, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        super().__init__(inner)
        self._decide = decide
        self._sleep = sleep
        self._next = 0
        self._lock = threading.Lock()

    def _run(self, kind: str, name: str, action: Callable[[int | None], T]) -> T:
        """Run ``action``, which is told how much to keep, under the fault decided on."""
        with self._lock:
            index = self._next
            self._next += 1
        fault = self._decide(index, kind, name) or Fault()
        if fault.delay_s:
            self._sleep(fault.delay_s)
        if fault.error is not None and not fault.after:
            raise fault.error
        result = action(fault.truncate)
        if fault.error is not None:
            raise fault.error
        return result

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See :meth:`Store.get`."""
        return self._run("get", name, lambda keep: self.inner.get(name, offset, length)[:keep])

    def put(self, name: str, chunks: Sequence[Buffer], *, if_absent: bool = False) -> None:
        """See :meth:`Store.put`."""

        def action(keep: int | None) -> None:
            cut = chunks if keep is None else [b"".join(chunks)[:keep]]
            self.inner.put(name, cut, if_absent=if_absent)

        self._run("put", name, action)

    def list(self, prefix: str, *, limit: int | None = None) -> Iterator[ObjectInfo]:
        """See :meth:`Store.list`. One request, made when the first object is asked for."""
        found = self._run(
            "list", prefix, lambda keep: [*self.inner.list(prefix, limit=limit)][:keep]
        )
        yield from found

    def delete(self, names: Iterable[str]) -> None:
        """See :meth:`Store.delete`. A fault's ``truncate`` says how many to delete."""
        gone = list(names)
        self._run("delete", gone[0] if gone else "", lambda keep: self.inner.delete(gone[:keep]))
