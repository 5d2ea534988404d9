"""File systems of their own, on loop devices, that are gone when a scenario ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benching.measure import Failed

MAKE = {
    # What is not made at once is made later, while something is measured.
    "ext4": "mkfs.ext4 -q -F -m 0 -i 4096 -E lazy_itable_init=0,lazy_journal_init=0",
    "btrfs": "mkfs.btrfs -q -m single -d single",
}
KINDS = {"btrfs": "btrfs", "watch": "ext4", "live": "ext4"}
"""The file system that a change source is measured on."""


def quietly(*command: str | Path) -> None:
    """Run something that is not measured. Raises Failed where it does not succeed."""
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise Failed(f"{' '.join(map(str, command[:4]))}: {done.stderr.decode()[-500:]}")


@contextlib.contextmanager
def volume(base: Path, kind: str, size_bytes: int) -> Iterator[Path]:
    """An empty directory, on btrfs a subvolume, on a file system of its own of this size."""
    if os.geteuid() != 0:
        sys.exit(f"Mounting {kind} on a loop device needs root.")
    if shutil.which(MAKE[kind].split()[0]) is None:
        sys.exit(f"Missing {MAKE[kind].split()[0]}: install btrfs-progs and e2fsprogs.")
    with contextlib.ExitStack() as stack:
        image, place = base / f"{kind}.img", base / kind
        stack.callback(image.unlink, missing_ok=True)
        with image.open("wb") as file:
            file.truncate(size_bytes)
        place.mkdir(exist_ok=True)
        quietly(*MAKE[kind].split(), image)
        quietly("mount", "-o", "loop", image, place)
        stack.callback(unmount, place)
        tree = place / "tree"
        if kind == "btrfs":
            quietly("btrfs", "subvolume", "create", tree)
        else:
            tree.mkdir()
        yield tree


def unmount(place: Path) -> None:
    """Unmount; what is still in use there goes out of sight and ends with its last user."""
    for option in ((), ("-l",)):
        command = ["umount", *option, str(place)]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return
    print(f"  {place} could not be unmounted", file=sys.stderr, flush=True)


SNAPSHOTS = ".cloudfs-snapshots"
"""Where the btrfs snapshots of a tree lie, within it."""


def drop_snapshots(tree: Path) -> None:
    """Delete them, before a program comes that would back them up too."""
    place = tree / SNAPSHOTS
    for snapshot in place.iterdir() if place.exists() else ():
        quietly("btrfs", "subvolume", "delete", "-c", snapshot)


def drop_deleted(tree: Path) -> None:
    """Wait until nothing is left of the snapshots that were deleted."""
    if (tree / SNAPSHOTS).exists():
        quietly("btrfs", "filesystem", "sync", tree)  # which wakes who clears them away
        quietly("btrfs", "subvolume", "sync", tree)


def settle(tree: Path) -> None:
    """Have all that was written reach its device, so that it disturbs nothing that comes."""
    quietly("sync", "-f", tree)


@contextlib.contextmanager
def roomy(base: Path, wanted_bytes: int) -> Iterator[Path]:
    """``base``, or a directory on disk where so much would not fit into memory with its copies."""
    if base.is_relative_to("/dev/shm"):
        free = os.statvfs(base).f_bavail * os.statvfs(base).f_frsize
        if min(free, _available_bytes()) < wanted_bytes:
            with tempfile.TemporaryDirectory(prefix="cloudfs-bench-", dir="/var/tmp") as place:
                print(f"  no room for it in memory: on disk, in {place}", file=sys.stderr)
                yield Path(place)
            return
    yield base


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
