"""Everything that can be done to the live tree: marked first, then kept for a freeze, then done.

1. A change is one call of one method: mark, keep, change, with nothing in between. So a freeze,
   which begins on the same thread, stands between two changes.
2. What may take long is the keeping of data (:meth:`LiveTree.keep`): it goes in steps, and is over
   when there is nothing left to keep. Who calls it makes the change at once thereafter.
3. Items are reached by descriptor and name, never by path.
4. Errors are the file system's own, as OSError.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from cloudfs.fuse.attributes import ACCESS_LIST
from cloudfs.fuse.live import calls
from cloudfs.fuse.live.caller import By, Caller
from cloudfs.fuse.live.files import OpenFile, OpenFiles
from cloudfs.fuse.live.freeze import AT_ONCE, CHUNK, Freeze
from cloudfs.fuse.live.inodes import Inode, Inodes
from cloudfs.fuse.live.tracking import Tracker

_NOT_PASSED_ON = os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_DIRECT | os.O_TRUNC
"""What the kernel has seen to before it asks; appended data comes with the offset where it goes."""

RENAME_EXCHANGE = 2


@dataclass(slots=True)
class Wanted:
    """Attributes that are to be set; None: as they are. Times in ns."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


class LiveTree:
    """The tree beneath the mount. For the thread that serves the kernel."""

    def __init__(self, inodes: Inodes, files: OpenFiles, tracker: Tracker | None) -> None:
        """Without a tracker nothing is marked (to measure what marking costs)."""
        self.inodes = inodes
        self.files = files
        self.tracker = tracker
        self.freeze: Freeze | None = None
        self._caller = Caller()

    # -- before a change -----------------------------------------------------------------------

    def keep(self, inode: Inode, start: int, end: int, *, cut: bool) -> int:
        """Keep what a freeze needs of these bytes, some of it at a time. ``cut``: they are to be
        cut off.

        Returns from where on there is more to do; ``end`` or more: nothing. Raises Full.
        """
        freeze = self.freeze
        if freeze is None:
            return end
        self.inodes.opened(inode)
        data_end = end
        if cut:
            start, data_end = freeze.next_data(inode, start)
        until = min(end, data_end, start + AT_ONCE * CHUNK)
        missing = freeze.missing(inode, start, until)
        if missing:
            freeze.keep_chunks(inode, missing)
        return end if until >= freeze.size_of(inode) else until

    def _name(self, parent: Inode, name: bytes, child: Inode | None) -> None:
        """A name is about to stand for something else than ``child``."""
        if self.tracker is not None:
            self.tracker.name(parent, name)
        if self.freeze is not None:
            if child is None:  # who makes something under a name that is there fails, and it stays
                with contextlib.suppress(FileNotFoundError):
                    child = self.inodes.look_up(parent, name)[0]
            self.freeze.keep_name(parent, name, child)

    def _item(self, inode: Inode, *, marked: bool = True) -> None:
        """An item's attributes are about to change; ``marked``: by a name already, if not this."""
        if marked and self.tracker is not None:
            self.tracker.item(inode)
        if self.freeze is not None:
            self.freeze.keep_row(inode)

    def _making(self, by: By) -> Caller:
        """Something is made, whose setgid the kernel has judged before it asked."""
        return self._caller.acting(by, keeps=True)

    def _made(self, parent: Inode, name: bytes) -> tuple[Inode, os.stat_result]:
        """What was made just now under a name: none of its data is on record."""
        inode, status = self.inodes.look_up(parent, name)
        if self.freeze is not None and not inode.lookups:
            inode.born = self.freeze.number
        if inode.is_file and self.tracker is not None:
            self.tracker.data_from(inode, 0)
        return inode, status

    # -- names ---------------------------------------------------------------------------------

    def mkdir(self, parent: Inode, name: bytes, mode: int, by: By) -> tuple[Inode, os.stat_result]:
        """Make a directory."""
        self._name(parent, name, None)
        with self._making(by):
            os.mkdir(name, mode, dir_fd=parent.fd)
        return self._made(parent, name)

    def mknod(
        self, parent: Inode, name: bytes, mode: int, rdev: int, by: By
    ) -> tuple[Inode, os.stat_result]:
        """Make a file, fifo, socket or device."""
        self._name(parent, name, None)
        with self._making(by):
            os.mknod(name, mode, rdev, dir_fd=parent.fd)
        return self._made(parent, name)

    def symlink(
        self, parent: Inode, name: bytes, target: bytes, by: By
    ) -> tuple[Inode, os.stat_result]:
        """Make a symlink."""
        self._name(parent, name, None)
        with self._making(by):
            os.symlink(target, name, dir_fd=parent.fd)
        return self._made(parent, name)

    def create(
        self, parent: Inode, name: bytes, mode: int, flags: int, by: By
    ) -> tuple[OpenFile, os.stat_result]:
        """Make a file and open it. The kernel has found that there is none of that name."""
        self._name(parent, name, None)
        passed = _passed_on(flags)
        with self._making(by):
            fd = os.open(name, passed | os.O_CREAT | os.O_EXCL, mode, dir_fd=parent.fd)
        try:
            inode, status = self._made(parent, name)
        except BaseException:
            os.close(fd)
            raise
        return self.files.add(inode, fd, passed, by), status

    def link(self, inode: Inode, parent: Inode, name: bytes, by: By) -> os.stat_result:
        """Give an item one more name."""
        self._name(parent, name, None)
        self._item(inode)
        with self._caller.acting(by):
            os.link(inode.proc, name, dst_dir_fd=parent.fd, follow_symlinks=True)
        return os.fstat(inode.fd)

    def unlink(self, parent: Inode, name: bytes) -> None:
        """Take a name away."""
        with self._going(parent, name):
            os.unlink(name, dir_fd=parent.fd)

    def rmdir(self, parent: Inode, name: bytes) -> None:
        """Remove a directory."""
        with self._going(parent, name):
            os.rmdir(name, dir_fd=parent.fd)

    @contextlib.contextmanager
    def _going(self, parent: Inode, name: bytes) -> Iterator[None]:
        """An item is about to lose a name: what the freeze and its other names need of it."""
        with self._standing(parent, name) as child:
            self._name(parent, name, child)
            if child is not None:
                self._item(child, marked=not _is_last_name(child))
            with self._losing(child):
                yield

    @contextlib.contextmanager
    def _losing(self, child: Inode | None) -> Iterator[None]:
        """A name of an item is about to go; if it goes, it may have been the last."""
        last = child if child is not None and _is_last_name(child) else None
        yield
        if last is not None and self.freeze is not None:
            self.freeze.lose(last)

    @contextlib.contextmanager
    def _standing(self, parent: Inode, name: bytes) -> Iterator[Inode | None]:
        """What a name stands for, held open meanwhile: its number must not be given again while
        the kernel or a freeze knows it."""
        try:
            child = self.inodes.look_up(parent, name)[0]
        except FileNotFoundError:
            yield None
            return
        child.uses += 1
        try:
            yield child
        finally:
            self.inodes.unuse(child)

    def rename(
        self, old_parent: Inode, old: bytes, new_parent: Inode, new: bytes, flags: int, by: By
    ) -> None:
        """Rename, with the flags of **renameat2**\\(2)."""
        with (
            self._standing(old_parent, old) as moved,
            self._standing(new_parent, new) as replaced,
        ):
            self._name(old_parent, old, moved)
            self._name(new_parent, new, replaced)
            for inode in (moved, replaced):
                if inode is not None:
                    self._item(inode)
                    if inode.is_dir and self.freeze is not None:
                        self.freeze.moved_directory()
            losing = None if flags & RENAME_EXCHANGE else replaced
            with self._losing(losing), self._caller.acting(by):
                calls.rename(old_parent.fd, old, new_parent.fd, new, flags)

    # -- items ---------------------------------------------------------------------------------

    def set_attributes(self, inode: Inode, fd: int, wanted: Wanted, by: By) -> os.stat_result:
        """Set what is wanted; ``fd`` is open on a file that is to be cut or grown (-1: none is)."""
        if wanted.size is not None:
            self._cut(inode, wanted.size)
            with self._caller.acting(by):
                self._resize(inode, fd, wanted.size)
        others = (wanted.mode, wanted.uid, wanted.gid, wanted.atime_ns, wanted.mtime_ns)
        if any(value is not None for value in others):
            self._item(inode)
            with self._acting(by, inode):
                _set(inode, wanted)
        return os.fstat(inode.fd)

    def _cut(self, inode: Inode, size: int) -> None:
        """The end of a file is about to be elsewhere."""
        before = os.fstat(inode.fd).st_size
        if self.tracker is not None:
            self.tracker.data_from(inode, min(size, before))
        if self.freeze is not None:
            self.freeze.keep_row(inode)

    def _acting(self, by: By, inode: Inode) -> Caller:
        """What is set now goes with setgid where it would for this one."""
        return self._caller.acting(by, keeps=by.keeps_setgid(os.fstat(inode.fd)))

    @staticmethod
    def _resize(inode: Inode, fd: int, size: int) -> None:
        if fd >= 0:
            os.ftruncate(fd, size)
        else:
            os.truncate(inode.proc, size)

    def set_xattr(self, inode: Inode, name: bytes, value: bytes, by: By) -> None:
        """Set an extended attribute."""
        self._item(inode)
        inode.has_no_capability = False
        with self._acting(by, inode) if name == ACCESS_LIST else self._caller.acting(by):
            os.setxattr(inode.proc, name, value)

    def remove_xattr(self, inode: Inode, name: bytes) -> None:
        """Remove one."""
        self._item(inode)
        os.removexattr(inode.proc, name)

    # -- data ----------------------------------------------------------------------------------

    def open(self, inode: Inode, flags: int, by: By) -> OpenFile:
        """Open a file. With O_TRUNC, :meth:`keep` comes first."""
        passed = _passed_on(flags)
        cut = flags & os.O_TRUNC
        if cut:
            self._cut(inode, 0)
        with self._caller.acting(by):
            try:
                fd = os.open(inode.proc, passed | cut)
            except PermissionError:
                if not flags & os.O_APPEND:
                    raise
                passed |= os.O_APPEND  # it may be that it can only be appended to (chattr +a)
                fd = os.open(inode.proc, passed | cut)
        return self.files.add(inode, fd, passed, by)

    def write(self, opened: OpenFile, offset: int, data: bytes) -> int:
        """Write; returns how many bytes. :meth:`keep` comes first."""
        fd = self.files.fd(opened)
        inode, end = opened.inode, offset + len(data)
        tracker = self.tracker
        if tracker is not None and data and not tracker.covers(inode, offset, end):
            tracker.data(inode, offset, end, os.fstat(fd).st_size)
        if self.freeze is not None:
            self.freeze.keep_row(self.inodes.opened(inode))
        with self._caller.acting(opened.by):
            return os.pwrite(fd, data, offset)


def _is_last_name(inode: Inode) -> bool:
    return inode.is_dir or os.fstat(inode.fd).st_nlink == 1


def _passed_on(flags: int) -> int:
    """What a file is opened with beneath."""
    return flags & ~_NOT_PASSED_ON | os.O_CLOEXEC


def _set(inode: Inode, wanted: Wanted) -> None:
    """Owner first: a change of owner takes setuid and setgid away."""
    if wanted.uid is not None or wanted.gid is not None:
        os.chown(
            inode.proc,
            -1 if wanted.uid is None else wanted.uid,
            -1 if wanted.gid is None else wanted.gid,
        )
    if wanted.mode is not None:
        os.chmod(inode.proc, wanted.mode & 0o7777)
    if wanted.atime_ns is not None or wanted.mtime_ns is not None:
        now = os.fstat(inode.fd)
        atime_ns = now.st_atime_ns if wanted.atime_ns is None else wanted.atime_ns
        mtime_ns = now.st_mtime_ns if wanted.mtime_ns is None else wanted.mtime_ns
        os.utime(inode.proc, ns=(atime_ns, mtime_ns))
