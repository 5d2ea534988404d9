"""``cloudfs completion``: what a shell needs to complete commands, options and policies."""

from __future__ import annotations

import click

from cloudfs.cli import options
from cloudfs.cli.app import App

VARIABLE = "_CLOUDFS_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@options.pass_app
def completion(app: App, shell: str) -> None:
    """Print the completion script of a shell.

    Bash: source <(cloudfs completion bash)
    """
    from click.shell_completion import get_completion_class

    from cloudfs.cli.main import cli

    kind = get_completion_class(shell)
    assert kind is not None
    app.output.line(kind(cli, {}, "cloudfs", VARIABLE).source().rstrip("\n"))
