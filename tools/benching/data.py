"""The data that is backed up: kernel trees, a random disk, a million small files."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

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
    random_file(target / "disk.img", size)
    return target


def random_file(path: Path, size: int) -> None:
    """A file of random bytes."""
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))


def change_disk(disk: Path) -> None:
    """Write 4 KiB in its middle."""
    with (disk / "disk.img").open("r+b") as file:
        file.seek(file.seek(0, os.SEEK_END) // 2)
        file.write(os.urandom(4096))


Task = TypeVar("Task")


def in_parallel(act: Callable[[Task], None], tasks: Iterable[Task]) -> None:
    """Do this for each task, in as many processes as there are cores."""
    # A pool ends its processes by this signal, of which the one that forked them may think more.
    with multiprocessing.Pool(None, signal.signal, (signal.SIGTERM, signal.SIG_DFL)) as pool:
        pool.map(act, tasks, chunksize=50)


def _fill(task: tuple[int, str, list[str]]) -> None:
    number, top, words = task
    rng = random.Random(number)
    place = f"{top}/{number // 100:02}/{number:04}"
    os.makedirs(place)
    for index in range(FILES_EACH):
        content = text(rng, words)
        name = f"{rng.choice(words)}-{index}.txt"
        with open(f"{place}/{name}", "w") as file:
            file.write(content)


def text(rng: random.Random, words: list[str]) -> str:
    """100 to 1,500 characters: runs of words out of licences.

    They compress by 1.7 within a file and by 6 among many, as text does.
    """
    size = rng.randint(100, 1500)
    made = ""
    while len(made) < size:
        start = rng.randrange(len(words) - RUN_WORDS)
        made += " ".join(words[start : start + RUN_WORDS]) + " "
    return made[:size]


def licence_words() -> list[str]:
    """The words of all licences that Debian keeps."""
    licences = sorted(Path("/usr/share/common-licenses").iterdir())
    lines = "\n".join(p.read_text(errors="replace") for p in licences if not p.is_symlink())
    return re.findall(r"[A-Za-z]+", lines)


def million(base: Path) -> Path:
    """A million files of 100 to 1,500 bytes of text, in 5,000 directories."""
    if "million" in given:
        return given["million"]
    target = base / "data" / "million"
    if not target.exists():
        words = licence_words()
        tasks = [(number, str(target), words) for number in range(DIRECTORIES)]
        in_parallel(_fill, tasks)
    return target
