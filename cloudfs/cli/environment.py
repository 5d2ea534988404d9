"""The environment: the only module of cloudfs that reads it (libraries read AWS_* and NO_COLOR).

Directories are those of the platform: for root /etc/cloudfs, /var/lib/cloudfs and
/var/cache/cloudfs, for others what the XDG variables say.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path

from cloudfs.core.errors import UsageError

SECRETS = "CLOUDFS_PASSPHRASE"
"""How the names of all variables begin that hold a secret or lead to one."""

_OURS = ("CLOUDFS_", "AWS_")  # what says where backups are, and opens them


@dataclass(frozen=True)
class Environment:
    """What the environment says. Its repr shows no passphrase."""

    repository: str
    passphrase: bytes | None
    passphrase_file: str
    passphrase_command: str
    config_dir: Path
    state_dir: Path
    cache_dir: Path
    for_commands: dict[str, str] = field(default_factory=dict)  # what commands of policies get

    def __repr__(self) -> str:
        return f"Environment(config_dir={self.config_dir})"


def read_environment(variables: Mapping[str, str] = os.environ) -> Environment:
    """Read it. An empty variable is one that is not set."""
    passphrase = variables.get("CLOUDFS_PASSPHRASE")
    return Environment(
        repository=variables.get("CLOUDFS_REPO", ""),
        passphrase=os.fsencode(passphrase) if passphrase else None,
        passphrase_file=variables.get("CLOUDFS_PASSPHRASE_FILE", ""),
        passphrase_command=variables.get("CLOUDFS_PASSPHRASE_COMMAND", ""),
        config_dir=_directory(variables, "CLOUDFS_CONFIG_DIR", "config"),
        state_dir=_directory(variables, "CLOUDFS_STATE_DIR", "state"),
        cache_dir=_directory(variables, "CLOUDFS_CACHE_DIR", "cache"),
        for_commands={
            name: value for name, value in variables.items() if not name.startswith(_OURS)
        },
    )


def forget_secrets(variables: MutableMapping[str, str] = os.environ) -> None:
    """Take what opens repositories out of the environment, once it was read.

    No program that this process starts gets it then. What the kernel shows of this process in
    /proc/PID/environ is the memory that it was started with, so that is overwritten.
    """
    names = [name for name in variables if name.startswith(SECRETS)]
    if not names:
        return
    import ctypes

    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_void_p
    for name in names:
        place = libc.getenv(os.fsencode(name))
        if place is not None:
            ctypes.memset(place, 0, len(ctypes.string_at(place)))
        del variables[name]


def _directory(variables: Mapping[str, str], name: str, kind: str) -> Path:
    given = variables.get(name)
    if given:
        if not os.path.isabs(given):
            raise UsageError(f"{name} must be an absolute path, and {given} is none.")
        return Path(given)
    if os.geteuid() == 0:
        return {
            "config": Path("/etc/cloudfs"),
            "state": Path("/var/lib/cloudfs"),
            "cache": Path("/var/cache/cloudfs"),
        }[kind]
    import platformdirs

    directories = platformdirs.PlatformDirs("cloudfs", appauthor=False)
    return {
        "config": directories.user_config_path,
        "state": directories.user_state_path,
        "cache": directories.user_cache_path,
    }[kind]
