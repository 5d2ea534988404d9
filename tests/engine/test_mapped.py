"""Mapped files change without their times: a scan reads them all the same."""

from __future__ import annotations

import mmap
import shutil
import tempfile
from pathlib import Path

from tests.engine.rig import Rig, contents_of_tree, difference


def test_a_mapping_that_stays(local_volume: Path) -> None:
    base = Path(tempfile.mkdtemp(dir=local_volume))
    rig = Rig(base)
    path = rig.tree / "mapped"
    path.write_bytes(b"x" * 10_000)
    (rig.tree / "calm").write_bytes(b"x" * 10_000)
    with path.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    mapped[5000] = 1
    rig.sync()
    untold = 0
    for number in range(2, 40):
        before = path.stat().st_mtime_ns
        mapped[5000] = number
        untold += path.stat().st_mtime_ns == before  # else somebody had it written back
        check(rig)
        if untold == 2:
            break
    assert untold == 2
    mapped[5000] = 4
    mapped.close()
    check(rig)
    assert rig.sync().snapshot is None
    # The same with nothing known but what is in the repository.
    with path.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    mapped[5000] = 5
    check(rig)
    rig.forget_local()
    mapped[5000] = 6
    check(rig)
    mapped.close()
    rig.repository.local.close()
    shutil.rmtree(base)


def check(rig: Rig) -> None:
    result = rig.sync()
    assert result.snapshot is not None
    assert not difference(rig.contents(result.snapshot.number), contents_of_tree(rig.tree))
