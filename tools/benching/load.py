#!/usr/bin/env python3
"""Put one kind of load on a directory, and print as JSON what it took.

    load.py write|read|random|create|stat|unlink DIR [--bytes N] [--count N]

"write" makes a file of --bytes that "read" reads; "random" writes 4 KiB --count times within a file
of its own of --bytes; "create" makes --count files that "stat" looks at and "unlink" removes.
Printed are seconds and the amount: bytes, or operations. Nothing of cloudfs is imported here.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable

MIB = 1 << 20
PAGE = 4096
FILES_EACH = 1000


def write(top: str, size: int, count: int) -> tuple[float, int]:
    """A file from its beginning to its end, 1 MiB at a time."""
    piece = os.urandom(MIB)
    started = time.perf_counter()
    with open(f"{top}/stream", "wb", buffering=0) as file:
        for _ in range(size // MIB):
            file.write(piece)
    return time.perf_counter() - started, size // MIB * MIB


def read(top: str, size: int, count: int) -> tuple[float, int]:
    """The same file, 1 MiB at a time."""
    into, total = bytearray(MIB), 0
    started = time.perf_counter()
    with open(f"{top}/stream", "rb", buffering=0) as file:
        while got := file.readinto(into):
            total += got
    return time.perf_counter() - started, total


def random_writes(top: str, size: int, count: int) -> tuple[float, int]:
    """4 KiB at places of a file that is there."""
    write_at = random.Random(1)
    places = [write_at.randrange(size // PAGE) * PAGE for _ in range(count)]
    piece = os.urandom(PAGE)
    descriptor = os.open(f"{top}/random", os.O_RDWR | os.O_CREAT)
    for start in range(0, size, MIB):
        os.pwrite(descriptor, bytes(min(MIB, size - start)), start)
    started = time.perf_counter()
    for place in places:
        os.pwrite(descriptor, piece, place)
    took = time.perf_counter() - started
    os.close(descriptor)
    return took, count


def _names(top: str, count: int) -> list[str]:
    return [f"{top}/files/{n // FILES_EACH:03}/{n % FILES_EACH:03}" for n in range(count)]


def create(top: str, size: int, count: int) -> tuple[float, int]:
    """Empty files, a thousand in each directory."""
    for number in range(-(-count // FILES_EACH)):
        os.makedirs(f"{top}/files/{number:03}")
    return _each(lambda name: os.close(os.open(name, os.O_CREAT | os.O_EXCL)), top, count)


def stat(top: str, size: int, count: int) -> tuple[float, int]:
    """Look at each of them."""
    return _each(os.stat, top, count)


def unlink(top: str, size: int, count: int) -> tuple[float, int]:
    """Remove each of them."""
    return _each(os.unlink, top, count)


def _each(act: Callable[[str], object], top: str, count: int) -> tuple[float, int]:
    names = _names(top, count)
    started = time.perf_counter()
    for name in names:
        act(name)
    return time.perf_counter() - started, count


LOADS = {
    "write": write,
    "read": read,
    "random": random_writes,
    "create": create,
    "stat": stat,
    "unlink": unlink,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("load", choices=LOADS)
    parser.add_argument("directory")
    parser.add_argument("--bytes", type=int, default=1 << 30)
    parser.add_argument("--count", type=int, default=20_000)
    given = parser.parse_args()
    seconds, amount = LOADS[given.load](given.directory, given.bytes, given.count)
    print(json.dumps({"load": given.load, "seconds": seconds, "amount": amount}))


if __name__ == "__main__":
    main()
