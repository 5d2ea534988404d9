"""Whoever may write to the current directory does not thereby run code as who runs cloudfs."""

from __future__ import annotations

import os
from pathlib import Path

from tests.cli.conftest import Machine

PLANTED = ("lmdb", "msgspec", "zstandard", "signal", "multiprocessing", "botocore", "pyfuse3")


def test_modules_of_the_current_directory_are_not_run(home: Machine, tmp_path: Path) -> None:
    place, mnt = tmp_path / "anybody's", tmp_path / "mnt"
    place.mkdir()
    mnt.mkdir()
    witness = place / "was-here"
    for name in PLANTED:
        (place / f"{name}.py").write_text(f"open({str(witness)!r}, 'a').write({name!r})\n")
    tree = tmp_path / "tree"
    for number in range(40):  # enough for a pool
        (tree / f"large{number}").write_bytes(os.urandom(2 << 20))
    home.run("sync", "home", "--workers", "2", cwd=place)
    home.run("restore", "home", "--target", tmp_path / "out", "--workers", "2", cwd=place)
    home.run("mount", "home", mnt, cwd=place)
    try:
        assert len(os.listdir(mnt / "latest")) == 43
    finally:
        home.run("umount", mnt, cwd=place)
    assert not witness.exists(), witness.read_text()
