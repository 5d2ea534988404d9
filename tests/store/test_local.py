"""What only a store in a directory does."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudfs.core.errors import AlreadyExists, Denied, Full, NotFound, StoreError, Unavailable
from cloudfs.store.local import STALE_NS, LocalStore

ROOT = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "repo"


@pytest.fixture
def store(root: Path) -> LocalStore:
    return LocalStore(str(root))


def files(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def test_looking_at_a_missing_root_makes_nothing(store: LocalStore, root: Path) -> None:
    with pytest.raises(NotFound):
        store.get("a")
    assert list(store.list("")) == []
    store.delete(["a"])
    assert not root.exists()


def test_objects_are_files_and_nothing_is_left_over(store: LocalStore, root: Path) -> None:
    store.put("data/x/1", [b"one"])
    store.put("data/x/1", [b"two"])
    with pytest.raises(AlreadyExists):
        store.put("data/x/1", [b"three"], if_absent=True)
    assert files(root) == ["data/x/1"]
    assert (root / "data/x/1").read_bytes() == b"two"
    assert os.listdir(root / ".tmp") == []


def test_order_is_of_whole_names(store: LocalStore) -> None:
    given = ["a-b", "a/b", "a.b", "a0", "a/b-c", "a+c", "a/b.c/d"]
    for name in given:
        store.put(name, [])
    assert [info.name for info in store.list("")] == sorted(given)


def test_what_is_not_ours_is_not_listed(store: LocalStore, root: Path) -> None:
    store.put("a", [b"x"])
    for name in (".hidden", "with space", "ümlaut"):
        (root / name).write_text("mine")
    (root / os.fsdecode(b"\xff")).write_text("mine")
    (root / "empty").mkdir()
    assert [info.name for info in store.list("")] == ["a"]


def test_reading_a_limited_listing_does_not_walk_the_rest(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in range(20):
        store.put(f"data/{part:02}/x", [])
    scanned: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scanned.append(path) or scandir(path))
    assert [info.name for info in store.list("", limit=2)] == ["data/00/x", "data/01/x"]
    assert len(scanned) == 4
    scanned.clear()
    assert [info.name for info in store.list("data/17/")] == ["data/17/x"]
    assert len(scanned) == 3


def test_leftovers_of_killed_writers_go_after_a_day(store: LocalStore, root: Path) -> None:
    store.put("a", [b"x"])
    old, young = root / ".tmp/1-old", root / ".tmp/1-young"
    for path in (old, young):
        path.write_bytes(b"half")
    now_ns = young.stat().st_mtime_ns
    os.utime(old, ns=(now_ns, now_ns - STALE_NS - 10**9))
    os.utime(young, ns=(now_ns, now_ns - STALE_NS + 60 * 10**9))
    LocalStore(str(root)).put("b", [b"y"])
    assert os.listdir(root / ".tmp") == ["1-young"]


def test_file_and_every_directory_are_synced_before_put_returns(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def note(fd: int) -> None:
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), root.parent))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", note)
    store.put("data/x/1", [b"one"])
    assert synced[:3] == [".", "repo", "repo/data"]
    assert synced[3].startswith("repo/.tmp/")
    assert synced[4:] == ["repo/data/x"]
    synced.clear()
    store.put("data/x/2", [b"two"], if_absent=True)
    assert len(synced) == 2  # the directories are known by now
    synced.clear()
    LocalStore(str(root)).put("data/x/3", [b"three"])
    assert {"repo", "repo/data", "repo/data/x"} <= set(synced)
    synced.clear()
    store.delete(["data/x/1", "data/x/2"])
    assert synced == ["repo/data/x"]


def test_without_hard_links_a_name_is_still_taken_once(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    store.put("a", [b"first"], if_absent=True)
    with pytest.raises(AlreadyExists):
        store.put("a", [b"second"], if_absent=True)
    assert store.get("a") == b"first"
    assert os.listdir(root / ".tmp") == []


def test_a_root_that_vanished_is_not_made_again(store: LocalStore, root: Path) -> None:
    store.put("data/a", [b"x"])
    root.rename(root.with_name("unmounted"))
    with pytest.raises(StoreError, match="Is the drive mounted"):
        store.put("data/b", [b"x"])
    assert not root.exists()


@pytest.mark.parametrize("target", ["repo", "repo/data"])
def test_a_file_where_a_directory_must_be(store: LocalStore, root: Path, target: str) -> None:
    path = root.parent / target
    path.parent.mkdir(exist_ok=True)
    path.write_text("a file")
    with pytest.raises(StoreError, match="a file where a directory must be"):
        store.put("data/a", [b"x"])
    with pytest.raises(NotFound):
        store.get("data/a")


def test_a_directory_where_a_file_must_be(store: LocalStore) -> None:
    store.put("data/a", [b"x"])
    with pytest.raises(StoreError, match="a file where a directory must be"):
        store.put("data", [b"x"])
    with pytest.raises(NotFound):
        store.get("data")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, Full),
        (errno.EDQUOT, Full),
        (errno.EACCES, Denied),
        (errno.EROFS, Denied),
        (errno.ESTALE, Unavailable),
        (errno.EIO, StoreError),
    ],
)
def test_kinds_of_errors(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type
) -> None:
    store.put("a", [b"old"])

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StoreError, match=os.strerror(code).lower()) as caught:
            store.put("a", [b"new"])
        assert type(caught.value) is kind
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fail)
        with pytest.raises(StoreError) as caught:
            store.get("a")
        assert type(caught.value) is kind
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", fail)
        with pytest.raises(StoreError) as caught:
            list(store.list(""))
        assert type(caught.value) is kind
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", fail)
        with pytest.raises(StoreError) as caught:
            store.delete(["a"])
        assert type(caught.value) is kind
    assert store.get("a") == b"old"
    assert os.listdir(root / ".tmp") == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system with 1 MiB of room."""
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", mount], check=True)
    yield mount
    subprocess.run(["umount", mount], check=True)


@pytest.mark.parametrize("chunks", [[b"x" * (3 << 20)], [b"x" * 1000] * 3000])
def test_a_full_disk(small_disk: Path, chunks: list[bytes]) -> None:
    store = LocalStore(f"{small_disk}/repo")
    store.put("a", [b"old"])
    for if_absent in (False, True):
        with pytest.raises(Full, match="no room is left"):
            store.put("b" if if_absent else "a", chunks, if_absent=if_absent)
    assert store.get("a") == b"old"
    assert [info.name for info in store.list("")] == ["a"]
    assert os.listdir(small_disk / "repo/.tmp") == []
    store.put("a", [b"y" * (900 << 10)])  # all room was given back


def test_another_user_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "repo"
    LocalStore(str(root)).put("a", [b"x"])
    script = (
        "import os, sys\n"
        "from cloudfs.core.errors import Denied\n"
        "from cloudfs.store.local import LocalStore\n"
        "store = LocalStore(sys.argv[1])\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "actions = [lambda: store.get('a'), lambda: store.put('b', [b'y']),\n"
        "           lambda: list(store.list('')), lambda: store.delete(['a'])]\n"
        "for action in actions:\n"
        "    try:\n"
        "        action()\n"
        "    except Denied as error:\n"
        "        print(error)\n"
    )
    root.chmod(0o700)
    done = subprocess.run(
        [sys.executable, "-c", script, str(root)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.count("refuses access") == 4
    assert LocalStore(str(root)).get("a") == b"x"


def test_killed_writers_leave_whole_objects_only(root: Path) -> None:
    """Kill a process that puts the same few names again and again, and look at what is there."""
    script = (
        "import sys\n"
        "from cloudfs.store.local import LocalStore\n"
        "store = LocalStore(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "n = 0\n"
        "while True:\n"
        "    n += 1\n"
        "    store.put(f'data/{n % 5}', [b'%09d' % n] * 20000)\n"
    )
    for turn in range(10):
        with subprocess.Popen(
            [sys.executable, "-c", script, str(root)], cwd=ROOT, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.01 + 0.007 * turn)
            assert process.poll() is None
            process.send_signal(signal.SIGKILL)
        store = LocalStore(str(root))
        for info in store.list(""):
            data = store.get(info.name)
            assert data == data[:9] * 20000
    assert [info.name for info in store.list("data/")] == [f"data/{n}" for n in range(5)]
