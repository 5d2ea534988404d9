"""One mount, from the job to its end: what runs in the foreground or in the daemon.

1. The job holds all that was found out before: the repository is open, the manifests are read.
   So a mount that is ready has asked the store for nothing.
2. The mount is there when ``ready`` is called; questions from then on wait until they are
   answered.
3. It ends when it is unmounted from outside, or unmounts itself on SIGTERM, SIGINT or SIGHUP.
   When the process is killed the mount stays and says "not connected": never an empty directory.
4. Threads may still wait for the store then. They are not waited for, and what they use is not
   closed under them: that ends with the process.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pyfuse3
import trio

from cloudfs.fuse import mountpoint as places
from cloudfs.fuse.job import MountJob, job_of
from cloudfs.fuse.mounting import end_on_signal, init, raise_read_ahead
from cloudfs.fuse.opening import open_view
from cloudfs.fuse.patience import PatientStore
from cloudfs.fuse.view import View
from cloudfs.source.own import SUBTYPE

__all__ = ["MountJob", "job_of", "serve"]


def serve(job: MountJob, ready: Callable[[], None]) -> None:
    """Mount, call ``ready``, answer until the end. Raises UsageError, CloudfsError, OSError."""
    path = places.check(job.mountpoint)
    view, store = open_view(job)
    init(view, path, _options(store.url, allow_other=job.allow_other))
    try:
        trio.run(_run, view, store, path, ready)
    finally:
        pyfuse3.close(unmount=True)


def _options(url: str, *, allow_other: bool) -> set[str]:
    source = url.encode("ascii", "replace").decode().replace("\\", "\\\\").replace(",", "\\,")
    options = {"default_permissions", "ro", f"fsname={source}", f"subtype={SUBTYPE}"}
    return options | {"allow_other"} if allow_other else options


async def _run(view: View, store: PatientStore, path: str, ready: Callable[[], None]) -> None:
    store.refuse_here()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(end_on_signal, nursery)
        nursery.start_soon(_announce, path, ready)
        await view.serve()
        nursery.cancel_scope.cancel()


async def _announce(path: str, ready: Callable[[], None]) -> None:
    """Say that the mount is there when it answers: only then does the kernel know its limits."""
    await trio.to_thread.run_sync(os.stat, path, abandon_on_cancel=True)
    raise_read_ahead(places.device_of(path))
    ready()
