"""``cloudfs key``: which passphrases and key files open a repository."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cloudfs.cli import options, secrets
from cloudfs.cli.app import App
from cloudfs.cli.policy import confirm
from cloudfs.cli.secrets import SecretOptions

if TYPE_CHECKING:
    from cloudfs.repo.keys import KeyInfo, Secret

F = TypeVar("F", bound=Callable[..., Any])


@click.group()
def key() -> None:
    """Add, remove, change and list the passphrases and key files of a repository."""


def _place_argument(function: F) -> F:
    argument = click.argument("policy", required=False, type=options.POLICY, metavar="[POLICY|URL]")
    return options.store_options(argument(function))


def _new_options(function: F) -> F:
    for name, text in (
        ("--new-key-file", "Make this file's content a key (32 random bytes or more)."),
        ("--new-passphrase-file", "Read the new passphrase from this file."),
    ):
        function = click.option(name, type=options.FILE, metavar="FILE", help=text)(function)
    return function


def _new_secret(url: str, passphrase_file: str | None, key_file: str | None) -> Secret:
    given = secrets.from_files(SecretOptions(passphrase_file, key_file))
    return given or secrets.ask(f"New passphrase of {url}: ", twice=True)


@key.command("list")
@_place_argument
@options.json_option
@options.utc_option
@options.pass_app
def list_keys(app: App, policy: str | None) -> None:
    """List the keys of a repository."""
    with app.repository(app.place(policy)) as repository:
        keys = repository.keys()
    if app.output.json:
        for info in keys:
            created = app.output.exact_time(info.created_ns)
            app.output.object(
                {"id": info.id, "kind": info.kind, "created": created, "label": info.label}
            )
        return
    rows = [(k.id, k.kind, app.output.time(k.created_ns), k.label) for k in keys]
    app.output.table(("key", "kind", "created", "label"), rows)


@key.command()
@_place_argument
@_new_options
@click.option("--label", help="A word to know the key by.  [default: USER@HOST]")
@options.pass_app
def add(
    app: App,
    policy: str | None,
    new_passphrase_file: str | None,
    new_key_file: str | None,
    label: str | None,
) -> None:
    """Let one more passphrase or key file open a repository."""
    place = app.place(policy)
    with app.repository(place) as repository:
        secret = _new_secret(place.url, new_passphrase_file, new_key_file)
        if label is None:
            label = secrets.own_label()
        info = repository.add_key(secret, label)
    app.output.say(f"Key {info.id} ({info.kind}, {info.label}) now opens {place.url} too.")


@key.command()
@_place_argument
@_new_options
@options.pass_app
def change(
    app: App, policy: str | None, new_passphrase_file: str | None, new_key_file: str | None
) -> None:
    """Replace the passphrase or key file that is given by another one."""
    place = app.place(policy)
    with app.repository(place) as repository:
        new = _new_secret(place.url, new_passphrase_file, new_key_file)
        info = repository.change_key(app.secret(place.url), new)
    app.output.say(
        f"Key {info.id} ({info.kind}, {info.label}) opens {place.url} now, and the old one no more."
    )


@key.command()
@_place_argument
@click.option("--id", "key_id", required=True, metavar="KEY", help="Which key: see `key list`.")
@options.yes_option
@options.pass_app
def remove(app: App, policy: str | None, key_id: str, yes: bool) -> None:
    """Let a passphrase or key file no longer open a repository."""
    place = app.place(policy)
    with app.repository(place) as repository:
        keys = repository.keys()
        known = {info.id: info for info in keys}
        if key_id in known:
            confirm(f"Remove {_described(known[key_id])} of {place.url}?", yes)
        repository.remove_key(key_id)
    app.output.say(f"Key {key_id} no longer opens {place.url}.")


def _described(info: KeyInfo) -> str:
    day = time.strftime("%Y-%m-%d", time.localtime(info.created_ns / 1e9))
    return f"key {info.id} ({info.kind}, {info.label}, made {day})"
