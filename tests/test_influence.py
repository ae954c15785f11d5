"""Pairs left out, flipped, removed and added: what is proved of a head holds against refits by SciPy."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coala.convex import PairProgram, certify
from coala.convex.forgetting import forget
from coala.convex.held import HeldProgram
from coala.convex.influence import HeldOutEffect, LinearEffect, copies, influence
from coala.convex.optimum import Optimum, beyond, reach
from coala.convex.poison import ATTACKS, Poisoning
from coala.convex.prepare import Standardisation
from coala.values import Certificate, CoalaError, ConvexHead, FeatureSet

from . import reference
from .menagerie_convex import SPEC, absolute_reward, pairs_of

N, D, HELD_OUT = 60, 4, 40
RELATIVE = 0.1


def certificate(**facts: object) -> Certificate:
    return Certificate("p", "s", 1.0, 1.0, 0.0, 0, "converged", 1e-4, "float32", 0, {}, facts)


def solved(features: FeatureSet, relative: float = RELATIVE, gates: np.ndarray | None = None) -> ConvexHead:
    """The head of the pairwise program at a relative ridge, and with gates at a sparsity that lets them live."""
    none = np.zeros((0, features.width + 1)) if gates is None else gates
    facts = {"method": "learnt", "ridge": 1.0, "ridge_relative": relative, "sparsity": 0.01}
    head = ConvexHead(none, none, np.zeros(features.width + 1), SPEC, certificate=certificate(**facts))
    held = HeldProgram.of(features, head, ridge_relative=relative)
    start = np.zeros(held.rows.shape[1]) if gates is None else np.full(held.rows.shape[1], 0.1)
    made = held.design.folded(held.solve(start))
    return replace(made, certificate=certificate(**{**facts, "ridge": held.ridge}), temperature=1.3)


@lru_cache
def data() -> tuple[FeatureSet, FeatureSet]:
    rng = np.random.default_rng(3)
    direction = rng.standard_normal(D)
    both = pairs_of(lambda x: 1.5 * x @ direction, N + HELD_OUT, D, rng, per_group=2, shift=1.0)
    return both.take(np.arange(N)), both.take(np.arange(N, N + HELD_OUT))


@lru_cache
def at_optimum() -> Optimum:
    train, _ = data()
    return Optimum.of(HeldProgram.of(train, solved(train)))


def held_out_rows() -> np.ndarray:
    return at_optimum().program.design.compared(data()[1])


def refitted(rows: np.ndarray) -> np.ndarray:
    """The optimum of these rows alone, by another solver."""
    return reference.ridge_bradley_terry(rows, at_optimum().program.ridge)


def without(*pairs: int) -> np.ndarray:
    return refitted(np.delete(at_optimum().program.rows, pairs, axis=0))


@lru_cache
def each_left_out() -> np.ndarray:
    return np.stack([without(j) for j in range(N)])


# --- the lemma ---------------------------------------------------------------------------------------------------


@given(st.floats(0, 20), st.floats(1e-3, 20))
def test_a_logistic_loss_bends_as_the_lemma_says(start: float, move: float) -> None:
    """One loss and a ridge: how far the optimum moves for a gradient, and what Newton's step misses."""
    curve = float(np.exp(-np.logaddexp(0, start)) * np.exp(-np.logaddexp(0, -start)))
    hessian = curve + 0.01
    slope = (1 / (1 + np.exp(-(start + move))) - 1 / (1 + np.exp(-start))) + 0.01 * move
    rho, nu = 1 / np.sqrt(hessian), slope / np.sqrt(hessian)
    size = move * np.sqrt(hessian)
    assert size <= reach(np.asarray(nu), np.asarray(rho)) * (1 + 1e-9)
    missed = abs(move - slope / hessian) * np.sqrt(hessian)
    assert missed <= beyond(np.asarray(move)) * size * (1 + 1e-9) + 1e-12


# --- leaving out -------------------------------------------------------------------------------------------------


def test_the_optimum_is_the_one_scipy_finds() -> None:
    optimum = at_optimum()
    np.testing.assert_allclose(optimum.weights, refitted(optimum.program.rows), atol=1e-6)
    np.testing.assert_allclose(optimum.basis @ optimum.point, optimum.weights, atol=1e-10)
    assert optimum.own_distance < 1e-5  # the saved head is rounded to float32


@pytest.mark.parametrize("measure", ["loss", "accuracy", "margin"])
def test_every_pair_does_what_a_refit_without_it_shows(measure: str) -> None:
    optimum, rows = at_optimum(), held_out_rows()
    if measure == "margin":
        effect: LinearEffect | HeldOutEffect = LinearEffect(optimum, rows[0])
    else:
        effect = HeldOutEffect(optimum, rows, 1.3, "loss" if measure == "loss" else "accuracy")
    found = influence(optimum, effect, top=5)
    true = np.array([effect.exactly(weights) for weights in each_left_out()])
    assert (np.abs(true - found.change) <= found.slack + 1e-7).all()
    assert np.isfinite(found.slack).all()
    others = np.array([optimum.program.rows[j] @ weights for j, weights in enumerate(each_left_out())])
    np.testing.assert_allclose(optimum.left_out_margins, others, atol=0.15 * np.abs(others).max())
    moved = np.linalg.norm(each_left_out() - optimum.weights, axis=1)
    assert (moved <= found.distance + 1e-7).all()
    for sign, ranked in ((-1, found.lowers), (1, found.raises)):
        effects = sign * true
        outside = np.delete(effects, [row.unit for row in ranked.rows])
        assert (outside <= ranked.outside + 1e-7).all()
        for row in ranked.rows:
            assert row.effect == pytest.approx(true[row.unit], abs=2e-7)
        proved = [row.unit for row in ranked.rows[: ranked.proved]]
        if proved:
            assert effects[proved].min() >= np.delete(effects, proved).max() - 1e-7
    if measure != "accuracy":  # so smooth a measure leaves nothing open
        assert found.lowers.proved == found.raises.proved == 5


def test_groups_left_out_do_what_a_refit_shows() -> None:
    optimum = at_optimum()
    effect = HeldOutEffect(optimum, held_out_rows(), 1.3)
    units = [np.arange(start, start + size) for start, size in ((0, 2), (10, 3), (20, 5), (40, 20))]
    found = influence(optimum, effect, units, top=4)
    true = np.array([effect.exactly(without(*unit)) for unit in units])
    inside = np.isfinite(found.slack)
    assert inside[:3].all()
    assert (np.abs(true - found.change)[inside] <= found.slack[inside] + 1e-7).all()
    for row in (*found.lowers.rows, *found.raises.rows):
        assert row.effect == pytest.approx(true[row.unit], abs=2e-7)


def test_pairs_that_say_the_same_or_the_contrary_are_found() -> None:
    train, _ = data()
    again = train.take(np.array([*range(N), 7, 9]))
    chosen, rejected = np.array(again.chosen), np.array(again.rejected)
    chosen[-1], rejected[-1] = rejected[-1].copy(), chosen[-1].copy()
    twice = replace(again, chosen=chosen, rejected=rejected)
    held = HeldProgram.of(twice, solved(train))
    together, contrary = copies(held.rows)
    assert together == [[7, N], [9, N + 1]] or together == [[9, N + 1], [7, N]]
    assert set(np.flatnonzero(contrary)) == {9, N + 1}


# --- poisoned pairs ----------------------------------------------------------------------------------------------


def attacked(attack: str, pairs: list[int], rng: np.random.Generator, cap: float) -> np.ndarray:
    """The weights after an attack, by another solver."""
    optimum = at_optimum()
    rows = np.array(optimum.program.rows)
    if attack == "flip":
        rows[pairs] *= -1
        return refitted(rows)
    if attack == "remove":
        return refitted(np.delete(rows, pairs, axis=0))
    # As unusual as is assumed, in any direction.
    drawn = rng.standard_normal((len(pairs), rows.shape[1]))
    drawn *= cap / np.linalg.norm(drawn @ optimum.basis, axis=1, keepdims=True)
    return refitted(np.concatenate([rows, drawn]))


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("k", [1, 3])
def test_no_attack_found_does_more_than_the_bound(attack: str, k: int) -> None:
    optimum, rows = at_optimum(), held_out_rows()
    poisoning = Poisoning.of(optimum, rows)
    bound = poisoning.bound(attack, k)  # type: ignore[arg-type]
    before = rows @ optimum.weights
    rng = np.random.default_rng(k)
    # The worst for each held-out pair by the first step, and a few drawn at random.
    worst = [list(np.argsort(-abs(optimum.rows @ (optimum.basis.T @ row)))[:k]) for row in rows[:12]]
    for pairs in [*worst, *(list(rng.choice(N, k, replace=False)) for _ in range(8))]:
        after = rows @ attacked(attack, pairs, rng, poisoning.cap)
        assert np.abs(after - before).max() <= bound.margin + 1e-6
        assert (np.sign(after) != np.sign(before)).sum() <= bound.could_turn
        assert ((after > 0) & (before > 0)).mean() >= bound.accuracy - 1e-12


def test_bounds_grow_with_the_number_of_pairs_and_end_where_they_say() -> None:
    poisoning = Poisoning.of(at_optimum(), held_out_rows())
    for attack in ATTACKS:
        bounds = [poisoning.bound(attack, k) for k in range(1, 12)]
        assert all(a.margin <= 1.1 * b.margin for a, b in pairwise(bounds))
        largest = poisoning.largest(attack)
        assert not largest or not poisoning.bound(attack, largest).vacuous
        assert poisoning.bound(attack, largest + 1).vacuous
        assert poisoning.bound(attack, 3 * largest + 3).vacuous


def test_the_greedy_attack_flips_what_it_says() -> None:
    optimum, rows = at_optimum(), held_out_rows()
    poisoning = Poisoning.of(optimum, rows)
    taken, accuracies = poisoning.attack(4)
    flipped = np.array(optimum.program.rows)
    flipped[taken] *= -1
    margins = rows @ refitted(flipped)
    assert len(set(taken.tolist())) == 4
    assert accuracies[-1] == pytest.approx((margins > 0).mean())
    np.testing.assert_allclose(poisoning.margins_if_flipped(taken.tolist()), margins, atol=1e-5)
    assert accuracies[-1] <= (rows @ optimum.weights > 0).mean()


# --- forgetting --------------------------------------------------------------------------------------------------


def test_forgetting_is_a_fit_of_what_remains() -> None:
    train, held_out = data()
    remaining = train.take(np.arange(N) >= 6)
    head = solved(train)
    found = forget(remaining, head)
    standard = Standardisation.of(remaining.chosen, remaining.rejected)
    rows = standard.rows(remaining.chosen) - standard.rows(remaining.rejected)
    ridge = RELATIVE * (rows**2).sum() / (4 * len(rows))
    expected = reference.ridge_bradley_terry(rows, ridge)
    there = standard.rows(held_out.chosen) - standard.rows(held_out.rejected)
    np.testing.assert_allclose(found.head.margins(held_out), there @ expected, atol=3e-6)
    assert found.gap_after <= 1e-9 < found.gap_before
    assert 0 < found.distance <= found.bound
    assert found.head.certificate is not None
    assert found.head.certificate.facts["n_pairs"] == len(remaining)
    # The bound is on the optimum's own distance, which SciPy's weights show too.
    old = HeldProgram.of(remaining, head).saved
    assert np.linalg.norm(expected - old) == pytest.approx(found.distance, abs=1e-5)


def test_heads_of_other_programs_and_features_are_refused() -> None:
    train, _ = data()
    head = solved(train)
    for facts in ({"method": "two-phase", "ridge": 1.0}, {}):
        with pytest.raises(CoalaError, match="pairwise program"):
            HeldProgram.of(train, replace(head, certificate=certificate(**facts)))
    with pytest.raises(CoalaError, match="another model or layer"):
        HeldProgram.of(replace(train, spec=replace(SPEC, layer=3)), head)
    with pytest.raises(CoalaError, match="log ratios"):
        HeldProgram.of(train, head, reference_scale=1.0)


# --- at length ---------------------------------------------------------------------------------------------------


@lru_cache
def gated(n: int = 150, strength: float = 1.0) -> Optimum:
    rng = np.random.default_rng(5)
    reward = absolute_reward(3, rng)
    both = pairs_of(lambda x: strength * reward(x), n, 3, rng)
    gates = np.concatenate([rng.standard_normal((2, 3)), np.zeros((2, 1))], axis=1)
    return Optimum.of(HeldProgram.of(both, solved(both, gates=gates)))


@pytest.mark.nightly
def test_the_bounds_of_a_held_program_are_those_of_a_fit() -> None:
    held = gated().program
    weights = gated().weights + 0.01
    sides = np.stack([held.design.coordinates.rows(h) for h in (held.features.chosen, held.features.rejected)])
    is_open = np.stack([held.design.open(h, None) for h in (held.features.chosen, held.features.rejected)])
    patterns = np.concatenate([np.ones((2, len(held), 1), bool), is_open], axis=-1)
    with jax.enable_x64(True):
        arrays = (sides, patterns, held.margin, held.even, np.asarray(held.sparsity), np.asarray(held.ridge))
        expected = certify(PairProgram(*map(jnp.asarray, arrays)), jnp.asarray(weights.reshape(-1, held.width).T))
    np.testing.assert_allclose(held.bounds(weights, held.even), expected, rtol=1e-12)


@pytest.mark.nightly
def test_with_gates_every_pair_does_what_a_refit_shows() -> None:
    optimum = gated()
    held, n = optimum.program, len(optimum)
    assert (np.linalg.norm(optimum.weights.reshape(-1, held.width), axis=1) > 0).all()
    effect = HeldOutEffect(optimum, held.rows[:50], 1.0)
    found = influence(optimum, effect, top=3, most_refits=n)
    # Where nothing is proved beforehand a refit is made, so that the lists are complete all the same.
    assert np.isfinite(found.slack).mean() > 0.9
    assert found.lowers.proved == found.raises.proved == 3
    for j in range(0, n, 5):
        weight = np.full(n, 1 / (n - 1))
        weight[j] = 0
        weights = held.solve(optimum.weights, weight)
        assert held.bounds(weights, weight)[0] - held.bounds(weights, weight)[1] <= 1e-9
        assert abs(effect.exactly(weights) - found.change[j]) <= found.slack[j] + 1e-9
        assert np.linalg.norm(weights - optimum.weights) <= found.distance[j] + 1e-9


@pytest.mark.nightly
def test_on_300_pairs_all_refits_agree_and_planted_flips_stand_out() -> None:
    rng = np.random.default_rng(0)
    direction = rng.standard_normal(6)
    both = pairs_of(lambda x: 1.5 * x @ direction, 500, 6, rng, per_group=2, shift=3.0)
    train, held_out = both.take(np.arange(300)), both.take(np.arange(300, 500))
    planted = rng.choice(300, 15, replace=False)
    chosen, rejected = np.array(train.chosen), np.array(train.rejected)
    chosen[planted], rejected[planted] = train.rejected[planted], train.chosen[planted]
    train = replace(train, chosen=chosen, rejected=rejected)
    optimum = Optimum.of(HeldProgram.of(train, solved(train)))
    effect = HeldOutEffect(optimum, optimum.program.design.compared(held_out), 1.0)
    found = influence(optimum, effect)
    ridge = optimum.program.ridge
    refits = [reference.ridge_bradley_terry(np.delete(optimum.program.rows, j, axis=0), ridge) for j in range(300)]
    true = np.array([effect.exactly(weights) for weights in refits])
    assert (np.abs(true - found.change) <= found.slack + 1e-7).all()
    assert found.lowers.proved == found.raises.proved == 10
    # Flips harm: of the 45 pairs whose absence helps most, most of the 15 planted.
    worst = set(np.argsort(found.change)[:45].tolist())
    assert len(worst & set(planted.tolist())) >= 9


@pytest.mark.nightly
def test_with_gates_no_attack_found_does_more_than_the_bound() -> None:
    optimum = gated(800, 0.3)
    features, head = optimum.program.features, optimum.program.design.head
    rows = optimum.program.rows[:40]
    poisoning = Poisoning.of(optimum, rows)
    before = rows @ optimum.weights
    rng = np.random.default_rng(0)
    proved = 0
    for k in (1, 2):
        bound = poisoning.bound("flip", k)
        proved += bound.by == "curvature"
        for _ in range(6):
            pairs = rng.choice(len(optimum), k, replace=False)
            chosen, rejected = np.array(features.chosen), np.array(features.rejected)
            chosen[pairs], rejected[pairs] = features.rejected[pairs], features.chosen[pairs]
            held = HeldProgram.of(replace(features, chosen=chosen, rejected=rejected), head)
            there = held.design.compared(features.take(np.arange(40)))
            after = there @ held.solve(held.saved)
            assert np.abs(after - before).max() <= bound.margin + 1e-6
            assert ((after > 0) & (before > 0)).mean() >= bound.accuracy - 1e-12
    assert proved
