"""Whether somebody could have walked to a directory in a snapshot.

A live mount leads into the middle of a snapshot, past the directories above, by which the kernel
would judge. So it is judged here as it does: by owner, group, mode and ACL (acl(5)).
"""

from __future__ import annotations

import struct
from collections.abc import Collection

import pyfuse3
from pyfuse3 import RequestContext

from cloudfs.core.rows import ROOT_LIN, Meta
from cloudfs.fuse.attributes import ACCESS_LIST
from cloudfs.repo.view import SnapshotView

_HEADER, _ENTRY = 4, struct.Struct("<HHI")
_USER, _GROUP_OBJECT, _GROUP, _MASK = 0x02, 0x04, 0x08, 0x10
_SEARCH = 0o1


def groups_of(ctx: RequestContext) -> frozenset[int]:
    """All groups of who asks."""
    try:
        return frozenset((ctx.gid, *pyfuse3.get_sup_groups(ctx.pid)))
    except (OSError, RuntimeError):
        return frozenset((ctx.gid,))  # it is gone already


def may_reach(view: SnapshotView, lin: int, uid: int, groups: Collection[int]) -> bool:
    """Whether a user may search all directories above one in a snapshot. May block."""
    while uid and lin != ROOT_LIN:
        meta = view.meta(lin)
        above = view.meta(meta.parent) if meta is not None else None
        if meta is None or above is None:
            return False
        if not may_search(above, view.xattrs(above).get(ACCESS_LIST), uid, groups):
            return False
        lin = meta.parent
    return True


def may_search(directory: Meta, listed: bytes | None, uid: int, groups: Collection[int]) -> bool:
    """Whether a user, who is not root, may search a directory; ``listed`` is its ACL."""
    mode = directory.mode
    if uid == directory.uid:
        return bool(mode >> 6 & _SEARCH)
    if listed is not None:
        return _is_listed(directory, listed, uid, groups)
    return bool(mode >> (3 if directory.gid in groups else 0) & _SEARCH)


def _is_listed(directory: Meta, listed: bytes, uid: int, groups: Collection[int]) -> bool:
    whole = (len(listed) - _HEADER) // _ENTRY.size * _ENTRY.size
    entries = list(_ENTRY.iter_unpack(listed[_HEADER:][: max(0, whole)]))
    mask = next((allowed for tag, allowed, _ in entries if tag == _MASK), _SEARCH)
    for tag, allowed, who in entries:
        if tag == _USER and who == uid:
            return bool(allowed & mask & _SEARCH)
    of_groups = [
        allowed & mask & _SEARCH
        for tag, allowed, who in entries
        if (tag == _GROUP and who in groups) or (tag == _GROUP_OBJECT and directory.gid in groups)
    ]
    return any(of_groups) if of_groups else bool(directory.mode & _SEARCH)
