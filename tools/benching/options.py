"""What the command line chose, for the scenarios that leave a choice."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

SOURCES = ("btrfs", "watch", "live")
MOUNTS = ("bare", "bindfs", "live", "untracked")


@dataclass
class Options:
    """Sizes and parts of scenarios."""

    sizes: tuple[int, ...] = (10_000, 1_000_000)
    """Files of the trees of "changed"."""
    sources: tuple[str, ...] = SOURCES
    mounts: tuple[str, ...] = MOUNTS
    big_bytes: int = 10 << 30
    """Size of the file of "bigfile"."""


chosen = Options()


def some_of(all_of_them: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """A type of argument: names out of these, with commas between them."""

    def read(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        unknown = set(names) - set(all_of_them)
        if unknown:
            wrong, known = ", ".join(sorted(unknown)), ", ".join(all_of_them)
            raise argparse.ArgumentTypeError(f"there is no {wrong}; there are {known}")
        return names

    return read


def sizes(text: str) -> tuple[int, ...]:
    """A type of argument: numbers of files, the least first."""
    try:
        numbers = tuple(sorted(int(word) for word in text.split(",")))
    except ValueError:
        numbers = (0,)
    if any(number <= 0 or number % 10_000 for number in numbers):
        raise argparse.ArgumentTypeError("numbers of files are wanted, multiples of 10000")
    return numbers
