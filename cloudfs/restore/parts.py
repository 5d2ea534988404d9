"""Cutting ordered work into parts, and merging the frames of a part into spans. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from cloudfs.restore.values import Directory, Frame, Part, Span

MAX_SPAN = 24 << 20
MAX_GAP = 512 << 10
"""Bytes between two frames that are fetched for nothing rather than by a second request."""

ITEM_WORK = 16 << 10
MIN_WORK, MAX_WORK = 96 << 20, 224 << 20


class Work(NamedTuple):
    """An item or piece; the first three fields give the order."""

    pack: bytes
    offset: int
    turn: int
    directory: int
    size: int
    frames: Sequence[Frame]
    coded: bytes


def cut(works: list[Work], directories: list[Directory], workers: int) -> Iterator[Part]:
    """Parts of a share of what is left each, so that all workers end at about the same time.

    A cut within a pack costs a request and decoding a frame twice; so rather at a pack's edge.
    """
    left = sum(work.size for work in works) + len(works) * ITEM_WORK
    of_pack = Counter[bytes]()
    for work in works:
        of_pack[work.pack] += work.size + ITEM_WORK
    start, done = 0, 0
    quota = _share(left, workers)
    last: Frame = (b"", 0, 0)
    for index, work in enumerate(works):
        frame = work.frames[0] if work.frames else last
        if frame != last and index > start:
            if frame[0] != last[0]:
                full = done >= quota // 2
            else:
                full = done >= quota and of_pack[work.pack] >= quota // 2
            if full:
                yield _part(works[start:index], directories)
                left -= done
                start, done, quota = index, 0, _share(left, workers)
        if work.frames:
            last = work.frames[-1]
        cost = work.size + ITEM_WORK
        done += cost
        of_pack[work.pack] -= cost
    if start < len(works):
        yield _part(works[start:], directories)


def _share(left: int, workers: int) -> int:
    return max(MIN_WORK, min(MAX_WORK, int(left / (1.5 * workers))))


def _part(works: list[Work], directories: list[Directory]) -> Part:
    needed: dict[int, tuple[int, bytes]] = {}
    for index in {work.directory for work in works}:
        above = index
        while above > 0 and above not in needed:
            directory = directories[above]
            needed[above] = (directory.parent, directory.name)
            above = directory.parent
    frames = {frame for work in works for frame in work.frames}
    return Part(
        needed,
        [msgspec.Raw(work.coded) for work in works],
        list(merge(frames)),
        len(works),
        sum(work.size for work in works),
    )


def merge(frames: Iterable[Frame]) -> Iterator[Span]:
    """The fewest spans of at most MAX_SPAN that hold all frames, few bytes fetched for nothing."""
    span: Span | None = None
    for pack, offset, length in sorted(frames):
        if span is not None and span.pack == pack:
            end = max(span.offset + span.length, offset + length)
            near = offset - (span.offset + span.length) <= MAX_GAP
            if near and end - span.offset <= MAX_SPAN:
                span.length = end - span.offset
                continue
        if span is not None:
            yield span
        span = Span(pack, offset, length)
    if span is not None:
        yield span
