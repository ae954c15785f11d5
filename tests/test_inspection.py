"""A run as a model of Inspect AI: its own evaluation of a tiny task gives the replies of `coala.generate`."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="the extra inspect brings it")

from inspect_ai import Task, eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.log import EvalLog
from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate as answering

import coala
from coala.alignment import load_parts
from coala.values import CoalaError, Turn, prompt_id, user

pytestmark = pytest.mark.nightly
QUESTIONS = ["hello", "tell me a story", "a good film"]
LENGTH = 8


def evaluated(run: Path, folder: Path, dataset: list[Sample], epochs: int = 1, **model_args: Any) -> EvalLog:
    task = Task(dataset=MemoryDataset(dataset), solver=answering(), scorer=includes())
    (log,) = eval(
        task,
        model=f"coala/{run}",
        model_args=model_args,
        epochs=epochs,
        log_dir=str(folder),
        display="none",
        max_tokens=LENGTH,
        temperature=1.0,
        seed=3,
    )
    assert log.status == "success", log.error
    return log


def replies(run: Path, prompts: list[Any], ids: list[str], **changes: Any) -> list[str]:
    backbone, head, guidance = load_parts(run)
    guidance = guidance.changed(**changes)
    found = coala.generate(prompts, backbone, head, guidance, max_new_tokens=LENGTH, seed=3, prompt_ids=ids)
    return [one.text for one in found]


def test_the_package_names_the_provider() -> None:
    named = {point.name: point.value for point in entry_points(group="inspect_ai")}
    assert named["coala"] == "coala.inspection"


@pytest.mark.parametrize("strength", [0.0, 4.0])
def test_an_evaluation_holds_the_guided_replies(served_run: Path, tmp_path: Path, strength: float) -> None:
    expected = replies(served_run, QUESTIONS, [prompt_id(user(one)) for one in QUESTIONS], strength=strength)
    targets = [*expected[:2], "@@ no model says this @@"]
    dataset = [Sample(input=one, target=target) for one, target in zip(QUESTIONS, targets, strict=True)]
    log = evaluated(served_run, tmp_path, dataset, strength=strength)
    assert log.samples is not None
    said = {str(sample.input): sample.output for sample in log.samples}
    assert [said[one].completion for one in QUESTIONS] == expected
    assert {output.stop_reason for output in said.values()} == {"max_tokens"}
    assert {output.usage.output_tokens for output in said.values() if output.usage} == {LENGTH}
    assert log.results is not None
    assert log.results.scores[0].metrics["accuracy"].value == pytest.approx(2 / 3)


def test_epochs_of_a_sample_are_different_draws(served_run: Path, tmp_path: Path) -> None:
    log = evaluated(served_run, tmp_path, [Sample(input="hello", target="x")], epochs=3)
    assert log.samples is not None
    name = prompt_id(user("hello"))
    expected = replies(served_run, ["hello"] * 3, [name, f"{name}-2", f"{name}-3"])
    assert sorted(sample.output.completion for sample in log.samples) == sorted(expected)
    assert len(set(expected)) == 3


def test_a_conversation_keeps_its_turns(served_run: Path, tmp_path: Path) -> None:
    messages = [
        ChatMessageSystem(content="Be brief."),
        ChatMessageUser(content="Hello"),
        ChatMessageAssistant(content="Good day."),
        ChatMessageUser(content="And now?"),
    ]
    prompt = (Turn("system", "Be brief."), Turn("user", "Hello"), Turn("assistant", "Good day."))
    prompt = (*prompt, Turn("user", "And now?"))
    log = evaluated(served_run, tmp_path, [Sample(input=list(messages), target="x")])
    assert log.samples is not None
    assert [log.samples[0].output.completion] == replies(served_run, [prompt], [prompt_id(prompt)])


def test_what_no_run_takes_is_named(served_run: Path, tmp_path: Path) -> None:
    with pytest.raises(CoalaError, match="strenth"):
        get_model(f"coala/{served_run}", memoize=False, strenth=2)
    with pytest.raises(CoalaError, match="not a run folder"):
        get_model(f"coala/{tmp_path}", memoize=False)
