"""The process that listens to file systems for one policy.

1. It marks the file systems, and from then on the kernel queues what happens on them. What it hears
   is a set: names in directories, by handle. It never looks at the tree itself.
2. Time is cut into epochs. A sync closes one, visits what was heard in it, and confirms it when its
   snapshot is committed; then it is forgotten. A sync that fails confirms nothing, and the next one
   gets its epoch too.
3. What was heard counts from the *base* on: the last snapshot that was confirmed. Only this process
   knows it. If it dies, or loses events, there is no base, and the next sync scans.
4. Events are read in batches, with a pause between them in which the kernel merges those that are
   the same. Questions are answered at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import selectors
import signal
import socket
import struct
import sys
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import FrameType

import msgspec

from cloudfs.core.errors import SourceError
from cloudfs.db.watched import Place, WatchedSet
from cloudfs.source.watch.client import receive
from cloudfs.source.watch.fanotify import Event, Fanotify, Mask
from cloudfs.source.watch.protocol import EVENTS, LOCK, SOCKET, Answer, Base, Question

PAUSE_S = 0.05
HELD_IN_MEMORY = 50_000
PEER_TIMEOUT_S = 5.0
LOG_BYTES = 1 << 20

_OVERFLOWED = "the kernel's queue of events overflowed"
_NAMED = int(Mask.CREATE | Mask.DELETE | Mask.MOVED_FROM | Mask.MOVED_TO)
_log = logging.getLogger("cloudfs.watch")


class WatchJob(msgspec.Struct, frozen=True):
    """What a daemon is to do. ``paths``: one on each file system that is to be watched, of which
    ``devices`` gives st_dev and the id that events name it by from now on, whatever becomes of it.
    ``advice`` says for each path what to do where it cannot be watched.
    """

    directory: str
    paths: list[bytes]
    devices: dict[int, bytes]
    advice: list[str]
    log_file: str = ""
    unlimited: bool = True  # the kernel's queue; tests let it overflow


class Ear:
    """Takes events and keeps what they say, by epoch."""

    def __init__(self, fanotify: Fanotify, heard: WatchedSet) -> None:
        self._fanotify = fanotify
        self._heard = heard
        self._names: dict[Place, set[bytes]] = {}
        self._items: set[Place] = set()
        self._gone: set[Place] = set()
        self._held = 0
        self.epoch = 1
        self.lost: dict[int, str] = {}  # by epoch

    def listen(self) -> int:
        """Read one batch of events; how many there were."""
        events = self._fanotify.read()
        for event in events:
            self._take(event)
        if self._held >= HELD_IN_MEMORY:
            self.flush()
        return len(events)

    def _take(self, event: Event) -> None:
        mask, fsid, directory, name, target = event
        if mask & Mask.OVERFLOW:
            self.lost[self.epoch] = _OVERFLOWED
            _log.warning(_OVERFLOWED)
        if directory is not None:
            self._names.setdefault((fsid, directory), set()).add(name)
        if target is not None:
            if not mask & Mask.ONDIR and (directory is None or mask & Mask.MOVED_TO):
                # Its other names are to be found: what is told of it is not told of each of them.
                self._items.add((fsid, target))
            if mask & Mask.DELETE and mask & Mask.ONDIR:
                self._names.pop((fsid, target), None)
                self._gone.add((fsid, target))
        self._held += 1

    def catch_up(self) -> None:
        """Read all that happened before this call."""
        waiting = self._fanotify.queued()
        while waiting > 0:
            count = self.listen()
            if not count:
                break
            waiting -= count
        self.flush()

    def flush(self) -> None:
        """Bring what is in memory to the set."""
        if self._gone:
            self._heard.forget(self.epoch, self._gone)
        self._heard.add(self.epoch, self._names, self._items)
        self._names, self._items, self._gone = {}, set(), set()
        self._held = 0

    def drop_through(self, epoch: int) -> None:
        """Forget the epochs up to this one."""
        self._heard.drop_through(epoch)
        self.lost = {at: words for at, words in self.lost.items() if at > epoch}


class Daemon:
    """Listens, and answers questions."""

    def __init__(self, job: WatchJob) -> None:
        """Take the directory and mark the file systems. Raises SourceError."""
        self._directory = Path(job.directory)
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = _lock(self._directory)
        self._fanotify = Fanotify(unlimited=job.unlimited)
        for path, advice in zip(job.paths, job.advice, strict=True):
            try:
                self._fanotify.mark(path)
            except SourceError as error:
                raise SourceError(f"{error} {advice}") from None
        self._devices = job.devices
        self._heard = WatchedSet(self._directory / EVENTS, writer=True)
        self._ear = Ear(self._fanotify, self._heard)
        self._since_ns = time.time_ns()
        self._base: Base | None = None
        self._first = 1
        self._stopping = False
        self._server = self._listen()

    def _listen(self) -> socket.socket:
        place = self._directory / SOCKET
        place.unlink(missing_ok=True)
        fd = os.open(self._directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            server.bind(f"/proc/self/fd/{fd}/{SOCKET}")
            place.chmod(0o600)
            server.listen()
            return server
        finally:
            os.close(fd)

    def run(self) -> None:
        """Until somebody says stop, or SIGTERM or SIGINT come."""

        def stop(number: int, frame: FrameType | None) -> None:
            self._stopping = True

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        with selectors.DefaultSelector() as both, selectors.DefaultSelector() as questions:
            both.register(self._fanotify.fd, selectors.EVENT_READ)
            both.register(self._server, selectors.EVENT_READ)
            questions.register(self._server, selectors.EVENT_READ)
            while not self._stopping:
                ready = {key.fileobj for key, _ in both.select(timeout=1.0)}
                if self._fanotify.fd in ready:
                    self._ear.listen()
                    if self._server not in ready:
                        ready = {key.fileobj for key, _ in questions.select(timeout=PAUSE_S)}
                if self._server in ready:
                    self._serve()
        self.close()

    def close(self) -> None:
        """Stop listening and leave nothing that looks like a daemon."""
        with contextlib.suppress(OSError):
            (self._directory / SOCKET).unlink()
        self._server.close()
        self._fanotify.close()
        self._heard.close()
        os.close(self._lock)

    # -- questions -------------------------------------------------------------------------------

    def _serve(self) -> None:
        connection, _ = self._server.accept()
        with connection:
            connection.settimeout(PEER_TIMEOUT_S)
            try:
                if _uid_of(connection) not in (0, os.geteuid()):
                    return
                question = msgspec.json.decode(receive(connection), type=Question)
                connection.sendall(msgspec.json.encode(self._answer(question)) + b"\n")
            except (OSError, msgspec.DecodeError) as error:
                _log.warning("a question was not answered: %s", error)

    def _answer(self, question: Question) -> Answer:
        self._ear.catch_up()
        epoch = self._ear.epoch
        if question.ask == "close":
            self._ear.epoch += 1
        elif question.ask == "confirm" and question.base is not None:
            same = question.since_ns == self._since_ns  # else another daemon closed that epoch
            if same and self._first <= question.epoch < epoch:
                self._base, self._first = question.base, question.epoch + 1
                self._heard.forget_dead_readers()
                self._ear.drop_through(question.epoch)
        elif question.ask == "stop":
            self._stopping = True
        marked = self._fanotify.marked()
        return Answer(
            os.getpid(),
            epoch,
            self._first,
            self._base,
            next(iter(self._ear.lost.values()), ""),
            {device: fsid for device, fsid in self._devices.items() if device in marked},
            self._heard.count(),
            self._since_ns,
        )


def _uid_of(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("=iii", credentials)[1])


def _lock(directory: Path) -> int:
    fd = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise SourceError("it is watched already.") from None
    return fd


def _log_to(path: str) -> None:
    handler = RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=1, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)


def main() -> int:
    """The process itself: takes a job from its standard input, says on its standard output "" when
    it listens or else what is wrong, and stays. Returns its exit code."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=WatchJob)
    try:
        daemon = Daemon(job)
    except (SourceError, OSError) as error:
        print(msgspec.json.encode(str(error)).decode(), flush=True)
        return 1
    print('""', flush=True)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    if job.log_file:
        _log_to(job.log_file)
    try:
        daemon.run()
    except Exception:
        _log.exception("the watch daemon failed")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
