"""Real ext4 and xfs file systems on loop devices."""

from __future__ import annotations

import contextlib
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
