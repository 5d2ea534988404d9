"""Finding out, before it is trusted, whether a store does what stores must do."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from cloudfs.core.errors import AlreadyExists, NotFound, StoreError
from cloudfs.store.base import Store

SIZE = 4096


@dataclass(frozen=True, slots=True)
class Probe:
    """What was found. ``conditional``: a conditional write of a name that is taken is refused."""

    conditional: bool


def probe(
    store: Store,
    name: str,
    *,
    single_writer: bool = False,
    entropy: Callable[[int], bytes] = os.urandom,
) -> Probe:
    """Try the store out on the object ``name``, which must be new and is removed again.

    Raises StoreError when it returns other bytes than it was given, or does not honour
    conditional writes; the latter is only reported where ``single_writer`` is vouched for.
    Six requests.
    """
    first, second = entropy(SIZE), entropy(SIZE)
    store.put(name, [first], if_absent=True)
    try:
        # Two tokens tell a refusal from a late answer to the first write.
        try:
            store.put(name, [second], if_absent=True)
            conditional = False
        except AlreadyExists:
            conditional = True
        _check_reads(store, name, first if conditional else second)
    finally:
        store.delete([name])
    if not conditional and not single_writer:
        raise StoreError(
            "this store ignores conditional writes, so two writers could overwrite each other."
            " Use another store, or --single-writer if nothing else will ever write here."
        )
    return Probe(conditional)


def _check_reads(store: Store, name: str, expected: bytes) -> None:
    """Read all, a part and the end; raise StoreError when anything is not what was written."""
    try:
        whole = store.get(name)
        part = store.get(name, 1000, 50)
        end = store.get(name, -100)
    except NotFound:
        raise StoreError(
            f"{store.url} does not find an object that it has just stored. Use another store."
        ) from None
    if whole != expected or part != expected[1000:1050] or end != expected[-100:]:
        raise StoreError(
            f"{store.url} returns other bytes than were stored. Use another store, or look for a"
            " proxy or a setting that changes what passes."
        )
