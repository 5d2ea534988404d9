"""One sync's use of a live mount.

1. What is dirty in mappings is flushed through the mount. Then the mount freezes: what is read from
   there on, below a name that it gives, is one point in time, while who writes goes on.
2. If everything since the snapshot that the local state is at was marked, the marks are the
   changelist. In all other cases what is frozen is scanned, and the reason said: also while a
   process goes past the mount (:mod:`.past`).
3. After the commit the mount is told; it forgets what was marked, and the freeze ends. Where a sync
   fails it is told nothing, and the freeze ends with the line, even if this process is killed.
4. When nothing is mounted the source is scanned as it lies there, with a word of warning.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from cloudfs.core.changelist import Changelist, DirChange, merged
from cloudfs.core.errors import SourceError
from cloudfs.core.manifest import SnapshotRecord
from cloudfs.source.live.beneath import BeneathPlaces
from cloudfs.source.live.client import Line, NotMounted
from cloudfs.source.live.past import who_goes_past
from cloudfs.source.live.protocol import (
    FROZEN_PREFIX,
    Answer,
    Base,
    Directory,
    End,
    Question,
)
from cloudfs.source.mounts import mounts, seen_within, within
from cloudfs.source.own import is_live, is_view
from cloudfs.source.ready import Ready
from cloudfs.source.state import SourceState, scanning
from cloudfs.source.unseen import settle_mapped

SINCE = "since before the tree was mounted live"

STATE_TIMEOUT_S = 5.0
"""How long somebody who only asks how it stands waits for the mount."""


class LiveSource:
    """The live side of the syncs of one policy on this machine."""

    def __init__(
        self,
        sources: list[bytes],
        directory: Path,
        leaves_out: Callable[[bytes], bool] = lambda path: False,
    ) -> None:
        """``directory`` is the mount's; ``leaves_out`` says what other file systems the policy
        leaves out, by path. Raises SourceError where there are several sources."""
        if len(sources) != 1:
            raise SourceError("a policy with a live mount has one source; make a policy for each.")
        self._source = sources[0]
        self._leaves_out = leaves_out
        self._directory = directory

    @contextlib.contextmanager
    def ready(self, name: str, base: Base, *, whole: bool) -> Iterator[Ready]:
        """What is frozen, and what changed since the snapshot that the local state is at (number 0:
        at none). ``whole``: more will be read than what changed. ``name`` is the policy's."""
        try:
            line, before = self._reach()
        except NotMounted as error:
            found = Ready("scan", [self._source])
            found.notes.append(
                f"the tree is scanned as it changes: {error}. Mount it: cloudfs mount --live {name}"
            )
            yield found
            return
        with line, self._frozen(line, before, base, whole=whole) as found:
            yield found

    def _reach(self) -> tuple[Line, Answer]:
        """A line to the mount, and how it stands. Raises NotMounted, SourceError."""
        line = Line(self._directory)
        try:
            before = line.ask(Question("state"))
            if os.path.realpath(before.source) != os.path.realpath(self._source):
                raise SourceError(
                    f"the live mount is of {os.fsdecode(before.source)}, not of"
                    f" {os.fsdecode(self._source)}. Unmount it and mount it anew."
                )
            _check_reached(before)
        except BaseException:
            line.close()
            raise
        return line, before

    def state(self, snapshot: int, taken_ns: int) -> SourceState:
        """What the next sync would go by, if the last snapshot is this one."""
        try:
            with Line(self._directory, STATE_TIMEOUT_S) as line:
                now = line.ask(Question("state"))
            _check_reached(now)
        except SourceError as error:
            return scanning("live", str(error).rstrip("."))
        reason = _reason(now, Base(snapshot, taken_ns))
        return SourceState("live", not reason, reason, None if reason else now.pending)

    def who_goes_past(self) -> list[str]:
        """Sentences about processes that go past the mount, which was just made."""
        with Line(self._directory, STATE_TIMEOUT_S) as line:
            found = list(_past(line.ask(Question("state"))))
        return [f"{words} {SINCE}, and goes past the mount. Start it anew." for words in found]

    @contextlib.contextmanager
    def _frozen(self, line: Line, before: Answer, base: Base, *, whole: bool) -> Iterator[Ready]:
        flush(before.mountpoint)
        past = next(_past(before), "")
        marked = not whole and not past and not _reason(before, base)
        with contextlib.closing(_Frozen(line, before, marked=marked)) as frozen:
            reason = _reason(frozen.answer, base)
            if past:
                reason = f"{past} {SINCE}, and what it changes past the mount is not marked"
                line.ask(Question("missed", words=reason))  # till the next sync, as well
            changes = None
            if not reason:
                changes, reason = _changelist(line)
            if reason and marked:  # of all else than what was marked, nothing was kept
                frozen.anew()
            found = frozen.ready()
            found.changes = changes
            if reason:
                found.kind = "scan"
                if base.snapshot or past:
                    found.notes.append(f"what is frozen is scanned: {reason}")
            found.notes.extend(self._not_shown(before))
            found.intact = lambda: _still_there(line, found, past=bool(past))
            found.keep = lambda record: _confirm(line, record, frozen.path)
            yield found

    def _not_shown(self, answer: Answer) -> list[str]:
        """What is to be said of what was mounted in the tree since, which no snapshot holds."""
        below = [path for path in _mounted_since(answer) if not self._left_out(path)]
        if not below:
            return []
        shown = ", ".join(os.fsdecode(os.path.join(answer.mountpoint, path)) for path in below)
        return [
            f"what was mounted at {shown} since the tree was mounted live is not backed up. Unmount"
            " the tree and mount it live anew, or leave that out (--exclude, --one-file-system) if"
            " it is meant."
        ]

    def _left_out(self, path: bytes) -> bool:
        parts = path.split(b"/")
        return any(self._leaves_out(b"/".join(parts[: end + 1])) for end in range(len(parts)))


class _Frozen:
    """A freeze, and the top of what is frozen, which is held open.

    It is opened at once: who waits for room holds locks in the kernel, and others hold the lock of
    the mount's top directory meanwhile, where its name is looked up. So nobody waits until then.
    """

    def __init__(self, line: Line, before: Answer, *, marked: bool) -> None:
        self._line = line
        self._mountpoint = before.mountpoint.rstrip(b"/")
        self._fd = -1
        self._freeze(marked=marked)

    def _freeze(self, *, marked: bool) -> None:
        self.answer = self._line.ask(Question("freeze", marked=marked))
        self.path = self._mountpoint + b"/" + FROZEN_PREFIX + b"%d" % self.answer.frozen
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise SourceError(
                f"what is frozen cannot be opened ({error.strerror}). Is the tree mounted still?"
            ) from None
        self._line.ask(Question("reached"))

    def anew(self) -> None:
        """Freeze again, and keep everything. Raises SourceError."""
        self.close()
        self._freeze(marked=False)

    def ready(self) -> Ready:
        """Where it is read."""
        top = b"/proc/%d/fd/%d" % (os.getpid(), self._fd)
        found = Ready("live", [top], frozen_ns=self.answer.frozen_ns, through_mount=True)
        process = b"/proc/%d/fd/" % self.answer.pid
        found.beneath = BeneathPlaces(
            process + b"%d" % self.answer.top_fd, process + b"%d" % self.answer.touched_fd
        )
        return found

    def close(self) -> None:
        """Close it, if it is open."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


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


def _check_reached(answer: Answer) -> None:
    """Raise NotMounted where the mount is taken from the tree."""
    if not any(is_live(mount) and mount.place == answer.mountpoint for mount in mounts()):
        raise NotMounted(
            f"the live mount at {os.fsdecode(answer.mountpoint)} was unmounted, and is only there"
            " for who still has something of it open"
        )


def _mounted_since(answer: Answer) -> list[bytes]:
    """The paths, below the top, of what was mounted there since the tree was mounted live."""
    seen = mounts()
    own = [mount for mount in seen if is_live(mount) and mount.place == answer.mountpoint]
    found = seen_within(answer.mountpoint, own[-1].number, seen) if own else []
    below = {m.place[len(answer.mountpoint.rstrip(b"/")) + 1 :] for m in found if not is_view(m)}
    if answer.source != answer.mountpoint:
        prefix = answer.source.rstrip(b"/") + b"/"
        with contextlib.suppress(OSError):
            served = {mount.place for mount in mounts(str(answer.pid))}
            others = (m.place for m in within(answer.source, seen) if not is_view(m))
            below |= {place.removeprefix(prefix) for place in others if place not in served}
    return sorted(below)


def _past(answer: Answer) -> Iterator[str]:
    """Who goes past a mount that lies over its tree: for any other, all do who wish."""
    if answer.source != answer.mountpoint:
        return iter(())
    try:
        top = os.stat(b"/proc/%d/fd/%d" % (answer.pid, answer.top_fd))
    except OSError:
        raise NotMounted("the live mount is gone") from None
    own = top.st_dev, top.st_ino
    return who_goes_past(answer.mountpoint, own, {answer.pid, os.getpid()})


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
            last = found.dirs[-1] if found.dirs else told
            if last is not told and (last.path, last.inode) == (told.path, told.inode):
                last.join(told)  # it is told in parts
            else:
                found.dirs.append(told)
        else:
            known = found.inodes.get(change.inode) or []
            found.inodes[change.inode] = merged([*known, *change.ranges])
    return None, "the live mount is gone"


def _still_there(line: Line, found: Ready, *, past: bool) -> None:
    """Whether what was read was frozen until now; what changes ``past`` the mount is not. Raises
    SourceError."""
    answer = line.ask(Question("state"))
    found.consistent = not (answer.given_up or past)
    if answer.given_up:
        found.notes.append(f"the snapshot is not one point in time: {answer.given_up}.")


def _confirm(line: Line, record: SnapshotRecord, top: bytes) -> None:
    with contextlib.suppress(SourceError):  # then it is gone, and the next sync scans
        line.ask(Question("confirm", Base(record.number, record.time_ns)))
        os.access(top, os.F_OK)  # so the kernel forgets what it knows of what was frozen
