"""Reading files out of packs and rows out of segments: the right bytes, by few requests."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from cloudfs.backup import attempt
from cloudfs.core.rows import (
    BlockRow,
    Entry,
    Meta,
    PackRow,
    Row,
    Table,
    key_of,
)
from cloudfs.db.local import LocalState
from cloudfs.format import names
from cloudfs.format.envelope import Keyring, Kind
from cloudfs.format.tables import TAIL, Section, read_footer, read_tail, sealed_rows
from cloudfs.repo import tables
from cloudfs.repo.history import History
from cloudfs.repo.repository import PolicyRecord, Repository
from cloudfs.store.count import Counts
from tests.repo.sample import SECRET, Machine, opened, run_sync

MIB = 1 << 20


class Place:
    """A repository with one policy in a store that counts."""

    def __init__(self, base: Path) -> None:
        self.tree = base / "tree"
        self.tree.mkdir()
        self.store = opened({})
        local = LocalState(base / "c", base / "s", cache_bytes=64 * MIB)
        self.repository = Repository.create(self.store, SECRET, local, label="x")
        self.record: PolicyRecord = self.repository.save_policy("home", "")

    def sync(self, **settings: object) -> None:
        run_sync(self.repository, self.record, self.tree, **settings)

    def elsewhere(self) -> History:
        """As a machine that has nothing opens it."""
        repository = Repository.open(self.store, SECRET, Machine())
        return History(repository, repository.policies()[0])

    def cost(self, do: Callable[[], object]) -> Counts:
        before = self.store.counts()
        do()
        return self.store.counts() - before


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# -- bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 8191, 8192, 3 * 4096 + 1])
def test_every_range_of_a_file(place: Place, size: int) -> None:
    data = random.Random(size).randbytes(size)
    (place.tree / "f").write_bytes(data)
    place.sync()
    view = place.elsewhere().view(1)
    meta = view.resolve(b"/f")
    edges = sorted(
        {0, 1, size - 1, size, size + 1, *(n + d for n in (4096, 8192) for d in (-1, 0, 1))}
    )
    read = view.blocks_reader.read
    for offset in (edge for edge in edges if edge >= 0):
        for length in (0, 1, 100, 4096, 5000, size, 10**9):
            assert read(view, meta, offset, length) == data[offset : offset + length]


def test_holes_and_what_was_cut_off(place: Place) -> None:
    path = place.tree / "f"
    block = 4096
    states = []
    with open(path, "wb") as file:
        file.write(b"a" * block)
        file.seek(130 * block)
        file.write(b"b" * block)
        file.truncate(200 * block + 5)
    states.append(path.read_bytes())
    place.sync()
    os.truncate(path, 100)
    os.truncate(path, 131 * block)  # what lay there must not show through
    states.append(path.read_bytes())
    place.sync()
    assert states[0] != states[1][: len(states[0])]
    history = place.elsewhere()
    for number, data in enumerate(states, start=1):
        view = history.view(number)
        meta = view.resolve(b"/f")
        assert view.blocks_reader.read(view, meta, 0, 10**9) == data
        for offset in range(0, len(data), 7 * block + 3):
            assert view.blocks_reader.read(view, meta, offset, 9000) == data[offset:][:9000]


def test_many_threads_read_the_same(place: Place) -> None:
    data = random.Random(1).randbytes(3 * MIB)
    (place.tree / "f").write_bytes(data)
    place.sync(max_pack_bytes=32 * MIB)
    view = place.elsewhere().view(1)
    meta = view.resolve(b"/f")
    wrong: list[int] = []

    def read(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(60):
            offset, size = dice.randrange(len(data)), dice.randrange(300_000)
            if view.blocks_reader.read(view, meta, offset, size) != data[offset : offset + size]:
                wrong.append(offset)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- requests --------------------------------------------------------------------------------


@pytest.fixture
def large(place: Place) -> Place:
    (place.tree / "f").write_bytes(random.Random(1).randbytes(24 * MIB))
    place.sync(block_size=128 * 1024, max_pack_bytes=64 * MIB)
    return place


def test_reading_a_pack_through_costs_few_requests(large: Place) -> None:
    view = large.elsewhere().view(1)
    meta = view.resolve(b"/f")

    def through() -> None:
        for offset in range(0, meta.size, 128 * 1024):
            assert len(view.blocks_reader.read(view, meta, offset, 128 * 1024)) == 128 * 1024

    counts = large.cost(through)
    assert counts.gets <= 9
    assert counts.bytes_down <= meta.size * 1.05


def test_a_random_read_costs_little(large: Place) -> None:
    view = large.elsewhere().view(1)
    meta = view.resolve(b"/f")
    counts = large.cost(lambda: view.blocks_reader.read(view, meta, 11 * MIB + 5, 4096))
    assert counts.gets == 2  # a page of block rows, and the frame
    assert counts.bytes_down <= 2 * MIB
    assert large.cost(lambda: view.blocks_reader.read(view, meta, 11 * MIB + 9, 4096)).gets == 0


def test_reading_ahead_brings_what_is_then_there(large: Place) -> None:
    history = large.elsewhere()
    view = history.view(1)
    meta = view.resolve(b"/f")
    found = view.blocks(meta.lin, 0, 32)
    view.blocks_reader.prefetch(found)
    history.close()  # waits for what was begun
    begun = [loc for loc in found if loc and view.blocks_reader.has_frame(loc[0], loc[1])]
    assert large.cost(lambda: [view.blocks_reader.block(loc) for loc in begun]).gets == 0


def test_small_files_of_a_directory_come_together(place: Place) -> None:
    for number in range(400):
        (place.tree / f"{number:03}").write_bytes(random.Random(number).randbytes(3000))
    place.sync(max_pack_bytes=32 * MIB)
    history = place.elsewhere()

    def read_all() -> None:
        view = history.view(1)
        for _, _, meta in view.walk():
            assert len(view.blocks_reader.read(view, meta, 0, meta.size)) == meta.size

    assert place.cost(read_all).gets <= 8


def test_a_cold_look_costs_few_requests(place: Place) -> None:
    for number in range(3000):
        (place.tree / f"{number:04}").write_bytes(b"%d" % number)
    place.sync()
    for turn in range(3):
        (place.tree / "0000").write_text(f"turn {turn}")
        place.sync()
    assert len(place.elsewhere().manifest.runs) == 4

    def look() -> None:
        history = place.elsewhere()
        view = history.view(4)
        entries = view.entries(1)
        assert len(view.metas([entry.lin for entry in entries])) == 3000

    counts = place.cost(look)
    # Configuration, listing and reading the policy, head, manifest, and for each of the four runs
    # a footer and a page or two.
    assert counts.requests <= 5 + 4 * 3
    assert counts.bytes_down < MIB

    (place.tree / "0000").write_text("a fifth run: now they are merged")
    place.sync()
    assert len(place.elsewhere().manifest.runs) < 4


def test_a_cold_look_at_a_merged_repository(place: Place) -> None:
    for number in range(2000):
        (place.tree / f"{number:04}").write_bytes(b"%d" % number)
    place.sync()

    def look() -> None:
        view = place.elsewhere().view(1)
        assert len(view.metas([entry.lin for entry in view.entries(1)])) == 2000

    assert place.cost(look).requests <= 10


def test_reading_a_table_through_costs_few_requests(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6000):
        (place.tree / f"{number:04}").write_bytes(b"%d" % number)
    place.sync()
    monkeypatch.setattr(tables, "MIN_SPAN", 16 << 10)
    history = place.elsewhere()
    run = history.manifest.runs[0]
    section = history.tables.section(run.segments[0], Table.METADATA)
    assert section is not None
    size = sum(ref.length for ref in section.pages)
    assert len(section.pages) >= 8 and size > 4 * (16 << 10)

    def page_by_page() -> None:
        for index in range(len(section.pages)):
            history.tables.page(run.segments[0], Table.METADATA, index)

    counts = place.cost(page_by_page)
    assert counts.gets <= 4 and counts.bytes_down == size
    assert place.cost(page_by_page).gets == 0
    streamed = place.elsewhere()
    counts = place.cost(lambda: list(streamed.rows(Table.METADATA)))
    assert counts.gets == 2  # the footer, and all pages


def test_backwards_reading_fetches_no_more_than_it_must(place: Place) -> None:
    for number in range(6000):
        (place.tree / f"{number:04}").write_bytes(b"%d" % number)
    place.sync()
    history = place.elsewhere()
    segment = history.manifest.runs[0].segments[0]
    section = history.tables.section(segment, Table.METADATA)
    assert section is not None
    last = len(section.pages) - 1
    counts = place.cost(lambda: history.tables.page(segment, Table.METADATA, last))
    assert counts == Counts(gets=1, bytes_down=section.pages[last].length)


# -- tables out of packs ---------------------------------------------------------------------


def pack_rows(
    store: object, keyring: Keyring, policy: str, pack: PackRow
) -> list[tuple[Table, Row]]:
    """All rows in the index of a pack, by the format's page alone."""
    name = names.pack(policy, pack.name)
    data: bytes = store.get(name)  # type: ignore[attr-defined]  # a store
    assert len(data) == pack.size
    sealer = keyring.sealer(Kind.PACK, name)
    tail_size, whole = read_tail(data[-TAIL.size :], name)
    assert whole == pack.index_size
    footer: dict[int, Section] = read_footer(sealer, len(data), data[-tail_size:])
    return [
        (Table(table), row)
        for table, section in footer.items()
        for ref in section.pages
        for row in sealed_rows(
            sealer, Table(table), ref, data[ref.offset : ref.offset + ref.length]
        )
    ]


def rebuilt(place: Place, history: History) -> dict[Table, list[Row]]:
    """The tables as they come out of the packs, without a segment."""
    found: dict[Table, dict[object, Row]] = {table: {} for table in Table}
    keyring = history.repository.keyring
    for pack in history.rows(Table.PACKS):
        assert isinstance(pack, PackRow)
        for table, row in pack_rows(place.store, keyring, history.policy.id, pack):
            known = found[table].setdefault(key_of(row), row)
            assert known == row, "two packs differ over one row"
    return {
        table: without_echoes([rows[key] for key in sorted(rows)])  # type: ignore[type-var]  # keys of one table
        for table, rows in found.items()
    }


def without_echoes(rows: list[Row]) -> list[Row]:
    """Without rows that only say again, from a later snapshot on, what was in force before."""
    kept: list[Row] = []
    for row in rows:
        last = kept[-1] if kept else row
        again = isinstance(row, Meta) and msgspec.structs.replace(row, snap=last.snap) == last
        if not again or not kept:
            kept.append(row)
    return kept


def churn(tree: Path, dice: random.Random) -> None:
    """Make, change, move and remove things."""
    for number in range(12):
        path = tree / f"d{dice.randrange(4)}" / f"f{dice.randrange(9)}"
        path.parent.mkdir(exist_ok=True)
        what = dice.randrange(6)
        if what == 0 and path.exists():
            path.unlink()
        elif what == 1 and path.exists():
            path.rename(tree / f"moved{dice.randrange(5)}")
        elif what == 2:
            with open(path, "ab") as file:
                file.write(dice.randbytes(9000))
        elif what == 3 and path.exists():
            os.setxattr(path, b"user.big", dice.randbytes(5000))
        elif what == 4 and path.exists():
            os.truncate(path, dice.randrange(5000))
        else:
            path.write_bytes(dice.randbytes(dice.randrange(20_000)))
        if number == 5 and dice.random() < 0.5:
            old, new = tree / "d1", tree / f"e{dice.randrange(3)}"
            if old.exists() and not new.exists():
                old.rename(new)


@pytest.mark.parametrize("seed", range(3))
def test_tables_rebuilt_from_packs_are_those_of_the_segments(
    place: Place, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small parts: a file of several packs is described by each of them.
    monkeypatch.setattr(attempt, "PART_BYTES", 256 * 1024)
    dice = random.Random(seed)
    (place.tree / "large").write_bytes(dice.randbytes(MIB + 99))
    for turn in range(9):
        churn(place.tree, dice)
        if turn == 4:
            with open(place.tree / "large", "r+b") as file:
                file.seek(600_000)
                file.write(b"changed")
        if turn == 7:
            (place.tree / "large").unlink()
        place.sync()
    history = place.elsewhere()
    assert len(history.manifest.snapshots) == 9
    assert len(history.manifest.runs) < 9  # they were merged on the way
    assert history.manifest.retired
    from_packs = rebuilt(place, history)
    for table, kind in ((Table.METADATA, Meta), (Table.ENTRIES, Entry), (Table.BLOCKS, BlockRow)):
        wanted = list(history.rows(table))
        assert wanted and all(isinstance(row, kind) for row in wanted)
        assert from_packs[table] == wanted
