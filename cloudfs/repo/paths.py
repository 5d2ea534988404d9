"""Paths of LINs: they are derived from directory entries, never stored."""

from __future__ import annotations

from collections import OrderedDict

from cloudfs.core.rows import ROOT_LIN, Meta
from cloudfs.repo.view import SnapshotView

_DIRECTORIES_KEPT = 4096
_MAX_DEPTH = 100_000


class PathFinder:
    """Finds paths in one snapshot; cheap for LINs in order, whose directories come together."""

    def __init__(self, view: SnapshotView) -> None:
        self._view = view
        self._paths: OrderedDict[int, bytes | None] = OrderedDict()
        self._names: OrderedDict[int, dict[int, bytes]] = OrderedDict()

    def path(self, meta: Meta) -> bytes | None:
        """The path of an item by its (first) name; None where nothing names it any more."""
        if meta.lin == ROOT_LIN:
            return b"/"
        directory = self.directory(meta.parent)
        name = self._names_in(meta.parent).get(meta.lin)
        if directory is None or name is None:
            return None
        return (b"" if directory == b"/" else directory) + b"/" + name

    def directory(self, lin: int) -> bytes | None:
        """The path of a directory; None where nothing names it any more."""
        if lin in self._paths:
            self._paths.move_to_end(lin)
            return self._paths[lin]
        chain: list[tuple[int, bytes]] = []
        at: int = lin
        path: bytes | None = None
        while len(chain) < _MAX_DEPTH:
            if at == ROOT_LIN:
                path = b""
                break
            meta = self._view.meta(at)
            name = self._names_in(meta.parent).get(at) if meta is not None else None
            if meta is None or name is None:
                break
            chain.append((at, name))
            at = meta.parent
        if path is not None:
            for _, name in reversed(chain):
                path += b"/" + name
        found = path if path is None else path or b"/"
        self._paths[lin] = found
        if len(self._paths) > _DIRECTORIES_KEPT:
            self._paths.popitem(last=False)
        return found

    def _names_in(self, lin: int) -> dict[int, bytes]:
        names = self._names.get(lin)
        if names is None:
            names = {}
            for entry in self._view.entries(lin):
                names.setdefault(entry.lin, entry.name)
            self._names[lin] = names
            if len(self._names) > 256:
                self._names.popitem(last=False)
        return names
