"""Keys: how a passphrase or key file opens the repository's master key.

The configuration object (``cloudfs.json``) is the only one that is not sealed: it must be read
before there is a key. It holds the repository's id, the format, the features that a reader must
know, and the master key wrapped under each secret:

1. A passphrase is stretched by Argon2id (RFC 9106's second recommended option: 64 MiB, 3 passes,
   4 lanes; the parameters stand beside each key and are bounded when read, so that a hostile
   store can ask for neither too little nor for all memory).
2. A key file's content is its own entropy and goes through HKDF alone; it must hold 32 bytes or
   more.
3. The result seals the master key, bound to the repository's id and the key's id.

A configuration that was tampered with opens nothing: id and key id are associated data, and every
other object is bound to the repository id.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloudfs.core.errors import Damaged, UsageError, WrongKey
from cloudfs.format.envelope import FORMAT_VERSION, KEY_SIZE, Sealer

ARGON2_MEMORY_KIB = 64 * 1024
ARGON2_PASSES = 3
ARGON2_LANES = 4
KDF_SALT_SIZE = 16

KIND_PASSPHRASE = "passphrase"
KIND_FILE = "file"

FEATURES = frozenset[str]()
"""Required features that this version knows, beyond the base format."""


@dataclass(frozen=True)
class Secret:
    """What a user opens a repository with. Its repr shows nothing of it."""

    kind: str
    value: bytes

    def __repr__(self) -> str:
        return f"Secret({self.kind})"

    @classmethod
    def passphrase(cls, value: bytes) -> Secret:
        """A passphrase; the empty one is refused."""
        if not value:
            raise UsageError("The passphrase is empty. Choose one that is not.")
        return cls(KIND_PASSPHRASE, value)

    @classmethod
    def key_file(cls, value: bytes) -> Secret:
        """The content of a key file: at least 32 bytes that nobody can guess."""
        if len(value) < KEY_SIZE:
            raise UsageError(
                "A key file must hold at least 32 random bytes;"
                " make one with `head -c 32 /dev/urandom > FILE`."
            )
        return cls(KIND_FILE, value)


class WrappedKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The master key under one secret. Times in ns; memory in KiB, as Argon2 counts."""

    id: str
    label: str
    kind: str
    created_ns: int
    salt: bytes
    sealed: bytes
    memory_kib: int = 0
    passes: int = 0
    lanes: int = 0


class RepositoryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of ``cloudfs.json``."""

    cloudfs: int  # the format's version
    id: str
    keys: list[WrappedKey]
    features: list[str] = []
    conditional: bool = True  # whether the store honours conditional writes
    revision: int = 0  # how often it was changed; see cloudfs.repo.edits


@dataclass(frozen=True)
class KeyInfo:
    """What may be shown of a key."""

    id: str
    label: str
    kind: str
    created_ns: int


def parse_config(data: bytes, url: str) -> RepositoryConfig:
    """The configuration. Raises Damaged for what is none and UsageError for a newer format."""
    try:
        config = msgspec.json.decode(data, type=RepositoryConfig)
        bytes.fromhex(config.id)
    except (msgspec.DecodeError, msgspec.ValidationError, ValueError):
        raise Damaged(f"{url}: cloudfs.json is damaged (it is no cloudfs configuration).") from None
    unknown = sorted(set(config.features) - FEATURES)
    if config.cloudfs != FORMAT_VERSION or unknown:
        what = f"features {', '.join(unknown)}" if unknown else f"format {config.cloudfs}"
        raise UsageError(f"{url} was made by a newer cloudfs ({what}). Upgrade to read it.")
    return config


def _stretch(secret: Secret, key: WrappedKey) -> bytes:
    if secret.kind == KIND_FILE:
        return HKDF(SHA256(), KEY_SIZE, key.salt, b"cloudfs key file").derive(secret.value)
    # Imported late: a repository opened by key file does not need it.
    from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

    bounded = (
        8 * 1024 <= key.memory_kib <= 4 << 20 and 1 <= key.passes <= 64 and 1 <= key.lanes <= 64
    )
    if not bounded or len(key.salt) < KDF_SALT_SIZE:
        raise Damaged(f"key {key.id} is damaged (its Argon2 parameters are out of bounds).")
    return Argon2id(
        salt=key.salt,
        length=KEY_SIZE,
        iterations=key.passes,
        lanes=key.lanes,
        memory_cost=key.memory_kib,
    ).derive(secret.value)


def _wrapper(repository_id: str, key: WrappedKey, stretched: bytes) -> Sealer:
    binding = f"cloudfs key {repository_id} {key.id} {key.kind} {key.created_ns} {key.label}"
    return Sealer(stretched, binding.encode(), f"key {key.id}")


def wrap(
    master: bytes, repository_id: str, secret: Secret, label: str, now_ns: int, salt: bytes
) -> WrappedKey:
    """Wrap the master key under a secret; ``salt`` is KDF_SALT_SIZE fresh random bytes."""
    stretched = secret.kind == KIND_PASSPHRASE
    key = WrappedKey(
        id=hashlib.sha256(b"key id" + salt).hexdigest()[:8],
        label=label,
        kind=secret.kind,
        created_ns=now_ns,
        salt=salt,
        sealed=b"",
        memory_kib=ARGON2_MEMORY_KIB if stretched else 0,
        passes=ARGON2_PASSES if stretched else 0,
        lanes=ARGON2_LANES if stretched else 0,
    )
    sealed = _wrapper(repository_id, key, _stretch(secret, key)).seal(0, master)
    return msgspec.structs.replace(key, sealed=sealed)


def unwrap(config: RepositoryConfig, secret: Secret, url: str) -> tuple[bytes, WrappedKey]:
    """The master key, and the key that opened. Raises WrongKey when none does."""
    for key in config.keys:
        if key.kind != secret.kind:
            continue
        try:
            master = _wrapper(config.id, key, _stretch(secret, key)).open(0, key.sealed)
        except Damaged:
            continue
        return master, key
    what = "that passphrase" if secret.kind == KIND_PASSPHRASE else "that key file"
    count = len(config.keys)
    keys = "the only key" if count == 1 else f"none of the {count} keys"
    verb = "does not open" if count == 1 else "opens"
    raise WrongKey(f"{what} {verb} {keys} of {url}.")
