"""The built package: a wheel, and the manual pages in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
SOURCES = (
    "setup.py",
    "setup.cfg",
    "pyproject.toml",
    "MANIFEST.in",
    "README.rst",
    "man",
    "share",
    "cloudfs",
)
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def copied(place: Path) -> Path:
    """What a release is made from, where a build disturbs nobody."""
    place.mkdir()
    for name in SOURCES:
        if (TOP / name).is_dir():
            shutil.copytree(TOP / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(TOP / name, place / name)
    return place


def build(place: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Build a wheel with the tools that are installed."""
    wheel = [*PIP, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, place]
    return subprocess.run(wheel, capture_output=True, text=True, check=False)


def test_the_wheel_brings_every_manual_page(tmp_path: Path) -> None:
    done = build(copied(tmp_path / "source"), tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    made = {source.stem for source in (TOP / "man").glob("*.rst")}
    with zipfile.ZipFile(wheel) as archive:
        held = [name for name in archive.namelist() if "/share/man/" in name]
    assert {name.rpartition("/")[2] for name in held} == made
    install = [*PIP, "install", "-q", "--no-deps", "--ignore-installed", "--prefix", tmp_path / "p"]
    subprocess.run([*install, wheel], check=True)
    for name in made:
        page = tmp_path / "p" / "share" / "man" / f"man{name[-1]}" / name
        assert page.read_text().count(".SH") > 2
    text = (tmp_path / "p" / "share" / "man" / "man1" / "cloudfs.1").read_text()
    assert "EXIT STATUS" in text  # which is included
    assert (tmp_path / "p" / "bin" / "cloudfs").exists()
    for example in (TOP / "share" / "external").iterdir():
        installed = tmp_path / "p" / "share" / "cloudfs" / "external" / example.name
        assert installed.read_bytes() == example.read_bytes()
        assert os.access(installed, os.X_OK)


@pytest.mark.parametrize("bad", ["``unclosed", ".. include:: missing.inc"])
def test_a_page_with_a_warning_is_not_built(tmp_path: Path, bad: str) -> None:
    place = copied(tmp_path / "source")
    with (place / "man" / "cloudfs.1.rst").open("a") as page:
        page.write(f"\n{bad}\n")
    done = build(place, tmp_path)
    assert done.returncode != 0
    assert "cloudfs.1.rst" in done.stderr
