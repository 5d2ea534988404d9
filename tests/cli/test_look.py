"""ls, find, cat, diff and tables, through the program, on two snapshots of one tree."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import PROGRAM, Machine


@pytest.fixture
def two(home: Machine, tree: Path) -> Machine:
    """A machine with two snapshots, between which every kind of change lies."""
    (tree / "old" / "deep").mkdir(parents=True)
    (tree / "old" / "deep" / "file").write_text("gone soon")
    (tree / "old" / "leaves").write_text("moves out of a directory that is removed")
    (tree / "mode").write_text("same content")
    (tree / "turns").write_text("file, then directory")
    (tree / "moves").write_text("moved")
    (tree / "big").write_bytes(os.urandom(300_000))
    home.run("sync", "home")
    with (tree / "big").open("r+b") as file:
        file.seek(200_000)
        file.write(b"changed")
    (tree / "mode").chmod(0o600)
    (tree / "turns").unlink()
    (tree / "turns").mkdir()
    (tree / "moves").rename(tree / "docs" / "moved")
    (tree / "old" / "leaves").rename(tree / "stays")
    shutil.rmtree(tree / "old")
    (tree / "new\nline").write_text("new")
    (tree / os.fsdecode(b"\xff")).write_text("no UTF-8")
    home.run("sync", "home")
    return home


def test_ls_shows_what_was_there(two: Machine, tree: Path) -> None:
    now = two.run("ls", "home").out.splitlines()
    assert len(now) == len(os.listdir(tree))
    assert "$'new\\nline'" in now
    assert "$'\\xff'" in now
    assert "old" in two.run("ls", "home@1").out.splitlines()
    assert "old" not in now
    assert two.run("ls", "-R", "home@1:/old").out.splitlines() == [
        "/old/deep",
        "/old/deep/file",
        "/old/leaves",
    ]


def test_ls_long_and_json_agree_with_the_tree(two: Machine, tree: Path) -> None:
    for node in two.run("ls", "-R", "--json", "home").objects:
        status = os.lstat(str(tree) + node["path"])
        assert node["mode"] == status.st_mode
        assert node["size"] == status.st_size
        assert node["uid"] == status.st_uid
    line = next(x for x in two.run("ls", "-l", "home").out.splitlines() if "link" in x)
    assert line.startswith("lrwxrwxrwx")
    assert line.endswith("link -> docs/plan.txt")


def test_find_by_pattern_type_and_size(two: Machine) -> None:
    assert two.run("find", "home", "*.txt").out.splitlines() == ["/docs/plan.txt"]
    assert two.run("find", "home", "/docs/mov*").out.splitlines() == ["/docs/moved"]
    assert two.run("find", "home", "--type", "l").out.splitlines() == ["/link"]
    assert two.run("find", "home", "--larger", "100k").out.splitlines() == ["/big"]
    every = two.run("find", "--all", "home", "turns").out.splitlines()
    assert [line.split() for line in every] == [["1", "/turns"], ["2", "/turns"]]
    assert two.run("find", "home", "nothing-like-this", code=1).out == ""


def test_cat_gives_the_very_bytes(two: Machine, tree: Path) -> None:
    done = subprocess.run(
        [PROGRAM, "cat", "home:/big", "home:/docs/moved"],
        env=two.environment,
        capture_output=True,
        check=True,
    )
    assert done.stdout == (tree / "big").read_bytes() + b"moved"
    assert two.run("cat", "home@1:/old/deep/file").out == "gone soon"


def test_cat_of_what_has_no_content_is_refused(two: Machine) -> None:
    assert "no regular file" in two.fails(2, "cat", "home:/docs")
    assert "there is no /nope" in two.fails(2, "cat", "home:/nope")


def test_diff_tells_each_kind_of_change(two: Machine) -> None:
    lines = two.run("diff", "home@1").out.splitlines()
    found = {line[3:]: line[0] for line in lines[:-1]}
    assert found["/big"] == "M"
    assert found["/mode"] == "m"
    assert found["/turns/"] == "T"
    assert found["/moves → /docs/moved"] == "R"
    assert found["/old/leaves → /stays"] == "R"
    assert found["/old/"] == found["/old/deep/"] == found["/old/deep/file"] == "-"
    assert found["$'/new\\nline'"] == "+"
    assert "/docs/plan.txt" not in found
    assert "/old/leaves" not in found


def test_diff_backwards_is_the_opposite(two: Machine) -> None:
    lines = two.run("diff", "home@2", "1").out.splitlines()
    found = {line[3:]: line[0] for line in lines[:-1]}
    assert found["/old/deep/file"] == "+"
    assert found["$'/new\\nline'"] == "-"
    assert found["/docs/moved → /moves"] == "R"


def test_diff_json_counts_what_it_lists(two: Machine) -> None:
    *changes, statistics = two.run("diff", "home@1", "home@2", "--json").objects
    assert sum(statistics["counts"].values()) == len(changes)
    assert {change["message_type"] for change in changes} == {"change"}
    only = two.run("diff", "home@1:/docs", "--json").objects[:-1]
    assert {change["path"] for change in only} == {"/docs", "/docs/moved"}


def test_diff_of_equal_snapshots_is_empty(two: Machine) -> None:
    assert "no differences" in two.run("diff", "home@2", "2").out


def test_tables_metadata_has_a_row_for_each_version(two: Machine) -> None:
    rows = two.run("tables", "metadata", "home", "--json").objects
    versions = [(row["snapshot"], row["type"]) for row in rows if row["path"] == "/mode"]
    assert versions == [(1, 1), (2, 1)]
    gone = [row for row in rows if row["type"] in (4, 5)]
    assert {row["path"] for row in gone} == {"/old", "/old/deep", "/old/deep/file", "/turns"}
    in_force = two.run("tables", "metadata", "home", "--json", "--snapshot", "1").objects
    assert {row["snapshot"] for row in in_force} == {1}


def test_tables_blocks_share_what_did_not_change(two: Machine) -> None:
    rows = two.run("tables", "blocks", "home", "--json").objects
    big = [row["blocks"] for row in rows if len(row["blocks"]) == 3]
    assert len(big) == 2
    same = [old == new for old, new in zip(*big, strict=True)]
    assert same == [True, False, True]


def test_tables_as_text_have_titles_and_limits(two: Machine) -> None:
    lines = two.run("tables", "metadata", "home", "--limit", "3").out.splitlines()
    assert lines[0].split()[:4] == ["policy", "lin", "path", "snapshot"]
    assert len(lines) == 4
    for table in ("entries", "packs", "blocks"):
        assert len(two.run("tables", table, "home").out.splitlines()) > 1


def test_a_reader_that_goes_away_is_no_error(two: Machine) -> None:
    with two.start("ls", "-R", "home") as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait() in (0, 1)
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
