"""How the configuration is changed: by one of several machines at a time, and no change is lost.

1. The configuration counts its changes (``revision``). Who changes it first writes a *claim*: an
   object named by the next revision, written only if absent, that holds all of the next
   configuration. So of those who change the same configuration exactly one gets the number; the
   others read anew and try again.
2. The newest claim is what the configuration is to be. It is copied to ``cloudfs.json``, which is
   what readers open. Whoever comes before that was done (its writer died, or is slow) does it.
3. After copying, claims are looked for again: who was slow and copied an older one than is there
   by then puts that right himself.
4. The newest claim stays, so that its number is not used twice; older ones are deleted. Who was
   stopped for long may write a claim under a number that was deleted: it is not the newest, and
   counts for nothing.
5. So a change is done when the configuration that is in force after all this shows it.

On a store without conditional writes one writer was vouched for, and claims are plain writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import msgspec

from cloudfs.core.errors import AlreadyExists, Damaged, Held, NotFound, StoreError
from cloudfs.format import names
from cloudfs.repo.keys import RepositoryConfig, WrappedKey, parse_config
from cloudfs.store.base import Store

CLAIMS = "edit/"
TRIES = 50
"""So often another may be quicker before this one gives up."""

_TOP = 2**64 - 1

Read = Callable[[], RepositoryConfig]
"""Reads ``cloudfs.json`` and checks that it is that of the repository."""


def claim_name(revision: int) -> str:
    """The object that holds the configuration of a revision; the newest sorts first."""
    return f"{CLAIMS}{_TOP - revision:016x}"


def format_config(config: RepositoryConfig) -> bytes:
    """The bytes of ``cloudfs.json``."""
    return msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n"


def change_keys(
    store: Store, read: Read, alter: Callable[[list[WrappedKey]], list[WrappedKey]]
) -> RepositoryConfig:
    """Change the keys; the configuration in force then. Durable when it returns.

    ``alter`` gives the keys as they are to be, and what is so already unchanged; it may be asked
    again with what another machine left. What it raises comes out, and nothing is changed.
    """
    for _ in range(TRIES):
        config = settled(store, read)
        keys = alter(config.keys)
        if keys == config.keys:
            return config
        following = msgspec.structs.replace(config, keys=keys, revision=config.revision + 1)
        with contextlib.suppress(AlreadyExists):
            store.put(
                claim_name(following.revision),
                [format_config(following)],
                if_absent=config.conditional,
            )
    raise _busy(store)


def settled(store: Store, read: Read) -> RepositoryConfig:
    """The configuration in force, after what others began was finished (rules 2 to 4)."""
    for _ in range(TRIES):
        config = read()
        claims = _claims(store)
        if not claims or claims[0] <= config.revision:
            with contextlib.suppress(StoreError):  # the next change does it
                store.delete([claim_name(revision) for revision in claims[1:]])
            return config
        with contextlib.suppress(NotFound):
            store.put(names.CONFIG, [_claimed(store, config, claims[0])])
    raise _busy(store)


def _claims(store: Store) -> list[int]:
    """The revisions that are claimed, newest first."""
    found = []
    for info in store.list(CLAIMS):
        digits = info.name.removeprefix(CLAIMS)
        with contextlib.suppress(ValueError):
            revision = _TOP - int(digits, 16)
            if info.name == claim_name(revision):
                found.append(revision)
    return sorted(found, reverse=True)


def _claimed(store: Store, config: RepositoryConfig, revision: int) -> bytes:
    """What is to become the configuration. Raises NotFound where it is gone, and Damaged."""
    name = claim_name(revision)
    data = store.get(name)
    with contextlib.suppress(Damaged):
        claimed = parse_config(data, store.url)
        if (claimed.id, claimed.revision) == (config.id, revision) and claimed.keys:
            return data
    raise Damaged(
        f"{name} in {store.url} is damaged (it holds no change of the keys). Delete it, and look"
        " whether `cloudfs key list` shows what you expect."
    )


def _busy(store: Store) -> Held:
    return Held(
        f"the keys of {store.url} are being changed by others all the time. Try again, and look"
        " whether `cloudfs key list` shows what you expect."
    )
