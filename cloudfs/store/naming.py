"""Which names an object may have: one rule for all stores, so that any store can follow another.

Parts are divided by ``/``. No part is empty or begins with a dot (which rules out ``..``, and
leaves a local store free to keep things of its own), and all characters are printable ASCII
without those that some stores or shells treat specially. No name may lie below another
(``a`` and ``a/b``): a directory cannot hold both. Nor may, of two parts in one place, one that
is a directory begin the other with ``-``, ``.``, ``+`` or ``,`` after it (``a/b`` and ``a-b``):
these sort before the slash, and SeaweedFS sorts part by part where others sort whole names.
"""

from __future__ import annotations

import re

from cloudfs.core.errors import StoreError

_NAME = re.compile(r"[A-Za-z0-9_=+,@-][A-Za-z0-9_=+,@.-]*(/[A-Za-z0-9_=+,@-][A-Za-z0-9_=+,@.-]*)*")


def is_name(name: str) -> bool:
    """Can this name an object? What cannot, and yet lies in a store, is not ours: skip it."""
    return len(name) <= 900 and _NAME.fullmatch(name) is not None


def check_name(name: str) -> str:
    """Return ``name`` if it can name an object, else raise StoreError."""
    if not is_name(name):
        raise StoreError(f"{name!r} cannot be the name of an object in a store.")
    return name
