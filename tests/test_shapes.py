"""Arrays are what their annotations state, and tests notice where they are not."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coala.convex
import coala.nash
from coala.convex import GatedProgram, PairProgram, least_slope, recover_network, sample_patterns
from coala.nash import duality_gap, kl_divergence

from .shapes import ShapeError, annotations

N, D, P = 6, 3, 2
RNG = np.random.default_rng(0)
X, Y, OPEN = RNG.standard_normal((N, D)), np.ones(N), RNG.random((N, P)) < 0.5


def gated() -> GatedProgram:
    return GatedProgram(jnp.asarray(X, jnp.float32), jnp.ones(N), jnp.asarray(OPEN), jnp.ones(()))


WRONG: dict[str, Callable[[], Any]] = {
    "rows": lambda: replace(gated(), X=gated().X.T),
    "patterns of another type": lambda: replace(gated(), patterns=jnp.asarray(OPEN, jnp.float32)),
    "weights": lambda: gated().predict(jnp.ones((P, D))),
    "weights, traced": lambda: jax.eval_shape(lambda u: gated().objective(u), jnp.ones((P, D))),
    "rows of one side": lambda: PairProgram(gated().X, gated().patterns, *[jnp.ones(N)] * 2, *[jnp.ones(())] * 2),
    "both cones": lambda: recover_network(np.ones((D, P))),
    "gates": lambda: sample_patterns(X[0], P, jax.random.key(0)),
    "margins": lambda: least_slope(np.ones(N), np.arange(N - 1)),
    "strategy": lambda: duality_gap(np.full((3, 3), 0.5), np.full(2, 0.5)),
    "logarithms": lambda: kl_divergence(np.full(3, 1 / 3), np.zeros((1, 3))),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_another_shape_is_refused(call: Callable[[], Any]) -> None:
    with pytest.raises(ShapeError, match=r"coala\.(convex|nash)\..* is .*, expected "):
        call()


def test_the_right_shapes_pass() -> None:
    program = gated()
    assert program.predict(program.zeros()).shape == (N,)
    assert duality_gap(np.full((3, 3), 0.5), np.full(3, 1 / 3)) == 0


def test_ranks_and_types_do_not_mix_by_accident() -> None:
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones(3) + jnp.ones((2, 3))
    with pytest.raises(ValueError, match="strict"):
        jnp.ones(3) * jnp.arange(3)


def modules() -> Iterator[ModuleType]:
    for package in (coala.convex, coala.nash):
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            yield importlib.import_module(found.name)


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.__name__)
def test_every_array_says_what_its_axes_are(module: ModuleType) -> None:
    """And every annotation can be resolved: what cannot is not checked."""
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    for value in [*vars(module).values(), *(value for kind in classes for value in vars(kind).values())]:
        function = inspect.unwrap(getattr(value, "fget", None) or getattr(value, "func", None) or value)
        if inspect.isfunction(function) and function.__module__ == module.__name__:
            annotations(function)
    assert "jax.Array" not in Path(module.__file__ or "").read_text(), "an array without axes: Float[Array, 'n d']"
