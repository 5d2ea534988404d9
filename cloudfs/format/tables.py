"""Pages of rows, and the two objects that hold them: segments, and packs with their pack index.

A *page* is rows of one table in key order, as a msgpack array, coded (see envelope) and sealed at
the offset where it stands. A *table file* is::

    header      8 bytes       magic, kind, format version
    frames      (packs only)  sealed one after the other
    pages       sealed one after the other, by table and key
    footer      sealed        for each table: keys, offset, length and rows of each page
    tail        16 bytes      length of the footer, length of pages + footer + tail, magic

A reader that knows the file's size and the length of footer and tail needs one read for the
footer and one for each page. The tail is not sealed: what it says is believed only in that the
footer found by it must open under the footer's own position, and that the first page must stand
where the tail says.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any

import msgspec

from cloudfs.core.errors import Damaged
from cloudfs.core.manifest import KeyRange
from cloudfs.core.rows import ROW_TYPES, Key, Row, Table, key_of
from cloudfs.format import envelope
from cloudfs.format.envelope import FORMAT_VERSION, TAG_SIZE, Kind, Sealer

FILE_HEADER = struct.Struct(">4sBB2x")
FILE_MAGIC = b"cfst"
TAIL = struct.Struct(">II4s4x")
TAIL_MAGIC = b"cfse"

PAGE_TARGET = 64 * 1024
"""Plain bytes that a page is meant to have; a single row may make it larger."""

MAX_PAGE = 16 * 1024 * 1024
MAX_FOOTER = 256 * 1024 * 1024
TABLE_LEVEL = 3


class Page(msgspec.Struct, array_like=True, gc=False):
    """One encoded page, not sealed yet: it may still go into several objects."""

    table: int
    first: Key
    last: Key
    rows: int
    coded: bytes


class PageRef(msgspec.Struct, array_like=True, gc=False):
    """Where a page stands: its first and last key, offset and sealed length in bytes, its rows."""

    first: Key
    last: Key
    offset: int
    length: int
    rows: int


class Section(msgspec.Struct, array_like=True, gc=False):
    """The pages of one table in key order."""

    pages: list[PageRef]

    def find(self, key: Key) -> int:
        """The index of the page in which ``key`` stands if it is there; -1: before all pages."""
        return bisect_right(self.pages, key, key=attrgetter("first")) - 1


Footer = dict[int, Section]

_encoder = msgspec.msgpack.Encoder()
_row_decoders: dict[Table, msgspec.msgpack.Decoder[Any]] = {
    table: msgspec.msgpack.Decoder(list[row_type])  # type: ignore[valid-type]  # made at run time
    for table, row_type in ROW_TYPES.items()
}
_footer_decoder = msgspec.msgpack.Decoder(dict[int, Section])


def encode_pages(table: Table, rows: Sequence[Row]) -> Iterator[Page]:
    """Cut sorted rows into pages and encode them."""
    start, step = 0, 256
    while start < len(rows):
        chunk = rows[start : start + step]
        plain = _encoder.encode(chunk)
        if len(plain) > 2 * PAGE_TARGET and len(chunk) > 1:
            step = max(1, step * PAGE_TARGET // len(plain))
            continue
        coded = envelope.encode(plain, TABLE_LEVEL)
        yield Page(table, key_of(chunk[0]), key_of(chunk[-1]), len(chunk), coded)
        start += len(chunk)
        step = max(1, len(chunk) * PAGE_TARGET // len(plain))


def decode_page(table: Table, coded: bytes, name: str) -> list[Row]:
    """The rows of a coded page. Raises Damaged."""
    plain = envelope.decode(coded, name, MAX_PAGE)
    try:
        rows: list[Row] = _row_decoders[table].decode(plain)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise Damaged(f"{name} is damaged (a page holds no rows: {error}).") from None
    return rows


def file_header(kind: Kind) -> bytes:
    """The first bytes of a table file."""
    return FILE_HEADER.pack(FILE_MAGIC, kind, FORMAT_VERSION)


class TableFileWriter:
    """Gives out the bytes of pages, footer and tail, to be appended to header (and frames)."""

    def __init__(self, sealer: Sealer, offset: int) -> None:
        self._sealer = sealer
        self._start = self.offset = offset
        self.footer: Footer = {}
        self.rows = 0

    def page(self, page: Page) -> bytes:
        """Seal one page; pages come by table and key."""
        sealed = self._sealer.seal(self.offset, page.coded)
        ref = PageRef(page.first, page.last, self.offset, len(sealed), page.rows)
        self.footer.setdefault(int(page.table), Section([])).pages.append(ref)
        self.offset += len(sealed)
        self.rows += page.rows
        return sealed

    def finish(self) -> tuple[bytes, int, int]:
        """Footer with tail, their length, and the length of all from the first page on."""
        coded = envelope.encode(_encoder.encode(self.footer), TABLE_LEVEL)
        sealed = self._sealer.seal(self.offset, coded)
        whole = self.offset - self._start + len(sealed) + TAIL.size
        tail = TAIL.pack(len(sealed), whole, TAIL_MAGIC)
        return sealed + tail, len(sealed) + TAIL.size, whole

    def ranges(self) -> dict[int, KeyRange]:
        """The keys that the file spans, by table."""
        return {
            table: KeyRange(section.pages[0].first, section.pages[-1].last)
            for table, section in self.footer.items()
        }


def read_tail(data: bytes, name: str) -> tuple[int, int]:
    """(length of footer with tail, length of all from the first page on) of a file's last bytes."""
    if len(data) >= TAIL.size:
        footer, whole, magic = TAIL.unpack(data[-TAIL.size :])
        if magic == TAIL_MAGIC and data[-4:] == b"\0\0\0\0" and footer + TAIL.size <= whole:
            return footer + TAIL.size, whole
    raise Damaged(f"{name} is damaged (it does not end as it should).")


def read_footer(sealer: Sealer, file_size: int, data: bytes) -> Footer:
    """The footer out of the last bytes of a file of ``file_size`` bytes. Raises Damaged."""
    length, whole = read_tail(data, sealer.name)
    if length > len(data) or length > file_size:
        raise Damaged(f"{sealer.name} is damaged (its footer is cut).")
    sealed = data[len(data) - length : len(data) - TAIL.size]
    coded = sealer.open(file_size - length, sealed)
    try:
        footer: Footer = _footer_decoder.decode(envelope.decode(coded, sealer.name, MAX_FOOTER))
    except (msgspec.DecodeError, msgspec.ValidationError):
        raise Damaged(f"{sealer.name} is damaged (its footer is no footer).") from None
    starts = (ref.offset for section in footer.values() for ref in section.pages)
    if min(starts, default=file_size - length) != file_size - whole:
        raise Damaged(f"{sealer.name} is damaged (it does not end as it should).")
    return footer


def sealed_rows(sealer: Sealer, table: Table, ref: PageRef, sealed: bytes) -> list[Row]:
    """Open and decode one page as it was read from the store. Raises Damaged."""
    if len(sealed) != ref.length:
        raise Damaged(f"{sealer.name} is damaged (cut short).")
    return decode_page(table, sealer.open(ref.offset, sealed), sealer.name)


FRAME_OVERHEAD = TAG_SIZE + envelope.CODING_SIZE
MAX_FRAME = 64 * 1024 * 1024
