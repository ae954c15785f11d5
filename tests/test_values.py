"""Values: what they refuse, and the score against a naive loop."""

from __future__ import annotations

import numpy as np
import pytest

from coala.values import CoalaError, ConvexHead, FeatureSet, FeatureSpec, SpecMismatch, Turn

SPEC = FeatureSpec("model", "", "weights", "chat:0", 3, "mean", False, 64)


def random_head(m: int, d: int, seed: int = 0) -> ConvexHead:
    draw = np.random.default_rng(seed)
    return ConvexHead(draw.normal(size=(m, d + 1)), draw.normal(size=(m, d + 1)), draw.normal(size=d + 1), SPEC)


@pytest.mark.parametrize("m", [0, 1, 5])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)])
def test_score_is_the_formula(m: int, shape: tuple[int, ...]) -> None:
    head = random_head(m, 7)
    h = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    expected = np.empty(shape[:-1])
    for index in np.ndindex(*shape[:-1]):
        x = np.append(h[index], 1.0)
        expected[index] = head.linear @ x + sum(
            w @ x for g, w in zip(head.gates, head.weights, strict=True) if g @ x >= 0
        )
    np.testing.assert_allclose(head.score(h), expected, rtol=1e-5, atol=1e-5)


def test_a_relu_neuron_is_a_head() -> None:
    draw = np.random.default_rng(2)
    first, second = draw.normal(size=(4, 8)), draw.normal(size=4)
    head = ConvexHead(first, second[:, None] * first, np.zeros(8), SPEC)
    h = draw.normal(size=(10, 7)).astype(np.float32)
    network = np.maximum(np.c_[h, np.ones(10)] @ first.T, 0) @ second
    np.testing.assert_allclose(head.score(h), network, rtol=1e-4, atol=1e-5)


def test_wrong_width_is_refused() -> None:
    with pytest.raises(SpecMismatch, match="length 7; these have 6"):
        random_head(2, 7).score(np.zeros((3, 6), np.float32))


def test_values_refuse_what_does_not_fit() -> None:
    with pytest.raises(CoalaError, match="role 'tutor'"):
        Turn("tutor", "hello")  # type: ignore[arg-type]
    with pytest.raises(CoalaError, match=r"\(2, 3\) and \(2, 4\)"):
        FeatureSet(np.zeros((2, 3)), np.zeros((2, 4)), np.array(["a", "b"]), SPEC)
    with pytest.raises(CoalaError, match="not finite"):
        ConvexHead(np.zeros((0, 3)), np.zeros((0, 3)), np.array([1.0, np.nan, 0.0]), SPEC)
    with pytest.raises(CoalaError, match="2 pairs need as many group names"):
        FeatureSet(np.zeros((2, 3)), np.zeros((2, 3)), np.array(["a"]), SPEC)
