"""Many open files, many names, deep trees, many threads; and a tree that cannot be written to."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cloudfs.core.limits import raise_file_limit
from tests.posix import mounts
from tests.posix.case import in_process, said
from tests.posix.mounts import Pair


def _open_many(top: Path, count: int) -> None:
    raise_file_limit()
    (top / "many").mkdir()
    os.chdir(top / "many")
    fds = []
    for number in range(count):
        fds.append(os.open(f"{number}", os.O_CREAT | os.O_RDWR))
        os.write(fds[-1], b"%d" % number)
    for number in range(0, count, 7):
        os.unlink(f"{number}")
    for number, fd in enumerate(fds):
        assert os.pread(fd, 99, 0) == b"%d" % number
        assert os.fstat(fd).st_nlink == (number % 7 != 0)
    for fd in fds:
        os.close(fd)


def test_open_files(live_pair: Pair) -> None:
    before = mounts.number_of_open_files(live_pair.daemon)
    in_process(lambda: _open_many(live_pair.live, 5_000), 60)
    os.sync()
    shutil.rmtree(live_pair.live / "many")
    assert mounts.number_of_open_files(live_pair.daemon) < before + 1000


def test_more_items_than_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are known to the kernel, so nobody looks any up when they are used; many are open."""
    mounts.few_descriptors(monkeypatch, 2100)
    tree = tmp_path / "tree"
    tree.mkdir()
    paths = [tree / f"{number}" for number in range(3000)]
    for path in paths:
        path.write_bytes(path.name.encode())
    with mounts.mounted(mounts.job(tree, tmp_path / "state")) as mounted:
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(path.open("rb")) for path in paths[:600]]
            for _ in range(2):
                for path in paths:
                    assert path.read_bytes() == path.name.encode()
                    path.chmod(0o600)
            assert all(
                file.read() == path.name.encode() for file, path in zip(held, paths, strict=False)
            )
        for path in paths:
            path.chmod(0o640)
        assert mounts.number_of_open_files(mounted) < 1500


def _use_open_files(top: Path, count: int, removed: int) -> dict[str, bytes]:
    """Everything that can be asked of open files, of each of so many in turn; what is in them. Of
    the first ``removed`` some lose their names."""
    raise_file_limit()
    os.chdir(top)
    files = [os.open(f"{number}", os.O_CREAT | os.O_RDWR | os.O_APPEND) for number in range(count)]
    for number, fd in enumerate(files):
        os.write(fd, b"first %d" % number)
    for number in range(0, count, 5):
        os.rename(f"{number}", f"moved-{number}")
    for number in range(1, removed, 5):
        os.unlink(f"{number}")
    for number in range(2, removed, 5):
        os.replace(f"{number + 1}", f"{number}")
    for number, fd in enumerate(files):
        os.write(fd, b", then %d" % number)
        if number % 3 == 0:
            os.fsync(fd)
        if number % 7 == 0:
            os.ftruncate(fd, 5)
        os.fchmod(fd, 0o640)
    found = {}
    for number, fd in enumerate(files):
        wanted = b"first %d, then %d" % (number, number)
        assert os.pread(fd, 99, 0) == (wanted[:5] if number % 7 == 0 else wanted)
        assert os.fstat(fd).st_nlink == (number >= removed or number % 5 not in (1, 2))
        assert os.fstat(fd).st_mode & 0o777 == 0o640
        os.close(fd)
    for name in os.listdir("."):
        found[name] = Path(name).read_bytes()
    return found


def test_more_open_files_than_descriptors(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts.few_descriptors(monkeypatch, 2100)
    live, bare = pair.base / "other", pair.bare / "other"
    for top in (live, bare):
        top.mkdir()
    with mounts.mounted(mounts.job(live, pair.state.parent / "other-state")):
        found = in_process(lambda: _use_open_files(live, 4000, 3000), 120)
    assert found == in_process(lambda: _use_open_files(bare, 4000, 3000), 120)
    assert {path.name: path.read_bytes() for path in live.iterdir()} == found


@pytest.mark.long
def test_100_000_open_files(live_pair: Pair) -> None:
    """More than one process may have here, and more than the mount's may have."""
    tops = [live_pair.live / f"{number}" for number in range(8)]
    for top in tops:
        top.mkdir()
    with ThreadPoolExecutor(len(tops)) as pool:
        found = list(
            pool.map(lambda top: in_process(lambda: _use_open_files(top, 12_500, 2500), 900), tops)
        )
    assert all(len(names) == 11_500 for names in found)


# -- deep and wide ---------------------------------------------------------------------------------


def _go_down(top: Path, levels: int) -> list[object]:
    """Make directories within directories, beyond what a path can name. What was seen there."""
    os.chdir(top)
    for level in range(levels):
        os.mkdir(f"level-{level:04d}")
        os.chdir(f"level-{level:04d}")
    Path("bottom").write_bytes(b"deep")
    os.rename("bottom", "renamed")
    os.link("renamed", "linked")
    os.symlink("renamed", "symlink")
    os.mkdir("dir")
    seen: list[object] = [sorted(os.listdir(".")), Path("symlink").read_bytes()]
    seen += [os.stat("linked").st_nlink, said(os.stat, "x" * 300), said(os.getcwd) == "ENOENT"]
    os.chdir("..")
    seen += [os.listdir("."), said(os.rmdir, f"level-{levels - 1:04d}")]
    return seen


def test_deep_trees(pair: Pair) -> None:
    levels = 600
    assert levels * len("level-0000/") > os.pathconf("/", "PC_PATH_MAX")
    found = []
    for place in (pair.bare, pair.live):
        (place / "deep").mkdir()
        found.append(in_process(lambda p=place: _go_down(p / "deep", levels), 60))
        shutil.move(place / "deep", place / "moved")
        subprocess.run(["rm", "-r", place / "moved"], check=True)
    assert found[0] == found[1]


def _remove_while_listing(top: Path, count: int) -> None:
    """Listed while half of it is removed: what stays is listed, and nothing twice."""
    top.mkdir()
    fd = os.open(top, os.O_RDONLY)
    for number in range(count):
        os.mknod(f"{number}", dir_fd=fd)
    assert len(os.listdir(top)) == count

    def remove() -> None:
        for number in range(0, count, 2):
            os.unlink(f"{number}", dir_fd=fd)

    remover = threading.Thread(target=remove)
    remover.start()
    for _ in range(5):  # each keeps the remover waiting
        names = os.listdir(top)
        assert len(names) == len(set(names))
        assert {f"{number}" for number in range(1, count, 2)} <= set(names)
    remover.join()
    assert len(os.listdir(top)) == len(os.listdir(fd)) == count // 2
    os.close(fd)


def test_names_are_removed_while_they_are_listed(live_pair: Pair) -> None:
    _remove_while_listing(live_pair.live / "wide", 4_000)


@pytest.mark.long
def test_a_directory_of_50_000_names(live_pair: Pair) -> None:
    _remove_while_listing(live_pair.live / "wide", 50_000)


# -- at the same time ------------------------------------------------------------------------------


def _work(top: Path, who: int) -> None:
    """What one of many does beside the others, some of it in the same place."""
    mine = top / f"{who}"
    mine.mkdir()
    shared = os.open(top / "shared", os.O_CREAT | os.O_RDWR)
    for number in range(40):
        file = mine / f"{number}"
        file.write_bytes(b"%d" % number * 100)
        file.rename(mine / f"moved-{number}")
        os.pwrite(shared, b"%04d" % who, (who * 40 + number) * 4)
        try:
            os.link(mine / f"moved-{number}", top / f"link-{number}")
        except FileExistsError:
            pass
        try:
            os.rename(top / f"link-{number}", top / f"taken-{number}")
        except FileNotFoundError:
            pass
        assert (mine / f"moved-{number}").read_bytes() == b"%d" % number * 100
    os.close(shared)


def test_many_threads(pair: Pair) -> None:
    top, threads = pair.live / "threads", 32
    top.mkdir()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda who: _work(top, who), range(threads)))
    assert len(list(top.glob("*/moved-*"))) == threads * 40
    content = (top / "shared").read_bytes()
    assert content == b"".join(b"%04d" % who * 40 for who in range(threads))


def test_one_name_fought_for(live_pair: Pair) -> None:
    """Of those who make the same name new, exactly one does; what is renamed over is never gone."""
    top = live_pair.live
    (top / "target").write_bytes(b"0")
    won, wrong = [], []

    def fight(who: int) -> None:
        for number in range(100):
            try:
                os.close(os.open(top / f"new-{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                won.append(number)
            except FileExistsError:
                pass
            own = top / f"own-{who}"
            own.write_bytes(b"%d" % who)
            own.rename(top / "target")
            content = (top / "target").read_bytes()
            if not content.isdigit():
                wrong.append(content)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(fight, range(8)))
    assert sorted(won) == list(range(100))
    assert not wrong


# -- what the file system beneath refuses ----------------------------------------------------------

CHANGES: dict[str, Callable[[], object]] = {
    "create": lambda: os.open("new", os.O_CREAT | os.O_WRONLY),
    "write": lambda: os.open("f", os.O_WRONLY),
    "cut": lambda: os.truncate("f", 1),
    "open to cut": lambda: os.open("f", os.O_WRONLY | os.O_TRUNC),
    "mkdir": lambda: os.mkdir("new"),
    "mknod": lambda: os.mknod("new"),
    "symlink": lambda: os.symlink("x", "new"),
    "link": lambda: os.link("f", "new"),
    "rename": lambda: os.rename("f", "new"),
    "unlink": lambda: os.unlink("f"),
    "rmdir": lambda: os.rmdir("d"),
    "chmod": lambda: os.chmod("f", 0o600),
    "chown": lambda: os.chown("f", 1, 1),
    "utime": lambda: os.utime("f"),
    "setxattr": lambda: os.setxattr("f", "user.x", b""),
    "removexattr": lambda: os.removexattr("f", "user.there"),
    "read": lambda: Path("f").read_bytes(),
}


def _tried(top: Path) -> dict[str, object]:
    os.chdir(top)
    return {name: said(change) for name, change in CHANGES.items()}


def test_a_tree_that_cannot_be_written_to(tmp_path: Path) -> None:
    """EROFS, as beneath."""
    beneath = tmp_path / "beneath"
    beneath.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", beneath], check=True)
    try:
        tree = beneath / "tree"
        (tree / "d").mkdir(parents=True)
        (tree / "f").write_bytes(b"content")
        os.setxattr(tree / "f", "user.there", b"")
        subprocess.run(["mount", "-o", "remount,ro", beneath], check=True)
        bare = in_process(lambda: _tried(tree))
        with mounts.mounted(mounts.job(tree, tmp_path / "state")):
            assert in_process(lambda: _tried(tree)) == bare
    finally:
        subprocess.run(["umount", "-l", beneath], check=True)
    assert list(bare.values()).count("EROFS") == len(CHANGES) - 1


def test_a_full_disk_beneath(tmp_path: Path) -> None:
    """ENOSPC to who writes, and what is there stays as it is."""
    beneath = tmp_path / "beneath"
    beneath.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m,nr_inodes=60", "none", beneath], check=True
    )
    try:
        (beneath / "tree").mkdir()
        with mounts.mounted(mounts.job(beneath / "tree", tmp_path / "state")):
            tree = beneath / "tree"
            with (tree / "large").open("wb", buffering=0) as file:
                with pytest.raises(OSError) as raised:
                    while True:
                        file.write(b"x" * 100_000)
                assert raised.value.errno == errno.ENOSPC
            size = (tree / "large").stat().st_size
            assert (tree / "large").read_bytes() == b"x" * size
            assert os.statvfs(tree).f_bavail == 0
            (tree / "large").unlink()
            with pytest.raises(OSError) as raised:
                for number in range(100):
                    (tree / f"{number}").touch()
            assert raised.value.errno == errno.ENOSPC
            assert all(path.stat().st_size == 0 for path in tree.iterdir())
    finally:
        subprocess.run(["umount", "-l", beneath], check=True)
