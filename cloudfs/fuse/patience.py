"""Telling what is at hand from what must be waited for.

The view answers everything that is in memory or in the local cache at once, on the thread that
serves the kernel; a hop to another thread and back costs more than most answers. That thread must
never wait for the store, or every reader of the mount would wait with it. So the store that it
works on refuses: :class:`PatientStore` raises :class:`WouldBlock` there, and whoever catches it
asks again on another thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from cloudfs.store.base import ObjectInfo
from cloudfs.store.count import Counts
from cloudfs.store.open import OpenedStore
from cloudfs.store.wrapper import StoreWrapper


class WouldBlock(Exception):
    """This needs the store; ask again on a thread that may wait. Never leaves the view."""


class PatientStore(OpenedStore):
    """A store that one thread may not use. Until one is named, all may."""

    impatient_thread: int | None = None

    def __init__(self, opened: OpenedStore) -> None:
        StoreWrapper.__init__(self, opened)
        self._opened = opened

    def counts(self) -> Counts:
        """See :meth:`OpenedStore.counts`."""
        return self._opened.counts()

    def refuse_here(self) -> None:
        """From now on the calling thread gets WouldBlock instead of an answer."""
        self.impatient_thread = threading.get_ident()

    def _check(self) -> None:
        if threading.get_ident() == self.impatient_thread:
            raise WouldBlock

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See :meth:`Store.get`."""
        self._check()
        return self.inner.get(name, offset, length)

    def list(self, prefix: str, *, limit: int | None = None) -> Iterator[ObjectInfo]:
        """See :meth:`Store.list`."""
        self._check()
        return self.inner.list(prefix, limit=limit)
