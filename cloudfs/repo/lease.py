"""The lease: who is syncing a policy.

1. A lease is an object named by its epoch, written only if absent. Its holder rewrites it every
   BEAT_S and deletes it at the end.
2. Whoever wants to sync looks for leases. A lease of a process of this host that is dead, by host
   name, boot id and process id, is stale at once. Any other lease is stale when its content did
   not change for STALE_S as measured by the looker's own clock: two machines' clocks are never
   compared.
3. A stale lease is taken over by writing the lease of the next epoch and then committing the
   manifest once more under it. From then on whatever the old holder commits is refused, because it
   builds on a manifest that has been succeeded.
4. A holder whose lease could not be renewed for STALE_S / 2 considers it lost.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from cloudfs.core.errors import AlreadyExists, Damaged, Held, NotFound, StoreError
from cloudfs.db.cache import boot_id
from cloudfs.format import names
from cloudfs.format.envelope import SALT_SIZE, Kind, open_object, seal_object
from cloudfs.repo.history import History

BEAT_S = 15.0
STALE_S = 90.0
_POLL_S = 2.0


class LeaseContent(msgspec.Struct, frozen=True):
    """Who holds a lease. ``beats`` counts renewals; times in ns."""

    host: str
    boot: str
    pid: int
    pid_start: int
    since_ns: int
    beats: int


@dataclass
class Lease:
    """A lease that this process holds."""

    history: History
    epoch: int
    content: LeaseContent
    _stop: threading.Event = field(default_factory=threading.Event)
    _renewed: float = field(default_factory=time.monotonic)
    _thread: threading.Thread | None = None

    def start_beating(self) -> None:
        """Renew in the background until released."""
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            beats = self.content.beats + 1
            self.content = msgspec.structs.replace(self.content, beats=beats)
            with contextlib.suppress(StoreError):
                _write(self.history, self.epoch, self.content, if_absent=False)
                self._renewed = time.monotonic()

    def check(self) -> None:
        """Raise Held when the lease may have been taken over. Call before anything is published."""
        if time.monotonic() - self._renewed > STALE_S / 2:
            raise Held(
                f"the lease on {self.history.policy.name} could not be renewed in time and may be"
                " another's now. Nothing was changed; run the sync again."
            )

    def release(self) -> None:
        """Give it back. What cannot be deleted now goes stale by itself."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        repository = self.history.repository
        with contextlib.suppress(StoreError):
            repository.store.delete([names.lease(self.history.policy.id, self.epoch)])


def acquire(
    history: History, *, wait_s: float = 0.0, on_wait: Callable[[str], None] | None = None
) -> tuple[Lease, bool]:
    """Take the lease of a policy; the second value says it was taken over from somebody.

    ``history`` is brought up to date. Raises Held when another holds it and does not let go
    within ``wait_s``. Requests: a listing, a write and another listing.
    """
    watch: dict[int, tuple[bytes, float]] = {}
    deadline = time.monotonic() + wait_s
    said = False
    while True:
        history.refresh()
        holders = [epoch for epoch in history.leases if not _is_stale(history, epoch, watch)]
        if not holders:
            lease = _take(history)
            if lease is not None:
                return lease
        elif time.monotonic() >= deadline:
            raise Held(_who(history, holders[0]))
        elif on_wait is not None and not said:
            said = True
            on_wait(_who(history, holders[0]))
        if holders:
            time.sleep(min(_POLL_S, max(0.05, deadline - time.monotonic())))


def _take(history: History) -> tuple[Lease, bool] | None:
    stale = list(history.leases)
    epoch = max([history.manifest.epoch, *stale]) + 1
    repository = history.repository
    content = LeaseContent(
        socket.gethostname(), boot_id(), os.getpid(), _pid_start(os.getpid()), time.time_ns(), 0
    )
    conditional = repository.config.conditional
    try:
        _write(history, epoch, content, if_absent=conditional)
    except AlreadyExists:
        return None  # somebody was quicker: look again
    lease = Lease(history, epoch, content)
    # A sync may have ended between our look at the manifest and our taking the lease.
    history.refresh()
    rivals = [other for other in history.leases if other != epoch and other not in stale]
    if any(other > epoch for other in rivals):
        lease.release()
        return None
    if stale:
        fenced = msgspec.structs.replace(
            history.manifest, number=history.manifest.number + 1, epoch=epoch
        )
        history.commit(fenced)
        with contextlib.suppress(StoreError):
            repository.store.delete([names.lease(history.policy.id, old) for old in stale])
    lease.start_beating()
    return lease, bool(stale)


def _write(history: History, epoch: int, content: LeaseContent, *, if_absent: bool) -> None:
    repository = history.repository
    name = names.lease(history.policy.id, epoch)
    plain = msgspec.msgpack.encode(content)
    salt = repository.entropy(SALT_SIZE)
    sealed = seal_object(repository.keyring, Kind.LEASE, name, plain, salt)
    repository.store.put(name, [sealed], if_absent=if_absent)


def _read(history: History, epoch: int) -> tuple[bytes, LeaseContent] | None:
    """The stored bytes and the content of a lease; None if it is gone."""
    repository = history.repository
    name = names.lease(history.policy.id, epoch)
    try:
        data = repository.store.get(name)
    except NotFound:
        return None
    plain = open_object(repository.keyring, Kind.LEASE, name, data)
    try:
        return data, msgspec.msgpack.decode(plain, type=LeaseContent)
    except (msgspec.DecodeError, msgspec.ValidationError):
        raise Damaged(f"{name} is damaged (it holds no lease).") from None


def _is_stale(history: History, epoch: int, watch: dict[int, tuple[bytes, float]]) -> bool:
    found = _read(history, epoch)
    if found is None:
        return True
    data, content = found
    if content.host == socket.gethostname():
        if content.boot != boot_id():
            return True
        if _pid_start(content.pid) != content.pid_start:
            return True
    now = time.monotonic()
    seen, since = watch.get(epoch, (b"", now))
    if seen != data:
        watch[epoch] = (data, now)
        return False
    return now - since > STALE_S


def _pid_start(pid: int) -> int:
    """When a process of this host started, in ticks since boot; -1 if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return -1


def _who(history: History, epoch: int) -> str:
    found = _read(history, epoch)
    name = history.policy.name
    if found is None:
        return f"{name} is being synced by another process. Wait for it."
    content = found[1]
    since = time.strftime("%H:%M:%S", time.localtime(content.since_ns / 1e9))
    return (
        f"{name} is being synced by host {content.host} (process {content.pid}, since {since})."
        f" Wait for it, or `cloudfs sync {name} --wait`."
    )
