"""The lease: who is syncing a policy.

1. A lease is an object named by its epoch, written only if absent. Its holder rewrites it every
   BEAT_S and deletes it at the end.
2. Whoever wants to sync looks for leases. A lease of a process of this host that is dead, by host
   name, machine id, boot id and process id, is stale at once. Any other lease is stale when its
   content did not change for STALE_S as measured by the looker's own clock: two machines' clocks
   are never compared. What was seen is remembered, so that who does not wait, but comes back
   later, takes it over then.
3. A stale lease is taken over by writing the lease of the next epoch and then committing the
   manifest once more under it. From then on whatever the old holder commits is refused, because it
   builds on a manifest that has been succeeded.
4. A lease that does not verify says nothing of its holder, who may be alive: a live one writes it
   again, and then it is another. So it is stale when it did not change for STALE_S, as
   that of any other host is.
5. A holder whose lease could not be renewed for STALE_S / 2 publishes nothing. Before it renews
   such a lease (the network was away, or the process was stopped) it looks whether another took
   over; if so, the lease is lost for good.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from cloudfs.core.errors import AlreadyExists, CloudfsError, Damaged, Held, NotFound, StoreError
from cloudfs.db.cache import boot_id
from cloudfs.format import names
from cloudfs.format.envelope import SALT_SIZE, Kind, open_object, seal_object
from cloudfs.repo.history import History

BEAT_S = 15.0
STALE_S = 90.0
_POLL_S = 2.0


class LeaseContent(msgspec.Struct, frozen=True):
    """Who holds a lease. ``beats`` counts renewals; times in ns. ``machine`` tells hosts of the
    same name apart; empty where it is not known."""

    host: str
    boot: str
    pid: int
    pid_start: int
    since_ns: int
    beats: int
    machine: str = ""


class Watch(msgspec.Struct):
    """When this machine first saw which leases: by epoch their bytes, and seconds since boot."""

    boot: str
    seen: dict[int, tuple[bytes, float]]


@dataclass
class Lease:
    """A lease that this process holds."""

    history: History
    epoch: int
    content: LeaseContent
    _stop: threading.Event = field(default_factory=threading.Event)
    _renewed: float = field(default_factory=lambda: time.monotonic())  # noqa: PLW0108
    _lost: bool = False
    _thread: threading.Thread | None = None

    def start_beating(self) -> None:
        """Renew in the background until released."""
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._lost and not self._stop.wait(BEAT_S):
            with contextlib.suppress(StoreError):
                self.renew()

    def renew(self) -> None:
        """Write it again, unless another took over meanwhile (rule 5)."""
        began = time.monotonic()  # before the write: others count from when it took effect
        if began - self._renewed > STALE_S / 2 and self._succeeded():
            self._lost = True
            return
        beats = self.content.beats + 1
        self.content = msgspec.structs.replace(self.content, beats=beats)
        _write(self.history, self.epoch, self.content, if_absent=False)
        self._renewed = began

    def _succeeded(self) -> bool:
        """Whether there is a later lease, or a manifest that this holder did not write."""
        policy_id, known = self.history.policy.id, self.history.manifest.number
        for info in self.history.repository.store.list(names.head(policy_id)):
            kind, number = names.parse_head(policy_id, info.name) or ("", 0)
            if (kind == "lease" and number > self.epoch) or (kind == "manifest" and number > known):
                return True
        return False

    def check(self) -> None:
        """Raise Held when the lease may have been taken over. Call before anything is published."""
        if self._lost or time.monotonic() - self._renewed > STALE_S / 2:
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
    watch = _recall(history)
    deadline = time.monotonic() + wait_s
    said = False
    while True:
        history.refresh()
        holders = [epoch for epoch in history.leases if not _is_stale(history, epoch, watch)]
        if not holders:
            lease = _take(history)
            if lease is not None:
                return lease
            continue
        _remember(history, watch)
        if time.monotonic() >= deadline:
            raise Held(_who(history, holders[0]))
        if on_wait is not None and not said:
            said = True
            on_wait(_who(history, holders[0]))
        time.sleep(min(_POLL_S, max(0.05, deadline - time.monotonic())))


def _take(history: History) -> tuple[Lease, bool] | None:
    stale = list(history.leases)
    epoch = max([history.manifest.epoch, *stale]) + 1
    repository = history.repository
    pid = os.getpid()
    content = LeaseContent(
        socket.gethostname(), boot_id(), pid, _pid_start(pid), time.time_ns(), 0, _machine_id()
    )
    conditional = repository.config.conditional
    lease = Lease(history, epoch, content)
    try:
        _write(history, epoch, content, if_absent=conditional)
    except AlreadyExists:
        return None  # somebody was quicker: look again
    except StoreError:
        _withdraw(lease)  # it may have arrived all the same
        raise
    try:
        return _settle(lease, stale)
    except CloudfsError:
        lease.release()
        raise


def _settle(lease: Lease, stale: list[int]) -> tuple[Lease, bool] | None:
    """Look once more after the lease was written, and fence off those before it."""
    history, epoch = lease.history, lease.epoch
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
            store = history.repository.store
            store.delete([names.lease(history.policy.id, old) for old in stale])
    lease.start_beating()
    return lease, bool(stale)


def _withdraw(lease: Lease) -> None:
    """Delete the lease if it is there and ours."""
    with contextlib.suppress(CloudfsError):
        found = _read(lease.history, lease.epoch)
        if found is not None and found[1] == lease.content:
            lease.release()


def _write(history: History, epoch: int, content: LeaseContent, *, if_absent: bool) -> None:
    repository = history.repository
    name = names.lease(history.policy.id, epoch)
    plain = msgspec.msgpack.encode(content)
    salt = repository.entropy(SALT_SIZE)
    sealed = seal_object(repository.keyring, Kind.LEASE, name, plain, salt)
    repository.store.put(name, [sealed], if_absent=if_absent)


def _read(history: History, epoch: int) -> tuple[bytes, LeaseContent | None] | None:
    """The stored bytes and the content of a lease, None if it is damaged; None if it is gone."""
    repository = history.repository
    name = names.lease(history.policy.id, epoch)
    try:
        data = repository.store.get(name)
    except NotFound:
        return None
    try:
        plain = open_object(repository.keyring, Kind.LEASE, name, data)
        return data, msgspec.msgpack.decode(plain, type=LeaseContent)
    except (Damaged, msgspec.DecodeError, msgspec.ValidationError):
        return data, None


def _is_stale(history: History, epoch: int, watch: dict[int, tuple[bytes, float]]) -> bool:
    found = _read(history, epoch)
    if found is None:
        return True
    data, content = found
    if content is not None and _is_dead(content):
        return True
    now = time.monotonic()
    seen, since = watch.get(epoch, (b"", now))
    if seen != data:
        watch[epoch] = (data, now)
        return False
    return now - since > STALE_S


def _is_dead(content: LeaseContent) -> bool:
    """Whether the holder was a process of this host that is no more."""
    if content.host != socket.gethostname() or content.machine not in ("", _machine_id()):
        return False
    return content.boot != boot_id() or _pid_start(content.pid) != content.pid_start


def _watch_path(history: History) -> Path:
    repository = history.repository
    return repository.local.state_dir / "leases" / f"{repository.id}-{history.policy.id}"


def _recall(history: History) -> dict[int, tuple[bytes, float]]:
    """The leases that this machine saw before, since it was booted."""
    try:
        found = msgspec.msgpack.decode(_watch_path(history).read_bytes(), type=Watch)
    except (OSError, msgspec.DecodeError):
        return {}
    return found.seen if found.boot == boot_id() else {}


def _remember(history: History, watch: dict[int, tuple[bytes, float]]) -> None:
    """Keep what was seen for the next sync; what cannot be kept costs it time."""
    path = _watch_path(history)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_bytes(msgspec.msgpack.encode(Watch(boot_id(), watch)))
        temporary.replace(path)


def _machine_id() -> str:
    """Tells apart machines, and containers of one, that have the same host name."""
    try:
        machine = Path("/etc/machine-id").read_text().strip()
        return f"{machine}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


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
    if content is None:
        return (
            f"{names.lease(history.policy.id, epoch)}, the lease of a sync of {name}, is damaged:"
            " nobody can tell whether that sync still runs. If none does, delete that object, or"
            f" `cloudfs sync {name} --wait`, which takes it over when it did not change for"
            f" {STALE_S:.0f} seconds."
        )
    since = time.strftime("%H:%M:%S", time.localtime(content.since_ns / 1e9))
    return (
        f"{name} is being synced by host {content.host} (process {content.pid}, since {since})."
        f" Wait for it, or `cloudfs sync {name} --wait`."
    )
