"""One sync's use of btrfs: snapshots before it, what changed between, one base after it.

1. Each source, a subvolume, is snapshotted read-only into HOLDING at its own top, and so is each
   subvolume within it, or of its file system and mounted in it. The sync reads the snapshots only.
2. If the last sync's snapshots are still there, untouched, and belong to the snapshot that the
   local state is at, what changed since is asked of the kernel. In all other cases the sync scans
   the new snapshots, and says why.
3. But the kernel takes long to tell of each, so first it is counted how many inodes are younger
   than the base, which costs next to nothing. Where these are much of all there are, looking at
   all costs less than being told, and the sync scans.
4. After the commit the new snapshots become the base and the old ones are deleted. A sync that
   fails deletes its own; what a killed one left is deleted by the next. So it is noted where
   snapshots may lie before the first is taken, and a place is forgotten only when it was looked
   into and none was there: its drive may be away, and the sources be others by now.
5. Between two syncs the base can be judged by the same rules, without a snapshot; which inodes are
   younger than it is counted in the file system's own tree.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from cloudfs.core.changelist import Changelist, DirChange
from cloudfs.core.errors import SourceError
from cloudfs.core.manifest import SnapshotRecord
from cloudfs.source.btrfs import subvolume
from cloudfs.source.btrfs.parts import Parts, innermost, parts_of
from cloudfs.source.btrfs.subvolume import Changed
from cloudfs.source.ready import Ready, scanned
from cloudfs.source.roots import HOLDING, root_names
from cloudfs.source.state import SourceState, scanning

ENOUGH = 100_000
"""So many changes are counted for those who only ask; a sync has no such bound."""

MUCH = 2000
MUCH_SHARE = 16
"""When so many inodes changed, and one for so many items on record, the tree is scanned. To be told
of one takes as long as to look at some sixteen items."""

KEPT_BYTES = 8 << 10
"""But only if the files that were there before, of which a scan reads all and a changelist says
which bytes to read, if any, hold no more than this for each inode that changed."""

SHOWN = 5
"""Of what is not backed up no more is named."""

_ORPHAN = re.compile(rb"o\d+-\d+-\d+")
"""The names, at the top, to which a send stream moves what it will remove. It leaves a directory
there that held another subvolume, of which it tells nothing."""

Excludes = Callable[[bytes], bool]
Tell = Callable[[str], None]


class _Held(msgspec.Struct, array_like=True):
    """One snapshot: of which subvolume (by its path below the root), where, and what it is."""

    path: bytes
    place: bytes
    uuid: str = ""
    parent_uuid: str = ""
    changed: int = 0


class _Note(msgspec.Struct, array_like=True):
    """The snapshots that stand for one snapshot of the repository, and where others may lie."""

    snapshot: int = 0
    taken_ns: int = 0
    held: list[_Held] = []
    places: list[bytes] = []  # directories in which there may be snapshots of this policy
    stubs: list[bytes] = []  # where other subvolumes stand empty in them, by path below the root


@dataclass
class _Taken:
    """The snapshots that a sync took; where other subvolumes stand empty in them, by path below the
    root; and where something else is mounted in the sources."""

    held: list[_Held] = field(default_factory=list)
    stubs: set[bytes] = field(default_factory=set)
    missing: list[bytes] = field(default_factory=list)


class BtrfsSource:
    """The btrfs side of the syncs of one policy on this machine."""

    def __init__(
        self,
        sources: list[bytes],
        policy_id: str,
        note: Path,
        excludes: Excludes,
        tell: Tell = lambda text: None,
    ) -> None:
        """``note`` is the file that remembers the base; ``excludes`` are the policy's, by path.
        ``tell`` is told, once, where a sync cannot delete a snapshot."""
        self._sources = sources
        self._prefix = os.fsencode(policy_id[:16])
        self._path = note
        self._excludes = excludes
        self._tell, self._told = tell, False
        self._names = root_names(sources) if len(sources) > 1 else [b""]
        self._note = self._read_note()
        self._own = {os.path.join(source, HOLDING) for source in sources}
        places = self._note.places or [os.path.dirname(held.place) for held in self._note.held]
        self._places = {place for place in places if os.path.basename(place) == HOLDING}

    @contextlib.contextmanager
    def ready(self, snapshot: int, taken_ns: int, items: int) -> Iterator[Ready]:
        """Snapshots of the sources, and what changed since the snapshot of the repository that the
        local state is at (0: at none): its number, time and number of items."""
        base = self._note
        self._places |= self._own
        self._clean(base.held)
        self._write_note(base)
        taken = _Taken()
        kept = False

        def keep(record: SnapshotRecord) -> None:
            nonlocal kept
            self._write_note(
                _Note(record.number, record.time_ns, taken.held, stubs=sorted(taken.stubs))
            )
            kept = True
            self._clean(taken.held)
            self._write_note(self._note)

        try:
            now_ns = time.time_ns()
            try:
                self._take(taken, now_ns)
            except SourceError as error:
                note = f"no btrfs snapshot could be taken, so the tree itself is scanned: {error}"
                found = scanned(self._sources, [note])
                found.keep = lambda record: self._keep_only_of(record, base)
                yield found
                return
            found = Ready("btrfs", [held.place for held in taken.held if self._is_top(held)])
            found.nested = {h.path: h.place for h in taken.held if not self._is_top(h)}
            found.frozen_ns, found.keep = now_ns, keep
            found.intact = lambda: _check_intact(taken.held)
            found.stable_inodes = len(taken.held) == 1  # each subvolume has numbers of its own
            found.notes.extend(_notes_of(taken.missing))
            try:
                found.changes = self._changes(base, taken, snapshot, taken_ns, items)
            except SourceError as error:
                found.notes.append(f"the snapshot is scanned: {error}")
            yield found
        finally:
            if not kept:
                self._clean(base.held)

    def _is_top(self, held: _Held) -> bool:
        return held.path in self._names

    # -- snapshots -----------------------------------------------------------------------------

    def _take(self, taken: _Taken, now_ns: int) -> None:
        """Snapshot every source and what is nested in it."""
        for name, source in zip(self._names, self._sources, strict=True):
            holding = os.path.join(source, HOLDING)
            try:
                os.makedirs(holding, 0o700, exist_ok=True)
            except OSError as error:
                raise SourceError(f"{os.fsdecode(holding)}: {error.strerror}.") from None
            parts = parts_of(source)
            paths = self._paths(parts)
            for path in paths:
                place = os.path.join(holding, b"%s-%d.%d" % (self._prefix, now_ns, len(taken.held)))
                held = _Held(_join(name, path), place)
                subvolume.snapshot(os.path.join(source, path) if path else source, place)
                taken.held.append(held)
                found = subvolume.identity(place)
                held.uuid, held.parent_uuid = found.uuid, found.parent_uuid
                held.changed = found.changed
            now = parts_of(source)
            if self._paths(now) != paths:
                raise SourceError("a subvolume came, went or moved meanwhile.")
            apart = {*parts.subvolumes, *now.subvolumes}.difference(paths)
            taken.stubs.update(_join(name, path) for path in apart if not _in_holding(path))
            others = filter(self._wanted, parts.others)
            taken.missing.extend(os.path.join(source, path) for path in others)

    def _paths(self, parts: Parts) -> list[bytes]:
        """The paths of a source's own subvolume and of those within it that are backed up."""
        return [b"", *filter(self._wanted, parts.subvolumes)]

    def _wanted(self, path: bytes) -> bool:
        if _in_holding(path):
            return False
        parts = path.split(b"/")
        return not any(self._excludes(b"/".join(parts[: i + 1])) for i in range(len(parts)))

    def _clean(self, keep: list[_Held], tell: Tell | None = None) -> None:
        """Delete the snapshots of this policy that are not to be kept; ``tell`` is told what cannot
        be deleted. The next sync tries again."""
        tell = tell or self._tell_first
        kept = {held.place for held in keep}
        for holding in sorted(self._places):
            with contextlib.suppress(OSError):  # its drive is away, or it holds others
                names = [n for n in os.listdir(holding) if n.startswith(self._prefix + b"-")]
                places = [os.path.join(holding, name) for name in names]
                left = [p for p in places if p in kept or not _delete(p, tell)]
                if not left and holding not in self._own:
                    self._places.remove(holding)
                    os.rmdir(holding)

    def _tell_first(self, text: str) -> None:
        if not self._told:
            self._told = True
            self._tell(f"{text} It takes up room until a sync can.")

    def leave(self, tell: Tell) -> None:
        """Delete all snapshots of this policy: no sync will count from them. ``tell`` is told what
        cannot be deleted; it is remembered, to be tried again."""
        held = {os.path.dirname(held.place) for held in self._note.held}
        self._places |= set(filter(os.path.isdir, self._own))
        self._own = set()
        self._clean([], tell)
        for holding in sorted(held & self._places):
            if not os.path.isdir(holding):
                shown = os.fsdecode(holding)
                tell(
                    f"{shown} is not there, so the snapshots in it are left. Is its drive mounted?"
                )
        if self._places:
            self._write_note(_Note())
        else:
            self._path.unlink(missing_ok=True)

    def _keep_only_of(self, record: SnapshotRecord, base: _Note) -> None:
        """Delete the base where it is of another snapshot than the state now is at: it will never
        be compared with, and may be what fills the file system."""
        if (record.number, record.time_ns) != (base.snapshot, base.taken_ns):
            self._clean([])

    # -- what changed --------------------------------------------------------------------------

    def _changes(
        self, base: _Note, taken: _Taken, snapshot: int, taken_ns: int, items: int
    ) -> Changelist | None:
        """What changed since the base; None before the first. Raises SourceError with the reason
        where that cannot be known, or costs more to know than a scan."""
        if not base.held or not snapshot:
            return None
        live = {held.path: held.parent_uuid for held in taken.held}
        before = {held.path: held for held in base.held}
        _check_base(base, live, snapshot, taken_ns)
        _check_worth((self._count(new.place, before[new.path]) for new in taken.held), items)
        found = Changelist()
        within_before, within = (
            _within_each({*before, *base.stubs}),
            _within_each({*live, *taken.stubs}),
        )
        for new in taken.held:
            within_it = within_before.get(new.path, []), within.get(new.path, [])
            below = subvolume.changes(before[new.path].place, new.place, *within_it)
            found.dirs.extend(_seen(below, new, live))
        # Again: what was written to one may have waited in memory until it was compared.
        _check_untouched(base.held)
        return found

    # -- between two syncs ---------------------------------------------------------------------

    def state(self, snapshot: int, taken_ns: int, items: int) -> SourceState:
        """What the next sync would go by, if the last snapshot is this one, of so many items. What
        changed is counted as far as the file system has written it out."""
        base = self._note
        if not base.held:
            return scanning("btrfs", "there is no btrfs snapshot to count from")
        try:
            live = self._live()
            uuids = {path: subvolume.identity(place).uuid for path, place in live.items()}
            _check_base(base, uuids, snapshot, taken_ns)
            counted = [self._count(live[held.path], held, ENOUGH) for held in base.held]
            _check_worth(counted, items)
        except SourceError as error:
            return scanning("btrfs", str(error).rstrip("."))
        count = sum(found.inodes for found in counted)
        return SourceState("btrfs", True, "", min(count, ENOUGH), "item", count >= ENOUGH)

    def _live(self) -> dict[bytes, bytes]:
        """Where the subvolumes are that a sync would snapshot, by their paths below the root."""
        return {
            _join(name, path): _join(source, path)
            for name, source in zip(self._names, self._sources, strict=True)
            for path in self._paths(parts_of(source))
        }

    def _count(self, place: bytes, held: _Held, enough: int | None = None) -> Changed:
        """What of a subvolume is younger than a snapshot of it."""
        apart = []
        with contextlib.suppress(OSError):  # which changes when a base is deleted
            apart.append(os.lstat(os.path.join(place, HOLDING)).st_ino)
        return subvolume.count_changed(place, subvolume.identity(held.place).made, enough, apart)

    # -- memory --------------------------------------------------------------------------------

    def _read_note(self) -> _Note:
        try:
            return msgspec.msgpack.decode(self._path.read_bytes(), type=_Note)
        except (OSError, msgspec.DecodeError, msgspec.ValidationError):
            return _Note()

    def _write_note(self, note: _Note) -> None:
        """Atomic; what is lost of it costs a scan, and snapshots in sources that were others."""
        note = msgspec.structs.replace(note, places=sorted(self._places))
        if note == self._note:
            return
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        temporary.write_bytes(msgspec.msgpack.encode(note))
        temporary.replace(self._path)
        self._note = note


def _in_holding(path: bytes) -> bool:
    """Whether a subvolume is a snapshot, of a source or of another policy's within it."""
    return HOLDING in path.split(b"/")


def _notes_of(missing: list[bytes]) -> list[str]:
    """What is to be said of that which is mounted in the sources and is in no snapshot."""
    if not missing:
        return []
    shown = ", ".join(map(os.fsdecode, missing[:SHOWN]))
    more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    return [
        f"no btrfs snapshot holds what is mounted at {shown}{more}, so that is not backed up. Leave"
        " it out (--exclude, --one-file-system) if that is meant, and give it a policy of its own"
        " if not; or use --snapshot scan."
    ]


def _check_base(base: _Note, live: dict[bytes, str], snapshot: int, taken_ns: int) -> None:
    """Raise SourceError where the last snapshots are not those to count from: ``live`` says which
    subvolumes (by UUID) lie where."""
    if (base.snapshot, base.taken_ns) != (snapshot, taken_ns):
        raise SourceError(
            f"the last btrfs snapshot here belongs to snapshot {base.snapshot}, and not to"
            f" snapshot {snapshot} as it is in the repository."
        )
    before = {held.path: held.parent_uuid for held in base.held}
    if before.keys() != live.keys():
        raise SourceError("a subvolume came, went or moved.")
    if before != live:
        raise SourceError("another subvolume took the place of one.")
    _check_untouched(base.held)


def _check_worth(counted: Iterable[Changed], items: int) -> None:
    """Raise SourceError where it costs less to look at all ``items`` of the last snapshot, and at
    what came since, than to be told of each change."""
    inodes, kept_bytes = functools.reduce(Changed.plus, counted, Changed())
    if inodes >= max(MUCH, items // MUCH_SHARE) and kept_bytes <= inodes * KEPT_BYTES:
        raise SourceError(f"so much changed ({inodes:,} items) that this costs less.")


def _check_untouched(base: list[_Held]) -> None:
    """Raise SourceError where one of the last snapshots is not what it was."""
    for held in base:
        if what := _what_became_of(held):
            raise SourceError(f"the last snapshot {os.fsdecode(held.place)} {what}.")


def _delete(place: bytes, tell: Tell) -> bool:
    """Delete a snapshot, or what stands for one in a source that was itself made by snapshotting
    one: an empty directory. False where it is still there."""
    try:
        if subvolume.is_subvolume(place):
            subvolume.delete(place)
        else:
            os.rmdir(place)
        return True
    except SourceError as error:
        tell(str(error))
    except OSError as error:
        tell(f"{os.fsdecode(place)} could not be deleted ({error.strerror}).")
    return False


def _check_intact(taken: list[_Held]) -> None:
    """Raise SourceError where one of the snapshots that were read is not what it was: what was not
    found in it may well be in the tree."""
    for held in taken:
        if what := _what_became_of(held):
            raise SourceError(
                f"the btrfs snapshot {os.fsdecode(held.place)} {what} while it was backed up, so"
                " this backup was given up. Sync again."
            )


def _what_became_of(held: _Held) -> str:
    """What happened to a snapshot that must not have; "" for nothing. Raises SourceError."""
    if not os.path.isdir(held.place):
        return "is gone"
    now = subvolume.identity(held.place)
    if now.uuid != held.uuid:
        return "is another one"
    if now.changed != held.changed or not now.read_only:
        return "was written to"
    return ""


def _seen(below: Changelist, held: _Held, subvolumes: Collection[bytes]) -> Iterator[DirChange]:
    """The changes in one subvolume, with paths below the root. Without those beneath what is
    mounted in it, which nobody sees: at these paths are others. And without those in what the
    kernel moved away by a name of its own and then did not remove."""
    for change in below.dirs:
        top = change.path.partition(b"/")[0]
        if _ORPHAN.fullmatch(top) and not os.path.lexists(os.path.join(held.place, top)):
            continue
        now, was = _join(held.path, change.path), _join(held.path, change.old_path or b"")
        if innermost(now, subvolumes) == innermost(was, subvolumes) == held.path:
            yield DirChange(now, was, change.names, change.ranges)


def _within_each(paths: set[bytes]) -> dict[bytes, list[bytes]]:
    """For each of these subvolumes, the paths below it of those that lie in it directly."""
    found: dict[bytes, list[bytes]] = {}
    for path in paths:
        holder = _holder(path, paths)
        if holder is not None:
            below = path.removeprefix(holder + b"/" if holder else b"")
            found.setdefault(holder, []).append(below)
    return found


def _holder(path: bytes, all_paths: Collection[bytes]) -> bytes | None:
    """The innermost of these subvolumes that a path lies in."""
    while path:
        path = path.rpartition(b"/")[0]
        if path in all_paths:
            return path
    return None


def _join(path: bytes, name: bytes) -> bytes:
    return path + b"/" + name if path and name else path or name
