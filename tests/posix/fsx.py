"""Random reads, writes, cuts and mappings of one file, beside a model of it in memory.

1. The file is open several times over: for reading and writing, for writing only, for appending;
   and it is mapped. All see one content, whichever way it was changed.
2. A run is a function of its seed: the same seed does the same things to the same file. When what
   is read is not what the model says, the seed, the step and the last steps are told.
3. Everything is compared when it is read; the whole every so often, and at the end by a descriptor
   that was not open before.
"""

from __future__ import annotations

import argparse
import collections
import mmap
import os
import random
import sys
import time
from collections.abc import Callable

PAGE = mmap.PAGESIZE
LARGEST = 256 * 1024
LONGEST = 24 * 1024
NOISE = random.Random(0).randbytes(LONGEST + (1 << 16))
REMEMBERED = 30

WEIGHTS = {
    "read": 22, "write": 22, "write_only": 8, "append": 5, "map_read": 14, "map_write": 14,
    "cut": 2, "grow": 2, "sync_map": 1, "sync": 1, "vector": 4, "stat": 4, "reopen": 1,
    "copy_range": 1, "whole": 0.2,
}  # fmt: skip


class Differs(AssertionError):
    """The file is not what it should be."""


class Exerciser:
    """One file and its model."""

    def __init__(self, path: str, seed: int, *, largest: int = LARGEST) -> None:
        self._path = path
        self._seed = seed
        self._largest = largest
        self._random = random.Random(seed)
        self._model = bytearray()
        self._step = 0
        self._log: collections.deque[tuple[object, ...]] = collections.deque(maxlen=REMEMBERED)
        self._map: mmap.mmap | None = None
        self._fds: list[int] = []
        os.close(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644))
        self._open()

    def _open(self) -> None:
        ways = (os.O_RDWR, os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_APPEND)
        self._fds = [os.open(self._path, way) for way in ways]
        self._file, self._other, self._writer, self._appender = self._fds

    def _close(self) -> None:
        self._unmap()
        for fd in self._fds:
            os.close(fd)

    def run(self, steps: int, until_s: float = float("inf")) -> int:
        """Do so many steps, or fewer when the (monotonic) clock says so. Raises Differs."""
        names = list(WEIGHTS)
        weights = list(WEIGHTS.values())
        does: dict[str, Callable[[], None]] = {name: getattr(self, f"_{name}") for name in names}
        while self._step < steps and time.monotonic() < until_s:
            for name in self._random.choices(names, weights, k=min(1000, steps - self._step)):
                self._step += 1
                does[name]()
        self._reopen()
        self._whole()
        self._close()
        return self._step

    # -- what is done --------------------------------------------------------------------------

    def _place(self, most: int) -> tuple[int, int]:
        """Where, and how much: small pieces mostly, at the borders of pages often."""
        draw = self._random.random()
        length = int(draw * draw * draw * LONGEST) + 1
        start = int(self._random.random() * most)
        if length & 3 == 0:
            start -= start % PAGE
        return start, length

    def _noise(self, length: int) -> bytes:
        start = int(self._random.random() * (len(NOISE) - length))
        return NOISE[start : start + length]

    def _put(self, start: int, data: bytes) -> None:
        model = self._model
        if start > len(model):
            model.extend(bytes(start - len(model)))
        model[start : start + len(data)] = data

    def _write_by(self, fd: int, name: str) -> None:
        start, length = self._place(min(len(self._model) + PAGE, self._largest))
        length = min(length, self._largest - start)
        data = self._noise(length)
        self._log.append((name, start, length))
        written = os.pwrite(fd, data, start)
        if written != length:
            self._fail(f"{written} bytes were written of {length}")
        self._put(start, data)

    def _write(self) -> None:
        self._write_by(self._file, "write")

    def _write_only(self) -> None:
        self._write_by(self._writer, "write_only")

    def _append(self) -> None:
        length = self._place(1)[1]
        if len(self._model) + length > self._largest:
            return self._cut()
        data = self._noise(length)
        self._log.append(("append", length))
        os.write(self._appender, data)
        self._model += data
        return None

    def _vector(self) -> None:
        start, length = self._place(min(len(self._model) + PAGE, self._largest))
        half = min(length, self._largest - start) // 2
        one, other = self._noise(half), self._noise(half)
        self._log.append(("vector", start, half))
        os.pwritev(self._other, [one, other], start)
        if half:
            self._put(start, one + other)

    def _read(self) -> None:
        start, length = self._place(len(self._model) + 1)
        self._log.append(("read", start, length))
        self._same(os.pread(self._other, length, start), start, length)

    def _cut(self) -> None:
        size = int(self._random.random() * (len(self._model) + 1))
        self._log.append(("cut", size))
        if size & 1:
            os.ftruncate(self._file, size)
        else:
            os.truncate(self._path, size)
        del self._model[size:]

    def _grow(self) -> None:
        size = int(len(self._model) + self._random.random() * 3 * PAGE)
        if size > self._largest:
            return self._cut()
        self._log.append(("grow", size))
        os.ftruncate(self._writer, size)
        self._model.extend(bytes(size - len(self._model)))
        return None

    def _copy_range(self) -> None:
        """Within the file, from one part to another that does not overlap it."""
        half = len(self._model) // 2
        if half < 2:
            return
        length = int(self._random.random() * min(half, LONGEST)) + 1
        self._log.append(("copy_range", length, half))
        if os.copy_file_range(self._file, self._other, length, 0, half) != length:
            self._fail("less was copied")
        self._put(half, bytes(self._model[:length]))

    # -- mappings ------------------------------------------------------------------------------

    def _mapping(self) -> mmap.mmap | None:
        """A mapping of all that is there; what was mapped before it grew is mapped anew."""
        size = len(self._model)
        if not size:
            return None
        if self._map is None or self._mapped < size:
            self._unmap()
            self._mapped = min(-(-size // PAGE) * PAGE + 4 * PAGE, self._largest + PAGE)
            os.ftruncate(self._other, self._mapped)  # Python maps only what is there
            self._map = mmap.mmap(self._other, self._mapped)
            os.ftruncate(self._other, size)
        return self._map

    def _unmap(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None

    def _map_read(self) -> None:
        mapped = self._mapping()
        if mapped is not None:
            start, length = self._place(len(self._model))
            length = min(length, len(self._model) - start)
            self._log.append(("map_read", start, length))
            self._same(mapped[start : start + length], start, length)

    def _map_write(self) -> None:
        mapped = self._mapping()
        if mapped is not None:
            start, length = self._place(len(self._model))
            length = min(length, len(self._model) - start)
            data = self._noise(length)
            self._log.append(("map_write", start, length))
            mapped[start : start + length] = data
            self._model[start : start + length] = data

    def _sync_map(self) -> None:
        self._log.append(("sync_map",))
        whole_pages = len(self._model) // PAGE * PAGE
        if self._map is not None and whole_pages:
            self._map.flush(0, min(whole_pages, self._mapped))

    # -- the rest ------------------------------------------------------------------------------

    def _sync(self) -> None:
        self._log.append(("sync",))
        os.fdatasync(self._file)

    def _stat(self) -> None:
        for size in (os.fstat(self._other).st_size, os.stat(self._path).st_size):
            if size != len(self._model):
                self._fail(f"the size is {size} instead of {len(self._model)}")

    def _reopen(self) -> None:
        self._log.append(("reopen",))
        self._close()
        self._open()

    def _whole(self) -> None:
        self._log.append(("whole",))
        self._stat()
        self._same(os.pread(self._file, self._largest + 1, 0), 0, self._largest + 1)

    # -- comparing -----------------------------------------------------------------------------

    def _same(self, found: bytes, start: int, length: int) -> None:
        wanted = self._model[start : start + length]
        if found == wanted:
            return
        if len(found) != len(wanted):
            self._fail(f"{len(found)} bytes at {start} instead of {len(wanted)}")
        first = next(
            i for i, pair in enumerate(zip(found, wanted, strict=True)) if len({*pair}) > 1
        )
        count = sum(a != b for a, b in zip(found, wanted, strict=True))
        self._fail(f"{count} bytes from {start + first} on are others than they should be")

    def _fail(self, what: str) -> None:
        steps = "\n".join(
            f"  {self._step - i}: {step}" for i, step in enumerate(reversed(self._log))
        )
        raise Differs(f"seed {self._seed}, step {self._step}: {what}; the last steps:\n{steps}")


def main() -> int:
    """Exercise one file, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100_000)
    options = parser.parse_args()
    began = time.monotonic()
    try:
        done = Exerciser(options.path, options.seed).run(options.steps)
    except Differs as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{done} steps, {done / (time.monotonic() - began):.0f} a second")
    return 0


if __name__ == "__main__":
    sys.exit(main())
