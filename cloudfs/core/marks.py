"""Which blocks of a file were written to: a set that stays small for any pattern of writes.

Blocks are kept as bits in groups of GROUP blocks, so that a file overwritten at random everywhere
costs a bit a block; a file that was cut short, or that is new, is one number: the block from which
on everything may be another.
"""

from __future__ import annotations

from collections.abc import Iterator

GROUP = 1024
"""Blocks in one group; a group's bits are one value in the local state."""

NEVER = 1 << 60
"""More blocks than any file has."""


class Blocks:
    """A set of block numbers."""

    __slots__ = ("groups", "tail")

    def __init__(self, tail: int = NEVER) -> None:
        self.groups: dict[int, int] = {}
        self.tail = tail  # from this block on all are in the set

    def covers(self, first: int, last: int) -> bool:
        """Whether all blocks from ``first`` to ``last`` are in the set."""
        if first >= self.tail:
            return True
        last = min(last, self.tail - 1)
        group = first >> 10
        if last >> 10 == group:
            wanted = ((2 << (last - first)) - 1) << (first & 1023)
            return self.groups.get(group, 0) & wanted == wanted
        return all(self.covers(*part) for part in _by_group(first, last))

    def touches(self, first: int, last: int) -> bool:
        """Whether any of the blocks from ``first`` to ``last`` is in the set."""
        return last >= self.tail or any(
            self.groups.get(start >> 10, 0) >> (start & 1023) & ((2 << (end - start)) - 1)
            for start, end in _by_group(first, last)
        )

    def add(self, first: int, last: int) -> list[int]:
        """Add the blocks from ``first`` to ``last``; returns the groups that were changed."""
        changed = []
        for start, end in _by_group(first, min(last, self.tail - 1)):
            group = start >> 10
            before = self.groups.get(group, 0)
            after = before | ((2 << (end - start)) - 1) << (start & 1023)
            if after != before:
                self.groups[group] = after
                changed.append(group)
        return changed

    def cut(self, first: int) -> bool:
        """Add all blocks from ``first`` on; whether that says anything new."""
        if first >= self.tail:
            return False
        self.tail = first
        return True

    def merge(self, other: Blocks) -> None:
        """Add all that another set has."""
        self.tail = min(self.tail, other.tail)
        for group, bits in other.groups.items():
            self.groups[group] = self.groups.get(group, 0) | bits

    def ranges(self, block_size: int) -> list[tuple[int, int]]:
        """The bytes of these blocks: sorted [start, end) that neither touch nor overlap."""
        found: list[tuple[int, int]] = []
        for first, last in self._runs():
            if first >= self.tail:
                break
            start, end = first * block_size, (last + 1) * block_size
            if found and found[-1][1] == start:
                found[-1] = (found[-1][0], end)
            else:
                found.append((start, end))
        if self.tail < NEVER:
            start = self.tail * block_size
            while found and found[-1][1] >= start:
                start = min(start, found.pop()[0])
            found.append((start, NEVER))
        return found

    def _runs(self) -> Iterator[tuple[int, int]]:
        for group in sorted(self.groups):
            bits, at = self.groups[group], group << 10
            while bits:
                skipped = (bits & -bits).bit_length() - 1
                bits >>= skipped
                at += skipped
                ones = (~bits & (bits + 1)).bit_length() - 1
                yield at, at + ones - 1
                bits >>= ones
                at += ones


def _by_group(first: int, last: int) -> Iterator[tuple[int, int]]:
    """The blocks from ``first`` to ``last``, cut where groups end."""
    while first <= last:
        end = min(last, first | (GROUP - 1))
        yield first, end
        first = end + 1
