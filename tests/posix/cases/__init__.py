"""The cases, by subject."""

from __future__ import annotations

from tests.posix.cases import acls, data, errors, locks, modes, names, times

MODULES = (acls, data, errors, locks, modes, names, times)
