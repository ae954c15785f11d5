"""The layer that is read: the lowest that is as good where the sample can tell, else the last; never dear."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from coala.alignment import layer_choice
from coala.alignment.layer_choice import LayerChoice, _judged, choose_layer
from coala.backbone import LanguageModel, load_backbone
from coala.cli import app
from coala.convex import fit
from coala.convex.validation import HeldOut
from coala.features import extract, survey
from coala.store import load_features, load_json
from coala.values import Pair, user

from .menagerie import tiny_backbone
from .test_align import pair_rows, write_rows

LAYERS = [1, 2, 3, 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def backbone(folder: Path) -> LanguageModel:
    return load_backbone(folder)


def some_pairs(n: int, groups: int) -> list[Pair]:
    return [
        Pair(user(row["prompt"]), row["chosen"], row["rejected"], f"g{i % groups}")
        for i, row in enumerate(pair_rows(n, groups))
    ]


# --- the rule ----------------------------------------------------------------------------------------------------


def held_out(rates: list[float], n: int, spread: float, seed: int = 0) -> tuple[list[HeldOut], np.ndarray]:
    """Held-out margins of layers, normal about their own mean, of pairs that all layers find easy or hard alike."""
    draw = np.random.default_rng(seed)
    common, group = draw.normal(size=n), np.array([f"g{i}" for i in range(n)])
    margins = [mean + common + spread * draw.normal(size=n) for mean in rates]
    return [HeldOut.of(row, np.zeros(n), group) for row in margins], group


def test_the_lowest_within_the_noise_of_the_best_is_taken() -> None:
    rows, group = held_out([0.0, 1.5, 1.51, 1.5], 2000, 0.05)
    chosen, why, scores = _judged(LAYERS, rows, group, 4)
    best = min(score.nll for score in scores)
    as_good = [score for score in scores if score.excess <= score.excess_error]
    assert all(score.excess == pytest.approx(score.nll - best) for score in scores)
    assert chosen == as_good[0].layer > 1
    assert "within one standard error" in why
    assert scores[chosen - 1].nll < math.log(2)


def test_where_all_are_alike_the_last_is_taken() -> None:
    rows, group = held_out([1.5] * 4, 2000, 0.0)
    chosen, why, _ = _judged(LAYERS, rows, group, 4)
    assert (chosen, why) == (4, "the last: all layers are within one standard error of the best")


@pytest.mark.parametrize("seed", range(20))
def test_of_noise_the_last_is_taken(seed: int) -> None:
    """Margins without a sign that means anything: one of many layers always looks a little better than a coin."""
    rows, group = held_out([0.0] * 8, 100, 1.0, seed)
    chosen, why, _ = _judged(list(range(1, 9)), rows, group, 8)
    assert chosen == 8
    assert why.startswith("the last: ")


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("mean", [0.0, 0.2, 0.5, 2.0])
def test_what_is_picked_is_better_than_a_coin(mean: float, seed: int) -> None:
    rows, group = held_out([mean, -mean, mean / 2, mean / 4], 150, 0.5, seed)
    chosen, why, scores = _judged(LAYERS, rows, group, 4)
    assert why.startswith("the last") or scores[LAYERS.index(chosen)].nll < math.log(2)


# --- the sample --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "groups"), [(0.0, 60), (0.1, 7), (0.37, 60), (1.0, 1)])
def test_the_sample_never_takes_more_than_its_share(
    backbone: LanguageModel, monkeypatch: pytest.MonkeyPatch, share: float, groups: int
) -> None:
    monkeypatch.setattr(layer_choice, "FEWEST_PAIRS", 4)
    monkeypatch.setattr(layer_choice, "FEWEST_GROUPS", 2)
    pairs = some_pairs(60, groups)
    whole = survey(pairs, backbone, backbone.spec()).facts["tokens"]
    tokens: list[int] = []
    found = choose_layer(
        pairs, backbone, backbone.spec(), layers=[1, 2], share=share, on_batch=lambda d, total, t: tokens.append(t)
    )
    assert max(tokens, default=0) <= share * whole
    assert found.share == pytest.approx(max(tokens, default=0) / whole)
    if not tokens:
        assert (found.layer, found.scores, found.pairs) == (2, (), 0)
        assert "too few to compare layers" in str(found)
    assert found == choose_layer(pairs, backbone, backbone.spec(), layers=[1, 2], share=share)


def test_few_pairs_mean_the_last_layer_at_no_cost(backbone: LanguageModel) -> None:
    found = choose_layer(some_pairs(150, 150), backbone, backbone.spec())
    assert found.layer == found.n_layers == backbone.n_layers
    assert (found.pairs, found.share) == (0, 0.0)
    said = (
        r"--layer auto: layer 2 of 2, the last: 10 % of the tokens are 1\d pairs in 1\d groups, too few to compare .*"
    )
    assert re.fullmatch(
        said.replace(" 2 ", f" {found.n_layers} ").replace("of 2,", f"of {found.n_layers},"), str(found)
    )


def test_one_pass_says_what_each_layer_by_itself_says(backbone: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_choice, "FEWEST_PAIRS", 10)
    pairs, spec = some_pairs(60, 20), backbone.spec()
    # Groups are counted as if they shared nothing with each other: more than all of it fits all.
    found = choose_layer(pairs, backbone, spec, share=3.0)
    assert [score.layer for score in found.scores] == list(range(1, backbone.n_layers + 1))
    assert found.scores[-1].cost == 1.0
    assert [score.layer for score in found.scores if score.chosen] == [found.layer]
    assert (found.pairs, found.share) == (60, 1.0)
    alone = fit(extract(pairs, backbone, backbone.spec(layer=1)), method="linear").held_out
    assert alone is not None
    assert found.scores[0].nll == pytest.approx(alone.loss, rel=1e-3)


def test_the_command_reads_what_was_chosen(folder: Path, tmp_path: Path) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", pair_rows(40, 20))
    command = ["extract", str(pairs), "--model", str(folder), "--layer", "auto", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, "--prefixes", "2"])
    assert done.exit_code == 0, done.output
    kept = load_json(tmp_path / "out" / "layer.json")
    assert kept["told"] in done.stderr
    features = load_features(tmp_path / "out")
    assert features.spec.layer == kept["layer"]
    assert len(features) == 80
    assert np.isfinite(features.chosen).all()
    wrong = CliRunner().invoke(app, [*command[:-3], "deep", "--out", str(tmp_path / "other")])
    assert wrong.exit_code == 2
    assert "'deep' is neither a number" in wrong.output


def test_a_choice_is_saved_whole() -> None:
    choice = LayerChoice(3, 4, "the last: so", (), 0, 0.0)
    assert choice.to_dict()["told"] == "--layer auto: layer 3 of 4, the last: so"
