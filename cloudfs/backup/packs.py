"""Filling packs: blocks into frames, frames into packs, rows into pack indexes.

1. Blocks are laid one after the other into a frame buffer. When it holds FRAME_BYTES it is
   compressed, sealed and becomes a frame of the pack; only then are the locations of its blocks
   known, and they are written into the holders that wait for them.
2. A pack is closed when it is full, when it has been open for the policy's time limit, or when the
   assignment ends. Its index holds every row that was made since the last pack was closed, so the
   tables can be rebuilt from packs alone; rows without blocks make a pack without frames.
3. A frame is decoded again before it is published, when the policy says so: what a compressor got
   wrong must not become the only copy.
4. A closed pack is uploaded in the background while the next one fills; at most one at a time, so
   memory is bounded to two packs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import cast

import msgspec
import xxhash

from cloudfs.core.errors import CloudfsError
from cloudfs.core.rows import (
    DIGEST_XXH3_128,
    HOLE_RECORD,
    LOCATION,
    BlockRow,
    Entry,
    Key,
    Meta,
    PackRow,
    Row,
    Table,
    key_function,
)
from cloudfs.format import names
from cloudfs.format.envelope import ID_SIZE, Keyring, Kind, Sealer, decode, encode
from cloudfs.format.tables import Page, TableFileWriter, encode_pages, file_header
from cloudfs.store.base import Buffer, Store

FRAME_BYTES = 1 << 20


class PackSettings(msgspec.Struct, frozen=True):
    """How packs are made. Sizes in bytes; ``level`` 0 stores frames uncompressed."""

    policy_id: str
    snapshot: int
    first_new_lin: int
    block_size: int
    max_pack_bytes: int
    level: int
    verify: bool
    time_limit_s: float
    node: str


@dataclass(slots=True)
class Base:
    """One base of one file while its blocks are being placed."""

    lin: int
    number: int
    records: list[bytes]  # locations, in place once their frame is sealed


@dataclass
class Rows:
    """Rows that were made and not written yet."""

    metas: list[Meta] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    bases: list[Base] = field(default_factory=list)
    # Of files of which another assignment writes the row: only for the pack index, so that it
    # tells whose blocks it describes.
    echoes: list[Meta] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.metas or self.entries or self.bases)

    def with_echoes(self) -> Rows:
        """The rows of the pack index."""
        return Rows([*self.metas, *self.echoes], self.entries, self.bases)

    def pages(self, settings: PackSettings) -> list[Page]:
        """All rows as encoded pages, by table and key.

        No page spans the first new LIN: the pages of new LINs, of which each assignment has its
        own, then go into the segment as they are, whatever is said of old ones.
        """
        snapshot = settings.snapshot
        new: Key = (settings.first_new_lin,)
        blocks = [
            BlockRow(base.lin, base.number, snapshot, DIGEST_XXH3_128, b"".join(base.records))
            for base in self.bases
        ]
        pages: list[Page] = []
        for table, rows in (
            (Table.METADATA, self.metas),
            (Table.ENTRIES, self.entries),
            (Table.BLOCKS, blocks),
        ):
            key = key_function(table)
            ordered = sorted(cast("list[Row]", rows), key=key)
            cut = bisect_left(ordered, new, key=key)
            for part in (ordered[:cut], ordered[cut:]):
                pages.extend(encode_pages(table, part))
        return pages


class Packer:
    """Takes blocks and rows, uploads packs. For one thread; keeps nothing after :meth:`finish`."""

    def __init__(
        self,
        store: Store,
        keyring: Keyring,
        settings: PackSettings,
        *,
        entropy: Callable[[int], bytes],
        clock_ns: Callable[[], int],
        uploader: ThreadPoolExecutor,
    ) -> None:
        self._store = store
        self._keyring = keyring
        self._settings = settings
        self._entropy = entropy
        self._clock_ns = clock_ns
        self._uploader = uploader
        self._upload: Future[None] | None = None
        # One block more than a frame: a block is read into place before it is known to be new.
        self._buffer = memoryview(bytearray(FRAME_BYTES + settings.block_size))
        self._used = 0
        self._waiting: list[tuple[Base, int, int, int, bytes]] = []
        self._pack: bytes = b""
        self._sealer: Sealer | None = None
        self._chunks: list[Buffer] = []
        self._size = 0
        self._opened_ns = 0
        self.rows = Rows()
        self.pages: list[Page] = []
        self.pack_rows: list[PackRow] = []
        self.bytes_stored = 0

    # -- blocks --------------------------------------------------------------------------------

    def room(self, length: int) -> memoryview:
        """Where the next block of ``length`` bytes is to be laid, before it is kept."""
        return self._buffer[self._used : self._used + length]

    def keep(self, base: Base, index: int, length: int, digest: bytes) -> None:
        """Keep the block of ``length`` bytes that stands in the room for it."""
        self._waiting.append((base, index, self._used, length, digest))
        self._used += length
        if self._used >= FRAME_BYTES:
            self._flush_frame()

    def append(self, base: Base, index: int, block: Buffer, digest: bytes) -> None:
        """Keep a block that is not in the buffer yet."""
        self.room(len(block))[:] = block
        self.keep(base, index, len(block), digest)

    def _flush_frame(self) -> None:
        if not self._used:
            return
        plain = self._buffer[: self._used]
        coded = encode(plain, self._settings.level)
        if self._settings.verify and not _decodes_to(coded, plain):
            raise CloudfsError(
                "the compressor made a frame that does not decode to what went in;"
                " nothing of it was stored. Check this machine's memory, then sync again."
            )
        if self._sealer is None:
            self._open_pack()
        assert self._sealer is not None
        offset, pack = self._size, self._pack
        sealed = self._sealer.seal(offset, coded)
        self._chunks.append(sealed)
        self._size += len(sealed)
        for base, index, start, length, digest in self._waiting:
            base.records[index] = LOCATION.pack(pack, offset, len(sealed), start, length, digest)
        self._waiting.clear()
        self._used = 0
        age_s = (self._clock_ns() - self._opened_ns) / 1e9
        if self._size >= self._settings.max_pack_bytes or age_s > self._settings.time_limit_s:
            self._close_pack()

    # -- packs ---------------------------------------------------------------------------------

    def _open_pack(self) -> None:
        self._pack = self._entropy(ID_SIZE)
        name = names.pack(self._settings.policy_id, self._pack)
        self._sealer = self._keyring.sealer(Kind.PACK, name)
        self._chunks = [file_header(Kind.PACK)]
        self._size = len(self._chunks[0])
        self._opened_ns = self._clock_ns()

    def _close_pack(self) -> None:
        """Write the index and hand the pack to the uploader.

        Called with an empty frame buffer, so the locations of all rows made so far are known.
        """
        rows, self.rows = self.rows, Rows()
        if self._sealer is None:
            if not rows:
                return
            self._open_pack()
        assert self._sealer is not None
        live = self._size
        writer = TableFileWriter(self._sealer, self._size)
        pages = rows.pages(self._settings)
        described = rows.with_echoes().pages(self._settings) if rows.echoes else pages
        self._chunks.extend(writer.page(page) for page in described)
        end, _, index_size = writer.finish()
        self._chunks.append(end)
        size = live + index_size
        self.pages.extend(pages)
        self.pack_rows.append(
            PackRow(
                self._pack,
                self._settings.snapshot,
                size,
                live,
                index_size,
                "",
                self._settings.node,
                self._clock_ns(),
            )
        )
        self.bytes_stored += size
        self.wait()
        name = names.pack(self._settings.policy_id, self._pack)
        self._upload = self._uploader.submit(self._store.put, name, self._chunks)
        self._sealer, self._chunks = None, []

    def wait(self) -> None:
        """Wait until the pack on its way is durable. Raises what its upload raised."""
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.result()

    def finish(self) -> None:
        """Close what is open and wait until everything is durable."""
        self._flush_frame()
        self._close_pack()
        self.wait()


def _decodes_to(coded: bytes, plain: memoryview) -> bool:
    # Python compares a memoryview byte by byte; two digests take a twentieth of that time.
    decoded = decode(coded, "frame", len(plain))
    return xxhash.xxh3_128_digest(decoded) == xxhash.xxh3_128_digest(plain)


def new_base(lin: int, number: int, blocks: int) -> Base:
    """A base none of whose blocks is placed yet."""
    return Base(lin, number, [b""] * blocks)


def hole(base: Base, index: int) -> None:
    """Say that a block is a hole."""
    base.records[index] = HOLE_RECORD
