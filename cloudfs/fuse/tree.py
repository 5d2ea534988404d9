"""What the view shows: which directories there are, and which rows stand behind an inode number.

1. The top holds one directory for each policy, or, where there is one policy only, what would be
   in that directory: a directory for each snapshot named by its local time, the symlink
   ``latest`` and the directory ``by-number``. All that is *made up*; everything below a
   snapshot's directory is rows. A policy that comes to the repository later gets a directory too;
   what stood at the top stays where it is.
2. Both are answered in the same terms: an inode number (see :mod:`cloudfs.fuse.inodes`) and a
   :class:`Meta`. Nothing is kept for what was looked up, so a million files cost nothing here.
3. Snapshots never change. New ones are found by :meth:`Branch.refresh`; slots are given when a
   snapshot is first seen and never given again.
4. The repository is not trusted: names that no file system could hold are passed over and said.

Methods block where rows must be fetched, unless the store under them refuses (see
:mod:`cloudfs.fuse.patience`). They may be called from several threads at once.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from datetime import datetime

from cloudfs.core.errors import Damaged
from cloudfs.core.rows import ROOT_LIN, ItemType, Meta, locations
from cloudfs.fuse.inodes import (
    MAX_POLICY,
    MAX_SLOT,
    MAX_SNAPSHOT,
    ROOT_INO,
    Kind,
    lin_ino,
    made_up,
    split,
    split_made_up,
)
from cloudfs.fuse.listing import Listing, MadeUpListing, SnapshotListing
from cloudfs.fuse.newcomers import Newcomers
from cloudfs.repo.history import History
from cloudfs.repo.view import SnapshotView

log = logging.getLogger(__name__)

LATEST = b"latest"
BY_NUMBER = b"by-number"
RESERVED = (LATEST, BY_NUMBER)

VIEWS_KEPT = 4
SPARSE_SIZES_KEPT = 4096

Found = tuple[int, Meta]


class Branch:
    """One policy: the names of its snapshots as they were when last asked for."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.slots: dict[int, int] = {}  # snapshot number -> slot
        self.names: dict[bytes, int] = {}  # name by time -> snapshot number
        self.numbers: dict[int, bytes] = {}  # and back
        self.newest_ns = 0

    def refresh(self) -> bool:
        """Look for new snapshots in the store; True when there is something new. One request."""
        return self.history.refresh()

    def take_up(self) -> None:
        """Name the snapshots that the history has at hand."""
        names: dict[bytes, int] = {}
        for record in self.history.snapshots:
            name = time_name(record.time_ns)
            if name in names:
                name += b".%d" % record.number
            names[name] = record.number
            self.newest_ns = record.time_ns
        self.names, self.numbers = names, {number: name for name, number in names.items()}


def time_name(time_ns: int) -> bytes:
    """The local time that a snapshot's directory is named by."""
    return datetime.fromtimestamp(time_ns // 10**9).strftime("%Y-%m-%dT%H:%M:%S").encode()


class Tree:
    """The whole view of one mount."""

    def __init__(
        self,
        histories: Sequence[History],
        *,
        uid: int,
        gid: int,
        finder: Newcomers | None = None,
        first_slot: int = 1,
    ) -> None:
        """``uid`` and ``gid`` own what is made up; ``finder``, where new policies are shown too.
        Slots are given from ``first_slot`` on."""
        assert 0 < len(histories) <= MAX_POLICY
        self.branches = [Branch(history) for history in histories]
        self._owner = (uid, gid)
        self._lock = threading.Lock()
        self._first_slot = first_slot
        self._slots: list[tuple[Branch, int]] = []  # by slot: branch, snapshot number
        self._views: OrderedDict[int, SnapshotView] = OrderedDict()
        self._sparse: dict[tuple[int, int], int] = {}
        self._finder = finder
        self._single = len(histories) == 1  # its snapshots stand at the top
        self._policies: dict[bytes, int] = {}
        if not self._single:
            for number, branch in enumerate(self.branches, start=1):
                self._policies[_unused(branch, self._policies)] = number
        for branch in self.branches:
            self._take_up(branch)

    # -- snapshots -------------------------------------------------------------------------

    def refresh(self, branch: Branch | None) -> None:
        """Take new snapshots of a policy up, or (None) new policies. Raises StoreError or Damaged;
        then all is as before.

        The views are made anew: the segments that the old ones read may be merged away.
        """
        if branch is None:
            self._take_in()
        elif branch.refresh():
            self._take_up(branch)
            with self._lock:
                self._views.clear()

    def _take_up(self, branch: Branch) -> None:
        branch.take_up()
        with self._lock:
            for number in branch.numbers:
                slot = self._first_slot + len(self._slots)
                if number not in branch.slots and slot <= MAX_SLOT:
                    self._slots.append((branch, number))
                    branch.slots[number] = slot

    def _take_in(self) -> None:
        """Give new policies their directories."""
        if self._finder is None:
            return
        known = {branch.history.policy.id for branch in self.branches}
        for history in self._finder.find(known):
            if len(self.branches) == MAX_POLICY:
                return
            branch = Branch(history)
            self._take_up(branch)
            taken = {*self._policies, *(RESERVED if self._single else ())}
            self.branches.append(branch)
            name = _unused(branch, taken)
            self._policies = {**self._policies, name: len(self.branches)}

    def view(self, slot: int) -> SnapshotView:
        """The snapshot of a slot. Raises NoRepository where it was forgotten meanwhile."""
        with self._lock:
            found = self._views.get(slot)
            if found is not None:
                self._views.move_to_end(slot)
                return found
        branch, number = self._slots[slot - self._first_slot]
        found = branch.history.view(number)
        with self._lock:
            self._views[slot] = found
            while len(self._views) > VIEWS_KEPT:
                self._views.popitem(last=False)
        return found

    def branches_at(self, ino: int) -> list[Branch | None]:
        """What :meth:`refresh` may change in a made-up directory; nothing in any other."""
        slot, _ = split(ino)
        if slot:
            return []
        if ino == ROOT_INO:
            found: list[Branch | None] = [self.branches[0]] if self._single else []
            return found if self._finder is None else [*found, None]
        return [self.branches[split_made_up(ino)[0] - 1]]

    def policy_id(self, ino: int) -> str:
        """The id of the policy that an inode in a snapshot belongs to."""
        return self._slots[split(ino)[0] - self._first_slot][0].history.policy.id

    # -- what an inode number stands for ---------------------------------------------------

    def meta(self, ino: int) -> Meta | None:
        """The metadata of an inode; None where there is none."""
        slot, lin = split(ino)
        return self.view(slot).meta(lin) if slot else self._made_up_meta(ino)

    def lookup(self, parent: int, name: bytes) -> Found | None:
        """One name in a directory; None where there is none. Raises Damaged."""
        slot, lin = split(parent)
        if not slot:
            return self._made_up_lookup(parent, name)
        view = self.view(slot)
        entry = view.lookup(lin, name)
        if entry is None or entry.type == ItemType.STREAM:
            return None
        return lin_ino(slot, entry.lin), view.need(entry.lin)

    def listing(self, ino: int) -> Listing:
        """The names in a directory as they are now."""
        slot, lin = split(ino)
        if slot:
            return SnapshotListing(self.view(slot), slot, lin)
        return MadeUpListing(self._made_up_names(ino), self.meta)

    def stored_bytes(self, ino: int, meta: Meta) -> int:
        """The bytes of a file that are not holes, counted in whole blocks."""
        if not meta.sparse:
            return meta.size
        slot, lin = split(ino)
        known = self._sparse.get((slot, lin))
        if known is None:
            rows = self.view(slot).block_rows(lin).values()
            known = sum(loc.length for row in rows for loc in locations(row) if loc is not None)
            if len(self._sparse) >= SPARSE_SIZES_KEPT:
                self._sparse.clear()
            self._sparse[slot, lin] = known
        return known

    # -- what is made up -------------------------------------------------------------------

    def _branch_number(self, ino: int) -> tuple[int, Kind, int]:
        if ino != ROOT_INO:
            return split_made_up(ino)
        return 1 if self._single else 0, Kind.SNAPSHOTS, 0

    def _made_up_names(self, ino: int) -> list[tuple[bytes, int]]:
        policy, kind, _ = self._branch_number(ino)
        policies = [(n, made_up(p, Kind.SNAPSHOTS)) for n, p in self._policies.items()]
        if not policy:
            return policies
        branch = self.branches[policy - 1]
        if kind == Kind.BY_NUMBER:
            return [(b"%d" % n, made_up(policy, Kind.NUMBER, n)) for n in branch.numbers]
        found = [
            (name, lin_ino(branch.slots[number], ROOT_LIN))
            for name, number in branch.names.items()
            if number in branch.slots
        ]
        if found:
            found.append((LATEST, made_up(policy, Kind.LATEST)))
        found.append((BY_NUMBER, made_up(policy, Kind.BY_NUMBER)))
        return found + policies if ino == ROOT_INO else found

    def _made_up_lookup(self, parent: int, name: bytes) -> Found | None:
        policy, kind, _ = self._branch_number(parent)
        ino = 0
        if parent == ROOT_INO and name in self._policies:
            ino = made_up(self._policies[name], Kind.SNAPSHOTS)
        if ino or not policy:
            return self._found(ino)
        branch = self.branches[policy - 1]
        if kind == Kind.BY_NUMBER:
            number = int(name) if name.isdigit() and len(name) < 9 else 0
            if number in branch.numbers and name == b"%d" % number:
                ino = made_up(policy, Kind.NUMBER, number)
        elif name == BY_NUMBER:
            ino = made_up(policy, Kind.BY_NUMBER)
        elif name == LATEST:
            ino = made_up(policy, Kind.LATEST) if branch.names else 0
        elif name in branch.names:
            slot = branch.slots.get(branch.names[name], 0)
            ino = lin_ino(slot, ROOT_LIN) if slot else 0
        return self._found(ino)

    def _found(self, ino: int) -> Found | None:
        meta = self.meta(ino) if ino else None
        if ino and meta is None and split(ino)[0]:
            raise Damaged("the tables are damaged (a snapshot has no root directory).")
        return None if meta is None else (ino, meta)

    def _made_up_meta(self, ino: int) -> Meta | None:
        policy, kind, number = self._branch_number(ino)
        if policy > len(self.branches) or number > MAX_SNAPSHOT:
            return None
        uid, gid = self._owner
        if not policy:
            newest = max(branch.newest_ns for branch in self.branches)
            links = 2 + len(self._policies)
            return _directory(ino, uid, gid, newest, links)
        branch = self.branches[policy - 1]
        if kind == Kind.SNAPSHOTS:
            later = len(self._policies) if ino == ROOT_INO else 0
            return _directory(ino, uid, gid, branch.newest_ns, 3 + len(branch.names) + later)
        if kind == Kind.BY_NUMBER:
            return _directory(ino, uid, gid, branch.newest_ns, 2)
        if not branch.numbers:
            return None
        if kind == Kind.LATEST:
            target = branch.numbers[max(branch.numbers)]
        elif number in branch.numbers:
            target = b"../" + branch.numbers[number]
        else:
            return None
        return Meta(
            lin=ino,
            snap=0,
            type=ItemType.SYMLINK,
            mode=0o777,
            uid=uid,
            gid=gid,
            size=len(target),
            mtime_ns=branch.newest_ns,
            ctime_ns=branch.newest_ns,
            target=target,
        )


def _directory(ino: int, uid: int, gid: int, time_ns: int, links: int) -> Meta:
    return Meta(
        lin=ino,
        snap=0,
        type=ItemType.DIRECTORY,
        mode=0o555,
        uid=uid,
        gid=gid,
        mtime_ns=time_ns,
        ctime_ns=time_ns,
        nlink=links,
    )


def _unused(branch: Branch, taken: Collection[bytes]) -> bytes:
    """A policy's name; two of one name in one repository are told apart by their ids."""
    policy = branch.history.policy
    name = policy.name.replace("/", "_").encode(errors="surrogateescape")
    if not name or name in taken or name in (b".", b".."):
        name += b"." + policy.id[:8].encode()
    return name
