"""A real btrfs on a loop device."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

SIZE = 1 << 30
WITHOUT_MOUNTS = """
grep ' fuse.cloudfs' /proc/mounts | while read -r _ place _; do umount -l "$place"; done
exec "$@"
"""


@contextlib.contextmanager
def file_system(base: Path, size: int = SIZE, *options: str) -> Iterator[Path]:
    """A btrfs, mounted in ``base``; what is missing for it makes the test fail."""
    assert os.geteuid() == 0, "this test needs root, to mount btrfs"
    assert shutil.which("mkfs.btrfs"), "this test needs btrfs-progs"
    image, place = base / "btrfs.img", base / "btrfs"
    with image.open("wb") as file:
        file.truncate(size)
    place.mkdir()
    run("mkfs.btrfs", "-q", *options, image)
    run("mount", "-o", "loop", image, place)
    try:
        yield place
    finally:
        run("umount", "-l", place)
        image.unlink()


@contextlib.contextmanager
def volume(size: int = SIZE, *options: str) -> Iterator[Path]:
    """The same, in memory."""
    base = Path(tempfile.mkdtemp(prefix="cloudfs-btrfs-", dir="/dev/shm"))
    with file_system(base, size, *options) as place:
        yield place
    shutil.rmtree(base)


def subvolume(path: Path) -> Path:
    """Make a subvolume."""
    run("btrfs", "subvolume", "create", path)
    return path


def run(*command: str | Path) -> None:
    """Run a command that must succeed.

    One that makes a file system looks at every mount of the machine first, and gives up, or waits
    for ever, where the server of one is gone, as tests beside this one have it. So it sees none.
    """
    if str(command[0]).startswith("mkfs"):
        command = ("unshare", "-m", "sh", "-c", WITHOUT_MOUNTS, "sh", *command)
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr!r}"
