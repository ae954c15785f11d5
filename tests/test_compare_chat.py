"""What a comparison holds heads against: cues, gates at all layers, prompts, guidance; benchmarks; the plan of it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from coala.baselines.weights import trainable
from coala.compare import cells, controls, load_study, plan_study, plan_total, planning, run, write_report
from coala.compare.benchmarks import sample
from coala.compare.cell import carry_out
from coala.compare.cell_context import CellContext
from coala.compare.contests import agreement, contests, put_ratios
from coala.compare.controls import fit_gated
from coala.compare.data import part, prepare
from coala.compare.every_layer import of_layer
from coala.compare.flop_counter import torch_flops
from coala.compare.loading import study_of
from coala.compare.matrix import Cell
from coala.compare.processes import Processes
from coala.compare.reply_plan import gated_layers
from coala.compare.steered import asked_by, examples
from coala.compare.study import Study
from coala.costs import gated_layers_flops
from coala.data.cues import SURFACE, fit_cues
from coala.evaluation import WordJudge
from coala.evaluation.rows import read_rows
from coala.recipe import RecipeError
from coala.store import save_pairs
from coala.values import Pair, Turn, user
from tests.menagerie import tiny_backbone
from tests.page_laws import keeps_to_it, of
from tests.test_compare import pairs_of
from tests.test_costs import transformer_shape

METHODS: list[dict[str, Any]] = [
    {"name": "coala", "kind": "coala", "layer": "auto", "pooling": "auto", "guidance": None},
    {"name": "linear", "kind": "coala", "layer": "auto", "pooling": "auto", "head": {"method": "linear"}},
    {"name": "layers", "kind": "layers"},
    {"name": "cues", "kind": "cues"},
    {"name": "block", "kind": "guided", "of": "coala", "guidance": {"mode": "block"}},
    {"name": "asked", "kind": "prompt", "system": True, "examples": 2},
]


def study(**change: Any) -> Study:
    about: dict[str, Any] = {
        "title": "a study",
        "models": {"m": {"path": "somewhere"}},
        "datasets": {
            "a": {"pairs": ["a.jsonl"], "system": "Be kind.", "base": True},
            "b": {"pairs": ["b.jsonl"], "base": False},
            "ab": {"joins": ["a", "b"], "base": False, "benchmarks": {"rmbench": {"path": "rm"}}},
        },
        "methods": [{**m, "datasets": ["a"]} if m["kind"] in ("guided", "prompt") else m for m in METHODS],
    }
    return study_of({**about, **change})


# --- the matrix --------------------------------------------------------------------------------------------------


def test_new_kinds_come_once_and_after_what_they_need() -> None:
    found = cells(study())
    names = [cell.id for cell in found]
    assert len(set(names)) == len(names)
    for number, cell in enumerate(found):
        assert set(cell.needs) <= set(names[:number]), cell.id
    needs = {cell.id: cell.needs for cell in found}
    # One pass over each set serves every head, and what is joined reads nothing itself.
    assert [name for name in names if ".features-" in name] == [f"{d}.m.base.features-all" for d in ("a", "b", "ab")]
    assert set(needs["ab.m.base.features-all"]) == {"a.m.base.features-all", "b.m.base.features-all"}
    assert "a.m.base.coala.s0" in needs["a.m.base.block.s0"]
    assert set(needs["ab.m.base.benchmark-rmbench"]) == {
        f"ab.m.base.{m}.s0" for m in ("coala", "linear", "layers", "cues")
    }
    assert "b.m.base.base" not in names


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"name": "x", "kind": "coala", "pooling": "auto"}, "layer must be auto"),
        ({"name": "x", "kind": "guided", "of": "cues"}, "expected of: a method of kind coala"),
        ({"name": "x", "kind": "guided", "of": "lost"}, "no method is called lost"),
        ({"name": "x", "kind": "prompt"}, "expected system: true, examples: N"),
    ],
)
def test_methods_that_cannot_be_carried_out_are_explained(method: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        study(methods=[*METHODS, method])


def test_joined_sets_hold_the_pairs_of_their_parts_and_keep_groups_apart(tmp_path: Path) -> None:
    about: dict[str, Any] = {}
    for name in ("a", "b"):
        save_pairs(tmp_path / f"{name}.jsonl", pairs_of(12))
        about[name] = {"pairs": [str(tmp_path / f"{name}.jsonl")]}
    given = study(datasets={**about, "ab": {"joins": ["a", "b"]}}, methods=METHODS[:1])
    stamps = prepare(given, tmp_path / "out")
    for piece in ("train", "test"):
        whole = part(tmp_path / "out", "ab", piece)
        apart = [pair for name in ("a", "b") for pair in part(tmp_path / "out", name, piece)]
        assert [(p.prompt, p.chosen, p.rejected) for p in whole] == [(p.prompt, p.chosen, p.rejected) for p in apart]
        assert len({p.group for p in whole}) == 2 * len({p.group for p in part(tmp_path / "out", "a", piece)})
    assert prepare(given, tmp_path / "out") == stamps


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "hours"), [("chat", 3.0), ("chat-quick", 0.5)])
def test_the_chat_study_is_planned_without_model_or_pairs_and_within_its_time(
    name: str, hours: float, tmp_path: Path
) -> None:
    planned = plan_study(load_study(name, tmp_path))
    total = plan_total(planned)
    assert total["seconds"] < 3600 * hours
    assert {row["kind"] for row in planned} >= {"features", "head", "layers", "cues", "prompt", "guided", "benchmark"}
    flops = {row["cell"].split(".")[3]: row["flops"] for row in planned if row["cell"].startswith("house-style.")}
    assert flops["five-examples"] > flops["two-examples"] > flops["system-prompt"] > 0
    # Five replies are written for one that is kept; the longer shift reads pairs as well.
    assert flops["shift"] > flops["token"] > 0
    assert flops["best-of-5"] == flops["block"]


# --- cues --------------------------------------------------------------------------------------------------------


def test_the_cue_rule_is_the_penalised_logistic_fit_of_the_differences() -> None:
    rng = np.random.default_rng(0)
    words = ["why?", "no", "- a list\n- of two", "**bold**", "Well! 12", "# Head\n", "`code`", "A long, long answer"]

    def text() -> str:
        return " ".join(rng.choice(words, rng.integers(1, 9)))

    pairs = [Pair(user("q"), text(), text(), str(i)) for i in range(80)]
    rule = fit_cues(pairs)
    columns = np.array([[cue(p.chosen) - cue(p.rejected) for cue in SURFACE.values()] for p in pairs])
    scale = np.sqrt((columns**2).mean(0))
    x = columns / scale

    def loss(w: np.ndarray) -> float:
        return float(np.logaddexp(0, -x @ w).sum() + (w @ w) / 2)

    best = minimize(loss, np.zeros(x.shape[1]), method="BFGS", options={"gtol": 1e-8}).x
    np.testing.assert_allclose([rule.weights[name] for name in SURFACE], best / scale, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(rule.margins(pairs), x @ best, rtol=1e-3, atol=1e-3)


def test_pairs_that_no_cue_tells_apart_are_ties() -> None:
    pairs = [Pair(user("q"), "the same", "the same", str(i)) for i in range(4)]
    assert (fit_cues(pairs).margins(pairs) == 0).all()


# --- a gate at every layer -----------------------------------------------------------------------------------------


def test_gated_layers_find_what_one_layer_holds_and_score_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controls, "RIDGES", (1e-3, 1e-2))
    monkeypatch.setattr(controls, "FOLDS", 2)
    rng = np.random.default_rng(0)
    chosen, rejected = (rng.normal(size=(240, 3, 8)).astype(np.float32) for _ in range(2))
    chosen[:, 1, 2] += 1.0
    group = [str(i // 2) for i in range(160)]
    head, ridge, trials = fit_gated(chosen[:160], rejected[:160], group, 0)
    margins = head.score(chosen[160:]) - head.score(rejected[160:])
    # A sum of two unit normals that one deviation parts: 76 % is the best there is.
    assert (margins > 0).mean() > 0.65
    assert ridge == min(trials, key=lambda row: row["nll"])["ridge"]
    x = (chosen[0] - head.centre) / head.spread
    by_hand = sum(
        (x[layer] @ head.weight[layer]) / (1 + np.exp(-(x[layer] @ head.gate[layer] + head.bias[layer])))
        for layer in range(3)
    )
    assert head.score(chosen[:1])[0] == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.nightly
def test_gated_layers_take_the_flops_that_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each evaluation of loss and gradient by formula; of a whole fit the plan is an upper bound, and no wild one."""
    monkeypatch.setattr(controls, "RIDGES", (1e-4, 1e-3))
    rng = np.random.default_rng(0)
    n, shape = 48, transformer_shape(n_layers=3, width=8, vocabulary=9, mlp_width=32, n_heads=2)
    chosen, rejected = rng.normal(size=(2, n, shape.n_layers, shape.width)).astype(np.float32)
    _, flops = torch_flops(lambda: controls._gated(chosen, rejected, 1e-3))
    evaluations, rest = divmod(flops, gated_layers_flops(n, shape.n_layers, shape.width, 1))
    assert rest == 0
    assert 1 < evaluations <= controls.EVALUATIONS + 25  # of a last line search
    _, whole = torch_flops(lambda: fit_gated(chosen, rejected, [str(i) for i in range(n)], 0))
    planned = gated_layers(n, shape)
    assert planned["flops"] / 4 < whole <= planned["flops"]
    # No state is read for less than a FLOP: the plan's time is that of memory.
    assert planned["moved"] > planned["flops"]
    given = study(machine={"tflops": 0.1, "memory_gb_per_second": 1})
    assert planning._seconds(given, planned["flops"], planned["moved"]) == planned["moved"] / 1e9
    assert planning._seconds(given, planned["flops"]) == planned["flops"] / 1e11


# --- prompts -----------------------------------------------------------------------------------------------------


def asking(tmp_path: Path, **method: Any) -> CellContext:
    save_pairs(tmp_path / "a.jsonl", pairs_of(12))
    about = {"a": {"pairs": [str(tmp_path / "a.jsonl")], "system": "Be kind."}}
    given = study(datasets=about, methods=[{"name": "asked", "kind": "prompt", **method}])
    prepare(given, tmp_path / "out")
    cell = next(cell for cell in cells(given) if cell.kind == "prompt")
    return CellContext(given, cell, tmp_path / "out")


def test_what_is_asked_shows_each_example_once_and_ends_with_the_prompt(tmp_path: Path) -> None:
    context = asking(tmp_path, system=True, examples=3)
    prompt = (Turn("system", "Be rude."), *user("And now?"))
    asked = asked_by(context)(prompt)
    shown = examples(context.part("train"), 3, 0)
    assert asked[0] == Turn("system", "Be kind.")
    assert [turn.role for turn in asked] == ["system", *["user", "assistant"] * 3, "user"]
    assert [turn.text for turn in asked if turn.role == "assistant"] == [pair.chosen for pair in shown]
    assert all([turn.text for turn in asked].count(pair.prompt[0].text) == 1 for pair in shown)
    assert asked[-1] == prompt[-1]
    # More examples begin with the same ones, and none is of a held-out prompt.
    assert examples(context.part("train"), 2, 0) == shown[:2]
    assert not {pair.prompt for pair in shown} & {pair.prompt for pair in context.part("test")}


def test_a_conversation_keeps_its_own_system_prompt_behind_examples_alone(tmp_path: Path) -> None:
    asked = asked_by(asking(tmp_path, examples=1))((Turn("system", "Be rude."), *user("And now?")))
    assert [turn.role for turn in asked] == ["system", "user", "assistant", "user"]
    assert asked[0].text == "Be rude."


# --- what is made of cells -----------------------------------------------------------------------------------------


def test_samples_of_a_benchmark_are_even_and_grow_by_adding() -> None:
    items: Any = tuple(SimpleNamespace(id=f"{s}{i}", subset=s) for s in "abc" for i in range(10))
    drawn = {most: sample(items, most, 3) for most in (6, 12, 40)}
    assert set(drawn[6]) < set(drawn[12])
    assert drawn[40] == list(range(30))
    assert sorted(items[i].subset for i in drawn[12]) == sorted("abc" * 4)


def row(label: str, kind: str, accuracy: float, wins: float | None, scores: list[float] | None) -> dict[str, Any]:
    ends = {"low": 0.0, "high": 1.0, "n": 9}
    return {
        "label": label,
        "kind": kind,
        "convex": kind == "guided",
        "mode": None,
        "accuracy": {"value": accuracy, **ends},
        "policy_accuracy": None,
        "win_rate": None if wins is None else {"value": wins, **ends},
        "judge_scores": scores,
        "perplexity": {"value": 10 * accuracy, "low": 9 * accuracy, "high": 12 * accuracy, "n": 9},
    }


def test_contests_and_agreement_count_what_they_say() -> None:
    rows = [
        row("base", "base", 0.5, None, [0.0, 1.0, 2.0, 3.0]),
        row("block", "guided", 0.6, 0.7, [1.0, 1.0, 3.0, 4.0]),
        row("asked", "prompt", 0.7, 0.9, [2.0, 1.0, 3.0, 5.0]),
        row("linear", "coala", 0.8, None, None),
    ]
    found = {one["of"]: one["wins"]["value"] for one in contests(rows, list("abcd"))}
    assert found == {"base": 0.125, "asked": 0.75}
    (tau,) = agreement(rows)
    assert (tau["first"], tau["second"], tau["n"], tau["tau"]) == ("ranking accuracy", "wins", 3, 1.0)
    # By counting pairs of methods that both measures order alike.
    pairs = itertools.combinations([(0.5, 0.5), (0.6, 0.7), (0.7, 0.9)], 2)
    assert tau["tau"] == np.mean([np.sign((a - c) * (b - d)) for (a, b), (c, d) in pairs])
    put_ratios(rows)
    ratio = rows[1]["perplexity_ratio"]
    assert ratio["value"] == pytest.approx(1.2)
    assert ratio["low"] < 1.2 < ratio["high"]


# --- carried out -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    """A study of every new kind on a tiny model, its cells carried out in this process."""
    made = tmp_path_factory.mktemp("made")
    tiny_backbone("llama", made / "model")
    for name in ("a", "b"):
        save_pairs(made / f"{name}.jsonl", pairs_of(16, 2))
    rows = [
        {
            "pair_id": f"p{i}",
            "source": "livebench-math",
            "question": f"question {i}",
            "response_A": "a fine answer",
            "response_B": "a poor answer",
            "label": "A>B" if i % 2 else "B>A",
        }
        for i in range(6)
    ]
    (made / "bench.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (made / "prompts.jsonl").write_text("".join(json.dumps({"text": f"tell {i}"}) + "\n" for i in range(12)))
    words = {"name": "letters", "pattern": "[a-z]", "weights": {"a": 1.0, "e": 2.0, "t": -1.0}}
    (made / "words.json").write_text(json.dumps(words))
    given = study(
        models={"m": {"path": str(made / "model"), "max_tokens": 64}},
        datasets={
            "a": {"pairs": [str(made / "a.jsonl")], "system": "be kind", "judge": "rule:house-style"},
            "b": {"pairs": [str(made / "b.jsonl")], "base": False, "prompts": 0},
            "ab": {
                "joins": ["a", "b"],
                "base": False,
                "prompts": 0,
                "benchmarks": {"judgebench": {"path": str(made / "bench.jsonl"), "prompts": 4}},
            },
            "own": {
                "sampled": {
                    "prompts": str(made / "prompts.jsonl"),
                    "labeller": str(made / "words.json"),
                    "replies": 3,
                    "max_new_tokens": 8,
                }
            },
        },
        methods=[
            *({**m, "datasets": ["a", "own"]} if m["kind"] == "guided" else m for m in METHODS[:5]),
            {**METHODS[5], "datasets": ["a"]},
            {"name": "shift", "kind": "guided", "of": "linear", "guidance": {"mode": "shift"}, "datasets": ["a"]},
        ],
        split={"test": 0.3},
        evaluation={"prompts": 3, "max_new_tokens": 6, "kl_prompts": 2, "questions": 2, "policy_pairs": 3},
        device="cpu",
        count_flops=False,
    )
    out = made / "out"

    def here(self: Processes, cell: Cell, *_: Any, **__: Any) -> tuple[int, bool]:
        return carry_out(out, cell.id), False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Processes, "carry_out", here)
        run(given, out)
    return given, out


@pytest.mark.nightly
def test_every_new_kind_of_cell_is_done_and_reported(done: tuple[Study, Path]) -> None:
    given, out = done
    content = write_report(given, out)
    assert content["failures"] == []
    assert content["counts"]["done"] == len(cells(given))
    places = {place["dataset"]: place for place in content["places"]}
    rows = {row["label"]: row for row in places["a"]["methods"]}
    assert {"base", "coala", "layers", "cues", "block", "asked", "shift"} <= set(rows)
    # These replies can be told apart by a word, which gates at layers can see and surface cues cannot.
    assert rows["coala"]["accuracy"]["value"] > 0.9
    assert rows["layers"]["accuracy"]["value"] > 0.9
    assert rows["shift"]["policy"].startswith("known")
    assert "not known in mode block" in rows["block"]["policy"]
    assert 0 <= rows["asked"]["policy_accuracy"]["value"] <= 1
    assert rows["asked"]["kl"]["value"] >= 0
    assert rows["block"]["accuracy"] == rows["coala"]["accuracy"]
    assert 0 <= rows["block"]["rules_kept"]["value"] <= 5
    assert {one["of"] for one in places["a"]["contests"]} == {"base", "linear", "shift", "asked"}
    (bench,) = places["ab"]["benchmarks"]
    assert set(bench["rankings"]) == {"coala", "linear", "layers", "cues", "longer reply"}
    assert (bench["items"], bench["of"], bench["replies"]) == (4, 6, 8)
    text = (out / "report.md").read_text()
    assert "Kendall's tau" in text
    assert "cannot be reproduced" not in text


@pytest.mark.nightly
def test_the_report_keeps_to_what_all_pages_do_and_leads_to_every_place(done: tuple[Study, Path], browser: Any) -> None:
    given, out = done
    content = write_report(given, out)
    made = (out / "report.html").read_text()
    keeps_to_it(browser, of(made))
    seen = browser.new_page()
    seen.set_content(made)
    links = seen.locator(".findings a")
    assert links.all_inner_texts() == [place["dataset"] for place in content["places"] if place["findings"]]
    for link in links.all():
        assert seen.locator(link.get_attribute("href")).inner_text().startswith(link.inner_text())
    seen.close()


@pytest.mark.nightly
def test_joined_features_are_those_of_the_parts_and_the_pick_has_the_least_loss(done: tuple[Study, Path]) -> None:
    given, out = done
    cell = next(c for c in cells(given) if c.id == "ab.m.base.features-all")
    context = CellContext(given, cell, out)
    apart = [of_layer(context, 1, "last", "test", name).chosen for name in ("a", "b")]
    np.testing.assert_array_equal(of_layer(context, 1, "last", "test").chosen, np.concatenate(apart))
    found = context.result(cell.id)
    best = min(found["layers"], key=lambda one: one["nll"])
    assert best["chosen"]
    assert (found["spec"]["layer"], found["spec"]["pooling"]) == (best["layer"], best["pooling"])


@pytest.mark.nightly
def test_pairs_sampled_from_the_model_are_the_best_against_the_worst_and_are_kept(done: tuple[Study, Path]) -> None:
    given, out = done
    pairs = [pair for piece in ("train", "test") for pair in part(out, "own", piece)]
    settings = given.datasets["own"].sampled
    assert settings is not None
    scorer = WordJudge.load(settings.labeller)
    assert pairs
    assert all(scorer.score(pair.chosen) > scorer.score(pair.rejected) for pair in pairs)
    before = (out / "data" / "own" / "sampled.jsonl").stat().st_mtime_ns
    prepare(given, out)
    assert (out / "data" / "own" / "sampled.jsonl").stat().st_mtime_ns == before
    # Made again from the replies that were kept: it is told how many there are.
    heard: list[tuple[object, ...]] = []
    (out / "data" / "own" / "sampled.json").unlink()
    prepare(given, out, lambda *stage: heard.append(stage))
    assert heard[0][0] == "own: replies to choose from"
    assert heard[0][2] == settings.replies * len(read_rows(settings.prompts))


@pytest.mark.nightly
def test_a_gguf_model_starts_from_one_copy_of_its_weights(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the extra gguf")
    from coala.backbone import load_backbone
    from tests.test_backbone_gguf import make_folder, write_gguf

    file = write_gguf(make_folder(tmp_path / "model"), tmp_path / "tiny.gguf", "Q8_0")
    copy = trainable(str(file), tmp_path / "copy")
    written = (tmp_path / "copy" / "model.safetensors").stat().st_mtime_ns
    assert trainable(str(file), tmp_path / "copy") == copy == tmp_path / "copy"
    assert (tmp_path / "copy" / "model.safetensors").stat().st_mtime_ns == written
    assert trainable(str(copy), tmp_path / "other") == str(copy)
    mine, theirs = (load_backbone(place, device="cpu", dtype="float32") for place in (copy, file))
    row = mine.render(user("hello")).tokens
    assert row == theirs.render(user("hello")).tokens
    a, b = (model.start([row]).log_probs() for model in (mine, theirs))
    assert float((a - b).abs().max()) < 1e-6
