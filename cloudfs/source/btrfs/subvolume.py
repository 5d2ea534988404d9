"""Subvolumes and their read-only snapshots, by the ``btrfs`` command."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from typing import IO, NamedTuple

from cloudfs.core.changelist import Changelist
from cloudfs.core.errors import SourceError
from cloudfs.source.btrfs.replay import Replay
from cloudfs.source.btrfs.stream import commands

ROOT_INODE = 256
STUB_INODE = 2
"""The inode of the empty directory that stands in a snapshot where another subvolume was."""

_BTRFS_MAGIC = 0x9123683E
_COMMAND_S = 600


class Identity(NamedTuple):
    """What tells a snapshot from any other, and whether it was changed."""

    uuid: str
    parent_uuid: str  # of the subvolume that it is a snapshot of
    generation: int
    read_only: bool


def available() -> bool:
    """Whether snapshots can be taken here: by root, with the ``btrfs`` command."""
    return os.geteuid() == 0 and shutil.which("btrfs") is not None


def is_subvolume(path: bytes) -> bool:
    """Whether a path is the top of a btrfs subvolume."""
    try:
        return os.stat(path).st_ino == ROOT_INODE and _magic(path) == _BTRFS_MAGIC
    except OSError:
        return False


def _magic(path: bytes) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(256)
    if libc.statfs(path, buffer):
        raise OSError(ctypes.get_errno(), "statfs")
    return ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF


def snapshot(source: bytes, target: bytes) -> None:
    """Take a read-only snapshot. Raises SourceError."""
    _run(b"subvolume", b"snapshot", b"-r", source, target)


def delete(path: bytes) -> None:
    """Delete a snapshot. Raises SourceError."""
    _run(b"subvolume", b"delete", path)


def identity(path: bytes) -> Identity:
    """What a snapshot is. Raises SourceError."""
    found: dict[str, str] = {}
    for line in _run(b"subvolume", b"show", path).splitlines():
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip(), value.strip())
    try:
        return Identity(
            found["UUID"],
            found["Parent UUID"],
            int(found["Generation"]),
            "readonly" in found["Flags"],
        )
    except (KeyError, ValueError):
        raise SourceError(f"btrfs says nothing of {os.fsdecode(path)} that can be read.") from None


def below(path: bytes, prefix: bytes = b"") -> Iterator[bytes]:
    """The paths, below ``path``, of all subvolumes in it, each before those within it."""
    own = os.fsencode(_run(b"subvolume", b"show", path).partition("\n")[0].strip())
    own = b"" if own in (b"/", b"<FS_TREE>") else own.strip(b"/") + b"/"
    for line in _run(b"subvolume", b"list", b"-o", path).splitlines():
        _, _, shown = line.partition(" path ")
        found = os.fsencode(shown)
        if found.startswith(own):
            rest = found[len(own) :]
            yield prefix + rest
            yield from below(path + b"/" + rest, prefix + rest + b"/")


def changes(base: bytes, new: bytes) -> Changelist:
    """What differs between two snapshots of one subvolume. Raises SourceError."""
    with tempfile.TemporaryFile() as said:
        command = [b"btrfs", b"send", b"--quiet", b"--no-data", b"-p", base, new]
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said)
        except OSError as error:
            raise SourceError(f"btrfs cannot be run ({error.strerror}).") from None
        with process:
            assert process.stdout is not None
            try:
                found = Replay().run(commands(process.stdout))
                process.stdout.read()  # to its end, or btrfs would be ended before its own
            except BaseException as error:
                process.kill()
                process.wait()
                if isinstance(error, SourceError) and (words := _last_line(said)):
                    raise SourceError(f"btrfs send failed ({words}).") from None
                raise
        if process.returncode:
            raise SourceError(f"btrfs send failed ({_last_line(said) or process.returncode}).")
        return found


def _last_line(said: IO[bytes]) -> str:
    said.seek(0)
    lines = said.read().decode(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("ERROR: ") if lines else ""


def _run(*arguments: bytes) -> str:
    try:
        done = subprocess.run(
            [b"btrfs", *arguments], capture_output=True, check=False, timeout=_COMMAND_S
        )
    except FileNotFoundError:
        raise SourceError("the btrfs command is missing. Install btrfs-progs.") from None
    except subprocess.TimeoutExpired:
        raise SourceError(f"btrfs {arguments[1].decode()} did not end.") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["for no reason told"]
        raise SourceError(f"btrfs failed: {lines[-1].removeprefix('ERROR: ')}.")
    return os.fsdecode(done.stdout)
