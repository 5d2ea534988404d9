"""The root of the command line: the table of commands, and what happens to errors.

A command's module is imported only when the command runs, so ``cloudfs --help`` imports click and
nothing else of weight.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

import click

from cloudfs import __version__
from cloudfs.cli.errors import FAILED, INTERRUPTED, USAGE, explain
from cloudfs.cli.interrupt import Interrupts

if TYPE_CHECKING:
    from cloudfs.cli.app import App

COMMANDS: dict[str, tuple[str, str]] = {
    "policy": ("policy:policy", "Make, show and change policies: what is backed up, and where."),
    "sync": ("sync:sync", "Take a snapshot of a policy's tree and upload what changed."),
    "watch": ("watch:watch", "Hear what changes, so that syncs visit only that."),
    "mount": ("mount:mount", "Browse backups as ordinary directories."),
    "umount": ("mount:umount", "Stop browsing."),
    "snapshots": ("snapshots:snapshots", "List snapshots."),
    "ls": ("look:ls", "List a directory of a snapshot."),
    "find": ("look:find", "Find items in snapshots by name."),
    "cat": ("look:cat", "Write files of a snapshot to standard output."),
    "diff": ("diff:diff", "Show what differs between two snapshots."),
    "restore": ("restore:restore", "Restore files and directories."),
    "status": ("status:status", "Show policies, their last snapshots, and mounts."),
    "tables": ("tables:tables", "Print the tables that make up a policy's backups."),
    "key": ("key:key", "Add, remove, change and list passphrases and key files."),
    "completion": ("completion:completion", "Print the completion script of a shell."),
}
"""Name → (module of this package : object in it, what it does)."""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order in which they are best read."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command and give it the options that all have."""
        if cmd_name not in COMMANDS:
            return None
        import importlib

        from cloudfs.cli.options import common_options

        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(f"cloudfs.cli.{module}"), name)
        assert isinstance(command, click.Command)
        leaves = command.commands.values() if isinstance(command, click.Group) else [command]
        for leaf in leaves:
            if not any(param.name == "debug" for param in leaf.params):
                leaf.params.extend(common_options())
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table, from what is known without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Each command has --help and a manual page, like cloudfs-sync(1).",
)
@click.version_option(__version__, prog_name="cloudfs", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show where errors come from.")
@click.option("-v", "--verbose", is_flag=True, help="Say more.")
@click.option("-q", "--quiet", is_flag=True, help="Say only what is wrong.")
@click.pass_context
def cli(ctx: click.Context, debug: bool, verbose: bool, quiet: bool) -> None:
    """Back directory trees up into an object store and browse every backup as a directory."""
    app: App = ctx.obj
    app.debug = debug
    app.output.verbose, app.output.quiet = verbose, quiet


def run(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code. No exception leaves it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # tried
    interrupts = Interrupts()
    interrupts.install()
    holder: list[App] = []
    try:
        return _run(arguments, interrupts, holder)
    except KeyboardInterrupt:
        _say("interrupted.")
        return INTERRUPTED
    except BaseException as error:  # the last one to see it
        return _report(error, interrupts, holder[0].debug if holder else False)


def _run(arguments: list[str] | None, interrupts: Interrupts, holder: list[App]) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    app = None
    if not _only_help(given):
        from cloudfs.cli.app import App
        from cloudfs.cli.environment import forget_secrets, read_environment
        from cloudfs.cli.output import Output

        app = App(read_environment(), Output(), interrupts)
        forget_secrets()
        holder.append(app)
    code = cli.main(given, "cloudfs", obj=app, standalone_mode=False)
    return code if isinstance(code, int) else 0


def _only_help(arguments: list[str]) -> bool:
    return not arguments or arguments[0] in ("-h", "--help", "--version")


def _report(error: BaseException, interrupts: Interrupts, debug: bool) -> int:
    """Say what went wrong, in one sentence, and return the exit code."""
    if debug:
        import traceback

        traceback.print_exception(error)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAILED
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        return USAGE
    if isinstance(error, click.Abort):
        _say("interrupted.")
        return INTERRUPTED
    if isinstance(error, click.ClickException):
        _say(_usage_sentence(error))
        return error.exit_code
    if isinstance(error, BrokenPipeError):
        return FAILED
    found = explain(error)
    if found is None:
        what = f"{type(error).__name__}: {error}".rstrip(": ")
        _say(f"internal error ({what}); run with --debug to see where.")
        return FAILED
    _say(found[0])
    return INTERRUPTED if interrupts.requested else found[1]


def _usage_sentence(error: click.ClickException) -> str:
    message = error.format_message().rstrip()
    if not message.endswith((".", "?", "!")):
        message += "."
    ctx = getattr(error, "ctx", None)
    return f"{message} See `{ctx.command_path} --help`." if ctx is not None else message


def _say(sentence: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"cloudfs: {sentence}", file=sys.stderr, flush=True)
