"""Opening a repository: its configuration, its keys, the policies it holds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property

import msgspec

from cloudfs.core.errors import AlreadyExists, Damaged, NoRepository, NotFound, UsageError
from cloudfs.db.local import LocalState
from cloudfs.format import names
from cloudfs.format.envelope import (
    FORMAT_VERSION,
    ID_SIZE,
    KEY_SIZE,
    SALT_SIZE,
    Keyring,
    Kind,
    open_object,
    seal_object,
)
from cloudfs.repo import edits
from cloudfs.repo import keys as wrapping
from cloudfs.repo.keys import KeyInfo, RepositoryConfig, Secret, WrappedKey
from cloudfs.store.open import OpenedStore

Entropy = Callable[[int], bytes]
Clock = Callable[[], int]


class PolicyRecord(msgspec.Struct, frozen=True):
    """A policy as the repository keeps it: opaque id, name, and the text of its file."""

    id: str
    name: str
    text: str


@dataclass(frozen=True)
class Opening:
    """What another process of this machine needs to open the same repository without the secret.

    Handed over by pipe only; its repr shows no key.
    """

    master: bytes
    config: RepositoryConfig

    def __repr__(self) -> str:
        return f"Opening({self.config.id})"


class Repository:
    """An open repository. Methods block; safe to share between threads."""

    def __init__(
        self,
        store: OpenedStore,
        config: RepositoryConfig,
        master: bytes,
        local: LocalState,
        *,
        entropy: Entropy = os.urandom,
        clock_ns: Clock = time.time_ns,
    ) -> None:
        self.store = store
        self.config = config
        self.local = local
        self.entropy = entropy
        self.clock_ns = clock_ns
        self._master = master

    @property
    def id(self) -> str:
        """The repository's id, 32 hexadecimal digits."""
        return self.config.id

    @property
    def url(self) -> str:
        """Where it lies, for messages."""
        return self.store.url

    @cached_property
    def keyring(self) -> Keyring:
        """The keys derived from the master key."""
        return Keyring(self._master, bytes.fromhex(self.config.id))

    @property
    def opening(self) -> Opening:
        """What another process needs to open it too."""
        return Opening(self._master, self.config)

    @classmethod
    def create(
        cls,
        store: OpenedStore,
        secret: Secret,
        local: LocalState,
        *,
        label: str,
        conditional: bool = True,
        entropy: Entropy = os.urandom,
        clock_ns: Clock = time.time_ns,
    ) -> Repository:
        """Write a new repository's configuration. Raises UsageError where there is one already.

        ``conditional`` says whether the store was found to honour conditional writes.
        """
        master, repository_id = entropy(KEY_SIZE), entropy(ID_SIZE).hex()
        key = wrapping.wrap(
            master, repository_id, secret, label, clock_ns(), entropy(wrapping.KDF_SALT_SIZE)
        )
        config = RepositoryConfig(FORMAT_VERSION, repository_id, [key], conditional=conditional)
        try:
            store.put(names.CONFIG, [edits.format_config(config)], if_absent=True)
        except AlreadyExists:
            raise UsageError(f"There is a repository at {store.url} already.") from None
        return cls(store, config, master, local, entropy=entropy, clock_ns=clock_ns)

    @staticmethod
    def read_config(store: OpenedStore) -> RepositoryConfig:
        """The configuration, without a secret. Raises NoRepository or Damaged."""
        try:
            data = store.get(names.CONFIG)
        except NotFound:
            hint = (
                "Is the drive mounted?" if store.url.startswith("file:") else "Is it spelt right?"
            )
            raise NoRepository(f"no repository at {store.url}. {hint}") from None
        return wrapping.parse_config(data, store.url)

    @classmethod
    def open(
        cls,
        store: OpenedStore,
        secret: Secret,
        local: LocalState,
        *,
        entropy: Entropy = os.urandom,
        clock_ns: Clock = time.time_ns,
    ) -> Repository:
        """Open with a secret. Raises NoRepository, WrongKey, Damaged. One request."""
        config = cls.read_config(store)
        master, _ = wrapping.unwrap(config, secret, store.url)
        return cls(store, config, master, local, entropy=entropy, clock_ns=clock_ns)

    @classmethod
    def reopen(cls, store: OpenedStore, opening: Opening, local: LocalState) -> Repository:
        """Open with what :attr:`opening` gave in another process. No request."""
        return cls(store, opening.config, opening.master, local)

    # -- keys ------------------------------------------------------------------------------

    def keys(self) -> list[KeyInfo]:
        """The keys, without what is secret in them."""
        return [_shown(key) for key in self.config.keys]

    def add_key(self, secret: Secret, label: str) -> KeyInfo:
        """Wrap the master key under one more secret. Durable when it returns."""
        key = self._wrap(secret, label)
        self._change_keys(lambda keys: keys if key in keys else [*keys, key])
        return _shown(key)

    def remove_key(self, key_id: str) -> None:
        """Remove one key, never the last one."""
        if all(key.id != key_id for key in edits.settled(self.store, self._fresh_config).keys):
            raise UsageError(f"{self.url} has no key {key_id}; `cloudfs key list` shows them.")

        def without(keys: list[WrappedKey]) -> list[WrappedKey]:
            left = [key for key in keys if key.id != key_id]
            if not left:
                raise UsageError(f"{key_id} is the only key of {self.url}: add another one first.")
            return left

        self._change_keys(without)

    def change_key(self, old: Secret, new: Secret) -> KeyInfo:
        """Replace the key that ``old`` opens by one that ``new`` opens."""
        config = edits.settled(self.store, self._fresh_config)
        _, former = wrapping.unwrap(config, old, self.url)
        key = self._wrap(new, former.label)

        def replaced(keys: list[WrappedKey]) -> list[WrappedKey]:
            left = [other for other in keys if other.id != former.id]
            return left if key in left else [*left, key]

        self._change_keys(replaced)
        return _shown(key)

    def _wrap(self, secret: Secret, label: str) -> WrappedKey:
        salt = self.entropy(wrapping.KDF_SALT_SIZE)
        return wrapping.wrap(self._master, self.id, secret, label, self.clock_ns(), salt)

    def _change_keys(self, alter: Callable[[list[WrappedKey]], list[WrappedKey]]) -> None:
        self.config = edits.change_keys(self.store, self._fresh_config, alter)

    def _fresh_config(self) -> RepositoryConfig:
        config = self.read_config(self.store)
        if config.id != self.id:
            raise Damaged(f"{self.url}: cloudfs.json is now that of another repository.")
        return config

    # -- policies --------------------------------------------------------------------------

    def policies(
        self, complain: Callable[[Damaged], None] | None = None, *, known: Collection[str] = ()
    ) -> list[PolicyRecord]:
        """The policies that the repository holds, by name. One request, and one for each.

        Those whose ids are ``known`` are left out. A damaged one is handed to ``complain`` and
        passed over; without that it is raised.
        """
        found = []
        for info in self.store.list(names.POLICIES):
            if info.name.removeprefix(names.POLICIES) in known:
                continue
            try:
                found.append(self.policy(info.name))
            except NotFound:
                continue  # removed since it was listed
            except Damaged as error:
                if complain is None:
                    raise
                complain(error)
        return sorted(found, key=lambda record: (record.name, record.id))

    def policy(self, object_name: str) -> PolicyRecord:
        """One policy by the name of its object."""
        data = self.store.get(object_name)
        try:
            plain = open_object(self.keyring, Kind.POLICY, object_name, data)
            return msgspec.msgpack.decode(plain, type=PolicyRecord)
        except (Damaged, msgspec.DecodeError, msgspec.ValidationError):
            raise Damaged(
                f"{object_name}, the copy of a policy in {self.url}, is damaged; its snapshots are"
                " not touched by that. To have it written again, change something of the policy"
                " with `cloudfs policy set` on the machine that has its file, and sync."
            ) from None

    def save_policy(self, name: str, text: str, policy_id: str | None = None) -> PolicyRecord:
        """Keep a policy's text, under a fresh id unless one is given. Durable when it returns."""
        record = PolicyRecord(policy_id or self.entropy(ID_SIZE).hex(), name, text)
        object_name = names.policy(record.id)
        plain = msgspec.msgpack.encode(record)
        sealed = seal_object(self.keyring, Kind.POLICY, object_name, plain, self.entropy(SALT_SIZE))
        self.store.put(object_name, [sealed])
        return record


def _shown(key: WrappedKey) -> KeyInfo:
    return KeyInfo(key.id, key.label, key.kind, key.created_ns)
