"""A rig whose tree is mounted live, over itself; what lies beneath is seen beside it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cloudfs.backup.attempt import Attempt
from cloudfs.core.errors import CloudfsError
from cloudfs.fuse import mountpoint as places
from cloudfs.fuse.daemon import Daemon
from cloudfs.fuse.live.job import LiveJob
from cloudfs.source.live import session
from cloudfs.source.live.client import Line
from cloudfs.source.live.protocol import Answer, Question
from cloudfs.source.live.session import flush
from cloudfs.source.ready import Ready
from tests.engine.btrfs import run
from tests.engine.rig import Rig, contents_of_tree, difference

ROOM_BYTES = 1 << 30


class Living(Rig):
    """A rig whose tree a live mount shows."""

    def __init__(self, base: Path, sources: list[Path] | None = None, **settings: object) -> None:
        super().__init__(base, sources or [], source="live", **settings)  # type: ignore[arg-type]
        self.room_bytes = ROOM_BYTES
        self.waits = True
        self.state: Path | None = None  # the mount's directory, if not where it always is
        self.daemon: Daemon | None = None
        self.spare: Daemon | None = None  # one that has imported all it needs already
        self.beneath = base / "beneath"
        self.beneath.mkdir()
        # Private: else what is mounted over the tree would be mounted over this as well.
        run("mount", "--bind", "--make-private", self.tree, self.beneath)

    @property
    def place(self) -> Path:
        return self.state or self.local().live_dir("home")

    @property
    def log(self) -> Path:
        return self.base / "mount.log"

    def job(self, **others: object) -> LiveJob:
        given: dict[str, object] = {
            "source": str(self.tree),
            "mountpoint": str(self.tree),
            "directory": self.place,
            "name": "home",
            "block_size": self.block_size,
            "room_bytes": self.room_bytes,
            "waits": self.waits,
            "log_file": self.log,
        }
        return LiveJob(**(given | others))  # type: ignore[arg-type]

    def mount(self, **others: object) -> None:
        """Mount, also where a mount stands whose daemon died."""
        assert self.daemon is None
        daemon, self.spare = self.spare or Daemon(), None
        try:
            daemon.mount(self.job(**others))
        except BaseException:
            daemon.cancel()
            raise
        self.daemon = daemon

    def kill(self) -> None:
        """Kill the daemon as the kernel would; its mount stays, and is dead."""
        if self.daemon is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.daemon.pid, signal.SIGKILL)
            self.daemon.wait(10)
            self.daemon = None

    def remount(self) -> None:
        """Kill the daemon, and mount anew at once."""
        self.spare = self.spare or Daemon()
        self.kill()
        self.mount()

    @property
    def is_mounted(self) -> bool:
        """Whether there is a mount, dead or alive."""
        return str(self.tree) in [mounted.mountpoint for mounted in places.mounts()]

    def unmount(self) -> None:
        """End the mount, dead or alive."""
        if self.is_mounted:
            self._take_away(lazy=self.daemon is None)
        if self.daemon is not None:
            try:
                self.daemon.wait(20)
            finally:
                self.kill()

    def _take_away(self, *, lazy: bool) -> None:
        tries = 20
        while True:
            try:
                self.take_away_once(lazy=lazy)
                return
            except CloudfsError as error:  # whoever lists all mounts uses it for a moment
                tries -= 1
                if not tries or "in use" not in str(error):
                    raise
                time.sleep(0.1)

    def take_away_once(self, *, lazy: bool = False) -> None:
        places.unmount(str(self.tree), lazy=lazy)

    def state_of_mount(self) -> Answer:
        with Line(self.place) as line:
            return line.ask(Question("state"))

    def flush(self) -> None:
        """Have all that is dirty in mappings written."""
        if self.daemon is not None:
            flush(os.fsencode(self.tree))

    def check(self) -> None:
        """The last snapshot is what the tree is, seen from above and from beneath."""
        self.flush()
        last = self.history().snapshots[-1].number
        there = contents_of_tree(self.beneath)
        assert not difference(self.contents(last), there)
        assert not difference(contents_of_tree(self.tree), there)

    def close(self) -> None:
        """Leave nothing running or mounted."""
        if self.spare is not None:
            self.spare.cancel()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.unmount()
        self.kill()
        mounted = [self.tree] if self.is_mounted else []
        for path in (*mounted, self.beneath):
            subprocess.run(["umount", "-l", path], capture_output=True, check=False)
        self.repository.local.close()
        self.nothing_was_logged()

    def nothing_was_logged(self) -> None:
        """The daemon met nothing that it did not expect."""
        if self.log.exists():
            said = self.log.read_text()
            assert "Traceback" not in said, said


@contextlib.contextmanager
def living(base: Path, **settings: object) -> Iterator[Living]:
    """A rig that is mounted live, and is taken away in the end."""
    rig = Living(base, **settings)  # type: ignore[arg-type]
    try:
        rig.mount()
        yield rig
    finally:
        rig.close()


class Meanwhile:
    """What is done while a sync runs: once when it has frozen, and once when it begins to read."""

    def __init__(self) -> None:
        self.when_frozen: Callable[[], None] = lambda: None
        self.when_reading: Callable[[], None] = lambda: None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ready, pack = session._Frozen.ready, Attempt._pack

        def then_frozen(frozen: session._Frozen) -> Ready:
            made = ready(frozen)
            self.when_frozen()
            return made

        def then_reading(*args: object) -> None:
            self.when_reading()
            pack(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(session._Frozen, "ready", then_frozen)
        monkeypatch.setattr(Attempt, "_pack", then_reading)
