"""One sync's use of a policy's commands: a snapshot before it, one base after it.

1. ``snapshot SOURCE NAME`` makes a snapshot of each source and prints where it is to be read, and
   by what the other commands know it. NAME is noted before the command runs, and what it made as
   soon as that is known; so what a killed sync left is released by the next.
2. If the last sync's snapshots belong to the snapshot that the local state is at, and were made by
   the same commands of the same sources, ``changes BASE NEW SOURCE`` is asked what differs. In all
   other cases, and when the answer is not good, the sync scans the new snapshots and says why.
3. After the commit the new snapshots become the base, and ``release ID SOURCE`` is called for the
   old ones; after a sync that fails, for the new ones. Without ``changes`` no base is kept, nor
   after a sync that found changes without a snapshot. What could not be released is tried again
   by the next sync.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import xxhash

from cloudfs.core.changelist import Changelist, DirChange
from cloudfs.core.errors import SourceError
from cloudfs.core.manifest import SnapshotRecord
from cloudfs.db.state import SyncState
from cloudfs.source.external.command import Command, Commands, end_group
from cloudfs.source.external.resolve import Resolver
from cloudfs.source.external.told import read_told
from cloudfs.source.external.trees import NewTree, OldTree, join
from cloudfs.source.filters import Filters, Matcher
from cloudfs.source.ready import Ready, scanned
from cloudfs.source.roots import root_names
from cloudfs.source.state import SourceState, scanning

MAX_CHANGES_BYTES = 1 << 30
_MAX_SNAPSHOT_BYTES = 1 << 16

BornNs = Callable[[int], int | None]


class _Held(msgspec.Struct, array_like=True):
    """A snapshot that is ours to release: of which source, by what name it was to be made, and,
    once that is known, its id, where it is read and the inode of its root."""

    source: bytes
    name: bytes
    id: bytes = b""
    place: bytes = b""
    inode: int = 0
    unique_inodes: bool = False


class _Note(msgspec.Struct, array_like=True):
    """What is remembered from one sync to the next."""

    snapshot: int = 0
    taken_ns: int = 0
    made_by: bytes = b""  # a digest of the commands and sources
    base: list[_Held] = []  # the snapshots that stand for ``snapshot`` of the repository
    others: list[_Held] = []  # such as are to be released
    process: tuple[int, int] = (0, 0)  # the leader of the command that runs, when it was started


class _Answer(msgspec.Struct):
    """What a snapshot command prints, if it is not just a path."""

    path: str
    id: str | int = ""
    unique_inodes: bool = False


class ExternalSource:
    """The side of the syncs of one policy on this machine that runs the policy's commands."""

    def __init__(
        self,
        sources: list[bytes],
        policy_id: str,
        note: Path,
        commands: Commands,
        filters: Filters,
        tell: Callable[[str], None],
        check_stop: Callable[[], None],
    ) -> None:
        """``note`` is the file that remembers the base; ``tell`` is told what cannot be released;
        ``check_stop`` raises what ends a sync that is to stop."""
        self._sources = sources
        self._names = root_names(sources) if len(sources) > 1 else [b""]
        self._policy_id = policy_id
        self._path = note
        self._commands = commands
        self._filters = filters
        self._tell = tell
        self._check_stop = check_stop
        self._note = self._read_note()

    @contextlib.contextmanager
    def ready(self, state: SyncState, born_ns: BornNs) -> Iterator[Ready]:
        """Snapshots of the sources, and what changed since the snapshot of the repository that
        ``state`` is at. ``born_ns`` says when a directory in that one was made, by its LIN."""
        self._clean_up()

        def keep(record: SnapshotRecord) -> None:
            note = self._note
            note.snapshot, note.taken_ns = record.number, record.time_ns
            note.made_by = self._made_by()
            if self._commands.changes:
                note.others = [*note.others[len(taken) :], *note.base]
                note.base = taken
            else:
                note.others, note.base = [*note.others, *note.base], []
            self._write_note()

        taken: list[_Held] = []
        try:
            now_ns = time.time_ns()
            try:
                self._take(taken, now_ns)
            except SourceError as error:
                note = f"no snapshot could be taken, so the tree itself is scanned: {error}"
                found = scanned(self._sources, [note])
                found.keep = self._keep_only_of
                yield found
                return
            found = Ready("external", [held.place for held in taken])
            found.frozen_ns, found.keep = now_ns, keep
            found.stable_inodes = len(taken) == 1 and taken[0].unique_inodes
            try:
                found.changes = self._changes(taken, state, born_ns)
            except SourceError as error:
                found.notes.append(f"the snapshot is scanned: {error}")
            yield found
        finally:
            self._check_stop = _go_on  # whether or not there is a snapshot: this is to be done
            self._release_others()

    def leave(self) -> None:
        """Release all snapshots: no sync will count from them."""
        self._note.others, self._note.base = [*self._note.others, *self._note.base], []
        self._clean_up()

    def _keep_only_of(self, record: SnapshotRecord) -> None:
        """Have the base released where it is of another snapshot than the state now is at: it will
        never be compared with."""
        note = self._note
        if (record.number, record.time_ns) != (note.snapshot, note.taken_ns):
            note.others, note.base = [*note.others, *note.base], []
            self._write_note()

    # -- snapshots -------------------------------------------------------------------------------

    def _take(self, taken: list[_Held], now_ns: int) -> None:
        """Have each source snapshotted; what is taken stands first among what is to be released."""
        for index, source in enumerate(self._sources):
            name = f"cloudfs-{self._policy_id[:16]}-{now_ns}-{index}".encode()
            held = _Held(source, name)
            self._note.others.insert(index, held)
            self._write_note()
            lines = self._run(self._commands.snapshot, source, [source, name], _MAX_SNAPSHOT_BYTES)
            self._take_answer(held, lines)
            taken.append(held)
            self._write_note()

    def _take_answer(self, held: _Held, lines: list[bytes]) -> None:
        command = f"{os.path.basename(self._commands.snapshot[0])} "
        said = [line for line in lines if line.strip()]
        if len(said) != 1:
            raise SourceError(f"{command}printed {len(said)} lines, and not one with a path.")
        answer = _read_answer(said[0], command)
        place = os.fsencode(answer.path)
        id_ = os.fsencode(str(answer.id)) or place
        if b"\0" in id_:
            raise SourceError(f"{command}gave an id with a NUL, which no command could be told.")
        known = [*self._note.base, *self._note.others]
        if any(id_ in (old.id, old.name) for old in known if old is not held):
            raise SourceError(f"{command}gave a snapshot that it has given before.")
        held.inode = _root_inode(place, held.source, command)
        held.id, held.place, held.unique_inodes = id_, place, answer.unique_inodes

    def _clean_up(self) -> None:
        """End and release what a sync that was killed left."""
        leader, started = self._note.process
        if leader and _started(leader) == started:
            end_group(leader)
        self._note.process = (0, 0)
        self._release_others()

    def _release_others(self) -> None:
        """Release what is not the base; what cannot be released now is kept in mind."""
        left = []
        for held in self._note.others:
            if not self._commands.release:
                continue
            try:
                self._run(self._commands.release, held.source, [held.id or held.name, held.source])
            except SourceError as error:
                shown = os.fsdecode(held.id or held.name)
                self._tell(f"the snapshot {shown} could not be released: {error}")
                left.append(held)
        self._note.others = left
        self._write_note()

    # -- what changed ----------------------------------------------------------------------------

    def _changes(self, taken: list[_Held], state: SyncState, born_ns: BornNs) -> Changelist | None:
        """What changed since the base; None where there is none to ask for. Raises SourceError
        with the reason where that cannot be known."""
        note, head = self._note, state.head
        if not self._commands.changes or not note.base or not head.snapshot:
            return None
        if reason := self._reason(head.snapshot, head.taken_ns):
            raise SourceError(f"{reason}.")
        found = Changelist()
        for name, base, new in zip(self._names, note.base, taken, strict=True):
            if base.inode != new.inode:
                raise SourceError(
                    "its inodes are not those of the last one: it is a copy, or of something else."
                )
            for change in self._changes_of(name, base, new, state, born_ns).dirs:
                assert change.old_path is not None
                found.dirs.append(
                    DirChange(
                        join(name, change.path),
                        join(name, change.old_path),
                        change.names,
                        change.ranges,
                    )
                )
        return found

    def _reason(self, snapshot: int, taken_ns: int) -> str:
        """Why the snapshots that are held are not those to count from; "" if they are."""
        note = self._note
        if (note.snapshot, note.taken_ns) != (snapshot, taken_ns):
            return (
                f"the last snapshot here belongs to snapshot {note.snapshot}, and not to snapshot"
                f" {snapshot} as it is in the repository"
            )
        if note.made_by != self._made_by():
            return "the policy's commands or sources are others"
        return ""

    def state(self, snapshot: int, taken_ns: int) -> SourceState:
        """What the next sync would go by, if the last snapshot is this one. No command is run."""
        if not self._commands.changes:
            return scanning("external", "no command tells what changed")
        if not self._note.base:
            return scanning("external", "there is no snapshot to count from")
        if reason := self._reason(snapshot, taken_ns):
            return scanning("external", reason)
        return SourceState("external", True)

    def _changes_of(
        self, name: bytes, base: _Held, new: _Held, state: SyncState, born_ns: BornNs
    ) -> Changelist:
        command = self._command(self._commands.changes, new.source, [base.id, new.id, new.source])
        with contextlib.closing(command.lines(MAX_CHANGES_BYTES, self._started)) as lines:
            told = read_told(lines, command.name)
        try:
            tree = NewTree(new.place)
        except OSError as error:
            words = (error.strerror or str(error)).lower()
            raise SourceError(f"{os.fsdecode(new.place)}: {words}.") from None
        with contextlib.closing(tree):
            resolver = Resolver(
                told,
                OldTree(state, name),
                tree,
                self._excluded(),
                born_ns,
                unique_inodes=new.unique_inodes,
            )
            return resolver.changelist()

    def _excluded(self) -> Callable[[bytes], bool] | None:
        """Whether the policy's patterns leave out a directory, or one above it."""
        if not self._filters.excludes:
            return None
        excludes = Matcher(self._filters.excludes).excludes
        known: dict[bytes, bool] = {b"": False}

        def excluded(path: bytes) -> bool:
            if path not in known:
                known[path] = excluded(path.rpartition(b"/")[0]) or excludes(path, is_dir=True)
            return known[path]

        return excluded

    # -- commands --------------------------------------------------------------------------------

    def _run(
        self,
        command: tuple[str, ...],
        source: bytes,
        arguments: list[bytes],
        max_bytes: int = MAX_CHANGES_BYTES,
    ) -> list[bytes]:
        """Run a command to its end."""
        run = self._command(command, source, arguments)
        with contextlib.closing(run.lines(max_bytes, self._started)) as lines:
            return list(lines)

    def _command(self, command: tuple[str, ...], source: bytes, arguments: list[bytes]) -> Command:
        environment = {
            os.fsencode(k): os.fsencode(v) for k, v in self._commands.environment.items()
        }
        environment[b"CLOUDFS_SOURCE"] = source
        environment[b"CLOUDFS_POLICY_ID"] = self._policy_id.encode()
        whole = [os.fsencode(argument) for argument in command] + arguments
        return Command(whole, environment, self._commands.timeout_s, self._check_stop)

    def _started(self, leader: int) -> None:
        self._note.process = leader, _started(leader)
        self._write_note()

    def _made_by(self) -> bytes:
        """A digest of what decides what the ids of snapshots mean."""
        commands = self._commands
        return xxhash.xxh3_128_digest(
            msgspec.msgpack.encode([commands.snapshot, commands.changes, self._sources])
        )

    # -- memory ----------------------------------------------------------------------------------

    def _read_note(self) -> _Note:
        try:
            return msgspec.msgpack.decode(self._path.read_bytes(), type=_Note)
        except (OSError, msgspec.DecodeError, msgspec.ValidationError):
            return _Note()

    def _write_note(self) -> None:
        """Atomic; what is lost of it costs a scan, and a snapshot that nobody releases."""
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        temporary.write_bytes(msgspec.msgpack.encode(self._note))
        temporary.replace(self._path)


def _go_on() -> None:
    """What is asked of a sync that cannot be stopped any more."""


def _read_answer(line: bytes, command: str) -> _Answer:
    if not line.lstrip().startswith(b"{"):
        return _Answer(os.fsdecode(line.rstrip(b"\r")))
    try:
        return msgspec.json.decode(line, type=_Answer)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{command}printed no JSON as it must be ({error}).") from None


def _root_inode(place: bytes, source: bytes, command: str) -> int:
    """The inode number at the top of a snapshot, which must not be the source itself."""
    shown = "".join(c if c.isprintable() else "?" for c in os.fsdecode(place))
    if not os.path.isabs(place) or b"\0" in place:
        raise SourceError(f"{command}printed {shown[:200]}, which is no absolute path.")
    try:
        # Opened and not only looked at: some snapshots are mounted when they are entered.
        fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            status, live = os.fstat(fd), os.stat(source)
        finally:
            os.close(fd)
    except NotADirectoryError:
        raise SourceError(f"{command}printed {shown}, which is no directory.") from None
    except OSError as error:
        words = (error.strerror or str(error)).lower()
        raise SourceError(f"{command}printed {shown}, which cannot be read ({words}).") from None
    if os.path.realpath(place) == os.path.realpath(source) or os.path.samestat(status, live):
        raise SourceError(f"{command}printed {shown}, which is the source itself.")
    return status.st_ino


def _started(process: int) -> int:
    """When a process was started, in ticks since the boot; 0 where there is none."""
    try:
        data = Path(f"/proc/{process}/stat").read_bytes()
        return int(data.rpartition(b")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0
