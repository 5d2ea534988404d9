"""From the commands of a send stream to a changelist.

The commands say how the older snapshot becomes the newer one, one inode after the other, under
names that hold at that moment: things are renamed to names that nobody ever saw and back again. So
the commands are carried out on a tree of nodes, of which only what they touch is made. A node that
was in the older snapshot knows its path there (its *origin*), wherever it is moved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from cloudfs.core.changelist import Changelist, DirChange, Range, merged
from cloudfs.core.errors import SourceError
from cloudfs.source.btrfs.stream import Command, Kind

_MAKING = frozenset(
    (Kind.MKFILE, Kind.MKDIR, Kind.MKNOD, Kind.MKFIFO, Kind.MKSOCK, Kind.SYMLINK, Kind.LINK)
)
_REMOVING = frozenset((Kind.UNLINK, Kind.RMDIR))
_WRITING = frozenset((Kind.UPDATE_EXTENT, Kind.CLONE, Kind.FALLOCATE))
_ALL: Range = (0, 1 << 63)
_WHOLE = [_ALL]
"""The ranges of what is new. Never changed: what is written to it is within them."""
_ABOUT_ALL = frozenset((Kind.SUBVOL, Kind.SNAPSHOT))


class _Node:
    """An item under one of its names. Of very many, most have no children and lose no names."""

    __slots__ = ("children", "gone", "name", "origin", "parent", "ranges", "touched")

    def __init__(self, name: bytes, parent: _Node | None, origin: bytes | None) -> None:
        self.name = name
        self.parent = parent
        self.origin = origin  # None: it was not in the older snapshot
        self.children: dict[bytes, _Node] | None = None
        self.gone: set[bytes] | None = None  # names that no longer are what they were
        self.touched = False
        self.ranges: list[Range] | None = None

    def child(self, name: bytes) -> _Node | None:
        """The child of a name, if it was made."""
        return self.children.get(name) if self.children is not None else None

    def put(self, child: _Node) -> None:
        """Let a child have its name in this one."""
        if self.children is None:
            self.children = {}
        self.children[child.name] = child

    def lose(self, name: bytes) -> None:
        """Let a child be taken away."""
        assert self.children is not None
        del self.children[name]
        if self.gone is None:
            self.gone = set()
        self.gone.add(name)


class Replay:
    """Carries out commands; :meth:`changelist` says what they did."""

    def __init__(self) -> None:
        self._root = _Node(b"", None, b"")

    def run(
        self,
        commands: Iterable[Command],
        before: Iterable[bytes] = (),
        now: Iterable[bytes] = (),
    ) -> Changelist:
        """Carry out all commands. Raises SourceError for such as cannot be.

        ``before`` and ``now`` are the paths in either snapshot at which other subvolumes are, of
        which no command tells: neither that they came, went or moved, nor their attributes.
        """
        for path in before:
            self.touch(path)
        for command in commands:
            self.do(command)
        for path in now:
            self.touch(path)
        return self.changelist()

    def touch(self, path: bytes) -> None:
        """Let what is at a path at this moment be looked at, whatever the commands say; in a
        directory that is new, it is looked at anyway."""
        with contextlib.suppress(SourceError):
            self._find(path).touched = True

    def do(self, command: Command) -> None:
        """Carry out one command."""
        kind = command.kind
        if kind in _ABOUT_ALL:
            return
        if kind in _MAKING:
            made = self._place(command.path, _Node(b"", None, None))
            made.ranges = _WHOLE  # what it has no extents for is not what was there before
            if kind == Kind.LINK:
                linked = self._find(command.other)
                linked.touched = True
                if linked.ranges is None:
                    linked.ranges = []
                made.ranges = linked.ranges  # one file under two names
        elif kind == Kind.RENAME:
            self._place(command.other, self._take(command.path))
        elif kind in _REMOVING:
            self._take(command.path)
        else:
            node = self._find(command.path)
            node.touched = True
            if kind in _WRITING and node.ranges is not _WHOLE:
                if node.ranges is None:
                    node.ranges = []
                node.ranges.append((command.offset, command.offset + command.size))

    def _find(self, path: bytes) -> _Node:
        """The node at a path of this moment; made where the older snapshot must have it."""
        node = self._root
        for name in path.split(b"/") if path else ():
            child = node.child(name)
            if child is None:
                if node.origin is None or (node.gone is not None and name in node.gone):
                    raise SourceError(f"btrfs told of {path!r}, which cannot be there.")
                child = _Node(name, node, _join(node.origin, name))
                node.put(child)
            node = child
        return node

    def _take(self, path: bytes) -> _Node:
        """Take a node out of its place."""
        node = self._find(path)
        if node.parent is None:
            raise SourceError("btrfs told of a change of the subvolume's own name.")
        node.parent.lose(node.name)
        return node

    def _place(self, path: bytes, node: _Node) -> _Node:
        directory, _, name = path.rpartition(b"/")
        parent = self._find(directory)
        if not name:
            raise SourceError("btrfs told of an item without a name.")
        node.name, node.parent, node.touched = name, parent, True
        parent.put(node)
        return node

    # -- the end -------------------------------------------------------------------------------

    def changelist(self) -> Changelist:
        """What all commands together did."""
        found: list[DirChange] = []
        waiting = [(b"", self._root)]
        while waiting:
            path, node = waiting.pop()
            children = node.children or {}
            touched = [child for child in children.values() if child.touched]
            gone = node.gone or set()
            if node.origin is not None and (touched or gone):
                names = gone.union(child.name for child in touched)
                ranges = {child.name: merged(child.ranges) for child in touched if child.ranges}
                found.append(DirChange(path, node.origin, names, ranges))
            waiting.extend((_join(path, name), child) for name, child in children.items())
        return Changelist(sorted(found, key=lambda change: change.path))


def _join(path: bytes, name: bytes) -> bytes:
    return path + b"/" + name if path else name
