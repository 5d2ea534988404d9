"""One sync's use of a watch daemon.

1. The daemon is asked to close the epoch before anything is looked at: what changes from then on is
   in the next one. Files that are written to in ways of which it hears nothing are found first.
2. If the daemon heard everything since the snapshot that the local state is at, what it heard is
   made a changelist: the directories behind the handles are found where they are now. In all other
   cases the tree is scanned, and the reason said.
3. After the commit the daemon is told, and forgets the epoch. A sync that fails tells it nothing.
4. Between two syncs the daemon can be asked how it stands: the same reasons then speak against it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import lmdb

from cloudfs.core.changelist import Changelist, DirChange
from cloudfs.core.errors import SourceError
from cloudfs.core.manifest import SnapshotRecord
from cloudfs.db.watched import WatchedSet
from cloudfs.source.filters import Filters
from cloudfs.source.ready import Ready
from cloudfs.source.state import SourceState, scanning
from cloudfs.source.unseen import Written, being_written
from cloudfs.source.watch import client
from cloudfs.source.watch.places import Places, places_of
from cloudfs.source.watch.protocol import EVENTS, Answer, Base, Question
from cloudfs.source.watch.resolve import Resolver

STATE_TIMEOUT_S = 5.0
"""How long somebody who only asks how it stands waits for a daemon."""


class WatchSource:
    """The watch side of the syncs of one policy on this machine."""

    def __init__(self, name: str, sources: list[bytes], directory: Path, filters: Filters) -> None:
        """``directory`` is the daemon's; ``name`` and ``filters`` are the policy's."""
        self._name = name
        self._sources = sources
        self._directory = directory
        self._filters = filters

    @contextlib.contextmanager
    def ready(self, snapshot: int, taken_ns: int) -> Iterator[Ready]:
        """The tree itself, and what changed since the snapshot of the repository that the local
        state is at (0: at none): its number and time."""
        found = Ready("watch", self._sources)
        try:
            places = places_of(self._sources, self._filters)
            written = being_written()
            closed = client.ask(self._directory, Question("close"))
        except SourceError as error:
            note = f"the tree is scanned: {str(error).rstrip('.')}"
            if isinstance(error, client.NoDaemon):
                note += f". Start one: cloudfs watch {self._name}"
            found.kind = "scan"
            found.notes.append(note)
            yield found
            return
        reason = self._reason(closed, places, snapshot, taken_ns)
        if not reason:
            try:
                found.changes = self._changes(closed, places, written)
            except SourceError as error:
                reason = str(error)
        if reason:
            found.kind = "scan"
            if snapshot:
                found.notes.append(f"the tree is scanned: {reason}")
        found.keep = lambda record: self._keep(record, closed, places)
        found.changed_since = lambda: self._since(closed, places)
        yield found

    def state(self, snapshot: int, taken_ns: int) -> SourceState:
        """What the next sync would go by, if the last snapshot is this one."""
        try:
            places = places_of(self._sources, self._filters)
            now = client.ask(self._directory, Question("state"), STATE_TIMEOUT_S)
        except (SourceError, OSError) as error:
            return scanning("watch", str(error).rstrip("."))
        if reason := self._reason(now, places, snapshot, taken_ns):
            return scanning("watch", reason)
        return SourceState("watch", True, pending=now.pending, unit="name")

    def _reason(self, closed: Answer, places: Places, snapshot: int, taken_ns: int) -> str:
        """Why what the daemon heard is not all; "" if it is."""
        for place in places.found:
            fsid = closed.devices.get(place.device)
            if fsid != place.fsid:
                how = "mounted" if fsid is None else "given another id"
                return (
                    f"the file system of {os.fsdecode(place.path)} is not watched ({how} since the"
                    f" daemon started?). Start it anew: cloudfs watch {self._name}"
                )
        if closed.lost:
            return closed.lost
        if closed.base is None:
            return "the watch daemon has listened only since after the last snapshot"
        if (closed.base.snapshot, closed.base.taken_ns) != (snapshot, taken_ns):
            return f"the watch daemon has listened since another snapshot ({closed.base.snapshot})"
        if closed.base.token != places.token:
            return "the source, or a file system mounted within, is another one than before"
        return ""

    def _changes(self, closed: Answer, places: Places, written: Written) -> Changelist:
        """What was heard of since the base. Raises SourceError where that cannot be told."""
        if written.hidden:
            raise SourceError(written.hidden)
        devices = {place.device for place in places.found}
        found = self._heard(closed.first, closed.epoch, places, closed)
        assert found.inodes is not None
        found.inodes.update((inode, None) for device, inode in written.inodes if device in devices)
        found.looks.update(inode for device, inode in written.opened if device in devices)
        return found

    def _heard(self, first: int, last: int, places: Places, closed: Answer) -> Changelist:
        """What was heard of in some epochs. Raises SourceError, also where another daemon has
        taken the place of the one that answered: it begins with an empty set."""
        with contextlib.closing(Resolver(places.found)) as resolver:
            try:
                with contextlib.closing(
                    WatchedSet(self._directory / EVENTS, writer=False)
                ) as heard:
                    for place, names in heard.directories(first, last):
                        resolver.directory(place, names)
                    for place in heard.items(first, last):
                        resolver.item(place)
            except (lmdb.Error, OSError) as error:
                raise SourceError(
                    f"what the watch daemon wrote down cannot be read ({error}). Start it anew:"
                    f" cloudfs watch {self._name}"
                ) from None
            found = resolver.changelist()
        if client.ask(self._directory, Question("state")).since_ns != closed.since_ns:
            raise SourceError("another watch daemon has taken the place of the one that was asked")
        for directory, inode, name in places.points:
            found.dirs.append(DirChange(directory, None, {name}, inode=inode))
        return found

    def _since(self, closed: Answer, places: Places) -> Changelist | None:
        """What was heard of since the epoch was closed; None where that is not known."""
        try:
            now = client.ask(self._directory, Question("state"))
            if now.since_ns != closed.since_ns or now.lost:
                return None
            found = self._heard(closed.epoch + 1, now.epoch, places, closed)
        except SourceError:
            return None
        assert found.inodes is not None
        written = being_written()
        found.inodes.update((inode, None) for _, inode in written.inodes | written.opened)
        return found

    def _keep(self, record: SnapshotRecord, closed: Answer, places: Places) -> None:
        """Let the daemon count from this snapshot on."""
        with contextlib.suppress(SourceError):  # then it is gone, and the next sync scans
            if places_of(self._sources, self._filters).token == places.token:
                base = Base(record.number, record.time_ns, places.token)
                question = Question("confirm", closed.epoch, base, closed.since_ns)
                client.ask(self._directory, question)
