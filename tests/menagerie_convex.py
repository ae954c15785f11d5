"""Small convex programs and pair losses of every kind; add one here and it inherits the contract tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coala.convex import GatedProgram, Logistic, PairLoss, PairProgram, Pointwise, Program, sample_patterns
from coala.convex.papers.losses import TwoScores
from coala.convex.program import largest_sparsity
from coala.values import FeatureSet, FeatureSpec

SPEC = FeatureSpec("tiny", "", "w", "dialogue:0", -1, "mean", False, 64)


@dataclass(frozen=True)
class Instance:
    """A random program: n rows (or pairs), d features, P patterns, sparsity relative to the largest useful."""

    n: int
    d: int
    P: int
    relative: float
    seed: int

    def __str__(self) -> str:
        return f"n{self.n}-d{self.d}-P{self.P}-beta{self.relative}-seed{self.seed}"

    def data(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(self.seed)
        X = rng.standard_normal((self.n, self.d)) @ (np.eye(self.d) + 0.5 * rng.standard_normal((self.d, self.d)))
        X = np.concatenate([X / np.linalg.norm(X, axis=1).mean(), np.full((self.n, 1), 0.3)], axis=1)
        y = np.where(np.abs(X @ rng.standard_normal(self.d + 1)) > 0.4, 1.0, -1.0)
        patterns, gates = sample_patterns(X, self.P, jax.random.key(self.seed))
        # Duplicates were dropped; closed patterns restore the width, so that instances share a compiled shape.
        missing = self.P - patterns.shape[1]
        return X, y, np.pad(patterns, ((0, 0), (0, missing))), np.pad(gates, ((0, 0), (0, missing)))

    def cone(self, dtype: Any = np.float64) -> Program:
        X, y, patterns, _ = self.data()
        program = Program(jnp.asarray(X, dtype), jnp.asarray(y, dtype), jnp.asarray(patterns), jnp.asarray(1.0, dtype))
        level = self.relative * float(largest_sparsity(program))
        return Program(program.X, program.y, program.patterns, jnp.asarray(level, dtype))

    def gated(self, dtype: Any = np.float64) -> GatedProgram:
        return self.cone(dtype).relaxation


THIN_KINDS = (
    "plain",
    "rank deficient",
    "duplicate rows",
    "nearly duplicate rows",
    "large constant",
    "one gate",
    "fewer rows than columns",
    "tiny sparsity",
    "large features",
    "small features",
    "large labels",
    "weighted rows",
    "unequal columns",
)


def thin(kind: str, seed: int, n: int, d: int, P: int, relative: float, pad: tuple[int, int, int]) -> Program:
    """Rows of unit norm with decaying columns and a constant one: gates whose cones are thin. In float64.

    (n, d + 1, P), filled up to ``pad`` with rows and columns of zeros and closed patterns, which change no solution.
    """
    rng = np.random.default_rng(seed)
    n = min(n, d // 2) if kind == "fewer rows than columns" else n
    X = rng.standard_normal((n, d)) / np.sqrt(np.arange(1, d + 1))
    if kind == "rank deficient":
        X[:, d // 2 :] = X[:, : d - d // 2]
    elif "duplicate" in kind:
        noise = 1e-4 if kind.startswith("nearly") else 0.0
        X[n // 2 : 2 * (n // 2)] = X[: n // 2] + noise * rng.standard_normal((n // 2, d))
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    X = np.concatenate([X, np.full((n, 1), 10.0 if kind == "large constant" else 0.3)], axis=1)
    if kind == "weighted rows":
        X *= 10 ** rng.uniform(-0.5, 0.5, (n, 1))
    elif kind == "unequal columns":
        X *= 10 ** rng.uniform(-2, 2, d + 1)
    a, b = rng.standard_normal((2, d + 1))
    y = np.where(np.abs(X @ a) - np.abs(X @ b) + 0.3 * rng.standard_normal(n) > 0, 1.0, -1.0)
    X *= {"large features": 1e6, "small features": 1e-6}.get(kind, 1.0)
    y *= 1e6 if kind == "large labels" else 1.0
    patterns, _ = sample_patterns(X, 1 if kind == "one gate" else P, jax.random.key(seed))
    missing = [(0, full - here) for full, here in zip(pad, (n, d + 1, patterns.shape[1]), strict=True)]
    program = Program(
        jnp.asarray(np.pad(X, missing[:2])),
        jnp.asarray(np.pad(y, missing[0])),
        jnp.asarray(np.pad(patterns, (missing[0], missing[2]))),
        jnp.asarray(1.0),
    )
    relative = 1e-4 if kind == "tiny sparsity" else relative
    return replace(program, sparsity=relative * largest_sparsity(program))


@dataclass(frozen=True)
class PairInstance:
    """A random pairwise program with m gates; ``margins`` gives each pair its own."""

    n: int
    d: int
    m: int
    sparsity: float
    ridge: float
    seed: int
    margins: bool = False

    def __str__(self) -> str:
        return f"n{self.n}-d{self.d}-m{self.m}-beta{self.sparsity}-tau{self.ridge}-seed{self.seed}"

    def data(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(self.seed)
        rows = rng.standard_normal((2, self.n, self.d)) / np.sqrt(self.d)
        direction = rng.standard_normal(self.d)
        reward = 4 * np.abs(rows @ direction) + 2 * rows @ rng.standard_normal(self.d)
        rows = np.where((reward[0] < reward[1])[:, None], rows[::-1], rows)
        margin = rng.standard_normal(self.n) / 2 if self.margins else np.zeros(self.n)
        weight = rng.random(self.n)
        return rows, rng.standard_normal((self.d, self.m)), margin, weight / weight.sum(), direction

    def program(self, dtype: Any = np.float64) -> PairProgram:
        rows, gates, margin, weight, _ = self.data()
        patterns = np.concatenate([np.ones((2, self.n, 1), bool), rows @ gates >= 0], axis=-1)
        numbers = (jnp.asarray(a, dtype) for a in (margin, weight, self.sparsity, self.ridge))
        return PairProgram(jnp.asarray(rows, dtype), jnp.asarray(patterns), *numbers)


GATED = [
    Instance(n, d, P, relative, seed)
    for seed, (n, d, P) in enumerate([(40, 6, 5), (40, 6, 5), (40, 6, 5), (40, 6, 5), (12, 15, 4)])
    for relative in (0.5, 0.1, 0.01, 0.001)
]
PAIRWISE = [
    PairInstance(30, 4, 5, 0.02, 1e-1, 0),
    PairInstance(30, 4, 5, 0.005, 1e-2, 1),
    PairInstance(30, 4, 5, 0.01, 1e-3, 2),
    PairInstance(30, 4, 5, 0.002, 1e-2, 3, margins=True),
    PairInstance(30, 4, 5, 0.02, 1.0, 4),
    PairInstance(30, 4, 5, 0.05, 1e-2, 5, margins=True),
    PairInstance(30, 4, 5, 0.001, 1e-3, 6),
    PairInstance(8, 12, 3, 0.01, 1e-2, 7),
    PairInstance(30, 4, 0, 1.0, 1e-2, 8, margins=True),
]
LOSSES: list[PairLoss] = [
    Logistic(),
    Logistic(2.0, 0.5),
    Logistic.with_reference(0.7, 0.5),
    Pointwise(),
    Pointwise(0.5, 1.0),
]
NON_CONVEX_LOSSES: list[PairLoss] = [TwoScores(), TwoScores(2.0, 0.5)]

Reward = Callable[[np.ndarray], np.ndarray]


def pairs_of(
    reward: Reward, n: int, d: int, rng: np.random.Generator, *, per_group: int = 1, shift: float = 0.0
) -> FeatureSet:
    """n pairs of Gaussian features, preferred with Bradley-Terry probability under ``reward``."""
    first, second = rng.standard_normal((2, n, d))
    better = rng.random(n) < 1 / (1 + np.exp(-(reward(first) - reward(second))))
    chosen = np.where(better[:, None], first, second) + shift
    rejected = np.where(better[:, None], second, first) + shift
    return FeatureSet(chosen, rejected, np.array([f"g{i // per_group}" for i in range(n)]), SPEC)


def absolute_reward(d: int, rng: np.random.Generator) -> Reward:
    """4 |a.x| + 2 b.x with unit a, b: what a linear head cannot see."""
    a, b = (v / np.linalg.norm(v) for v in rng.standard_normal((2, d)))
    return lambda x: 4 * np.abs(x @ a) + 2 * x @ b


def others_by_night(instances: list[Any]) -> list[Any]:
    """Every second instance as it is, the others for the nightly run."""
    return [one if i % 2 == 0 else pytest.param(one, marks=pytest.mark.nightly) for i, one in enumerate(instances)]
