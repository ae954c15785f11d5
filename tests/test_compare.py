"""Comparisons without training: the matrix of cells, the split, the counters, plans and how results are summed up."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from coala.cli import app
from coala.compare import bundled, cells, load_study, plan_rows, plan_study, plan_total
from coala.compare.cell import read
from coala.compare.cell_context import calibrated_nll, measured_margins
from coala.compare.conclusions import (
    Finding,
    of_capability,
    of_flops,
    of_judge,
    of_measured,
    of_pooling,
    of_ranking,
    of_writing,
)
from coala.compare.costs import spread
from coala.compare.data import limited, part, prepare
from coala.compare.judging import labels_judged
from coala.compare.loading import study_of
from coala.compare.matrix import spec_of
from coala.compare.page import render
from coala.compare.progress import Teller
from coala.compare.results import PUBLISHED_COSTS, curve_of, falling
from coala.compare.study import Dataset, Study
from coala.compare.text import _escaped, latex, markdown
from coala.recipe import RecipeError
from coala.store import save_json, save_pairs
from coala.values import CoalaError, Pair, user
from tests.menagerie import tiny_backbone

METHODS: list[dict[str, Any]] = [
    {"name": "sft", "kind": "sft"},
    {"name": "dpo", "kind": "dpo"},
    {"name": "coala", "kind": "coala"},
    {"name": "linear", "kind": "coala", "head": {"method": "linear"}},
    {"name": "layer", "kind": "coala", "layer": "auto"},
]


def study(**change: Any) -> Study:
    return study_of(
        {
            "title": "a study",
            "models": {"m": {"path": "somewhere"}},
            "datasets": {"d": {"pairs": ["pairs.jsonl"], "inits": ["base", "sft"]}},
            "methods": METHODS,
            "seeds": [3, 5],
            **change,
        }
    )


def pairs_of(groups: int, each: int = 3) -> list[Pair]:
    return [
        Pair(user(f"question {g}"), f"a fine answer {g} {i}", f"a poor answer {g} {i}", f"g{g}")
        for g in range(groups)
        for i in range(each)
    ]


# --- the matrix --------------------------------------------------------------------------------------------------


def test_every_cell_comes_once_and_after_what_it_needs() -> None:
    found = cells(study())
    names = [cell.id for cell in found]
    assert len(set(names)) == len(names)
    for number, cell in enumerate(found):
        assert set(cell.needs) <= set(names[:number]), cell.id


def test_heads_of_the_same_features_share_one_extraction() -> None:
    found = cells(study())
    read = [cell.id for cell in found if cell.kind == "features" and cell.init == "base"]
    assert read == ["d.m.base.features-Llast-mean", "d.m.base.features-Lauto-mean"]
    linear = next(cell for cell in found if cell.method == "linear")
    assert read[0] in linear.needs


def test_what_starts_from_sft_waits_for_it_and_sft_does_not() -> None:
    found = cells(study())
    later = [cell for cell in found if cell.init == "sft"]
    assert later
    assert all("d.m.base.sft.full.s3" in cell.needs for cell in later)
    assert not any(cell.method == "sft" for cell in later)


def test_other_seeds_wait_for_the_one_that_searches() -> None:
    found = {cell.id: cell for cell in cells(study())}
    assert "d.m.base.dpo.full.s3" in found["d.m.base.dpo.full.s5"].needs
    assert "d.m.base.coala.s3" not in found["d.m.base.coala.s5"].needs


def test_a_cell_is_stamped_with_what_decides_it_and_nothing_else() -> None:
    one, more = study(), study(seeds=[3, 5, 7], title="grown", methods=[*METHODS, {"name": "orpo", "kind": "orpo"}])
    stamps = {cell.id: spec_of(more, cell) for cell in cells(more)}
    for cell in cells(one):
        assert stamps[cell.id] == spec_of(one, cell)
    other = study(split={"seed": 1})
    assert all(spec_of(other, cell) != spec_of(one, cell) for cell in cells(one))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"methods": [METHODS[1], METHODS[1]]}, "two methods have one name"),
        ({"methods": METHODS[1:]}, "no method is of kind sft"),
        ({"methods": [{**METHODS[0], "settings": ["lost"]}]}, "no setting is called lost"),
        ({"methods": [*METHODS, {"name": "c", "kind": "coala", "settings": ["full"]}]}, "no training settings"),
        ({"methods": [*METHODS, {"name": "c", "kind": "coala", "layer": "auto", "reference": "margin"}]}, "all layers"),
        ({"seeds": [1, 1]}, "a seed is named twice"),
        ({"seed": 1}, "unknown setting seed; did you mean seeds or split.seed"),
    ],
)
def test_studies_that_do_not_fit_are_explained(change: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        study(**change)


def test_few_rates_are_said_to_be_few() -> None:
    settings = {"full": {"rates": [1e-4, 1e-3], "rates_of": {"sft": [1e-5, 1e-4, 1e-3, 1e-2]}}}
    assert study(settings=settings).untuned() == ["dpo (full)"]
    assert study().untuned() == []


# --- pairs -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(1, 50), st.integers(1, 4), st.integers(0, 3))
def test_a_limit_keeps_an_order_and_whole_groups(groups: list[int], most: int, each: int, seed: int) -> None:
    pairs = [Pair(user(f"{i}"), "a", "b", f"g{g}") for i, g in enumerate(groups)]
    kept = limited(pairs, most, seed, per_group=each)
    places = [pairs.index(pair) for pair in kept]
    assert places == sorted(places)
    assert len(kept) == min(most, sum(min(each, groups.count(g)) for g in set(groups)))
    assert all(sum(pair.group == f"g{g}" for pair in kept) <= each for g in set(groups))
    # All groups but one are there as whole as they may be.
    cut = [g for g in {p.group for p in kept} if sum(p.group == g for p in kept) < min(each, groups.count(int(g[1:])))]
    assert len(cut) <= 1


def test_the_split_keeps_groups_apart_and_is_made_once(tmp_path: Path) -> None:
    save_pairs(tmp_path / "pairs.jsonl", pairs_of(30))
    about = {"d": {"pairs": [str(tmp_path / "pairs.jsonl")], "train_pairs": 60}}
    given_study = study(datasets=about)
    out = tmp_path / "out"
    stamp = prepare(given_study, out)
    parts = {name: part(out, "d", name) for name in ("train", "fit", "validation", "test")}
    groups = {name: {pair.group for pair in pairs} for name, pairs in parts.items()}
    assert groups["fit"] | groups["validation"] == groups["train"]
    assert not groups["fit"] & groups["validation"]
    assert not groups["train"] & groups["test"]
    assert len(parts["train"]) == 60
    assert prepare(given_study, out) == stamp
    save_pairs(tmp_path / "pairs.jsonl", pairs_of(31))
    with pytest.raises(CoalaError, match="pairs of another study"):
        prepare(given_study, out)


# --- measures ----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=30), st.floats(0.01, 100))
def test_the_calibrated_loss_has_no_scale(margins: list[float], scale: float) -> None:
    values = np.array(margins)
    found = calibrated_nll(values)
    assert 0 <= found <= math.log(2) + 1e-12
    assert calibrated_nll(scale * values) == pytest.approx(found, abs=1e-6)


def test_the_calibrated_loss_is_the_best_over_scales() -> None:
    values = np.random.default_rng(0).normal(0.4, 1, 200)
    best = min(float(np.logaddexp(0, -t * values).mean()) for t in np.linspace(0, 5, 5001))
    assert calibrated_nll(values) == pytest.approx(best, abs=1e-6)
    assert calibrated_nll(-values) == pytest.approx(math.log(2))
    assert calibrated_nll(np.zeros(4)) == math.log(2)


def test_margins_that_are_not_finite_are_a_failure_not_a_number() -> None:
    with pytest.raises(CoalaError, match="training diverged"):
        measured_margins([0.1, math.nan], pairs_of(1, 2))
    found = measured_margins([1.0, 3.0], pairs_of(1, 2))
    assert found["margin_ratio"] == pytest.approx(2.0)
    assert found["accuracy"]["value"] == 1


def test_falls_are_counted_over_all_seeds() -> None:
    assert falling([[[0, 1.0], [1, 2.0], [2, 1.5]], [[0, 0.0], [1, 1.0]]]) == {"falls": 1, "steps": 3, "share": 1 / 3}
    assert falling([[[0, 1.0], [1, 1.0 - 1e-9]]]) == {"falls": 0, "steps": 1, "share": 0.0}
    assert falling([]) is None


def test_curves_are_in_units_of_the_final_deviation() -> None:
    result = {"curve": [{"step": 0.0, "margin": 0.0}, {"step": 8.0, "margin": 3.0}], "margin_sd": 1.5}
    assert curve_of(result) == [[0.0, 0.0], [1.0, 2.0]]


def test_spread_of_seeds() -> None:
    assert spread([1.0, 3.0]) == {"mean": 2.0, "sd": pytest.approx(math.sqrt(2)), "n": 2, "values": [1.0, 3.0]}
    one = spread([1.0])
    assert one is not None
    assert one["sd"] is None
    assert spread([]) is None


def test_table_5_as_printed(shared: Path) -> None:
    models = json.loads((shared / "eval_reference/flops/flops_reference.json").read_text())["models"]
    text = (shared / "papers/coala.md").read_text()
    for row in PUBLISHED_COSTS["rows"]:
        line = " ".join(
            f"{row[name]:g}" if name == "SFT" else f"{row[name]:.2f}" for name in ("COALA", "DPO", "ORPO", "SFT")
        )
        assert line in text
    # What the words beside it claim, by the reference's own formula: ORPO never costs more than DPO.
    for about in models.values():
        assert about["orpo_full_TFLOP"] <= 0.75 * about["dpo_full_TFLOP"] * (1 + 1e-9)


# --- counters ----------------------------------------------------------------------------------------------------


def test_products_are_counted_as_often_as_they_run() -> None:
    import jax
    import jax.numpy as jnp

    from coala.compare.flop_counter import jax_products

    a, b = jnp.ones((3, 4)), jnp.ones((4, 5))

    @jax.jit
    def repeated(times: Any) -> Any:
        return jax.lax.while_loop(
            lambda s: s[0] < times, lambda s: (s[0] + 1, s[1] + jnp.matmul(a, b)), (0, jnp.zeros((3, 5)))
        )

    repeated(2)
    with jax_products() as counter:
        jax.block_until_ready(repeated(7))
        jax.block_until_ready(jnp.tensordot(jnp.ones((2, 3, 4)), jnp.ones((3, 4, 5)), 2))
    assert counter.flops == 7 * 2 * 3 * 4 * 5 + 2 * 2 * 12 * 5
    jax.block_until_ready(repeated(3))
    assert counter.flops == 7 * 2 * 3 * 4 * 5 + 2 * 2 * 12 * 5


@pytest.mark.slow
@pytest.mark.nightly
def test_a_fit_counts_less_than_its_plan_and_is_not_changed() -> None:
    from coala.compare.flop_counter import jax_products
    from coala.convex import fit
    from coala.plan.plan import fit_flops
    from coala.settings import HeadSettings
    from coala.values import FeatureSet, FeatureSpec

    rng = np.random.default_rng(0)
    chosen, rejected = rng.standard_normal((2, 60, 6)).astype(np.float32)
    spec = FeatureSpec("", "", "", "", 1, "mean", True, 10)
    features = FeatureSet(chosen + 0.5, rejected, np.array([str(i // 2) for i in range(60)]), spec)
    plain = fit(features, method="linear")
    with jax_products() as counter:
        counted = fit(features, method="linear")
    assert np.array_equal(plain.head.linear, counted.head.linear)
    assert 0 < counter.flops < fit_flops(HeadSettings(method="linear"), 60, 7, 1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_torch_counts_a_training_step_by_formula(attention: str) -> None:
    """Three forwards for a step on all weights; fused attention computes scores once more on its way back."""
    import torch
    import transformers

    from coala.compare.flop_counter import torch_flops
    from coala.costs import full_flops
    from tests.test_costs import transformer_shape

    config = transformers.GPT2Config(
        n_layer=2, n_embd=24, n_head=4, vocab_size=97, n_positions=64, attn_pdrop=0, attn_implementation=attention
    )
    model = transformers.GPT2LMHeadModel(config).train()
    tokens, batch = 12, 2
    ids = torch.zeros(batch, tokens, dtype=torch.long)

    def step() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()

    _, flops = torch_flops(step)
    shape = transformer_shape(n_layers=2, width=24, vocabulary=97, mlp_width=96, n_heads=4, gated_mlp=False)
    whole = 3 * full_flops(shape, [tokens] * batch)
    again = 2 * tokens**2 * 24 * 2 * batch if attention == "sdpa" else 0
    # The first layer's input is an embedding's, whose gradient needs no product: nothing is left out of GPT-2's.
    assert flops == whole + again


# --- plans -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in bundled() if n.startswith(("coala-", "cvx-"))])
def test_the_papers_studies_are_whole(name: str) -> None:
    given_study = load_study(name)
    assert cells(given_study)
    assert given_study.untuned() == []
    assert given_study.reproduces
    assert given_study.split.test == 0.1


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["coala-table5", "coala-table9", "cvx-dpo"])
def test_the_papers_studies_are_planned_without_weights_or_pairs(name: str) -> None:
    given_study = load_study(name)
    planned = plan_study(given_study)
    assert len(planned) == len(cells(given_study))
    assert all(row["flops"] > 0 and sum(row["bytes"].values()) > 0 and row["seconds"] > 0 for row in planned)
    text = plan_rows(planned, given_study)
    assert len(text) == len(planned)
    assert plan_total(planned)["cells"] == len(planned)


@pytest.mark.nightly
def test_training_an_8b_model_is_told_not_to_fit_a_laptop_card() -> None:
    given_study = load_study("coala-table6")
    rows = {row[0]: row for row in plan_rows(plan_study(given_study), given_study)}
    assert "more than there is" in rows["edu.llama-8b.base.dpo.lora.s0"][3]
    assert "more than there is" not in rows["edu.llama-8b.base.features-Llast-mean"][3]


def test_the_laptop_study_is_what_it_says() -> None:
    found = load_study("laptop", Path("elsewhere"))
    assert found.untuned() == []
    assert {m.kind for m in found.methods} >= {"sft", "dpo", "orpo", "simpo", "reward", "coala"}
    assert found.datasets["harmless"].pairs[0].endswith("elsewhere/hh_rlhf_harmless/train.jsonl.gz")
    assert Path(found.datasets["film"].pairs[0]).is_file()


def test_a_plan_of_real_pairs_counts_what_training_reads(tmp_path: Path) -> None:
    from coala.backbone import load_backbone
    from coala.baselines.rows import render_pairs
    from coala.baselines.settings import TrainSettings
    from coala.costs import training_flops

    model = tiny_backbone("gpt2", tmp_path / "m")
    save_pairs(tmp_path / "pairs.jsonl", pairs_of(20))
    given_study = study(
        models={"m": {"path": str(model), "max_tokens": 60}},
        datasets={"d": {"pairs": [str(tmp_path / "pairs.jsonl")]}},
        settings={
            "full": {"source": "trl", "adapter": False, "change": {"epochs": 1, "gradient_checkpointing": False}}
        },
        methods=[METHODS[1], METHODS[3]],
    )
    planned = {row["cell"]: row for row in plan_study(given_study)}
    out = tmp_path / "out"
    prepare(given_study, out)
    backbone = load_backbone(model)
    rows = render_pairs(part(out, "d", "train"), backbone, TrainSettings(max_length=60))
    lengths = [[len(getattr(row, side).tokens) for row in rows] for side in ("chosen", "rejected")]
    found = planned["d.m.base.dpo.full.count"]
    assert found["flops"] == training_flops(backbone.shape, *lengths, "dpo")
    assert found["pairs"] == len(rows)
    assert planned["d.m.base.dpo.full.s3"]["parts"]["rates"] == 4


def test_files_that_are_not_there_are_named_with_the_way_to_name_others(tmp_path: Path) -> None:
    given_study = study(datasets={"d": {"pairs": [str(tmp_path / "gone.jsonl")]}})
    with pytest.raises(CoalaError, match=r"gone.jsonl is missing. Fix: name its files with --set 'datasets.d.pairs="):
        prepare(given_study, tmp_path / "out")


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"status": 3}', "x", ""])
def test_damaged_files_are_told_by_their_name(tmp_path: Path, content: str) -> None:
    save_pairs(tmp_path / "pairs.jsonl", pairs_of(12, 2))
    given_study = study(datasets={"d": {"pairs": [str(tmp_path / "pairs.jsonl")]}})
    prepare(given_study, tmp_path / "out")
    (tmp_path / "out/data/d/about.json").write_text(content)
    with pytest.raises(CoalaError, match=r"about\.json"):
        prepare(given_study, tmp_path / "out")
    (tmp_path / "cell").mkdir()
    (tmp_path / "cell" / "cell.json").write_text(content)
    with pytest.raises(CoalaError, match=r"cell\.json"):
        read(tmp_path / "cell")


def test_there_is_no_report_of_what_is_no_comparison(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["compare", "laptop", "--report-only", "--out", str(tmp_path / "none")])
    assert isinstance(found.exception, CoalaError)
    assert not (tmp_path / "none").exists()


# --- the report --------------------------------------------------------------------------------------------------


def empty() -> dict[str, Any]:
    return {
        "title": "<b>nothing</b>",
        "reproduces": "",
        "settings": {"seeds": [0]},
        "counts": {"cells": 1, "done": 0, "failed": 1, "missing": 0},
        "failures": [
            {"cell": "a", "error": "ran out & died", "plan": {"bytes": {"weights": 2_000_000}, "how": "bound"}}
        ],
        "untuned": ["dpo (full)"],
        "places": [],
        "stage_one": [],
        "published_costs": PUBLISHED_COSTS,
        "command": "coala compare x",
        "machine": {},
    }


def test_a_report_of_failures_alone_tells_them_with_their_plan() -> None:
    page = render(empty())
    assert "&lt;b&gt;nothing" in page
    assert "ran out &amp; died" in page
    assert "weights 2 MB" in page
    assert "dpo (full)" in page
    assert "http" not in page.replace("http-equiv", "")
    assert "cannot be reproduced" in page


def test_latex_escapes_and_balances() -> None:
    text = latex(empty())
    assert text.count(r"\begin{") == text.count(r"\end{")
    assert _escaped("a_b & 5 %") == r"a\_b \& 5 \%"


def test_markdown_has_a_cell_for_every_head() -> None:
    rows = [line for line in markdown(empty()).splitlines() if line.startswith("|")]
    assert rows
    widths = {line.replace(r"\|", "").count("|") for line in rows[:7]}
    assert len(widths) == 1


# --- what is said ------------------------------------------------------------------------------------------------


def told_place(low: float, high: float) -> dict[str, Any]:
    """A place with COALA, a linear head that ranks better, and two baselines, the difference in [low, high]."""

    def row(label: str, kind: str, value: float, share: float | None) -> dict[str, Any]:
        of = {"flops": share, "measured": {"seconds": 2 * share, "bytes": {"host": 3 * share}}} if share else {}
        costs = {"counter": {"run": 1} if share else None, "of": {"dpo (full)": of}}
        return {
            "label": label,
            "kind": kind,
            "coala": kind == "coala",
            "accuracy": {"value": value, "n": 90},
            "costs": costs,
        }

    rows = [
        row("sft (full)", "sft", 0.5, None),
        row("dpo (full)", "dpo", 0.7, 1.0),
        row("coala", "coala", 0.6, 0.1),
        row("linear", "coala", 0.65, 0.05),
    ]
    difference = {"value": (low + high) / 2, "low": low, "high": high}
    differences = [{"minus": row["label"], "difference": difference, "p_holm": 0.5} for row in rows]
    return {"dataset": "d", "model": "m", "init": "base", "methods": rows, "differences": differences}


@pytest.mark.parametrize(
    ("low", "high", "word"), [(-0.2, -0.01, "Worse"), (-0.1, 0.1, "Undecided"), (0.01, 0.2, "Better")]
)
def test_what_is_said_of_ranking_is_what_the_interval_allows(low: float, high: float, word: str) -> None:
    (told,) = of_ranking(told_place(low, high))
    assert told.word == word
    assert "the best baseline, dpo (full)" in told.said
    assert told.figures.startswith("60.0 % of 90 held-out pairs against 70.0 %: ")
    assert "The best of 2 is chosen on these same pairs" in told.figures
    assert ("Of its choices linear comes closest, with 65.0 %." in told.figures) == (word == "Worse")


def test_costs_are_told_of_heads_that_were_counted() -> None:
    place = told_place(0, 0)
    assert of_flops(place) == [Finding("Cost", "of the FLOPs of dpo (full), by counter, coala 10 %, linear 5 %.")]
    assert of_measured(place) == [
        Finding(
            "Cost",
            "of the seconds of dpo (full), coala 20 %, linear 10 %; of its peak memory, coala 30 %, linear 15 %.",
        )
    ]
    place["methods"][3]["costs"]["counter"] = None
    assert of_flops(place) == [Finding("Cost", "of the FLOPs of dpo (full), by counter, coala 10 %.")]
    place["methods"][1]["costs"] = None
    assert of_flops(place) == of_measured(place) == []


def test_a_judge_that_does_not_go_by_the_labels_is_told(tmp_path: Path) -> None:
    """Its agreement is the share of pairs it judges as they are labelled; of its own labels there is nothing to ask."""
    judge = str(tmp_path / "glad.json")
    save_json(Path(judge), {"name": "glad", "weights": {"glad": 1.0}})
    pairs = [Pair(user("x"), "so glad", "sad" if n % 4 else "glad glad", str(n)) for n in range(40)]
    pairs += [Pair(user("x"), "sad", "sad too", "tie")]
    found = labels_judged(Dataset(judge=judge), pairs)
    assert labels_judged(Dataset(judge=judge, labeller=judge), pairs) is None
    assert found is not None
    assert found["name"] == "glad"
    assert found["agrees"]["value"] == pytest.approx(30.5 / 41)
    assert labels_judged(Dataset(judge="head:coala"), pairs) is None
    assert labels_judged(Dataset(), pairs) is None
    for (low, high), verdict in {(0.6, 0.8): "", (0.2, 0.4): "no", (0.4, 0.6): "open", (0.5, 0.8): "open"}.items():
        agrees = {"value": (low + high) / 2, "low": low, "high": high, "n": 1234}
        (said,) = of_judge({"judge": {"name": "words", "agrees": agrees}})
        assert (said.word, said.verdict) == ("Judge", verdict)
        assert "of 1,234 pairs" in said.figures
    assert of_judge({"judge": None}) == []


def test_a_head_that_guides_by_the_last_token_is_told() -> None:
    def place(pooling: str, mode: str | None) -> dict[str, Any]:
        names = ("label", "method", "of", "pooling", "mode")
        heads = ("coala", "coala", None, pooling, None), ("other", "other", None, "last", None)
        rows = (*heads, ("guided", "guided", "coala", None, mode))
        return {"methods": [dict(zip(names, row, strict=True)) for row in rows]}

    (found,) = of_pooling(place("last", "block"))
    assert found.said.startswith("coala reads the last token alone")
    for pooling, mode in (("mean", "block"), ("last", None), ("last", "best_of")):
        assert of_pooling(place(pooling, mode)) == []


def test_every_method_is_told_once_with_its_figure_under_the_word_its_interval_allows() -> None:
    ends = {"below": (0.1, 0.4), "above": (0.6, 0.9), "between": (0.4, 0.6), "touching": (0.5, 0.8)}
    words = {"below": "Better", "above": "Worse", "between": "Undecided", "touching": "Undecided"}  # wins are theirs
    kinds = dict(zip(ends, ("prompt", "dpo", "base", "guided"), strict=True))
    contests = [
        {
            "of": name,
            "against": "ours",
            "kind": kinds[name],
            "mode": None,
            "wins": {"value": (a + b) / 2, "low": a, "high": b, "n": 30},
        }
        for name, (a, b) in ends.items()
    ]
    told = of_writing({"contests": contests})
    assert [one.word for one in told] == ["Better", "Worse", "Undecided"]
    for name, (low, high) in ends.items():
        (one,) = [one for one in told if f"{name} " in one.figures]
        assert one.word == words[name]
        assert name in one.said
        assert f"{name} {50 * (low + high):.1f} % [{100 * low:.1f}, {100 * high:.1f}]" in one.figures
    changes = [
        {"of": n, "difference": {"value": v, "low": v - 0.1, "high": v + 0.1, "n": 9}}
        for n, v in (("a", 0.2), ("b", 0.0))
    ]
    assert [(one.word, "a" in one.said.split()[-1]) for one in of_capability({"capability": changes})] == [
        ("Better", True),
        ("Undecided", False),
    ]


# --- how far a cell is -----------------------------------------------------------------------------------------------


def test_a_cell_tells_how_far_it_is_at_most_once_a_second() -> None:
    now, heard = [0.0], []
    tell = Teller(lambda *told: heard.append(told), lambda: now[0])
    for step in range(31):
        tell("training", step, 30, "steps")
        now[0] += 0.25
    tell("replies", 0, None)
    assert [told[:3] for told in heard] == [*(("training", step, 30) for step in range(0, 31, 4)), ("replies", 0, None)]
    assert heard[0][3] == "steps"
