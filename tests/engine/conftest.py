"""File systems for the tests of change sources."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine import loops
from tests.engine.living import Living, Meanwhile, living
from tests.engine.watched import Watched


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory in memory, which other users can enter."""
    path = Path(tempfile.mkdtemp(prefix="cloudfs-base-", dir="/dev/shm"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def mounted(base: Path) -> Iterator[Living]:
    """A tree that is mounted live over itself."""
    with living(base) as made:
        yield made


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Meanwhile:
    """What is done while syncs run."""
    made = Meanwhile()
    made.install(monkeypatch)
    return made


@pytest.fixture(scope="module", params=["ext4", "xfs"])
def local_volume(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of each kind for all tests of a module."""
    base = Path(tempfile.mkdtemp(prefix="cloudfs-watch-", dir="/dev/shm"))
    with loops.file_system(base, request.param) as place:
        yield place
    shutil.rmtree(base)


@pytest.fixture
def watched(local_volume: Path) -> Iterator[Watched]:
    """A tree there, and a daemon that watches it."""
    base = Path(tempfile.mkdtemp(dir=local_volume))
    made = Watched(base)
    made.start()
    yield made
    made.kill()
    made.repository.local.close()
    shutil.rmtree(base)


@pytest.fixture
def own_volume(tmp_path: Path) -> Iterator[Path]:
    """A file system that a test may unmount."""
    base = Path(tempfile.mkdtemp(prefix="cloudfs-own-", dir="/dev/shm"))
    with loops.file_system(base, "ext4", 64 << 20) as place:
        yield place
    shutil.rmtree(base)
