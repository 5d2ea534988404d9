"""From a job to a view of its backups: what a mount of backups and a live mount have in common."""

from __future__ import annotations

import os
from dataclasses import replace

from cloudfs.db.local import LocalState
from cloudfs.fuse.job import MountJob
from cloudfs.fuse.newcomers import Newcomers
from cloudfs.fuse.patience import PatientStore
from cloudfs.fuse.tree import Tree
from cloudfs.fuse.view import View
from cloudfs.repo.history import History
from cloudfs.repo.repository import Repository
from cloudfs.store.open import open_store

RETRY_S = 30.0
"""A read of a store that is down fails after this long: longer than a hiccup, not forever."""

REFRESH_NEAR_S = 1.0
REFRESH_FAR_S = 5.0
"""How old the list of snapshots may be, where looking is free and where it is a request."""


def open_view(
    job: MountJob, *, first_slot: int = 1, retry_s: float = RETRY_S
) -> tuple[View, PatientStore]:
    """The view of a job's backups, and the store under it, which one thread can be kept from using.
    A read of a store that is down fails after ``retry_s``.

    Asks the store for nothing. ``first_slot``: see :class:`Tree`.
    """
    given = job.opening
    options = replace(given.options, retry_s=min(given.options.retry_s, retry_s))
    store = PatientStore(open_store(given.url, options))
    local = LocalState(given.cache_dir, given.state_dir)
    repository = Repository.reopen(store, given.opening, local)
    histories = [History(repository, record, manifest=m) for record, m in job.branches]
    near = given.url.startswith(("file:", "/"))
    finder = Newcomers(repository) if job.whole else None
    tree = Tree(histories, uid=os.geteuid(), gid=os.getegid(), finder=finder, first_slot=first_slot)
    return View(tree, refresh_s=REFRESH_NEAR_S if near else REFRESH_FAR_S), store
