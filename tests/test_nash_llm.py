"""COMAL on a tiny language model: pairs, targets, the trainer against the losses as written, resuming, acceptance."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from coala.comal.loop import run_comal
from coala.comal.measures import cyclic_share, measure, reachable, remarks
from coala.comal.oracles import from_callable, from_table
from coala.comal.pairs import TrainRow, select, shard_of, targets, win_rates
from coala.comal.settings import COMALSettings
from coala.nash import solve
from coala.values import CoalaError
from tests.test_nash_game import seeds

trl = pytest.importorskip("trl", reason="needs the extra `baselines`")

from coala.comal.llm import LowRank, load_policy  # noqa: E402
from tests.tiny_game import (  # noqa: E402
    ANSWERS,
    EXACT,
    EXAMPLES,
    GAME,
    START,
    copy_of,
    distribution,
    supervised_start,
)
from tests.tolerances import NETWORK  # noqa: E402

QUICK = COMALSettings(
    eta=1,
    ref_weight=1 / 3,
    outer_steps=2,
    inner_steps=1,
    num_candidates=6,
    max_new_tokens=2,
    learning_rate=1e-3,
    epochs=2,
    batch_size=4,
)


@pytest.fixture(scope="module")
def trained_start() -> tuple[Any, Any]:
    return supervised_start()


# --- settings, shards, pairs --------------------------------------------------------------------------------------


def test_eta_and_tau_may_be_given_either_way() -> None:
    one = COMALSettings(eta=2, ref_weight=1 / 3)
    assert one == COMALSettings(beta=0.5, tau=1 / 6)
    assert (one.step, one.weight) == (2, 1 / 3)
    assert COMALSettings().beta == pytest.approx(0.002)
    for wrong, said in (
        ({"eta": 2, "beta": 2}, "eta is 2 but beta is 2"),
        ({"beta": 0}, "positive number"),
        ({"eta": -1}, "positive number"),
        ({"eta": 2, "tau": 1}, "expected 0 .* to 1"),
        ({"num_candidates": 1}, "expected at least 2"),
        ({"inner_loss": "ppo"}, "expected one of inpo"),
        ({"inner_loss": "dro"}, "pair_selection='all'"),
        ({"inner_loss": "rebel", "target": "hard"}, "win rates"),
    ):
        with pytest.raises(CoalaError, match=said):
            COMALSettings(**wrong)  # type: ignore[arg-type]


def test_settings_say_what_will_not_work() -> None:
    assert [str(note) for note in COMALSettings(eta=2, ref_weight=1 / 3).notes()] == []
    words = ("top_p", "another game", "far from solved", "early stopping")
    notes = " ".join(
        map(str, COMALSettings(top_p=0.9, pair_selection="best_worst", target="hard", inner_steps=1).notes())
    )
    assert all(word in notes for word in words)
    assert "iterative IPO" in str(COMALSettings(eta=1, ref_weight=0).notes()[0])


@given(st.integers(1, 12), st.integers(1, 15), st.integers(0, 3))
def test_every_prompt_is_used_before_one_comes_again(n: int, size: int, seed: int) -> None:
    if size >= n:
        assert shard_of(n, size, 5, seed) == list(range(n))
        return
    drawn = [i for number in range(n) for i in shard_of(n, size, number, seed)]
    assert len(drawn) == n * size
    for k in range(size):
        assert sorted(drawn[k * n : (k + 1) * n]) == list(range(n))


counted = st.lists(st.integers(1, 4), min_size=2, max_size=4).filter(lambda c: sum(c) > 1)


def candidates(counts: list[int]) -> list[dict[str, Any]]:
    return [{"prompt": 0, "count": c, "tokens": [i, 1], "text": str(i), "finished": True} for i, c in enumerate(counts)]


@given(counted, seeds)
def test_weights_are_those_of_the_pairs_written_out(counts: list[int], seed: int) -> None:
    drawn, places = candidates(counts), list(range(len(counts)))
    flat = [i for i, c in enumerate(counts) for _ in range(c)]
    every = select(places, drawn, COMALSettings(eta=1, pair_selection="all"), seed).trained
    naive: dict[tuple[int, int], int] = {}
    for k, a in enumerate(flat):
        for b in flat[k + 1 :]:
            naive[a, b] = naive.get((a, b), 0) + 1
    assert every == {pair: weight for pair, weight in naive.items() if pair[0] != pair[1]}
    sppo = select(places, drawn, COMALSettings(eta=1, pair_selection="all", inner_loss="sppo"), seed).trained
    assert sppo == naive
    random = select(places, drawn, COMALSettings(eta=1, inner_loss="sppo"), seed).trained
    assert sum(random.values()) == len(flat) // 2
    used = np.zeros(len(counts))
    for (a, b), weight in random.items():
        used[a] += weight
        used[b] += weight
    assert (used <= counts).all()


@given(counted, seeds)
def test_dro_over_pairs_is_the_loss_with_its_constant_eliminated(counts: list[int], seed: int) -> None:
    drawn, places = candidates(counts), list(range(len(counts)))
    chosen = COMALSettings(eta=1.7, pair_selection="all", inner_loss="dro")
    draw = np.random.default_rng(seed)
    n = len(counts)
    upper = np.triu(draw.random((n, n)), 1)
    table = upper + np.tril(1 - upper.T, -1) + np.eye(n) / 2
    P = {(a, b): float(table[a, b]) for a in places for b in places if a < b}
    rates = win_rates(places, P, counts)
    flat = np.repeat(places, counts)
    for k, a in enumerate(flat):
        assert rates[a] == pytest.approx(np.delete(table[a, flat], k).mean())
    d = draw.normal(size=n)
    rows = targets(select(places, drawn, chosen, seed), P, drawn, chosen, seed)
    loss = sum(
        r["weight"] * (d[r["first"]] - d[r["second"]] - (r["target_first"] - r["target_second"])) ** 2 for r in rows
    )
    e = d[flat] - 1.7 * np.array([rates[a] for a in flat])
    assert loss == pytest.approx(((e - e.mean()) ** 2).sum())


def test_targets_are_the_ones_of_the_table() -> None:
    drawn, places = candidates([1, 1, 1]), [0, 1, 2]
    P: dict[tuple[int, int], float | None] = {(0, 1): 0.1, (0, 2): 0.8, (1, 2): None}

    def margins(**options: Any) -> dict[tuple[int, int], float]:
        chosen = COMALSettings(eta=2, **options)
        rows = targets(select(places, drawn, chosen, 0), P, drawn, chosen, 0)
        return {(r["first"], r["second"]): r["target_first"] - r["target_second"] for r in rows}

    assert margins(pair_selection="all") == pytest.approx({(0, 1): -0.8, (0, 2): 0.6})  # no verdict, no pair
    assert margins(pair_selection="all", target="hard") == {(0, 1): -1, (0, 2): 1}
    # Win rates .45, .9, .2: the best of them first, asked for eta/2 however clear it is (1 and 2 were not compared).
    assert margins(pair_selection="best_worst", target="hard") == {}
    P[1, 2] = 0.1
    assert win_rates(places, P, [1, 1, 1]) == pytest.approx({0: 0.45, 1: 0.5, 2: 0.55})
    assert margins(pair_selection="best_worst", target="hard") == {(2, 0): -1}
    assert margins(pair_selection="all", inner_loss="rebel")[0, 1] == pytest.approx(2 * (0.45 - 0.5))


def test_drawn_labels_have_the_soft_target_as_their_mean() -> None:
    drawn, chosen = candidates([1, 1]), COMALSettings(eta=2, pair_selection="all", target="bernoulli")
    found = []
    for seed in range(2000):
        (row,) = targets(select([0, 1], drawn, chosen, seed), {(0, 1): 0.7}, drawn, chosen, seed)
        found.append(row["target_first"] - row["target_second"])
    assert set(found) == {-1.0, 1.0}
    assert np.mean(found) == pytest.approx(2 * 0.2, abs=4 / math.sqrt(2000))


def test_remarks_name_drift_short_steps_and_a_judge_of_positions() -> None:
    fine = {"drift": -0.1, "mass": 0.99, "achieved": 0.9, "judge_disagreement": 0.05, "finished": 1.0}
    assert remarks(fine) == []
    said = " ".join(
        map(str, remarks({"drift": -9, "mass": 0.5, "achieved": 0.01, "judge_disagreement": 0.4, "finished": 0.2}))
    )
    assert all(
        word in said for word in ("-9.0 nats and kept 50 %", "1 % of the target margin", "position", "max_new_tokens")
    )


def test_what_was_reached_is_measured_against_what_was_asked() -> None:
    drawn = candidates([1, 3])
    pairs = [{"first": 0, "second": 1, "weight": 3.0, "target_first": 0.3, "target_second": -0.3}]
    known = {"policy": np.array([-1.0, -2.0]), "reference": np.array([-1.5, -2.0])}
    found = measure(drawn, pairs, known["policy"], known, np.array([-0.7, -2.3]), [])
    assert found["achieved"] == pytest.approx(1)
    assert found["residual"] == pytest.approx(0, abs=1e-12)
    assert found["drift"] == pytest.approx((0.3 - 3 * 0.3) / 4)
    assert found["kl_to_reference"] == pytest.approx(0.5 / 4)
    assert found["mass"] == pytest.approx((math.exp(0.3) + 3 * math.exp(-0.3)) / 4)


@given(seeds, st.integers(2, 5))
def test_what_can_be_reached_is_the_projection_on_differences(seed: int, n: int) -> None:
    draw = np.random.default_rng(seed)
    first, second = np.array([(p + i, p + j) for p in (0, n) for i in range(n) for j in range(i + 1, n)]).T
    weight, wanted, u = draw.random(len(first)) + 0.1, draw.normal(size=len(first)), draw.normal(size=2 * n)
    best = reachable(first, second, weight, wanted)
    # Weighted orthogonality to every difference, and differences themselves are left alone.
    assert weight @ ((wanted - best) * (u[first] - u[second])) == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(reachable(first, second, weight, u[first] - u[second]), u[first] - u[second], atol=1e-9)
    np.testing.assert_allclose(reachable(first, second, weight, best), best, atol=1e-9)


@given(seeds, st.integers(3, 6))
def test_circles_are_counted_one_by_one(seed: int, n: int) -> None:
    draw = np.random.default_rng(seed)
    upper = np.triu(draw.choice([0.0, 0.3, 0.5, 0.8, np.nan], (n, n), p=[0.3, 0.1, 0.1, 0.4, 0.1]), 1)
    P = upper + np.tril(1 - upper.T, -1)
    found = circles = 0
    for i, j, k in combinations(range(n), 3):
        if np.isfinite([P[i, j], P[j, k], P[i, k]]).all():
            found += 1
            circles += (P[i, j] > 0.5 and P[j, k] > 0.5 and P[k, i] > 0.5) or (
                P[j, i] > 0.5 and P[k, j] > 0.5 and P[i, k] > 0.5
            )
    assert cyclic_share([P, P]) == (pytest.approx(circles / found) if found else None)
    scores = draw.normal(size=n)
    assert cyclic_share([1 / (1 + np.exp(-np.subtract.outer(scores, scores)))]) == 0


def test_a_steps_circles_are_those_of_its_verdicts() -> None:
    drawn = candidates([2, 1, 1])
    known = {"policy": np.zeros(3), "reference": np.zeros(3)}
    pairs = [{"first": 0, "second": 1, "weight": 1.0, "target_first": 0.3, "target_second": -0.3}]
    said = [
        {"first": a, "second": b, "preference": p, "disagreement": 0.0}
        for a, b, p in ((0, 1, 0.1), (0, 2, 0.8), (1, 2, 0.1))
    ]
    assert measure(drawn, pairs, np.zeros(3), known, np.zeros(3), said)["cyclic"] == 1
    assert measure(drawn, pairs, np.zeros(3), known, np.zeros(3), said[:2])["cyclic"] is None


# --- the policy ---------------------------------------------------------------------------------------------------


def test_scores_are_the_models_log_probabilities(trained_start: Any) -> None:
    import torch

    policy = copy_of(trained_start)
    rows = [([3], [5, 1]), ([4, 3], [6]), ([4], [7, 5, 1])]
    found = policy.log_probs([p for p, _ in rows], [a for _, a in rows], QUICK)
    with torch.no_grad():
        for value, (prompt, answer) in zip(found, rows, strict=True):
            log_p = policy.model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            naive = sum(float(log_p[len(prompt) + k - 1, token]) for k, token in enumerate(answer))
            assert value == pytest.approx(naive, abs=1e-5)
    p, mass = distribution(policy)
    np.testing.assert_allclose(p, [START, START], atol=0.01)
    np.testing.assert_allclose(mass, 1, atol=0.01)


def test_answers_are_drawn_from_the_policy_and_by_the_seed_alone(trained_start: Any) -> None:
    import torch

    policy = copy_of(trained_start)
    chosen = COMALSettings(eta=1, num_candidates=1500, max_new_tokens=2)
    policy.model.generation_config.top_k = 1  # a checkpoint's default must not change what is drawn
    first = policy.sample([[3], [4]], chosen, 7)
    torch.manual_seed(99)
    assert policy.sample([[3], [4]], chosen, 7) == first
    assert policy.sample([[3], [4]], chosen, 8) != first
    for answers in first:
        share = [sum(a.text.strip() == name for a in answers) / len(answers) for name in ANSWERS]
        np.testing.assert_allclose(share, START, atol=4 * math.sqrt(0.25 / 1500))
        assert all(a.finished == (a.tokens[-1] == 1) for a in answers)


@pytest.mark.parametrize("loss", ["inpo", "sppo", "dpo"])
@pytest.mark.parametrize("normalise", [False, True])
def test_one_small_step_follows_the_gradient_of_the_loss_as_written(
    trained_start: Any, loss: Any, normalise: bool, tmp_path: Path
) -> None:
    import torch

    policy, other = copy_of(trained_start), copy_of(trained_start)
    rate = 1e-3
    chosen = COMALSettings(
        eta=1, inner_loss=loss, learning_rate=rate, epochs=1, batch_size=8, clip=0.0, schedule="constant",
        length_normalize=normalise, anchor_nll=0.1,
    )  # fmt: skip
    rows = [
        TrainRow([3], [5, 1], [6, 1], (-1.0, -0.5), 2.0, (0.3, -0.3)),
        TrainRow([4], [7, 5, 1], [6, 1], (-3.0, -1.0), 1.0, (0.1, -0.2)),
    ]
    policy.train(rows, chosen, 0, tmp_path / "policy")
    model, total = other.model, torch.zeros(())
    for row in rows:
        d, nll = [], torch.zeros(())
        for answer, v in zip((row.first, row.second), row.reference, strict=True):
            log_p = model(input_ids=torch.tensor([row.prompt + answer])).logits[0].log_softmax(-1)
            log_pi = sum(log_p[len(row.prompt) + k - 1, token] for k, token in enumerate(answer))
            d.append((log_pi - v) / (len(answer) if normalise else 1))
            nll = nll - log_pi / 2
        if loss == "sppo":
            value = ((d[0] - row.target[0]) ** 2 + (d[1] - row.target[1]) ** 2) / 2
        elif loss == "dpo":
            p = 0.5 + (row.target[0] - row.target[1]) / 1
            value = -p * torch.log(torch.sigmoid(d[0] - d[1])) - (1 - p) * torch.log(torch.sigmoid(d[1] - d[0]))
        else:
            value = (d[0] - d[1] - (row.target[0] - row.target[1])) ** 2
        total = total + row.weight / 1.5 * (value + 0.1 * nll) / 2
    total.backward()
    # The first step of Adam is rate * g / (|g| + 1e-8): it tells every sign, and of larger gradients the step itself.
    for (name, moved), (_, p) in zip(policy._trained(), other._trained(), strict=True):
        if p.grad is None:
            continue
        clear = p.grad.abs() > 1e-4
        step = (moved - p).detach()
        assert torch.allclose(step[clear], -rate * p.grad[clear].sign(), rtol=2e-3, atol=1e-6), name


@pytest.mark.parametrize("lora", [None, LowRank(rank=4, alpha=8, targets=("q_proj", "v_proj", "down_proj"))])
def test_weights_come_back_and_training_leaves_the_model_as_it_was_but_for_them(
    trained_start: Any, lora: Any, tmp_path: Path
) -> None:
    policy = copy_of(trained_start, lora=lora)
    policy.save(tmp_path / "start")
    before, digest = distribution(policy)[0], policy.digest
    rows = [TrainRow([3], [5, 1], [6, 1], (-1.6, -0.7), 1.0, (0.5, -0.5))]
    chosen = COMALSettings(eta=2, learning_rate=5e-3, epochs=20, batch_size=1)
    policy.train(rows, chosen, 0, tmp_path / "policy")
    moved = distribution(policy)[0]
    assert moved[0, 0] / moved[0, 1] > 1.3 * before[0, 0] / before[0, 1]
    assert "forward" not in vars(policy._base)
    if lora:
        assert set(policy.model.peft_config) == {"default"}
    policy.load(tmp_path / "start")
    assert policy.digest == digest
    np.testing.assert_array_equal(distribution(policy)[0], before)
    policy.train(rows, chosen, 0, tmp_path / "policy")
    np.testing.assert_array_equal(distribution(policy)[0], moved)  # the same seed, the same weights


def test_a_policy_is_exported_as_a_model_that_loads(trained_start: Any, tmp_path: Path) -> None:
    policy = copy_of(trained_start)
    policy.export(tmp_path / "model")
    loaded = load_policy(tmp_path / "model", template="continuation", device="cpu")
    np.testing.assert_allclose(distribution(loaded)[0], distribution(policy)[0], atol=NETWORK)
    adapted = load_policy(tmp_path / "model", template="continuation", device="cpu", lora=LowRank(2, 4, ("q_proj",)))
    policy.save(tmp_path / "weights")
    with pytest.raises(CoalaError, match="weights of another model"):
        adapted.load(tmp_path / "weights")
    with pytest.raises(CoalaError):
        load_policy(tmp_path / "nothing")
    with pytest.raises(CoalaError, match="LoRA does not fit"):
        load_policy(tmp_path / "model", device="cpu", lora=LowRank(2, 4, ("no_such_module",)))


# --- the loop -----------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def whole_run(trained_start: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("comal") / "whole"
    policy = copy_of(trained_start)
    steps = run_comal(policy, EXAMPLES, from_table(GAME), QUICK, folder)
    assert [(s.outer, s.inner) for s in steps] == [(1, 1), (2, 1)]
    assert policy.digest != copy_of(trained_start).digest
    return policy, steps, folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage",
    [
        pytest.param("sample", marks=pytest.mark.nightly),
        "log_probs",
        "train",
        pytest.param("save", marks=pytest.mark.nightly),
    ],
)
def test_a_killed_run_goes_on_to_the_same_pairs_and_weights(
    trained_start: Any, whole_run: Any, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle, (whole, steps, folder) = from_table(GAME), whole_run
    broken, calls = copy_of(trained_start), []
    after = {"sample": 1, "log_probs": 3, "train": 1, "save": 2}[stage]
    own = getattr(broken, stage)

    def killed(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) > after:
            raise Killed
        return own(*args, **options)

    monkeypatch.setattr(broken, stage, killed)
    with pytest.raises(Killed):
        run_comal(broken, EXAMPLES, oracle, QUICK, tmp_path / "part")
    again = copy_of(trained_start)
    assert [s.log for s in run_comal(again, EXAMPLES, oracle, QUICK, tmp_path / "part")] == [s.log for s in steps]
    assert again.digest == whole.digest
    for file in sorted(folder.rglob("*.jsonl")):
        assert file.read_bytes() == (tmp_path / "part" / file.relative_to(folder)).read_bytes()

    def nothing(*_: Any, **__: Any) -> Any:
        raise AssertionError("a finished stage was done again")

    idle = copy_of(trained_start)
    for name in ("sample", "log_probs", "train", "save"):
        monkeypatch.setattr(idle, name, nothing)
    run_comal(idle, EXAMPLES, oracle, QUICK, tmp_path / "part")
    assert idle.digest == whole.digest


def test_a_run_of_other_settings_or_without_verdicts_is_refused(trained_start: Any, tmp_path: Path) -> None:
    policy = copy_of(trained_start)
    silent = from_callable(lambda *_: None, "silent")
    with pytest.raises(CoalaError, match=r"Found no pair to train on: .* 'silent' has no verdict"):
        run_comal(policy, EXAMPLES, silent, QUICK, tmp_path / "run")
    with pytest.raises(CoalaError, match="oracle: silent -> table"):
        run_comal(policy, EXAMPLES, from_table(GAME), QUICK, tmp_path / "run")
    with pytest.raises(CoalaError, match="no prompts"):
        run_comal(policy, [], silent, QUICK, tmp_path / "other")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "lora"),
    [
        ("inpo", None),
        # Their gradients are tested above, step by step.
        pytest.param("rebel", None, marks=pytest.mark.nightly),
        pytest.param("dro", None, marks=pytest.mark.nightly),
        pytest.param("sppo", None, marks=pytest.mark.nightly),
        ("inpo", LowRank(8, 16, ("q_proj", "v_proj", "up_proj", "down_proj"))),
    ],
)
def test_one_step_of_every_loss_is_the_proximal_step(trained_start: Any, loss: Any, lora: Any, tmp_path: Path) -> None:
    policy = copy_of(trained_start, lora=lora)
    rate = EXACT.learning_rate if lora is None else 1e-2
    chosen = replace(EXACT, inner_loss=loss, outer_steps=1, inner_steps=1, learning_rate=rate)
    (step,) = run_comal(policy, EXAMPLES, from_table(GAME), chosen, tmp_path / "run")
    for p, P in zip(distribution(policy)[0], GAME.matrices, strict=True):
        exact = START * np.exp(2 * P @ START)
        np.testing.assert_allclose(p, exact / exact.sum(), atol=0.05)
    assert step.log["achieved"] > 0.8


@given(seeds, st.floats(1e-4, 0.05))
@settings(max_examples=20)
def test_the_anchor_shortens_a_small_step_by_a_quarter_of_its_weight(seed: int, a: float) -> None:
    draw = np.random.default_rng(seed)
    mu = draw.dirichlet(np.full(4, 5.0))
    small = draw.normal(size=4) * 1e-3
    small -= mu @ small

    def loss(x: Any) -> Any:
        log_p = x - np.log(np.exp(x).sum())
        e = log_p - np.log(mu) - small
        p = np.exp(log_p)
        grad = 4 * mu * (e - mu @ e) - a * mu  # of log p
        return 2 * (mu @ e**2 - (mu @ e) ** 2) - a * (mu @ log_p), grad - p * grad.sum()

    found = minimize(loss, np.log(mu), jac=True, method="BFGS", options={"gtol": 1e-13}).x
    d = found - np.log(mu)
    d -= mu @ d
    np.testing.assert_allclose(d, small / (1 + a / 4), atol=2e-3 * a * 1e-3 + 2e-8)


# One inner step a fast run, six the whole.
INNER = pytest.mark.parametrize("inner", [1, pytest.param(6, marks=pytest.mark.nightly)])


@pytest.mark.slow
@INNER
def test_the_anchor_keeps_the_mass_that_pair_losses_lose(trained_start: Any, tmp_path: Path, inner: int) -> None:
    policy = copy_of(trained_start)
    chosen = replace(EXACT, ref_weight=0.0, tau=None, outer_steps=1, inner_steps=inner, anchor_nll=0.1)
    run_comal(policy, EXAMPLES, from_table(GAME), chosen, tmp_path / "run")
    p, mass = distribution(policy)
    assert mass.min() > 0.995  # 0.93 to 0.95 without
    exact = solve(GAME, {"q1": START, "q2": START}, method="ipo", eta=2.0, outer=inner).policy
    np.testing.assert_allclose(p, [exact["q1"], exact["q2"]], atol=0.08)


@pytest.mark.slow
@INNER
def test_two_outer_updates_are_those_of_the_closed_form(trained_start: Any, tmp_path: Path, inner: int) -> None:
    policy, settings = copy_of(trained_start), replace(EXACT, inner_steps=inner)
    found = []

    def look(step: Any) -> None:
        if step.inner == inner:
            found.append(distribution(policy)[0])

    steps = run_comal(policy, EXAMPLES, from_table(GAME), settings, tmp_path / "run", on_step=look)
    plan: dict[str, Any] = {"inner": "md", "eta": 2.0, "tau": 1 / 6, "inner_steps": inner}
    for outer, p in enumerate(found, 1):
        exact = solve(GAME, {"q1": START, "q2": START}, outer=outer, **plan).policy
        np.testing.assert_allclose(p, [exact["q1"], exact["q2"]], atol=0.06)
    if inner == 6:
        np.testing.assert_allclose(
            [exact["q1"], exact["q2"]], [[0.3525, 0.1968, 0.4507], [0.0899, 0.3791, 0.5310]], atol=1e-4
        )
    # Pair losses do not hold the mass of what was sampled; it seeps to words that never came up.
    # Over five seeds and three kernels (AVX-512, AVX2, none) 0.973 or more remained after two steps (0.895 after six on
    # AVX2); no answer was further off than 0.027, no step reached less than 0.979 of what it was asked for.
    assert distribution(policy)[1].min() > (0.93 if inner == 1 else 0.75)
    assert min(step.log["achieved"] for step in steps) > 0.8
    log = json.loads((tmp_path / f"run/outer-02/inner-{inner:02}/log.json").read_text())
    assert log == steps[-1].log
