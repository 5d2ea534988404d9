"""From exceptions to one sentence and an exit code."""

from __future__ import annotations

import errno
import os

from cloudfs.core.errors import (
    CloudfsError,
    Damaged,
    Held,
    NoRepository,
    UsageError,
    WrongKey,
)

DONE = 0
FAILED = 1
USAGE = 2
SOME_UNREADABLE = 3
INTERRUPTED = 130

EXIT_CODES: dict[type[CloudfsError], int] = {
    UsageError: USAGE,
    NoRepository: 10,
    Held: 11,
    WrongKey: 12,
    Damaged: 13,
    CloudfsError: FAILED,
}
"""The code of an error is that of the first class here that it belongs to."""

_HINTS = {
    errno.ENOSPC: "Free some space and try again.",
    errno.EDQUOT: "Free some space and try again.",
    errno.EACCES: "Run it as a user who may, or change the permissions.",
    errno.EPERM: "Run it as a user who may, or change the permissions.",
    errno.EROFS: "Mount it writable, or choose another place.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n).",
}


def explain(error: BaseException) -> tuple[str, int] | None:
    """The sentence and the exit code of an error; None for one that nobody foresaw."""
    if isinstance(error, CloudfsError):
        code = next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
        return str(error), code
    if isinstance(error, OSError) and error.strerror:
        return _os_error(error), FAILED
    if isinstance(error, MemoryError):
        return "there is not enough memory. Try fewer --workers.", FAILED
    module, name = type(error).__module__, type(error).__name__
    if module.partition(".")[0] == "lmdb":
        return f"the local state or cache cannot be used ({error}). Is the disk full?", FAILED
    if name == "BrokenProcessPool":
        message = "a worker process was killed. If memory ran out, try fewer --workers."
        return message, FAILED
    return None


def _os_error(error: OSError) -> str:
    what = (error.strerror or "").lower()
    hint = _HINTS.get(error.errno or 0, "")
    where = f"{_shown(error.filename)}: " if error.filename is not None else ""
    return f"{where}{what}. {hint}".rstrip()


def _shown(filename: object) -> str:
    if isinstance(filename, str | bytes):
        from cloudfs.cli.output import quote_path

        return quote_path(os.fsencode(filename))
    return str(filename)
