"""`coala export` and `coala bench`: a run to a folder that others load, RewardBench's file to its results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from coala.backbone import load_backbone
from coala.cli import export as commands
from coala.cli.evaluate import app as evaluations
from coala.evaluation.reward_benchmarks import read_rewardbench, score_rows
from coala.evaluation.reward_benchmarks.rewardbench import SECTIONS
from coala.export import as_reward_func, results, score_replies
from coala.recipe import load_recipe
from coala.report.evaluations import saved_evaluations
from coala.store import RunFolder, StoreError, save_head
from coala.values import CoalaError, ConvexHead, user

from .menagerie import tiny_backbone
from .tolerances import NETWORK

REPLIES = ["once upon a time", "I am well, thank you!", "no", "the quick brown fox", "a long evening, it's 2024"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a gated head, as `coala align` leaves it."""
    folder = tmp_path_factory.mktemp("run")
    model = load_backbone(tiny_backbone("qwen2", folder / "model"), device="cpu")
    recipe = load_recipe(None, {"pairs": ["x"], "model": {"name": model.name, "device": "cpu"}}, {})
    made = RunFolder(folder / "run")
    made.start(recipe.plain())
    draw = np.random.default_rng(0)
    size = (4, model.width + 1)
    head = ConvexHead(
        draw.normal(size=size), draw.normal(size=size), draw.normal(size=size[1]), model.spec(2), "prompt"
    )
    save_head(made.path / "head", head)
    return made.path


def call(*arguments: Any) -> Any:
    app = typer.Typer()
    app.command("export")(commands.export)
    app.add_typer(commands.app, name="bench")
    app.add_typer(evaluations, name="eval")
    found = CliRunner().invoke(app, [str(a) for a in arguments])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found


def last_json(found: Any) -> dict[str, Any]:
    return dict(json.loads(found.stdout.strip().splitlines()[-1]))


def test_a_run_becomes_a_folder(run: Path, tmp_path: Path) -> None:
    from coala.export.shipped.modeling_coala import CoalaRewardModel
    from coala.export.shipped.tokenization_coala import CoalaTokenizer

    out = tmp_path / "out"
    found = call("export", run, "--out", out)
    assert "trust_remote_code" in found.stdout
    assert last_json(found)["difference"] < NETWORK
    reward = as_reward_func(run)
    tokenizer: Any = CoalaTokenizer.from_pretrained(out)
    inputs = tokenizer(text=["hello"] * 5, text_pair=REPLIES, padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = CoalaRewardModel.from_pretrained(out)(**inputs).logits[:, 0].numpy()
    np.testing.assert_allclose(scores, reward(prompts=["hello"] * 5, completions=REPLIES), rtol=0, atol=1e-4)
    assert last_json(call("export", out, "--verify"))["verified"] is True
    (out / "coala.json").write_text("{}")
    with pytest.raises(CoalaError, match="lists no files"):
        call("export", out, "--verify")
    with pytest.raises(CoalaError, match="not empty"):
        call("export", run, "--out", out)


def test_what_cannot_be_exported(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CoalaError, match="--out"):
        call("export", run)
    with pytest.raises(CoalaError, match="4 gates"):
        call("export", run, "--to", "linear-head", "--out", tmp_path / "out")
    with pytest.raises(CoalaError, match="linear-head"):
        call("export", run, "--drop-constant", "--out", tmp_path / "out")
    with pytest.raises(StoreError, match="not a run folder"):
        call("export", tmp_path, "--out", tmp_path / "out")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "run.json").write_text((run / "run.json").read_text())
    with pytest.raises(StoreError, match="no fitted head"):
        call("export", tmp_path / "new", "--out", tmp_path / "out")
    (tmp_path / "new" / "head").mkdir()
    (tmp_path / "new" / "head" / "head.json").write_bytes((run / "head" / "head.json").read_bytes())
    weights = bytearray((run / "head" / "head.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "new" / "head" / "head.safetensors").write_bytes(bytes(weights))
    with pytest.raises(StoreError, match="not the file"):
        call("export", tmp_path / "new", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- RewardBench -------------------------------------------------------------------------------------------------


def rows_of(n: int = 24) -> list[dict[str, Any]]:
    draw = np.random.default_rng(3)
    subsets = [name for names in SECTIONS.values() for name in names]
    rows = []
    for i in range(n):
        better, worse = draw.choice(REPLIES, 2, replace=False)
        row = {"id": i, "prompt": f"question {i % 5}?", "chosen": str(better), "rejected": str(worse)}
        rows.append({**row, "subset": subsets[i % len(subsets)], "chosen_model": "x"})
    rows[0] |= {"rejected": rows[0]["chosen"]}  # a tie
    rows[1] |= {"prompt": [{"role": "user", "content": "question 1?"}]}
    rows[2]["chosen"] = [
        {"role": "user", "content": rows[2]["prompt"]},
        {"role": "assistant", "content": rows[2]["chosen"]},
    ]
    return rows


def test_rewardbench_with_a_runs_head(run: Path, tmp_path: Path) -> None:
    from coala.alignment import load_parts

    rows = rows_of()
    file = tmp_path / "filtered.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = call("bench", "rewardbench", file, "--run", run, "--out", tmp_path / "bench", "--name", "mine")
    model, head, _ = load_parts(run)
    (kept,) = saved_evaluations(RunFolder.open(run))
    assert (kept["kind"], kept["of"]) == ("rewardbench", "mine")
    assert Path(last_json(found)["evaluation"]).is_file()
    right: dict[str, list[bool]] = {}
    saved = json.loads((tmp_path / "bench" / "scores.json").read_text())
    for row, said in zip(rows, saved, strict=True):
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        chosen = row["chosen"] if isinstance(row["chosen"], str) else row["chosen"][-1]["content"]
        a, b = score_replies([user(prompt)] * 2, [chosen, row["rejected"]], head, model)
        assert (said["scores_chosen"], said["scores_rejected"]) == pytest.approx((a, b), abs=1e-4)
        assert (said["id"], said["subset"]) == (str(row["id"]), row["subset"])
        right.setdefault(row["subset"], []).append(bool(a > b))
    assert right[rows[0]["subset"]][0] is False  # the tie
    # Upstream's own form: flat, the subsets beside the model.
    flat = json.loads((tmp_path / "bench" / "results.json").read_text())
    assert flat == {
        "model": "mine",
        "model_type": "Seq. Classifier",
        "chat_template": "tokenizer",
        **{name: pytest.approx(np.mean(wins)) for name, wins in right.items()},
    }
    ours = json.loads((tmp_path / "bench" / "ranking.json").read_text())
    assert set(ours["by_section"]) == set(SECTIONS)
    assert ours["rows"]["n"] == len(rows)
    assert ours["ties"] == pytest.approx(1 / len(rows))
    printed = last_json(found)
    assert printed["overall"]["value"] == pytest.approx(np.mean(list(ours["by_section"].values())))
    assert "Chat Hard" in found.stdout
    # What was written is what the reader of saved scores takes.
    from coala.evaluation.reward_benchmarks import FORMS, read_scores

    again = FORMS["rewardbench"].rank(read_scores(tmp_path / "bench" / "scores.json", "rewardbench")[""])
    assert {name: value.value for name, value in again.subsets.items()} == {n: flat[n] for n in again.subsets}


def test_rm_bench_with_a_runs_head(run: Path, tmp_path: Path) -> None:
    from coala.alignment import load_parts

    rows = [
        {"id": i, "prompt": f"question {i}?", "chosen": list(REPLIES[:3]), "rejected": [*REPLIES[1:3], REPLIES[0]]}
        for i in range(4)
    ]
    for name in ("chat", "safety-refuse"):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    found = last_json(call("eval", "rmbench", "--replies", tmp_path, "--run", run, "--out", tmp_path / "bench"))
    model, head, _ = load_parts(run)
    prompts = [user(row["prompt"]) for row in rows for _ in range(3)]
    score = score_replies(prompts, list(REPLIES[:3]) * 4, head, model).reshape(4, 3)
    right = score[:, :, None] > np.roll(score, -1, axis=1)[:, None, :]
    assert found["sections"]["chat"]["value"] == pytest.approx(right.mean())
    assert found["sections"]["hard"]["value"] == pytest.approx(
        np.mean([right[:, i, j] for i, j in ((0, 1), (0, 2), (1, 2))])
    )
    kept = next(one for one in saved_evaluations(RunFolder.open(run)) if one["kind"] == "rmbench")
    assert [Path(one["path"]).name for one in kept["files"]] == ["chat.json", "safety-refuse.json"]
    assert any(one["name"] == "rule longer, all rows" for one in kept["figures"])


def test_the_published_forms(tmp_path: Path) -> None:
    """Results and scores of a made-up ranking, against the sums written out."""
    file = tmp_path / "a.json"
    file.write_text(json.dumps(rows_of()))
    benchmark = read_rewardbench(file)
    assert len(set(benchmark.replies)) == len(benchmark.replies) < 48  # each distinct reply once
    score = {reply: float(i) for i, reply in enumerate(benchmark.replies)}
    scored = benchmark.scored(list(score.values()))
    flat = results(benchmark.ranking(list(score.values())), "m", _spec("dialogue:abc"))
    assert flat["chat_template"] == "dialogue"
    wins = score_rows(scored)
    right = [score[item.prompt, item.chosen[0]] > score[item.prompt, item.rejected[0]] for item in benchmark.items]
    assert [row["results"] for row in wins] == right
    assert set(right) == {False, True}
    for name in {item.subset for item in benchmark.items}:
        assert flat[name] == np.mean([row["results"] for row in wins if row["subset"] == name])


def _spec(template: str) -> Any:
    from coala.values import FeatureSpec

    return FeatureSpec("m", "", "w", template, 1, "mean", False, 8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"chosen": ["a", "b"]}, "found 2 texts, expected one reply"),
        ({"rejected": None}, "rejected"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": []}, "empty list"),
        ({"subset": " "}, "subset"),
        ({"chosen": [{"role": "user", "content": "a"}]}, "assistant"),
        ({"chosen": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "a"}]}, "prompt's turns"),
        ({"chosen": [{"role": "tool", "content": "a"}]}, "role of"),
    ],
)
def test_a_bad_row_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    rows = rows_of(3)
    rows[1] |= change
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(CoalaError, match=said) as caught:
        read_rewardbench(file)
    assert "rows.jsonl:2" in str(caught.value)


def test_without_the_harness_its_extra_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from coala.leaderboards.lm_eval import run_lm_eval

    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    with pytest.raises(CoalaError, match=r"pip install 'coala-align\[lm-eval\]'"):
        run_lm_eval(run, ["my_task"], guidance={}, settings={})
