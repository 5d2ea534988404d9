"""Options that several commands share. They fill the App; commands get no arguments from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cloudfs.core import human

if TYPE_CHECKING:
    from cloudfs.cli.app import App

F = TypeVar("F", bound=Callable[..., Any])


class SizeType(click.ParamType[int]):
    """A size like "10 MB", in bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it."""
        try:
            return value if isinstance(value, int) else human.parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class DurationType(click.ParamType[float]):
    """A duration like "15m", in seconds."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Read it."""
        try:
            return value if isinstance(value, float) else human.parse_duration(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class ShareType(click.ParamType[float]):
    """A share like "5%", from 0 to 1."""

    name = "share"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Read it."""
        try:
            return value if isinstance(value, float) else human.parse_share(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class PolicyType(click.ParamType[str]):
    """The name of a policy or a URL; completes to the policies there are."""

    name = "policy"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """As it is."""
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[Any]:
        """The names that begin so."""
        from click.shell_completion import CompletionItem

        from cloudfs.cli.environment import read_environment
        from cloudfs.cli.policies import PolicyFiles

        names = PolicyFiles(read_environment().config_dir).names()
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


SIZE, DURATION, SHARE, POLICY = SizeType(), DurationType(), ShareType(), PolicyType()
FILE = click.Path(dir_okay=False)


def _fills(place: str, field: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    """A callback that puts the value, when there is one, into a part of the App."""

    def put(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        if value is None or value is False:
            return
        app: App = ctx.obj
        setattr(getattr(app, place) if place else app, field, value)

    return put


def _secret(field: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def put(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        if value is not None:
            import dataclasses

            app: App = ctx.obj
            app.store.secret = dataclasses.replace(app.store.secret, **{field: value})

    return put


def _option(*names: str, place: str, field: str, **settings: Any) -> Callable[[F], F]:
    return click.option(*names, expose_value=False, callback=_fills(place, field), **settings)


def common_options() -> list[click.Parameter]:
    """What every command takes; fresh for each of them."""

    @_option("--debug", place="", field="debug", is_flag=True, help="Show where errors come from.")
    @_option("-v", "--verbose", place="output", field="verbose", is_flag=True, help="Say more.")
    @_option(
        "-q", "--quiet", place="output", field="quiet", is_flag=True, help="Say only what is wrong."
    )
    def carrier() -> None:
        pass

    return list(reversed(carrier.__click_params__))  # type: ignore[attr-defined]  # set by click


json_option = _option(
    "--json", place="output", field="json", is_flag=True, help="Print one JSON object a line."
)
utc_option = _option(
    "--utc", place="output", field="utc", is_flag=True, help="Print times in UTC, not local."
)
yes_option = click.option("--yes", is_flag=True, help="Do it without asking.")


def secret_options(function: F) -> F:
    """How a repository is unlocked."""
    for name, field, text in (
        ("--key-file", "key_file", "Unlock the repository with this key file."),
        ("--passphrase-file", "passphrase_file", "Read the passphrase from this file."),
    ):
        function = click.option(
            name, type=FILE, expose_value=False, callback=_secret(field), metavar="FILE", help=text
        )(function)
    return function


def reach_options(function: F) -> F:
    """How a store is reached, other than what a policy says as well."""
    function = _option(
        "--retry-time",
        place="store",
        field="retry_s",
        type=DURATION,
        help="How long to try a store that does not answer.  [default: 2 min]",
    )(function)
    return secret_options(function)


def store_options(function: F) -> F:
    """Where a repository is and how it is reached and unlocked."""
    for name, field, kind, metavar, text in reversed(
        (
            ("--repo", "repository", str, "URL", "Use this repository, not the policy's."),
            ("--endpoint-url", "endpoint_url", str, "URL", "An S3 server other than Amazon's."),
            ("--region", "region", str, "NAME", "Region of the S3 bucket."),
            ("--profile", "profile", str, "NAME", "Which credentials of ~/.aws to use."),
            ("--upload-limit", "upload_limit", SIZE, "SIZE", "Upload at most this much a second."),
            (
                "--download-limit",
                "download_limit",
                SIZE,
                "SIZE",
                "Download at most this much a second.",
            ),
        )
    ):
        function = _option(name, place="store", field=field, type=kind, metavar=metavar, help=text)(
            function
        )
    return reach_options(function)


def pass_app(function: F) -> F:
    """Hand the App to a command as its first argument."""
    return click.pass_obj(function)  # type: ignore[return-value]  # click types it by parameters
