"""`coala generate`, and prompts as Python may give them: sampling, what does not fit, what is said of a head."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import GenerationConfig
from typer.testing import CliRunner

import coala
from coala.alignment import evidence_notes, load_parts
from coala.alignment.talking import Talker, sampled
from coala.cli import app as cli
from coala.cli import output
from coala.cli.terminal import visible
from coala.decoding import Guidance, generate
from coala.recipe import load_recipe
from coala.store import RunFolder, load_generations, save_features, save_generations
from coala.values import CoalaError, ConvexHead, FeatureSet, Generation, Pair, Turn, turns, user


@pytest.fixture(scope="module")
def parts(served_run: Path) -> Any:
    return load_parts(served_run)


def run(folder: Path, *words: str) -> tuple[str, str, Any]:
    done = CliRunner().invoke(cli, ["generate", str(folder), "--max-new-tokens", "6", *words])
    assert done.exit_code == 0, (done.stderr, done.exception)
    return done.stdout, done.stderr, json.loads(done.stdout.strip().split("\n")[-1])


# --- the command ----------------------------------------------------------------------------------------------------


def test_several_prompts_are_shown_with_their_replies(served_run: Path, parts: Any) -> None:
    backbone, head, guidance = parts
    out, err, found = run(served_run, "hello", "a film", "--system", "be brief", "--top-k", "7", "--top-p", "0.5")
    prompts = [(Turn("system", "be brief"), Turn("user", text)) for text in ("hello", "a film")]
    rule = replace(guidance, top_k=7, top_p=0.5)
    wanted = [reply.text for reply in generate(prompts, backbone, head, rule, max_new_tokens=6, seed=0)]
    assert [reply["text"] for reply in found["guided"]] == wanted
    assert out.startswith(visible(f"> hello\n\n{wanted[0]}\n\n> a film\n\n{wanted[1]}\n"))
    assert "sampling: temperature 1 (default), top-p 0.5 (as asked), top-k 7 (as asked)" in err
    assert "never calibrated" in err


def test_a_changed_mode_is_told(served_run: Path) -> None:
    _, err, found = run(served_run, "hello", "--mode", "block", "--strength", "3")
    assert found["guided"][0]["method"] == "block, calibrated 3, 5 x 5 tokens"
    assert "mode token" not in err
    _, err, found = run(served_run, "hello", "--rule", "min-max")
    assert found["guided"][0]["method"].startswith("token, min-max 2")


@pytest.mark.parametrize("system", [None, "be brief"])
def test_a_prompt_that_does_not_fit_is_refused_or_cut_aloud(parts: Any, system: str | None) -> None:
    backbone = parts[0]
    said: list[str] = []
    room = Talker(backbone, parts[1], parts[2], 0.0, said.append).room
    context = backbone.max_tokens
    options: dict[str, Any] = {"cut": False, "mend": "Shorten it."}
    assert room(user("hello"), 6, **options) == 6
    assert not said
    left = room(user("hello"), context, **options)
    assert left == context - len(backbone.render("hello").tokens)
    assert f"leaves {left:,} of the {context:,} requested tokens" in said[-1]
    long = user("a film " * context)
    with pytest.raises(CoalaError, match=rf"context_length: the prompt has .* holds {context:,}, .* Shorten it\."):
        room(long, 6, **options)
    assert room(long, 6, cut=True, mend="") == 6
    assert "tokens are truncated" in said[-1]


@pytest.mark.parametrize(
    ("flag", "recipe", "config", "found"),
    [
        (None, {}, {}, (1.0, "default")),
        (None, {}, {"temperature": 0.2}, (0.2, "the model's own")),
        (None, {"evaluation": {"temperature": 0.7}}, {"temperature": 0.2}, (0.7, "the run's recipe")),
        (0.4, {"evaluation": {"temperature": 0.7}}, {"temperature": 0.2}, (0.4, "as asked")),
        (0.0, {}, {"temperature": 0.2}, (0.0, "as asked")),
    ],
)
def test_where_sampling_settings_come_from(flag: Any, recipe: Any, config: Any, found: Any) -> None:
    settings = load_recipe(None, {"pairs": ["x"], "model": {"name": "m"}}, recipe)
    model = SimpleNamespace(generation_config=GenerationConfig(do_sample=True, **config))
    chosen = sampled({"temperature": flag}, settings, model)
    assert chosen["temperature"] == found
    assert chosen["top-p"] == (0.9, "default")


def test_a_generation_config_that_makes_no_sense_is_left_alone() -> None:
    settings = load_recipe(None, {"pairs": ["x"], "model": {"name": "m"}})
    model = SimpleNamespace(generation_config=SimpleNamespace(to_diff_dict=lambda: {"top_p": 3.0, "top_k": "many"}))
    assert {source for _, source in sampled({}, settings, model).values()} == {"default"}
    model = SimpleNamespace(generation_config=GenerationConfig(do_sample=True, top_p=0.8, top_k=20))
    assert [value for value, _ in sampled({}, settings, model).values()] == [1.0, 0.8, 20]


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("words", [[], ["--json"]], ids=["plain", "json"])
def test_json_is_for_pipes_and_for_who_asks(terminal: bool, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    emit = output.emit

    def watched(result: dict[str, Any], **options: Any) -> None:
        import sys

        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
        seen.append(result)
        emit(result, **options)

    monkeypatch.setattr(output, "emit", watched)
    done = CliRunner().invoke(cli, ["data", "formats", *words])
    assert done.exit_code == 0
    assert ('{"formats": [' in done.stdout) == (not terminal or bool(words))
    assert "preference" in done.stdout
    assert len(seen) == 1


# --- what is said of a head -----------------------------------------------------------------------------------------


def _run(folder: Path, head: ConvexHead, right: int, n: int) -> RunFolder:
    """A run folder whose head ranks ``right`` of ``n`` held-out pairs right."""
    made = RunFolder(folder)
    chosen = np.zeros((n, head.width), np.float32)
    direction = head.linear[:-1] / np.linalg.norm(head.linear[:-1])
    chosen[:right] += direction
    chosen[right:] -= direction
    group = np.arange(n).astype(str)
    save_features(made.path / "features/eval", FeatureSet(chosen, np.zeros_like(chosen), group, head.spec))
    return made


def test_a_head_at_chance_is_told_in_one_line(parts: Any, tmp_path: Path) -> None:
    backbone = parts[0]
    rng = np.random.default_rng(0)
    none = np.zeros((0, backbone.width + 1))
    head = ConvexHead(none, none, rng.normal(size=backbone.width + 1), backbone.spec(2), least_slope=0.5)
    chance, good = _run(tmp_path / "a", head, 7, 15), _run(tmp_path / "b", head, 48, 60)
    swapped, few = _run(tmp_path / "c", head, 12, 60), _run(tmp_path / "d", head, 1, 1)
    start = "The head is not distinguishable from chance on held-out pairs: "
    start += "accuracy 46.7 % [24.8, 69.9], n = 15, includes 50 %."
    calibrated, old = Guidance(), Guidance(rule="min-max")
    silent, unknown = replace(head, least_slope=0.0), replace(head, least_slope=None)
    (told,) = evidence_notes(chance.path, head, calibrated)
    assert told == f"{start} Guidance follows the evidence of cross-validation on the training pairs."
    (told,) = evidence_notes(chance.path, silent, calibrated)
    assert told == f"{start} Cross-validation finds no evidence either, so replies stay unguided."
    (told,) = evidence_notes(chance.path, head, old)
    assert told.startswith(f"{start} By rule min-max it still steers at full strength")
    assert evidence_notes(chance.path, head, Guidance("none")) == [start]
    assert "worse than chance on held-out pairs: accuracy 20.0 %" in evidence_notes(swapped.path, head, calibrated)[0]
    assert "n = 1" in evidence_notes(few.path, head, calibrated)[0]
    assert evidence_notes(good.path, head, calibrated) == []
    assert evidence_notes(good.path, silent, old) == []
    assert "replies stay unguided" in evidence_notes(good.path, silent, calibrated)[0]
    assert "never calibrated" in evidence_notes(good.path, unknown, calibrated)[0]
    assert "a temperature (3)" in evidence_notes(good.path, replace(unknown, temperature=3.0), calibrated)[0]
    assert evidence_notes(tmp_path / "nowhere", head, calibrated) == []


# --- prompts in Python ----------------------------------------------------------------------------------------------


def test_a_prompt_is_a_text_turns_or_messages(parts: Any) -> None:
    backbone, head, _ = parts
    message = {"role": "user", "content": "hello"}
    forms: list[Any] = [
        "hello",
        user("hello"),
        [message],
        [{**message, "content": [{"type": "text", "text": "hello"}]}],
    ]
    options: dict[str, Any] = {"max_new_tokens": 4, "seed": 0, "prompt_ids": ["a"] * 4}
    assert len({reply.text for reply in coala.generate(forms, backbone, head, **options)}) == 1
    assert len(set(coala.log_likelihood(forms, ["a film"] * 4, backbone))) == 1
    assert {Pair(form, "a", "b", "g").prompt for form in forms} == {user("hello")}
    assert turns([{"role": "developer", "content": "x"}]) == (Turn("system", "x"),)


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ("hello", r"Found one text, 'hello', as prompts; expected a list\. Fix: \['hello'\]"),
        ([{"role": "user", "content": "a"}], "Found one message as prompt 0; expected a conversation"),
        ([Turn("user", "a")], "Found one message as prompt 0"),
        (["a", 3], "Found a int as prompt 1; expected a text"),
        ([[3]], "Found a int among the messages of prompt 0"),
        ([[{"text": "a"}]], "Found a mapping with"),
        ([[{"role": "user", "content": 3}]], "Found content of type int"),
        ([[{"role": "robot", "content": "a"}]], "role 'robot'"),
        (3, "Found prompts of type int"),
    ],
)
def test_other_prompts_are_named(parts: Any, prompts: Any, said: str) -> None:
    with pytest.raises(CoalaError, match=said):
        coala.generate(prompts, parts[0], max_new_tokens=4, seed=0)


def test_wrong_types_are_named(parts: Any, served_run: Path) -> None:
    backbone, head, guidance = parts
    options: dict[str, Any] = {"max_new_tokens": 4, "seed": 0}
    wrong: Any = str(served_run)
    with pytest.raises(CoalaError, match=r"Found a model of type str; expected what coala.load_backbone"):
        coala.generate(["a"], wrong, **options)
    with pytest.raises(CoalaError, match=r"Found a head of type str; expected what coala.load_head"):
        coala.generate(["a"], backbone, wrong, **options)
    with pytest.raises(CoalaError, match=r"Found guidance of type str; expected coala.Guidance"):
        coala.generate(["a"], backbone, head, wrong, **options)
    with pytest.raises(CoalaError, match="not a run folder"):
        coala.guide("nowhere")
    wrong = 3
    with pytest.raises(CoalaError, match="Found a head of type int; expected a ConvexHead, or a run's folder"):
        coala.guide(wrong)
    guide = coala.guide(served_run)
    assert guide.guidance == guidance
    np.testing.assert_array_equal(guide.head.linear, head.linear)
    assert coala.__version__


def test_replies_are_kept_with_their_prompts(parts: Any, tmp_path: Path) -> None:
    backbone = parts[0]
    replies = coala.generate(["hello"], backbone, max_new_tokens=4, seed=0, prompt_ids=["a"])
    save_generations(tmp_path / "g.jsonl", replies, {"a": user("hello")})
    assert json.loads((tmp_path / "g.jsonl").read_text())["prompt"] == [{"role": "user", "content": "hello"}]
    (found,) = load_generations(tmp_path / "g.jsonl")
    assert replace(found, score=0.0) == replace(replies[0], score=0.0)


# --- replies that are kept ------------------------------------------------------------------------------------------


def test_replies_are_kept_batch_by_batch_and_not_made_again(parts: Any, tmp_path: Path) -> None:
    backbone, head, guidance = parts
    file, told = tmp_path / "kept.jsonl", []

    def made(*ids: str) -> list[Generation]:
        told.clear()
        return generate(
            ["hello", "a film", "tell me more of it"],
            backbone,
            head,
            guidance,
            max_new_tokens=4,
            seed=0,
            prompt_ids=ids,
            batch_size=2,
            kept=file,
            on_reply=lambda done, total: told.append((done, total)),
        )

    whole = made("a", "b", "c")
    assert told == [(0, 3), (2, 3), (3, 3)]
    assert load_generations(file) == whole
    marked = [replace(reply, text="kept") for reply in whole]
    save_generations(file, marked)
    assert made("a", "b", "c") == marked
    assert told == [(3, 3)]
    save_generations(file, marked[:2])
    assert made("a", "b", "c") == [*marked[:2], whole[2]] == load_generations(file)
    assert told == [(2, 3), (3, 3)]
    # Half a batch, and other ids: made anew.
    save_generations(file, marked[:1])
    assert made("a", "b", "c") == whole
    save_generations(file, marked)
    assert [reply.prompt_id for reply in made("a", "b", "d")] == ["a", "b", "d"]
    assert told == [(0, 3), (2, 3), (3, 3)]
