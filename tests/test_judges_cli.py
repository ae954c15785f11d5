"""`coala eval judge` and `coala eval grade`: results for people, one JSON line, files, resuming, exit codes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coala.cli.evaluate import app
from coala.evaluation import win_rate
from coala.store import load_judgements, save_generations, save_pairs
from coala.values import CoalaError, Generation, Pair, prompt_id, user
from tests.conftest import REPOSITORY
from tests.evaluation_helpers import called, write_lines
from tests.judge_server import JudgeServer, say, user_text
from tests.tolerances import NETWORK


def run(*arguments: object, code: int = 0, **environment: str) -> tuple[dict[str, Any], str, str]:
    return called(app, *arguments, code=code, **environment)


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    def script(body: dict[str, Any], before: int) -> dict[str, Any]:
        text = user_text(body)
        if "graded" in text or "=== Reply ===" in text:
            return say(f"[[{8 if 'GOOD' in text else 3}]]")
        good = text.index("GOOD") < text.index("poor")
        if "question 0" in text:
            return say("cannot say")
        return say(
            f"[[{'A>>B' if good else 'B>A'}]]"
            if "solve" in body["messages"][0]["content"]
            else f"[[{'A' if good else 'B'}]]"
        )

    made = JudgeServer(script)
    yield made
    made.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's replies to six prompts: guided is always the good one."""
    pairs = [Pair(user(f"question {i}"), "a", "b", str(i)) for i in range(6)]
    save_pairs(tmp_path / "pairs-eval.jsonl", pairs)
    for method, word in (("guided", "GOOD"), ("unguided", "poor")):
        replies = [
            Generation(prompt_id(pair.prompt), f"{word} {i}", method, 2, 0, math.nan, 0.0)
            for i, pair in enumerate(pairs)
        ]
        save_generations(tmp_path / f"generations-{method}.jsonl", replies)
    return tmp_path


def files(folder: Path) -> list[Path]:
    return [folder / f"generations-{name}.jsonl" for name in ("guided", "unguided")]


def test_judging_resumes_and_reports(folder: Path, server: JudgeServer) -> None:
    common = ["judge", *files(folder), "--base-url", server.url, "--model", "m"]
    part, table, remarks = run(*common, "--max-calls", 7, "--concurrency", 1, code=1)
    assert part["n_unjudged"] == 3
    assert part["cost"]["calls"] == 7
    assert "stopped: The budget of 7 calls" in remarks
    result, table, remarks = run(*common)
    assert (result["cost"]["calls"], result["cost"]["kept"]) == (5, 7)
    assert len(server.requests) == server.distinct == 12
    assert result["win_rate"]["value"] == 1.0
    assert result["win_rate"]["n"] == 5
    assert 0.5 < result["win_rate"]["low"] < 1
    assert result["failures"] == {"no verdict": 2}
    assert result["stopped"] == ""
    assert result["inconsistency"]["value"] == result["position_bias"]["value"] == 0
    assert "win rate" in table
    assert "no verdict 2" in table
    assert "5 calls, 5 answers, 75 tokens; 7 taken from the cache" in table
    assert "failed: " in remarks
    stored = load_judgements(folder / "judgements-pairwise.jsonl")
    assert len(stored) == 12
    assert win_rate(stored).value == 1.0
    again, _, _ = run("judge", *files(folder), "--judge", f"replay:{folder / 'judgements-pairwise.jsonl'}")
    assert again["win_rate"]["value"] == 1.0
    assert again["failures"] == {"stored failure": 2}


def test_the_key_comes_from_the_environment(folder: Path, server: JudgeServer) -> None:
    run(
        *("judge", *files(folder), "--base-url", server.url, "--model", "m", "--key-env", "MY_KEY", "--one-order"),
        MY_KEY="secret",
    )
    assert {one["authorization"] for one in server.headers} == {"Bearer secret"}
    assert len(server.requests) == 6
    with pytest.raises(CoalaError, match="NO_SUCH_KEY holds no key"):
        run("judge", *files(folder), "--model", "m", "--key-env", "NO_SUCH_KEY")
    assert not (folder / "verdicts.sqlite-wal").exists()


def test_arena_scores_weigh_strong_verdicts(folder: Path, server: JudgeServer) -> None:
    result, table, _ = run("judge", *files(folder), "--judge", "arena", "--base-url", server.url, "--model", "m")
    assert result["win_rate"]["value"] == 1.0
    assert result["arena"]["value"] == 100.0
    assert result["arena"]["n"] == 5 * (3 + 1)  # A>>B in one order, B>A in the other
    assert "a strong verdict being three" in table


@pytest.mark.parametrize(("rule", "value"), [("rule:contains:GOOD", 1.0), ("rule:longer", 0.5)])
def test_rules_need_no_prompts(folder: Path, rule: str, value: float) -> None:
    (folder / "pairs-eval.jsonl").unlink()
    result, _, _ = run("judge", *files(folder), "--judge", rule)
    assert result["win_rate"]["value"] == value
    assert result["cost"]["calls"] == 0
    assert Path(result["out"]).name == f"judgements-{rule.replace(':', '-')}.jsonl"
    assert len(load_judgements(Path(result["out"]))) == 12


def test_a_run_folder_is_guided_against_unguided(folder: Path) -> None:
    whole, _, _ = run("judge", folder, "--judge", "rule:contains:GOOD")
    both, _, _ = run("judge", *files(folder), "--judge", "rule:contains:GOOD")
    assert whole == both
    assert whole["win_rate"]["value"] == 1


def test_words_judge_by_file(folder: Path) -> None:
    (folder / "taste.json").write_text('{"weights": {"good": 1.0}}')
    assert run("judge", *files(folder), "--judge", f"words:{folder / 'taste.json'}")[0]["win_rate"]["value"] == 1.0


def test_mistakes_are_explained(folder: Path, server: JudgeServer) -> None:
    common = ["judge", *files(folder), "--base-url", server.url]
    with pytest.raises(CoalaError, match="names no model"):
        run(*common)
    with pytest.raises(CoalaError, match="expected one generations-"):
        run("judge", folder, folder)
    with pytest.raises(CoalaError, match="no guided and unguided replies yet"):
        run("judge", folder.parent, "--judge", "rule:longer")
    with pytest.raises(CoalaError, match=r"pairs-eval\.jsonl: holds no replies"):
        run("judge", folder / "pairs-eval.jsonl", files(folder)[1], "--judge", "rule:longer")
    with pytest.raises(CoalaError, match=r"pairs-eval\.jsonl: holds no judgements"):
        run("judge", folder, "--judge", f"replay:{folder / 'pairs-eval.jsonl'}")
    with pytest.raises(CoalaError, match="asks no model: leave --local out"):
        run("judge", folder, "--judge", "rule:longer", "--local", folder)
    with pytest.raises(CoalaError, match="expected NAME=VALUE"):
        run(*common, "--model", "m", "--sampling", "=1")
    (folder / "pairs-eval.jsonl").unlink()
    with pytest.raises(CoalaError, match="6 of 6 replies are to prompts that"):
        run(*common, "--model", "m")
    assert server.requests == []


def test_an_endpoint_that_refuses_is_an_error(folder: Path) -> None:
    refuses = JudgeServer(lambda body, before: {"status": 401, "body": b'{"error": {"message": "who are you?"}}'})
    with pytest.raises(CoalaError, match="answered 401"):
        run("judge", *files(folder), "--base-url", refuses.url, "--model", "m")
    refuses.close()


@pytest.mark.slow
def test_a_local_model_judges_by_its_next_token(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from coala.backbone import load_backbone

    film = REPOSITORY / "src" / "coala" / "assets" / "film-lm"
    own = folder / "short"
    own.mkdir()
    (own / "judge.yaml").write_text("mode: weighted\nlabels: [good, bad]\nprompts: [{user: p.txt}]\n")
    (own / "p.txt").write_text("{question}: {answer_a} or {answer_b}?")
    result, _, _ = run("judge", *files(folder), "--judge", own, "--local", film)
    rows = load_judgements(Path(result["out"]))
    assert (result["judge"], len(rows), result["failures"]) == ("short film-lm", 12, {})
    # By hand: the probability of each label behind the rendered question, from the model's own logits.
    backbone, model = load_backbone(film), AutoModelForCausalLM.from_pretrained(film, dtype=torch.float32)
    found = []
    for text in ("question 1: GOOD 1 or poor 1?", "question 1: poor 1 or GOOD 1?"):
        values = []
        for label in ("good", "bad"):
            row = backbone.render(user(text), label)
            with torch.no_grad():
                logits = model(torch.tensor([list(row.tokens)])).logits[0].double().log_softmax(-1)
            values.append(sum(float(logits[at - 1, row.tokens[at]]) for at in range(row.start, len(row.tokens))))
        found.append(1 / (1 + math.exp(values[1] - values[0])))
    mine = [row.preference for row in rows if row.prompt_id == prompt_id(user("question 1"))]
    assert mine == pytest.approx(found, abs=NETWORK)
    assert abs(mine[0] - 0.5) > 1e-3
    # A question that does not fit into the context is a failure; half of it would have been judged otherwise.
    (own / "p.txt").write_text("{question}: {answer_a} or {answer_b}?" + " the film" * 130)
    result, _, remarks = run("judge", *files(folder), "--judge", own, "--local", film)
    assert result["failures"] == {"too long": 12}
    assert result["win_rate"]["value"] is None
    assert "reads 256" in remarks


def test_grading_writes_what_mtbench_reads(tmp_path: Path, server: JudgeServer) -> None:
    questions = [{"question_id": i, "category": "math", "turns": ["first?", "second?"]} for i in range(3)]
    answers = [
        {"question_id": i, "model_id": "x", "choices": [{"turns": ["GOOD" if i else "poor", "poor"]}]} for i in range(3)
    ]
    references = [{"question_id": 1, "model_id": "r", "choices": [{"turns": ["right", "right too"]}]}]
    for name, rows in (("q", questions), ("a", answers), ("r", references)):
        write_lines(tmp_path / f"{name}.jsonl", rows)
    paths = [tmp_path / "q.jsonl", tmp_path / "a.jsonl", "--references", tmp_path / "r.jsonl"]
    out = tmp_path / "graded" / "rows.jsonl"
    common = ["grade", *paths, "--out", out, "--base-url", server.url, "--model", "m"]
    result, table, _ = run(*common)
    assert result["cost"]["calls"] == len(server.requests) == 6
    assert sum("right" in user_text(body) for body in server.requests) == 2
    assert result["scores"]["x"]["by_turn"]["1"]["value"] == pytest.approx((3 + 8 + 8) / 3)
    assert "turn 2" in table
    again, _, _ = run("mtbench", out)
    assert again["scores"]["x"]["overall"]["value"] == result["scores"]["x"]["overall"]["value"]
    assert run(*common)[0]["cost"]["calls"] == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["judge"][1] for row in rows[2:4]] == ["prompt-reference", "two-turns-reference"]
