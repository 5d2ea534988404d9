"""What every command works with: the environment, the output, policies, repositories.

Where a repository lies and how it is reached is decided here: the command line goes before the
environment, and that before the policy file.

A repository knows a policy by its id, which the policy file holds. So no request is needed to find
it; and a note in the state directory says which text the repository's sealed copy of the policy
has, so that a changed file is copied at the next sync and an unchanged one costs nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from cloudfs.cli import secrets
from cloudfs.cli.environment import Environment
from cloudfs.cli.interrupt import Interrupts
from cloudfs.cli.output import Output
from cloudfs.cli.policies import PolicyFile, PolicyFiles
from cloudfs.cli.secrets import SecretOptions
from cloudfs.cli.target import is_url, split_url
from cloudfs.core.errors import Damaged, NoRepository, UsageError
from cloudfs.core.policy import Policy, check_url

if TYPE_CHECKING:
    from cloudfs.db.local import LocalState
    from cloudfs.repo.history import History
    from cloudfs.repo.keys import Secret
    from cloudfs.repo.repository import PolicyRecord, Repository
    from cloudfs.store.open import OpenedStore, StoreOptions

DEFAULT_RETRY_S = 120.0


@dataclass
class StoreArguments:
    """What the command line says about repository and store; None for nothing."""

    repository: str | None = None
    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
    upload_limit: int | None = None
    download_limit: int | None = None
    retry_s: float | None = None
    secret: SecretOptions = field(default_factory=SecretOptions)


@dataclass(frozen=True)
class Place:
    """A repository, how it is reached, and the policy file that led there, if one did."""

    url: str
    options: StoreOptions
    file: PolicyFile | None = None
    policy_name: str = ""  # the one policy that is meant; "" for all that are there


@dataclass
class App:
    """One run of the program."""

    environment: Environment
    output: Output
    interrupts: Interrupts
    debug: bool = False
    store: StoreArguments = field(default_factory=StoreArguments)
    _secrets: dict[str, Secret] = field(default_factory=dict)

    @property
    def policies(self) -> PolicyFiles:
        """The policy files."""
        return PolicyFiles(self.environment.config_dir)

    # -- finding ---------------------------------------------------------------------------------

    def place(self, name: str | None) -> Place:
        """What a POLICY|URL argument means; None where it was left out."""
        given = self.store.repository or self.environment.repository
        if name is not None and is_url(name):
            url, policy_name = split_url(name)
            return Place(_url(url), self.store_options(None), None, policy_name)
        if given and (name is None or not self.policies.exists(name)):
            return Place(_url(given), self.store_options(None), None, name or "")
        file = self.policies.load(name if name is not None else self.policies.only())
        url = _url(given) if given else file.policy.repository
        return Place(url, self.store_options(file.policy), file, file.policy.name)

    def store_options(self, policy: Policy | None) -> StoreOptions:
        """How to reach a store; what the command line leaves open is taken from the policy."""
        from cloudfs.store.open import StoreOptions

        given = self.store

        def limit(own: int | None, of_policy: int) -> float | None:
            chosen = of_policy if own is None else own
            return float(chosen) if chosen else None

        return StoreOptions(
            endpoint_url=given.endpoint_url or (policy.endpoint_url if policy else "") or None,
            region=given.region or (policy.region if policy else "") or None,
            profile=given.profile or (policy.profile if policy else "") or None,
            upload_limit_bytes_s=limit(given.upload_limit, policy.upload_limit if policy else 0),
            download_limit_bytes_s=limit(
                given.download_limit, policy.download_limit if policy else 0
            ),
            retry_s=DEFAULT_RETRY_S if given.retry_s is None else given.retry_s,
        )

    # -- opening ---------------------------------------------------------------------------------

    def open_store(self, place: Place) -> OpenedStore:
        """The store of a place."""
        from cloudfs.store.open import open_store

        return open_store(place.url, place.options)

    def secret(self, url: str) -> Secret:
        """The secret of an existing repository, asked for at most once."""
        known = self._known_secret(url)
        if known is None:
            known = self._secrets[url] = secrets.ask(f"Passphrase of {url}: ", twice=False)
        return known

    def _known_secret(self, url: str) -> Secret | None:
        if url not in self._secrets:
            given = secrets.given_secret(self.store.secret, self.environment)
            if given is None:
                return None
            self._secrets[url] = given
        return self._secrets[url]

    def new_secret(self, url: str) -> Secret:
        """The secret of a repository that is to be made."""
        given = secrets.given_secret(self.store.secret, self.environment)
        if given is None:
            question = f"New repository at {url}. Choose a passphrase (it cannot be recovered): "
            given = secrets.ask(question, twice=True)
        self._secrets[url] = given
        return given

    @contextlib.contextmanager
    def repository(self, place: Place) -> Iterator[Repository]:
        """Open the repository of a place."""
        from cloudfs.repo.repository import Repository

        with contextlib.closing(self.open_store(place)) as store:
            secret = self._known_secret(place.url)
            if secret is None:
                Repository.read_config(store)  # nobody is asked for the key of what is not there
                secret = self.secret(place.url)
            with contextlib.closing(self.local_state()) as local:
                yield Repository.open(store, secret, local)

    def local_state(self) -> LocalState:
        """The local state of all repositories."""
        from cloudfs.db.local import LocalState

        return LocalState(self.environment.cache_dir, self.environment.state_dir)

    def records(self, repository: Repository, place: Place) -> list[PolicyRecord]:
        """The policies of a repository that a place means, by name. Raises NoRepository."""
        from cloudfs.repo.repository import PolicyRecord

        file = place.file
        if file is not None and file.policy.id:
            return [PolicyRecord(file.policy.id, file.policy.name, file.text)]
        damaged: list[Damaged] = []
        found = repository.policies(damaged.append)
        wanted = [r for r in found if r.name == place.policy_name or not place.policy_name]
        if not wanted and damaged:
            raise damaged[0]  # it may be the one that is meant
        for error in damaged:
            self.output.warn(f"cloudfs: {error}")
        if not wanted and place.policy_name:
            there = ", ".join(record.name for record in found) or "none"
            raise NoRepository(
                f"{place.url} holds no policy called {place.policy_name}; it holds {there}."
            )
        if not wanted:
            raise NoRepository(
                f"{place.url} holds no policies yet; `cloudfs policy create` makes one."
            )
        return wanted

    @contextlib.contextmanager
    def histories(self, name: str | None) -> Iterator[list[History]]:
        """The histories of all policies that a POLICY|URL argument means: at least one."""
        from cloudfs.repo.history import History

        place = self.place(name)
        with self.repository(place) as repository, contextlib.ExitStack() as stack:
            histories = []
            for record in self.records(repository, place):
                history = History(repository, record)
                stack.callback(history.close)
                histories.append(history)
            yield histories

    @contextlib.contextmanager
    def history(self, name: str | None) -> Iterator[History]:
        """The history of the one policy that a POLICY|URL argument means."""
        from cloudfs.repo.history import History

        place = self.place(name)
        with self.repository(place) as repository:
            records = self.records(repository, place)
            if len(records) > 1:
                names = ", ".join(record.name for record in records)
                raise UsageError(
                    f"{place.url} holds several policies ({names}); name one as {place.url}#NAME."
                )
            with contextlib.closing(History(repository, records[0])) as history:
                yield history

    # -- registering -----------------------------------------------------------------------------

    def register(self, repository: Repository, file: PolicyFile) -> tuple[PolicyFile, PolicyRecord]:
        """See that the repository has the policy as its file says it. No request if it has."""
        from cloudfs.repo.repository import PolicyRecord

        policy = file.policy
        if not policy.id:
            check_name_is_free(repository, policy.name)
            self.policies.check_may_change(file.path)
            new_id = repository.entropy(16).hex()
            file = self.policies.change(file, msgspec.structs.replace(policy, id=new_id))
            policy = file.policy
        note = self.environment.state_dir / "registered" / f"{repository.id}-{policy.id}"
        digest = hashlib.sha256(file.text.encode()).hexdigest()
        with contextlib.suppress(OSError):
            if note.read_text() == digest:
                return file, PolicyRecord(policy.id, policy.name, file.text)
        record = repository.save_policy(policy.name, file.text, policy.id)
        note.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        note.write_text(digest)
        return file, record


def check_name_is_free(repository: Repository, name: str) -> None:
    """Raise UsageError where the repository holds a policy of this name.

    What is damaged has none that could be taken; who lists policies is told of it.
    """
    if any(record.name == name for record in repository.policies(lambda _: None)):
        raise UsageError(
            f"{repository.url} already holds a policy called {name}. Choose another name, or"
            f" `cloudfs policy create {name} --adopt --repo {repository.url}` to go on with it."
        )


def _url(text: str) -> str:
    try:
        return check_url(text)
    except ValueError as error:
        raise UsageError(f"{error}.") from None
