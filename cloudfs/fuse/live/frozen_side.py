"""What is frozen, as the kernel sees it: the side of a mount below the name that leads there."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass

import pyfuse3
from pyfuse3 import EntryAttributes, FUSEError, ReaddirToken, RequestContext

from cloudfs.fuse.live.answers import attributes_lasting, fill
from cloudfs.fuse.live.frozen import NUMBER_BITS, FrozenTree
from cloudfs.fuse.live.inodes import Inode, Inodes
from cloudfs.fuse.live.sides import Opened
from cloudfs.source.live.protocol import FROZEN_PREFIX

FOREVER_S = 86400.0


class FrozenSide:
    """Answers from the freeze that is on, if one is."""

    def __init__(self, inodes: Inodes) -> None:
        self._inodes = inodes
        self._lasting = attributes_lasting(FOREVER_S)
        self._once = attributes_lasting(0)
        self.tree: FrozenTree | None = None

    def enter(self, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """The top of what is frozen, for whom the mount belongs to. Its name is asked for anew each
        time, so that who looks at it after the freeze makes the kernel forget all of it."""
        tree = self.tree
        wanted = name.removeprefix(FROZEN_PREFIX)
        if tree is None or wanted != b"%d" % tree.freeze.number or ctx.uid != os.geteuid():
            raise FUSEError(errno.ENOENT)
        root = self._inodes.root
        tree.count(root)
        return self._filled(self._once, tree, root)

    def counted(self, tree: FrozenTree, inode: Inode) -> EntryAttributes:
        """The attributes of an item, of which the kernel is told."""
        tree.count(inode)
        found = self.attributes(tree, inode)
        self._inodes.trim()
        return found

    def attributes(self, tree: FrozenTree, inode: Inode) -> EntryAttributes:
        """The attributes of an item."""
        return self._filled(self._lasting, tree, inode)

    def _filled(self, a: EntryAttributes, tree: FrozenTree, inode: Inode) -> EntryAttributes:
        a.generation = tree.freeze.number
        return fill(a, tree.number(inode), tree.freeze.status(inode))

    def _tree_of(self, number: int) -> FrozenTree:
        """The tree that a number belongs to. Raises KeyError where it is gone."""
        tree = self.tree
        if tree is None or number >> NUMBER_BITS != tree.base >> NUMBER_BITS:
            raise KeyError(number)
        return tree

    # -- see Side ------------------------------------------------------------------------------

    async def lookup(self, parent: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        tree = self._tree_of(parent)
        inode = tree.look_up(tree.get(parent), name)
        if inode is None:
            raise FUSEError(errno.ENOENT)
        return self.counted(tree, inode)

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        tree = self._tree_of(inode)
        return self.attributes(tree, tree.get(inode))

    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return os.readlink(b"", dir_fd=self._tree_of(inode).get(inode).fd)

    async def opendir(self, inode: int, ctx: RequestContext) -> FrozenNames:
        tree = self._tree_of(inode)
        item = tree.get(inode)
        return FrozenNames(self, tree, item, tree.names(item))

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FrozenFile:
        tree = self._tree_of(inode)
        item = tree.get(inode)
        return FrozenFile(tree, item, os.open(item.proc, os.O_RDONLY | os.O_CLOEXEC))

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        tree = self._tree_of(inode)
        found = tree.xattr(tree.get(inode), name)
        if found is None:
            raise FUSEError(pyfuse3.ENOATTR)
        return found

    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        tree = self._tree_of(inode)
        return list(tree.xattrs(tree.get(inode)))

    def forget(self, inode: int, count: int) -> None:
        tree = self.tree
        if tree is not None and inode >> NUMBER_BITS == tree.base >> NUMBER_BITS:
            tree.forget(inode, count)


@dataclass(slots=True)
class FrozenFile(Opened):
    """An open file. See :class:`Opened`."""

    tree: FrozenTree
    inode: Inode
    fd: int

    async def read(self, offset: int, size: int) -> bytes:
        if self.tree.freeze.ended.is_set():
            raise FUSEError(errno.ESTALE)
        return self.tree.freeze.read(self.inode, self.fd, offset, size)

    async def close(self) -> None:
        os.close(self.fd)


@dataclass(slots=True)
class FrozenNames(Opened):
    """An open directory. See :class:`Opened`."""

    side: FrozenSide
    tree: FrozenTree
    inode: Inode
    names: list[bytes]

    async def list(self, start: int, token: ReaddirToken) -> None:
        if self.tree.freeze.ended.is_set():
            raise FUSEError(errno.ESTALE)
        for position in range(start, len(self.names)):
            name = self.names[position]
            inode = self.tree.look_up(self.inode, name)
            if inode is None:
                continue
            attributes = self.side.attributes(self.tree, inode)
            if not pyfuse3.readdir_reply(token, name, attributes, position + 1):
                return
            self.side.counted(self.tree, inode)
