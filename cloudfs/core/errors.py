"""The one tree of exceptions.

Every class here is something that can be said to a user in one sentence; the message is that
sentence, it names the thing it is about and, where there is one, the next step to take.
Exit codes are given to these classes in :mod:`cloudfs.cli`, errnos in :mod:`cloudfs.fuse`;
nothing between knows of either.
"""

from __future__ import annotations


class CloudfsError(Exception):
    """Root of all errors that cloudfs raises on purpose. ``str(error)`` is one clear sentence."""


class UsageError(CloudfsError):
    """The user asked for something that cannot be: bad option, bad policy file, bad path."""


class NoRepository(CloudfsError):
    """There is no repository (or no such policy or snapshot in it) at the place that was named."""


class Held(CloudfsError):
    """Another process holds what this one needs, or took it over while this one was away."""


class WrongKey(CloudfsError):
    """None of the repository's keys opens with the passphrase or key file that was given."""


class Damaged(CloudfsError):
    """Stored bytes are not what was stored: cut, flipped, swapped, replayed or missing."""


class RolledBack(Damaged):
    """The store offers an older manifest than one that this machine has already seen."""


class SourceError(CloudfsError):
    """The live tree cannot be read the way it must be."""


class StoreError(CloudfsError):
    """The object store did not do what it was asked. The subclasses below are a closed set."""


class NotFound(StoreError):
    """There is no object of that name."""


class AlreadyExists(StoreError):
    """A conditional write found an object of that name. Nothing was written."""


class Denied(StoreError):
    """The store refuses this user, key or operation. Trying again does not help."""


class Full(StoreError):
    """The store has no room left (disk full, quota exceeded)."""


class Unavailable(StoreError):
    """The store did not answer, or answered that it cannot now. Trying again may help."""
