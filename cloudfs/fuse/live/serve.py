"""One live mount, from the job to its end.

1. The tree is reached by a descriptor of the source, and by what is opened through it.
2. Once it is mounted, the process leaves the mount behind (:func:`calls.leave_mount`) and opens the
   source anew, where nothing is mounted over it. So nothing that it opens by a path, its state or
   its log, leads to a question that it would have to answer, and neither does "..".
3. A mount of the same tree whose process died stands until this one has taken its place, so that
   nobody can go past the two. Only then are the marks of that one believed.
4. When it ends, by being unmounted or by a signal, the tree beneath is as it was written: nothing
   is held back.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyfuse3
import trio

from cloudfs.core import limits
from cloudfs.core.errors import UsageError
from cloudfs.db.cache import boot_id
from cloudfs.db.marked import MarkedSet
from cloudfs.fuse import mountpoint as places
from cloudfs.fuse.live import calls
from cloudfs.fuse.live.backups import Backups
from cloudfs.fuse.live.control import Control, Terms
from cloudfs.fuse.live.files import OpenFiles
from cloudfs.fuse.live.inodes import Inode, Inodes
from cloudfs.fuse.live.job import LiveJob
from cloudfs.fuse.live.operations import LiveMount
from cloudfs.fuse.live.tracking import Tracker
from cloudfs.fuse.live.tree import LiveTree
from cloudfs.fuse.mounting import end_on_signal, init, raise_read_ahead
from cloudfs.source.inode import StatReader
from cloudfs.source.live.protocol import LOCK, MARKS, SOCKET
from cloudfs.source.mounts import mounts, shown_twice, within
from cloudfs.source.numbers import keeps_numbers, kind_keeps_numbers
from cloudfs.source.own import LIVE_SUBTYPE, is_view

_SYSTEM = ("/proc", "/sys", "/run", "/etc", "/usr", "/lib")
"""Below these lies what programs and libraries look for, on whatever mounts."""

_USES = {"suid": os.ST_NOSUID, "dev": os.ST_NODEV, "exec": os.ST_NOEXEC}
"""What may be done on a mount, by the options that allow it, and the flags that forbid it."""

_RIGHTS = {"suid", "dev"}
"""Those of them that would give rights. So a mount that comes later and forbids what the live mount
allows, as a drive of some user's does, is not entered."""

SPARE_FILES = 1024
"""Descriptors that are left for all else when many items are known and many files open: threads,
tables, backups that are looked at."""


def serve(job: LiveJob, ready: Callable[[], None]) -> None:
    """Mount, call ``ready``, answer until the end. Raises CloudfsError, OSError."""
    directory = job.directory
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = _lock(directory, job)
    covered = _dead(job.mountpoint)
    host = calls.MountNamespace()
    if covered:
        calls.leave_mount(job.mountpoint)  # to open what lies beneath it
    source_fd = _open_source(job.source)
    source_lock = _claim_source(job, source_fd)
    if covered:
        host.enter()
    marks = MarkedSet(directory / MARKS)
    listener, directory_fd = _listen(directory)
    _stand_for_others()
    mount, tree, tracker, control = _parts(job, source_fd, directory_fd, marks)
    inodes = tree.inodes
    place = _beside(directory) if covered else job.mountpoint
    is_useless = _uselessness(job)  # before there is a mount that looking there could lead to
    if not covered:  # till now the tree could be changed by anybody
        tracker.disown()
    forbidden = _forbidden(job, source_fd)
    inodes.refused = sum(_USES[use] for use in _RIGHTS - forbidden)
    init(mount, place, _options(job, forbidden))
    device = places.device_of(place) or ""
    gc.freeze()  # what is there now stays: it need not be looked through again and again
    try:
        if covered and not calls.replace_mount(place, job.mountpoint):
            covered = ""
        own = places.identity_of(job.mountpoint)
        calls.leave_mount(job.mountpoint, is_useless)
        inodes.enter(_open_source(job.source))
        tracker.begin(boot_id(), _identity(inodes.root.fd), own, covered)
        if not job.tracking:
            tracker.lost[0] = "changes are not noted (--no-tracking)"
        trio.run(_run, mount, control, listener, device, ready)
        tracker.disown()
    finally:
        host.enter()
        if places.device_of(job.mountpoint) == device:
            calls.detach(job.mountpoint)
        pyfuse3.close(unmount=False)
        (directory / SOCKET).unlink(missing_ok=True)
        marks.close()
        os.close(source_lock)
        os.close(lock)


def _parts(
    job: LiveJob, source_fd: int, directory_fd: int, marks: MarkedSet
) -> tuple[LiveMount, LiveTree, Tracker, Control]:
    """What a mount is made of."""
    limit = limits.raise_file_limit()
    inodes = Inodes(source_fd, limit // 2)
    files = OpenFiles(inodes, limit - min(SPARE_FILES, limit // 4))
    tracker = Tracker(marks, job.block_size)
    tree = LiveTree(inodes, files, tracker if job.tracking else None)
    mount = LiveMount(tree, _backups(job, inodes))
    control = Control(
        mount,
        tree,
        tracker,
        _terms(job, inodes, directory_fd),
        mountpoint=os.fsencode(job.mountpoint),
        source=os.fsencode(job.source),
    )
    return mount, tree, tracker, control


def _stand_for_others() -> None:
    """Let this process have nothing of its own that would count for whoever asks."""
    os.umask(0)
    os.setgroups([])  # see By.keeps_setgid


def _backups(job: LiveJob, inodes: Inodes) -> Backups | None:
    given = job.backups
    return None if given is None else Backups(given, inodes, os.fsencode(job.source))


def _options(job: LiveJob, forbidden: set[str]) -> set[str]:
    source = job.source.encode("ascii", "replace").decode().replace("\\", "\\\\")
    source = source.replace(",", "\\,")
    return {
        "default_permissions",
        "allow_other",
        *((f"no{use}" if use in forbidden else use) for use in _USES),
        f"fsname={source}",
        f"subtype={LIVE_SUBTYPE}",
    }


def _forbidden(job: LiveJob, source_fd: int) -> set[str]:
    """What the tree must not be used for: what the mount that it lies on forbids, and of programs
    that run as their owner and of devices also what one within it forbids."""
    flags = os.fstatvfs(source_fd).f_flag
    found = {use for use, flag in _USES.items() if flags & flag}
    for mount in within(os.fsencode(job.source), mounts()):
        found.update(use for use in _RIGHTS if f"no{use}" in mount.options)
    return found


def _terms(job: LiveJob, inodes: Inodes, directory_fd: int) -> Terms:
    def store_fd() -> int:
        flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
        return os.open(b"/proc/self/fd/%d" % directory_fd, flags, 0o600)

    def crosses(inode: Inode) -> bool:
        return job.one_file_system and inode.dev != inodes.dev

    def unfollowed() -> str:
        top, seen = os.fsencode(job.source), mounts()
        twice = shown_twice(top, inodes.root.fd, seen)
        if twice is not None:
            one, other = map(os.fsdecode, twice)
            return f"{one} shows what {other} shows, and a change is told of one of them alone"
        if job.one_file_system:
            return ""
        for mount in within(top, seen):
            if not is_view(mount) and not kind_keeps_numbers(mount.kind):
                place = os.fsdecode(mount.place)
                return f"{place} is on {mount.kind}, where inodes get other numbers at any time"
        return ""

    return Terms(job.room_bytes, job.waits, job.block_size, store_fd, crosses, unfollowed)


async def _run(
    mount: LiveMount,
    control: Control,
    listener: socket.socket,
    device: str,
    ready: Callable[[], None],
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(end_on_signal, nursery)
        nursery.start_soon(control.serve, listener)
        nursery.start_soon(_announce, device, ready)
        await mount.serve(nursery)
        nursery.cancel_scope.cancel()


async def _announce(device: str, ready: Callable[[], None]) -> None:
    """Say that the mount is there. (Looking at it would be a question to this very process.)"""
    await trio.lowlevel.checkpoint()
    raise_read_ahead(device)
    ready()


def _lock(directory: Path, job: LiveJob) -> int:
    """Be the only live mount of a policy. Raises UsageError."""
    fd = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise UsageError(_held_words(job.name, job)) from None
    return fd


def _held_words(what: str, job: LiveJob) -> str:
    """Why ``what`` cannot be locked."""
    here = {job.source, job.mountpoint}
    if any(m.live and here & {m.mountpoint, m.url} for m in places.mounts()):
        return f"{what} is mounted live already; `cloudfs status` says where."
    return (
        f"{what} is held by another process: by a live mount that was unmounted while something of"
        " it was open, or by who locked the directory. End that process, then mount again."
    )


def _claim_source(job: LiveJob, source_fd: int) -> int:
    """The lock of a tree that can be mounted live. Raises UsageError."""
    lock = _lock_source(job)
    if keeps_numbers(source_fd):
        return lock
    os.close(lock)
    raise UsageError(
        f"the source {job.source} lies on a file system where inodes get other numbers at any time,"
        " so what changes there cannot be followed. Use another change source:"
        f" `cloudfs policy set {job.name} --snapshot scan`."
    )


def _lock_source(job: LiveJob) -> int:
    """Be the only live mount of a tree, wherever another is: it would not hear of what is done
    through this one. Raises UsageError."""
    if not job.over_source and any(
        mounted.mountpoint == job.source and mounted.live for mounted in places.mounts()
    ):
        raise UsageError(_held_words(job.source, job))
    fd = os.open(job.source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise UsageError(_held_words(job.source, job)) from None
    return fd


def _dead(mountpoint: str) -> str:
    """The live mount that stands there and whose process is gone, as :func:`places.identity_of` has
    it; "" for none. Raises UsageError where something else is mounted."""
    found = [mounted for mounted in places.mounts() if mounted.mountpoint == mountpoint]
    if not found:
        return ""
    if not found[-1].live or found[-1].health() is not places.Health.DEAD:
        raise UsageError(
            f"{mountpoint}: something is mounted there already; `cloudfs umount` takes it away."
        )
    return places.identity_of(mountpoint)


def _beside(directory: Path) -> str:
    """Where to mount first what is to take the place of a dead mount."""
    place = directory / "new"
    place.mkdir(exist_ok=True, mode=0o700)
    return str(place)


def _uselessness(job: LiveJob) -> Callable[[str], bool]:
    """What says of the places of mounts whether this process has no use for them.

    Held by its namespace, they would stay after they were unmounted: a file system would be busy
    for as long as the live mount is there, and the process of another mount would not end.
    """
    wanted = [job.source, str(job.directory), sys.prefix, sys.base_prefix, *sys.path, *_SYSTEM]
    wanted += [os.path.expanduser("~"), tempfile.gettempdir(), "/dev/fuse", "/dev/shm"]
    if job.log_file is not None:
        wanted.append(str(job.log_file))
    if job.backups is not None:
        given = job.backups.opening
        wanted += [str(given.cache_dir), str(given.state_dir), given.url.removeprefix("file://")]
    paths = [os.path.realpath(path) + "/" for path in wanted if path.startswith("/")]
    whole = tuple(os.path.realpath(path) + "/" for path in (job.source, *_SYSTEM))

    def is_useless(place: str) -> bool:
        within = (place + "/").startswith(whole)
        return not within and not any(path.startswith(place.rstrip("/") + "/") for path in paths)

    return is_useless


def _open_source(source: str) -> int:
    try:
        return os.open(source, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENOTDIR:
            raise UsageError(f"the source {source} is not a directory.") from None
        raise UsageError(f"the source {source} cannot be opened ({error.strerror}).") from None


def _identity(source_fd: int) -> str:
    """By which it is known whether this is the same tree as before."""
    status = StatReader().of(source_fd)
    return f"{status.dev} {status.ino} {status.btime_ns}"


def _listen(directory: Path) -> tuple[socket.socket, int]:
    """The socket for syncs, by descriptor since paths of sockets are short; and the directory's."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    (directory / SOCKET).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"/proc/self/fd/{fd}/{SOCKET}")
    (directory / SOCKET).chmod(0o600)
    listener.listen()
    listener.setblocking(False)
    return listener, fd
