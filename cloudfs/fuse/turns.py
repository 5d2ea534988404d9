"""Whose turn it is to wait for the kernel's next question.

Left to itself, pyfuse3 lets its tasks take turns: for each question two of them pass through the
scheduler, and the device is entered into epoll and taken out again. That is about a quarter of
what listing a tree costs. Here one task, the *leader*, keeps the turn for as long as it answers
without waiting for anything:

1. The leader waits for the next question right on the device: who walks a tree asks again at once.
   It looks LOOKS times (some 60 µs), since falling asleep and being woken costs more than most
   answers, where there is more than one processor, and fewer times for as long as that is in vain;
   then it sleeps, for POLL_MS at most. Then, and
   every SCHEDULE_EVERY questions, it waits as trio would have it, so that all other tasks get their
   share. While threads are out, it does not wait on the device.
2. Who must wait for something calls :meth:`Turns.away`; the turn goes to a task that is parked.
3. When the leader ends (unmounted, told to), the turn goes on, so that all others end in the same
   way.

This replaces a function that pyfuse3 does not promise to keep. Where it is gone, all goes on as
pyfuse3 does it by itself.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable, Iterator
from typing import TypeVar, TypeVarTuple

import pyfuse3
import trio

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

POLL_MS = 1
LOOKS = 60
SCHEDULE_EVERY = 32
TASKS = 32
"""Questions that are worked on at the same time; the kernel keeps the rest."""

HOOK = "_wait_fuse_readable"


class Turns(trio.abc.Instrument):
    """The tasks that serve one mount."""

    def __init__(self) -> None:
        self.installed = False
        self._fd = -1
        self._poll = select.poll()
        self._leader: trio.lowlevel.Task | None = None
        self._parked = trio.lowlevel.ParkingLot()
        self._away = 0
        self._most_looks = self._looks = LOOKS if len(os.sched_getaffinity(0)) > 1 else 1
        self._count = 0

    def install(self) -> None:
        """Take the place of pyfuse3's own waiting; call it when mounted, inside trio."""
        fd = _device()
        if fd is None or not hasattr(pyfuse3, HOOK):
            return
        self._fd = fd
        self._poll.register(fd, select.POLLIN)
        trio.lowlevel.add_instrument(self)
        setattr(pyfuse3, HOOK, self._wait)
        self.installed = True

    async def _wait(self) -> bool:
        """Return True when there is a question to be fetched, False when all is over."""
        me = trio.lowlevel.current_task()
        while self._leader is not None and self._leader is not me:
            await self._parked.park()
        self._leader = me
        self._count += 1
        if self._count % SCHEDULE_EVERY and self._asked():
            return True
        try:
            await trio.lowlevel.wait_readable(self._fd)
        except trio.ClosedResourceError:
            return False
        return True

    def _asked(self) -> bool:
        """Whether there is a question, now or soon."""
        for _ in range(self._looks):
            if self._poll.poll(0):
                self._looks = self._most_looks
                return True
        self._looks = self._looks + 1 >> 1  # in vain: whoever asks is slower, or does not run
        return not self._away and bool(self._poll.poll(POLL_MS))

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Within this the calling task waits for something else, and another has the turn."""
        self._away += 1
        self._pass_on(trio.lowlevel.current_task())
        try:
            yield
        finally:
            self._away -= 1

    async def in_thread(self, question: Callable[[*Ts], T], *args: *Ts, abandon: bool = False) -> T:
        """Ask on another thread. ``abandon``: who is cancelled does not wait for the answer."""
        with self.away():
            return await trio.to_thread.run_sync(question, *args, abandon_on_cancel=abandon)

    def task_exited(self, task: trio.lowlevel.Task) -> None:
        """See rule 3; trio calls this."""
        self._pass_on(task)

    def _pass_on(self, task: trio.lowlevel.Task) -> None:
        if self._leader is task:
            self._leader = None
            self._parked.unpark()


def _device() -> int | None:
    """The file descriptor of the mount: the one that is open on /dev/fuse."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists them is gone by now
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                return int(name)
    return None
