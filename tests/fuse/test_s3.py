"""The view over a real S3 server: as it is elsewhere, and whole when the server is away."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest

from cloudfs.store.open import StoreOptions
from tests import servers
from tests.fuse.compare import assert_same, make_odd_tree
from tests.fuse.conftest import Bench


def test_a_mount_over_s3(seaweedfs: servers.S3Server, tmp_path: Path) -> None:
    tree, mnt = tmp_path / "tree", tmp_path / "mnt"
    make_odd_tree(tree)
    (tree / "dir" / "unread").write_bytes(os.urandom(9 << 20))
    options = StoreOptions(endpoint_url=seaweedfs.endpoint_url, region="us-east-1", retry_s=2.0)
    bench = Bench(tmp_path, f"s3://{seaweedfs.bucket}/view", options)
    bench.sync(tree)
    bench.close()
    shutil.rmtree(tmp_path / "cache")  # as on a machine that never saw the repository
    with bench.mounted(mnt, log_file=tmp_path / "log"):
        assert len(os.listdir(mnt / "latest" / "dir")) == 2
        assert (mnt / "latest" / "length-1").read_bytes() == (tree / "length-1").read_bytes()
        os.kill(seaweedfs.process.pid, signal.SIGSTOP)
        try:
            assert (mnt / "latest" / "length-1").read_bytes() == (tree / "length-1").read_bytes()
            assert "latest" in os.listdir(mnt)  # though nobody says whether there is more
        finally:
            os.kill(seaweedfs.process.pid, signal.SIGCONT)
        assert assert_same(tree, mnt / "latest") == 31
    bench.close()


def test_a_server_that_refuses(
    seaweedfs: servers.S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, mnt = tmp_path / "tree", tmp_path / "mnt"
    tree.mkdir()
    (tree / "file").write_bytes(os.urandom(100_000))
    options = StoreOptions(endpoint_url=seaweedfs.endpoint_url, region="us-east-1", retry_s=1.0)
    bench = Bench(tmp_path, f"s3://{seaweedfs.bucket}/refused", options)
    bench.sync(tree)
    job_environment = servers.environment("nobody", "knows")
    for name, value in job_environment.items():
        monkeypatch.setenv(name, value)
    mnt.mkdir()
    with monkeypatch.context() as patched:
        for name, value in seaweedfs.environment.items():
            patched.setenv(name, value)
        job = bench.job(mnt, log_file=tmp_path / "log")
    with bench.serving(job):
        os.stat(mnt / "latest" / "file")
        with pytest.raises(OSError) as raised:
            (mnt / "latest" / "file").read_bytes()
        assert raised.value.errno == errno.EIO
        assert os.listdir(mnt / "latest") == ["file"]
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said
    assert said.strip()
    bench.close()
