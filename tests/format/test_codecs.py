"""Envelope, names and table files: what went in comes out, and nothing else does."""

from __future__ import annotations

import struct
from operator import itemgetter

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as some

from cloudfs.core.errors import Damaged
from cloudfs.core.rows import (
    LOCATION,
    BlockRow,
    Entry,
    Location,
    Meta,
    PackRow,
    Row,
    Table,
    key_function,
    key_of,
    locations,
    newest_at,
)
from cloudfs.format import envelope, names, tables
from cloudfs.format.envelope import Keyring, Kind, decode, encode, open_object, seal_object
from cloudfs.format.tables import (
    TAIL,
    TableFileWriter,
    decode_page,
    encode_pages,
    file_header,
    read_footer,
    read_tail,
    sealed_rows,
)

RING = Keyring(b"m" * 32, b"r" * 16)
SALT = b"s" * 32

lins = some.integers(1, 2**63 - 1)
snaps = some.integers(1, 2**40)
text = some.text(max_size=20)
times = some.integers(-(2**62), 2**62)
metas = some.builds(
    Meta,
    lin=lins,
    snap=snaps,
    type=some.integers(1, 10),
    mode=some.integers(0, 0o7777),
    uid=some.integers(0, 2**32 - 1),
    gid=some.integers(0, 2**32 - 1),
    uname=text,
    gname=text,
    size=some.integers(0, 2**62),
    mtime_ns=times,
    ctime_ns=times,
    btime_ns=times,
    parent=lins,
    nlink=some.integers(0, 2**31),
    target=some.binary(max_size=40),
    xattrs=some.none() | some.dictionaries(some.binary(max_size=9), some.binary(max_size=30)),
    sparse=some.booleans(),
    streams=some.booleans(),
)
entries = some.builds(
    Entry, lins, some.binary(min_size=1, max_size=255), snaps, some.integers(0, 9), some.just(1)
)
records = some.lists(
    some.tuples(
        some.binary(min_size=16, max_size=16),
        *[some.integers(0, 2**32 - 1)] * 4,
        some.binary(min_size=16, max_size=16),
    ),
    max_size=64,
)
block_rows = some.builds(
    BlockRow,
    lins,
    some.integers(0, 2**40),
    snaps,
    some.just(1),
    records.map(lambda found: b"".join(LOCATION.pack(*record) for record in found)),
)
pack_rows = some.builds(
    PackRow,
    some.binary(min_size=16, max_size=16),
    snaps,
    some.integers(0, 2**40),
    some.integers(0, 2**40),
    some.integers(0, 2**32),
    text,
    text,
    times,
)
BY_TABLE: dict[Table, some.SearchStrategy[Row]] = {
    Table.METADATA: metas,
    Table.ENTRIES: entries,
    Table.BLOCKS: block_rows,
    Table.PACKS: pack_rows,
}


# -- envelope --------------------------------------------------------------------------------


@given(some.binary(max_size=5000), some.integers(0, 6))
def test_coding(plain: bytes, level: int) -> None:
    coded = encode(plain, level)
    assert decode(coded, "x", len(plain)) == plain
    assert len(coded) <= len(plain) + 1
    if plain:
        with pytest.raises(Damaged):
            decode(coded, "x", len(plain) - 1)


def test_a_frame_that_would_fill_the_memory_is_refused() -> None:
    bomb = b"\x01" + zstandard.ZstdCompressor(level=19).compress(bytes(50_000_000))
    assert len(bomb) < 10_000
    with pytest.raises(Damaged, match="cannot be decoded"):
        decode(bomb, "x", 1 << 20)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(5000))
    with pytest.raises(Damaged, match="cannot be decoded"):
        decode(b"\x01" + unsized, "x", 1 << 20)
    # One that says it is small and is not.
    lying = bytearray(zstandard.ZstdCompressor().compress(bytes(100_000)))
    shorter = struct.pack("<I", 1000)
    place = bytes(lying).index(struct.pack("<I", 100_000))
    lying[place : place + 4] = shorter
    with pytest.raises(Damaged, match="cannot be decoded"):
        decode(b"\x01" + bytes(lying), "x", 1 << 20)


@given(some.binary(max_size=200))
def test_noise_is_no_coding(noise: bytes) -> None:
    try:
        assert len(decode(noise, "x", 300)) <= 300
    except Damaged:
        pass
    with pytest.raises(Damaged):
        open_object(RING, Kind.POLICY, "policy/1", noise)


@given(some.binary(max_size=500))
def test_sealed_objects(plain: bytes) -> None:
    data = seal_object(RING, Kind.POLICY, "policy/1", plain, SALT)
    assert open_object(RING, Kind.POLICY, "policy/1", data) == plain
    for kind, name, ring in (
        (Kind.LEASE, "policy/1", RING),
        (Kind.POLICY, "policy/2", RING),
        (Kind.POLICY, "policy/1", Keyring(b"n" * 32, b"r" * 16)),
        (Kind.POLICY, "policy/1", Keyring(b"m" * 32, b"q" * 16)),
    ):
        with pytest.raises(Damaged):
            open_object(ring, kind, name, data)


def test_positions_are_bound() -> None:
    sealer = RING.sealer(Kind.PACK, "p")
    sealed = sealer.seal(8, b"\0abc")
    assert sealer.open(8, sealed) == b"\0abc"
    with pytest.raises(Damaged, match="offset 9"):
        sealer.open(9, sealed)
    assert sealer.seal(9, b"\0abc") != sealed


def test_the_same_content_never_looks_the_same() -> None:
    one = seal_object(RING, Kind.LEASE, "l", b"text", b"1" * 32)
    two = seal_object(RING, Kind.LEASE, "l", b"text", b"2" * 32)
    assert one[envelope.HEADER.size :] != two[envelope.HEADER.size :]


def test_keys_do_not_show() -> None:
    assert "6d6d" not in repr(RING) and "mmm" not in repr(RING)


# -- names -----------------------------------------------------------------------------------


@given(some.integers(0, 2**64 - 1), some.integers(0, 2**64 - 1))
def test_newer_names_come_first(one: int, two: int) -> None:
    for make, kind in ((names.lease, "lease"), (names.manifest, "manifest")):
        assert names.parse_head("p", make("p", one)) == (kind, one)
        assert (make("p", one) < make("p", two)) == (one > two)


def test_leases_come_before_manifests() -> None:
    assert names.lease("p", 0) < names.manifest("p", 2**64 - 1)


@pytest.mark.parametrize(
    "name", ["x", "lease-12", "manifest-zzzzzzzzzzzzzzzz", "lease-", "-", "other-" + "0" * 16]
)
def test_foreign_names_in_the_head(name: str) -> None:
    assert names.parse_head("p", names.head("p") + name) is None


@given(some.binary(min_size=16, max_size=16))
def test_names_of_packs(pack: bytes) -> None:
    name = names.pack("p", pack)
    assert name.startswith(names.packs("p"))
    assert names.parse_pack(name) == pack
    assert names.parse_pack(name + "0") is None
    assert names.parse_pack(name[:-1]) is None
    if name.upper() != name:
        assert names.parse_pack(name.upper()) is None or pack.hex().isdigit()


# -- rows and pages --------------------------------------------------------------------------


@pytest.mark.parametrize("table", Table)
def test_pages(table: Table) -> None:
    @given(some.lists(BY_TABLE[table], max_size=60))
    def check(found: list[Row]) -> None:
        ordered = sorted(found, key=key_of)
        pages = list(encode_pages(table, ordered))
        back = [row for page in pages for row in decode_page(table, page.coded, "x")]
        assert back == ordered
        assert sum(page.rows for page in pages) == len(ordered)
        for page in pages:
            held = decode_page(table, page.coded, "x")
            assert (page.first, page.last) == (key_of(held[0]), key_of(held[-1]))

    check()


def test_pages_are_of_the_size_that_is_meant() -> None:
    many = [Meta(lin, 1, 1, uname="somebody", size=lin * 7919) for lin in range(1, 20_000)]
    pages = list(encode_pages(Table.METADATA, many))
    sizes = [len(decode(page.coded, "x", 1 << 24)) for page in pages]
    assert max(sizes) <= 2 * tables.PAGE_TARGET
    # The first page is a guess, by which the others are measured.
    assert min(sizes[1:-1]) > tables.PAGE_TARGET // 4
    large = [Meta(lin, 1, 1, xattrs={b"a": bytes(200_000)}) for lin in range(1, 9)]
    assert len(list(encode_pages(Table.METADATA, large))) == 8


@given(some.binary(max_size=100), some.sampled_from(Table))
def test_noise_is_no_page(noise: bytes, table: Table) -> None:
    try:
        decode_page(table, b"\0" + noise, "x")
    except Damaged:
        pass


@given(records)
def test_locations(found: list[tuple[bytes, int, int, int, int, bytes]]) -> None:
    row = BlockRow(1, 0, 1, 1, b"".join(LOCATION.pack(*record) for record in found))
    wanted = [None if record[0] == bytes(16) else Location(*record) for record in found]
    assert locations(row) == wanted


@given(some.lists(some.tuples(some.integers(1, 4), some.integers(1, 6)), unique=True))
def test_newest_wins(keys: list[tuple[int, int]]) -> None:
    found: list[Row] = [Meta(lin, snap, 1, size=lin * snap) for lin, snap in sorted(keys)]
    for snapshot in range(8):
        naive: dict[int, Row] = {}
        for lin, snap in sorted(keys, key=itemgetter(1)):
            if snap <= snapshot:
                naive[lin] = Meta(lin, snap, 1, size=lin * snap)
        assert list(newest_at(found, snapshot)) == [naive[lin] for lin in sorted(naive)]


# -- table files -----------------------------------------------------------------------------


def table_file(by_table: dict[Table, list[Row]], frames: int) -> bytes:
    sealer = RING.sealer(Kind.PACK, "p")
    data = file_header(Kind.PACK)
    data += sealer.seal(len(data), b"\0" + bytes(frames)) if frames else b""
    writer = TableFileWriter(sealer, len(data))
    for table, found in sorted(by_table.items()):
        for page in encode_pages(table, found):
            data += writer.page(page)
    end, tail_size, whole = writer.finish()
    data += end
    assert read_tail(data[-TAIL.size :], "p") == (tail_size, whole)
    for table, span in writer.ranges().items():
        held = by_table[Table(table)]
        assert (span.first, span.last) == (key_of(held[0]), key_of(held[-1]))
    return data


@settings(max_examples=40)
@given(some.fixed_dictionaries({t: some.lists(s, max_size=20) for t, s in BY_TABLE.items()}))
def test_table_files(by_table: dict[Table, list[Row]]) -> None:
    ordered = {t: sorted(found, key=key_function(t)) for t, found in by_table.items()}
    for frames in (0, 1000):
        data = table_file(ordered, frames)
        assert data.startswith(file_header(Kind.PACK))
        sealer = RING.sealer(Kind.PACK, "p")
        tail_size, _ = read_tail(data, "p")
        footer = read_footer(sealer, len(data), data[-tail_size:])
        assert footer == read_footer(sealer, len(data), data)
        for table, found in ordered.items():
            back: list[Row] = []
            for ref in footer[int(table)].pages if int(table) in footer else ():
                sealed = data[ref.offset : ref.offset + ref.length]
                back += sealed_rows(sealer, table, ref, sealed)
            assert back == found


def test_every_byte_of_footer_and_tail_matters() -> None:
    rows: list[Row] = [Meta(lin, 1, 1) for lin in range(1, 30)]
    for by_table in ({Table.METADATA: rows}, {}):
        data = table_file(by_table, 50)
        sealer = RING.sealer(Kind.PACK, "p")
        tail_size, _ = read_tail(data, "p")
        for place in range(len(data) - tail_size, len(data)):
            for mask in (1, 0x80):
                bad = bytearray(data)
                bad[place] ^= mask
                with pytest.raises(Damaged):
                    read_footer(sealer, len(bad), bytes(bad))
        for cut in range(len(data)):
            with pytest.raises(Damaged):
                read_footer(sealer, cut, data[:cut])


def test_a_section_finds_its_page() -> None:
    rows: list[Row] = [Meta(lin, 1, 1, uname=str(lin) * 9) for lin in range(2, 9000, 2)]
    data = table_file({Table.METADATA: rows}, 0)
    footer = read_footer(RING.sealer(Kind.PACK, "p"), len(data), data)
    section = footer[Table.METADATA]
    assert len(section.pages) > 3
    for lin in range(1, 9002):
        index = section.find((lin, 5))
        assert index == sum(ref.first <= (lin, 5) for ref in section.pages) - 1
