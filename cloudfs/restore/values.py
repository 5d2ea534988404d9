"""The values that a plan is made of (see :mod:`cloudfs.restore.plan`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from cloudfs.core.rows import Meta

LOCKING_FLAGS = 0x10 | 0x20
"""FS_IMMUTABLE_FL and FS_APPEND_FL: set when nothing else is left to be done to an item."""

Frame = tuple[bytes, int, int]
"""pack, offset, stored length"""


class Item(msgspec.Struct, array_like=True, gc=False, tag=0):
    """One name to be made whole. ``bases`` are (base, LOCATION records), in order."""

    directory: int
    name: bytes
    meta: Meta
    bases: list[tuple[int, bytes]] = []


class Piece(msgspec.Struct, array_like=True, gc=False, tag=1):
    """Neighbouring blocks, all of one frame, of a file that is there already. Sizes in bytes."""

    directory: int
    name: bytes
    size: int
    block_size: int
    sparse: bool
    first_block: int
    locs: bytes


class Span(msgspec.Struct, array_like=True, gc=False):
    """Stored bytes of one pack that are fetched by one request."""

    pack: bytes
    offset: int
    length: int


class Part(msgspec.Struct, array_like=True):
    """The work of one task. ``works`` are encoded items and pieces; sizes in bytes.

    ``directories`` gives (parent, name) of each directory that the works name, and of those above.
    """

    directories: dict[int, tuple[int, bytes]]
    works: list[msgspec.Raw]
    spans: list[Span]
    items: int
    size: int


@dataclass(slots=True)
class Directory:
    """One directory; ``parent`` is its index in the plan. The first one is the target itself.

    ``meta`` stays None where the target only holds what is restored.
    """

    parent: int
    name: bytes
    meta: Meta | None = None


class Link(NamedTuple):
    """One more name of an item: (directory, name), and those of the first name."""

    directory: int
    name: bytes
    first_directory: int
    first_name: bytes


@dataclass
class Totals:
    """What a restore brings and costs. Sizes in bytes."""

    files: int = 0
    dirs: int = 0
    symlinks: int = 0
    others: int = 0
    links: int = 0
    size: int = 0
    packs: int = 0
    requests: int = 0
    stored: int = 0

    @property
    def items(self) -> int:
        """Everything that is made by parts."""
        return self.files + self.symlinks + self.others


@dataclass
class Plan:
    """All that is to be done, in this order: directories, split files, parts, links, locked."""

    directories: list[Directory]
    links: list[Link]
    split: list[Item] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    locked: list[tuple[int, bytes, int]] = field(default_factory=list)
    totals: Totals = field(default_factory=Totals)

    def path(self, directory: int, name: bytes = b"") -> bytes:
        """A path for messages, relative to the target."""
        parts = [name] if name else []
        while directory > 0:
            parts.append(self.directories[directory].name)
            directory = self.directories[directory].parent
        return b"/".join(reversed(parts)) or b"."
