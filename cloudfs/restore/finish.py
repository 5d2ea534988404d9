"""What the coordinator does itself: directories first, and at the end whatever must come last."""

from __future__ import annotations

import contextlib
import os

from cloudfs.core.errors import Damaged, UsageError
from cloudfs.restore.metadata import set_flags
from cloudfs.restore.values import Item, Plan
from cloudfs.restore.worker import Failure, RestoreWorker, failure

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_TROUBLE = (OSError, Damaged, UsageError)


class Finisher:
    """Begins and ends the execution of a plan; ``failures`` collects what could not be done."""

    def __init__(self, plan: Plan, worker: RestoreWorker) -> None:
        self._plan = plan
        self._worker = worker
        self._directories = worker.directories
        self._directories.use(
            {i: (d.parent, d.name) for i, d in enumerate(plan.directories) if i > 0}
        )
        self.failures: list[Failure] = []

    def _failed(self, directory: int, name: bytes, error: Exception) -> None:
        self.failures.append(failure(directory, name, error))

    # -- before the parts ----------------------------------------------------------------------

    def make_directories(self) -> None:
        """Make all directories, for their owner alone. Raises OSError for what meets them all."""
        opened = self._directories.open
        for directory in self._plan.directories[1:]:
            try:
                os.mkdir(directory.name, 0o700, dir_fd=opened(directory.parent))
            except OSError as error:
                self._failed(directory.parent, directory.name, error)

    def begin_split(self) -> None:
        """Make the files that come in pieces."""
        for item in self._plan.split:
            try:
                self._worker.writer.begin(item)
            except OSError as error:
                self._failed(item.directory, item.name, error)

    # -- after the parts -----------------------------------------------------------------------

    def finish(self, failures: list[Failure]) -> None:
        """Everything that comes last; ``failures`` are those of the parts."""
        names = {i: (d.parent, d.name) for i, d in enumerate(self._plan.directories) if i > 0}
        self._directories.use(names)
        failed = {(found.directory, found.name) for found in (*failures, *self.failures)}
        for item in self._plan.split:
            self._finish_split(item, failed)
        for link in self._plan.links:
            self._link(*link)
        for directory, name, flags in self._plan.locked:
            if (directory, name) not in failed:
                self._lock(directory, name, flags)
        for index in range(len(self._plan.directories) - 1, -1, -1):
            self._finish_directory(index)

    def _finish_split(self, item: Item, failed: set[tuple[int, bytes]]) -> None:
        if (item.directory, item.name) in failed:
            # What is half there must not be taken for what was backed up.
            with contextlib.suppress(OSError):
                os.unlink(item.name, dir_fd=self._directories.open(item.directory))
            return
        try:
            self._worker.writer.finish(item, self._worker.xattrs(item.meta))
        except _TROUBLE as error:
            self._failed(item.directory, item.name, error)

    def _link(self, directory: int, name: bytes, first_directory: int, first_name: bytes) -> None:
        try:
            # Twice opened, so that neither descriptor can be the one that is closed for the other.
            source = os.dup(self._directories.open(first_directory))
            try:
                os.link(
                    first_name,
                    name,
                    src_dir_fd=source,
                    dst_dir_fd=self._directories.open(directory),
                    follow_symlinks=False,
                )
            finally:
                os.close(source)
        except OSError as error:
            self._failed(directory, name, error)

    def _lock(self, directory: int, name: bytes, flags: int) -> None:
        try:
            fd = os.open(name, _READ, dir_fd=self._directories.open(directory))
            try:
                set_flags(fd, flags, locking=True)
            finally:
                os.close(fd)
        except OSError as error:
            self._failed(directory, name, error)

    def _finish_directory(self, index: int) -> None:
        directory = self._plan.directories[index]
        meta = directory.meta
        if meta is None:
            return
        try:
            fd = self._directories.open(index)
            self._worker.dresser.file(fd, meta, self._worker.xattrs(meta))
            set_flags(fd, meta.flags, locking=True)
        except _TROUBLE as error:
            self._failed(max(directory.parent, 0), directory.name, error)
