"""Real ext4 and xfs file systems on loop devices, and a mount of another user."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.engine.btrfs import run

MAKE = {"ext4": ("mkfs.ext4", "-q", "-F"), "xfs": ("mkfs.xfs", "-q")}


@contextlib.contextmanager
def file_system(base: Path, kind: str, size: int = 400 << 20, *options: str) -> Iterator[Path]:
    """A file system, mounted in ``base``; what is missing for it makes the test fail."""
    assert os.geteuid() == 0, f"this test needs root, to mount {kind}"
    assert shutil.which(MAKE[kind][0]), f"this test needs {MAKE[kind][0]}"
    image, place = base / f"{kind}.img", base / kind
    with image.open("wb") as file:
        file.truncate(size)
    place.mkdir()
    run(*MAKE[kind], *options, image)
    run("mount", "-o", "loop", image, place)
    # So that it is unmounted in the mount namespaces of live mounts of other tests as well.
    run("mount", "--make-shared", place)
    try:
        yield place
    finally:
        run("umount", "-l", place)
        image.unlink()


@contextlib.contextmanager
def mount_of_another(place: Path) -> Iterator[None]:
    """A FUSE mount of another user, into which not even root may look. Nobody serves it."""
    fd = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fd},rootmode=40000,user_id=65534,group_id=65534".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mount(b"another", os.fsencode(place), b"fuse.another", 0, options) == 0
    try:
        yield
    finally:
        run("umount", "-l", place)
        os.close(fd)
