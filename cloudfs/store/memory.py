"""A store in a dictionary: for tests, and the plainest statement of what a store does."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from cloudfs.core.errors import AlreadyExists, NotFound
from cloudfs.store.base import Buffer, ObjectInfo
from cloudfs.store.naming import check_name


class MemoryStore:
    """Objects live as long as this value does; nothing is durable. Thread safe."""

    def __init__(self, url: str = "memory:") -> None:
        self._url = url
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """The name given to this store."""
        return self._url

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See :meth:`Store.get`."""
        try:
            data = self._objects[check_name(name)]
        except KeyError:
            raise NotFound(f"{name} is not in {self._url}.") from None
        start = max(0, len(data) + offset) if offset < 0 else offset
        return data[start:] if length is None else data[start : start + length]

    def put(self, name: str, chunks: Sequence[Buffer], *, if_absent: bool = False) -> None:
        """See :meth:`Store.put`."""
        data = b"".join(chunks)
        with self._lock:
            if if_absent and name in self._objects:
                raise AlreadyExists(f"{name} is already in {self._url}.")
            self._objects[check_name(name)] = data

    def list(self, prefix: str, *, limit: int | None = None) -> Iterator[ObjectInfo]:
        """See :meth:`Store.list`."""
        with self._lock:
            found = {name: len(data) for name, data in self._objects.items()}
        names = sorted(name for name in found if name.startswith(prefix))
        return (ObjectInfo(name, found[name]) for name in islice(names, limit))

    def delete(self, names: Iterable[str]) -> None:
        """See :meth:`Store.delete`."""
        with self._lock:
            for name in names:
                self._objects.pop(check_name(name), None)

    def close(self) -> None:
        """Nothing is held."""
