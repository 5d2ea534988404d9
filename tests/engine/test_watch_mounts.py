"""What is mounted, in a tree that is watched or elsewhere, in all ways that the kernel allows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ODD_MOUNTS = """
import ctypes, os, sys
from cloudfs.source.mounts import mounts

libc = ctypes.CDLL(None, use_errno=True)
top = os.fsencode(sys.argv[1])
for name in (b"a\\rb", b"a\\x0bb", b"a\\nb", b"a\\xff b\\\\"):
    os.mkdir(top + b"/" + name)
    assert not libc.mount(b"none", top + b"/" + name, b"tmpfs", 0, None)
fuse = os.open("/dev/fuse", os.O_RDWR)
options = b"fd=%d,rootmode=40000,user_id=0,group_id=0" % fuse
assert not libc.mount(b"none", top, b"fuse.\\xff", 0, options), os.strerror(ctypes.get_errno())
found = [mount for mount in mounts() if (mount.place + b"/").startswith(top + b"/")]
for mount in found:
    print(ascii(os.fsencode(mount.kind)), ascii(mount.place[len(top):]))
"""
"""Run in a mount namespace of its own: nobody else is to be bothered by such mounts."""


def apart(script: str, *arguments: str | Path) -> str:
    """What a Python script prints that sees mounts of its own."""
    done = subprocess.run(
        ["unshare", "-m", "--propagation", "private", sys.executable, "-c", script, *arguments],
        check=False,
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    return done.stdout


def test_mounts_of_any_name_and_kind(base: Path) -> None:
    assert apart(ODD_MOUNTS, base).splitlines() == [
        r"b'tmpfs' b'/a\rb'",
        r"b'tmpfs' b'/a\x0bb'",
        r"b'tmpfs' b'/a\nb'",
        r"b'tmpfs' b'/a\xff b\\'",
        r"b'fuse.\xff' b''",
    ]


IN_A_CHROOT = """
import ctypes, os, sys
from cloudfs.core.errors import SourceError
from cloudfs.source.watch.places import places_of

libc = ctypes.CDLL(None, use_errno=True)
top, bind = os.fsencode(sys.argv[1]), 4096
for name in (b"proc", b"tree"):
    os.mkdir(top + b"/" + name)
assert not libc.mount(b"/proc", top + b"/proc", None, bind, None)
os.chroot(top)
os.chdir("/")
try:
    places_of([b"/tree"], lambda path: False)
except SourceError as error:
    print(error)
"""


def test_a_root_directory_that_is_no_mount_point(base: Path) -> None:
    """The kernel does not list the mount that it is on."""
    assert apart(IN_A_CHROOT, base) == "the mount that /tree is on is not listed, as in a chroot.\n"
