"""How backups are named on the command line: ``POLICY[@SNAPSHOT][:PATH]``.

POLICY is the name of a policy or the URL of a repository; a URL may end in ``#NAME`` to pick one of
several policies. What follows the first ``:`` that is not part of the URL is the path. A time may
hold ``:`` itself, so a path begins with ``/``; where none was split off, ``/`` is meant.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

LATEST = "latest"

_TARGET = re.compile(r"(?P<place>.+?)(?:@(?P<snapshot>[^@/]*?))?(?::(?P<path>/.*))?", re.DOTALL)


class Target(NamedTuple):
    """What was named. ``path`` is absolute within the backup, without a trailing slash."""

    place: str
    snapshot: str
    path: bytes


def parse_target(text: str) -> Target:
    """Read ``POLICY[@SNAPSHOT][:PATH]``; "latest" and "/" stand for what is left out."""
    head = re.match(r"[a-z0-9]+://", text)
    skip = head.end() if head else 0
    match = _TARGET.fullmatch(text, skip)
    if match is None:
        return Target(text, LATEST, b"/")
    path = os.fsencode(match["path"] or "/")
    normal = b"/" + b"/".join(part for part in path.split(b"/") if part)
    return Target(text[:skip] + match["place"], match["snapshot"] or LATEST, normal)


def is_url(place: str) -> bool:
    """Whether a place is the URL (or the absolute path) of a repository, not a policy's name."""
    return "://" in place or place.startswith("/")


def split_url(place: str) -> tuple[str, str]:
    """The URL and the policy's name behind ``#`` ("" where there is none)."""
    url, _, name = place.partition("#")
    return url, name
