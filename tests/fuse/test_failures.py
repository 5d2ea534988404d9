"""What goes wrong around a mount: each an error that says so, and never an empty directory."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cloudfs.core.errors import CloudfsError, UsageError
from cloudfs.fuse import mountpoint as places
from cloudfs.fuse.daemon import Daemon
from tests.fuse.conftest import Bench, wait_until

CONTENT = b"content " * 50_000


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree of two files that lie in two packs, as they come from two syncs."""
    root = tmp_path / "tree"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "one").write_bytes(CONTENT)
    return root


@pytest.fixture
def mnt(tmp_path: Path) -> Path:
    """Where to mount."""
    return tmp_path / "mnt"


def test_a_killed_server_is_not_an_empty_directory(bench: Bench, tree: Path, mnt: Path) -> None:
    bench.sync(tree)
    with bench.mounted(mnt) as daemon:
        os.kill(daemon.pid, signal.SIGKILL)
        daemon.wait(10)
        for look in (os.listdir, os.statvfs):
            with pytest.raises(OSError) as raised:
                look(mnt)
            assert raised.value.errno == errno.ENOTCONN
        found = [m.health() for m in places.mounts() if m.mountpoint == str(mnt)]
        assert found == [places.Health.DEAD]
        with pytest.raises(UsageError, match="mounted there already"):
            places.check(str(mnt))
        places.unmount(str(mnt))
    assert os.listdir(mnt) == []


def test_a_mount_that_hangs_keeps_nobody_else_waiting(
    bench: Bench, tree: Path, mnt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "ANSWER_S", 0.2)
    bench.sync(tree)
    other = tmp_path / "other"
    with bench.mounted(mnt) as stopped:
        os.kill(stopped.pid, signal.SIGSTOP)
        try:
            with bench.mounted(other) as daemon:
                assert os.listdir(other / "latest") == ["sub"]
                found = {m.mountpoint: m.health() for m in places.mounts()}
                assert found[str(mnt)] is places.Health.SILENT
                assert found[str(other)] is places.Health.ALIVE
                places.unmount(str(other))
                assert daemon.wait(10) == 0
        finally:
            os.kill(stopped.pid, signal.SIGCONT)


def test_unmounting_ends_the_server(bench: Bench, tree: Path, mnt: Path) -> None:
    bench.sync(tree)
    with bench.mounted(mnt) as daemon:
        with (mnt / "latest" / "sub" / "one").open("rb"):
            with pytest.raises(CloudfsError, match="in use"):
                places.unmount(str(mnt))
            assert os.listdir(mnt)
        places.unmount(str(mnt))
        assert daemon.wait(10) == 0
    assert os.listdir(mnt) == []
    with pytest.raises(UsageError, match="no cloudfs mount"):
        places.unmount(str(mnt))


def test_unmounting_by_another_name(bench: Bench, tree: Path, mnt: Path, tmp_path: Path) -> None:
    bench.sync(tree)
    (tmp_path / "absolute").symlink_to(mnt)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "relative").symlink_to(f"../{mnt.name}/")
    (tmp_path / "twice").symlink_to("elsewhere/relative")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "away").symlink_to("elsewhere")
    for name in ("absolute", "elsewhere/relative", "twice/", "away/relative"):
        with bench.mounted(mnt) as daemon:
            for other in ("circle", "away", "missing"):
                with pytest.raises(UsageError, match="no cloudfs mount"):
                    places.unmount(str(tmp_path / other))
            os.kill(daemon.pid, signal.SIGSTOP)  # it is not asked anything
            places.unmount(f"{tmp_path}/{name}", lazy=True)
            os.kill(daemon.pid, signal.SIGCONT)
            assert daemon.wait(10) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_unmounts(bench: Bench, tree: Path, mnt: Path, number: int) -> None:
    bench.sync(tree)
    with bench.mounted(mnt) as daemon:
        assert os.listdir(mnt / "latest") == ["sub"]
        os.kill(daemon.pid, number)
        assert daemon.wait(10) == 0
        assert os.listdir(mnt) == []


def test_places_that_cannot_be_mounted_on(bench: Bench, tree: Path, mnt: Path) -> None:
    bench.sync(tree)
    mnt.mkdir()
    (mnt / "file").write_text("in the way")
    for path, sentence in (
        (mnt / "missing", "does not exist"),
        (mnt / "file", "is not a directory"),
        (mnt, "is not empty"),
    ):
        with pytest.raises(UsageError, match=sentence):
            bench.job(path)


def test_a_place_is_checked_again_by_the_server(bench: Bench, tree: Path, mnt: Path) -> None:
    bench.sync(tree)
    mnt.mkdir()
    job = bench.job(mnt)
    (mnt / "file").write_text("came meanwhile")
    with pytest.raises(UsageError, match="is not empty"):
        Daemon().mount(job)


def test_what_the_kernel_refuses_is_said(
    bench: Bench, tree: Path, mnt: Path, tmp_path: Path
) -> None:
    """A process that may not mount is told so in a sentence, with the reason in it."""
    bench.sync(tree)
    mnt.mkdir()
    script = tmp_path / "script.py"
    script.write_text(
        "import pickle, sys\n"
        "from cloudfs.core.errors import CloudfsError\n"
        "from cloudfs.fuse.mount import serve\n"
        "try: serve(pickle.load(open(sys.argv[1], 'rb')), lambda: None)\n"
        "except CloudfsError as error: print(error)\n"
    )
    (tmp_path / "job").write_bytes(pickle.dumps(bench.job(mnt)))
    unprivileged = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    done = subprocess.run(
        [*unprivileged, sys.executable, script, tmp_path / "job"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"{mnt} could not be mounted: " in done.stdout
    assert "ermitted" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_job_that_never_comes_ends_the_server() -> None:
    daemon = Daemon()
    daemon.cancel()
    assert daemon.wait(10) in (0, -signal.SIGTERM)


def test_the_key_is_nowhere_to_be_seen(bench: Bench, tree: Path, mnt: Path) -> None:
    bench.sync(tree)
    key = bench.repository.opening.master
    with bench.mounted(mnt, log_file=bench.base / "log") as daemon:
        for name in ("cmdline", "environ"):
            shown = Path(f"/proc/{daemon.pid}/{name}").read_bytes()
            assert key not in shown
            assert key.hex().encode() not in shown
        assert {os.readlink(f"/proc/{daemon.pid}/fd/{fd}") for fd in (0, 1, 2)} == {os.devnull}
        assert os.getsid(daemon.pid) == daemon.pid
        assert os.readlink(f"/proc/{daemon.pid}/cwd") == "/"


def test_a_store_that_is_down(bench: Bench, tree: Path, mnt: Path) -> None:
    """What was read goes on; what was not is an error until the store is back."""
    bench.sync(tree)
    (tree / "sub" / "two").write_bytes(CONTENT[::-1])
    bench.sync(tree)
    repo, away = bench.base / "repo", bench.base / "away"
    with bench.mounted(mnt, log_file=bench.base / "log"):
        sub = mnt / "latest" / "sub"
        assert (sub / "one").read_bytes() == CONTENT
        os.stat(sub / "two")
        repo.rename(away)
        assert (sub / "one").read_bytes() == CONTENT
        with pytest.raises(OSError) as raised:
            (sub / "two").read_bytes()
        assert raised.value.errno == errno.EIO
        assert os.listdir(mnt / "by-number") == ["1", "2"]
        away.rename(repo)
        assert (sub / "two").read_bytes() == CONTENT[::-1]
    said = (bench.base / "log").read_text()
    assert "is missing" in said
    assert "Traceback" not in said


def test_a_damaged_pack_spoils_only_what_lies_in_it(bench: Bench, tree: Path, mnt: Path) -> None:
    bench.sync(tree)
    packs = set((bench.base / "repo").glob("data/*/pack/*/*"))
    (tree / "sub" / "two").write_bytes(CONTENT[::-1])
    bench.sync(tree)
    for pack in packs:
        data = bytearray(pack.read_bytes())
        data[60] ^= 1
        pack.chmod(0o600)
        pack.write_bytes(data)
    with bench.mounted(mnt, log_file=bench.base / "log"):
        with pytest.raises(OSError) as raised:
            (mnt / "latest" / "sub" / "one").read_bytes()
        assert raised.value.errno == errno.EIO
        assert (mnt / "latest" / "sub" / "two").read_bytes() == CONTENT[::-1]
    said = (bench.base / "log").read_text()
    assert "damaged" in said
    assert "Traceback" not in said


def test_ending_while_the_store_hangs(bench: Bench, tree: Path, mnt: Path) -> None:
    """A read that waits for the store does not keep the mount from ending."""
    bench.sync(tree)
    pack = next(iter((bench.base / "repo").glob("data/*/pack/*/*")))
    pack.unlink()
    os.mkfifo(pack)  # opening it waits for a writer that never comes
    with bench.mounted(mnt) as daemon:
        command = ["cat", mnt / "latest/sub/one"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as reader:
            held = _hold(pack)
            assert os.listdir(mnt / "latest") == ["sub"]
            os.kill(daemon.pid, signal.SIGTERM)
            assert daemon.wait(10) == 0
            assert reader.wait(10) != 0
        os.close(held)
    assert os.listdir(mnt) == []


def _hold(fifo: Path) -> int:
    """Wait until somebody reads from a fifo, and let them wait for what is written to it."""
    held = -1

    def opened() -> bool:
        nonlocal held
        with contextlib.suppress(OSError):  # ENXIO: there is no reader yet
            held = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        return held >= 0

    wait_until(opened)
    return held
