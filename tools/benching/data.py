"""The data that is backed up: kernel trees, a random disk, a million small files."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import subprocess
import sys
from pathlib import Path

DIRECTORIES, FILES_EACH = 5000, 200
RUN_WORDS = 12
NAMES = ("6.1", "6.12", "million")
given: dict[str, Path] = {}
"""Trees that are there already, by their names. They are only read."""


def kernel(base: Path, version: str) -> Path:
    """The tree of Debian's linux-source package of this version."""
    if version in given:
        return given[version]
    archive = Path(f"/usr/src/linux-source-{version}.tar.xz")
    target = base / "data" / f"linux-{version}"
    if not target.exists():
        if not archive.exists():
            sys.exit(f"Missing {archive}: install Debian's package linux-source-{version}.")
        target.mkdir(parents=True)
        subprocess.run(["tar", "xf", archive, "--strip-components=1", "-C", target], check=True)
    return target


def disk(base: Path, size: int) -> Path:
    """A directory with one file of random bytes."""
    target = base / "data" / "disk"
    target.mkdir(parents=True, exist_ok=True)
    with (target / "disk.img").open("wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))
    return target


def change_disk(disk: Path) -> None:
    """Write 4 KiB in its middle."""
    with (disk / "disk.img").open("r+b") as file:
        file.seek(file.seek(0, os.SEEK_END) // 2)
        file.write(os.urandom(4096))


def _fill(task: tuple[int, str, list[str]]) -> None:
    number, top, words = task
    rng = random.Random(number)
    place = f"{top}/{number // 100:02}/{number:04}"
    os.makedirs(place)
    for index in range(FILES_EACH):
        size = rng.randint(100, 1500)
        text = ""
        while len(text) < size:
            start = rng.randrange(len(words) - RUN_WORDS)
            text += " ".join(words[start : start + RUN_WORDS]) + " "
        name = f"{rng.choice(words)}-{index}.txt"
        with open(f"{place}/{name}", "w") as file:
            file.write(text[:size])


def million(base: Path) -> Path:
    """A million files of 100 to 1,500 bytes of text, in 5,000 directories.

    The text is runs of words out of licences: it compresses by 1.7 within a file and by 6 among
    many, as text does.
    """
    if "million" in given:
        return given["million"]
    target = base / "data" / "million"
    if not target.exists():
        licences = sorted(Path("/usr/share/common-licenses").iterdir())
        text = "\n".join(p.read_text(errors="replace") for p in licences if not p.is_symlink())
        words = re.findall(r"[A-Za-z]+", text)
        tasks = [(number, str(target), words) for number in range(DIRECTORIES)]
        with multiprocessing.Pool() as pool:
            pool.map(_fill, tasks, chunksize=50)
    return target
