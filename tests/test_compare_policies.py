"""What a comparison says of policies in the output layer: their fits, what they sample, what survives of a teacher."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from coala.backbone import LanguageModel, OutputChange, load_backbone
from coala.compare import cells, load_study, plan_study, plan_total, run, write_report
from coala.compare.cell import carry_out
from coala.compare.cell_context import CellContext
from coala.compare.data import labelled, prepare
from coala.compare.figures import wins_by_kl
from coala.compare.lessons import choosing_prompts
from coala.compare.loading import study_of
from coala.compare.matrix import Cell, spec_of, teacher_of
from coala.compare.output_change import fit_bias, fit_by_adam, mean_loss
from coala.compare.processes import Processes
from coala.compare.study import Study
from coala.compare.survival import Sample, between, retention, survival
from coala.compare.writing import Writer, distinct_bigrams, divergence_along
from coala.convex import fit_output
from coala.costs import decoding_flops
from coala.decoding import Guidance, generate, generate_distilled
from coala.distil.matrix import output_matrix
from coala.policies import DistilledPolicy
from coala.recipe import RecipeError
from coala.store import load_json, save_pairs
from coala.values import CoalaError, Pair, user
from tests.menagerie import tiny_backbone
from tests.test_compare import pairs_of
from tests.test_convex_output import RIDGE, D, dense, instance, objective
from tests.test_distil import PROMPTS, SETTINGS, policy_of, with_layer

METHODS: list[dict[str, Any]] = [
    {"name": "coala", "kind": "coala", "guidance": None},
    {"name": "dpo", "kind": "dpo"},
    {"name": "block", "kind": "guided", "of": "coala", "guidance": {"mode": "block", "candidates": 3}},
    {"name": "distilled", "kind": "distilled", "of": "coala", "distil": {"candidates": 3, "prompts": 8}},
    {"name": "fewer", "kind": "distilled", "of": "coala", "distil": {"candidates": 3, "prompts": 5, "rank": 2}},
    {"name": "shift", "kind": "distilled", "of": "coala", "distil": {"teacher": "shift", "prompts": 4}},
    {"name": "weighted", "kind": "distilled", "of": "coala", "distil": {"teacher": "weighted"}},
    {"name": "rounds", "kind": "distilled", "of": "coala", "distil": {"candidates": 3, "prompts": 8, "rounds": 2}},
    {"name": "sft", "kind": "sft", "of": "coala", "distil": {"candidates": 3, "prompts": 8}},
    {"name": "steer", "kind": "lm-steer", "distil": {"support": "vocabulary"}, "epochs": 2, "rates": [1e-3, 1e-2]},
    {"name": "steer-guided", "kind": "lm-steer", "of": "coala", "distil": {"candidates": 3, "prompts": 8}, "epochs": 1},
    {"name": "mean", "kind": "mean-difference", "of": "coala", "perplexity": 9.0},
    {"name": "bias", "kind": "bias", "of": "coala", "distil": {"candidates": 3, "prompts": 8}},
]


def study(**change: Any) -> Study:
    about: dict[str, Any] = {
        "title": "policies",
        "models": {"m": {"path": "somewhere"}},
        "datasets": {"d": {"pairs": ["pairs.jsonl"]}},
        "methods": METHODS,
        "count_flops": False,
    }
    return study_of({**about, **change})


# --- the matrix --------------------------------------------------------------------------------------------------


def test_policies_share_their_teachers_replies_and_come_after_them() -> None:
    given = study()
    found = cells(given)
    names = [cell.id for cell in found]
    assert len(set(names)) == len(names)
    for number, cell in enumerate(found):
        assert set(cell.needs) <= set(names[:number]), cell.id
    needs = {cell.method: set(cell.needs) for cell in found}
    assert [cell.method for cell in found if cell.kind == "teacher"] == [
        "teacher-coala-guided-3x5-8",
        "teacher-coala-shift-10-4",
        "teacher-coala-weighted-0.5",
        "teacher-chosen",
    ]
    for name in ("distilled", "fewer", "rounds", "sft", "steer-guided", "bias"):
        assert "d.m.base.teacher-coala-guided-3x5-8.s0" in needs[name]
    assert needs["steer"] == {"d.m.base.base", "d.m.base.teacher-chosen"}
    teachers = {method.name: teacher_of(given, method) for method in given.methods}
    assert {name for name, teacher in teachers.items() if teacher is not None and teacher.name == "block"} == {
        *("distilled", "fewer", "rounds", "sft", "steer-guided", "bias"),
    }
    # SFT on guided replies is nothing that other methods start from.
    assert given.sft is None
    stamps = [repr(spec_of(given, cell)) for cell in found]
    assert len(set(stamps)) == len(stamps)


def test_a_head_that_judges_is_fitted_before_whatever_it_judges() -> None:
    methods = [METHODS[1], *METHODS[:1], *METHODS[2:]]
    found = cells(study(datasets={"d": {"pairs": ["p"], "judge": "head:coala"}}, methods=methods))
    names = [cell.id for cell in found]
    for number, cell in enumerate(found):
        assert set(cell.needs) <= set(names[:number]), cell.id
    assert "d.m.base.coala.s0" in next(cell for cell in found if cell.method == "dpo").needs


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"kind": "distilled"}, "expected of: a method of kind coala"),
        ({"kind": "distilled", "of": "dpo"}, "expected a kind that takes one"),
        ({"kind": "distilled", "of": "coala", "distil": {"ranks": 3}}, "distil of x names ranks; expected some of"),
        ({"kind": "distilled", "of": "coala", "distil": {"rank": 0}}, "distil of x: rank"),
        ({"kind": "lm-steer", "of": "coala", "distil": {"teacher": "shift"}}, "its teacher is shift"),
        ({"kind": "coala", "distil": {"prompts": 3}}, "leave out distil"),
        ({"kind": "bias", "distil": {"support": "vocabulary"}}, "fitted over the nucleus"),
        ({"kind": "mean-difference", "of": "coala", "layer": 2}, "states of the last layer"),
        ({"kind": "distilled", "of": "coala", "strengths": [1.0]}, "not 1"),
        ({"kind": "distilled", "of": "coala", "distil": {"teacher": "shift", "rounds": 2}}, "2 rounds; expected kind"),
        ({"kind": "bias", "of": "coala", "distil": {"rounds": 2}}, "2 rounds; expected kind distilled"),
    ],
)
def test_policies_that_cannot_be_carried_out_are_explained(method: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        study(methods=[*METHODS, {"name": "x", **method}])


def test_a_round_is_chosen_on_prompts_that_are_neither_judged_nor_taught(tmp_path: Path) -> None:
    pairs = [Pair(user(f"prompt {n}"), f"good {n}", f"bad {n}", str(n)) for n in range(20)]
    save_pairs(tmp_path / "pairs.jsonl", pairs[:12])
    save_pairs(tmp_path / "test.jsonl", [*pairs[12:], pairs[12]])

    def chosen(prompts: int, judged: int, held_out: int = 100) -> tuple[list[str], dict[str, int]]:
        settings = {"prompts": prompts, "rounds": 2, "held_out": held_out}
        method = {"name": "rounds", "kind": "distilled", "of": "coala", "distil": settings}
        files = {"pairs": [str(tmp_path / "pairs.jsonl")], "test": [str(tmp_path / "test.jsonl")]}
        given = study(datasets={"d": files}, methods=[METHODS[0], method], evaluation={"prompts": judged})
        out = tmp_path / f"out-{prompts}-{judged}-{held_out}"
        prepare(given, out)
        cell = next(cell for cell in cells(given) if cell.kind == "distilled")
        context = CellContext(given, cell, out)
        found, parts = choosing_prompts(context)
        return [prompt[-1].text for prompt in found], parts

    test, training = ([f"prompt {n}" for n in some] for some in (range(12, 20), range(12)))
    assert chosen(10, 5) == ([*test[5:], *training[10:]], {"test": 3, "train": 2})
    assert chosen(10, 5, held_out=2) == (test[5:7], {"test": 2, "train": 0})
    assert chosen(12, 0) == (test, {"test": 8, "train": 0})
    with pytest.raises(CoalaError, match=r"found 1 prompts to choose a round on, .* Fix: fewer distil.prompts"):
        chosen(11, 8)


def test_a_plan_of_rounds_is_as_many_fits_and_teachers_and_what_each_gain_takes(tmp_path: Path) -> None:
    model = tiny_backbone("llama", tmp_path / "m")
    pairs = [Pair(user(f"prompt {n}"), f"good {n}", f"bad {n}", str(n)) for n in range(10, 40)]
    save_pairs(tmp_path / "pairs.jsonl", pairs)
    settings = {"prompts": 10, "held_out": 4, "rank": 2, "ridge": 0.1, "strength": 1.0}
    methods = [
        {"name": f"r{n}", "kind": "distilled", "of": "coala", "distil": {**settings, "rounds": n}, "strengths": []}
        for n in (1, 2, 3)
    ]
    given = study(
        models={"m": {"path": str(model), "max_tokens": 60}},
        datasets={"d": {"pairs": [str(tmp_path / "pairs.jsonl")]}},
        methods=[METHODS[0], *methods],
        evaluation={"prompts": 3, "max_new_tokens": 7},
    )
    flops = {row["cell"].split(".")[3]: row["flops"] for row in plan_study(given)}
    backbone = load_backbone(model)
    lengths = {len(backbone.render(user(f"prompt {n}")).tokens) for n in range(10, 40)}
    assert len(lengths) == 1
    # Two rounds write three times four replies that choose, the start's among them; a third writes four more.
    own = 4 * decoding_flops(backbone.shape, lengths.pop(), 7)
    assert (flops["r2"] - flops["r1"]) - (flops["r3"] - flops["r2"]) == 2 * own
    assert flops["r3"] - flops["r2"] > flops["teacher-coala-guided-10x5-10"] + own


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"datasets": {"d": {"pairs": ["p"], "judge": "head:dpo"}}}, "judged by dpo"),
        ({"datasets": {"d": {"joins": ["e"], "labeller": "rule:shorter"}, "e": {"pairs": ["p"]}}}, "no files of pairs"),
        ({"methods": [METHODS[3], METHODS[0]]}, "named before coala"),
    ],
)
def test_studies_of_policies_that_do_not_fit_are_explained(change: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        study(**change)


def test_a_labeller_puts_first_what_it_prefers_and_leaves_out_ties() -> None:
    pairs = [
        Pair(user("q"), "long enough", "short", "a"),
        Pair(user("q"), "a", "bb", "b"),
        Pair(user("q"), "a", "b", "c"),
    ]
    assert [(p.chosen, p.group) for p in labelled(pairs, "rule:shorter")] == [("short", "a"), ("a", "b")]


# --- fits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("support", ["nucleus", pytest.param("vocabulary", marks=pytest.mark.nightly)])
def test_adam_comes_down_to_the_optimum_that_the_convex_program_certifies(support: Any) -> None:
    states, output = instance(True)
    found = fit_output(states, output, support=support, ridge=RIDGE, rank="full", tolerance=1e-6).certificate
    wide = output.astype(float)
    change = fit_by_adam(states, wide, support=support, rate=0.03, epochs=250, batch=999, ridge=RIDGE, decay=True)
    steps = dense(states, output, support == "vocabulary")
    if support == "nucleus":
        inside = states.in_nucleus & (states.weight > 0)
        share = states.weight[inside].sum() / states.weight.sum()
        steps = [(W, h, q, w / share) for (W, h, q, w), one in zip(steps, inside, strict=True) if one]
    adam, none = objective(steps, change), objective(steps, np.zeros((D, D)))
    assert found.lower_bound - 1e-9 <= adam - none <= found.objective + 1e-4
    # Its own objective is the one that is certified.
    own = mean_loss(states, wide, change, support) - mean_loss(states, wide, 0 * change, support)
    assert own + RIDGE / 2 * (change**2).sum() == pytest.approx(adam - none, rel=1e-6)


def test_the_best_constant_is_the_optimum_of_its_own_program() -> None:
    states, output = instance(True)
    found = fit_bias(states, output, ridge=RIDGE, tolerance=1e-6)
    inside = states.in_nucleus
    steps = [step for step, one in zip(dense(states, output), inside, strict=True) if one]
    total = sum(w for *_, w in steps)

    def loss(b: np.ndarray) -> float:
        z = [W @ (h + b) for W, h, _, _ in steps]
        parts = [w * (np.logaddexp.reduce(one) - q @ one) for one, (_, _, q, w) in zip(z, steps, strict=True)]
        return float(sum(parts) / total + RIDGE / 2 * (b @ b))

    best = minimize(loss, np.zeros(D), method="BFGS", options={"gtol": 1e-9}).x
    np.testing.assert_allclose(found.bias, best, atol=1e-3)
    assert found.ridge == RIDGE
    # Chosen on held-out prompts, the ridge is the one that does best there.
    path = fit_bias(states, output)
    assert path.ridge == min(path.path, key=lambda row: row["held_out"])["ridge"]


# --- what they sample ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_backbone(tiny_backbone("llama", tmp_path_factory.mktemp("llama")), device="cpu")


def test_a_model_with_a_change_writes_what_its_policy_writes_and_without_it_what_it_wrote(
    backbone: LanguageModel,
) -> None:
    policy = policy_of(backbone, 0.2)
    change = OutputChange.of(policy.left, policy.right)

    def texts(change: OutputChange | None, model: LanguageModel = backbone) -> list[str]:
        own = Writer(change=change).of(model)
        return [one.text for one in generate(PROMPTS, own, None, Guidance.unguided(), **SETTINGS)]

    plain = texts(None)
    for strength in (0.5, 1.0):
        theirs = generate_distilled(PROMPTS, backbone, policy, strength=strength, **SETTINGS)
        assert texts(change.times(strength)) == [one.text for one in theirs] != plain
    # A mean difference, or any constant, is unguided at strength 0.
    constant = np.random.default_rng(0).standard_normal(backbone.width).astype(np.float32)
    bias = OutputChange.of(bias=constant)
    assert texts(bias.times(0)) == texts(None) == plain
    assert texts(bias) != plain
    # A constant in front of the layer is one behind it: W b, the bias that this layer lacks.
    other = with_layer(Path(backbone.name), output_matrix(backbone))
    import torch

    layer = other.transformer.get_output_embeddings()
    layer.bias = torch.nn.Parameter(torch.from_numpy(output_matrix(backbone) @ constant), requires_grad=False)
    assert texts(bias) == texts(None, other)


def test_the_divergence_of_a_reply_is_the_one_its_decoder_accounts_for(backbone: LanguageModel) -> None:
    policy = policy_of(backbone, 0.2)
    writer = Writer(change=OutputChange.of(policy.left, policy.right))
    context: Any = SimpleNamespace(backbone=backbone, evaluation=SimpleNamespace(max_new_tokens=3))
    replies = generate_distilled([PROMPTS[0]] * 30, backbone, policy, max_new_tokens=3, seed=0)
    # Of those whose text is read as the tokens that it was written in.
    rows = [backbone.render(PROMPTS[0], reply.text) for reply in replies]
    same = [reply for reply, row in zip(replies, rows, strict=True) if row.stop - row.start == reply.n_tokens == 3]
    assert same
    pair = Pair(PROMPTS[0], "a", "b", "g")
    ours = np.array([divergence_along(context, writer, pair, reply) for reply in same])
    theirs = np.array([reply.divergence for reply in same])
    # A text may be of other tokens, as many.
    assert np.median(np.abs(ours / theirs - 1)) < 1e-4
    assert divergence_along(context, Writer(), pair, same[0]) == pytest.approx(0, abs=1e-6)


def test_distinct_bigrams() -> None:
    assert distinct_bigrams("a b a b a") == 0.5
    assert distinct_bigrams("one") == distinct_bigrams("") == 1.0


def test_forwards_are_the_rows_that_are_computed() -> None:
    def of(**guidance: Any) -> float:
        return Writer(guidance=Guidance(**guidance)).forwards

    assert (Writer().forwards, of(mode="block", candidates=10), of(mode="best_of", candidates=5)) == (1, 10, 5)
    assert of(mode="token", candidates=4) == 4
    assert of(mode="prefix", candidates=6, every=3) == pytest.approx((6 + 1 + 1) / 3)


# --- what survives ----------------------------------------------------------------------------------------------------


def told_row(label: str, kind: str, scores: Any, kl: Any, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    n = len(scores)
    values = {"kl": None if kl is None else list(kl), "log_likelihood": [-loss * 4.0] * n, "tokens": [4] * n}
    base: dict[str, Any] = {"label": label, "kind": kind, "judge_scores": list(scores), "per_prompt": values}
    return {**base, "teacher": None, "along": [], "costs": None, **more}


def told_rows() -> tuple[list[dict[str, Any]], list[str]]:
    """A start, a teacher, DPO and a policy at three strengths; ten groups of four prompts."""
    rng = np.random.default_rng(0)
    n = 40
    start = rng.standard_normal(n)
    gained = {s: start + s * rng.uniform(-0.5, 2, n) for s in (0.5, 1.0, 1.5)}
    spent = {s: told_row("", "", start, [4 * s**2] * n, 1 + s)["per_prompt"] for s in (0.5, 1.5)}
    along = [{"strength": s, "judge_scores": list(gained[s]), "per_prompt": spent[s]} for s in spent]
    rows = [
        told_row("base", "base", start, None),
        told_row("block", "guided", start + rng.uniform(-0.5, 2, n), None, 2.0),
        told_row("dpo", "dpo", gained[1.0], [4.0] * n, 2.0),
        told_row("policy", "distilled", gained[1.0], [4.0] * n, 2.0, teacher="block", along=along),
    ]
    return rows, [f"g{i // 4}" for i in range(n)]


def test_a_teacher_keeps_all_of_its_gain_and_the_start_none() -> None:
    rows, group = told_rows()
    sample = Sample(group, rows[0])
    of = {row["label"]: retention(sample, row, rows[1])["retention"] for row in rows}
    assert (of["block"]["value"], of["block"]["low"], of["block"]["high"]) == (1, 1, 1)
    assert of["base"]["value"] == 0
    wins = [np.mean(np.array(row["judge_scores"]) > rows[0]["judge_scores"]) for row in rows]
    assert of["policy"]["value"] == pytest.approx((wins[3] - 0.5) / (wins[1] - 0.5))
    assert of["policy"]["low"] < of["policy"]["value"] < of["policy"]["high"]
    # Of a teacher without an established gain there is no share.
    nothing = retention(sample, rows[3], rows[0])
    assert nothing["retention"] is None
    assert "no gain of base" in nothing["why"]


def test_at_what_dpo_spends_a_policy_that_is_dpo_differs_by_nothing() -> None:
    rows, group = told_rows()
    (entry,) = survival(rows, group)
    assert [at["measure"] for at in entry["at"]] == ["kl", "perplexity"]
    for at in entry["at"]:
        assert at["difference"]["value"] == pytest.approx(0, abs=1e-12)
        assert (at["difference"]["low"], at["difference"]["high"]) == pytest.approx((0, 0), abs=1e-9)
    assert [(at["strength"], at["kl"]["value"]) for at in entry["dial"]] == [(0.5, 1), (1, 4), (1.5, 9)]
    # Beyond the strongest nothing is told but why.
    far = {**rows[2], "per_prompt": {**rows[2]["per_prompt"], "kl": [50.0] * len(group)}}
    at = survival([rows[0], rows[1], far, rows[3]], group)[0]["at"][0]
    assert at["wins"] is None
    assert at["why"] == "dpo has 50, the strengths 0 to 9"
    place = {
        "dataset": "d",
        "model": "m",
        "init": "base",
        "survival": [entry],
        "methods": [
            {"label": row["label"], "kl": {"value": 4.0}, "win_rate": {"value": 0.8, "low": 0.7, "high": 0.9}}
            for row in rows[2:]
        ],
    }
    drawn = wins_by_kl(place)
    assert drawn is not None
    assert "80 % at 4 nats" in drawn.title


def test_between_two_points_wins_are_on_their_line() -> None:
    reached = np.array([[0.0, 0.0], [1.0, 2.0], [4.0, 3.0]])
    wins = np.array([[0.5, 0.5], [0.6, 0.7], [0.9, 0.8]])
    for draw in range(2):
        wanted = np.array([0.7, 2.5, 5.0])
        found = [between(reached, wins, np.full(2, value))[draw] for value in wanted]
        assert found[:2] == pytest.approx(np.interp(wanted[:2], reached[:, draw], wins[:, draw]))
        assert np.isnan(found[2])


# --- carried out -------------------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_every_kind_of_policy_is_done_and_reported(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="a comparison trains its baselines with the extra baselines")
    tiny_backbone("llama", tmp_path / "model")
    save_pairs(tmp_path / "pairs.jsonl", pairs_of(24, 2))
    change = {"epochs": 1, "gradient_checkpointing": False, "batch_size": 4}
    given = study(
        models={"m": {"path": str(tmp_path / "model"), "max_tokens": 64}},
        datasets={
            "d": {"pairs": [str(tmp_path / "pairs.jsonl")], "judge": "rule:shorter"},
            "e": {"pairs": [str(tmp_path / "pairs.jsonl")], "judge": "head:coala", "max_new_tokens": 8},
        },
        settings={"full": {"source": "trl", "adapter": False, "rates": [1e-3, 1e-2], "change": change}},
        split={"test": 0.3, "validation": 0.3},
        evaluation={"prompts": 5, "max_new_tokens": 6, "kl": "replies", "questions": 2, "curve_points": 0},
        device="cpu",
    )
    out = tmp_path / "out"

    def here(self: Processes, cell: Cell, *_: Any, **__: Any) -> tuple[int, bool]:
        return carry_out(out, cell.id), False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Processes, "carry_out", here)
        run(given, out)
    content = write_report(given, out)
    assert content["failures"] == []
    assert content["counts"]["done"] == len(cells(given))
    for place in content["places"]:
        rows = {row["label"]: row for row in place["methods"]}
        labels = ("distilled", "fewer", "shift", "weighted", "rounds", "sft (full)", "steer", "steer-guided", "mean")
        for label in (*labels, "bias"):
            assert rows[label]["kl"]["value"] >= 0, label
            assert 0 <= rows[label]["policy_accuracy"]["value"] <= 1, label
            assert rows[label]["forwards"] == 1, label
        assert rows["block"]["forwards"] == 3
        assert rows["block"]["kl"] is None
        assert rows["base"]["perplexity_ratio"]["value"] == 1
        found = {one["of"]: one for one in place["survival"]}
        assert [at["strength"] for at in found["distilled"]["dial"]] == [0.5, 1.0, 1.5]
        assert {at["measure"] for at in found["mean"]["at"]} == {"kl", "perplexity"}
        whole, fewer = (found[name]["flops"] for name in ("distilled", "fewer"))
        assert fewer["replies"] < whole["replies"]
        assert whole["of"]["dpo (full)"] > 0
        # What the replies of fewer prompts took is their share of what all took.
        taught = load_json(out / "cells" / f"{place['dataset']}.m.base.teacher-coala-guided-3x5-8.s0" / "cell.json")
        assert fewer["replies"] == sum(taught["result"]["flops"]["replies"][:5])
        # Rounds share the first teacher; the policy is that of the round that is kept.
        folder = out / "cells" / f"{place['dataset']}.m.base.rounds.s0"
        about = load_json(folder / "cell.json")
        kept = about["result"]["round"]
        assert rows["rounds"]["chosen"]["round"] == kept in (1, 2)
        policies = [DistilledPolicy.load(folder / name) for name in ("policy", f"rounds/round-{kept}")]
        assert np.array_equal(policies[0].change, policies[1].change)
        assert len(list((folder / "rounds").glob("replies-*.jsonl"))) == len(about["result"]["rounds"]) - 1
        first = about["result"]["rounds"][0]
        assert about["costs"]["lessons"]["replies"] >= found["distilled"]["flops"]["replies"]
        assert about["costs"]["fit"]["search_flops"] > first["flops"]["own"] > 0
    text = (out / "report.md").read_text()
    assert "At what DPO spends" in text
    assert "head coala" in str(content["places"][1]["methods"])


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "hours"), [("distil", 5), ("distil-quick", 0.25)])
def test_the_study_of_what_survives_is_planned_within_its_time(name: str, hours: float, tmp_path: Path) -> None:
    given = load_study(name, tmp_path)
    planned = plan_study(given)
    total = plan_total(planned)
    assert total["seconds"] < 3600 * hours
    # The film model comes first.
    assert next(iter(given.datasets)) == "film"
    flops = {row["cell"].split(".")[3]: row["flops"] for row in planned if row["cell"].startswith("film.")}
    assert flops["distilled"] > flops["distilled-50"] > 0
    assert flops["lm-steer"] > flops["lm-steer-guided"] > 0
