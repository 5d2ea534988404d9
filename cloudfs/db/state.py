"""The local state of one policy's syncs: a record a directory, and what the last sync left.

1. Records are keyed by (LIN, snapshot): those of a sync that is under way lie beside those in
   force and count only once :meth:`finish` has named their snapshot. A sync that dies leaves
   garbage that the next one removes.
2. ``head`` says which manifest and snapshot the records belong to. When the repository is
   elsewhere (another machine synced, or this state was lost), they are rebuilt from it.
3. Where a change source knows inodes and no names, an index says for an inode number which
   directories on record hold a name of it. It follows the records in force.
4. Transactions are not flushed one by one. A stamp says in which boot the environment was last
   written and whether it was closed; after the death of the machine it is thrown away whole, since
   it may be torn, and rebuilt from the repository.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import lmdb
import msgspec

from cloudfs.core.changes import Counts, DirRecord, decode_listing
from cloudfs.db.cache import MAX_READERS, boot_id, reserve_locks

MAP_BYTES = 1 << 40
_HEAD = b"head"
_INDEXED = b"indexed"
_INDEXED_AT_ONCE = 200_000
_CLEAN = "clean"


class Head(msgspec.Struct, array_like=True):
    """What the records belong to. ``running`` says a sync began and did not end."""

    manifest: int = 0
    snapshot: int = 0
    running: bool = False
    counts: Counts = msgspec.field(default_factory=Counts)
    signature: bytes = b""  # of the policy's filters and sources
    taken_ns: int = 0  # when the snapshot was taken: numbers are given again after a rollback
    unread: bool = False  # of old: something could not be read, nobody knows where, so scan
    again: list[int] = []  # LINs of directories in which something could not be read
    unvisited: list[int] = []  # those of them that were not looked into, nor what is below them
    apart: bool = False  # files may be on record as several, each with some of their names


_head_decoder = msgspec.msgpack.Decoder(Head)
_record_decoder = msgspec.msgpack.Decoder(DirRecord)
_encode = msgspec.msgpack.Encoder().encode


class SyncState:
    """The state of one policy. One process writes; others may read at the same time."""

    def __init__(self, directory: Path, *, writer: bool) -> None:
        """Open it, empty where there is none. Raises lmdb.Error where the disk does not allow."""
        self._stamp = directory / "boot"
        self._writer = writer
        if writer:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            stamp = self._stamp.read_text() if self._stamp.exists() else ""
            if stamp not in (_CLEAN, boot_id()):
                shutil.rmtree(directory / "records", ignore_errors=True)
            self._stamp.write_text(boot_id())
            reserve_locks(directory / "records")
        self._env = lmdb.open(
            str(directory / "records"),
            map_size=MAP_BYTES,
            max_dbs=3,
            sync=False,
            readonly=not writer,
            mode=0o600,
            max_readers=MAX_READERS,
            lock=True,
        )
        self._dirs = self._env.open_db(b"dirs", create=writer)
        self._blocks = self._env.open_db(b"adopted", create=writer)
        if writer:
            self._inodes = self._env.open_db(b"inodes", dupsort=True, dupfixed=True)
            with self._env.begin() as txn:
                self._indexed = txn.get(_INDEXED) is not None
        self.head = self._read_head()

    def _read_head(self) -> Head:
        with self._env.begin() as txn:
            data = txn.get(_HEAD)
        return _head_decoder.decode(data) if data else Head()

    def save_head(self, head: Head) -> None:
        """Write the head at once."""
        with self._env.begin(write=True) as txn:
            txn.put(_HEAD, _encode(head))
        self.head = head

    def record(self, lin: int) -> DirRecord | None:
        """The record of a directory in force at the head's snapshot."""
        with self._env.begin(db=self._dirs) as txn, txn.cursor() as cursor:
            found = cursor.set_range(_key(lin, self.head.snapshot + 1))
            found = cursor.prev() if found else cursor.last()
            if not found or cursor.key()[:8] != lin.to_bytes(8, "big"):
                return None
            value = cursor.value()
        return _record_decoder.decode(value) if value else None

    def put_records(self, snapshot: int, records: Iterable[tuple[int, DirRecord | None]]) -> None:
        """Lay down records of the sync that will be ``snapshot``; None for a directory gone."""
        with self._env.begin(write=True, db=self._dirs) as txn:
            for lin, record in records:
                txn.put(_key(lin, snapshot), _encode(record) if record is not None else b"")

    def finish(self, head: Head, changed: Iterable[int]) -> None:
        """Put the records of ``head.snapshot`` in force and drop those of ``changed`` before it."""
        with self._env.begin(write=True, db=self._dirs) as txn, txn.cursor() as cursor:
            for lin in changed:
                self._reindex(txn, lin, head.snapshot)
                found = cursor.set_range(_key(lin, 0))
                while found and cursor.key()[:8] == lin.to_bytes(8, "big"):
                    snapshot = int.from_bytes(cursor.key()[8:], "big")
                    if snapshot < head.snapshot or not cursor.value():
                        found = cursor.delete()
                    else:
                        found = cursor.next()
            txn.put(_HEAD, _encode(head), db=self._env.open_db(None, txn=txn))
        self.head = head

    def amend(self, snapshot: int, lins: Iterable[int]) -> None:
        """Let the records laid down as ``snapshot`` replace those in force, for no snapshot came
        of that sync: what it learnt changes nothing that is in the repository."""
        with self._env.begin(write=True, db=self._dirs) as txn:
            for lin in lins:
                self._reindex(txn, lin, snapshot)
                value = txn.pop(_key(lin, snapshot))
                if value is not None:
                    txn.put(_key(lin, self.head.snapshot), value)

    def staged(self, lin: int, snapshot: int) -> DirRecord | None:
        """A record that the sync under way laid down."""
        with self._env.begin(db=self._dirs) as txn:
            value = txn.get(_key(lin, snapshot))
        return _record_decoder.decode(value) if value else None

    def drop_unfinished(self) -> None:
        """Remove what a sync that did not end laid down."""
        with self._env.begin(write=True, db=self._dirs) as txn, txn.cursor() as cursor:
            found = cursor.first()
            while found:
                if int.from_bytes(cursor.key()[8:], "big") > self.head.snapshot:
                    found = cursor.delete()
                else:
                    found = cursor.next()

    def clear(self) -> None:
        """Forget everything."""
        with self._env.begin(write=True) as txn:
            txn.drop(self._dirs, delete=False)
            txn.drop(self._blocks, delete=False)
            txn.drop(self._inodes, delete=False)
            txn.delete(_INDEXED)
            txn.delete(_HEAD)
        self._indexed = False
        self.head = Head()

    def all_records(self) -> Iterator[tuple[int, DirRecord]]:
        """Every record in force, by LIN."""
        with self._env.begin(db=self._dirs) as txn, txn.cursor() as cursor:
            held: tuple[int, bytes] | None = None
            for key, value in cursor:
                lin, snapshot = int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big")
                if snapshot > self.head.snapshot:
                    continue
                if held and held[0] != lin and held[1]:
                    yield held[0], _record_decoder.decode(held[1])
                held = lin, value
            if held and held[1]:
                yield held[0], _record_decoder.decode(held[1])

    # -- inodes ---------------------------------------------------------------------------------

    def index_inodes(self) -> None:
        """Make the index of inodes, if there is none; from then on it follows the records.

        Reads all records, once.
        """
        if self._indexed:
            return
        with self._env.begin(write=True) as txn:
            txn.drop(self._inodes, delete=False)
        pairs: list[tuple[bytes, bytes]] = []
        for lin, record in self.all_records():
            value = lin.to_bytes(8, "big")
            pairs.extend((inode, value) for inode in _inodes_of(record))
            if len(pairs) >= _INDEXED_AT_ONCE:
                self._add_inodes(pairs)
                pairs = []
        self._add_inodes(pairs)
        with self._env.begin(write=True) as txn:
            txn.put(_INDEXED, b"1")
        self._indexed = True

    def _add_inodes(self, pairs: list[tuple[bytes, bytes]]) -> None:
        with self._env.begin(write=True, db=self._inodes) as txn, txn.cursor() as cursor:
            cursor.putmulti(sorted(pairs))

    def _reindex(self, txn: lmdb.Transaction, lin: int, snapshot: int) -> None:
        """Let the index follow a record laid down as ``snapshot``, which takes force now."""
        value = txn.get(_key(lin, snapshot), db=self._dirs)
        if not self._indexed or value is None:
            return
        record = self.record(lin)  # what was in force till now: this transaction is not done
        before = set(_inodes_of(record)) if record is not None else set()
        after = set(_inodes_of(_record_decoder.decode(value))) if value else set()
        for inode in before - after:
            txn.delete(inode, lin.to_bytes(8, "big"), db=self._inodes)
        for inode in after - before:
            txn.put(inode, lin.to_bytes(8, "big"), db=self._inodes)

    def directories_with(self, inode: int) -> list[int]:
        """LINs of the directories on record that hold a name of this inode number."""
        found = []
        with self._env.begin(db=self._inodes) as txn, txn.cursor() as cursor:
            if cursor.set_key(inode.to_bytes(8, "big")):
                found = [int.from_bytes(value, "big") for value in cursor.iternext_dup()]
        return found

    # -- blocks of syncs that did not end -----------------------------------------------------

    def put_adopted(self, rows: Iterable[tuple[bytes, bytes]]) -> None:
        """Keep block rows by the identity of the file that they were read from."""
        with self._env.begin(write=True, db=self._blocks) as txn:
            for key, value in rows:
                txn.put(key, value)

    def adopted(self, key: bytes) -> list[bytes]:
        """The values whose keys begin with ``key``."""
        found = []
        with self._env.begin(db=self._blocks) as txn, txn.cursor() as cursor:
            more = cursor.set_range(key)
            while more and cursor.key().startswith(key):
                found.append(cursor.value())
                more = cursor.next()
        return found

    def clear_adopted(self) -> None:
        """Forget them."""
        with self._env.begin(write=True) as txn:
            txn.drop(self._blocks, delete=False)

    def close(self) -> None:
        """Flush and close; the next boot can then believe what is here."""
        if self._writer:
            self._env.sync(True)
            self._stamp.write_text(_CLEAN)
        self._env.close()


def read_head(directory: Path) -> Head | None:
    """The head of the state in a directory, for those who only look; None where there is none, or
    none that a sync would believe."""
    try:
        if (directory / "boot").read_text() not in (_CLEAN, boot_id()):
            return None
        with contextlib.closing(SyncState(directory, writer=False)) as state:
            return state.head
    except (OSError, lmdb.Error, msgspec.DecodeError):
        return None


def _inodes_of(record: DirRecord) -> list[bytes]:
    return [stat.ino.to_bytes(8, "big") for stat in decode_listing(record.listing)]


def _key(lin: int, snapshot: int) -> bytes:
    return lin.to_bytes(8, "big") + snapshot.to_bytes(8, "big")
