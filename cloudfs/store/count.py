"""A store that counts what passes through it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

from cloudfs.store.base import Buffer, ObjectInfo, Store
from cloudfs.store.wrapper import StoreWrapper, size_of

PAGE = 1000
"""Objects to one request of a listing or a deletion."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Requests that were sent, by kind, and bytes of object data that arrived."""

    gets: int = 0
    puts: int = 0
    lists: int = 0
    deletes: int = 0
    bytes_up: int = 0
    bytes_down: int = 0

    @property
    def requests(self) -> int:
        """Requests of every kind."""
        return self.gets + self.puts + self.lists + self.deletes

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


class CountStore(StoreWrapper):
    """Counts each request, whether or not it succeeds, and the bytes of those that do."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self._counts = Counts()
        self._lock = threading.Lock()

    def counts(self) -> Counts:
        """What was counted until now."""
        return self._counts

    def _add(self, counts: Counts) -> None:
        with self._lock:
            self._counts += counts

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See :meth:`Store.get`."""
        self._add(Counts(gets=1))
        data = self.inner.get(name, offset, length)
        self._add(Counts(bytes_down=len(data)))
        return data

    def put(self, name: str, chunks: Sequence[Buffer], *, if_absent: bool = False) -> None:
        """See :meth:`Store.put`."""
        self._add(Counts(puts=1))
        self.inner.put(name, chunks, if_absent=if_absent)
        self._add(Counts(bytes_up=size_of(chunks)))

    def list(self, prefix: str, *, limit: int | None = None) -> Iterator[ObjectInfo]:
        """See :meth:`Store.list`."""
        self._add(Counts(lists=1))
        for index, info in enumerate(self.inner.list(prefix, limit=limit)):
            if index and index % PAGE == 0:
                self._add(Counts(lists=1))
            yield info

    def delete(self, names: Iterable[str]) -> None:
        """See :meth:`Store.delete`."""
        gone = list(names)
        self._add(Counts(deletes=-(-len(gone) // PAGE)))
        self.inner.delete(gone)
