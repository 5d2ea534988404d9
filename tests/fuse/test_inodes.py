"""Inode numbers say what they stand for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudfs.core.errors import UsageError
from cloudfs.fuse import inodes
from cloudfs.fuse.inodes import Kind


@given(st.integers(1, inodes.MAX_SLOT), st.integers(1, inodes.MAX_LIN))
def test_a_lin_and_its_slot_come_back(slot: int, lin: int) -> None:
    ino = inodes.lin_ino(slot, lin)
    assert ino < 2**64
    assert inodes.split(ino) == (slot, lin)


@given(
    st.integers(1, inodes.MAX_POLICY),
    st.sampled_from(Kind),
    st.integers(0, inodes.MAX_SNAPSHOT),
)
def test_what_is_made_up_comes_back_and_lies_in_slot_0(
    policy: int, kind: Kind, snapshot: int
) -> None:
    ino = inodes.made_up(policy, kind, snapshot)
    assert inodes.split(ino) == (0, ino)
    assert inodes.split_made_up(ino) == (policy, kind, snapshot)
    assert ino != inodes.ROOT_INO


@pytest.mark.parametrize("lin", [0, -1, 1 << 40])
def test_a_lin_that_does_not_fit_is_refused(lin: int) -> None:
    with pytest.raises(UsageError):
        inodes.lin_ino(1, lin)
