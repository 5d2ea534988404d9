"""What handlers of the live mount have in common: errors, attributes, names of a directory."""

from __future__ import annotations

import errno
import functools
import logging
import os
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import pyfuse3
from pyfuse3 import EntryAttributes, FUSEError

from cloudfs.core.errors import CloudfsError

log = logging.getLogger(__name__)


class Answering(Protocol):
    """Whose handlers these are."""

    def answered(self) -> None:
        """A question is answered, and nothing that was looked up for it is needed any more."""


P = ParamSpec("P")
S = TypeVar("S", bound=Answering)
T = TypeVar("T")


def answering(
    handler: Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """No exception but FUSEError leaves a handler, as any other would end the mount.

    What the file system beneath says is said again; an inode that is no longer known is stale.
    """

    @functools.wraps(handler)
    async def run(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(self, *args, **kwargs)
        except FUSEError:
            raise
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from None
        except KeyError:
            raise FUSEError(errno.ESTALE) from None
        except CloudfsError as error:
            log.error("%s: %s", handler.__name__, error)
        except Exception:
            log.exception("%s failed", handler.__name__)
        finally:
            self.answered()
        raise FUSEError(errno.EIO)

    return run


def attributes_lasting(seconds: float) -> EntryAttributes:
    """Attributes to be filled, which the kernel may believe for so long."""
    made = EntryAttributes()
    made.entry_timeout = made.attr_timeout = seconds
    return made


def fill(a: EntryAttributes, number: int, s: os.stat_result | EntryAttributes) -> EntryAttributes:
    """Attributes of an item of this number. pyfuse3 copies them before anything else runs, so there
    must be no ``await`` between this and the end of the handler."""
    a.st_ino = number
    a.st_mode = s.st_mode
    a.st_nlink = s.st_nlink
    a.st_uid = s.st_uid
    a.st_gid = s.st_gid
    a.st_rdev = s.st_rdev
    a.st_size = s.st_size
    a.st_blksize = s.st_blksize
    a.st_blocks = s.st_blocks
    a.st_atime_ns = s.st_atime_ns
    a.st_mtime_ns = s.st_mtime_ns
    a.st_ctime_ns = s.st_ctime_ns
    return a


def statvfs_of(status: os.statvfs_result) -> pyfuse3.StatvfsData:
    """What df(1) shows: what it would show of the file system beneath."""
    data = pyfuse3.StatvfsData()
    data.f_bsize = status.f_bsize
    data.f_frsize = status.f_frsize
    data.f_blocks = status.f_blocks
    data.f_bfree = status.f_bfree
    data.f_bavail = status.f_bavail
    data.f_files = status.f_files
    data.f_ffree = status.f_ffree
    data.f_favail = status.f_favail
    data.f_namemax = status.f_namemax
    return data
