"""What a store is: the small protocol that everything above depends on.

A store maps object names (see :mod:`cloudfs.store.naming`) to bytes. All methods block, may be
called from several threads at once, and raise only the closed set of
:class:`cloudfs.core.errors.StoreError` subclasses. Behaviour (retry, limits, counting, faults)
is added by wrapping one store in another, never by flags.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object of a listing: its full name and its length in bytes."""

    name: str
    size_bytes: int


class Store(Protocol):
    """An object store (or one prefix of it)."""

    @property
    def url(self) -> str:
        """What a user calls this store, for messages; never holds a secret."""

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return ``length`` bytes from ``offset`` (to the end when ``length`` is None).

        Returns exactly the bytes asked for, or fewer only where the object ends before.
        A negative ``offset`` counts from the end of the object. Raises NotFound.
        One request.
        """

    def put(self, name: str, chunks: Sequence[Buffer], *, if_absent: bool = False) -> None:
        """Store the concatenation of ``chunks`` under ``name``, whole or not at all.

        Durable when it returns (a local store has fsynced file and directory). Without
        ``if_absent`` an object of that name is replaced atomically; with it, AlreadyExists is
        raised and nothing written. Putting the same bytes again is harmless. One request.
        """

    def list(self, prefix: str, *, limit: int | None = None) -> Iterator[ObjectInfo]:
        """Yield the objects whose names begin with ``prefix``, sorted by name (byte order).

        Sees every object whose ``put`` returned before the call. ``limit`` bounds how many are
        yielded and so how many requests are made (one for each 1,000). Requests are made, and
        errors raised, while it is iterated over.
        """

    def delete(self, names: Iterable[str]) -> None:
        """Remove these objects; those already gone are no error. One request for each 1,000."""

    def close(self) -> None:
        """Free connections. The store must not be used afterwards."""
