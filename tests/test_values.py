"""Values: what they refuse, and the score against a naive loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from coala.values import Certificate, CoalaError, ConvexHead, FeatureSet, FeatureSpec, SpecMismatch, Turn

SPEC = FeatureSpec("model", "", "weights", "chat:0", 3, "mean", False, 64)


def random_head(m: int, d: int, seed: int = 0, **more: Any) -> ConvexHead:
    draw = np.random.default_rng(seed)
    return ConvexHead(draw.normal(size=(m, d + 1)), draw.normal(size=(m, d + 1)), draw.normal(size=d + 1), SPEC, **more)


def random_features(n: int, d: int) -> FeatureSet:
    draw = np.random.default_rng(3)
    chosen, rejected, prompt = draw.normal(size=(3, n, d))
    return FeatureSet(chosen, rejected, np.arange(n).astype(str), SPEC, prompt=prompt, log_ratio=draw.normal(size=n))


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


@pytest.mark.parametrize("m", [0, 1, 5])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)])
def test_gates_on_the_prompt_open_by_the_prompt(m: int, shape: tuple[int, ...]) -> None:
    head = random_head(m, 7, gate_on="prompt")
    assert head.needs_prompt == (m > 0)
    h, prompt = np.random.default_rng(1).normal(size=(2, *shape)).astype(np.float32)
    expected = np.empty(shape[:-1])
    for index in np.ndindex(*shape[:-1]):
        x, z = np.append(h[index], 1.0), np.append(prompt[index], 1.0)
        expected[index] = head.linear @ x + sum(
            w @ x for g, w in zip(head.gates, head.weights, strict=True) if g @ z >= 0
        )
    np.testing.assert_allclose(head.score(h, prompt), expected, rtol=1e-5, atol=1e-5)
    own = head.given(prompt.reshape(-1, 7)[0])
    assert own.n_neurons == 0
    np.testing.assert_allclose(own.score(h.reshape(-1, 7)[0]), expected.reshape(-1)[0], rtol=1e-5, atol=1e-5)
    if m:
        with pytest.raises(SpecMismatch, match="--prompt-features"):
            head.score(h)


def test_a_head_with_gates_on_replies_is_the_same_for_every_prompt() -> None:
    head = random_head(3, 4)
    assert not head.needs_prompt
    assert head.given(np.ones(4)) is head


@pytest.mark.parametrize("gate_on", ["reply", "prompt"])
def test_margins_and_preferences(gate_on: Any) -> None:
    features = random_features(9, 4)
    head = random_head(3, 4, gate_on=gate_on, temperature=2.0)
    margins = head.margins(features)
    assert features.prompt is not None
    scores = [head.score(h, features.prompt) for h in (features.chosen, features.rejected)]
    np.testing.assert_allclose(margins, scores[0] - scores[1], rtol=1e-5, atol=1e-6)
    preferred = head.preference(features.chosen, features.rejected, features.prompt)
    np.testing.assert_allclose(preferred, 1 / (1 + np.exp(-margins / 2.0)), rtol=1e-4)
    turned = head.preference(features.rejected, features.chosen, features.prompt)
    np.testing.assert_allclose(preferred + turned, 1, rtol=1e-5)


def test_rows_are_taken_of_every_array() -> None:
    features = random_features(5, 3)
    some = features.take(np.array([3, 1]))
    for name in ("chosen", "rejected", "group", "prompt", "log_ratio"):
        np.testing.assert_array_equal(getattr(some, name), getattr(features, name)[[3, 1]])


def test_a_certificate_knows_its_gap() -> None:
    found = Certificate("a program", "so", 0.5, 0.499, 0.0, 2, "converged", 1e-2, "float64", 0, {})
    assert found.gap == pytest.approx(1e-3)
    assert found.relative_gap == pytest.approx(2e-3)
    assert "a program: objective 0.5, lower bound 0.499" in str(found)
    assert "gap 2.0e-03 (converged; tolerance 1e-02)" in str(found)
    assert replace(found, objective=0.0, lower_bound=0.0).relative_gap == 0.0


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
    zeros = np.zeros((2, 3))
    with pytest.raises(CoalaError, match=r"Prompt features must be \(2, 3\); found \(1, 3\)"):
        FeatureSet(zeros, zeros, np.array(["a", "b"]), SPEC, prompt=zeros[:1])
    with pytest.raises(CoalaError, match="2 pairs need as many log ratios"):
        FeatureSet(zeros, zeros, np.array(["a", "b"]), SPEC, log_ratio=np.zeros(3))
    with pytest.raises(CoalaError, match="gates act on 'both'"):
        random_head(1, 2, gate_on="both")
    with pytest.raises(CoalaError, match="temperature is 0"):
        random_head(1, 2, temperature=0.0)
    with pytest.raises(CoalaError, match="2 pairs need as many group names"):
        FeatureSet(np.zeros((2, 3)), np.zeros((2, 3)), np.array(["a"]), SPEC)
