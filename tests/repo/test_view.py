"""Lookups in a snapshot across many runs, against the plainest statement of what is in force."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from cloudfs.backup import coalesce
from cloudfs.backup.coalesce import RunWriter, pages_of
from cloudfs.core.manifest import Manifest, Run, SnapshotRecord, SnapshotStats
from cloudfs.core.rows import (
    HOLE_RECORD,
    LOCATION,
    BlockRow,
    Entry,
    ItemType,
    Meta,
    Row,
    Table,
    is_tombstone,
    key_of,
)
from cloudfs.format import tables
from cloudfs.repo.history import History
from cloudfs.repo.repository import Repository
from cloudfs.repo.view import SnapshotView
from tests.repo.sample import SECRET, Machine, opened

SNAPSHOTS = 7
LINS = range(1, 9)
NAMES = [b"a", b"b", b"bb", b"c", b"\xff"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of a few rows, segments of a few pages: small tables cross all borders."""
    monkeypatch.setattr(tables, "PAGE_TARGET", 120)
    monkeypatch.setattr(coalesce, "SEGMENT_BYTES", 300)


def record(place: int) -> bytes:
    return LOCATION.pack(place.to_bytes(16, "big"), place, 9, 0, 10, bytes(16))


snaps = some.integers(1, SNAPSHOTS)
meta_rows = some.builds(
    lambda lin, snap, kind: Meta(lin, snap, kind, size=lin * 100 + snap),
    some.sampled_from(LINS),
    snaps,
    some.sampled_from((ItemType.REGULAR, ItemType.DIRECTORY, ItemType.DELETED_FILE)),
)
entry_rows = some.builds(
    lambda parent, name, snap, lin: Entry(parent, name, snap, lin, 1 if lin else 0),
    some.sampled_from(LINS),
    some.sampled_from(NAMES),
    snaps,
    some.sampled_from((0, 2, 3)),
)
block_rows = some.builds(
    lambda lin, base, snap, count: BlockRow(
        lin,
        base,
        snap,
        1,
        b"".join(
            record(lin * 100 + base * 10 + snap + i) if i % 3 != 1 else HOLE_RECORD
            for i in range(count)
        ),
    ),
    some.sampled_from(LINS),
    some.integers(0, 4),
    snaps,
    some.integers(0, 5),
)
many = some.lists(
    meta_rows | entry_rows | block_rows, max_size=120, unique_by=lambda r: (type(r), key_of(r))
)
cuts = some.sets(some.integers(1, SNAPSHOTS - 1))


def table_of(row: Row) -> Table:
    return next(table for table, kind in tables.ROW_TYPES.items() if isinstance(row, kind))


def history_of(rows: list[Row], cut_after: set[int]) -> History:
    """A repository whose runs hold these rows, a new run beginning after each of the snapshots."""
    repository = Repository.create(opened({}), SECRET, Machine(), label="x")
    policy = repository.save_policy("home", "")
    writer = RunWriter(repository, policy.id)
    runs: list[Run] = []
    for before, last in pairwise([0, *sorted(cut_after), SNAPSHOTS]):
        here = sorted((row for row in rows if before < row.snap <= last), key=key_of_any)
        pages = [
            page
            for table in Table
            for page in pages_of(table, [row for row in here if table_of(row) == table])
        ]
        if pages:
            runs.append(writer.write(pages, before + 1, last))
    records = [
        SnapshotRecord(n, n, "scan", False, "h", [], SnapshotStats())
        for n in range(1, SNAPSHOTS + 1)
    ]
    local: Machine = repository.local  # type: ignore[assignment]  # it was given one
    local.fake.values.clear()
    return History(repository, policy, manifest=Manifest(1, 1, 100, runs, records))


def key_of_any(row: Row) -> tuple[int, object]:
    return table_of(row), key_of(row)


def in_force(rows: list[Row], number: int) -> list[Row]:
    """By the definition: of each key the row with the greatest snapshot not above."""
    found: dict[tuple[object, ...], Row] = {}
    for row in sorted(rows, key=lambda row: row.snap):
        if row.snap <= number:
            key = key_of(row)
            subject = key[:-1]
            found[(table_of(row), *subject)] = row
    return sorted(found.values(), key=key_of_any)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(many, cuts)
def test_every_lookup_gives_what_is_in_force(rows: list[Row], cut_after: set[int]) -> None:
    history = history_of(rows, cut_after)
    for number in range(1, SNAPSHOTS + 1):
        check(history.view(number), in_force(rows, number))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(many)
def test_merging_runs_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row]
) -> None:
    history = history_of(rows, set(range(1, SNAPSHOTS)))
    writer = RunWriter(history.repository, history.policy.id)
    runs = history.manifest.runs
    spools = tmp_path_factory.mktemp("spool")
    merged = coalesce.merge_runs(history, runs, writer, spools)
    assert len(merged) <= 4
    assert sum(r.last_snap - r.first_snap + 1 for r in merged) >= len(runs)
    after = History(
        history.repository,
        history.policy,
        manifest=Manifest(2, 1, 100, merged, history.snapshots),
    )
    for table in Table:
        assert list(after.rows(table)) == list(history.rows(table))
    for number in range(1, SNAPSHOTS + 1):
        check(after.view(number), in_force(rows, number))


def check(view: SnapshotView, truth: list[Row]) -> None:
    metas = {r.lin: r for r in truth if isinstance(r, Meta) and not is_tombstone(r)}
    entries = [r for r in truth if isinstance(r, Entry) and r.lin]
    blocks = {(r.lin, r.base): r for r in truth if isinstance(r, BlockRow)}
    for lin in [*LINS, 99]:
        assert view.meta(lin) == metas.get(lin)
        assert view.entries(lin) == [e for e in entries if e.parent == lin]
        for name in [*NAMES, b"", b"zz"]:
            wanted = [e for e in entries if (e.parent, e.name) == (lin, name)]
            assert view.lookup(lin, name) == (wanted[0] if wanted else None)
        for first, last in ((0, 4), (1, 2), (4, 9), (0, 2**62)):
            found = view.block_rows(lin, first, last)
            assert found == {
                b: r for (n, b), r in blocks.items() if n == lin and first <= b <= last
            }
    order = [*LINS, *reversed(LINS), 99, 3, 3]
    assert view.metas(order) == [metas.get(lin) for lin in order]
    for table in Table:
        assert list(view.rows(table)) == [r for r in truth if table_of(r) == table]


def test_blocks_beyond_what_a_row_holds_are_holes() -> None:
    rows: list[Row] = [
        BlockRow(2, 0, 1, 1, record(1) + HOLE_RECORD + record(2)),
        BlockRow(2, 2, 1, 1, record(3)),
        BlockRow(2, 2, 2, 1, b""),
    ]
    history = history_of(rows, {1})
    one, two = history.view(1), history.view(2)
    found = one.blocks(2, 0, 64 * 3)
    assert [i for i, location in enumerate(found) if location] == [0, 2, 128]
    assert [i for i, location in enumerate(two.blocks(2, 0, 64 * 3)) if location] == [0, 2]
    assert one.blocks(2, 127, 2)[0] is None and one.blocks(2, 127, 2)[1] is not None
    assert one.blocks(2, 5, 0) == []


def test_a_forged_loop_of_directories_ends() -> None:
    from cloudfs.core.errors import Damaged, UsageError

    directory = ItemType.DIRECTORY
    rows: list[Row] = [
        Meta(1, 1, directory),
        Meta(2, 1, directory),
        Entry(1, b"a", 1, 2, directory),
        Entry(2, b"b", 1, 1, directory),
    ]
    view = history_of(rows, set()).view(1)
    with pytest.raises(Damaged, match="two names"):
        list(walk(view))
    assert view.resolve(b"/a/./b//a").lin == 2
    with pytest.raises(UsageError, match="no /a/x"):
        view.resolve(b"/a/x")
    headless = history_of([*rows[:3], Entry(1, b"c", 1, 7, 1)], set()).view(1)
    with pytest.raises(Damaged, match="no metadata"):
        list(walk(headless))


def walk(view: SnapshotView) -> Iterator[object]:
    return view.walk()
