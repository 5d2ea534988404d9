"""Giving an item its metadata: owner, mode, extended attributes, ACLs, times, flags.

1. The owner comes first, since chown(2) clears setuid, setgid and ``security.capability``. Then
   extended attributes (the owner may no longer write some of them once the mode is set), the mode,
   ACLs (which contain it), times. Flags that lock an item come when all else is done.
2. setuid and setgid are given only to what has the owner and group that it had: on a file of
   another owner they would mean something else.
3. Who is not root cannot give files away and cannot set attributes of the kinds ``trusted`` and
   ``security``. That is no failure; it is counted as lost.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import os
import pwd
import stat as st
import struct
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache

from cloudfs.core.rows import ItemType, Meta
from cloudfs.restore.values import LOCKING_FLAGS
from cloudfs.source.inode import FS_IOC_GETFLAGS, KEPT_FLAGS

OWNERS = ("id", "name", "none")
"""How owners are given: by their numbers, by their names where this machine knows them, or not."""

ACL_ACCESS, ACL_DEFAULT = b"system.posix_acl_access", b"system.posix_acl_default"
_ACLS = (ACL_ACCESS, ACL_DEFAULT)
_FS_IOC_SETFLAGS = 0x40086602
_FLAGS = struct.Struct("=I4x")
_ROOT_KINDS = (b"trusted.", b"security.")

Target = int | bytes
"""An open file, or a path (``/proc/self/fd/N/NAME``) whose last component is not followed."""


class Dresser:
    """Gives items their metadata. ``lost`` counts what this user may not give, by kind."""

    def __init__(self, owners: str) -> None:
        self._by_name = owners == "name"
        self._none = owners == "none"
        self._user, self._group = os.geteuid(), os.getegid()
        self._groups = {self._group, *os.getgroups()}
        self._root = self._user == 0
        self.lost: Counter[str] = Counter()
        self._failed: list[OSError] = []

    def file(self, fd: int, meta: Meta, xattrs: Mapping[bytes, bytes] | None) -> None:
        """Everything but flags, of an open file or directory. Raises OSError.

        What can be given is given even where attributes fail.
        """
        self._failed.clear()
        mode = meta.mode
        uid, gid = self._ids(meta)
        if uid != -1 or gid != -1:
            os.fchown(fd, uid, gid)
        if mode & 0o6000:
            mode = self._privileged(meta, os.fstat(fd))
        if xattrs:
            self._xattrs(fd, xattrs, acls=False)
        os.fchmod(fd, mode)
        if xattrs:
            self._xattrs(fd, xattrs, acls=True)
        os.utime(fd, ns=(meta.mtime_ns, meta.mtime_ns))
        self._complain()

    def name(
        self, directory: int, name: bytes, meta: Meta, xattrs: Mapping[bytes, bytes] | None
    ) -> None:
        """Everything, of what cannot be opened: symlinks, fifos, sockets, devices."""
        self._failed.clear()
        uid, gid = self._ids(meta)
        if uid != -1 or gid != -1:
            os.chown(name, uid, gid, dir_fd=directory, follow_symlinks=False)
        path = b"/proc/self/fd/%d/%s" % (directory, name)
        symlink = meta.type == ItemType.SYMLINK
        if xattrs:
            self._xattrs(path, xattrs, acls=False)
        if not symlink:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            # There is no chmod that does not follow: what was made here is looked at once more.
            if not st.S_ISLNK(status.st_mode):
                os.chmod(name, self._privileged(meta, status), dir_fd=directory)
        if xattrs:
            self._xattrs(path, xattrs, acls=True)
        times = (meta.mtime_ns, meta.mtime_ns)
        os.utime(name, ns=times, dir_fd=directory, follow_symlinks=False)
        self._complain()

    # -- owners --------------------------------------------------------------------------------

    def _ids(self, meta: Meta) -> tuple[int, int]:
        """What to give to chown; -1 for what is right already or cannot be given."""
        if self._none:
            return -1, -1
        uid, gid = meta.uid, meta.gid
        if self._by_name:
            uid, gid = _user_id(meta.uname, uid), _group_id(meta.gname, gid)
        if not self._root:
            if uid != self._user:
                self.lost["owner"] += 1
            if gid not in self._groups:
                self.lost["group"] += 1
                gid = self._group
            return -1, gid
        # Always said, even to root about root: a directory above may give its own group.
        return uid, gid

    def _privileged(self, meta: Meta, status: os.stat_result) -> int:
        """The mode, with setuid and setgid only where owner and group are what they were."""
        uid, gid = meta.uid, meta.gid
        if self._by_name:
            uid, gid = _user_id(meta.uname, uid), _group_id(meta.gname, gid)
        mode = meta.mode
        if mode & 0o6000 and (status.st_uid, status.st_gid) != (uid, gid):
            self.lost["setuid or setgid"] += 1
            mode &= 0o1777
        return mode

    # -- extended attributes -------------------------------------------------------------------

    def _xattrs(self, target: Target, xattrs: Mapping[bytes, bytes], *, acls: bool) -> None:
        follow = isinstance(target, int)
        for name, value in xattrs.items():
            if (name in _ACLS) is not acls:
                continue
            if not self._root and name.startswith(_ROOT_KINDS):
                self.lost[f"attribute {os.fsdecode(name)}"] += 1
                continue
            try:
                os.setxattr(target, name, value, follow_symlinks=follow)
            except OSError as error:
                shown = name.decode(errors="backslashreplace")
                reason = os.strerror(error.errno or errno.EIO).lower()
                self._failed.append(OSError(error.errno, f"attribute {shown}: {reason}"))

    def _complain(self) -> None:
        failed, self._failed = self._failed, []
        if failed:
            raise failed[0]


@lru_cache(maxsize=4096)
def _user_id(name: str, otherwise: int) -> int:
    try:
        return pwd.getpwnam(name).pw_uid if name else otherwise
    except (KeyError, ValueError):
        return otherwise


@lru_cache(maxsize=4096)
def _group_id(name: str, otherwise: int) -> int:
    try:
        return grp.getgrnam(name).gr_gid if name else otherwise
    except (KeyError, ValueError):
        return otherwise


def set_flags(fd: int, flags: int, *, locking: bool) -> None:
    """Set the inode flags of an open file or directory. Raises OSError.

    Without ``locking`` only those that let it still be changed.
    """
    wanted = flags & (KEPT_FLAGS if locking else KEPT_FLAGS & ~LOCKING_FLAGS)
    if not wanted:
        return
    try:
        # The others belong to the file system, which takes no change of them.
        now = _FLAGS.unpack(fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(_FLAGS.size)))[0]
        fcntl.ioctl(fd, _FS_IOC_SETFLAGS, _FLAGS.pack(now & ~KEPT_FLAGS | wanted))
    except OSError as error:
        reason = "the file system does not keep them"
        if error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            reason = os.strerror(error.errno or errno.EIO).lower()
        raise OSError(error.errno, f"file flags: {reason}") from None


def forget_inherited(fd: int) -> None:
    """Take the ACLs from the target, so that what is made below it inherits none."""
    for name in _ACLS:
        with contextlib.suppress(OSError):
            os.removexattr(fd, os.fsdecode(name))
