"""The live mount answers as the file system beneath does."""

from __future__ import annotations

import shutil

import pytest

from tests.posix import cases
from tests.posix.case import CASES, run_case
from tests.posix.exceptions import EXCEPTIONS, ONLY_ON
from tests.posix.mounts import Pair

assert cases.MODULES


@pytest.mark.parametrize("name", sorted(CASES))
def test_case(name: str, pair: Pair) -> None:
    bare, live = (run_case(CASES[name], place / name) for place in (pair.bare, pair.live))
    for place in (pair.bare, pair.live):
        shutil.rmtree(place / name)
    assert bare, "a case that tells nothing shows nothing"
    differing = {key for key in bare | live if bare.get(key) != live.get(key)}
    excepted = {
        key
        for of, key in EXCEPTIONS
        if of == name and ONLY_ON.get((of, key), pair.kind) == pair.kind
    }
    words = [f"{key}: {bare.get(key)!r} beneath, {live.get(key)!r} live" for key in differing]
    assert differing == excepted, "\n".join(words)


def test_exceptions_are_of_cases() -> None:
    assert {name for name, _ in EXCEPTIONS} <= set(CASES)
    assert set(ONLY_ON) <= set(EXCEPTIONS)
