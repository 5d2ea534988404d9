"""Reading blocks: stitching a file's bytes out of frames, frames out of packs.

1. A pack is read in *chunks* of CHUNK bytes as they are stored. A frame that is wanted brings the
   chunks that it covers; neighbouring missing chunks come by one request.
2. Whoever goes on where the last request for a pack ended is reading it through: the span doubles
   up to MAX_SPAN. So a large file, or a directory of many small ones, costs few requests, and a
   single random read one small one.
3. Chunks are kept, sealed, in the local cache (not where the store is a local directory, which is
   as near). Decoded frames are kept in memory within FRAMES_IN_MEMORY.
4. Each frame is opened under its pack's key at its offset, each block is compared with its digest.
   A cached chunk that does not verify is dropped and fetched again, once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import xxhash

from cloudfs.core.errors import Damaged, NotFound, StoreError
from cloudfs.core.rows import Location, Meta
from cloudfs.db.cache import BlobCache
from cloudfs.format import names
from cloudfs.format.envelope import Keyring, Kind, Sealer, decode
from cloudfs.format.tables import MAX_FRAME
from cloudfs.store.base import Store

CHUNK = 256 * 1024
MAX_SPAN = 8 << 20
FRAMES_IN_MEMORY = 48 << 20
CHUNKS_IN_MEMORY = 32 << 20
PREFETCH_THREADS = 4


class BlockMap(Protocol):
    """What says where a file's blocks lie: a snapshot, to whoever reads it."""

    def blocks(self, lin: int, first: int, count: int) -> list[Location | None]:
        """Where ``count`` blocks from block ``first`` on lie; None for a hole."""


class _Bounded:
    """Values by key, least recently used dropped first beyond a bound in bytes."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._size = 0
        self._values: OrderedDict[tuple[bytes, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[bytes, int]) -> bytes | None:
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
            return value

    def put(self, key: tuple[bytes, int], value: bytes) -> None:
        with self._lock:
            old = self._values.pop(key, None)
            self._size += len(value) - (len(old) if old is not None else 0)
            self._values[key] = value
            while self._size > self._limit and len(self._values) > 1:
                self._size -= len(self._values.popitem(last=False)[1])

    def pop(self, key: tuple[bytes, int]) -> None:
        with self._lock:
            self._size -= len(self._values.pop(key, b""))


class BlockReader:
    """Frames and blocks of one policy's packs. Methods block; safe to share between threads."""

    def __init__(
        self, store: Store, keyring: Keyring, cache: BlobCache | None, policy_id: str
    ) -> None:
        self._store = store
        self._keyring = keyring
        self._cache = cache
        self._policy_id = policy_id
        self._lock = threading.Lock()
        self._frames = _Bounded(FRAMES_IN_MEMORY)
        self._chunks = _Bounded(CHUNKS_IN_MEMORY)
        self._sealers: dict[bytes, Sealer] = {}
        self._streaks: dict[bytes, tuple[int, int]] = {}
        self._locks: dict[bytes, threading.Lock] = {}
        self._threads: ThreadPoolExecutor | None = None

    def sealer(self, pack: bytes) -> Sealer:
        """What opens the parts of a pack."""
        found = self._sealers.get(pack)
        if found is None:
            name = names.pack(self._policy_id, pack)
            found = self._sealers[pack] = self._keyring.sealer(Kind.PACK, name)
        return found

    # -- files -----------------------------------------------------------------------------

    def read(self, where: BlockMap, meta: Meta, offset: int, size: int) -> bytes:
        """The bytes of a file from ``offset`` on; fewer than ``size`` only at its end.

        Raises Damaged when what is stored is not what was backed up.
        """
        size = min(size, meta.size - offset)
        if size <= 0:
            return b""
        block_size = meta.block_size
        first, last = offset // block_size, (offset + size - 1) // block_size
        found = where.blocks(meta.lin, first, last - first + 1)
        parts = []
        for number, location in enumerate(found, start=first):
            start = number * block_size
            length = min(block_size, meta.size - start)
            low, high = max(offset - start, 0), min(offset + size - start, length)
            if location is None:
                parts.append(bytes(high - low))
            else:
                if location.length != length:
                    raise Damaged(
                        f"the tables are damaged (a block of LIN {meta.lin} is too short)."
                    )
                parts.append(self.block(location)[low:high])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def block(self, location: Location) -> bytes:
        """One block, verified."""
        frame = self.frame(location.pack, location.frame_offset, location.frame_length)
        block = frame[location.offset : location.offset + location.length]
        self.verify(location, block)
        return block

    def verify(self, location: Location, block: bytes | memoryview) -> None:
        """Raise Damaged unless the block is the one that was hashed when it was read."""
        if xxhash.xxh3_128_digest(block, self._keyring.digest_seed) != location.digest:
            raise Damaged(
                f"{names.pack(self._policy_id, location.pack)} is damaged"
                " (a block is not what was backed up)."
            )

    # -- frames ----------------------------------------------------------------------------

    def has_frame(self, pack: bytes, offset: int) -> bool:
        """Whether the plain frame is in memory, so that reading it does not block."""
        return self._frames.get((pack, offset)) is not None

    def frame(self, pack: bytes, offset: int, length: int) -> bytes:
        """The plain content of one frame."""
        plain = self._frames.get((pack, offset))
        if plain is None:
            with self._lock:
                lock = self._locks.setdefault(pack, threading.Lock())
            # One request for a pack at a time: who comes second most likely wants its neighbour.
            with lock:
                plain = self._frames.get((pack, offset))
                if plain is None:
                    plain = self._load(pack, offset, length)
                    self._frames.put((pack, offset), plain)
        return plain

    def _load(self, pack: bytes, offset: int, length: int) -> bytes:
        try:
            return self.open_frame(pack, offset, self._stored(pack, offset, length))
        except Damaged:
            if not self._forget(pack, offset, length):
                raise
        return self.open_frame(pack, offset, self._stored(pack, offset, length))

    def open_frame(self, pack: bytes, offset: int, sealed: bytes | memoryview) -> bytes:
        """The plain content of a frame out of its stored bytes."""
        sealer = self.sealer(pack)
        return decode(sealer.open(offset, sealed), sealer.name, MAX_FRAME)

    def _stored(self, pack: bytes, offset: int, length: int) -> bytes:
        first, last = offset // CHUNK, (offset + length - 1) // CHUNK
        chunks = [self._cached(pack, number) for number in range(first, last + 1)]
        missing = [first + i for i, chunk in enumerate(chunks) if chunk is None]
        if missing:
            fetched = self._fetch(pack, missing[0], missing[-1])
            for number in range(missing[0], missing[-1] + 1):
                chunks[number - first] = fetched.get(number, b"")
        joined = b"".join(chunk or b"" for chunk in chunks)
        start = offset - first * CHUNK
        return joined[start : start + length]

    def _cached(self, pack: bytes, number: int) -> bytes | None:
        key = (pack, number)
        chunk = self._chunks.get(key)
        if chunk is None and self._cache is not None:
            chunk = self._cache.get(_chunk_key(key))
            if chunk is not None:
                self._chunks.put(key, chunk)
        return chunk

    def _fetch(self, pack: bytes, first: int, last: int) -> dict[int, bytes]:
        """Chunks ``first`` to ``last``, and as many after them as rule 2 suggests."""
        expected, span = self._streaks.get(pack, (-1, CHUNK))
        span = min(span * 2, MAX_SPAN) if expected == first else CHUNK
        count = max(last - first + 1, span // CHUNK)
        self._streaks[pack] = (first + count, count * CHUNK)
        data = self._get(pack, first * CHUNK, count * CHUNK)
        found = {
            first + i: data[i * CHUNK : (i + 1) * CHUNK] for i in range(-(-len(data) // CHUNK))
        }
        for number, chunk in found.items():
            self._chunks.put((pack, number), chunk)
        if self._cache is not None:
            self._cache.put((_chunk_key((pack, n)), chunk) for n, chunk in found.items())
        return found

    def _get(self, pack: bytes, offset: int, length: int) -> bytes:
        name = names.pack(self._policy_id, pack)
        try:
            return self._store.get(name, offset, length)
        except NotFound:
            raise Damaged(f"{name} is missing from {self._store.url}.") from None

    def _forget(self, pack: bytes, offset: int, length: int) -> bool:
        """Drop the cached chunks of a frame that did not verify; True if there were any."""
        found = False
        for number in range(offset // CHUNK, (offset + length - 1) // CHUNK + 1):
            found |= self._cached(pack, number) is not None
            self._chunks.pop((pack, number))
            if self._cache is not None:
                self._cache.discard(_chunk_key((pack, number)))
        return found

    def span(self, pack: bytes, offset: int, length: int) -> bytes:
        """Stored bytes of a pack by one request, past every cache: for who reads packs through."""
        data = self._get(pack, offset, length)
        if len(data) != length:
            raise Damaged(f"{names.pack(self._policy_id, pack)} is damaged (cut short).")
        return data

    # -- reading ahead ---------------------------------------------------------------------

    def prefetch(self, locations: Sequence[Location | None]) -> None:
        """Begin to bring the frames of these blocks in the background. Errors show when read."""
        frames = dict.fromkeys(
            (loc.pack, loc.frame_offset, loc.frame_length) for loc in locations if loc is not None
        )
        wanted = [frame for frame in frames if not self.has_frame(frame[0], frame[1])]
        if wanted and self._threads is None:
            self._threads = ThreadPoolExecutor(PREFETCH_THREADS, "prefetch")
        for frame in wanted:
            assert self._threads is not None
            self._threads.submit(_quietly(self.frame), *frame)

    def close(self) -> None:
        """Stop reading ahead."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)


def _chunk_key(key: tuple[bytes, int]) -> bytes:
    return b"chunk" + key[0] + key[1].to_bytes(4, "big")


def _quietly(read: Callable[[bytes, int, int], bytes]) -> Callable[[bytes, int, int], None]:
    def run(pack: bytes, offset: int, length: int) -> None:
        try:
            read(pack, offset, length)
        except (StoreError, Damaged):
            pass  # the reader itself will meet it, and say so

    return run
