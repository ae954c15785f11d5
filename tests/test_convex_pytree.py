"""Compiled functions tell the classes of their arguments apart."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from coala.convex.papers.losses import Logistic, Pointwise, TwoScores
from coala.convex.pytree import pytree


@pytree("name")
@dataclass(frozen=True)
class One:
    value: Any
    name: str = "a"


@pytree("name")
@dataclass(frozen=True)
class Other:
    value: Any
    name: str = "a"


@pytest.mark.parametrize(
    ("first", "second"),
    [*combinations([Logistic(), Pointwise(), TwoScores()], 2), (One(1.0), Other(1.0)), (One(1.0), One(1.0, "b"))],
    ids=str,
)
def test_structures_of_two_classes_are_two(first: Any, second: Any) -> None:
    assert jax.tree.structure(first) != jax.tree.structure(second)
    assert jax.tree.structure(first) == jax.tree.structure(jax.tree.map(lambda leaf: leaf + 1.0, first))


def test_a_class_goes_through_a_compiled_function() -> None:
    doubled = jax.jit(lambda it: jax.tree.map(lambda leaf: 2 * leaf, it))(One(jnp.ones(3), "kept"))
    assert isinstance(doubled, One)
    assert doubled.name == "kept"
    assert doubled.value.tolist() == [2.0, 2.0, 2.0]
    leaf = jax.tree_util.tree_leaves_with_path(One(1.0))[0]
    assert jax.tree_util.keystr(leaf[0]) == ".value"
