"""One tiny task of the lm-evaluation-harness, its texts guided by a head."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

import coala
from coala.alignment import load_parts
from coala.export.harness import GuidedLM
from coala.values import CoalaError

QUESTIONS = ["hello", "tell me a story", "a good film"]
TASK = """
task: tiny_echo
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["zz"]
  max_gen_toks: 8
  do_sample: {sample}
metric_list:
  - metric: exact_match
"""


def run_coala(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "coala", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def task(folder: Path, answers: list[str], sample: str = "false") -> TaskManager:
    rows = [json.dumps({"question": q, "answer": a}) for q, a in zip(QUESTIONS, answers, strict=True)]
    (folder / "rows.json").write_text("\n".join(rows))
    (folder / "tiny_echo.yaml").write_text(TASK.format(file=folder / "rows.json", sample=sample))
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.mark.parametrize("strength", [0.0, 4.0])
def test_texts_are_those_of_the_guided_loop(served_run: Path, tmp_path: Path, strength: float) -> None:
    backbone, head, guidance = load_parts(served_run)
    guidance = replace(guidance, mode="token", strength=strength)
    expected = []
    for question in QUESTIONS:
        ids = torch.tensor([backbone.tokenizer(question)["input_ids"]])
        out = backbone.transformer.generate(
            input_ids=ids, max_new_tokens=8, do_sample=False, custom_generate=coala.guide(head, guidance)
        )
        text = backbone.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        expected.append(text.split("zz")[0])
    # One answer is made wrong, so that the metric has something to find.
    known = task(tmp_path, [*expected[:2], expected[2] + "x"])
    found = simple_evaluate(
        model=GuidedLM(loaded=(backbone, head, guidance), batch_size=1), tasks=["tiny_echo"], task_manager=known
    )
    assert found is not None
    said = [sample["resps"][0][0] for sample in sorted(found["samples"]["tiny_echo"], key=lambda s: s["doc_id"])]
    assert said == expected
    assert found["results"]["tiny_echo"]["exact_match,none"] == pytest.approx(2 / 3)


def test_the_command(served_run: Path, tmp_path: Path) -> None:
    task(tmp_path, ["a", "b", "c"], sample="true\n  temperature: 0.9")
    done = run_coala(
        *("bench", "lm-eval", str(served_run), "--tasks", "tiny_echo", "--include-path", str(tmp_path)),
        *("--limit", "2", "--mode", "block", "--out", str(tmp_path / "out.json")),
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["results"]["tiny_echo"]["exact_match,none"] == 0.0
    kept = json.loads(Path(told["evaluation"]).read_text())
    assert (kept["kind"], kept["of"]) == ("lm-eval", "tiny_echo")
    (figure,) = kept["figures"]
    assert (figure["name"], figure["estimate"]["value"], figure["estimate"]["n"]) == ("tiny_echo exact_match", 0.0, 2)
    assert json.loads((tmp_path / "out.json").read_text())["n-samples"]["tiny_echo"]["effective"] == 2
    wrong = run_coala("bench", "lm-eval", str(served_run), "--tasks", "no_such_task")
    assert wrong.returncode != 0
    assert "No task no_such_task" in wrong.stderr


def test_settings_are_checked(served_run: Path) -> None:
    with pytest.raises(CoalaError, match="needs the folder of a run"):
        GuidedLM()
    with pytest.raises(CoalaError, match="no setting pretrained"):
        GuidedLM(served_run, pretrained="gpt2")
