"""What the kernel lets a process have."""

from __future__ import annotations

import contextlib
import resource


def raise_file_limit() -> int:
    """Let this process open as many files as it may; returns how many that are."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError), open("/proc/sys/fs/nr_open") as file:
        most = int(file.read())
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        return most
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
