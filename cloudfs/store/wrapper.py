"""A store around another store that changes nothing: what the wrappers build on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from cloudfs.store.base import Buffer, ObjectInfo, Store


class StoreWrapper:
    """Hands everything on to ``inner``. Subclasses override what they change."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner

    @property
    def url(self) -> str:
        """The url of the store inside."""
        return self.inner.url

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See :meth:`Store.get`."""
        return self.inner.get(name, offset, length)

    def put(self, name: str, chunks: Sequence[Buffer], *, if_absent: bool = False) -> None:
        """See :meth:`Store.put`."""
        self.inner.put(name, chunks, if_absent=if_absent)

    def list(self, prefix: str, *, limit: int | None = None) -> Iterator[ObjectInfo]:
        """See :meth:`Store.list`."""
        return self.inner.list(prefix, limit=limit)

    def delete(self, names: Iterable[str]) -> None:
        """See :meth:`Store.delete`."""
        self.inner.delete(names)

    def close(self) -> None:
        """See :meth:`Store.close`."""
        self.inner.close()


def size_of(chunks: Sequence[Buffer]) -> int:
    """The bytes in all of ``chunks``."""
    return sum(memoryview(chunk).nbytes for chunk in chunks)
