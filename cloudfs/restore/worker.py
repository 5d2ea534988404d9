"""What a worker does in a restore: parts into files. Also used by the coordinator itself.

An item that fails is reported and the others go on. What would fail for all of them (the store
does not answer, the disk is full) ends the part.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import cached_property

import msgspec

from cloudfs.core.errors import Damaged, UsageError
from cloudfs.core.manifest import Manifest
from cloudfs.core.rows import Meta
from cloudfs.repo.history import History
from cloudfs.repo.repository import PolicyRecord, Repository
from cloudfs.repo.view import SnapshotView
from cloudfs.restore.directories import Directories
from cloudfs.restore.frames import Frames
from cloudfs.restore.metadata import Dresser
from cloudfs.restore.values import Item, Part, Piece
from cloudfs.restore.write import Writer
from cloudfs.store.count import Counts as Requests

FATAL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE))


class RestoreContext(msgspec.Struct, frozen=True):
    """What all parts of one restore share. ``identity`` is the target's device and inode."""

    policy: PolicyRecord
    manifest: Manifest
    snapshot: int
    target: bytes
    identity: tuple[int, int]
    owners: str


class Failure(msgspec.Struct, array_like=True):
    """One item that is not there, or not all of whose metadata could be given."""

    directory: int
    name: bytes
    reason: str
    damaged: bool


class Done(msgspec.Struct, array_like=True):
    """What came of a part. ``size`` in bytes."""

    items: int
    size: int
    failures: list[Failure]
    lost: dict[str, int]
    requests: Requests


_works: msgspec.msgpack.Decoder[Item | Piece] = msgspec.msgpack.Decoder(Item | Piece)


class RestoreWorker:
    """One process's side of one restore."""

    def __init__(
        self, repository: Repository, context: RestoreContext, history: History | None = None
    ) -> None:
        """``history`` is shared where this process has one."""
        self._repository = repository
        self._context = context
        self._history = history or History(repository, context.policy, manifest=context.manifest)
        self.directories = Directories(context.target, context.identity)
        self.dresser = Dresser(context.owners)
        self.writer = Writer(self.directories, self.dresser)

    @cached_property
    def _view(self) -> SnapshotView:
        return self._history.view(self._context.snapshot)

    def xattrs(self, meta: Meta) -> dict[bytes, bytes] | None:
        """All extended attributes of an item, large ones too. Raises Damaged, StoreError."""
        return self._view.xattrs(meta) if meta.streams else meta.xattrs

    def run(self, part: Part, stopped: Callable[[], bool] = lambda: False) -> Done:
        """Do one part, or its beginning when it is ``stopped``, which is asked before each item.

        Raises StoreError, and OSError for what would fail for all items.
        """
        before = self._repository.store.counts()
        self.dresser.lost.clear()
        self.directories.use(part.directories)
        frames = Frames(self._history.reader, part.spans)
        failures: list[Failure] = []
        decode = _works.decode
        items = 0
        for coded in part.works:
            if stopped():
                break
            items += 1
            work = decode(coded)
            try:
                if isinstance(work, Item):
                    self.writer.item(work, self.xattrs(work.meta), frames)
                else:
                    self.writer.piece(work, frames)
            except (OSError, Damaged, UsageError) as error:
                failures.append(failure(work.directory, work.name, error))
        self.writer.close()
        requests = self._repository.store.counts() - before
        return Done(items, part.size, failures, dict(self.dresser.lost), requests)

    def close(self) -> None:
        """Close what is open, but not what is shared."""
        self.writer.close()
        self.directories.close()


def failure(directory: int, name: bytes, error: Exception) -> Failure:
    """What to report of an error. Raises it again where it would meet all items."""
    if isinstance(error, OSError):
        if error.errno in FATAL:
            raise error
        return Failure(directory, name, (error.strerror or str(error)).lower(), damaged=False)
    return Failure(directory, name, str(error).rstrip("."), damaged=True)


_worker: tuple[bytes, RestoreWorker] | None = None


def restore_task(context: bytes, part: bytes) -> bytes:
    """Entry point in a worker process: :meth:`RestoreWorker.run` over encoded values."""
    global _worker  # noqa: PLW0603  # a worker process serves one restore
    from cloudfs.repo.pool import repository

    if _worker is None or _worker[0] != context:
        decoded = msgspec.msgpack.decode(context, type=RestoreContext)
        _worker = (context, RestoreWorker(repository(), decoded))
    done = _worker[1].run(msgspec.msgpack.decode(part, type=Part))
    return msgspec.msgpack.encode(done)
