"""Who gets in, and who does not."""

from __future__ import annotations

import msgspec
import pytest

from cloudfs.core.errors import Damaged, NoRepository, UsageError, WrongKey
from cloudfs.format import names
from cloudfs.repo import keys
from cloudfs.repo.keys import RepositoryConfig, Secret, WrappedKey, parse_config
from cloudfs.repo.repository import Repository
from cloudfs.store.open import OpenedStore
from tests.repo.sample import Machine, opened

WORD = Secret.passphrase(b"correct horse")
FILE = Secret.key_file(bytes(range(64)))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least that is allowed, so that tests are quick."""
    monkeypatch.setattr(keys, "ARGON2_MEMORY_KIB", 8 * 1024)
    monkeypatch.setattr(keys, "ARGON2_PASSES", 1)
    monkeypatch.setattr(keys, "ARGON2_LANES", 1)


@pytest.fixture
def store() -> OpenedStore:
    return opened({})


@pytest.fixture
def repository(store: OpenedStore) -> Repository:
    return Repository.create(store, WORD, Machine(), label="first")


def opens(store: OpenedStore, secret: Secret) -> bool:
    try:
        Repository.open(store, secret, Machine())
    except WrongKey:
        return False
    return True


def test_a_key_is_added_and_removed(store: OpenedStore, repository: Repository) -> None:
    assert (opens(store, WORD), opens(store, FILE)) == (True, False)
    added = repository.add_key(FILE, "second")
    assert [key.label for key in repository.config.keys] == ["first", "second"]
    assert (opens(store, WORD), opens(store, FILE)) == (True, True)
    other = Repository.open(store, FILE, Machine())
    assert other.keyring.master == repository.keyring.master
    repository.remove_key(added.id)
    assert (opens(store, WORD), opens(store, FILE)) == (True, False)


def test_a_key_is_changed(store: OpenedStore, repository: Repository) -> None:
    new = Secret.passphrase(b"battery staple")
    old = repository.keys()[0]
    changed = repository.change_key(WORD, new)
    assert changed.label == "first" and changed.id != old.id
    assert (opens(store, WORD), opens(store, new)) == (False, True)
    with pytest.raises(WrongKey):
        repository.change_key(WORD, FILE)
    assert opens(store, new)


def test_the_last_key_stays(store: OpenedStore, repository: Repository) -> None:
    with pytest.raises(UsageError, match="only key"):
        repository.remove_key(repository.keys()[0].id)
    with pytest.raises(UsageError, match="has no key"):
        repository.remove_key("0000")
    assert opens(store, WORD)


def test_keys_of_another_machine_are_kept(store: OpenedStore, repository: Repository) -> None:
    elsewhere = Repository.open(store, WORD, Machine())
    elsewhere.add_key(FILE, "elsewhere")
    repository.add_key(Secret.passphrase(b"third"), "here")
    labels = [key.label for key in Repository.read_config(store).keys]
    assert labels == ["first", "elsewhere", "here"]


@pytest.mark.parametrize(
    ("secret", "words"),
    [
        (Secret.passphrase(b"wrong"), "that passphrase does not open the only key of memory:"),
        (Secret.key_file(b"w" * 32), "that key file does not open the only key of memory:"),
        (Secret.key_file(b"correct horse" * 3), "that key file"),
    ],
)
@pytest.mark.usefixtures("repository")
def test_wrong_secrets(store: OpenedStore, secret: Secret, words: str) -> None:
    with pytest.raises(WrongKey, match=words):
        Repository.open(store, secret, Machine())


def test_poor_secrets_are_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        Secret.passphrase(b"")
    with pytest.raises(UsageError, match="32 random bytes"):
        Secret.key_file(b"k" * 31)


@pytest.mark.usefixtures("repository")
def test_a_repository_is_not_made_over_another(store: OpenedStore) -> None:
    before = store.get(names.CONFIG)
    with pytest.raises(UsageError, match="a repository at memory: already"):
        Repository.create(store, FILE, Machine(), label="x")
    assert store.get(names.CONFIG) == before


def test_no_repository() -> None:
    with pytest.raises(NoRepository, match="no repository at memory:"):
        Repository.open(opened({}), WORD, Machine())


def test_nothing_secret_shows(store: OpenedStore, repository: Repository) -> None:
    repository.add_key(FILE, "file")
    stored = store.get(names.CONFIG)
    for secret in (b"correct horse", repository.keyring.master, FILE.value):
        assert secret not in stored
    for shown in (repr(WORD), repr(repository.opening), repr(repository.keyring)):
        assert "horse" not in shown and repr(repository.keyring.master)[2:10] not in shown


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("memory_kib", 8 * 1024 - 1),
        ("memory_kib", (4 << 20) + 1),
        ("passes", 0),
        ("passes", 65),
        ("lanes", 0),
        ("lanes", 65),
        ("salt", b"short"),
    ],
)
def test_hostile_parameters_are_not_followed(
    store: OpenedStore, repository: Repository, field: str, value: object
) -> None:
    key = repository.config.keys[0]
    bad = msgspec.structs.replace(key, **{field: value})
    config = msgspec.structs.replace(repository.config, keys=[bad])
    store.put(names.CONFIG, [msgspec.json.encode(config)])
    with pytest.raises(WrongKey):
        Repository.open(store, WORD, Machine())
    with pytest.raises(Damaged, match="out of bounds"):
        keys._stretch(WORD, bad)


@pytest.mark.parametrize("field", ["id", "label", "kind", "created_ns"])
def test_what_stands_beside_a_key_is_bound_to_it(
    store: OpenedStore, repository: Repository, field: str
) -> None:
    key = repository.config.keys[0]
    value = 1 if field == "created_ns" else "other"
    bad = msgspec.structs.replace(key, **{field: value})
    config = msgspec.structs.replace(repository.config, keys=[bad])
    store.put(names.CONFIG, [msgspec.json.encode(config)])
    assert not opens(store, WORD)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"cloudfs": 2}, "format 2"), ({"features": ["x", "a"]}, "features a, x")],
)
def test_newer_formats(changes: dict[str, object], words: str) -> None:
    config = msgspec.structs.replace(RepositoryConfig(1, "00" * 16, []), **changes)
    with pytest.raises(UsageError, match=f"newer cloudfs \\({words}\\)"):
        parse_config(msgspec.json.encode(config), "u")


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"\xff", b"[]", b"null", b"[" * 10_000, b'{"cloudfs":1,"id":"zz","keys":[]}'],
)
def test_what_is_no_configuration(data: bytes) -> None:
    with pytest.raises(Damaged, match="no cloudfs configuration"):
        parse_config(data, "u")


def test_a_repository_without_keys_opens_for_nobody() -> None:
    store = opened({names.CONFIG: msgspec.json.encode(RepositoryConfig(1, "00" * 16, []))})
    assert not opens(store, WORD)


def test_the_id_of_a_key_comes_from_its_salt() -> None:
    made = [keys.wrap(b"m" * 32, "00", FILE, "l", 1, salt) for salt in (b"a" * 16, b"b" * 16)]
    assert made[0].id != made[1].id
    assert all(isinstance(key, WrappedKey) and len(key.sealed) == 48 for key in made)
