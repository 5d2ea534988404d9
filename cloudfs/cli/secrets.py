"""Where passphrases and key files come from.

In this order: the command line, the environment, a question on the terminal. Without a terminal
nothing is asked. A passphrase is never taken from an argument, which everybody could read.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cloudfs.cli.environment import Environment
from cloudfs.core.errors import UsageError

if TYPE_CHECKING:
    from cloudfs.repo.keys import Secret

WAYS = "CLOUDFS_PASSPHRASE, CLOUDFS_PASSPHRASE_FILE, CLOUDFS_PASSPHRASE_COMMAND, --passphrase-file"


@dataclass(frozen=True)
class SecretOptions:
    """What the command line says: paths of files, or None."""

    passphrase_file: str | None = None
    key_file: str | None = None


def given_secret(options: SecretOptions, environment: Environment) -> Secret | None:
    """The secret that the command line or else the environment gives; None for neither."""
    from cloudfs.repo.keys import Secret

    secret = from_files(options)
    if secret is not None:
        return secret
    if environment.passphrase is not None:
        return Secret.passphrase(environment.passphrase)
    if environment.passphrase_file:
        return Secret.passphrase(_first_line(environment.passphrase_file))
    if environment.passphrase_command:
        return Secret.passphrase(_output_of(environment.passphrase_command))
    return None


def from_files(options: SecretOptions) -> Secret | None:
    """The secret in the file that the command line names; None where it names none."""
    from cloudfs.repo.keys import Secret

    if options.key_file and options.passphrase_file:
        raise UsageError("Give either a key file or a passphrase file, not both.")
    if options.key_file:
        return Secret.key_file(_read(options.key_file, "key file"))
    if options.passphrase_file:
        return Secret.passphrase(_first_line(options.passphrase_file))
    return None


def own_label() -> str:
    """What a key is called if nothing else is said: who made it, and where."""
    import getpass
    import socket

    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # in a container nobody may be known by the number
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def ask(question: str, *, twice: bool) -> Secret:
    """Ask on the terminal. Raises UsageError where there is none, or where answers differ."""
    from cloudfs.repo.keys import Secret

    answer = _ask(question)
    if twice and _ask("The same again: ") != answer:
        raise UsageError("The two passphrases differ. Nothing was done; try again.")
    return Secret.passphrase(answer)


def _ask(question: str) -> bytes:
    if not sys.stdin.isatty():
        raise UsageError(
            f"a passphrase is needed and there is no terminal to ask for it; give it by {WAYS}"
            " or --key-file."
        )
    import getpass

    try:
        return getpass.getpass(question).encode("utf-8", "surrogateescape")
    except EOFError:
        raise UsageError("No passphrase was given. Nothing was done.") from None


def _read(path: str, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError(f"the {what} {path} cannot be read ({reason}).") from None


def _first_line(path: str) -> bytes:
    return _without_newline(_read(path, "passphrase file"))


def _without_newline(data: bytes) -> bytes:
    return data.removesuffix(b"\n").removesuffix(b"\r")


def _output_of(command: str) -> bytes:
    name = "CLOUDFS_PASSPHRASE_COMMAND"
    try:
        done = subprocess.run(shlex.split(command), stdout=subprocess.PIPE, check=False)
    except (OSError, ValueError, IndexError) as error:
        raise UsageError(f"{name} cannot be run ({error}).") from None
    if done.returncode:
        raise UsageError(f"{name} failed (exit code {done.returncode}). Nothing was done.")
    return _without_newline(done.stdout)
