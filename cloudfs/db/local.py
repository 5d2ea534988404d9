"""What one machine keeps of one repository beside the store: the cache and the rollback memory.

Everything here can be lost: the cache costs time; without the rollback memory this machine no
longer knows which manifest it saw last, and an older one that a store offers is believed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from cloudfs.core.errors import RolledBack
from cloudfs.db.cache import BlobCache

DEFAULT_CACHE_BYTES = 2 << 30


class Seen(NamedTuple):
    """The newest manifest that was seen; ``digest`` is of its stored bytes, "" where not known."""

    number: int
    digest: str


class LocalState:
    """The local side of one repository; opened lazily, so that commands pay for what they use."""

    def __init__(
        self, cache_dir: Path, state_dir: Path, *, cache_bytes: int = DEFAULT_CACHE_BYTES
    ) -> None:
        self.cache_dir = cache_dir
        self.state_dir = state_dir
        self.cache_bytes = cache_bytes
        self._caches: dict[str, BlobCache] = {}

    def cache(self, repository_id: str) -> BlobCache:
        """The cache of a repository."""
        if repository_id not in self._caches:
            self._caches[repository_id] = BlobCache(
                self.cache_dir / repository_id, self.cache_bytes
            )
        return self._caches[repository_id]

    def policy_dir(self, repository_id: str, policy_id: str) -> Path:
        """Where the state of syncs of one policy lies (see :mod:`cloudfs.db.state`)."""
        return self.state_dir / "policies" / f"{repository_id[:16]}-{policy_id[:16]}"

    def watch_dir(self, name: str) -> Path:
        """Where the watch daemon of the policy of this name on this machine has its place."""
        return self.state_dir / "watch" / name

    def live_dir(self, name: str) -> Path:
        """Where the live mount of the policy of this name on this machine has its place."""
        return self.state_dir / "live" / name

    def is_new(self, policy_id: str) -> bool:
        """Whether this machine never synced a policy, to any repository."""
        return not self.policy_dirs(policy_id)

    def policy_dirs(self, policy_id: str) -> list[Path]:
        """Those of one policy, for each repository that this machine synced it to."""
        return list((self.state_dir / "policies").glob(f"*-{policy_id[:16]}"))

    def _seen_path(self, repository_id: str, policy_id: str) -> Path:
        # By both: a policy that is sent to another repository begins anew there.
        return self.state_dir / "seen" / f"{repository_id}-{policy_id}"

    def check_seen(self, repository_id: str, policy_id: str, number: int, url: str) -> None:
        """Raise RolledBack when this machine has seen a newer manifest than ``number``."""
        seen = self.seen(repository_id, policy_id).number
        if number < seen:
            raise RolledBack(
                f"{url} offers an older state of its backups (manifest {number}) than this machine"
                f" has seen (manifest {seen}): it was rolled back or replayed."
                f" {self._on_purpose(repository_id, policy_id)}"
            )

    def check_same(self, repository_id: str, policy_id: str, offered: Seen, url: str) -> None:
        """Raise RolledBack when this machine has seen another manifest of the same number."""
        seen = self.seen(repository_id, policy_id)
        if offered.number == seen.number and seen.digest not in ("", offered.digest):
            raise RolledBack(
                f"{url} offers another manifest {offered.number} than the one that this machine has"
                " seen: it was rolled back and then written to anew, or is not what it was."
                f" {self._on_purpose(repository_id, policy_id)}"
            )

    def _on_purpose(self, repository_id: str, policy_id: str) -> str:
        path = self._seen_path(repository_id, policy_id)
        return f"If you restored the store to an older state on purpose, delete {path}."

    def seen(self, repository_id: str, policy_id: str) -> Seen:
        """The newest manifest that this machine has seen; number 0 for none."""
        try:
            number, _, digest = self._seen_path(repository_id, policy_id).read_text().partition(" ")
            return Seen(int(number), digest)
        except (OSError, ValueError):
            return Seen(0, "")

    def remember_seen(self, repository_id: str, policy_id: str, manifest: Seen) -> None:
        """Remember a manifest, unless a newer one was seen.

        Atomic; not fsynced (an older memory only allows more).
        """
        seen = self.seen(repository_id, policy_id)
        if manifest.number < seen.number or manifest == seen:
            return
        path = self._seen_path(repository_id, policy_id)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text(f"{manifest.number} {manifest.digest}")
        temporary.replace(path)

    def close(self) -> None:
        """Close what was opened."""
        for cache in self._caches.values():
            cache.close()
        self._caches.clear()
