"""A rig whose tree a watch daemon listens to."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import msgspec

from cloudfs.source.watch import client, start
from cloudfs.source.watch.protocol import Answer, Question
from tests.engine import forked
from tests.engine.rig import Rig, contents_of_tree, difference


class Watched(Rig):
    """A rig whose tree a daemon watches."""

    def __init__(self, base: Path, **settings: object) -> None:
        super().__init__(base, source="watch", **settings)  # type: ignore[arg-type]
        self.daemon = 0

    @property
    def place(self) -> Path:
        return self.local().watch_dir("home")

    def start(self, *, unlimited: bool = True) -> None:
        """Start the daemon."""
        sources = [os.fsencode(source) for source in self.sources]
        job = start.job_for("home", self.place, sources, self.filters)
        self.daemon = start.start(msgspec.structs.replace(job, unlimited=unlimited))

    def kill(self) -> None:
        """Kill the daemon, if there is one, as the kernel would."""
        if self.daemon:
            os.kill(self.daemon, signal.SIGKILL)
            forked.wait(self.daemon)
            self.daemon = 0

    def state(self) -> Answer:
        return client.ask(self.place, Question("state"))

    def check(self) -> None:
        """The last snapshot is what the tree is."""
        last = self.history().snapshots[-1].number
        assert not difference(self.contents(last), contents_of_tree(self.tree))


def settle(rig: Watched) -> None:
    """Two syncs, after which the daemon's word counts."""
    rig.sync()
    rig.sync()
    assert rig.notes == []


def heard(rig: Watched) -> None:
    """The next sync goes by what was heard, and misses nothing."""
    result = rig.sync()
    assert rig.notes == []
    assert result.snapshot is not None
    assert result.snapshot.source == "watch"
    rig.check()
