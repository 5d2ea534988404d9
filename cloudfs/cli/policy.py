"""``cloudfs policy``: make, list, show, change and remove policies."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from cloudfs.cli import options
from cloudfs.cli.app import App, Place, check_name_is_free
from cloudfs.cli.commands import check_commands
from cloudfs.cli.letting_go import check_not_mounted, let_go, let_go_of_removed
from cloudfs.cli.output import quote_path
from cloudfs.cli.policies import bad_pattern
from cloudfs.cli.secrets import own_label
from cloudfs.core.errors import CloudfsError, NoRepository, SourceError, UsageError
from cloudfs.core.policy import KEYS, SOURCES, Policy, parse_policy, read_value

if TYPE_CHECKING:
    from cloudfs.db.local import LocalState
    from cloudfs.repo.repository import Repository
    from cloudfs.store.open import OpenedStore

_HELD_FOR = ("snapshot", "sources", "repository")
"""What snapshots that a policy's syncs hold are of, and are held for."""

F = TypeVar("F", bound=Callable[..., Any])


@click.group()
def policy() -> None:
    """Make, show and change policies: what is backed up, and where."""


def key_options(function: F) -> F:
    """An option for each key of a policy that can be set; None or () where it is left out."""
    settings: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
        (("--source", "sources"), {"multiple": True, "metavar": "PATH", "type": click.Path()}),
        (("--repo", "repository"), {"metavar": "URL"}),
        (("--endpoint-url",), {"metavar": "URL"}),
        (("--region",), {"metavar": "NAME"}),
        (("--profile",), {"metavar": "NAME"}),
        (("--single-writer/--no-single-writer",), {"default": None}),
        (("--snapshot",), {"metavar": f"[{'|'.join(SOURCES)}]"}),
        (("--external-snapshot",), {"metavar": "COMMAND"}),
        (("--external-changes",), {"metavar": "COMMAND"}),
        (("--external-release",), {"metavar": "COMMAND"}),
        (("--external-timeout",), {"metavar": "DURATION"}),
        (("--kept-room",), {"metavar": "SIZE"}),
        (("--when-full",), {"metavar": "[wait|inconsistent]"}),
        (("--sync-on",), {"metavar": "[batch|write|DURATION]"}),
        (("--block-size",), {"metavar": "SIZE"}),
        (("--pack-size",), {"metavar": "SIZE"}),
        (("--pack-time-limit",), {"metavar": "DURATION"}),
        (("--compression",), {"metavar": "[zstd:N|none]"}),
        (("--verify-packs/--no-verify-packs",), {"default": None}),
        (("--verify-source",), {"metavar": "N%"}),
        (("--workers",), {"type": int, "metavar": "N"}),
        (("--exclude", "excludes"), {"multiple": True, "metavar": "PATTERN"}),
        (("--exclude-caches/--no-exclude-caches",), {"default": None}),
        (("--exclude-if-present",), {"multiple": True, "metavar": "NAME"}),
        (("--one-file-system/--no-one-file-system",), {"default": None}),
        (("--tag", "tags"), {"multiple": True, "metavar": "TAG"}),
        (("--upload-limit",), {"metavar": "SIZE"}),
        (("--download-limit",), {"metavar": "SIZE"}),
    )
    for names, given in reversed(settings):
        key = names[-1].partition("/")[0].lstrip("-").replace("-", "_")
        text = KEYS[key].comment
        if given.get("multiple"):
            text += "  (may be repeated)"
        function = click.option(*names, help=text, **given)(function)
    return options.reach_options(function)


def _mode(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    try:
        mode = int(value, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777 or not mode & 0o400:
        raise click.BadParameter("an octal mode like 0640 is wanted, readable by its owner")
    return mode


def _changes(given: dict[str, Any]) -> dict[str, Any]:
    """The fields that options set, checked. Raises UsageError that names the option."""
    fields: dict[str, Any] = {}
    for key, value in given.items():
        if value is None or value == ():
            continue
        if key == "sources":
            value = tuple(os.path.abspath(os.path.expanduser(path)) for path in value)  # noqa: PLW2901
        elif key == "repository":
            value = value if "://" in value else os.path.abspath(os.path.expanduser(value))  # noqa: PLW2901
        try:
            fields[KEYS[key].field] = read_value(key, value)
        except ValueError as error:
            option = {"sources": "source", "repository": "repo", "excludes": "exclude"}
            name = option.get(key, {"tags": "tag"}.get(key, key)).replace("_", "-")
            raise UsageError(f"--{name}: {error}.") from None
    return fields


def _check(new: Policy) -> None:
    """What only this machine can tell of a policy that is about to be written."""
    for source in new.sources:
        shown = quote_path(os.fsencode(source))
        if not os.path.exists(source):
            raise SourceError(f"the source {shown} does not exist. Nothing was done.")
        if not os.path.isdir(source):
            raise SourceError(f"the source {shown} is not a directory. Name a directory.")
    bad = bad_pattern(new.excludes)
    if bad is not None:
        raise UsageError(f'--exclude: "{bad}" is no pattern as in .gitignore.')
    for source in new.sources:
        _check_not_within(new, source)
    from cloudfs.source.choose import choose
    from cloudfs.store.open import parse_url

    check_commands(new)
    choose(new.snapshot, [os.fsencode(source) for source in new.sources])
    parse_url(new.repository)


def _way(new: Policy) -> str:
    """How the changes of a policy's sources are found, and why not in a better way."""
    from cloudfs.source.btrfs.subvolume import is_subvolume
    from cloudfs.source.choose import choose

    sources = [os.fsencode(source) for source in new.sources]
    way = choose(new.snapshot, sources)
    if way == "scan" and new.snapshot == "auto":
        if all(map(is_subvolume, sources)):
            return "scan (btrfs snapshots would need root)"
        return "scan (not a btrfs subvolume; see cloudfs-policy(5))"
    if way == "watch":
        return f"a watch daemon (start it: cloudfs watch {new.name})"
    if way == "live":
        return f"a live mount (make it: cloudfs mount --live {new.name})"
    if way == "external":
        return "external commands" if new.external_changes else "scan of external snapshots"
    return "btrfs snapshots" if way == "btrfs" else way


def _check_not_within(new: Policy, source: str) -> None:
    """A repository within its own source would back itself up, again and again."""
    if not new.repository.startswith("file://"):
        return
    top, place = os.path.realpath(source), os.path.realpath(new.repository.removeprefix("file://"))
    if os.path.commonpath([top, place]) != top:
        return
    if place != top and new.excludes:
        import pathspec

        spec = pathspec.GitIgnoreSpec.from_lines(new.excludes)
        if spec.match_file(os.path.relpath(place, top) + "/"):
            return
    below = os.path.relpath(place, top)
    hint = "Choose another place." if place == top else f"Exclude it: `--exclude /{below}`"
    raise UsageError(
        f"the repository {new.repository} lies within the source {quote_path(os.fsencode(source))}"
        f" and would back itself up. {hint}"
    )


@policy.command()
@click.argument("name")
@key_options
@click.option("--adopt", is_flag=True, help="Take the policy NAME over from the repository.")
@click.option("--owner", metavar="USER", help="Who owns the policy file, and so may change it.")
@click.option(
    "--mode", callback=_mode, metavar="MODE", help="Mode of the policy file.  [default: 0644]"
)
@options.pass_app
def create(
    app: App, name: str, adopt: bool, owner: str | None, mode: int | None, **given: Any
) -> None:
    """Make a policy, and its repository where there is none yet."""
    app.policies.prepare(name)
    fields = _changes(given)
    fields.setdefault("repository", _default_repository(app))
    own = (os.geteuid(), os.getegid()) if owner is None else _ids(owner)
    if adopt:
        _adopt(app, name, fields, 0o644 if mode is None else mode, own)
        return
    if "sources" not in fields:
        raise UsageError("--source is missing: which directory is to be backed up?")
    if not fields["repository"]:
        raise UsageError("--repo is missing: where are the backups to go?")
    new = Policy(name=name, **fields)
    _check(new)
    _create(app, new, 0o644 if mode is None else mode, own)


def _default_repository(app: App) -> str:
    url = app.environment.repository
    if not url:
        return ""
    return app.place(url).url


def _ids(owner: str) -> tuple[int, int]:
    import pwd

    try:
        entry = pwd.getpwnam(owner)
    except KeyError:
        raise UsageError(f"there is no user {owner}.") from None
    return entry.pw_uid, entry.pw_gid


def _create(app: App, new: Policy, mode: int, owner: tuple[int, int]) -> None:
    place = Place(new.repository, app.store_options(new))
    with open_or_create(app, place, new) as repository:
        check_name_is_free(repository, new.name)
        policy_id = repository.entropy(16).hex()
        file = app.policies.create(msgspec.structs.replace(new, id=policy_id), mode, owner)
        try:
            app.register(repository, file)
        except BaseException:
            file.path.unlink(missing_ok=True)
            raise
    sources = ", ".join(quote_path(os.fsencode(source)) for source in new.sources)
    app.output.say(
        f'Policy "{new.name}": {sources} → {new.repository}, changes found by {_way(new)}.'
        f"\nNext: cloudfs sync {new.name}"
    )


@contextlib.contextmanager
def open_or_create(app: App, place: Place, new: Policy) -> Any:
    """The repository of a place, made where there is none."""
    from cloudfs.repo.repository import Repository

    with contextlib.closing(app.open_store(place)) as store:
        try:
            Repository.read_config(store)
        except NoRepository:
            with contextlib.closing(app.local_state()) as local:
                yield _create_repository(app, place, store, local, new)
            return
    with app.repository(place) as repository:
        yield repository


def _create_repository(
    app: App, place: Place, store: OpenedStore, local: LocalState, new: Policy
) -> Repository:
    from cloudfs.repo.repository import Repository
    from cloudfs.store.probe import probe

    secret = app.new_secret(place.url)
    found = probe(store, f"probe/{os.urandom(16).hex()}", single_writer=new.single_writer)
    repository = Repository.create(
        store, secret, local, label=own_label(), conditional=found.conditional
    )
    app.output.say(f"New repository at {place.url}.")
    return repository


def _adopt(app: App, name: str, fields: dict[str, Any], mode: int, owner: tuple[int, int]) -> None:
    """Write the file of a policy that another machine made, from the repository's copy."""
    if not fields["repository"]:
        raise UsageError("--repo is missing: where is the policy to be taken over from?")
    reach = Policy(name=name, sources=(), **fields)
    place = Place(reach.repository, app.store_options(reach), None, name)
    with app.repository(place) as repository:
        record = app.records(repository, place)[0]
        old = parse_policy(record.text, f"{name} in {place.url}")
        new = msgspec.structs.replace(old, **{**fields, "id": record.id})
        _check(new)
        file = app.policies.create(new, mode, owner)
        app.register(repository, file)
    app.output.say(f'Policy "{name}" taken over from {place.url}; see {file.path}.')
    if new.snapshot == "external":
        app.output.say("It has commands, which every sync runs: read them there first.")


@policy.command("list")
@options.json_option
@options.pass_app
def list_policies(app: App) -> None:
    """List the policies of this machine."""
    names = app.policies.names()
    if not names and not app.output.json:
        app.output.say(f"There are no policies in {app.policies.directory}.")
        return
    rows, errors = [], []
    for name in names:
        try:
            found = app.policies.load(name).policy
        except CloudfsError as error:
            errors.append(str(error))
            continue
        if app.output.json:
            app.output.object(msgspec.to_builtins(found))
        sources = " ".join(quote_path(os.fsencode(source)) for source in found.sources)
        rows.append((name, sources, found.repository))
    if rows and not app.output.json:
        app.output.table(("policy", "sources", "repository"), rows)
    for message in errors:
        app.output.warn(f"cloudfs: {message}")
    if errors:
        raise click.exceptions.Exit(2)


@policy.command()
@click.argument("name", type=options.POLICY)
@options.json_option
@options.pass_app
def show(app: App, name: str) -> None:
    """Print a policy as its file says it."""
    file = app.policies.load(name)
    if app.output.json:
        app.output.object({**msgspec.to_builtins(file.policy), "file": str(file.path)})
    else:
        app.output.note(str(file.path))
        app.output.line(file.text.removesuffix("\n"))


@policy.command("set")
@click.argument("name", type=options.POLICY)
@key_options
@click.option(
    "--clear",
    multiple=True,
    metavar="KEY",
    help="Give KEY of the file its default again, or empty its list.  (may be repeated)",
)
@options.pass_app
def set_policy(app: App, name: str, clear: tuple[str, ...], **given: Any) -> None:
    """Change a policy. Lists (--source, --exclude, …) are replaced as a whole.

    The new version holds from the next sync on; with --repo the backups go elsewhere, and a
    repository is made there if there is none.
    """
    old = app.policies.load(name)
    app.policies.check_may_change(old.path)
    fields = {**_cleared(clear), **_changes(given)}
    if not fields:
        raise UsageError("nothing to change: give an option for what is to be different.")
    new = msgspec.structs.replace(old.policy, **fields)
    if (new.snapshot, new.sources) != (old.policy.snapshot, old.policy.sources):
        check_not_mounted(app, name)
    _check(new)
    if new.repository != old.policy.repository:
        with open_or_create(app, Place(new.repository, app.store_options(new)), new) as repository:
            app.register(repository, app.policies.change(old, new))
    else:
        app.policies.change(old, new)
    if any(getattr(new, key) != getattr(old.policy, key) for key in _HELD_FOR):
        let_go(app, old, new)
    app.output.say(f'Policy "{name}" changed; see {old.path}.')


def _cleared(keys: tuple[str, ...]) -> dict[str, Any]:
    defaults = Policy(name="", sources=(), repository="")
    fields = {}
    for word in keys:
        key = word.replace("-", "_")
        if key not in KEYS or key in ("name", "id", "sources", "repository"):
            raise UsageError(f"--clear: {word} is no key that can be cleared.")
        fields[KEYS[key].field] = getattr(defaults, KEYS[key].field)
    return fields


@policy.command()
@click.argument("name", type=options.POLICY)
@options.yes_option
@options.pass_app
def remove(app: App, name: str, yes: bool) -> None:
    """Remove a policy from this machine. Its backups stay in the repository.

    Its watch daemon ends, and what its syncs held of the tree (snapshots of a file system that the
    next one would have counted from) is deleted.
    """
    path = app.policies.path(name)
    if app.policies.exists(name):
        app.policies.check_may_change(path)
        check_not_mounted(app, name)
        confirm(f"Remove {path}? The backups of {name} stay in its repository.", yes)
        let_go_of_removed(app, name)
    app.policies.remove(name)
    app.output.say(f'Policy "{name}" removed. Its backups stay in the repository.')


def confirm(question: str, yes: bool) -> None:
    """Ask before something is lost. Raises UsageError without a terminal, Abort for a no."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("there is no terminal to ask on; --yes does it without asking.")
    click.confirm(question, abort=True, err=True)
