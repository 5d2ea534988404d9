"""Acting as who asks.

Users, groups and capabilities belong to a thread in Linux. All that changes the tree is done on the
one thread that serves the kernel, so what is here is for that thread alone.
"""

from __future__ import annotations

import ctypes
import os
import stat as st
import struct
from typing import NamedTuple

import pyfuse3

_libc = ctypes.CDLL(None, use_errno=True)
_setfsuid, _setfsgid = _libc.setfsuid, _libc.setfsgid

_PR_SET_SECUREBITS = 28
_SECBIT_NO_SETUID_FIXUP = 1 << 2
_CAPABILITY_VERSION_3 = 0x2008_0522
_CAP_FSETID = 1 << 4
_CAP_SYS_RESOURCE = 1 << 24


class By(NamedTuple):
    """Who asks."""

    uid: int
    gid: int
    pid: int = 0

    def keeps_setgid(self, status: os.stat_result) -> bool:
        """Whether what this one gives another owner or ACL stays setgid: only where it is in the
        group. (Of that the kernel tells nothing.)"""
        if self.uid == 0 or not status.st_mode & st.S_ISGID or self.gid == status.st_gid:
            return True
        try:
            return status.st_gid in pyfuse3.get_sup_groups(self.pid)
        except (OSError, RuntimeError):
            return False  # it is gone already


class Caller:
    """Who the serving thread is to the file system beneath.

    Whoever may do what is judged by the kernel before it asks (``default_permissions``). What is
    left to do is

    * to own what is made as the caller would,
    * to lose setuid, setgid and capabilities of a file where the caller's write would: that is
      CAP_FSETID, or the lack of it,
    * to find no room where the caller would: what is reserved goes by user and group, and quotas
      hold for who has not CAP_SYS_RESOURCE.

    Of capabilities the kernel tells nothing; root is taken to have them. Between two changes the
    thread is itself, so marks, kept data and new threads are the mount's own.
    """

    def __init__(self) -> None:
        self._can = os.geteuid() == 0
        self._self = self._now = (os.geteuid(), os.getegid(), True)
        if self._can:
            _libc.prctl(_PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP, 0, 0, 0)
            self._header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
            full = ctypes.create_string_buffer(24)
            _libc.capget(self._header, full)
            self._sets = {
                (root, keeps): without(
                    full.raw, (0 if root else _CAP_SYS_RESOURCE) | (0 if keeps else _CAP_FSETID)
                )
                for root in (True, False)
                for keeps in (True, False)
            }

    def acting(self, by: By, *, keeps: bool | None = None) -> Caller:
        """A context in which things are done as for this one. ``keeps``: whether files then stay
        setuid and setgid (None: only if it is root)."""
        self._be((by.uid, by.gid, by.uid == 0 if keeps is None else keeps))
        return self

    def __enter__(self) -> None:
        """:meth:`acting` has begun it, and cannot fail half-way."""

    def __exit__(self, *raised: object) -> None:
        self._be(self._self)

    def _be(self, wanted: tuple[int, int, bool]) -> None:
        before = self._now
        if wanted == before or not self._can:
            return
        self._now = wanted
        uid, gid, keeps = wanted
        if gid != before[1]:
            _setfsgid(gid)
        if uid != before[0]:
            _setfsuid(uid)
        # It does not fail: each set is a part of what the thread may have.
        _libc.capset(self._header, self._sets[uid == 0, keeps])


def without(capabilities: bytes, lost: int) -> bytes:
    """The sets of a thread, as **capget**\\(2) gives them, without some that were effective."""
    (effective,) = struct.unpack_from("=I", capabilities)
    return struct.pack("=I", effective & ~lost) + capabilities[4:]
