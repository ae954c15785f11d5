"""A run that answers benchmarks end to end, resuming after kills; and every evaluation in the report of its run."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coala.alignment.answers import PromptRow, ReplySettings, answer, converse, read_prompts, read_reference
from coala.cli.evaluate import app
from coala.cli.survey import app as survey_app
from coala.decoding import generate
from coala.evaluation import RuleJudge, judge_many, win_rate
from coala.evaluation.alpaca import read_annotations
from coala.evaluation.alpaca import win_rate as alpaca_win_rate
from coala.evaluation.alpaca_judging import annotation_rows
from coala.evaluation.length_control import length_controlled
from coala.leaderboards.record import run_of
from coala.report import Evaluation, Measure, Sample, add_evaluation, conclusions, write_report
from coala.report.evaluations import saved_evaluations
from coala.store import RunFolder, StoreError, file_digest, load_generations, load_head, save_generations, save_pairs
from coala.values import CoalaError, Estimate, Pair, Turn, prompt_id, user

from .evaluation_helpers import called, reply, small_run, write_lines
from .judge_server import JudgeServer, say, user_text
from .waiting import PATIENCE, wait_for

INSTRUCTIONS = [f"tell me story {i}" for i in range(20)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run that has answered the instructions."""
    run = small_run(tmp_path_factory.mktemp("small"))
    answer(RunFolder(run), read_prompts(outputs_file(run.parent)), ReplySettings())
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the small run, whose folder a test may fill."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return outputs_file(tmp_path)


def outputs_file(folder: Path) -> Path:
    """Prompts with a reference's outputs, in AlpacaEval's form: the references are long or short by turns."""
    rows = [
        {"instruction": text, "output": "x" * (90 if i % 2 else 1), "generator": "base", "dataset": f"part {i % 2}"}
        for i, text in enumerate(INSTRUCTIONS)
    ]
    path = folder / "prompts.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    """Prefers the reply that is no row of x, in tokens or in brackets; grades the second turn lower."""

    def script(body: dict[str, Any], before: int) -> dict[str, Any]:
        text = user_text(body)
        if "to be graded" in text or "=== Reply ===" in text:
            return say(f"[[{6 if 'once more' in text else 8}]]")
        shown = re.search(r"=== Reply (?:A|of model m) ===\n(.*?)\n+=== ", text, re.DOTALL)
        assert shown
        first = not re.fullmatch("x+", shown[1])
        if body.get("logprobs"):
            return say("m", top=[("m", -0.1 if first else -3.0), ("M", -3.0 if first else -0.1)], finish="length")
        return say("[[A>>B]]" if first else "[[B>A]]")

    made = JudgeServer(script)
    yield made
    made.close()


def kept(run: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((run / "evaluations").glob("*.json"))]


# --- prompts, references, replies ------------------------------------------------------------------------------------


def test_prompts_are_read_in_every_form(tmp_path: Path) -> None:
    pairs = [Pair(user(f"p{i % 2}"), "good", "bad", str(i)) for i in range(4)]
    save_pairs(tmp_path / "pairs.jsonl", pairs)
    assert [one.id for one in read_prompts(tmp_path / "pairs.jsonl")] == [prompt_id(pair.prompt) for pair in pairs[:2]]
    forms: dict[str, list[dict[str, Any]]] = {
        "alpaca": [{"instruction": "a", "dataset": "d"}, {"instruction": "b"}, {"instruction": "a"}],
        "own": [{"prompt_id": "1", "prompt": "a", "category": "d"}, {"prompt": "b"}, {"prompt": "a"}],
        "arena": [{"question_id": "1", "turns": [{"content": text}]} for text in "aba"],
        "messages": [{"prompt": [{"role": "user", "content": text}]} for text in "aba"],
        "vicuna": [{"question_id": i, "text": text, "category": "d"} for i, text in enumerate("aba")],
    }
    for name, rows in forms.items():
        found = read_prompts(write_lines(tmp_path / f"{name}.jsonl", rows))
        assert [one.text for one in found] == ["a", "b", "a"], name
        assert len({one.id for one in found}) == 3, name
    assert read_prompts(tmp_path / "alpaca.jsonl")[0].category == "d"
    # Where the file names no prompt it is found by its text: both forms mean the same ones.
    assert [one.key for one in read_prompts(tmp_path / "alpaca.jsonl")] == [
        one.key for one in read_prompts(tmp_path / "messages.jsonl")
    ]
    for bad, words in (
        ({"text": "x"}, "instruction or prompt or turns: found no such field among 'text'"),
        ({"instruction": " "}, "an empty text"),
        ({"prompt": [{"role": "user"}]}, "expected one text, or messages"),
        ({"turns": ["a", "b"]}, "found 2 turns, expected one text, or messages.*coala eval mtbench"),
        ({"prompt": [{"role": "oracle", "content": "x"}]}, "has role 'oracle'"),
    ):
        with pytest.raises(CoalaError, match=words):
            read_prompts(write_lines(tmp_path / "bad.jsonl", [bad]))


def test_references_are_found_by_prompt_whatever_their_order(tmp_path: Path) -> None:
    asked = read_prompts(write_lines(tmp_path / "p.jsonl", [{"instruction": text} for text in "aba"]))
    outputs = [{"instruction": text, "output": f"to {text} {i}", "generator": "ref"} for i, text in enumerate("baa")]
    found = read_reference(write_lines(tmp_path / "r.json", outputs), asked)
    assert [(one.prompt_id, one.text) for one in found] == [
        (asked[0].id, "to a 1"),
        (asked[1].id, "to b 0"),
        (asked[2].id, "to a 2"),
    ]
    assert {one.method for one in found} == {"ref"}
    save_pairs(tmp_path / "pairs.jsonl", [Pair(user(text), f"chosen {text}", "no", text) for text in "ab"])
    assert [one.text for one in read_reference(tmp_path / "pairs.jsonl", asked)] == ["chosen a", "chosen b", "chosen a"]
    own = read_prompts(tmp_path / "pairs.jsonl")
    save_generations(tmp_path / "g.jsonl", [reply(one.id, f"ours to {one.text}", "guided") for one in own])
    assert [one.text for one in read_reference(tmp_path / "g.jsonl", own)] == ["ours to a", "ours to b"]
    questions = read_prompts(write_lines(tmp_path / "q.jsonl", [{"uid": "1", "prompt": "a"}]))
    for answers in (
        {"uid": "1", "model": "m", "messages": [{"content": "a"}, {"content": {"answer": "said"}}]},
        {"question_id": 1, "model_id": "m", "choices": [{"turns": [{"content": "said", "token_len": 1}]}]},
        {"question_id": "1", "model_id": "m", "choices": [{"turns": ["said"]}]},
    ):
        (one,) = read_reference(write_lines(tmp_path / "answers.jsonl", [answers]), questions)
        assert (one.text, one.method) == ("said", "m")
    with pytest.raises(CoalaError, match=r"no reply to 2 of 3 prompts \(the first is 'a'\)"):
        read_reference(write_lines(tmp_path / "few.json", outputs[:1]), asked)
    with pytest.raises(CoalaError, match="found 'other', expected 'ref' as before"):
        read_reference(write_lines(tmp_path / "two.json", [*outputs, {**outputs[0], "generator": "other"}]), asked)
    with pytest.raises(CoalaError, match="output or text or messages or choices or chosen"):
        read_reference(write_lines(tmp_path / "none.json", [{"instruction": "a"}]), asked)


def test_replies_are_kept_by_portions_and_resumed_to_the_same_bytes(
    run: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, there = read_prompts(prompts), RunFolder(run)
    whole = answer(there, asked, ReplySettings())
    (path,) = (run / "replies").glob("*.jsonl")
    unbroken = path.read_bytes()
    assert [one.prompt_id for one in whole] == [one.id for one in asked]
    assert load_generations(path) == whole
    # A reply of the whole set is the reply that the prompt gets by itself.
    from coala.alignment import load_parts

    backbone, head, guidance = load_parts(run)
    alone = generate([asked[17].prompt], backbone, head, guidance, max_new_tokens=6, seed=0, prompt_ids=[asked[17].id])
    assert alone[0].text == whole[17].text
    # Nothing is loaded when nothing is missing.
    monkeypatch.setattr("coala.alignment.answers.load_parts", lambda path: pytest.fail("the model was loaded"))
    assert answer(there, asked, ReplySettings()) == whole
    monkeypatch.undo()

    class Killed(BaseException):
        pass

    def kill(done: int, total: int) -> None:
        if done:
            raise Killed

    path.unlink()
    with pytest.raises(Killed):
        answer(there, asked, ReplySettings(), on_reply=kill)
    assert load_generations(path) == whole[:6]  # 32 rows, of 5 a reply
    assert answer(there, asked, ReplySettings()) == whole
    assert path.read_bytes() == unbroken
    # Other settings are other replies, beside these.
    plain = answer(there, asked, ReplySettings(guided=False))
    other = answer(there, asked, ReplySettings(seed=1))
    assert len(list((run / "replies").glob("*.jsonl"))) == 3
    assert [one.text for one in plain] != [one.text for one in whole] != [one.text for one in other]
    assert path.read_bytes() == unbroken
    save_generations(path, whole[1:])
    with pytest.raises(StoreError, match="holds replies to other prompts"):
        answer(there, asked, ReplySettings())


def test_conversations_see_what_was_said_before(run: Path) -> None:
    turns = [("a", ("tell me", "once more")), ("b", ("what do you think",)), ("c", ("no", "why not"))]
    found = converse(RunFolder(run), turns, ReplySettings())
    assert [len(one) for one in found] == [2, 1, 2]
    prompt = (Turn("user", "no"), Turn("assistant", found[2][0]), Turn("user", "why not"))
    again = answer(
        RunFolder(run), [PromptRow("a turn 2", "a", ()), PromptRow("c turn 2", "c", prompt)][1:], ReplySettings()
    )
    assert again[0].text == found[2][1]


def test_runs_that_cannot_answer_say_so(tmp_path: Path, prompts: Path) -> None:
    with pytest.raises(StoreError, match="is not a run folder"):
        called(app, "alpaca", "--run", tmp_path, "--prompts", prompts, "--judge", "rule:longer")
    RunFolder(tmp_path / "young").start({"pairs": ["x"], "model": {"name": "m"}})
    with pytest.raises(StoreError, match="no fitted head yet"):
        called(app, "alpaca", "--run", tmp_path / "young", "--prompts", prompts, "--judge", "rule:longer")
    with pytest.raises(StoreError, match="no fitted head yet, so it cannot judge"):
        called(
            app, "alpaca", "--run", tmp_path / "young", "--prompts", prompts, "--judge", f"head:{tmp_path / 'young'}"
        )


def test_nothing_judged_is_an_error_and_no_evaluation(run: Path, prompts: Path, tmp_path: Path) -> None:
    dead = ["--base-url", "http://127.0.0.1:9/v1", "--model", "m", "--attempts", 1, "--concurrency", 1]
    with pytest.raises(CoalaError, match="The replies are saved"):
        called(app, "alpaca", "--run", run, "--prompts", prompts, *dead)
    assert not (run / "evaluations").exists()
    bare = write_lines(tmp_path / "bare.jsonl", [{"instruction": "a"}])
    with pytest.raises(CoalaError, match="--reference unguided"):
        called(app, "alpaca", "--run", run, "--prompts", bare, "--judge", "rule:longer")


# --- AlpacaEval ------------------------------------------------------------------------------------------------------


def test_annotations_hold_every_prompt_in_its_order() -> None:
    ours = [reply(str(i), "a" * i) for i in range(6)]
    theirs = [reply(str(i), "b" * 3, "base") for i in reversed(range(6))]

    class Fails(RuleJudge):
        def compare(self, prompt: Any, first: Any, second: Any) -> Any:
            if first.prompt_id == "1" and first.method == "base":
                raise ValueError("no")
            return super().compare(prompt, first, second)

    names = {str(i): f"instruction {i}" for i in range(6)}
    both = judge_many(ours, theirs, Fails("longer"))
    rows = annotation_rows(ours, theirs, both.judgements, instructions=names, model="m", baseline="b")
    assert [row["instruction"] for row in rows] == list(names.values())
    assert [row["preference"] for row in rows] == [1, None, 1, 1.5, 2, 2]
    assert "judge_saw_swapped_order" not in rows[0]
    drawn = judge_many(ours, theirs, RuleJudge("longer"), swap="drawn")
    assert len(drawn.judgements) == 6
    swapped = [one.first == "base" for one in drawn.judgements]
    rows = annotation_rows(ours, theirs, drawn.judgements, instructions=names, model="m", baseline="b")
    assert [row["preference"] for row in rows] == [1, 1, 1, 1.5, 2, 2]
    assert [not row["judge_saw_swapped_order"] for row in rows] == swapped
    many = [reply(f"prompt {i}", "x") for i in range(400)]
    coins = judge_many(many, [reply(one.prompt_id, "y", "b") for one in many], RuleJudge("longer"), swap="drawn")
    assert abs(sum(one.first == "b" for one in coins.judgements) - 200) < 60  # six standard deviations
    assert annotation_rows(ours, theirs, [], instructions=names, model="m", baseline="b")[3]["preference"] is None


@pytest.mark.parametrize("orders", [(), ("--one-order",)])
def test_alpaca_end_to_end_with_a_rule(run: Path, prompts: Path, orders: tuple[str, ...]) -> None:
    options = ["--run", run, "--prompts", prompts, "--judge", "rule:longer", "--name", "mine", "--draws", 30, *orders]
    result, table, remarks = called(app, "alpaca", *options)
    rows = json.loads(Path(result["outputs"]).read_text())
    assert [row["instruction"] for row in rows] == INSTRUCTIONS
    assert {row["generator"] for row in rows} == {"mine"}
    assert [row["dataset"] for row in rows[:2]] == ["part 0", "part 1"]
    lengths = [len(row["output"]) for row in rows]
    references = [90 if i % 2 else 1 for i in range(20)]
    wins = [(a > b) + (a == b) / 2 for a, b in zip(lengths, references, strict=True)]
    assert result["raw"]["win_rate"]["value"] == pytest.approx(100 * np.mean(wins))
    assert result["raw"]["standard_error"] == pytest.approx(100 * np.std(wins, ddof=1) / math.sqrt(20))
    assert result["raw"]["average_length"] == int(np.mean(lengths))
    # Length is all that this judge looks at, so nothing can be said of equal lengths.
    assert result["length_controlled"]["win_rate"]["value"] is None
    assert "length alone decides who won" in remarks
    assert "own rows alone" in remarks
    assert "mine" in table
    # Judged again from the annotations it is the same.
    saved, _, _ = called(app, "alpaca", result["annotations"], "--run", run)
    assert saved["raw"] == {**result["raw"]}
    (first, second) = kept(run)
    assert {first["kind"], second["kind"]} == {"alpaca"}
    whole = first if first["judge"].get("name") == "rule longer" and first["settings"] else second
    assert whole["settings"]["orders"] == ("one, drawn" if orders else "both")
    assert {one["role"] for one in whole["files"]} >= {"prompts", "annotations", "outputs"}
    assert len(whole["samples"]) == 5
    assert set(whole["samples"][0]["replies"]) == {"mine", "base"}


def test_alpaca_against_the_run_without_its_head_by_another_head(run: Path, prompts: Path, tmp_path: Path) -> None:
    judge = small_run(tmp_path / "judge", seed=3)
    options = ["--run", run, "--prompts", prompts, "--reference", "unguided", "--judge", f"head:{judge}"]
    result, _, _ = called(app, "alpaca", *options, "--limit", 6, "--name", "mine", "--draws", 20)
    assert result["raw"]["n_total"] == 6
    assert result["raw"]["baseline"] == "unguided"
    # By hand, with the scores of the other head.
    from coala.alignment import load_parts
    from coala.export import score_replies

    backbone, head, _ = load_parts(judge)
    rows = [json.loads(line) for line in Path(result["annotations"]).read_text().splitlines()]
    asked = [user(row["instruction"]) for row in rows]
    scores = [score_replies(asked, [row[side] for row in rows], head, backbone) for side in ("output_2", "output_1")]
    wanted = [1.5 + np.sign(a - b) / 2 for a, b in zip(*scores, strict=True)]
    assert [row["preference"] for row in rows] == wanted
    (record,) = kept(run)
    assert record["judge"]["weights"] == head.spec.weights
    assert {one["role"]: one["sha256"] for one in record["files"]}["judge"] == file_digest(
        judge / "head" / "head.safetensors"
    )


def test_alpaca_end_to_end_by_an_endpoint_is_bought_once(
    run: Path, prompts: Path, server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = [
        "--run",
        run,
        "--prompts",
        prompts,
        "--base-url",
        server.url,
        "--model",
        "m",
        "--concurrency",
        1,
        "--draws",
        20,
    ]
    monkeypatch.setattr(sys, "argv", ["coala", "eval", "alpaca", "--base-url", "http://me:secret@host/v1", "a b"])
    part, _, remarks = called(app, "alpaca", *common, "--max-calls", 21, code=1)
    assert part["n_unjudged"] == 10
    assert part["raw"]["n_missing"] == 10
    assert "stopped: The budget of 21 calls" in remarks
    result, table, _ = called(app, "alpaca", *common)
    assert len(server.requests) == server.distinct == 40
    assert (result["cost"]["calls"], result["cost"]["kept"]) == (19, 21)
    assert result["raw"]["n_total"] == 20
    assert "position bias" in table
    (record,) = kept(run)  # the same evaluation, replaced
    assert record["command"] == "coala eval alpaca --base-url http://host/v1 'a b'"
    assert record["judge"]["model"] == "m"
    assert record["judge"]["endpoint"] == server.url
    assert re.fullmatch("[0-9a-f]{64}", record["judge"]["digest"])
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in record["judge"]["prompts"].values())
    annotations = read_annotations(result["annotations"])
    controlled = length_controlled(annotations, None, None, draws=20)
    assert result["length_controlled"]["win_rate"]["value"] == controlled.win_rate.value
    by_hand = alpaca_win_rate(annotations)
    assert by_hand.win_rate.value == result["raw"]["win_rate"]["value"]


@pytest.mark.slow
@pytest.mark.nightly  # test_judges_endpoint.py kills while verdicts are bought; replies are resumed above
def test_kills_in_the_middle_lose_no_reply_and_buy_no_verdict_twice(run: Path, tmp_path: Path) -> None:
    answered = JudgeServer(lambda body, before: say("m", top=[("m", -0.3), ("M", -1.5)], finish="length", delay=0.05))
    rows = [{"instruction": text, "output": "x", "generator": "base"} for text in INSTRUCTIONS]
    path = write_lines(tmp_path / "prompts.json", rows)
    options = [
        *("eval", "alpaca", "--run", str(run), "--prompts", str(path), "--base-url", answered.url, "--model", "m"),
        *("--concurrency", "2", "--draws", "5"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENAI_API_KEY": "k"}

    def begun() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "coala", *options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    # Once while replies are written, twice while verdicts are bought.
    replies = run / "replies"
    shutil.rmtree(replies)
    for ready in (
        lambda: any(replies.glob("*.jsonl")),
        lambda: len(answered.requests) >= 10,
        lambda: len(answered.requests) >= 25,
    ):
        child = begun()
        wait_for(ready, child)
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
    (file,) = replies.glob("*.jsonl")
    first = load_generations(file)
    child = begun()
    out, told = child.communicate(timeout=PATIENCE)
    assert child.returncode == 0, told.decode()
    result = json.loads(out.splitlines()[-1])
    assert load_generations(file)[: len(first)] == first
    assert result["raw"]["n_total"] == 20
    assert result["failures"] == {}
    # What was in flight at a kill, two requests at most, is bought again; nothing else is.
    assert answered.distinct == 40
    assert 40 <= len(answered.requests) <= 40 + 2 * 2
    (record,) = kept(run)
    assert record["command"].startswith("coala eval alpaca --run ")
    again, _, _ = called(app, *options[1:])
    assert again["cost"]["calls"] == 0
    answered.close()


def test_a_local_model_judges_end_to_end(run: Path, prompts: Path, tmp_path: Path) -> None:
    own = tmp_path / "short"
    own.mkdir()
    (own / "judge.yaml").write_text("mode: weighted\nlabels: [good, bad]\nprompts: [{user: p.txt}]\n")
    (own / "p.txt").write_text("{question} {answer_a} {answer_b}")
    options = ["--run", run, "--prompts", prompts, "--reference", "unguided", "--judge", own, "--limit", 4]
    model = json.loads((run / "run.json").read_text())["model"]["name"]
    result, _, _ = called(app, "alpaca", *options, "--local", model)
    rows = [json.loads(line) for line in Path(result["annotations"]).read_text().splitlines()]
    assert all(1 < row["preference"] < 2 for row in rows)
    # This model prefers the same place whatever stands there: both orders of every row say so, and no rate is printed.
    both = np.array([row["preference_by_order"] for row in rows])
    assert both.mean(1) == pytest.approx([row["preference"] for row in rows])
    assert ((both[:, 0] < 1.5) != (both[:, 1] < 1.5)).all()
    rate = result["raw"]["win_rate"]
    assert (rate["value"], rate["low"], rate["high"], rate["n"]) == (None, None, None, 4)
    assert "length_controlled" not in result
    assert any("reads only the place" in remark for remark in result["remarks"])
    # The file of annotations says so by itself, and nothing is judged again.
    assert called(app, "alpaca", result["annotations"])[0]["raw"]["win_rate"]["value"] is None
    again, _, _ = called(app, "alpaca", *options, "--local", model)
    assert (again["cost"]["answers"], again["cost"]["kept"]) == (0, 8)
    record = max(kept(run), key=lambda one: len(one["samples"]))
    assert record["judge"]["weights"] == load_head(run / "head").spec.weights
    assert record["judge"]["mode"] == "weighted"


# --- MT-Bench and Arena-Hard -----------------------------------------------------------------------------------------


def test_mtbench_end_to_end(run: Path, tmp_path: Path, server: JudgeServer) -> None:
    questions = write_lines(
        tmp_path / "q.jsonl",
        [{"question_id": i, "category": "a b"[i % 2 * 2], "turns": ["tell me", f"once more {i}"]} for i in range(4)],
    )
    common = ["--run", run, "--questions", questions, "--base-url", server.url, "--model", "m", "--name", "mine"]
    result, _, _ = called(app, "mtbench", *common)
    assert result["scores"]["mine"]["by_turn"]["1"]["value"] == 8
    assert result["scores"]["mine"]["by_turn"]["2"]["value"] == 6
    assert result["scores"]["mine"]["overall"]["n"] == 8
    # The second turn of an answer is what the model says to the whole conversation.
    answers = [json.loads(line) for line in (run / "mtbench" / "mine.jsonl").read_text().splitlines()]
    spoken = answers[3]["choices"][0]["turns"]
    (again,) = converse(RunFolder(run), [("3", ("tell me", "once more 3"))], ReplySettings())
    assert list(again) == spoken
    assert called(app, "mtbench", *common)[0]["cost"]["calls"] == 0
    (record,) = kept(run)
    assert record["kind"] == "mtbench"
    assert {one["name"] for one in record["figures"]} >= {"mine, overall", "mine, turn 2", "mine, a", "mine, b"}
    assert record["samples"][0]["verdict"] == "Grades from 1 to 10. turn 1: 8; turn 2: 6."
    # The grades by themselves are the same.
    saved, _, _ = called(app, "mtbench", result["out"])
    assert saved["scores"]["mine"]["overall"] == result["scores"]["mine"]["overall"]
    with pytest.raises(CoalaError, match="pass a file of judgements"):
        called(app, "mtbench", "--questions", questions)


def test_a_local_model_grades_and_fights_an_arena(run: Path, prompts: Path, tmp_path: Path) -> None:
    questions = write_lines(tmp_path / "q.jsonl", [{"question_id": i, "turns": ["tell", "more"]} for i in range(2)])
    for mode, text in (("grade", "{question} {answer}"), ("arena", "{question} {answer_a} {answer_b}")):
        (tmp_path / mode).mkdir()
        two = "  - {user: two.txt, turns: 2}\n" if mode == "grade" else ""
        (tmp_path / mode / "judge.yaml").write_text(f"mode: {mode}\nprompts:\n  - {{user: p.txt}}\n{two}")
        (tmp_path / mode / "p.txt").write_text(text)
        (tmp_path / mode / "two.txt").write_text("{question_1} {answer_1} {question_2} {answer_2}")
    model = json.loads((run / "run.json").read_text())["model"]["name"]
    common = ["--run", run, "--local", model, "--max-new-tokens", 4]
    graded = ["mtbench", *common, "--questions", questions, "--judge", tmp_path / "grade"]
    result, _, _ = called(app, *graded)
    (scores,) = result["scores"].values()
    assert (scores["overall"]["n"], result["cost"]["answers"]) == (4, 4)
    assert 1 <= scores["overall"]["value"] <= 10
    assert called(app, *graded)[0]["cost"]["answers"] == 0
    fought = ["arena", *common, "--prompts", prompts, "--reference", "unguided", "--judge", tmp_path / "arena"]
    found, _, _ = called(app, *fought, "--limit", 4)
    assert (found["cost"]["answers"], found["failures"]) == (8, {})
    assert called(app, *fought, "--limit", 4)[0]["cost"]["answers"] == 0
    with pytest.raises(CoalaError, match="samples nothing"):
        called(app, *fought, "--sampling", "temperature=1")


def test_arena_end_to_end(run: Path, prompts: Path, server: JudgeServer) -> None:
    common = ["--run", run, "--prompts", prompts, "--base-url", server.url, "--model", "m", "--name", "mine"]
    result, _, _ = called(app, "arena", *common, "--draws", 50, "--limit", 8)
    assert result["baseline"] == "base"
    assert result["n_comparisons"] == 8
    assert len(server.requests) == 16
    score = result["scores"]["mine"]
    assert score["wins"] + score["losses"] + score["ties"] == score["score"]["n"] > 16
    assert "percent of battles" in str(kept(run)[0]["figures"])
    with pytest.raises(CoalaError, match="does not use mode arena"):
        called(app, "arena", *common, "--judge", "weighted")
    with pytest.raises(CoalaError, match="--prompts needs --run RUN"):
        called(app, "arena", *common[2:])


# --- records and the report ------------------------------------------------------------------------------------------


def evaluation(files: dict[str, Path], **changes: Any) -> Evaluation:
    rate = Estimate(0.6, 0.45, 0.74, 40, "win rate")
    standard: dict[str, Any] = {
        "kind": "judge",
        "of": "guided unguided",
        "title": "guided against unguided",
        "command": "coala eval judge a b --model '<m>'",
        "measures": [Measure("win rate", rate, even=0.5), Measure("score", Estimate(7.5, 7.0, 8.0, 9, "t"), "plain")],
        "files": files,
        "judge": {"name": "pairwise m", "digest": "d" * 64, "prompts": {"prompt": "e" * 64}},
        "facts": {"not judged": "1 of 41"},
        "failures": {"no verdict": 2},
        "samples": [Sample("<b>why?</b>", {"guided": "because", "unguided": ""}, "guided preferred")],
        "remarks": ["a remark"],
    }
    return Evaluation(**{**standard, **changes})


def test_the_page_shows_all_of_an_evaluation(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    (tmp_path / "generations-guided.jsonl").write_text("x")
    outside = tmp_path.parent / f"{tmp_path.name}-outside.jsonl"
    outside.write_text("y")
    files = {"replies": tmp_path / "generations-guided.jsonl", "reference": outside}
    record = add_evaluation(run, evaluation(files))
    assert not (tmp_path / "report.html").exists()
    write_report(run, {"title": "a run"})
    page = (tmp_path / "report.html").read_text()
    shown = [
        "guided against unguided",
        "60.0 % (45.0 to 74.0 %)",
        "n = 40; win rate",
        "7.5 (7 to 8)",
        "d" * 64,
        "e" * 64,
    ]
    shown += ["&lt;b&gt;why?&lt;/b&gt;", "because", "(empty reply)", "guided preferred", "a remark", "no verdict 2"]
    shown += [
        "1 of 41",
        "coala eval judge a b --model &#39;&lt;m&gt;&#39;",
        file_digest(outside),
        str(outside.resolve()),
    ]
    for text in [*shown, "version of coala", "The interval includes 50\u00a0%: this shows no difference."]:
        assert text in page, text
    assert "Made on files that have changed" not in page
    # A second one comes onto the page that is there; the same one again replaces itself.
    other = evaluation(files, title="another judge", judge={"name": "n"})
    assert add_evaluation(run, other) != record
    assert "another judge" in (tmp_path / "report.html").read_text()
    assert add_evaluation(run, evaluation(files)) == record
    assert len(saved_evaluations(run)) == 2
    # Replies that are made anew are told apart from those that were judged.
    (tmp_path / "generations-guided.jsonl").write_text("z")
    write_report(run, {"title": "a run"})
    assert (
        "Made on files that have changed in the run since: generations-guided.jsonl"
        in (tmp_path / "report.html").read_text()
    )
    (tmp_path / "evaluations" / "odd.json").write_text("[]")
    with pytest.raises(StoreError, match="is not an evaluation"):
        write_report(run, {})


def test_sentences_on_evaluations_say_whether_there_is_a_difference() -> None:
    def said(low: float, high: float) -> str:
        row = {"title": "t", "files": [], "figures": [vars(Measure("f", Estimate(0.6, low, high, 9, ""), even=0.5))]}
        return " ".join(conclusions({"evaluations": [row]}))

    assert "above 50 %" in said(0.55, 0.7)
    assert "below 50 %" in said(0.3, 0.45)
    assert "shows no difference" in said(0.4, 0.7)
    assert "shows no difference" in said(-math.inf, math.inf)


def test_files_tell_their_run(tmp_path: Path) -> None:
    (tmp_path / "run" / "stages").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text("{}")
    inside = tmp_path / "run" / "deep" / "a.jsonl"
    assert run_of(None, tmp_path / "b.jsonl") is None
    found = run_of(None, tmp_path / "b.jsonl", inside)
    assert found is not None
    assert found.path == tmp_path / "run"
    with pytest.raises(StoreError, match="is not a run folder"):
        run_of(tmp_path, inside)


def test_every_evaluation_of_saved_judgements_lands_in_the_run(run: Path, tmp_path: Path) -> None:
    annotated = {"generator_1": "b", "generator_2": "m", "output_1": "abc", "output_2": "d", "instruction": "x"}
    files = {
        "alpaca": write_lines(tmp_path / "a.jsonl", [annotated | {"preference": 1.25, "annotator": "gpt"}]),
        "mtbench": write_lines(
            tmp_path / "m.jsonl", [{"question_id": 1, "model": "m", "turn": 1, "judgment": "fine [[7]]", "judge": "j"}]
        ),
        "arena": write_lines(tmp_path / "h.jsonl", [{"question": 1, "model": "m", "winner": "model"}]),
        "rewardbench": write_lines(
            tmp_path / "s.jsonl", [{"subset": "donotanswer", "chosen_score": 2, "rejected_score": 1}]
        ),
    }
    for name, file in files.items():
        result, _, remarks = called(app, name, file, "--run", run, *(["--draws", 5] if name == "arena" else []))
        assert Path(result["evaluation"]).is_file()
        assert f"`coala report {run}` shows it" in remarks
        assert "evaluation" not in called(app, name, file, *(["--draws", 5] if name == "arena" else []))[0]
    records = {one["kind"]: one for one in kept(run)}
    assert set(records) == set(files)
    for name, record in records.items():
        assert record["files"][0]["sha256"] == file_digest(files[name])
        assert record["figures"]
        assert all(one["estimate"]["n"] >= 1 for one in record["figures"] if one["estimate"]["value"] is not None)
    assert records["alpaca"]["judge"]["name"] == "gpt"
    assert records["mtbench"]["samples"][0]["verdict"] == "fine [[7]]"
    write_report(RunFolder(run), {})
    page = (run / "report.html").read_text()
    for title in ("AlpacaEval 2: m against b", "MT-Bench: m", "Arena-Hard: m against gpt-4-0314", "RewardBench: s"):
        assert title in page


def test_policy_accuracy_of_guidance_and_of_a_trained_model(run: Path, tmp_path: Path) -> None:
    pairs = [Pair(user(f"question {i}"), "a fine evening", "it's 2024" if i % 2 else "no", str(i)) for i in range(6)]
    save_pairs(run / "pairs-eval.jsonl", pairs)
    result, table, remarks = called(app, "policy", run, "--mode", "shift", "--strength", 1, "--limit", 4)
    assert result["accuracy"]["n"] == result["inside"] + result["by_support"] + result["outside"] == 4
    assert "4 of 6 pairs were read" in remarks
    assert "policy accuracy without top-k and top-p" in table
    (record,) = [one for one in kept(run) if one["kind"] == "policy"]
    assert record["figures"][0]["estimate"] == result["accuracy"]
    with pytest.raises(CoalaError, match=r"likelihood not known in mode block\. Fix: --mode shift or distilled"):
        called(app, "policy", run)
    # A model that is its own base has no log-ratio: every pair is a tie.
    same, _, remarks = called(app, "policy", run, "--trained", _model(run))
    assert (same["accuracy"]["value"], same["accuracy"]["n"], remarks.count("note:")) == (0.5, 6, 0)


def _model(run: Path) -> Path:
    return Path(RunFolder.open(run).settings["model"]["name"])


def test_judging_in_a_run_needs_no_word_of_it(run: Path, server: JudgeServer) -> None:
    pairs = [Pair(user(f"question {i}"), "a", "b", str(i)) for i in range(4)]
    save_pairs(run / "pairs-eval.jsonl", pairs)
    (run / "stages").mkdir()
    for method, text in (("guided", "better"), ("unguided", "x")):
        save_generations(
            run / f"generations-{method}.jsonl", [reply(prompt_id(pair.prompt), text, method) for pair in pairs]
        )
    files = [run / f"generations-{method}.jsonl" for method in ("guided", "unguided")]
    result, _, _ = called(app, "judge", *files, "--judge", "rule:longer")
    (record,) = kept(run)
    assert result["evaluation"].endswith(f"{record['kind']}-guided-unguided-rule-longer-" + result["evaluation"][-11:])
    asked = [[{"role": "user", "text": f"question {i}"}] for i in range(4)]
    assert [one["prompt"] for one in record["samples"]] == asked
    assert record["samples"][0]["replies"] == {"guided": "better", "unguided": "x"}
    assert {one["path"] for one in record["files"]} == {
        "generations-guided.jsonl",
        "generations-unguided.jsonl",
        "judgements-rule-longer.jsonl",
    }
    assert record["figures"][0]["estimate"]["value"] == win_rate_of(run / "judgements-rule-longer.jsonl") == 1.0


def win_rate_of(path: Path) -> float:
    from coala.store import load_judgements

    return win_rate(load_judgements(path)).value


@pytest.mark.slow
@pytest.mark.nightly
def test_align_and_report_show_what_was_evaluated(tmp_path: Path) -> None:
    from coala.alignment import align_recipe
    from coala.cli import app as whole

    from .menagerie import tiny_backbone
    from .test_align import pair_rows, recipe, write_rows

    settings = recipe(
        write_rows(tmp_path / "pairs.jsonl", pair_rows(40, 20)),
        tiny_backbone("llama", tmp_path / "model"),
        head={"method": "linear"},
    )
    run = tmp_path / "run"
    align_recipe(settings, RunFolder(run))
    assert "Evaluations</h2>" not in (run / "report.html").read_text()
    found, _, remarks = called(app, "judge", run, "--judge", "rule:varied")
    assert f"shown in {run / 'report.html'}" in remarks
    title = "guided against unguided, judged by rule varied"
    assert title in (run / "report.html").read_text()
    result, table, _ = called(whole, "report", run)
    assert result["evaluations"] == 1
    assert title in table
    # Every stage is done: what `align` writes again at its end holds the evaluation too.
    (run / "report.html").unlink()
    align_recipe(settings, RunFolder(run))
    page = (run / "report.html").read_text()
    assert title in page
    assert "Made on files that have changed" not in page
    kept = json.loads((run / "report.json").read_text())["evaluations"]
    assert kept[0]["figures"][0]["estimate"] == found["win_rate"]


def test_a_surveys_results_land_in_the_run(run: Path, tmp_path: Path) -> None:
    from coala.survey import Records, load_survey
    from coala.survey.records import new_token

    texts = [{"prompt_id": str(i), "prompt": f"prompt {i}"} for i in range(3)]
    prompts = write_lines(tmp_path / "p.jsonl", texts)
    files = []
    for method in ("one", "two"):
        files.append(tmp_path / f"generations-{method}.jsonl")
        save_generations(files[-1], [reply(str(i), f"{method} {i}") for i in range(3)])
    called(survey_app, "build", *files, "--prompts", prompts, "--out", tmp_path / "s", "--per-category", 0)
    survey = load_survey(tmp_path / "s")
    records = Records(tmp_path / "s", survey)
    for _ in range(4):
        token = new_token()
        records.begin(token, {})
        for page in range(3):
            rater = records.rater(token)
            assert rater is not None
            records.answer(rater, page, 0)
    records.close()
    result, _, _ = called(survey_app, "results", tmp_path / "s", "--run", run, "--draws", 20)
    (record,) = kept(run)
    assert record["kind"] == "survey"
    assert record["facts"]["raters"] == "4 began, 4 finished, 0 withdrew"
    shares = [one["estimate"]["value"] for one in record["figures"][:2]]
    assert sum(shares) == pytest.approx(1)
    assert record["figures"][-1]["even"] == 0
    assert result["evaluation"].endswith(".json")
