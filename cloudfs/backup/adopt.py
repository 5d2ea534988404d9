"""Taking over what a sync that did not end had already stored.

Packs that no snapshot names are looked through: each tells in its index which files it holds, by
inode, size and times, and where their blocks lie. The sync under way reads a file with the same
identity, compares digests, and takes the stored block instead of storing it again. A pack from
which something was taken becomes part of the new snapshot; the others stay for reclaiming.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from cloudfs.backup.worker import ADOPTED_KEY
from cloudfs.core.errors import Damaged, NotFound
from cloudfs.core.rows import BlockRow, ItemType, Meta, PackRow, Table
from cloudfs.db.state import SyncState
from cloudfs.format import names
from cloudfs.format.envelope import Sealer
from cloudfs.format.tables import Footer, read_footer, read_tail, sealed_rows
from cloudfs.repo.history import History

_TAIL_BYTES = 256 * 1024


def find_orphans(history: History) -> dict[bytes, int]:
    """Packs in the store that no snapshot names, with their sizes. One request for each 1,000."""
    known = {cast(PackRow, row).name for row in history.rows(Table.PACKS)}
    found = {}
    for info in history.repository.store.list(names.packs(history.policy.id)):
        pack = names.parse_pack(info.name)
        if pack is not None and pack not in known:
            found[pack] = info.size_bytes
    return found


def adopt(history: History, state: SyncState) -> dict[bytes, PackRow]:
    """Note in ``state`` what orphaned packs hold; returns their rows. A request or two a pack."""
    found: dict[bytes, PackRow] = {}
    for pack, size in find_orphans(history).items():
        try:
            rows, index_size = _index(history, pack, size)
            state.put_adopted(_offers(rows))
        except (Damaged, NotFound):
            continue  # it is of no use; nothing names it
        live = size - index_size
        found[pack] = PackRow(pack, 0, size, live, index_size, "", "", 0)
    return found


def _offers(rows: dict[Table, list[object]]) -> Iterator[tuple[bytes, bytes]]:
    identity = {}
    for meta in cast("list[Meta]", rows.get(Table.METADATA, [])):
        if meta.type == ItemType.REGULAR:
            key = ADOPTED_KEY.pack(meta.ino, meta.size, meta.mtime_ns, meta.ctime_ns)
            identity[meta.lin] = key
    for row in cast("list[BlockRow]", rows.get(Table.BLOCKS, [])):
        if row.lin in identity and row.locs:
            base = row.base.to_bytes(8, "big")
            yield identity[row.lin] + base, base + row.locs


def _index(history: History, pack: bytes, size: int) -> tuple[dict[Table, list[object]], int]:
    name = names.pack(history.policy.id, pack)
    store = history.repository.store
    offset = max(0, size - _TAIL_BYTES)
    data = store.get(name, offset, size - offset)
    footer_size, index_size = read_tail(data, name)
    if index_size > len(data):
        offset = size - index_size
        data = store.get(name, max(0, offset), index_size)
    sealer = history.reader.sealer(pack)
    footer = read_footer(sealer, size, data[-footer_size:])
    return _pages(sealer, footer, data, offset), index_size


def _pages(sealer: Sealer, footer: Footer, data: bytes, offset: int) -> dict[Table, list[object]]:
    rows: dict[Table, list[object]] = {}
    for table, section in footer.items():
        found = rows.setdefault(Table(table), [])
        for ref in section.pages:
            start = ref.offset - offset
            found.extend(sealed_rows(sealer, Table(table), ref, data[start : start + ref.length]))
    return rows
