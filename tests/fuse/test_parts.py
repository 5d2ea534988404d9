"""The parts of the view without a mount: patience, listings, reading, handlers that fail."""

from __future__ import annotations

import errno
import logging
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
import trio

from cloudfs.core.errors import Damaged, Unavailable
from cloudfs.core.rows import Entry, ItemType, Meta
from cloudfs.fuse.inodes import lin_ino
from cloudfs.fuse.listing import BATCH, SnapshotListing
from cloudfs.fuse.patience import PatientStore, WouldBlock
from cloudfs.fuse.reading import OpenFile
from cloudfs.fuse.tree import Tree
from cloudfs.fuse.turns import HOOK
from cloudfs.fuse.view import View
from cloudfs.repo.history import History
from cloudfs.repo.repository import Repository
from cloudfs.store.open import open_store
from tests.fuse.conftest import BLOCK, Bench

CONTEXT: Any = None


def far_tree(bench: Bench) -> tuple[Tree, PatientStore]:
    """The tree over a store that counts, with nothing cached, as if it were far away."""
    store = PatientStore(open_store(bench.url, bench.options))
    repository = Repository.reopen(store, bench.repository.opening, bench.local)
    history = History(repository, bench.policies["home"])
    return Tree([history], uid=0, gid=0), store


class FakeRows:
    """A snapshot of one directory, as a hostile repository could have it."""

    def __init__(self, names: list[tuple[bytes, int]]) -> None:
        self._entries = [Entry(1, name, 1, lin, ItemType.REGULAR) for name, lin in names]

    def entries(self, lin: int) -> list[Entry]:
        """See SnapshotView."""
        return self._entries

    def metas(self, lins: list[int]) -> list[Meta | None]:
        """See SnapshotView; LIN 7 has none."""
        return [None if lin == 7 else Meta(lin, 1, ItemType.REGULAR) for lin in lins]


def listing(names: list[tuple[bytes, int]]) -> SnapshotListing:
    """The listing of a fake directory."""
    return SnapshotListing(FakeRows(names), 3, 1)  # type: ignore[arg-type]  # all that it uses


@pytest.mark.parametrize(
    "bad", [b"", b".", b"..", b"a/b", b"/", b"nul\0", b"x" * 256], ids=lambda name: name[:4].hex()
)
def test_names_that_cannot_be_are_passed_over(bad: bytes, caplog: pytest.LogCaptureFixture) -> None:
    found = listing([(bad, 2), (b"good", 3)]).batch(0)
    assert [(name, ino) for name, ino, _ in found] == [(b"good", lin_ino(3, 3))]
    assert "cannot be shown" in caplog.text


def test_lins_that_are_too_large_are_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    found = listing([(b"bad", 1 << 40), (b"good", 3)]).batch(0)
    assert [name for name, _, _ in found] == [b"good"]
    assert "cannot be shown" in caplog.text


def test_what_has_no_metadata_is_listed_all_the_same() -> None:
    found = listing([(b"damaged", 7), (b"good", 3)]).batch(0)
    assert [(name, meta is None) for name, _, meta in found] == [
        (b"damaged", True),
        (b"good", False),
    ]


def test_a_listing_can_be_read_from_anywhere() -> None:
    names = [(b"%06d" % i, i + 2 if i != 5 else 2) for i in range(2 * BATCH + 7)]
    found = listing(names)
    for start in (0, 1, BATCH - 1, BATCH, 3, 2 * BATCH + 6):
        assert found.batch(start)[0][0] == names[start][0]
    position = 0
    seen = []
    while batch := found.batch(position):
        seen += [name for name, _, _ in batch]
        position += len(batch)
    assert seen == [name for name, _ in names]


def test_only_one_thread_may_not_wait(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    bench.sync(tmp_path / "tree")
    store = PatientStore(open_store(bench.url, bench.options))
    assert store.get("cloudfs.json")
    store.refuse_here()
    with pytest.raises(WouldBlock):
        store.get("cloudfs.json")
    with pytest.raises(WouldBlock):
        store.list("")
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(store.get("cloudfs.json")))
    thread.start()
    thread.join()
    assert found[0].startswith(b"{")
    assert store.counts().gets == 2


def test_a_store_that_is_down_is_not_asked_again_at_once(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    bench.sync(tmp_path / "tree")
    now_s = 0.0
    opened = open_store(bench.url, bench.options)
    store = PatientStore(opened, lambda: now_s)
    get, asked = opened.get, []

    def fail(name: str, *_others: object) -> bytes:
        asked.append(name)
        raise Unavailable("it does not answer.")

    opened.get = fail  # type: ignore[method-assign,assignment]
    for now_s in (0.0, 1.0, 4.9, 5.0):
        with pytest.raises(Unavailable, match="does not answer"):
            store.get(f"{now_s}")
    assert asked == ["0.0", "5.0"]
    opened.get = get  # type: ignore[method-assign]
    now_s = 11.0
    assert store.get("cloudfs.json")
    assert store.get("cloudfs.json")


def test_small_files_cost_a_request_for_many(bench: Bench, tmp_path: Path) -> None:
    """Reading 400 files of 20 KB in the order of the directory; 5,700 may take 100 requests."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(400):
        (tree / f"{number:03}").write_bytes(os.urandom(20_000))
    bench.sync(tree)
    shown, store = far_tree(bench)
    before = store.counts().gets
    for name, ino, meta in shown.listing(lin_ino(1, 1)).batch(0):
        assert meta is not None
        opened = OpenFile(shown.view(1), meta)
        assert bytes(opened.fetch(0, 1 << 20)) == (tree / os.fsdecode(name)).read_bytes(), ino
    assert store.counts().gets - before <= 20


def test_reading_through_reads_ahead_and_jumping_about_does_not(
    bench: Bench, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    data = os.urandom(24 << 20)
    (tree / "file").write_bytes(data)
    bench.sync(tree)
    shown, _ = far_tree(bench)
    found = shown.lookup(lin_ino(1, 1), b"file")
    assert found is not None
    opened = OpenFile(shown.view(1), found[1])
    with pytest.raises(WouldBlock):
        opened.read(0, BLOCK, wait=False)
    assert bytes(opened.fetch(0, BLOCK)) == data[:BLOCK]
    assert opened.wants_ahead(0, BLOCK)
    opened.read_ahead()
    assert not opened.wants_ahead(BLOCK, BLOCK)  # enough is under way
    shown.branches[0].history.reader.close()  # waits for what is under way
    jumping = OpenFile(shown.view(1), found[1])
    assert not jumping.wants_ahead(20 << 20, BLOCK)
    assert not jumping.wants_ahead(9 << 20, BLOCK)


def test_a_file_without_block_size_is_damaged() -> None:
    fake: Any = SimpleNamespace(blocks_reader=None)
    with pytest.raises(Damaged, match="no block size"):
        OpenFile(fake, Meta(5, 1, ItemType.REGULAR, size=1))


def test_no_exception_leaves_a_handler(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tree").mkdir()
    bench.sync(tmp_path / "tree")
    shown, _ = far_tree(bench)
    view = View(shown, refresh_s=1000)
    ino = lin_ino(1, 1)

    def ask() -> int:
        with pytest.raises(pyfuse3.FUSEError) as raised:
            trio.run(view.getattr, ino, CONTEXT)
        return raised.value.errno

    monkeypatch.setattr(shown, "meta", lambda ino: 1 // 0)
    assert ask() == errno.EIO
    assert "ZeroDivisionError" in caplog.text
    caplog.clear()

    def damaged(ino: int) -> Meta:
        raise Damaged("segment 5 is damaged (cut short).")

    monkeypatch.setattr(shown, "meta", damaged)
    assert [ask(), ask()] == [errno.EIO, errno.EIO]
    assert caplog.record_tuples == [
        ("cloudfs.fuse.view", logging.ERROR, "segment 5 is damaged (cut short).")
    ]


def test_pyfuse3_still_has_what_turns_replaces() -> None:
    """Without it all works, but a quarter more slowly; an upgrade that drops it must be noticed."""
    assert hasattr(pyfuse3, HOOK)


def test_flush_is_answered_once_for_all(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    bench.sync(tmp_path / "tree")
    view = View(far_tree(bench)[0], refresh_s=1000)
    with pytest.raises(pyfuse3.FUSEError) as raised:
        trio.run(view.flush, 1)
    assert raised.value.errno == errno.ENOSYS


def test_nothing_is_kept_for_what_was_looked_up(bench: Bench, tmp_path: Path) -> None:
    """Open files and directories are let go when they are closed; names are never held."""
    (tmp_path / "tree").mkdir()
    for number in range(50):
        (tmp_path / "tree" / str(number)).write_text("x")
    bench.sync(tmp_path / "tree")
    view = View(far_tree(bench)[0], refresh_s=1000)

    async def use() -> None:
        for number in range(50):
            entry = await view.lookup(lin_ino(1, 1), b"%d" % number, CONTEXT)
            ino = entry.st_ino
            opened = await view.open(ino, os.O_RDONLY, CONTEXT)
            assert bytes(await view.read(opened.fh, 0, 4096)) == b"x"
            await view.release(opened.fh)
        handle = await view.opendir(lin_ino(1, 1), CONTEXT)
        await view.releasedir(handle)

    def sizes() -> dict[str, int]:
        return {key: len(held) for key, held in vars(view).items() if hasattr(held, "__len__")}

    before = sizes()
    trio.run(use)
    assert sizes() == before
