"""The normative page says what the program does: every table of it is compared with the code."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import msgspec
import pytest
from docutils import nodes
from docutils.core import publish_doctree

from cloudfs.backup import coalesce, packs
from cloudfs.core import manifest, rows
from cloudfs.core.rows import ItemType, Table
from cloudfs.format import envelope, names, tables
from cloudfs.format.envelope import Kind
from cloudfs.fuse import inodes
from cloudfs.repo import edits, history, keys, lease, repository
from cloudfs.repo.keys import Secret, WrappedKey

MAN = Path(__file__).parents[2] / "man"
PAGE = MAN / "cloudfs-format.5.rst"

Rows = list[list[str]]


def tables_of(page: Path) -> dict[str, list[tuple[list[str], Rows]]]:
    """The tables of a page by the title of the section they stand in: head and rows."""
    tree = publish_doctree(page.read_text(), settings_overrides={"halt_level": 2})
    found: dict[str, list[tuple[list[str], Rows]]] = {}
    for table in tree.findall(nodes.table):
        section = table.parent
        head, body = (
            [
                [cell.astext() for cell in row.findall(nodes.entry)]
                for part in table.findall(kind)
                for row in part.findall(nodes.row)
            ]
            for kind in (nodes.thead, nodes.tbody)
        )
        title = next(section.findall(nodes.title)).astext()
        found.setdefault(title, []).append((head[0], body))
    return found


@pytest.fixture(scope="module")
def page() -> dict[str, list[tuple[list[str], Rows]]]:
    return tables_of(PAGE)


Page = dict[str, list[tuple[list[str], Rows]]]


def column(rows_: Rows, index: int) -> list[str]:
    return [row[index] for row in rows_]


OFFSETS = [
    ("Objects sealed in one piece", 0, envelope.HEADER, envelope.MAGIC),
    ("BlockRow", 1, rows.LOCATION, b""),
    ("SEGMENTS AND PACKS", 0, tables.FILE_HEADER, tables.FILE_MAGIC),
    ("SEGMENTS AND PACKS", 2, tables.TAIL, tables.TAIL_MAGIC),
]


def layout(form: struct.Struct) -> list[tuple[int, int]]:
    """(offset, size) of each field of a struct, padding too."""
    found, offset = [], 0
    for count, letter in re.findall(r"(\d*)([a-zA-Z])", form.format):
        sizes = (
            [int(count or 1)]
            if letter in "sx"
            else [struct.calcsize(">" + letter)] * int(count or 1)
        )
        for size in sizes:
            found.append((offset, size))
            offset += size
    assert offset == form.size
    return found


@pytest.mark.parametrize(("title", "index", "form", "magic"), OFFSETS)
def test_offsets(page: Page, title: str, index: int, form: struct.Struct, magic: bytes) -> None:
    head, body = page[title][index]
    assert head == ["Offset", "Size", "Field", "Content"]
    assert [(int(row[0]), int(row[1])) for row in body] == layout(form)
    if magic:
        assert magic.decode() in [row[3] for row in body if row[2] == "magic"]
    order = PAGE.read_text().split(title, 1)[1]
    word = "little endian" if form.format.startswith("<") else "big endian"
    assert word in " ".join(order.split())


def test_fields_of_a_location(page: Page) -> None:
    assert column(page["BlockRow"][1][1], 2) == list(rows.Location._fields)


FIELDS = [
    ("CONFIGURATION", 0, repository.RepositoryConfig),
    ("CONFIGURATION", 1, WrappedKey),
    ("Meta", 0, rows.Meta),
    ("Entry", 0, rows.Entry),
    ("BlockRow", 0, rows.BlockRow),
    ("PackRow", 0, rows.PackRow),
    ("SEGMENTS AND PACKS", 1, tables.PageRef),
    ("MANIFEST", 0, manifest.Manifest),
    ("Run", 0, manifest.Run),
    ("SegmentRef", 0, manifest.SegmentRef),
    ("KeyRange", 0, manifest.KeyRange),
    ("Retired", 0, manifest.Retired),
    ("SnapshotRecord", 0, manifest.SnapshotRecord),
    ("SnapshotStats", 0, manifest.SnapshotStats),
    ("LEASE", 0, lease.LeaseContent),
    ("POLICY", 0, repository.PolicyRecord),
]


@pytest.mark.parametrize(("title", "index", "kind"), FIELDS)
def test_fields(page: Page, title: str, index: int, kind: type[msgspec.Struct]) -> None:
    head, body = page[title][index]
    assert head == ["Number", "Field", "Content"]
    found = [field.name for field in msgspec.structs.fields(kind)]
    assert column(body, 0) == [str(number) for number in range(len(found))]
    assert column(body, 1) == found
    section = " ".join(PAGE.read_text().split(f"\n{title}\n", 1)[1].split())
    coded = re.search("truct as (array|map)", section)
    if kind in rows.ROW_TYPES.values():
        assert kind.__struct_config__.array_like  # as is said above of every row
    elif title != "CONFIGURATION":
        assert coded is not None
        assert (coded[1] == "array") == kind.__struct_config__.array_like


@pytest.mark.parametrize(
    ("title", "kind"), [("Kinds", Kind), ("Item types", ItemType), ("TABLES", Table)]
)
def test_numbers(page: Page, title: str, kind: type[Kind] | type[ItemType] | type[Table]) -> None:
    body = page[title][0][1]
    assert [(int(row[0]), row[1]) for row in body] == [(int(k), k.name) for k in kind]


def test_rows_and_keys_of_the_tables(page: Page) -> None:
    for row in page["TABLES"][0][1]:
        table = Table(int(row[0]))
        kind = rows.ROW_TYPES[table]
        assert row[2] == kind.__name__
        fields = [field.name for field in msgspec.structs.fields(kind)]
        required = [place % 250 for place in range(len(fields))]
        values: list[object] = [*required]
        if kind is rows.PackRow:
            values[0] = b"p"
        if kind is rows.Entry:
            values[1] = b"n"
        made = kind(*values)  # type: ignore[arg-type]  # only the keys are looked at
        keyed = [fields[values.index(value)] for value in rows.key_of(made)]
        assert row[3] == ", ".join(keyed)


def test_sizes(page: Page) -> None:
    sizes = [int(size) for size in column(page["Sizes"][0][1], 1)]
    assert sizes == [
        envelope.KEY_SIZE,
        envelope.ID_SIZE,
        envelope.SALT_SIZE,
        envelope.TAG_SIZE,
        envelope.CODING_SIZE,
    ]
    assert column(page["Coding"][0][1], 0) == [
        str(envelope.CODED_PLAIN),
        str(envelope.CODED_ZSTD),
    ]
    text = PAGE.read_text()
    assert f"The sealed piece begins at offset {envelope.HEADER.size}." in text
    assert f"A location record has {rows.LOCATION.size} bytes" in text
    assert f"The **tail** is the last {tables.TAIL.size} bytes" in text
    assert f"format {envelope.FORMAT_VERSION}." in text
    assert rows.DIGEST_XXH3_128 == 1
    assert rows.STREAM_PREFIX == b"/"
    assert not keys.FEATURES
    assert (rows.ROOT_LIN, rows.FIRST_FREE_LIN) == (1, 2)


def test_names(page: Page) -> None:
    policy, other = "ab" * 16, bytes(range(16))
    made = {
        "cloudfs.json": names.CONFIG,
        "edit/<down(revision)>": edits.claim_name(3),
        "policy/<policy id>": names.policy(policy),
        "data/<policy id>/head/lease-<down(epoch)>": names.lease(policy, 3),
        "data/<policy id>/head/manifest-<down(n)>": names.manifest(policy, 3),
        "data/<policy id>/segment/<segment id>": names.segment(policy, other),
        "data/<policy id>/pack/<xx>/<pack id>": names.pack(policy, other),
    }
    assert column(page["NAMES OF OBJECTS"][0][1], 0) == list(made)
    values = {
        "policy id": policy,
        "down(revision)": f"{2**64 - 1 - 3:016x}",
        "down(epoch)": f"{2**64 - 1 - 3:016x}",
        "down(n)": f"{2**64 - 1 - 3:016x}",
        "segment id": other.hex(),
        "pack id": other.hex(),
        "xx": other.hex()[:2],
    }
    for pattern, name in made.items():
        assert re.sub("<(.*?)>", lambda match: values[match[1]], pattern) == name


def test_argon2(page: Page) -> None:
    body = page["CONFIGURATION"][2][1]
    assert [(row[0], int(row[1])) for row in body] == [
        ("memory_kib", keys.ARGON2_MEMORY_KIB),
        ("passes", keys.ARGON2_PASSES),
        ("lanes", keys.ARGON2_LANES),
    ]
    secret = Secret.passphrase(b"x")
    for field, _, low, high in body:
        for value in (int(low) - 1, int(high) + 1):
            fields = {"memory_kib": 8192, "passes": 1, "lanes": 1} | {field: value}
            key = WrappedKey("id", "", "passphrase", 0, bytes(16), b"", **fields)
            with pytest.raises(keys.Damaged, match="out of bounds"):
                keys._stretch(secret, key)
        if field != "memory_kib":
            fields = {"memory_kib": 8192, "passes": 1, "lanes": 1} | {field: int(high)}
            keys._stretch(secret, WrappedKey("id", "", "passphrase", 0, bytes(16), b"", **fields))


def test_limits(page: Page) -> None:
    limits = [row[1] for row in page["LIMITS"][0][1]]
    assert limits == [
        str(rows.BASE_BLOCKS),
        str(packs.FRAME_BYTES),
        str(tables.MAX_FRAME),
        str(tables.PAGE_TARGET),
        str(tables.MAX_PAGE),
        str(tables.MAX_FOOTER),
        str(coalesce.SEGMENT_BYTES),
        str(history.KEEP_MANIFESTS),
        f"2^{inodes.LIN_BITS} - 1",
    ]
    assert f"written again every {lease.BEAT_S:.0f} seconds" in PAGE.read_text()


def test_no_table_is_left_unchecked(page: Page) -> None:
    checked = {(title, index) for title, index, *_ in [*OFFSETS, *FIELDS]}
    checked |= {(t, 0) for t in ("Kinds", "Item types", "TABLES", "Sizes", "Coding", "LIMITS")}
    checked |= {("NAMES OF OBJECTS", 0), ("CONFIGURATION", 2)}
    assert {(title, i) for title, found in page.items() for i in range(len(found))} == checked
