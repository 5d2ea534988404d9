"""Policy files: what they say, what they must not say, and where a complaint points."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudfs.core import human
from cloudfs.core.errors import UsageError
from cloudfs.core.policy import (
    KEYS,
    KIB,
    MIB,
    Policy,
    edit_policy,
    format_policy,
    parse_policy,
)
from cloudfs.core.toml_lines import replace_values, statements

MINIMAL = 'name = "home"\nsources = ["/srv"]\nrepository = "file:///backup"\n'

words = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1, max_size=12
)
file_names = words.filter(lambda word: "/" not in word and word not in (".", ".."))


def _is_base(word: str) -> bool:
    return "/" not in word and word not in (".", "..")


policies = st.builds(
    Policy,
    name=st.from_regex(r"[a-z][a-z0-9._-]{0,20}", fullmatch=True),
    sources=st.lists(words.filter(_is_base), min_size=1, max_size=3, unique=True).map(
        lambda names: tuple(f"/srv/{name}" for name in names)
    ),
    repository=st.sampled_from(["file:///b", "s3://bucket", "s3://b/ü x"]),
    id=st.sampled_from(["", "0123456789abcdef" * 2]),
    endpoint_url=st.sampled_from(["", "http://127.0.0.1:8333"]),
    region=st.sampled_from(["", "eu-central-1"]),
    profile=st.one_of(st.just(""), words),
    single_writer=st.booleans(),
    snapshot=st.sampled_from(["auto", "scan"]),
    external_snapshot=st.lists(words, max_size=3).map(tuple),
    external_changes=st.lists(words, max_size=3).map(tuple),
    external_release=st.lists(words, max_size=3).map(tuple),
    external_timeout_s=st.floats(1, 86400).map(lambda value: round(value, 3)),
    block_size=st.sampled_from([64 * KIB, 128 * KIB, 256 * KIB]),
    pack_size=st.integers(4 * MIB, 256 * MIB),
    pack_time_limit_s=st.floats(1, 86400).map(lambda value: round(value, 3)),
    compression=st.sampled_from(["none", "zstd:1", "zstd:3", "zstd:19"]),
    verify_packs=st.booleans(),
    verify_source=st.integers(0, 1000).map(lambda value: value / 1000),
    workers=st.integers(0, 1024),
    excludes=st.lists(words, max_size=4).map(tuple),
    exclude_caches=st.booleans(),
    exclude_if_present=st.lists(file_names, max_size=2).map(tuple),
    one_file_system=st.booleans(),
    tags=st.lists(words, max_size=2).map(tuple),
    upload_limit=st.integers(0, 1 << 40),
    download_limit=st.integers(0, 1 << 40),
)


@given(policies)
def test_what_is_written_is_read_back(policy: Policy) -> None:
    assert parse_policy(format_policy(policy), "p.toml") == policy


@given(policies, policies)
def test_an_edited_file_says_the_new_policy(old: Policy, new: Policy) -> None:
    text = "# kept\n" + format_policy(old)
    edited = edit_policy(text, new, "p.toml")
    assert parse_policy(edited, "p.toml") == new
    assert edited.startswith("# kept\n")


def test_an_edit_touches_only_its_line() -> None:
    text = MINIMAL + "# mine\nexcludes = [\n  '*.o', # objects\n]\nworkers = 3  # few\n"
    policy = parse_policy(text, "p.toml")
    edited = edit_policy(text, Policy(**{**_fields(policy), "workers": 5}), "p.toml")
    assert edited == text.replace("workers = 3  # few", "workers = 5")
    assert edit_policy(text, policy, "p.toml") == text


def _fields(policy: Policy) -> dict[str, Any]:
    return {name: getattr(policy, name) for name in policy.__struct_fields__}


def test_every_key_is_written_with_an_explanation() -> None:
    text = format_policy(parse_policy(MINIMAL, "p.toml"))
    for name, key in KEYS.items():
        assert f"# {key.comment}\n" in text
        assert f"{name} = " in text


def test_defaults() -> None:
    policy = parse_policy(MINIMAL, "p.toml")
    assert (policy.block_size, policy.pack_size) == (128 * KIB, 32 * MIB)
    assert (policy.compression, policy.level) == ("zstd:3", 3)
    assert policy.verify_packs
    assert policy.workers == 0


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('pack_sise = "1 MiB"', 'unknown key "pack_sise". Did you mean "pack_size"?'),
        ("pack-size = 1", 'unknown key "pack-size". Did you mean "pack_size"?'),
        ("zzzz = 1", 'unknown key "zzzz".'),
        ("[section]\nx = 1", 'unknown key "section".'),
        ("[ 'tags' ]\nx = 1", "bad value of tags: a list is wanted"),
        ("tags.x = 1", "bad value of tags: a list is wanted"),
        ('block_size = "100 KiB"', "bad value of block_size: a power of two from 64 KiB"),
        ('block_size = "512 KiB"', "bad value of block_size: a power of two"),
        ('pack_size = "1 GiB"', "bad value of pack_size: 4 MiB to 256 MiB"),
        ('pack_size = "much"', 'bad value of pack_size: "much" is no size'),
        ("pack_size = true", "bad value of pack_size: a string in quotes is wanted"),
        ('pack_time_limit = "0"', "bad value of pack_time_limit: 1 second to 1 day"),
        ("pack_time_limit = nan", 'bad value of pack_time_limit: "nan" is no duration'),
        ('compression = "zstd:20"', 'bad value of compression: "zstd:20" is no compression'),
        ('compression = "zstd:0"', 'bad value of compression: "zstd:0" is no compression'),
        ("workers = -1", "bad value of workers: a number from 0"),
        ("workers = true", "bad value of workers: a number from 0"),
        ("verify_packs = 1", "bad value of verify_packs: true or false is wanted"),
        ('verify_source = "101%"', 'bad value of verify_source: "101%" is no share'),
        ("verify_source = true", "bad value of verify_source: a string in quotes is wanted"),
        ('excludes = "*.o"', "bad value of excludes: a list is wanted"),
        ("excludes = [1]", "bad value of excludes: a string in quotes is wanted"),
        ('snapshot = "life"', '"life" is no way to find changes; write "auto", "scan", "btrfs"'),
        ('when_full = "fail"', '"fail" is neither "wait" nor "inconsistent"'),
        ('sync_on = "noon"', '"noon" is neither "batch", "write" nor a time'),
        ('exclude_if_present = ["a/b"]', '"a/b" is no name of a file in a directory'),
        ('sync_on = "0 s"', "a second or more is wanted"),
        ('snapshot = "external"', '"external" needs external_snapshot as well'),
        ('external_changes = "a \'b"', "it is no command (no closing quotation)"),
        ('external_release = [""]', "the name of its program is empty"),
        ('snapshot = "magic"', '"magic" is no way to find changes'),
        ('id = "abc"', '"abc" is no id'),
        ('region = "a\\u0000"', "bad value of region: it holds a NUL"),
        ("x = ", "this is not TOML (Invalid value)"),
        ('tags = ["a', "this is not TOML"),
        ('name = "again"', "this is not TOML (Cannot overwrite a value)"),
    ],
)
def test_a_complaint_names_file_and_line(line: str, complaint: str) -> None:
    text = MINIMAL + "# [x]\nendpoint_url = '''\nfalse = 1\n'''\n\n" + line + "\n"
    with pytest.raises(UsageError) as caught:
        parse_policy(text, "/etc/cloudfs/home.toml")
    assert str(caught.value).startswith("/etc/cloudfs/home.toml, line 9: ")
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "p, line 1: name is missing."),
        ('name = "a b"', 'p, line 1: bad value of name: "a b" cannot be a name'),
        ('name = "x"\nsources = []', "p, line 2: bad value of sources: at least one directory"),
        ('name = "x"\nsources = ["srv"]', '"srv" is not an absolute path'),
        ('sources = ["/a/x", "/b/x/"]', 'two of the directories are called "x"'),
        ('repository = "ftp://x"', '"ftp://x" is no repository'),
        ('repository = "file://host/x"', '"file://host/x" is no repository'),
        ("name = [\n\n", "p, line 1: this is not TOML"),
    ],
)
def test_what_is_missing_or_wrong(text: str, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_policy(text, "p")
    assert complaint in str(caught.value)


def test_lines_of_a_file_with_dos_line_ends() -> None:
    with pytest.raises(UsageError, match=r"^p, line 5: unknown key"):
        parse_policy((MINIMAL + "\nbogus = 1\n").replace("\n", "\r\n"), "p")


toml_values = st.one_of(
    st.sampled_from(
        [
            '"""a\nb = 1\n[c]"""',
            "'''\nd = 1\n'''",
            '"#"',
            "[1,\n # e = 1 ]\n 2 ]",
            '[["""\n]"""], [3]]',
            "{ f = 1 }",
            '"\\"" # g = "',
            '"""x"""""',
            "1979-05-27T07:32:00",
        ]
    ),
    words.map(lambda word: '"' + "".join(f"\\U{ord(c):08X}" for c in word) + '"'),
)
toml_keys = st.from_regex(r"[a-z]{1,6}", fullmatch=True)


@given(st.dictionaries(toml_keys, st.tuples(toml_values, st.integers(0, 2)), max_size=8))
def test_statements_are_found_where_they_stand(values: dict[str, tuple[str, int]]) -> None:
    text, expected = "", {}
    for key, (value, blanks) in values.items():
        text += "\n" * blanks
        expected[key] = text.count("\n") + 1
        text += f"{key} = {value}\n"
    tomllib.loads(text)  # or this test is wrong
    found = statements(text)
    assert {s.key: s.line for s in found} == expected
    assert "\n".join(text[s.start : s.end] for s in found) == "\n".join(
        f"{key} = {value}" for key, (value, _) in values.items()
    )


def test_replacing_and_adding_and_removing_values() -> None:
    text = "a = 1 # x\n# b = 2\nc = [\n 3,\n]\n[t]\n"
    changes = {"a": "10", "b": "20", "c": None}
    assert replace_values(text, changes) == "a = 10\nb = 20\n[t]\n"
    assert replace_values("a = 1", {"d": "4"}) == "a = 1\nd = 4\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64k", 64 * KIB),
        ("64 KiB", 64 * KIB),
        ("32 MiB", 32 * MIB),
        ("1.5 GB", 1_500_000_000),
        ("10 mb", 10_000_000),
        ("7 B", 7),
    ],
)
def test_sizes_are_read(text: str, value: int) -> None:
    assert human.parse_size(text) == value


@pytest.mark.parametrize("text", ["", "x", "-1", "1 XB", "1e3", "1 2", "MiB", "99999 EiB", "٣"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no size|larger than"):
        human.parse_size(text)


@given(st.integers(0, (1 << 63) - 1))
def test_exact_sizes_are_exact(value: int) -> None:
    assert human.parse_size(human.exact_size(value)) == value


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KB"),
        (9_949, "9.9 KB"),
        (9_950, "10 KB"),
        (84_321, "84 KB"),
        (999_499, "999 KB"),
        (999_500, "1.0 MB"),
        (1_300_000_000, "1.3 GB"),
    ],
)
def test_sizes_are_shown_with_two_or_three_figures(value: int, shown: str) -> None:
    assert human.size(value) == shown


@pytest.mark.parametrize(
    ("text", "value"),
    [("90", 90), ("15m", 900), ("1h30m", 5400), ("2 min 5 s", 125), ("1d", 86400), ("0.5s", 0.5)],
)
def test_durations_are_read(text: str, value: float) -> None:
    assert human.parse_duration(text) == value


@pytest.mark.parametrize("text", ["", "m", "15x", "-1s", "1h x", "1 2"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration"):
        human.parse_duration(text)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.3, "0.3 s"),
        (14, "14 s"),
        (59.6, "1 min"),
        (250, "4 min 10 s"),
        (7500, "2 h 5 min"),
        (300_000, "3 days"),
    ],
)
def test_durations_are_shown(value: float, shown: str) -> None:
    assert human.duration(value) == shown
    assert human.clock(3723) == "1:02:03"
    assert human.clock(0.2) == "0:01"
