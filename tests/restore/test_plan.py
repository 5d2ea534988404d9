"""The plan as a value: names that are refused, spans, cuts, pieces."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudfs.core.errors import CloudfsError, Damaged
from cloudfs.core.rows import HOLE_RECORD, LOCATION, BlockRow, Entry, ItemType, Meta
from cloudfs.restore import parts
from cloudfs.restore.directories import Directories
from cloudfs.restore.layout import Layout, lay_out, lay_out_one
from cloudfs.restore.parts import MAX_SPAN, merge
from cloudfs.restore.plan import Planner
from cloudfs.restore.values import Item, Piece, Plan

FILE, DIRECTORY = int(ItemType.REGULAR), int(ItemType.DIRECTORY)
BLOCK = 100
PACK = b"p" * 16
_works = msgspec.msgpack.Decoder(Item | Piece)


def layout_of(*entries: Entry) -> Layout:
    tree: dict[int, list[Entry]] = {}
    for entry in entries:
        tree.setdefault(entry.parent, []).append(entry)
    return lay_out(1, lambda lin: tree.get(lin, []))


def directory(lin: int = 1) -> Meta:
    return Meta(lin, 1, DIRECTORY)


def file(lin: int, size: int, **changes: object) -> Meta:
    return msgspec.structs.replace(Meta(lin, 1, FILE, size=size, block_size=BLOCK), **changes)


def record(pack: bytes, frame: int, offset: int = 0, length: int = BLOCK) -> bytes:
    return LOCATION.pack(pack, frame, 50, offset, length, b"d" * 16)


def works(plan: Plan) -> list[Item | Piece]:
    return [_works.decode(coded) for part in plan.parts for coded in part.works]


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/etc", b"../x", b"nul\0"])
def test_names_that_lead_elsewhere_are_refused(name: bytes) -> None:
    with pytest.raises(Damaged, match="Nothing was restored"):
        layout_of(Entry(1, name, 1, 2, FILE))
    with pytest.raises(Damaged):
        lay_out_one(name, file(2, 0))


def test_what_is_no_tree_is_refused() -> None:
    with pytest.raises(Damaged, match="two names"):  # a cycle
        layout_of(Entry(1, b"a", 1, 2, DIRECTORY), Entry(2, b"b", 1, 1, DIRECTORY))
    with pytest.raises(Damaged, match="two names"):
        layout_of(Entry(1, b"a", 1, 2, DIRECTORY), Entry(1, b"b", 1, 2, DIRECTORY))
    with pytest.raises(Damaged, match="a name twice"):
        layout_of(Entry(1, b"a", 1, 2, FILE), Entry(1, b"a", 1, 3, DIRECTORY))


def test_directories_come_after_their_parents_and_links_after_the_first_name() -> None:
    layout = layout_of(
        Entry(1, b"b", 1, 2, DIRECTORY),
        Entry(1, b"f", 1, 5, FILE),
        Entry(2, b"c", 1, 3, DIRECTORY),
        Entry(3, b"g", 1, 5, FILE),
    )
    assert [(d.parent, d.name) for d in layout.directories] == [(-1, b""), (0, b"b"), (1, b"c")]
    assert layout.places == {5: (0, b"f", FILE)}
    assert layout.links == [(2, b"g", 0, b"f")]
    assert Plan(layout.directories, []).path(2, b"g") == b"b/c/g"


@pytest.mark.parametrize(
    "meta",
    [
        directory(2),
        Meta(2, 1, int(ItemType.STREAM)),
        Meta(2, 1, 99),
        file(2, -1),
        file(2, 1, block_size=0),
        file(2, 1, block_size=1 << 40),
        file(2, 0, uid=(1 << 32) - 1),
        file(2, 0, gid=-1),
        file(2, 0, mode=0o10000),
        file(2, 0, mtime_ns=1 << 63),
        file(2, 0, flags=1 << 32),
        file(2, 0, xattrs={b"user.\0": b""}),
        file(2, 0, type=int(ItemType.DELETED_FILE)),
        file(3, 0),
    ],
)
def test_metadata_that_cannot_be_is_refused(meta: Meta) -> None:
    planner = Planner(layout_of(Entry(1, b"f", 1, 2, FILE)))
    with pytest.raises(Damaged):
        planner.join([directory(), meta], [])


@pytest.mark.parametrize(
    "locs", [b"x" * 47, record(PACK, 0) * 65, LOCATION.pack(PACK, 0, 1 << 31, 0, 1, bytes(16))]
)
def test_locations_that_cannot_be_are_refused(locs: bytes) -> None:
    planner = Planner(layout_of(Entry(1, b"f", 1, 2, FILE)))
    with pytest.raises(Damaged):
        planner.join([directory(), file(2, 10)], [BlockRow(2, 0, 1, 1, locs)])


def planned(size: int, locs: bytes, workers: int = 1) -> Plan:
    planner = Planner(layout_of(Entry(1, b"f", 1, 2, FILE)))
    planner.join([directory(), file(2, size)], [BlockRow(2, 0, 1, 1, locs)])
    return planner.plan(workers)


def test_a_file_in_one_pack_is_written_whole() -> None:
    locs = record(PACK, 0) + HOLE_RECORD + record(PACK, 50)
    plan = planned(3 * BLOCK, locs)
    assert works(plan) == [Item(0, b"f", file(2, 3 * BLOCK), [(0, locs)])]
    assert plan.split == []
    assert (plan.totals.files, plan.totals.size, plan.totals.packs) == (1, 300, 1)
    assert (plan.totals.requests, plan.totals.stored) == (1, 100)


def test_a_file_in_several_packs_is_written_in_pieces() -> None:
    one, other = b"a" * 16, b"b" * 16
    a, b, c, d = record(other, 9), record(one, 9), record(one, 9, 100), record(one, 80)
    plan = planned(6 * BLOCK, a + b + c + HOLE_RECORD + d + record(other, 9, 100))
    assert [item.name for item in plan.split] == [b"f"]
    found = [(work.first_block, work.locs) for work in works(plan) if isinstance(work, Piece)]
    assert found == [(1, b + c), (4, d), (0, a), (5, record(other, 9, 100))]


def test_parts_follow_packs_and_know_their_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "MIN_WORK", 1)
    monkeypatch.setattr(parts, "MAX_WORK", 2 * parts.ITEM_WORK)
    entries = [Entry(1, b"d", 1, 2, DIRECTORY), Entry(2, b"e", 1, 3, DIRECTORY)]
    entries += [Entry(3, b"%d" % lin, 1, lin, FILE) for lin in range(4, 12)]
    planner = Planner(layout_of(*entries))
    metas = [directory(1), directory(2), directory(3), *(file(lin, 10) for lin in range(4, 12))]
    rows = [BlockRow(lin, 0, 1, 1, record(PACK, 50 * (12 - lin))) for lin in range(4, 12)]
    planner.join(metas, rows)
    plan = planner.plan(2)
    assert [work.name for work in works(plan)] == [b"%d" % lin for lin in range(11, 3, -1)]
    # Shares become smaller towards the end, so that nobody waits long for the last one.
    assert [part.items for part in plan.parts] == [2, 2, 2, 1, 1]
    assert all(part.directories == {1: (0, b"d"), 2: (1, b"e")} for part in plan.parts)
    assert [len(part.spans) for part in plan.parts] == [1, 1, 1, 1, 1]


frames = st.lists(
    st.tuples(
        st.sampled_from([b"a" * 16, b"b" * 16]),
        st.integers(0, 200 << 20),
        st.integers(1, 2 << 20),
    ),
    max_size=60,
    unique_by=lambda frame: frame[:2],
)


@given(frames)
def test_spans_hold_all_frames_and_waste_little(found: list[tuple[bytes, int, int]]) -> None:
    spans = list(merge(found))
    for pack, offset, length in found:
        holding = [
            span
            for span in spans
            if span.pack == pack
            and span.offset <= offset
            and offset + length <= span.offset + span.length
        ]
        assert holding
    assert all(span.length <= MAX_SPAN for span in spans)
    assert spans == sorted(spans, key=lambda span: (span.pack, span.offset))


def test_no_symlink_is_followed(tmp_path: Path) -> None:
    (tmp_path / "target" / "real").mkdir(parents=True)
    (tmp_path / "target" / "link").symlink_to("/etc")
    status = (tmp_path / "target").stat()
    target = os.fsencode(tmp_path / "target")
    directories = Directories(target, (status.st_dev, status.st_ino))
    directories.use({1: (0, b"real"), 2: (0, b"link"), 3: (2, b"ssl")})
    assert os.fstat(directories.open(1)).st_ino == (tmp_path / "target" / "real").stat().st_ino
    for index in (2, 3):
        with pytest.raises(NotADirectoryError):
            directories.open(index)
    directories.close()
    with pytest.raises(CloudfsError, match="was replaced by another directory"):
        Directories(target, (status.st_dev, status.st_ino + 1))
