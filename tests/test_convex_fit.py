"""``fit``: what it chooses, what it certifies, what it must not depend on."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coala.convex import Logistic, fit
from coala.convex.fit import assemble
from coala.convex.gate_sampling import separate
from coala.convex.gate_search import Search, learn_gates, search_gates
from coala.convex.gate_sources import Learnt
from coala.convex.pairwise import PairData, solve_pairs
from coala.convex.path import Candidate, sparsest_within_an_error
from coala.convex.prepare import Standardisation
from coala.convex.rows import solve_bytes
from coala.convex.validation import HeldOut, grouped_folds, rising_twice
from coala.store import scratch
from coala.values import CoalaError, ConvexHead, FeatureSet

from . import reference
from .menagerie_convex import SPEC, absolute_reward, pairs_of

N, D = 160, 6
# The name `coala.convex.fit` is the function; its module is needed too.
fit_module = sys.modules["coala.convex.fit"]


@lru_cache
def linear_features() -> FeatureSet:
    rng = np.random.default_rng(0)
    direction = rng.standard_normal(D)
    return pairs_of(lambda x: 1.5 * x @ direction, N, D, rng, per_group=2, shift=3.0)


@lru_cache
def gated_features() -> tuple[FeatureSet, FeatureSet]:
    rng = np.random.default_rng(1)
    reward = absolute_reward(D, rng)
    return pairs_of(reward, N, D, rng), pairs_of(reward, 2000, D, rng)


def accuracy(head: ConvexHead, features: FeatureSet) -> float:
    return float((head.margins(features) > 0).mean())


def margins(head: ConvexHead, features: FeatureSet) -> np.ndarray:
    return head.margins(features)


def facts(head: ConvexHead) -> dict[str, Any]:
    assert head.certificate is not None
    return dict(head.certificate.facts)


def relative_gap(head: ConvexHead) -> float:
    assert head.certificate is not None
    return head.certificate.relative_gap


def plain(head: ConvexHead) -> str:
    """The certificate as strict JSON."""
    assert head.certificate is not None
    return json.dumps(asdict(head.certificate), allow_nan=False, sort_keys=True)


# --- the linear limit ----------------------------------------------------------------------------------------------


def test_without_gates_it_is_ridge_bradley_terry() -> None:
    features = linear_features()
    head = fit(features, n_patterns=0, precision="float64", tolerance=1e-10).head
    standard = Standardisation.of(features.chosen, features.rejected)
    differences = standard.rows(features.chosen) - standard.rows(features.rejected)
    expected = differences @ reference.ridge_bradley_terry(differences, facts(head)["ridge"])
    np.testing.assert_allclose(margins(head, features), expected, atol=2e-6 * np.abs(expected).max())
    assert head.n_neurons == 0
    assert relative_gap(head) <= 1e-10


def test_solver_without_gates_is_ridge_bradley_terry() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2, N, D)) / 2
    with jax.enable_x64(True):
        data = PairData(jnp.asarray(rows), jnp.zeros(N), jnp.full(N, 1 / N))
        model = solve_pairs(data, np.zeros((D, 0)), sparsity=1.0, ridge=1e-2, tolerance=1e-13)
    np.testing.assert_allclose(model.linear, reference.ridge_bradley_terry(rows[0] - rows[1], 1e-2), atol=1e-6)


@pytest.mark.nightly
def test_linear_truth_keeps_a_linear_head_as_good_as_the_probe() -> None:
    rng = np.random.default_rng(0)
    direction = rng.standard_normal(D)
    train, test = (pairs_of(lambda x: 1.5 * x @ direction, n, D, rng, per_group=2) for n in (N, 2000))
    result = fit(train)
    assert result.head.n_neurons == 0
    assert facts(result.head)["gates_estimate"] is None
    assert accuracy(result.head, test) >= (reference.linear_probe(train, test) > 0).mean() - 0.01


# --- learnt gates --------------------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_gates_are_learnt_where_a_linear_head_fails() -> None:
    train, test = gated_features()
    result = fit(train)
    linear = fit(train, n_patterns=0)
    assert result.head.n_neurons > 0
    assert accuracy(result.head, test) >= accuracy(linear.head, test) + 0.05
    cv = facts(result.head)["cv"]
    assert cv["chosen"]["cv_nll"] < cv["linear"]["cv_nll"]
    assert relative_gap(result.head) <= 1e-4
    assert result.head.certificate is not None
    assert "estimated" in result.head.certificate.statement
    assert facts(result.head)["gates_estimate"]["proved"] is False


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [0, 1])
def test_positive_control(seed: int) -> None:
    """Reward 4 |a.x| + 2 b.x, d = 32, 1500 pairs: a linear head reaches 0.70, learnt gates at least 0.845."""
    rng = np.random.default_rng(seed)
    reward = absolute_reward(32, rng)
    train, test = pairs_of(reward, 1500, 32, rng), pairs_of(reward, 6000, 32, rng)
    assert (reference.linear_probe(train, test) > 0).mean() < 0.74
    assert accuracy(fit(train, seed=seed).head, test) >= 0.845


@pytest.mark.nightly
def test_search_finds_the_gate_of_the_truth() -> None:
    rng = np.random.default_rng(2)
    a = np.eye(D)[0]
    features = pairs_of(lambda x: 6 * np.abs(x @ a), 600, D, rng)
    rows = np.stack([features.chosen, features.rejected]) / np.sqrt(D)
    data = PairData(jnp.asarray(rows), jnp.zeros(600), jnp.full(600, 1 / 600))
    model = solve_pairs(data, np.zeros((D, 0), np.float32), sparsity=1.0, ridge=1e-2)
    gates, norms = search_gates(data, model, n_starts=64, n_steps=40, rng=np.random.default_rng(0))
    assert abs(gates[0, 0]) >= 0.9
    assert (np.diff(norms) <= 0).all()
    level = 0.5 * float(norms[0])
    learnt = learn_gates(data, model, sparsity=level, ridge=1e-2, search=Search(64, 40), rng=np.random.default_rng(0))
    assert learnt.n_neurons >= 2
    assert learnt.solution.objective < model.solution.objective
    assert learnt.solution.relative_gap <= 1e-4
    above = learn_gates(
        data, model, sparsity=1.1 * float(norms[0]), ridge=1e-2, search=Search(64, 40), rng=np.random.default_rng(0)
    )
    assert above.n_neurons == 0


# --- gates on the prompt -------------------------------------------------------------------------------------------


@lru_cache
def prompt_features() -> tuple[FeatureSet, FeatureSet]:
    """The prompt decides whether more or less of one feature is better: to a linear head, a coin toss."""
    rng = np.random.default_rng(4)
    sets = []
    for n in (400, 2000):
        features = pairs_of(lambda x: 0 * x[:, 0], n, D, rng)
        prompt = rng.standard_normal((n, D)).astype(np.float32)
        wanted = np.sign(prompt[:, 0]) * (features.chosen[:, 1] - features.rejected[:, 1]) > 0
        chosen = np.where(wanted[:, None], features.chosen, features.rejected)
        rejected = np.where(wanted[:, None], features.rejected, features.chosen)
        sets.append(FeatureSet(chosen, rejected, features.group, SPEC, prompt=prompt))
    return sets[0], sets[1]


@pytest.mark.nightly
def test_a_preference_that_depends_on_the_prompt_is_learnt_by_gates_on_the_prompt() -> None:
    train, test = prompt_features()
    head = fit(train).head
    assert head.gate_on == "prompt"
    assert head.n_neurons > 0
    assert accuracy(head, test) >= 0.8
    prompt = test.prompt
    assert prompt is not None
    given = head.given(prompt[3])
    assert given.n_neurons == 0
    np.testing.assert_allclose(given.score(test.chosen[3]), head.score(test.chosen[3], prompt[3]), rtol=1e-5, atol=1e-5)
    with pytest.raises(CoalaError, match="prompt"):
        head.score(test.chosen)
    with pytest.raises(CoalaError, match="hold no prompts"):
        fit(replace(train, prompt=None), gate_on="prompt")


@pytest.mark.nightly
def test_gates_on_the_reply_are_blind_to_the_prompt() -> None:
    train, test = prompt_features()
    assert accuracy(fit(train, gate_on="reply").head, test) <= 0.6


def test_separate_finds_the_gate_that_splits_the_prompts() -> None:
    train, _ = prompt_features()
    assert train.prompt is not None
    rows = np.stack([train.chosen, train.rejected])
    gate_rows = np.stack([train.prompt, train.prompt])
    dual = np.full(len(train), 1 / len(train), np.float32)
    starts = np.random.default_rng(0).standard_normal((D, 16)).astype(np.float32)
    gates, norms = separate(*map(jnp.asarray, (rows, gate_rows, np.stack([dual, -dual]), starts)), n_steps=20)
    best = np.asarray(gates)[:, int(np.argmax(norms))]
    assert abs(best[0]) / np.linalg.norm(best) >= 0.9
    opened = (gate_rows @ np.asarray(gates) >= 0) * np.stack([dual, -dual])[..., None]
    q = np.einsum("snk,snd->dk", opened, rows)
    np.testing.assert_allclose(norms, np.linalg.norm(q, axis=0), rtol=1e-4)


# --- sampled gates -------------------------------------------------------------------------------------------------


def test_direct_is_one_program_with_sampled_gates() -> None:
    train, test = gated_features()
    result = fit(train, method="direct", n_patterns=16)
    assert 0 < result.head.n_neurons <= 16
    assert relative_gap(result.head) <= 1e-4
    assert facts(result.head)["gates_estimate"] is None
    assert accuracy(result.head, test) > accuracy(fit(train, method="linear").head, test)
    assert set(result.solutions) == {"pairwise"}


def test_direct_keeps_a_linear_truth_linear() -> None:
    features = linear_features()
    direct, linear = (fit(features, method=method).head for method in ("direct", "linear"))  # type: ignore[arg-type]
    if not direct.n_neurons:
        np.testing.assert_allclose(margins(direct, features), margins(linear, features), atol=1e-3)
    chosen, probe = facts(direct)["cv"]["chosen"]["cv_nll"], facts(direct)["cv"]["linear"]["cv_nll"]
    assert chosen <= probe


# --- reference margin and calibration ------------------------------------------------------------------------------


def test_a_reference_is_a_margin_per_pair() -> None:
    features = linear_features()
    ratio = np.random.default_rng(0).standard_normal(N)
    with_reference = replace(features, log_ratio=ratio)
    a = fit(with_reference, method="linear", reference_scale=0.5).head
    b = fit(features, method="linear", margin=0.5 * ratio).head
    np.testing.assert_array_equal(a.linear, b.linear)
    assert not np.allclose(a.linear, fit(with_reference, method="linear").head.linear)
    with pytest.raises(CoalaError, match="hold no log ratios"):
        fit(features, reference_scale=0.5)


def test_preferences_are_calibrated_probabilities() -> None:
    rng = np.random.default_rng(0)
    direction = rng.standard_normal(D)
    train, test = (pairs_of(lambda x: 1.5 * x @ direction, n, D, rng) for n in (N, 4000))
    head = fit(train, method="linear").head
    probability = head.preference(test.chosen, test.rejected)
    np.testing.assert_allclose(probability + head.preference(test.rejected, test.chosen), 1, atol=1e-6)
    confident = np.maximum(probability, 1 - probability)
    assert abs(confident.mean() - (probability > 0.5).mean()) <= 0.04
    assert facts(head)["calibration"]["temperature"] == head.temperature != 1.0


# --- invariance ----------------------------------------------------------------------------------------------------


def test_same_data_and_seed_give_the_same_bytes() -> None:
    train, _ = gated_features()
    first, second = fit(train, seed=3), fit(train, seed=3)
    for name in ("gates", "weights", "linear"):
        assert getattr(first.head, name).tobytes() == getattr(second.head, name).tobytes()
    assert plain(first.head) == plain(second.head)
    assert first.path == second.path
    assert first.history == second.history


def test_scaling_and_shifting_the_features_leaves_the_scores() -> None:
    features = linear_features()
    moved = replace(features, chosen=40 * features.chosen - 7, rejected=40 * features.rejected - 7)
    a, b = margins(fit(features).head, features), margins(fit(moved).head, moved)
    np.testing.assert_allclose(a, b, atol=2e-3 * np.abs(a).max())
    each = np.random.default_rng(0).uniform(0.1, 10, D)
    stretched = replace(features, chosen=features.chosen * each, rejected=features.rejected * each)
    c = margins(fit(stretched).head, stretched)
    np.testing.assert_allclose(a, c, atol=2e-3 * np.abs(a).max())


def test_row_order_does_not_matter_and_swapping_every_pair_turns_the_head_round() -> None:
    features = linear_features()
    order = np.random.default_rng(0).permutation(N)
    a = fit(features).head
    b = fit(features.take(order)).head
    np.testing.assert_allclose(
        margins(a, features), margins(b, features), atol=1e-3 * np.abs(margins(a, features)).max()
    )
    swapped = replace(features, chosen=features.rejected, rejected=features.chosen)
    c = fit(swapped).head
    np.testing.assert_allclose(
        margins(a, features), margins(c, swapped), atol=1e-3 * np.abs(margins(a, features)).max()
    )


def test_the_head_scores_what_the_program_predicts() -> None:
    train, _ = gated_features()
    features = replace(train, chosen=train.chosen * 5 + 100, rejected=train.rejected * 5 + 100)
    standard = Standardisation.of(features.chosen, features.rejected)
    rows = np.stack([standard.rows(features.chosen), standard.rows(features.rejected)])
    data = PairData(jnp.asarray(rows, jnp.float32), jnp.zeros(N), jnp.full(N, 1 / N))
    gates = np.random.default_rng(0).standard_normal((rows.shape[-1], 5))
    model = solve_pairs(data, gates, sparsity=1e-3, ridge=1e-2)
    assert model.n_neurons >= 2
    program = data.program(model.gates, sparsity=1e-3, ridge=1e-2)
    stacked = model.stacked()
    padded = np.pad(stacked, ((0, 0), (0, program.zeros().shape[1] - stacked.shape[1])))
    predicted = np.asarray(program.predict(jnp.asarray(padded)))
    found = margins(assemble(features, standard, model.linear, model.gates, model.weights), features)
    # Of float32 scores, those beside a gate's edge may fall to its other side.
    assert np.quantile(np.abs(found - predicted), 0.97) <= 1e-3 * np.abs(predicted).max()


def test_folding_is_exact() -> None:
    rng = np.random.default_rng(0)
    for n, d in ((50, 6), (5, 20)):
        chosen, rejected = 3 + rng.standard_normal((2, n, d)) * rng.uniform(0.1, 5, d)
        chosen[:, 1] = rejected[:, 1] = 4.0
        for scaling in ("feature", "global"):
            standard = Standardisation.of(chosen, rejected, scaling)  # type: ignore[arg-type]
            rows = np.concatenate([standard.rows(chosen), standard.rows(rejected)])
            weights = rng.standard_normal((rows.shape[1], 3))
            folded = standard.fold(weights)
            h = np.concatenate([chosen, rejected])
            np.testing.assert_allclose(h @ folded[:, :-1].T + folded[:, -1], rows @ weights, atol=1e-9)
            np.testing.assert_allclose(standard.rotation.T @ standard.rotation, np.eye(rows.shape[1]), atol=1e-9)
            np.testing.assert_allclose((rows**2).sum(1).mean(), 1 + 1 / (d - 1), rtol=1e-6)


# --- edges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "n_groups"),
    [("learnt", 1), ("learnt", 2), ("direct", 4)]
    + [pytest.param(*more, marks=pytest.mark.nightly) for more in (("learnt", 4), ("two-phase", 2))],
)
def test_few_pairs_and_more_features_than_pairs(method: str, n_groups: int) -> None:
    rng = np.random.default_rng(0)
    chosen = rng.standard_normal((4, 9)).astype(np.float32)
    features = FeatureSet(chosen, chosen - 1 + rng.random((4, 9)), np.arange(4) % n_groups, SPEC)
    head = fit(features, method=method).head  # type: ignore[arg-type]
    assert accuracy(head, features) == 1.0
    assert facts(head)["separable"] is True
    if n_groups == 1:
        assert facts(head)["cv"]["folds"] == 0
    plain(head)


def test_one_pair() -> None:
    features = FeatureSet(np.ones((1, 3)), np.zeros((1, 3)), np.array(["a"]), SPEC)
    head = fit(features).head
    assert accuracy(head, features) == 1.0
    assert facts(head)["n_pairs"] == 1


def test_equal_sides_give_a_zero_head() -> None:
    chosen = np.random.default_rng(0).standard_normal((N, D))
    features = FeatureSet(chosen, chosen, np.arange(N), SPEC)
    head = fit(features).head
    assert not head.linear.any()
    assert facts(head)["cv"]["signal_found"] is False
    constant = FeatureSet(np.ones((N, D)), np.ones((N, D)), np.arange(N), SPEC)
    assert not fit(constant).head.score(constant.chosen).any()


def test_constant_features_and_repeated_pairs() -> None:
    features = linear_features()
    chosen, rejected = features.chosen.copy(), features.rejected.copy()
    chosen[:, 2] = rejected[:, 2] = 1e4
    chosen[1::2], rejected[1::2] = chosen[::2], rejected[::2]
    head = fit(replace(features, chosen=chosen, rejected=rejected)).head
    assert head.linear[2] == 0
    assert head.certificate is not None
    assert head.certificate.status == "converged"


def test_noise_is_reported_as_no_signal() -> None:
    rng = np.random.default_rng(5)
    features = pairs_of(lambda x: 0 * x[:, 0], N, D, rng)
    head = fit(features).head
    assert head.n_neurons == 0
    assert facts(head)["cv"]["chosen"]["cv_nll"] >= np.log(2) - 0.01


def test_mistakes_are_named() -> None:
    features = linear_features()
    broken = features.chosen.copy()
    broken[7, 2] = np.nan
    with pytest.raises(CoalaError, match=r"chosen features of 1 of .*pair 7"):
        fit(replace(features, chosen=broken))
    with pytest.raises(CoalaError, match="0 pairs"):
        fit(features.take(np.zeros(N, bool)))
    with pytest.raises(CoalaError, match="margin has shape"):
        fit(features, margin=np.zeros(3))
    with pytest.raises(CoalaError, match="method"):
        fit(features, method="magic")  # type: ignore[arg-type]
    with pytest.raises(CoalaError, match="n_folds=1"):
        fit(features, n_folds=1)


# --- what comes with the head --------------------------------------------------------------------------------------


def test_path_history_and_progress() -> None:
    seen: list[str] = []
    train, _ = gated_features()
    result = fit(train, on_step=lambda stage, step, total, info: seen.append(stage))
    assert {"ridge", "sparsity", "solve"} <= set(seen)
    keys = {"tau", "gate_on", "beta_rel", "relaxation", "cv_nll", "cv_se", "cv_accuracy", "n_neurons", "gap"}
    assert all(set(row) == keys for row in result.path)
    assert [row["step"] for row in result.history] == list(range(len(result.history)))
    objectives = [row["objective"] for row in result.history]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(objectives))
    last = result.history[-1]
    assert last["margin_train"] > result.history[0]["margin_train"]
    assert 0.5 < last["accuracy_held_out"] <= 1
    json.dumps([result.path, result.history], allow_nan=False)
    plain(result.head)


def test_a_margin_raises_the_differences() -> None:
    features = linear_features()
    plain, wide = (fit(features, margin=margin, n_patterns=0).head for margin in (0.0, 1.0))
    assert margins(wide, features).mean() > margins(plain, features).mean()
    each = fit(features, margin=np.ones(N), n_patterns=0).head
    np.testing.assert_allclose(each.linear, wide.linear, rtol=1e-5)


@pytest.mark.nightly
def test_two_phase_head() -> None:
    features = linear_features()
    result = fit(features, method="two-phase", n_patterns=8, loss=Logistic(margin=0.2))
    assert set(result.solutions) == {"phase-one", "phase-two"}
    assert 0 < result.head.n_neurons <= 8
    assert accuracy(result.head, features) > 0.7
    assert facts(result.head)["phase_one"]["relative_gap"] <= 1e-4
    assert relative_gap(result.head) <= 1e-9


@pytest.mark.nightly
@pytest.mark.parametrize("phase_one", ["cronos", "network"])
def test_two_phase_with_other_solvers_of_phase_one(phase_one: Any) -> None:
    features = linear_features()
    result = fit(features, method="two-phase", n_patterns=8, phase_one=phase_one)
    assert accuracy(result.head, features) > 0.7
    first = facts(result.head)["phase_one"]
    assert first["solver"] == phase_one
    assert 0 <= first["relative_gap"] <= 0.02
    assert result.solutions["phase-one"].objective > 0


@pytest.mark.nightly
def test_the_published_settings_say_how_far_from_the_optimum_they_stop() -> None:
    features = linear_features()
    result = fit(features, method="two-phase", paper=True, n_patterns=8)
    assert facts(result.head)["phase_one"]["relative_gap"] > 0.1
    assert relative_gap(result.head) > 1e-4
    assert not result.path
    with pytest.raises(CoalaError, match="two-phase"):
        fit(features, paper=True)


# --- memory --------------------------------------------------------------------------------------------------------


def test_a_fit_in_a_scratch_file_is_the_fit_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = gated_features()
    needed = solve_bytes(N, D + 1, 16, sides=2)
    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "available_bytes", lambda: needed - 1)
        with pytest.raises(CoalaError, match="GiB"):
            fit(train)
        mapped = fit(train, scratch=scratch(tmp_path)).head
    np.testing.assert_array_equal(mapped.weights, fit(train).head.weights)
    assert not list(tmp_path.iterdir())


# --- validation ----------------------------------------------------------------------------------------------------


def test_folds_keep_groups_whole_and_ignore_row_order() -> None:
    rng = np.random.default_rng(0)
    group = rng.integers(0, 23, 200).astype(str)
    fold = grouped_folds(group, 4, 0)
    assert fold is not None
    for name in np.unique(group):
        assert len(set(fold[group == name])) == 1
    assert np.bincount(fold).max() - np.bincount(fold).min() <= np.unique(group, return_counts=True)[1].max()
    order = rng.permutation(200)
    np.testing.assert_array_equal(grouped_folds(group[order], 4, 0), fold[order])
    assert grouped_folds(np.array(["a", "a"]), 4, 0) is None


def test_a_path_has_passed_its_minimum_when_two_lie_above_it() -> None:
    assert rising_twice([1.0, 0.9, 0.95, 0.91])
    assert not rising_twice([1.0, 0.9, 0.95, 0.89])


def test_the_sparsest_head_within_one_standard_error_is_taken() -> None:
    draw = np.random.default_rng(0)
    group = np.arange(400).astype(str)
    lowest = draw.exponential(0.6, 400)
    noise = draw.normal(0.0, 0.1, 400)
    # A path from sparse to dense: clearly worse, as good but for noise, the lowest, then worse again.
    losses = [lowest + 0.5, lowest + noise - noise.mean() + 0.002, lowest, lowest + 0.2]
    path = [
        Candidate(Learnt(), 1.0, level, 1.0, HeldOut(np.zeros(400), x, 0.0))
        for level, x in zip((0.65, 0.5, 0.35, 0.25), losses, strict=True)
    ]
    assert sparsest_within_an_error(path, group).sparsity == 0.5
    assert sparsest_within_an_error(path[2:], group).sparsity == 0.35
