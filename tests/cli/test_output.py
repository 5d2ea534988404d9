"""Quoting, tables, JSON, names of backups, progress."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudfs.cli import progress as progress_module
from cloudfs.cli.output import Output, quote_path, to_json
from cloudfs.cli.progress import Progress
from cloudfs.cli.target import Target, parse_target

NS = 1_763_892_723_123_456_789  # 2025-11-23 10:12:03 UTC


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=12).filter(lambda b: 0 not in b), min_size=1))
def test_a_shell_takes_quoted_paths_back(paths: list[bytes]) -> None:
    script = "printf '%s\\0' " + " ".join(quote_path(path) for path in paths)
    done = subprocess.run(
        ["bash", "-c", script.encode()],
        capture_output=True,
        check=True,
        env={"LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"},
    )
    assert done.stdout == b"".join(path + b"\0" for path in paths)


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        (b"/srv/a.txt", "/srv/a.txt"),
        ("/srv/ü".encode(), "/srv/ü"),
        (b"a b", "'a b'"),
        (b"~x", "'~x'"),
        (b"", "''"),
        (b"a\nb", "$'a\\nb'"),
        (b"\xff", "$'\\xff'"),
        (b"\x1b[31m", "$'\\x1b[31m'"),
    ],
)
def test_quoting(path: bytes, shown: str) -> None:
    assert quote_path(path) == shown


def test_a_table_is_aligned_and_ends_without_blanks(capsys: pytest.CaptureFixture[str]) -> None:
    Output().table(("no", "name", ""), [("1", "a", ""), ("22", "long", "x")], right="r")
    assert capsys.readouterr().out == "no  name\n 1  a\n22  long  x\n"


def test_times() -> None:
    output = Output(utc=True)
    assert output.time(NS) == "2025-11-23 10:12:03"
    assert output.exact_time(NS) == "2025-11-23T10:12:03.123456789+00:00"


def test_prose_and_json_do_not_mix(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(json=True)
    output.say("prose")
    output.object({"a": b"\xff"})
    found = capsys.readouterr()
    assert found.err == "prose\n"
    assert json.loads(found.out)["a"].encode("utf-8", "surrogateescape") == b"\xff"


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Output(quiet=True).say("x")
    Output().note("x")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("home", Target("home", "latest", b"/")),
        ("home@3", Target("home", "3", b"/")),
        ("home@latest~2:/a b/c", Target("home", "latest~2", b"/a b/c")),
        ("home:/x/", Target("home", "latest", b"/x")),
        ("home@2026-11-23T10:12:03", Target("home", "2026-11-23T10:12:03", b"/")),
        ("home@2026-11-23T10:12:03:/x:/y@z", Target("home", "2026-11-23T10:12:03", b"/x:/y@z")),
        ("s3://b/p@7:/x", Target("s3://b/p", "7", b"/x")),
        ("s3://b/p#vms:/x", Target("s3://b/p#vms", "latest", b"/x")),
        ("file:///r", Target("file:///r", "latest", b"/")),
        ("file:///r@2:/", Target("file:///r", "2", b"/")),
        ("home@:/a//b", Target("home", "latest", b"/a/b")),
    ],
)
def test_names_of_backups(text: str, target: Target) -> None:
    assert parse_target(text) == target


def _numbers(progress: Progress) -> None:
    progress.phase("packing")
    progress.progress(1000, 250, 4_000_000, 1_000_000)


def test_progress_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    progress = Progress("home", Output())
    progress.progress(1200, 0, 0, 0)
    assert progress.summary() == "1,200 items found"
    _numbers(progress)
    now = 110.0
    assert progress.summary() == "1.0 MB of 4.0 MB · 250 items · 100 KB/s · 0:30 left"
    status = progress.status()
    assert (status["percent_done"], status["seconds_remaining"]) == (0.25, 30)


def test_progress_as_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "STATUS_EVERY_S", 0.01)
    with Progress("home", Output(json=True)) as progress:
        _numbers(progress)
        time.sleep(0.1)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found[-1]["message_type"] == "status"
    assert found[-1]["files_done"] == 250


def test_progress_in_a_pipe_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "LINE_EVERY_S", 0.01)
    with Progress("home", Output()) as progress:
        _numbers(progress)
        time.sleep(0.1)
    out, err = capsys.readouterr()
    assert out == ""
    assert "home: packing, 1.0 MB of 4.0 MB" in err
    assert "\x1b" not in err


def test_short_work_shows_no_progress_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("home", Output()) as progress:
        _numbers(progress)
    assert terminal.getvalue() == ""


def test_longer_work_shows_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress_module, "QUIET_S", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Progress("home", Output()) as progress:
        _numbers(progress)
        progress.note("[by the way]")
        time.sleep(0.5)
    assert "home · packing" in terminal.getvalue()
    assert "25 %" in terminal.getvalue()
    assert "[by the way]" in terminal.getvalue()


def test_json_lines_hold_no_newlines() -> None:
    assert "\n" not in to_json({"path": b"a\nb"})
