"""Splitting: whole groups, both sides, whatever the order."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coala.data import DataError, split
from coala.values import Pair, user

groups = st.lists(st.sampled_from("abcdefghijkl"), min_size=2, max_size=60).filter(lambda names: len(set(names)) > 1)
fractions = st.floats(0.01, 0.99)
seeds = st.integers(0, 2**32)


def pairs_of(names: list[str]) -> list[Pair]:
    return [Pair(user("p"), f"a{k}", f"b{k}", name) for k, name in enumerate(names)]


@given(names=groups, fraction=fractions, seed=seeds)
def test_laws(names: list[str], fraction: float, seed: int) -> None:
    pairs = pairs_of(names)
    train, held_out = split(pairs, fraction, seed=seed)
    assert train
    assert held_out
    assert not {p.group for p in train} & {p.group for p in held_out}
    assert sorted(train + held_out, key=pairs.index) == pairs
    assert train == [p for p in pairs if p in train]

    shuffled = random.Random(seed).sample(pairs, len(pairs))
    again = split(shuffled, fraction, seed=seed)
    assert [set(side) for side in again] == [set(train), set(held_out)]


@given(names=groups, fraction=fractions, seed=seeds)
def test_as_near_to_the_fraction_as_one_group_allows(names: list[str], fraction: float, seed: int) -> None:
    _, held_out = split(pairs_of(names), fraction, seed=seed)
    assert abs(len(held_out) - fraction * len(names)) <= max(names.count(name) for name in names)


def test_many_small_groups_meet_the_fraction() -> None:
    pairs = pairs_of([f"g{k // 2}" for k in range(2000)])
    assert len(split(pairs, 0.1, seed=0)[1]) == 200
    assert len(split(pairs, seed=0)[1]) == 200


def test_the_seed_decides() -> None:
    pairs = pairs_of([f"g{k}" for k in range(100)])
    assert split(pairs, seed=0) == split(iter(pairs), seed=0)
    assert split(pairs, seed=0)[1] != split(pairs, seed=1)[1]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, 2.0, float("nan")])
def test_a_fraction_that_leaves_a_side_empty(fraction: float) -> None:
    with pytest.raises(
        DataError, match=f"eval_fraction is {fraction}, expected more than 0 and less than 1. Fix: give"
    ):
        split(pairs_of(["a", "b"]), fraction, seed=0)


@pytest.mark.parametrize(("names", "found"), [([], "0 pairs in 0 groups"), (["a"] * 3, "3 pairs in 1 group,")])
def test_one_group_cannot_be_split(names: list[str], found: str) -> None:
    with pytest.raises(DataError, match=f"{found}.*separate evaluation file"):
        split(pairs_of(names), seed=0)
