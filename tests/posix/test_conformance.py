"""The live mount answers as the file system beneath does."""

from __future__ import annotations

import shutil

import pytest

from tests.posix import cases
from tests.posix.case import CASES, run_case
from tests.posix.exceptions import EXCEPTIONS, keys_of
from tests.posix.mounts import Pair

assert cases.MODULES


@pytest.mark.parametrize("name", sorted(CASES))
def test_case(name: str, pair: Pair) -> None:
    bare, live = (run_case(CASES[name], place / name) for place in (pair.bare, pair.live))
    for place in (pair.bare, pair.live):
        shutil.rmtree(place / name)
    assert bare, "a case that tells nothing shows nothing"
    differing = {key for key in bare | live if bare.get(key) != live.get(key)}
    words = [f"{key}: {bare.get(key)!r} beneath, {live.get(key)!r} live" for key in differing]
    assert differing == keys_of(name, pair.kind), "\n".join(words)


def test_exceptions_are_of_cases_and_say_why() -> None:
    assert {excepted.case for excepted in EXCEPTIONS} <= set(CASES)
    assert all(excepted.why for excepted in EXCEPTIONS)
