"""``cloudfs ls``, ``find`` and ``cat``: looking into snapshots without mounting them."""

from __future__ import annotations

import fnmatch
import os
import stat as st
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from cloudfs.cli import options
from cloudfs.cli.app import App
from cloudfs.cli.output import Output, quote_path
from cloudfs.cli.target import parse_target
from cloudfs.core.errors import UsageError

if TYPE_CHECKING:
    from cloudfs.core.rows import Meta
    from cloudfs.repo.view import SnapshotView

TYPE_LETTERS = {1: "f", 3: "d", 6: "l", 7: "p", 8: "s", 9: "c", 10: "b"}
TYPE_WORDS = {
    1: "file",
    3: "dir",
    6: "symlink",
    7: "fifo",
    8: "socket",
    9: "chardev",
    10: "dev",
}
_READ_BYTES = 4 << 20


@click.command()
@click.argument("target", type=options.POLICY, metavar="POLICY[@SNAPSHOT][:PATH]")
@click.option("-l", "--long", "long_format", is_flag=True, help="Show what belongs to each item.")
@click.option("-R", "--recursive", is_flag=True, help="Go down into directories.")
@options.json_option
@options.utc_option
@options.store_options
@options.pass_app
def ls(app: App, target: str, long_format: bool, recursive: bool) -> None:
    """List a directory of a snapshot (the latest one, unless another is named)."""
    named = parse_target(target)
    with app.history(named.place) as history:
        view = history.view(history.find(named.snapshot).number)
        meta = view.resolve(named.path)
        for path, item in _listed(view, meta, named.path, recursive):
            shown = path if recursive or meta.type != 3 else path.rpartition(b"/")[2]
            _show(app.output, shown, path, item, long_format)


def _listed(
    view: SnapshotView, meta: Meta, path: bytes, recursive: bool
) -> Iterator[tuple[bytes, Meta]]:
    prefix = b"" if path == b"/" else path
    if meta.type != 3:
        yield path, meta
    elif recursive:
        for below, _, item in view.walk(meta.lin, prefix):
            yield below, item
    else:
        entries = view.entries(meta.lin)
        metas = view.metas([entry.lin for entry in entries])
        for entry, found in zip(entries, metas, strict=True):
            if found is not None:
                yield prefix + b"/" + entry.name, found


def _show(output: Output, shown: bytes, path: bytes, meta: Meta, long_format: bool) -> None:
    if output.json:
        output.object(node(output, path, meta))
    elif long_format:
        output.line(long_line(output, shown, meta))
    else:
        output.line(quote_path(shown))


def mode_of(meta: Meta) -> int:
    """The st_mode of an item."""
    from cloudfs.core.changes import MODES

    return MODES.get(meta.type, 0) | meta.mode


def long_line(output: Output, shown: bytes, meta: Meta) -> str:
    """One line as of ``ls -l``."""
    owner, group = meta.uname or str(meta.uid), meta.gname or str(meta.gid)
    size = str(meta.size)
    if meta.type in (9, 10):
        size = f"{os.major(meta.rdev)}, {os.minor(meta.rdev)}"
    target = f" -> {quote_path(meta.target)}" if meta.type == 6 else ""
    return (
        f"{st.filemode(mode_of(meta))} {meta.nlink:>3} {owner:<8} {group:<8} {size:>12}"
        f" {output.time(meta.mtime_ns)} {quote_path(shown)}{target}"
    )


def node(output: Output, path: bytes, meta: Meta) -> dict[str, Any]:
    """One item as JSON, with the names that restic gives its nodes."""
    found: dict[str, Any] = {
        "message_type": "node",
        "name": path.rpartition(b"/")[2],
        "type": TYPE_WORDS.get(meta.type, "other"),
        "path": path,
        "uid": meta.uid,
        "gid": meta.gid,
        "user": meta.uname,
        "group": meta.gname,
        "size": meta.size,
        "mode": mode_of(meta),
        "permissions": st.filemode(mode_of(meta)),
        "mtime": output.exact_time(meta.mtime_ns),
        "ctime": output.exact_time(meta.ctime_ns),
        "inode": meta.lin,
        "links": meta.nlink,
    }
    if meta.type == 6:
        found["linktarget"] = meta.target
    return found


@click.command()
@click.argument("target", type=options.POLICY, metavar="POLICY[@SNAPSHOT][:PATH]")
@click.argument("patterns", nargs=-1, metavar="[PATTERN]...")
@click.option("--all", "every", is_flag=True, help="Look in every snapshot.")
@click.option(
    "--type",
    "types",
    multiple=True,
    type=click.Choice(list(TYPE_LETTERS.values())),
    help="Only files (f), directories (d), links (l), fifos (p), sockets (s), devices (c, b).",
)
@click.option(
    "--larger", type=options.SIZE, metavar="SIZE", help="Only files of more than this size."
)
@click.option(
    "--smaller", type=options.SIZE, metavar="SIZE", help="Only files of less than this size."
)
@click.option("-l", "--long", "long_format", is_flag=True, help="Show what belongs to each item.")
@options.json_option
@options.utc_option
@options.store_options
@options.pass_app
def find(
    app: App,
    target: str,
    patterns: tuple[str, ...],
    every: bool,
    types: tuple[str, ...],
    larger: int | None,
    smaller: int | None,
    long_format: bool,
) -> None:
    """Find items by name in a snapshot, or in all of them.

    A PATTERN is as of a shell (*.txt); with a / in it, it is compared with the whole path. An item
    that fits any of them is shown; without a PATTERN, all are. Exit code 1 means that none is.
    """
    named = parse_target(target)
    raw = [os.fsencode(pattern) for pattern in patterns]
    found = False
    with app.history(named.place) as history:
        numbers = [record.number for record in history.snapshots]
        for number in numbers if every else [history.find(named.snapshot).number]:
            view = history.view(number)
            try:
                start = view.resolve(named.path)
            except UsageError:
                if not every:
                    raise
                continue  # the place is not in every snapshot
            for path, meta in _listed(view, start, named.path, recursive=True):
                wanted = not types or TYPE_LETTERS.get(meta.type) in types
                if larger is not None or smaller is not None:
                    wanted = wanted and meta.type == 1 and _within(meta.size, larger, smaller)
                if wanted and _fits(path, raw):
                    found = True
                    _show_found(app.output, number, path, meta, every, long_format)
    if not found:
        raise click.exceptions.Exit(1)


def _within(size: int, larger: int | None, smaller: int | None) -> bool:
    return (larger is None or size > larger) and (smaller is None or size < smaller)


def _fits(path: bytes, patterns: list[bytes]) -> bool:
    name = path.rpartition(b"/")[2]
    return not patterns or any(
        fnmatch.fnmatchcase(path if b"/" in pattern else name, pattern) for pattern in patterns
    )


def _show_found(
    output: Output, number: int, path: bytes, meta: Meta, every: bool, long_format: bool
) -> None:
    if output.json:
        output.object(node(output, path, meta) | {"snapshot": number})
        return
    line = long_line(output, path, meta) if long_format else quote_path(path)
    output.line(f"{number:>4}  {line}" if every else line)


@click.command()
@click.argument("targets", nargs=-1, required=True, metavar="POLICY[@SNAPSHOT]:PATH...")
@options.store_options
@options.pass_app
def cat(app: App, targets: tuple[str, ...]) -> None:
    """Write the content of files to standard output, as it was in a snapshot."""
    for target in targets:
        named = parse_target(target)
        with app.history(named.place) as history:
            view = history.view(history.find(named.snapshot).number)
            meta = view.resolve(named.path)
            if meta.type != 1:
                shown = quote_path(named.path)
                raise UsageError(f"{shown} is no regular file, so it has no content to show.")
            for offset in range(0, meta.size, _READ_BYTES):
                _put(history.reader.read(view, meta, offset, _READ_BYTES))


def _put(data: bytes) -> None:
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise click.exceptions.Exit(0) from None
