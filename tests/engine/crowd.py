"""A crowd: processes that do anything to one tree at the same time, between two words of a test.

``python -m tests.engine.crowd TOP SEED MOOD`` is one of them. It begins at ``goon``, says ``.``
when it was told to ``stop``, and at ``drop`` also has nothing open any more.
"""

from __future__ import annotations

import errno
import inspect
import os
import random
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.engine.hands import Hands, Operation

NAMES = [b"a", b"b", b"c\n", b"\xff\xfe", b"long-name" * 8]
SIZES = [0, 1, 4095, 4096, 4097, 9000, 40_000, 300_000]
OFFSETS = [0, 1, 4095, 4096, 9000, 16_384, 20_000, 40_000, 150_000]

DEEDS = [
    "write", "overwrite", "append", "append_by_two", "truncate", "cut_on_opening",
    "change_keeping_mtime", "write_far_beyond", "punch", "copy_range", "clone", "hold",
    "write_held", "cut_held", "change_held", "let_go", "rename", "rename_to_free",
    "exchange", "link", "remove", "replace", "make_socket", "attributes", "put_times_back",
    "xattr", "storm", "move_out", "move_in",
]  # fmt: skip
"""What hands do, but for mappings: where somebody else cuts the file, they end who maps it."""

RESTLESS: list[tuple[str, dict[str, int]]] = [
    *[("exchange", {"a": 1, "b": 1})] * 3,
    ("move_out", {"parts": 1}),
    ("move_in", {"parts": 1}),
    ("write", {"parts": 2}),
    ("replace", {"parts": 2}),
    *[("link", {"a": 2, "b": 3}), ("link", {"a": 3, "b": 3})] * 2,
    ("remove", {"parts": 2}),
    ("remove", {"parts": 3}),
]
"""What it does who has no rest, and how deep: directories at the top change places all the time,
and files get and lose names in those below."""

ARGUMENTS: dict[str, Callable[[random.Random], object]] = {
    **dict.fromkeys(("parts", "a", "b"), lambda dice: dice.choices(NAMES, k=dice.randint(1, 3))),
    **dict.fromkeys(("append", "remove"), lambda dice: dice.random() < 0.5),
    "size": lambda dice: dice.choice(SIZES),
    "offset": lambda dice: dice.choice(OFFSETS),
    "seed": lambda dice: dice.getrandbits(32),
    "mode": lambda dice: dice.choice([0o600, 0o755, 0o4711, 0o1777]),
    "uid": lambda dice: dice.randrange(10),
    # Not a fifo: who found a file there a moment ago would wait for a reader for ever.
    "kind": lambda dice: dice.choice(["dir", "link", "device"]),
}

NOT_AS_EXPECTED = {
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENOTEMPTY,
    errno.EINVAL,
    errno.ELOOP,
    errno.EXDEV,
    errno.ENXIO,
    errno.EBADF,
    errno.ENODATA,
}
"""What one meets where others were in between. Anything else is a fault of the mount."""


def deed(dice: random.Random, mood: str) -> Operation:
    """Anything, or what one does who is restless."""
    name, depths = dice.choice(RESTLESS) if mood == "restless" else (dice.choice(DEEDS), {})
    wanted = list(inspect.signature(getattr(Hands, name)).parameters)[1:]
    arguments = {argument: ARGUMENTS[argument](dice) for argument in wanted}
    arguments |= {argument: dice.choices(NAMES, k=depth) for argument, depth in depths.items()}
    if depths and name == "replace":
        arguments["kind"] = "dir"
    return name, arguments


def live(top: str, seed: int, mood: str) -> None:
    """Do as one is told, until there is nobody who tells."""
    hands, dice = Hands(os.fsencode(top)), random.Random(seed)
    poll = select.poll()
    poll.register(0, select.POLLIN)
    while word := os.read(0, 4):
        if word == b"drop":
            hands.let_go()
        while word == b"goon" and not poll.poll(0):
            try:
                hands.do(deed(dice, mood))
            except OSError as error:
                if error.errno not in NOT_AS_EXPECTED:
                    raise
        if word != b"goon":
            os.write(1, b".")


class Crowd:
    """Some processes at work on a tree."""

    def __init__(self, top: Path, seeds: list[int], mood: str) -> None:
        self._members = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.engine.crowd", str(top), str(seed), mood],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
            )
            for seed in seeds
        ]

    def _tell(self, word: bytes) -> None:
        for member in self._members:
            assert member.stdin is not None
            member.stdin.write(word)

    def go_on(self) -> None:
        """Let them do what they like."""
        self._tell(b"goon")

    def stop(self, word: bytes = b"stop") -> None:
        """Have each end what it does, and begin with nothing new."""
        self._tell(word)
        for member in self._members:
            assert member.stdout is not None
            assert member.stdout.read(1), "somebody met an error that none should"

    def drop(self) -> None:
        """And have nothing open."""
        self.stop(b"drop")

    def end(self) -> None:
        """Be gone."""
        for member in self._members:
            member.kill()
        for member in self._members:
            member.wait(60)
            for line in (member.stdin, member.stdout):
                assert line is not None
                line.close()


@contextmanager
def crowd(top: Path, seeds: list[int], mood: str) -> Iterator[Crowd]:
    """A crowd that does nothing yet, and is gone in the end; ``mood`` as of :func:`deed`."""
    made = Crowd(top, seeds, mood)
    try:
        yield made
    finally:
        made.end()


if __name__ == "__main__":
    live(sys.argv[1], int(sys.argv[2]), sys.argv[3])
