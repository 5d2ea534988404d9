"""One sync's use of a live mount.

1. What is dirty in mappings is flushed through the mount. Then the mount freezes: what is read from
   there on, below a name that it gives, is one point in time, while who writes goes on.
2. If everything since the snapshot that the local state is at was marked, the marks are the
   changelist. In all other cases what is frozen is scanned, and the reason said.
3. After the commit the mount is told; it forgets what was marked, and the freeze ends. Where a sync
   fails it is told nothing, and the freeze ends with the line, even if this process is killed.
4. When nothing is mounted the source is scanned as it lies there, with a word of warning.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from cloudfs.core.changelist import Changelist, DirChange, merged
from cloudfs.core.errors import SourceError
from cloudfs.core.manifest import SnapshotRecord
from cloudfs.source.live.beneath import BeneathPlaces
from cloudfs.source.live.client import Line, NotMounted
from cloudfs.source.live.protocol import (
    FROZEN_PREFIX,
    Answer,
    Base,
    Directory,
    End,
    Question,
)
from cloudfs.source.ready import Ready
from cloudfs.source.state import SourceState, scanning
from cloudfs.source.unseen import settle_mapped

STATE_TIMEOUT_S = 5.0
"""How long somebody who only asks how it stands waits for the mount."""


class LiveSource:
    """The live side of the syncs of one policy on this machine."""

    def __init__(self, sources: list[bytes], directory: Path) -> None:
        """``directory`` is the mount's. Raises SourceError where there are several sources."""
        if len(sources) != 1:
            raise SourceError("a policy with a live mount has one source; make a policy for each.")
        self._source = sources[0]
        self._directory = directory

    @contextlib.contextmanager
    def ready(self, name: str, base: Base, *, whole: bool) -> Iterator[Ready]:
        """What is frozen, and what changed since the snapshot that the local state is at (number 0:
        at none). ``whole``: more will be read than what changed. ``name`` is the policy's."""
        try:
            line = Line(self._directory)
        except NotMounted as error:
            found = Ready("scan", [self._source])
            found.notes.append(
                f"the tree is scanned as it changes: {error}. Mount it: cloudfs mount --live {name}"
            )
            yield found
            return
        with line:
            yield self._frozen(line, base, whole=whole)

    def state(self, snapshot: int, taken_ns: int) -> SourceState:
        """What the next sync would go by, if the last snapshot is this one."""
        try:
            with Line(self._directory, STATE_TIMEOUT_S) as line:
                now = line.ask(Question("state"))
        except SourceError as error:
            return scanning("live", str(error).rstrip("."))
        reason = _reason(now, Base(snapshot, taken_ns))
        return SourceState("live", not reason, reason, None if reason else now.pending)

    def _frozen(self, line: Line, base: Base, *, whole: bool) -> Ready:
        before = line.ask(Question("state"))
        self._check(before)
        flush(before.mountpoint)
        marked = not whole and not _reason(before, base)
        answer = line.ask(Question("freeze", marked=marked))
        changes, reason = None, _reason(answer, base)
        if not reason:
            changes, reason = _changelist(line)
        if reason and marked:  # of all else than what was marked, nothing was kept
            answer = line.ask(Question("freeze", marked=False))
        top = before.mountpoint.rstrip(b"/") + b"/" + FROZEN_PREFIX + b"%d" % answer.frozen
        found = Ready("live", [top], frozen_ns=answer.frozen_ns, through_mount=True)
        process = b"/proc/%d/fd/" % answer.pid
        found.beneath = BeneathPlaces(
            process + b"%d" % answer.top_fd, process + b"%d" % answer.touched_fd
        )
        found.changes = changes
        if reason:
            found.kind = "scan"
            if base.snapshot:
                found.notes.append(f"what is frozen is scanned: {reason}")
        found.intact = lambda: _still_there(line, found)
        found.keep = lambda record: _confirm(line, record, top)
        return found

    def _check(self, answer: Answer) -> None:
        if os.path.realpath(answer.source) != os.path.realpath(self._source):
            raise SourceError(
                f"the live mount is of {os.fsdecode(answer.source)}, not of"
                f" {os.fsdecode(self._source)}. Unmount it and mount it anew."
            )


def flush(mountpoint: bytes) -> None:
    """Have all that is dirty, which is in mappings, written to the mount. Raises OSError."""
    settle_mapped(os.stat(mountpoint).st_dev)


def _reason(answer: Answer, base: Base) -> str:
    """Why what was marked is not all; "" if it is."""
    if answer.lost:
        return answer.lost
    if answer.base is None:
        return "no snapshot was taken since it was mounted live"
    if answer.base != base:
        return f"the live mount has marked since another snapshot ({answer.base.snapshot})"
    return ""


def _changelist(line: Line) -> tuple[Changelist | None, str]:
    """What was marked; or None and the reason."""
    found = Changelist(inodes={})
    assert found.inodes is not None
    for change in line.changes():
        if isinstance(change, End):
            return (None, change.lost) if change.lost else (found, "")
        if isinstance(change, Directory):
            ranges = {name: list(others) for name, others in change.names if others}
            names = {name for name, _ in change.names}
            told = DirChange(change.path, None, names, ranges, inode=change.inode)
            if found.dirs and (found.dirs[-1].path, found.dirs[-1].inode) == (
                told.path,
                told.inode,
            ):
                found.dirs[-1].join(told)
            else:
                found.dirs.append(told)
        else:
            known = found.inodes.get(change.inode) or []
            found.inodes[change.inode] = merged([*known, *change.ranges])
    return None, "the live mount is gone"


def _still_there(line: Line, found: Ready) -> None:
    """Whether what was read was frozen until now. Raises SourceError."""
    answer = line.ask(Question("state"))
    found.consistent = not answer.given_up
    if answer.given_up:
        found.notes.append(f"the snapshot is not one point in time: {answer.given_up}.")


def _confirm(line: Line, record: SnapshotRecord, top: bytes) -> None:
    with contextlib.suppress(SourceError):  # then it is gone, and the next sync scans
        line.ask(Question("confirm", Base(record.number, record.time_ns)))
        os.access(top, os.F_OK)  # so the kernel forgets what it knows of what was frozen
