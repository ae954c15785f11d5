"""Rounds of distillation, and the policy on the page of its run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import coala
from coala.alignment.changes import adopt
from coala.backbone import LanguageModel, load_backbone
from coala.cli import app
from coala.decoding import Guidance, generate, generate_distilled
from coala.distil.matrix import output_matrix
from coala.distil.measured import measure
from coala.distil.rounds import held_out_prompts
from coala.distil.side_by_side import distil_into_report
from coala.distil.stage import Work, distil, settings_of
from coala.distil.states import Lesson, teacher_states
from coala.policies import DistilledPolicy
from coala.recipe import RecipeError, load_recipe, recipe_of
from coala.report.distilled import shown, spoken
from coala.settings import DistilSettings
from coala.store import RunFolder, load_json, save_json, save_pairs
from coala.values import CoalaError, Estimate, Pair, conversation_text, prompt_id, user

from .menagerie import tiny_backbone
from .test_align import pair_rows, write_rows
from .test_distil import PROMPTS, policy_of, with_layer


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_backbone(tiny_backbone("llama", tmp_path_factory.mktemp("llama")), device="cpu")


def test_nuclei_of_a_later_round_are_those_of_the_policy_that_wrote(backbone: LanguageModel, tmp_path: Path) -> None:
    """As a model of its own has them whose output layer is the policy's; states and base matrix are untouched."""
    policy, W = policy_of(backbone, 0.2), output_matrix(backbone)
    other = with_layer(Path(backbone.name), W + W @ policy.change)
    lessons = [Lesson(prompt, text, n) for n, (prompt, text) in enumerate(zip(PROMPTS, ("a", "b c", "d"), strict=True))]
    guidance = Guidance.unguided(top_k=20)
    found = teacher_states(backbone, W, lessons, tmp_path / "found", guidance, change=policy.change)
    wanted = teacher_states(other, output_matrix(other), lessons, tmp_path / "wanted", guidance)
    base = teacher_states(backbone, W, lessons, tmp_path / "base", guidance)
    assert np.array_equal(found.size, wanted.size)
    inside = np.arange(found.tokens.shape[1]) < found.size[:, None]
    assert np.array_equal(np.where(inside, found.tokens, -1), np.where(inside, wanted.tokens, -1))
    assert not np.array_equal(found.tokens, base.tokens)
    assert np.allclose(found.states, base.states)


def test_rounds_are_chosen_on_prompts_that_nothing_was_fitted_to(tmp_path: Path) -> None:
    pairs = [Pair(user(f"prompt {n}"), "a", "b", str(n)) for n in range(12)]
    save_pairs(tmp_path / "pairs-train.jsonl", pairs[:5])
    save_pairs(tmp_path / "pairs-eval.jsonl", [*pairs[3:], pairs[-1]])
    recipe = load_recipe(None, {"pairs": ["x"], "model": {"name": "x"}, "evaluation": {"prompts": 3}})
    told: list[str] = []

    def chosen(held_out: int) -> list[str]:
        settings = DistilSettings(rounds=2, held_out=held_out)
        nothing: Any = dict.fromkeys(("backbone", "head", "guidance", "sampled_at", "longest", "prompts", "folder"))
        work = Work(run=RunFolder(tmp_path), recipe=recipe, settings=settings, on_note=told.append, **nothing)
        return [conversation_text(prompt).split()[-1] for prompt in held_out_prompts(work)]

    # Of 5 to 11, which are not trained on, the report answers the first three.
    assert chosen(4) == ["8", "9", "10", "11"]
    assert told == []
    assert chosen(6) == ["8", "9", "10", "11", "5", "6"]
    assert told == ["2 of the 6 prompts that choose the round are answered in the report too"]
    save_pairs(tmp_path / "pairs-eval.jsonl", pairs[3:6])
    with pytest.raises(CoalaError, match=r"Found 1 held-out prompts .* expected at least 2"):
        chosen(4)


def test_the_page_tells_what_was_distilled_or_why_nothing_was() -> None:
    def value(at: float) -> dict[str, Any]:
        return vars(Estimate(at, at - 0.1, at + 0.1, 40, "made up"))

    row = {"gain": value(0.5), "perplexity_ratio": value(1.2), "wins": value(0.8), "forwards": 1.0}
    rows = [
        {**row, "name": "unguided", "wins": None, "divergence": value(0.0)},
        {**row, "name": "guided", "divergence": None, "forwards": 5.0, "method": "block"},
        {**row, "name": "distilled", "divergence": value(5.5), "method": "distilled"},
    ]
    content = {"judge": "words", "statement": "No change gains more.", "rows": rows, "summary": [["rank", "4 of 192"]]}
    page = "".join(part.__html__() for part in shown(content) if part)  # type: ignore[union-attr]
    for words in ("Wins against unguided (words)", "80.0 %", "not known", "5.5", "No change gains more.", "4 of 192"):
        assert words in page
    assert spoken(content) == [
        "The distilled policy, at one forward pass per token, is preferred to unguided replies in 80.0 % (70.0 "
        "to 90.0 %), "
        "n = 40, at 5.5 (5.4 to 5.6) nats per reply."
    ]
    nothing = {"nothing": "Found a head that is no better than chance."}
    assert spoken(nothing) == ["Nothing was distilled. Found a head that is no better than chance."]
    assert "Nothing was distilled" in str(shown(nothing)[0])
    assert spoken({**content, "stale": True}) == []
    assert shown({}) == []


# --- end to end -----------------------------------------------------------------------------------------------------


SMALL: dict[str, Any] = {"prompts": 8, "candidates": 6, "block_tokens": 3, "rank": 2, "ridge": 0.01}


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aligned")
    tiny_backbone("llama", folder / "model")
    write_rows(folder / "pairs.jsonl", pair_rows(60, 30))
    coala.align(
        folder / "pairs.jsonl",
        model=folder / "model",
        out=folder / "run",
        head={"method": "linear"},
        guidance={"rule": "min-max"},
        eval_fraction=0.5,
        evaluation={"prompts": 4, "max_new_tokens": 6},
        distil=SMALL,
    )
    return folder / "run"


def test_what_is_distilled_is_the_recipes_with_what_is_given_over_it(tmp_path: Path) -> None:
    given: dict[str, Any] = {"pairs": ["x"], "model": {"name": "x"}}
    recipe = load_recipe(None, {**given, "distil": {"teacher": "weighted", "beta": 0.5, "rank": "full"}})
    run = RunFolder(tmp_path / "run")
    assert adopt(recipe, run) == []
    assert recipe_of(run.settings) == recipe
    assert settings_of(run.path, {}) == recipe.distil == DistilSettings(teacher="weighted", beta=0.5, rank="full")
    assert settings_of(run.path, {"beta": 2.0, "rank": 4}) == DistilSettings(teacher="weighted", beta=2.0, rank=4)
    assert recipe_of(run.settings) == recipe
    with pytest.raises(RecipeError, match=r"run.json: distil\.beta: found -1, expected more than 0"):
        settings_of(run.path, {"beta": -1})
    # Other settings of it undo nothing; a run of before there was the section has its defaults.
    (run.path / "distilled").mkdir()
    changed = replace(recipe, distil=DistilSettings(prompts=9))
    assert any("distil.prompts: 300 -> 9" in line for line in adopt(changed, run))
    assert (run.path / "distilled").is_dir()
    assert settings_of(run.path, {}).prompts == 9
    save_json(run.path / "run.json", {name: value for name, value in recipe.plain().items() if name != "distil"})
    assert settings_of(run.path, {}) == DistilSettings()
    # What the demo on a chat model distils by is its recipe's.
    chat = load_recipe(Path(coala.__file__).parent / "recipes" / "demo-chat.yaml", given)
    assert (chat.distil.teacher, chat.distil.rank) == ("weighted", "full")


@pytest.mark.slow
@pytest.mark.nightly
def test_rounds_end_where_nothing_is_gained_and_resume_from_wherever_they_are_killed(tmp_path: Path) -> None:
    """On the bundled model, whose texts are read as the tokens that they were written in."""
    settings_of_rounds = DistilSettings(prompts=40, rank=4, rounds=2)
    assets = Path(coala.__file__).parent / "assets"
    coala.align(
        list(coala.read_pairs(assets / "film_pairs.jsonl.gz"))[:400],
        model=assets / "film-lm",
        out=tmp_path / "aligned",
        model_settings={"template": "chat"},
        head={"method": "linear"},
        eval_fraction=0.25,
        evaluation={"prompts": 0, "max_new_tokens": 24},
    )
    for name in ("whole", "killed"):
        shutil.copytree(tmp_path / "aligned", tmp_path / name)
    told: list[str] = []
    whole = distil(tmp_path / "whole", settings_of_rounds, on_note=told.append)
    about = load_json(tmp_path / "whole/distilled/path.json")
    rounds, kept = about["rounds"], about["kept_round"]
    gained = [row["gain"]["low"] > 0 for row in rounds]
    # It goes on while the interval lies above 0, and the last such round is kept.
    assert all(gained[:-1])
    assert len(rounds) > 1
    assert len(rounds) == settings_of_rounds.rounds or not gained[-1]
    assert kept == (len(rounds) if gained[-1] else max(1, len(rounds) - 1))
    assert sum(
        line.startswith("round ") and f"n = {rounds[0]['gain']['n']} held-out prompts" in line for line in told
    ) == len(rounds)
    best = DistilledPolicy.load(tmp_path / f"whole/distilled/round-{kept}")
    assert np.array_equal(best.change, whole.change)
    # The gain is that of the policy's own replies to held-out prompts, with the base model's noise.
    own = coala.load_run(tmp_path / "whole")
    by_id = {prompt_id(pair.prompt): pair.prompt for pair in coala.load_pairs(tmp_path / "whole/pairs-eval.jsonl")}
    prompts = list(by_id.values())
    settings: dict[str, Any] = {"max_new_tokens": 24, "seed": 0, "prompt_ids": list(by_id), "batch_size": 32}
    first = own.backbone.with_policy(DistilledPolicy.load(tmp_path / "whole/distilled/round-1"))
    both = (Guidance("distilled"), Guidance("none"))
    ours, base = (generate(prompts, first, own.head, one, **settings) for one in both)
    gain = np.mean([a.score - b.score for a, b in zip(ours, base, strict=True)])
    assert rounds[0]["gain"]["value"] == pytest.approx(gain, abs=1e-4)
    alone = generate_distilled(prompts, own.backbone, first.policy, **settings)
    assert rounds[0]["divergence"]["value"] == pytest.approx(np.mean([one.divergence for one in alone]), rel=1e-4)

    class Killed(BaseException):
        pass

    seen: set[tuple[str, float, int]] = set()

    def show(stage: str, done: float, *_: Any) -> None:
        step = stage, done, len(list((tmp_path / "killed/distilled").glob("round-*/fit.json")))
        if not stage.startswith(("distil ridge", "distil rank")) and step not in seen:
            seen.add(step)
            raise Killed

    times = 0
    while True:
        try:
            resumed = distil(tmp_path / "killed", settings_of_rounds, on_progress=show)
            break
        except Killed:
            times += 1
    assert times > 5 * len(rounds)
    assert np.array_equal(resumed.change, whole.change)
    again = load_json(tmp_path / "killed/distilled/path.json")
    assert {k: v for k, v in again.items() if k != "path"} == {k: v for k, v in about.items() if k != "path"}


@pytest.mark.nightly
def test_align_distils_at_its_end_and_tells_where_there_is_nothing_to(aligned: Path, tmp_path: Path) -> None:
    shutil.copytree(aligned, tmp_path / "run")
    content = distil_into_report(tmp_path / "run")
    rows = {row["name"]: row for row in content["distilled"]["rows"]}
    assert list(rows) == ["unguided", "guided", "distilled"]
    assert [row["forwards"] for row in rows.values()] == [1.0, 5.0, 1.0]
    assert rows["distilled"]["divergence"]["value"] > 0 == rows["unguided"]["divergence"]["value"]
    assert rows["guided"]["divergence"] is None
    page = (tmp_path / "run/report.html").read_text()
    assert "The distilled policy" in page
    made = (tmp_path / "run/distilled/policy.json").stat().st_mtime_ns
    assert SMALL.items() <= load_json(tmp_path / "run/distilled/path.json")["settings"].items()
    distil_into_report(tmp_path / "run", DistilSettings(**SMALL))
    assert (tmp_path / "run/distilled/policy.json").stat().st_mtime_ns == made
    # The run's unguided replies are measured against, as on its page.
    told: list[str] = []
    policy = DistilledPolicy.load(tmp_path / "run/distilled")
    before = load_json(tmp_path / "run/distilled/measured.json")
    seen = measure(tmp_path / "run", policy, on_note=told.append)
    assert "unguided replies: the run's own 4, in generations-unguided.jsonl" in told
    assert seen.unguided_perplexity.value == pytest.approx(before["unguided_perplexity"]["value"], rel=1e-6)
    (tmp_path / "run/generations-unguided.jsonl").rename(tmp_path / "kept")
    again = measure(tmp_path / "run", policy, on_note=told.append)
    assert "unguided replies: generated now" in told[-1]
    assert again.unguided_perplexity.value == pytest.approx(seen.unguided_perplexity.value, rel=1e-4)
    (tmp_path / "kept").rename(tmp_path / "run/generations-unguided.jsonl")
    # Another policy in its place: the page says so.
    distil(tmp_path / "run", DistilSettings(**{**SMALL, "rank": 1}))
    assert coala.alignment.make_report(RunFolder(tmp_path / "run"))["distilled"]["stale"]
    # By the calibrated rule a head of random pairs guides nothing.
    rows_at_random = pair_rows(40, 20)
    for n, row in enumerate(rows_at_random):
        if n % 2:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    write_rows(tmp_path / "random.jsonl", rows_at_random)
    line = ["align", str(tmp_path / "random.jsonl"), "--model", str(aligned.parent / "model"), "--distil", "--json"]
    line += ["--out", str(tmp_path / "chance"), "--method", "linear", "--prompts", "2", "--max-new-tokens", "4"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    assert "nothing was distilled: Found a head that is no better than chance" in " ".join(result.stderr.split())
    assert "no better than chance" in json.loads(result.stdout.strip().splitlines()[-1])["distilled"]["nothing"]
    assert "Nothing was distilled." in (tmp_path / "chance/report.html").read_text()
