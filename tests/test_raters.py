"""Raters: the program against CVXPY and its laws, the level by permutation, slopes, verdicts, and a run's own heads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from typer.testing import CliRunner

from coala import load_run
from coala.alignment import evidence_notes, make_report
from coala.alignment.checks import check_settings
from coala.cli import app
from coala.convex.held import HeldProgram
from coala.convex.prox import group_soft_threshold
from coala.convex.raters import RaterFit, Raters
from coala.convex.raters_agreement import agreements, slope_intervals
from coala.decoding import Guidance
from coala.receipts import forget_pairs, rater_effects, rater_effects_of
from coala.recipe import load_recipe, recipe_of
from coala.store import (
    RunFolder,
    StoreError,
    head_for,
    head_stamp,
    load_features,
    load_head,
    load_json,
    load_pairs,
    save_features,
    save_head,
    save_json,
    save_pairs,
)
from coala.values import CoalaError, FeatureSet, Pair, user

from . import reference
from .menagerie_convex import pairs_of
from .test_influence import data, solved

RATERS = 3


@lru_cache
def member() -> np.ndarray:
    """Numbers of three raters; five pairs are of nobody."""
    drawn = np.random.default_rng(1).integers(0, RATERS, len(data()[0]))
    drawn[:5] = -1
    return drawn


@lru_cache
def raters(gated: bool = False) -> Raters:
    train, _ = data()
    gates = np.random.default_rng(0).standard_normal((3, train.width + 1)) if gated else None
    return Raters.of(HeldProgram.of(train, solved(train, gates=gates)), member(), RATERS)


def at(share: float, gated: bool = False) -> RaterFit:
    return raters(gated).fit(share * raters(gated).largest_level)


# --- the program -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.8, 0.3, 0.0])
def test_the_optimum_is_that_of_cvxpy(share: float) -> None:
    found, task = at(share), raters()
    program = task.program
    value, w, deviations = reference.solve_raters(
        program.rows, task.member, program.margin, program.ridge, found.level * task.shares
    )
    assert found.lower - 1e-9 <= value <= found.objective + 1e-9
    assert found.relative_gap < 1e-8
    # The objective is strongly convex: what is left of the gap bounds the distance.
    apart = np.sqrt(2 * 1e-8 / program.ridge)
    assert np.linalg.norm(found.weights - w) < apart
    for rater in range(RATERS):
        assert np.linalg.norm(found.of(rater) - found.weights - deviations[rater]) < apart


def test_above_the_largest_level_all_have_the_head_itself() -> None:
    found, task = at(1.0), raters()
    assert not len(found.own)
    assert found.weights == pytest.approx(task.held.solve(task.held.saved), abs=1e-9)
    alone = reference.ridge_bradley_terry(task.program.rows, task.program.ridge)
    assert found.weights == pytest.approx(alone, abs=1e-6)
    just_below = at(0.999)
    assert just_below.own.tolist() == [int(np.argmax(found.norms))]


def test_without_a_level_each_deviation_is_a_ridge_fit_of_its_own() -> None:
    found, task = at(0.0), raters()
    rows, ridge, n = task.program.rows, task.program.ridge, len(task.member)
    for rater in range(RATERS):
        own = rows[task.member == rater]
        before = own @ found.weights

        def loss(d: np.ndarray, own: np.ndarray = own, before: np.ndarray = before) -> float:
            return float(np.logaddexp(0, -before - own @ d).sum() / n + ridge / 2 * d @ d)

        alone = minimize(loss, np.zeros(rows.shape[1]), tol=1e-14).x
        assert found.of(rater) - found.weights == pytest.approx(alone, abs=1e-4)


def test_a_deviation_is_a_fixed_point_of_the_proximal_step() -> None:
    found, task = at(0.5), raters()
    rows, step = task.program.rows, 0.7
    pull = task.program.even / (1 + np.exp(found.margins(rows, task.member)))
    for rater in range(RATERS):
        d = found.of(rater) - found.weights
        slope = -(rows * pull[:, None])[task.member == rater].sum(axis=0)
        level = float(found.level * task.shares[rater])
        moved = group_soft_threshold(jnp.asarray((d - step * slope)[:, None]), step * level)[:, 0]
        assert np.asarray(moved) / (1 + step * task.program.ridge) == pytest.approx(d, abs=2e-5)
        assert (np.linalg.norm(slope) <= level * (1 + 1e-6)) == (not d.any())


def test_names_are_no_matter() -> None:
    task, other = raters(), np.array([2, 0, 1])
    renamed = np.where(member() >= 0, other[np.maximum(member(), 0)], -1)
    found = at(0.3)
    again = replace(task, member=renamed).fit(found.level)
    for rater in range(RATERS):
        assert again.of(int(other[rater])) == pytest.approx(found.of(rater), abs=1e-6)


def test_gates_are_held_and_the_shared_optimum_stays_the_head() -> None:
    task = raters(gated=True)
    assert task.stretch * task.shared == pytest.approx(task.held.solve(task.held.saved), abs=1e-8)
    assert task.head(task.shared).linear == pytest.approx(task.held.design.head.linear, abs=1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("share", [0.6, 0.1])
def test_gated_heads_deviate_as_cvxpy_says(share: float) -> None:
    found, task = at(share, gated=True), raters(gated=True)
    program = task.program
    value, _, _ = reference.solve_raters(
        program.rows, task.member, program.margin, program.ridge, found.level * task.shares
    )
    assert len(found.own)
    assert found.lower - 1e-8 <= value <= found.objective + 1e-8


# --- the level ---------------------------------------------------------------------------------------------------


def test_one_rater_is_the_plain_fit() -> None:
    task = replace(raters(), member=np.zeros(len(member()), int), count=1)
    level, _ = task.null_level(np.arange(len(member())))
    assert level == pytest.approx(task.largest_level, rel=1e-6)
    found = task.fit(level)
    assert not len(found.own)
    assert found.weights == pytest.approx(task.shared)


@pytest.mark.parametrize("within", [False, True])
def test_exchangeable_raters_exceed_the_level_once_in_twenty(within: bool) -> None:
    task, n = raters(), len(member())
    group = np.arange(n) // 2 if within else np.arange(n)
    both = np.tile([0, 1], n // 2)
    task = replace(task, member=both, count=2)
    level, exchanged = task.null_level(group, seed=5)
    assert exchanged == within
    rng, draws = np.random.default_rng(9), 400
    exceeded = 0
    for _ in range(draws):
        drawn = np.concatenate([rng.permutation(2) for _ in range(n // 2)]) if within else rng.permutation(both)
        exceeded += replace(task, member=drawn).largest_level > level
    # The level is itself drawn from 199: a share of 0.05 with a deviation of 0.015, and of 0.011 for these draws.
    assert exceeded / draws < 0.05 + 4 * np.hypot(0.015, 0.011)


# --- agreement ---------------------------------------------------------------------------------------------------


def brute_interval(margins: np.ndarray, z: float) -> tuple[float, float]:
    grid = np.linspace(-20, 20, 40_001)
    losses = np.logaddexp(0, -np.outer(grid, margins)).sum(axis=1)
    inside = grid[losses - losses.min() <= z**2 / 2]
    return float(inside[0]), float(inside[-1])


def test_an_interval_is_that_of_the_likelihood() -> None:
    rng = np.random.default_rng(0)
    margins = rng.standard_normal(40) + 0.5
    found = slope_intervals(margins, np.zeros(40, int), 1, np.arange(40), 0.05)
    low, high = brute_interval(margins, 1.959964)
    assert (found.low[0], found.high[0]) == pytest.approx((low, high), abs=2e-3)
    mirrored = slope_intervals(-margins, np.zeros(40, int), 1, np.arange(40), 0.05)
    assert (mirrored.low[0], mirrored.high[0]) == pytest.approx((-high, -low), abs=2e-3)
    scaled = slope_intervals(3 * margins, np.zeros(40, int), 1, np.arange(40), 0.05)
    assert scaled.slope[0] == pytest.approx(found.slope[0] / 3)


def test_choices_said_twice_are_one_choice() -> None:
    rng = np.random.default_rng(0)
    margins = rng.standard_normal(60) + 0.5
    once = slope_intervals(margins, np.zeros(60, int), 1, np.arange(60), 0.05)
    twice = slope_intervals(np.tile(margins, 2), np.zeros(120, int), 1, np.tile(np.arange(60), 2), 0.05)
    assert twice.slope[0] == pytest.approx(once.slope[0])
    assert twice.low[0] <= once.low[0]
    assert twice.high[0] >= once.high[0]


@pytest.mark.parametrize(
    ("margins", "group"),
    [([1.0], [0]), ([1.0, 2.0, 3.0], [0, 0, 0]), ([0.0, 0.0], [0, 1]), ([1e-300, 1e-300], [0, 1])],
)
def test_what_cannot_be_told_has_the_whole_line(margins: Sequence[float], group: Sequence[int]) -> None:
    found = slope_intervals(np.array(margins), np.zeros(len(margins), int), 1, np.array(group), 0.05)
    assert (found.low[0], found.high[0]) == (-np.inf, np.inf)


SIZES = {"good": 80, "as good": 80, "reversed": 60, "random": 110, "good too": 80, "few": 4, "one": 1}


@lru_cache
def planted() -> tuple[FeatureSet, np.ndarray]:
    """Pairs that a linear reward ranks, but for those of two raters; and whose they are."""
    rng = np.random.default_rng(4)
    names = rng.permutation(np.repeat(list(SIZES), list(SIZES.values())))
    direction = rng.standard_normal(4)
    both = pairs_of(lambda x: 3 * x @ direction, len(names), 4, rng, per_group=1, shift=1.0)
    flipped = (names == "reversed") | ((names == "random") & (rng.random(len(names)) < 0.5))
    chosen = np.where(flipped[:, None], both.rejected, both.chosen)
    rejected = np.where(flipped[:, None], both.chosen, both.rejected)
    return replace(both, chosen=chosen, rejected=rejected), names


def test_planted_raters_are_found_and_those_with_few_choices_are_not_judged() -> None:
    features, names = planted()
    listed = sorted(SIZES)
    number = np.array([listed.index(name) for name in names])
    task = Raters.of(HeldProgram.of(features, solved(features, 0.03)), number)
    found = dict(zip(listed, agreements(task, features.group), strict=True))
    verdicts = {name: one.verdict for name, one in found.items()}
    assert verdicts == {
        **dict.fromkeys(("good", "as good", "good too"), "consistent"),
        "reversed": "reversed",
        "random": "random",
        "few": "undecided",
        "one": "undecided",
    }
    assert all(one.n == SIZES[name] for name, one in found.items())
    assert "too few" in found["few"].why
    for one in found.values():
        assert one.low_all <= one.low <= one.slope <= one.high <= one.high_all
    assert found["reversed"].share.high < 0.5 < found["good"].share.low


def test_of_noise_nobody_is_judged() -> None:
    rng = np.random.default_rng(8)
    features = pairs_of(lambda x: 0 * x[..., 0], 200, 4, rng, per_group=1)
    coin = rng.random(200) < 0.5
    chosen = np.where(coin[:, None], features.rejected, features.chosen)
    rejected = np.where(coin[:, None], features.chosen, features.rejected)
    noise = replace(features, chosen=chosen, rejected=rejected)
    task = Raters.of(HeldProgram.of(noise, solved(noise)), rng.integers(0, 4, 200))
    assert {one.verdict for one in agreements(task, noise.group)} == {"undecided"}


# --- runs --------------------------------------------------------------------------------------------------------

STRANGE = "\u00fc/../\u6f22\u5b57 " * 40


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the planted pairs: one rater has a strange name, one pair names nobody, one rater is held out only."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "run")
    features, names = planted()
    names = [STRANGE if name == "good too" else str(name) for name in names]
    names[int(np.flatnonzero(np.array(names) == "good")[0])] = ""
    fit_on = len(names) - 20
    names[-1] = "held out only"
    pairs = [
        Pair(user(f"what is {i}?"), f"one {i}", f"other {i}", f"g{i}", name, "ab"[i % 2])
        for i, name in enumerate(names)
    ]
    features = replace(features, group=np.array([f"g{i}" for i in range(len(names))]))
    recipe = load_recipe(None, {"pairs": ["pairs.jsonl"], "model": {"name": "no-model"}}, {})
    folder.start(recipe.plain())
    for name, rows in (("train", range(fit_on)), ("eval", range(fit_on, len(names)))):
        save_pairs(folder.path / f"pairs-{name}.jsonl", [pairs[i] for i in rows])
        save_features(folder.path / "features" / name, features.take(np.array(rows)))
    head = solved(load_features(folder.path / "features/train"), 0.03)
    save_head(folder.path / "head", head)
    save_json(folder.path / "head/fit.json", {"path": [], "history": [], "linear": head.linear})
    told = {"seconds": 0.0, "findings": [], "reads": []}
    folder.finish("pairs", {"pairs": ["the source"]}, ["pairs-train.jsonl", "pairs-eval.jsonl"], told)
    return folder.path


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def test_sources_are_compared_shown_and_kept_beside_the_head(run: Path) -> None:
    result = CliRunner().invoke(app, ["fit", str(run), "--by", "source"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])["raters"]
    assert {row["name"]: row["verdict"] for row in found["rows"]} == {"a": "consistent", "b": "consistent"}
    assert found["deviating"] == 0
    assert "2 sources: 2 consistent" in result.stdout
    assert load_json(run / "receipts/raters-by-source.json")["head"]
    # Nobody deviates: theirs is the run's head, to the byte.
    assert head_for(run / "head", "a").linear.tobytes() == load_head(run / "head").linear.tobytes()


def test_a_run_is_compared_with_the_head_it_has(run: Path, tmp_path: Path) -> None:
    for more in (["--out", str(tmp_path / "head")], ["--method", "linear"], ["--seed", "3"]):
        result = CliRunner().invoke(app, ["fit", str(run), "--by", "source", *more])
        assert "its head exists" in str(result.exception) + result.output


def test_a_head_of_a_rater_is_told(run: Path) -> None:
    head = load_head(run / "head")
    (told,) = evidence_notes(run, head, Guidance(rater="r7"))
    assert "'r7'" in told
    assert "unguided" in evidence_notes(run, replace(head, least_slope=0.0), Guidance(rater="r7"))[1]
    assert not any("r7" in note for note in evidence_notes(run, head, Guidance()))
    with pytest.raises(CoalaError, match="a name"):
        Guidance(rater="")


def test_raters_without_names_or_company_are_told_so(run: Path) -> None:
    pairs = load_pairs(run / "pairs-train.jsonl")
    held_out = load_pairs(run / "pairs-eval.jsonl")
    for name, match in (("", "no pair that names its rater"), ("only", "one rater only")):
        save_pairs(run / "pairs-train.jsonl", [replace(pair, rater=name) for pair in pairs])
        save_pairs(run / "pairs-eval.jsonl", [replace(pair, rater=name) for pair in held_out])
        result = CliRunner().invoke(app, ["fit", str(run), "--by", "rater"])
        assert result.exit_code != 0
        assert match in str(result.exception) + result.output
    assert not (run / "head/raters.json").exists()


@pytest.mark.nightly
def test_a_rater_that_deviates_has_a_head_of_its_own(run: Path) -> None:
    make_report(RunFolder(run))
    result = CliRunner().invoke(app, ["fit", str(run), "--by", "rater"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])["raters"]
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["reversed"]["deviates"]
    assert rows["reversed"]["own_head"]["difference"]["low"] > 0
    assert rows["held out only"]["pairs"] == 0
    assert rows["held out only"]["verdict"] == "undecided"
    assert found["unnamed"] == 1
    assert "rater reversed: chose the opposite of the others in" in result.stdout
    page = (run / "report.html").read_text()
    assert "Who agrees with whom, by rater" in page
    assert "rater reversed: chose the opposite of the others in" in page
    head, own, strange = load_head(run / "head"), head_for(run / "head", "reversed"), head_for(run / "head", STRANGE)
    features = load_features(run / "features/train")
    mine = np.array([pair.rater == "reversed" for pair in load_pairs(run / "pairs-train.jsonl")])
    assert (own.margins(features)[mine] > 0).mean() > 0.6 > 0.4 > (head.margins(features)[mine] > 0).mean()
    assert (strange.margins(features)[mine] > 0).mean() < 0.4
    assert own.certificate is not None
    assert own.certificate.relative_gap < 1e-6
    assert rows["random"]["deviates"] or head_for(run / "head", "random").evidence == 0
    # The recipe names the rater, and the run is that rater's.
    stamp = head_stamp(run / "head", None)
    settings = load_json(run / "run.json")
    settings["guidance"]["rater"] = "reversed"
    save_json(run / "run.json", settings)
    assert load_run(run).head.linear.tobytes() == own.linear.tobytes()
    assert head_stamp(run / "head", "reversed") not in (stamp, head_stamp(run / "head", STRANGE))
    # What was forgotten is in none of them.
    forget_pairs(run, raters=["few"])
    assert not (run / "head/raters.json").exists()
    assert not (run / "receipts/raters-by-rater.json").exists()


def test_an_unknown_rater_is_told_the_nearest_names(run: Path) -> None:
    with pytest.raises(StoreError, match=r"no heads of raters.*coala fit RUN --by rater"):
        head_for(run / "head", "a")
    rater_effects(run, by="group")
    for asked, match in (("g 12", "'g12'"), ("G7", "'g7'"), ("\u00fc" * 500, "g0")):
        with pytest.raises(StoreError, match=f"found no rater.*{match}") as raised:
            head_for(run / "head", asked)
        assert len(str(raised.value)) < 400 + len(str(run))
    again = load_head(run / "head")
    save_head(run / "head", replace(again, linear=again.linear * 2))
    with pytest.raises(StoreError, match="another head"):
        head_for(run / "head", "g1")


def test_a_run_cannot_begin_by_the_head_of_a_rater(tmp_path: Path) -> None:
    recipe = recipe_of(
        {"pairs": ["p.jsonl"], "model": {"name": "no-model"}, "guidance": {"rater": "r1"}}, tmp_path / "recipe"
    )
    with pytest.raises(StoreError, match="no heads of raters"):
        check_settings(recipe, RunFolder(tmp_path / "new"))


def test_features_alone_know_their_groups_and_pairs_the_rest(run: Path, tmp_path: Path) -> None:
    features = tmp_path / "features"
    save_features(features, load_features(run / "features/train"))
    save_head(tmp_path / "head", load_head(run / "head"))
    found = rater_effects_of(features, tmp_path / "head", by="group")
    assert len(found["rows"]) == len(load_pairs(run / "pairs-train.jsonl"))
    with pytest.raises(CoalaError, match="--pairs"):
        rater_effects_of(features, tmp_path / "head", by="source")
    with pytest.raises(CoalaError, match="found 20 pairs"):
        rater_effects_of(features, tmp_path / "head", by="source", pairs=run / "pairs-eval.jsonl")
    given = rater_effects_of(features, tmp_path / "head", by="source", pairs=run / "pairs-train.jsonl")
    own: Any = rater_effects_of(run / "features/train", run / "head", by="source")
    assert given["rows"] == own["rows"]
    assert load_json(tmp_path / "head/raters-by-source.json")["kind"] == "raters"


@pytest.mark.nightly
def test_ten_thousand_raters_with_a_choice_each() -> None:
    rng = np.random.default_rng(2)
    features = pairs_of(lambda x: 3 * x[..., 0], 10_000, 4, rng, per_group=1, shift=1.0)
    task = Raters.of(HeldProgram.of(features, solved(features)), np.arange(10_000))
    level, _ = task.null_level(np.arange(10_000))
    assert not len(task.fit(level).own)
    assert {one.verdict for one in agreements(task, features.group)} == {"undecided"}
