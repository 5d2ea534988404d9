"""Policy files: one ``NAME.toml`` each in the configuration directory.

Who may change a policy is said by its file's owner and mode, as for any other file; root, who may
do everything, is stopped by a file that nobody may write. A file is replaced at once, keeping its
owner and mode; where only the file and not its directory may be written, it is written in place.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cloudfs.core.errors import UsageError
from cloudfs.core.policy import Policy, check_name, edit_policy, format_policy, parse_policy
from cloudfs.core.toml_lines import statements

SUFFIX = ".toml"


@dataclass(frozen=True)
class PolicyFile:
    """A policy and the file that says it."""

    policy: Policy
    text: str
    path: Path


class PolicyFiles:
    """The policy files of one configuration directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def names(self) -> list[str]:
        """The names of all policies, whether or not their files are good."""
        try:
            found = os.listdir(self.directory)
        except FileNotFoundError:
            return []
        names = (name.removesuffix(SUFFIX) for name in found if name.endswith(SUFFIX))
        return sorted(name for name in names if name and not name.startswith("."))

    def path(self, name: str) -> Path:
        """Where the file of a policy is or would be. Raises UsageError for what is no name."""
        try:
            return self.directory / f"{check_name(name)}{SUFFIX}"
        except ValueError as error:
            raise UsageError(f"{error}.") from None

    def exists(self, name: str) -> bool:
        """Whether there is such a policy."""
        return name in self.names()

    def load(self, name: str) -> PolicyFile:
        """Read and check one policy. Raises UsageError, naming file and line."""
        path = self.path(name)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise UsageError(self._unknown(name)) from None
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise UsageError(f"{path}, line {line}: this is not UTF-8.") from None
        policy = parse_policy(text, str(path))
        if policy.name != name:
            line = _line(text, "name")
            raise UsageError(
                f'{path}, line {line}: the name is "{policy.name}" but the file is {path.name};'
                " give both the same."
            )
        bad = bad_pattern(policy.excludes)
        if bad is not None:
            line = _line(text, "excludes", bad)
            raise UsageError(f'{path}, line {line}: "{bad}" is no pattern as in .gitignore.')
        return PolicyFile(policy, text, path)

    def only(self) -> str:
        """The name of the only policy. Raises UsageError where there are none or several."""
        names = self.names()
        if len(names) == 1:
            return names[0]
        if not names:
            raise UsageError(
                "there is no policy yet; make one with"
                " `cloudfs policy create NAME --source PATH --repo URL`."
            )
        raise UsageError(f"there are several policies; name one of {', '.join(names)}.")

    def _unknown(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.names(), n=1)
        hint = f"Did you mean {near[0]}?" if near else "`cloudfs policy list` shows what there is."
        return f"there is no policy {name} in {self.directory}. {hint}"

    # -- changing --------------------------------------------------------------------------------

    def prepare(self, name: str) -> None:
        """See that a policy of a new name can be written, before anything else is done."""
        path = self.path(name)
        if self.exists(name):
            raise UsageError(f"there is a policy {name} already, at {path}; change it with `set`.")
        self.directory.mkdir(parents=True, exist_ok=True)
        if not os.access(self.directory, os.W_OK | os.X_OK, effective_ids=True):
            raise UsageError(
                f"{self.directory} cannot be written by you; CLOUDFS_CONFIG_DIR names another one."
            )

    def create(self, policy: Policy, mode: int, owner: tuple[int, int]) -> PolicyFile:
        """Write a new policy's file. Durable when it returns."""
        path, text = self.path(policy.name), format_policy(policy)
        _replace(path, text, mode, owner)
        return PolicyFile(policy, text, path)

    def change(self, old: PolicyFile, policy: Policy) -> PolicyFile:
        """Change what a file says, keeping comments, owner and mode. Durable when it returns."""
        self.check_may_change(old.path)
        text = edit_policy(old.text, policy, str(old.path))
        status = old.path.stat()
        try:
            _replace(old.path, text, status.st_mode & 0o7777, (status.st_uid, status.st_gid))
        except PermissionError:
            with old.path.open("r+", encoding="utf-8", newline="") as file:
                file.write(text)
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
        return PolicyFile(policy, text, old.path)

    def remove(self, name: str) -> None:
        """Remove a policy's file."""
        path = self.path(name)
        if not self.exists(name):
            raise UsageError(self._unknown(name))
        self.check_may_change(path)
        path.unlink()

    def check_may_change(self, path: Path) -> None:
        """Raise UsageError where the file's owner and mode do not let the caller change it."""
        status = path.stat()
        if status.st_mode & 0o222 and os.access(path, os.W_OK, effective_ids=True):
            return
        import pwd

        try:
            owner = pwd.getpwuid(status.st_uid).pw_name
        except KeyError:
            owner = str(status.st_uid)
        mode = status.st_mode & 0o7777
        raise UsageError(
            f"you may not change {path}: it belongs to {owner} and has mode {mode:04o}."
            " Ask its owner, or change the mode first."
        )


def bad_pattern(patterns: Iterable[str]) -> str | None:
    """The first pattern that is none, or None."""
    for pattern in patterns:
        import pathspec

        try:
            pathspec.GitIgnoreSpec.from_lines([pattern])
        except ValueError:
            return pattern
    return None


def _line(text: str, key: str, value: str = "") -> int:
    """The line of a key or, where it can be found, of one value in its list."""
    for statement in statements(text.replace("\r\n", "\n")):
        if statement.key == key:
            lines = text[statement.start : statement.end].split("\n")
            for number, line in enumerate(lines):
                with contextlib.suppress(tomllib.TOMLDecodeError):
                    item = line.strip().rstrip(",")
                    if value and tomllib.loads(f"x = {item}")["x"] == value:
                        return statement.line + number
            return statement.line
    return 1


def _replace(path: Path, text: str, mode: int, owner: tuple[int, int]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            if owner != (os.geteuid(), os.getegid()):
                os.fchown(fd, *owner)
            os.fchmod(fd, mode)
            os.fsync(fd)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
