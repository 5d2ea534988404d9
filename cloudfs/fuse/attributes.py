"""Extended attributes: the file's own, and what cloudfs adds to look under the hood.

``user.cloudfs.lin``, ``user.cloudfs.snapshot`` and ``user.cloudfs.packs`` can be read but are not
listed, or every ``cp -a`` out of the view would carry them along.
"""

from __future__ import annotations

from enum import Enum

from cloudfs.core.rows import ItemType, Meta, locations
from cloudfs.format import names
from cloudfs.fuse.inodes import split
from cloudfs.fuse.tree import Tree

MAX_VALUE = 64 * 1024
"""No extended attribute can be longer than this, in bytes (XATTR_SIZE_MAX)."""


ACCESS_LIST = b"system.posix_acl_access"
CAPABILITY = b"security.capability"


class MadeUpAttribute(Enum):
    """What every item in a snapshot has beside its own attributes."""

    LIN = b"user.cloudfs.lin"
    SNAPSHOT = b"user.cloudfs.snapshot"
    PACKS = b"user.cloudfs.packs"

    @classmethod
    def by_name(cls, name: bytes) -> MadeUpAttribute | None:
        """The one of that name."""
        return _BY_NAME.get(name)


_BY_NAME = {attribute.value: attribute for attribute in MadeUpAttribute}


def attribute(tree: Tree, ino: int, meta: Meta, name: bytes) -> bytes | None:
    """The value of an attribute; None where there is none. May block."""
    slot, lin = split(ino)
    kind = MadeUpAttribute.by_name(name)
    if kind is MadeUpAttribute.LIN:
        return b"%d" % lin
    if kind is MadeUpAttribute.SNAPSHOT:
        return b"%d" % tree.view(slot).number
    if kind is MadeUpAttribute.PACKS:
        return _packs(tree, ino, meta) if meta.type == ItemType.REGULAR else None
    return tree.view(slot).xattrs(meta).get(name)


def own_attributes(tree: Tree, ino: int, meta: Meta) -> list[bytes]:
    """The names of the attributes that the item had when it was backed up. May block."""
    return list(tree.view(split(ino)[0]).xattrs(meta))


def _packs(tree: Tree, ino: int, meta: Meta) -> bytes:
    """The objects that hold a file's blocks, a line each; as many as fit."""
    rows = tree.view(split(ino)[0]).block_rows(meta.lin)
    packs = dict.fromkeys(
        location.pack
        for _, row in sorted(rows.items())
        for location in locations(row)
        if location is not None
    )
    policy_id = tree.policy_id(ino)
    lines = [names.pack(policy_id, pack).encode() + b"\n" for pack in packs]
    fitting = MAX_VALUE // max(map(len, lines), default=1)
    return b"".join(lines[:fitting])
