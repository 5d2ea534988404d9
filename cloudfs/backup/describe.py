"""From what the kernel says of an inode to its metadata row.

Extended attributes too large for a row become items of their own (type 2), named by entries below
the file's LIN, with their value in blocks like a file's data.
"""

from __future__ import annotations

import grp
import pwd
import stat as st

import msgspec
import xxhash

from cloudfs.backup.packs import Packer, new_base
from cloudfs.core.changes import item_type
from cloudfs.core.rows import STREAM_PREFIX, Entry, ItemType, Meta
from cloudfs.repo.view import SnapshotView
from cloudfs.source.inode import Status

INLINE_XATTR = 4096
SPARE_LINS = 64
"""LINs that each assignment gets for extended attributes too large for a row."""


class Describer:
    """Adds metadata rows to a packer. For one thread."""

    def __init__(
        self,
        packer: Packer,
        snapshot: int,
        block_size: int,
        digest_seed: int,
        view: SnapshotView | None,
        spare_lins: int,
        first_new_lin: int,
    ) -> None:
        """``view`` is the last snapshot; LINs from ``first_new_lin`` on are not in it."""
        self._packer = packer
        self._snapshot = snapshot
        self._block_size = block_size
        self._seed = digest_seed
        self._view = view
        self._first_new_lin = first_new_lin
        self._spare = list(range(spare_lins + SPARE_LINS - 1, spare_lins - 1, -1))
        self._users: dict[int, str] = {}
        self._groups: dict[int, str] = {}

    def describe(
        self,
        lin: int,
        parent: int,
        status: Status,
        xattrs: dict[bytes, bytes] | None,
        flags: int,
        *,
        target: bytes = b"",
        echo: bool = False,
    ) -> None:
        regular = st.S_ISREG(status.mode)
        old = None
        if self._view is not None and lin < self._first_new_lin and not echo:
            old = self._view.meta(lin)
        streams = False
        if xattrs or (old is not None and old.streams):
            xattrs = dict(xattrs or {})
            streams = self._split_streams(lin, xattrs, old)
        meta = Meta(
            lin,
            self._snapshot,
            item_type(status.mode),
            status.mode & 0o7777,
            status.uid,
            status.gid,
            self._user(status.uid),
            self._group(status.gid),
            status.size,
            status.mtime_ns,
            status.ctime_ns,
            status.btime_ns,
            parent,
            status.nlink,
            flags,
            status.dev,
            status.ino,
            status.rdev,
            self._block_size if regular else 0,
            regular and status.allocated < status.size,
            target,
            xattrs or None,
            streams,
        )
        if echo:
            self._packer.rows.echoes.append(meta)
            return
        if old is None or not _alike(old, meta):
            self._packer.rows.metas.append(meta)

    def keep(self, lin: int, parent: int) -> bool:
        """Let an item be as it was at the last snapshot, in a directory; False where it was not."""
        old = None
        if self._view is not None and lin < self._first_new_lin:
            old = self._view.meta(lin)
        if old is None:
            return False
        self._packer.rows.metas.append(
            msgspec.structs.replace(old, snap=self._snapshot, parent=parent)
        )
        return True

    def _user(self, uid: int) -> str:
        name = self._users.get(uid)
        if name is None:
            try:
                name = pwd.getpwuid(uid).pw_name
            except KeyError:
                name = ""
            self._users[uid] = name
        return name

    def _group(self, gid: int) -> str:
        name = self._groups.get(gid)
        if name is None:
            try:
                name = grp.getgrgid(gid).gr_name
            except KeyError:
                name = ""
            self._groups[gid] = name
        return name

    def _split_streams(self, lin: int, xattrs: dict[bytes, bytes], old: Meta | None) -> bool:
        """Move extended attributes too large for a row into items of their own."""
        large = {name: value for name, value in xattrs.items() if len(value) > INLINE_XATTR}
        before: dict[bytes, Entry] = {}
        values: dict[bytes, bytes] = {}
        if old is not None and old.streams and self._view is not None:
            before = {entry.name: entry for entry in self._view.streams(lin)}
            values = self._view.xattrs(old)
        kept = False
        for xattr, value in large.items():
            if not self._spare:
                continue  # more than any real file has: these stay in the row
            del xattrs[xattr]
            kept = True
            name = STREAM_PREFIX + xattr
            replaced = before.pop(name, None)
            if replaced is not None and values[xattr] == value:
                continue
            self._stream(lin, name, value)
            if replaced is not None:
                self._bury(replaced)
        for name, entry in before.items():
            self._bury(entry)
            self._packer.rows.entries.append(Entry(lin, name, self._snapshot, 0, 0))
        return kept

    def _bury(self, entry: Entry) -> None:
        self._packer.rows.metas.append(Meta(entry.lin, self._snapshot, ItemType.DELETED_FILE))

    def _stream(self, parent: int, name: bytes, value: bytes) -> None:
        lin, size = self._spare.pop(), self._block_size
        rows = self._packer.rows
        rows.metas.append(
            Meta(
                lin,
                self._snapshot,
                ItemType.STREAM,
                size=len(value),
                parent=parent,
                block_size=size,
            )
        )
        rows.entries.append(Entry(parent, name, self._snapshot, lin, ItemType.STREAM))
        base = new_base(lin, 0, -(-len(value) // size))
        for index in range(len(base.records)):
            block = value[index * size : (index + 1) * size]
            digest = xxhash.xxh3_128_digest(block, self._seed)
            self._packer.append(base, index, block, digest)
        # Only now: a pack that is closed meanwhile must not hold a row whose blocks have no place.
        self._packer.rows.bases.append(base)


def _alike(old: Meta, new: Meta) -> bool:
    """Whether two rows say the same, but for when they were made and where the device was."""
    return msgspec.structs.replace(new, snap=old.snap, dev=old.dev) == old
