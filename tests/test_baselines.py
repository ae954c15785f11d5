"""Baselines: TRL trains on our tokens, what it logs is what our backbone computes, and a kill changes nothing."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="baselines need the extra baselines")

from safetensors.torch import load_file, save_file

from coala.backbone import LanguageModel, load_backbone
from coala.baselines import (
    METHODS,
    Lora,
    Trained,
    TrainSettings,
    drift,
    load_trained,
    log_likelihoods,
    paper,
    reward_margins,
    sweep,
    train,
    trl,
    trl_adapter,
)
from coala.baselines.rows import render_pairs
from coala.costs import body_flops, full_flops
from coala.store import StoreError
from coala.values import CoalaError, Pair, SpecMismatch, Turn, user
from tests.conftest import REPOSITORY
from tests.menagerie import CHATML, tiny_backbone

QUICK = TrainSettings(
    learning_rate=1e-3,
    epochs=1,
    batch_size=4,
    bf16=False,
    gradient_checkpointing=False,
    log_every=1,
    max_length=None,
)
SMALL = Lora(rank=4, alpha=8)
GOOD, BAD = "once upon a time there was a little girl", "no, we'd rather not say"


def nightly(*values: Any) -> Any:
    """A case that others of its test stand for."""
    return pytest.param(*values, marks=pytest.mark.nightly)


# The name of the margin in TRL's logs.
MARGINS = {"dpo": "rewards/margins", "orpo": "rewards/margins", "simpo": "rewards/margins", "reward": "margin"}
ACCURACIES = {
    method: name.replace("margins", "accuracies").replace("margin", "accuracy") for method, name in MARGINS.items()
}


def separable(n: int = 8) -> list[Pair]:
    return [Pair(user(f"tell me a story, number {i}"), GOOD, BAD, str(i)) for i in range(n)]


def mixed(n: int = 8) -> list[Pair]:
    """Prompts of several turns and replies of many lengths."""
    words = [*GOOD.split(), "quick", "brown", "fox", "evening,", "film."]
    rng = np.random.default_rng(3)

    def text(most: int) -> str:
        return " ".join(rng.choice(words, size=int(rng.integers(1, most))))

    prompts = [
        user(text(9)) if i % 2 else (*user(text(5)), Turn("assistant", text(5)), Turn("user", text(4)))
        for i in range(n)
    ]
    return [Pair(prompt, text(8), text(8), str(i)) for i, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tiny_backbone(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="module")
def loaded(base: Callable[[str], Path]) -> Callable[[str], LanguageModel]:
    made: dict[str, LanguageModel] = {}

    def get(name: str) -> LanguageModel:
        if name not in made:
            made[name] = load_backbone(base(name))
        return made[name]

    return get


@pytest.fixture(scope="module")
def trained(base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """Runs of two epochs on the mixed pairs, each made once."""
    made: dict[Any, Trained] = {}

    def get(method: Any, name: str, lora: Lora | None) -> Trained:
        key = (method, name, lora)
        if key not in made:
            settings = replace(QUICK, lora=lora, epochs=2, beta=0.3)
            out = tmp_path_factory.mktemp("run")
            made[key] = train(method, mixed(), base(name), out=out, settings=settings, eval_pairs=mixed(12)[8:])
        return made[key]

    return get


def trainer_of(method: Any, backbone: LanguageModel, pairs: list[Pair], settings: TrainSettings, folder: Path) -> Any:
    rows = render_pairs(pairs, backbone, settings)
    tokenizer = trl_adapter.tokenizer_of(backbone.name, None, False)
    with trl_adapter.silence():
        return trl_adapter.build_trainer(
            method,
            rows,
            rows,
            backbone.name,
            None,
            settings,
            folder=folder,
            tokenizer=tokenizer,
            on_cpu=True,
            trust_remote_code=False,
            on_log=lambda step, steps, logs: None,
        )


def kept(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)]


# --- tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "longest"), [("qwen2", None), ("llama", 24)])
def test_batches_are_the_rendered_tokens(
    loaded: Callable[[str], LanguageModel], tmp_path: Path, method: Any, name: str, longest: int | None
) -> None:
    backbone, pairs = loaded(name), mixed()
    settings = replace(QUICK, max_length=longest)
    trainer = trainer_of(method, backbone, pairs, settings, tmp_path)
    rendered = [
        [backbone.render(p.prompt, reply, max_tokens=longest, ends_with_eos=True) for reply in (p.chosen, p.rejected)]
        for p in pairs
    ]
    if longest:
        assert any(a.tokens[: a.start] != b.tokens[: b.start] for a, b in rendered)  # prompts cut to different lengths
    found = []
    for batch in trainer.get_eval_dataloader():
        if method in ("orpo", "simpo"):
            joined = trainer.concatenated_inputs(batch, padding_value=trainer.processing_class.pad_token_id)
            ids, mask = joined["concatenated_input_ids"], joined["concatenated_attention_mask"]
            learnt = kept(ids, joined["concatenated_labels"] != -100)
        else:
            ids, mask = batch["input_ids"], batch["attention_mask"]
            counted = batch["labels"] != -100 if method == "sft" else batch.get("completion_mask", mask)
            learnt = kept(ids, counted)
        rows = list(zip(kept(ids, mask), learnt, strict=True))
        half = len(rows) if method == "sft" else len(rows) // 2
        found += list(itertools.zip_longest(rows[:half], rows[half:]))
    for (chosen, rejected), (a, b) in zip(found, rendered, strict=True):
        for side, row in [(chosen, a), (rejected, b)]:
            if side is None:
                assert method == "sft"
                continue
            assert side[0] == row.tokens
            assert side[1] == (row.tokens if method == "reward" else row.tokens[row.start :])
        assert a.tokens[-1] in backbone.stop_tokens or a.dropped


def test_conversations_are_tokenised_as_trl_itself_would(
    loaded: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    """TRL's own path over the chat template; it keeps what the template writes behind the stop token."""
    backbone = loaded("qwen2")
    data = [
        {
            "prompt": [{"role": t.role, "content": t.text} for t in p.prompt],
            "chosen": [{"role": "assistant", "content": p.chosen}],
            "rejected": [{"role": "assistant", "content": p.rejected}],
        }
        for p in mixed()
    ]
    tail = CHATML.partition("<|im_end|>")[2][0]  # a line break
    for row, pair in zip(_trl_tokens(backbone, data, tmp_path), mixed(), strict=True):
        for name, reply in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            ours = backbone.render(pair.prompt, reply, ends_with_eos=True)
            theirs = row[f"{name}_ids"]
            end = len(ours.tokens) - ours.start
            assert row["prompt_ids"] == ours.tokens[: ours.start]
            assert theirs[:end] == ours.tokens[ours.start :]
            assert backbone.decode(theirs[end:]) == tail == "\n"


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_dialogues_are_tokenised_as_trl_itself_would(
    loaded: Callable[[str], LanguageModel], tmp_path: Path, name: str
) -> None:
    backbone = loaded(name)
    speakers = {"user": "Human", "assistant": "Assistant"}
    data = [
        {
            "prompt": "".join(f"{speakers[t.role]}: {t.text}\n\n" for t in p.prompt) + "Assistant:",
            "chosen": f" {p.chosen}",
            "rejected": f" {p.rejected}",
        }
        for p in mixed()
    ]
    for row, pair in zip(_trl_tokens(backbone, data, tmp_path), mixed(), strict=True):
        for side, reply in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            ours = backbone.render(pair.prompt, reply, ends_with_eos=True)
            assert row["prompt_ids"] == ours.tokens[: ours.start]
            assert row[f"{side}_ids"] == ours.tokens[ours.start :]


def _trl_tokens(backbone: LanguageModel, data: list[dict[str, Any]], folder: Path) -> Any:
    module, datasets = import_module("trl"), import_module("datasets")
    with trl_adapter.silence():
        config = module.DPOConfig(str(folder), use_cpu=True, report_to="none", bf16=False, max_length=None)
        return module.DPOTrainer(
            backbone.name,
            args=config,
            train_dataset=datasets.Dataset.from_list(data),
            processing_class=trl_adapter.tokenizer_of(backbone.name, None, False),
        ).train_dataset


# --- what TRL logs, computed by our backbone -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "name", "lora"),
    # Llama's head is a matrix of its own, which a reward model does not have.
    [
        *((method, "llama", SMALL) for method in MARGINS),
        ("dpo", "gpt2", None),
        *(nightly(method, "gpt2", None) for method in MARGINS if method != "dpo"),
        ("reward", "llama", None),
    ],
)
def test_margins_are_those_trl_logs(
    loaded: Callable[[str], LanguageModel], trained: Callable[..., Trained], method: str, name: str, lora: Lora | None
) -> None:
    result = trained(method, name, lora)
    held_out = mixed(12)[8:]
    found = reward_margins(result, held_out, loaded(name))
    assert found.shape == (4,)
    assert found.std() > 1e-4
    assert found.mean() == pytest.approx(result.last(f"eval_{MARGINS[method]}"), abs=1e-4, rel=1e-3)
    assert (found > 0).mean() == pytest.approx(result.last(f"eval_{ACCURACIES[method]}"))
    np.testing.assert_allclose(reward_margins(result, held_out, loaded(name), batch_tokens=1), found, atol=1e-4)


def test_margins_are_those_trl_logs_where_rows_are_cut(
    base: Callable[[str], Path], loaded: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    settings = replace(QUICK, max_length=16)
    result = train("dpo", mixed(), base("llama"), out=tmp_path, settings=settings, eval_pairs=mixed())
    assert result.facts["dropped_tokens"] > 0
    found = reward_margins(result, mixed(), loaded("llama"))
    assert found.mean() == pytest.approx(result.last("eval_rewards/margins"), abs=1e-4, rel=1e-3)


@pytest.mark.parametrize("lora", [None, SMALL], ids=["all", "lora"])
def test_an_embedding_stored_as_its_tied_head_is_found(
    base: Callable[[str], Path], tmp_path: Path, lora: Lora | None
) -> None:
    """Old checkpoints of tied models hold the matrix under the head's name, which a reward model does not have."""
    folder = tmp_path / "model"
    shutil.copytree(base("qwen2"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = replace(QUICK, learning_rate=0.0, lora=lora)
    result = train("reward", mixed(), folder, out=tmp_path / "run", settings=settings, eval_pairs=mixed())
    row = [load_backbone(folder).render(mixed()[0].prompt).tokens]
    assert torch.equal(result.backbone().hidden(row), load_backbone(base("qwen2")).hidden(row))
    found = reward_margins(result, mixed(), load_backbone(folder)).mean()
    assert found == pytest.approx(result.last("eval_margin"), abs=1e-4, rel=1e-3)


def test_the_reward_of_sft_is_the_likelihood_it_is_evaluated_by(
    loaded: Callable[[str], LanguageModel], trained: Callable[..., Trained]
) -> None:
    result, held_out = trained("sft", "gpt2", None), mixed(12)[8:]
    found = log_likelihoods(result.backbone(), held_out, result.settings)
    per_token = -found.chosen.sum() / found.chosen_tokens.sum()
    assert per_token == pytest.approx(result.last("eval_loss"), rel=1e-4)
    summed = reward_margins(result, held_out, loaded("gpt2"))
    average = reward_margins(result, held_out, loaded("gpt2"), average=True)
    np.testing.assert_allclose(summed, found.chosen - found.rejected)
    np.testing.assert_allclose(average, found.chosen / found.chosen_tokens - found.rejected / found.rejected_tokens)


def test_likelihoods_are_those_of_transformers(
    base: Callable[[str], Path], loaded: Callable[[str], LanguageModel]
) -> None:
    from transformers import AutoModelForCausalLM

    backbone = loaded("gpt2")
    model = AutoModelForCausalLM.from_pretrained(base("gpt2")).eval()
    found = log_likelihoods(backbone, mixed(), QUICK)
    for i, pair in enumerate(mixed()):
        for values, reply in ((found.chosen, pair.chosen), (found.rejected, pair.rejected)):
            row = backbone.render(pair.prompt, reply, ends_with_eos=True)
            with torch.no_grad():
                logs = model(torch.tensor([row.tokens])).logits[0].log_softmax(-1)
            expected = sum(float(logs[t - 1, row.tokens[t]]) for t in range(row.start, len(row.tokens)))
            assert values[i] == pytest.approx(expected, abs=1e-3)


def test_margins_need_the_base_of_the_run(
    loaded: Callable[[str], LanguageModel], trained: Callable[..., Trained]
) -> None:
    result = trained("dpo", "gpt2", SMALL)
    with pytest.raises(SpecMismatch, match="is not the base of"):
        reward_margins(result, mixed(), loaded("llama"))
    with pytest.raises(CoalaError, match="average is a choice for sft"):
        reward_margins(result, mixed(), loaded("gpt2"), average=True)


# --- learning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_separable_set_is_learnt_in_a_few_steps(base: Callable[[str], Path], tmp_path: Path, method: Any) -> None:
    settings = replace(QUICK, learning_rate=5e-3, epochs=3, batch_size=8, weight_decay=0.0, beta=1.0)
    seen: list[tuple[int, int]] = []
    result = train(
        method,
        separable(),
        base("gpt2"),
        out=tmp_path,
        settings=settings,
        eval_pairs=separable(),
        on_step=lambda step, steps, logs: seen.append((step, steps)),
    )
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert len(losses) == 3
    assert result.last("eval_loss") < losses[0] - 0.05
    if method in MARGINS:
        margins = [entry[f"eval_{MARGINS[method]}"] for entry in result.history if "eval_loss" in entry]
        assert margins[-1] > max(0.0, margins[0])
        assert result.last(f"eval_{ACCURACIES[method]}") == 1.0
    assert {steps for _, steps in seen} == {3}
    assert sorted({step for step, _ in seen}) == [1, 2, 3]
    assert result.seconds > 0
    assert result.peak_bytes


@pytest.mark.parametrize(
    ("method", "lora"), [("dpo", None), nightly("dpo", SMALL), nightly("sft", None), ("reward", SMALL)]
)
def test_a_rate_of_zero_changes_nothing(
    base: Callable[[str], Path], loaded: Callable[[str], LanguageModel], tmp_path: Path, method: Any, lora: Lora | None
) -> None:
    settings = replace(QUICK, learning_rate=0.0, lora=lora)
    result = train(method, separable(), base("gpt2"), out=tmp_path, settings=settings, eval_pairs=separable())
    if lora is None:
        before, after = (load_file(where / "model.safetensors") for where in (base("gpt2"), tmp_path / "model"))
        assert set(before) == set(after)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert result.backbone().template == loaded("gpt2").template
    row = [loaded("gpt2").render(separable()[0].prompt, GOOD).tokens]
    assert torch.equal(result.backbone().hidden(row), loaded("gpt2").hidden(row))
    if method == "dpo":
        assert [entry["eval_rewards/margins"] for entry in result.history if "eval_loss" in entry] == [0.0]
        assert (reward_margins(result, separable(), loaded("gpt2")) == 0).all()
        assert result.last("eval_loss") == pytest.approx(np.log(2))


@pytest.mark.parametrize("method", ["dpo", "reward"])
def test_an_adapter_loads_through_the_backbone(
    base: Callable[[str], Path], loaded: Callable[[str], LanguageModel], trained: Callable[..., Trained], method: str
) -> None:
    result = trained(method, "llama", SMALL)
    model = load_backbone(base("llama"), adapter=result.folder / "model", generation=method != "reward")
    row = [loaded("llama").render(separable()[0].prompt, GOOD).tokens]
    change = (model.hidden(row) - loaded("llama").hidden(row)).norm() / loaded("llama").hidden(row).norm()
    assert change > 1e-3
    assert model.template == loaded("llama").template
    assert model.weights != loaded("llama").weights


@pytest.mark.parametrize(
    ("method", "name"),
    [*((m, "llama") if m in ("dpo", "reward") else nightly(m, "llama") for m in METHODS), nightly("dpo", "gpt2")],
)
def test_the_papers_settings_run(base: Callable[[str], Path], tmp_path: Path, method: Any, name: str) -> None:
    """bf16, an adapter with dropout, accumulation and checkpointed activations, on the modules of Table 13."""
    result = train(method, separable(), base(name), out=tmp_path, settings=replace(paper(method), steps=1))
    assert result.facts["steps"] == 1
    names = {
        key.split(".lora_")[0].rpartition(".")[2] for key in load_file(tmp_path / "model/adapter_model.safetensors")
    }
    assert names == ({"c_attn", "c_proj"} if name == "gpt2" else set(re.findall(r"\w+_proj", _TABLE_13)))


# --- folders -------------------------------------------------------------------------------------------------------


def test_a_finished_folder_is_not_trained_again(base: Callable[[str], Path], tmp_path: Path) -> None:
    first = train("sft", separable(), base("gpt2"), out=tmp_path, settings=QUICK)

    def never(step: int, steps: int, logs: Any) -> None:
        raise AssertionError("trained again")

    again = train("sft", separable(), base("gpt2"), out=tmp_path, settings=QUICK, on_step=never)
    assert again == first == load_trained(tmp_path)
    for change in (
        {"settings": replace(QUICK, seed=1)},
        {"pairs": mixed()},
        {"method": "dpo"},
        {"model": base("llama")},
    ):
        given: dict[str, Any] = {
            "method": "sft",
            "pairs": separable(),
            "model": base("gpt2"),
            "settings": QUICK,
            **change,
        }
        with pytest.raises(StoreError, match="other settings"):
            train(out=tmp_path, **given)
    with pytest.raises(StoreError, match="is not the folder of a baseline"):
        load_trained(base("gpt2"))


class _Stop(BaseException):
    pass


@pytest.mark.parametrize(("method", "lora"), [("dpo", None), ("simpo", SMALL)])
def test_an_interrupted_run_ends_with_the_same_weights(
    base: Callable[[str], Path], tmp_path: Path, method: Any, lora: Lora | None
) -> None:
    settings = replace(QUICK, epochs=2, lora=lora, save_every=1)
    whole = train(method, mixed(), base("gpt2"), out=tmp_path / "whole", settings=settings)

    def stop(step: int, steps: int, logs: Any) -> None:
        if step == 3:
            raise _Stop

    with pytest.raises(_Stop):
        train(method, mixed(), base("gpt2"), out=tmp_path / "broken", settings=settings, on_step=stop)
    with pytest.raises(StoreError, match="not finished"):
        load_trained(tmp_path / "broken")
    (tmp_path / "broken" / "checkpoints" / "checkpoint-3").mkdir()  # killed while it was written
    steps: list[int] = []
    resumed = train(
        method,
        mixed(),
        base("gpt2"),
        out=tmp_path / "broken",
        settings=settings,
        on_step=lambda step, *_: steps.append(step),
    )
    assert min(steps) == 3
    assert_same_run(whole, resumed)


def assert_same_run(one: Trained, other: Trained) -> None:
    (path,) = (one.folder / "model").glob("*.safetensors")
    before, after = load_file(path), load_file(other.folder / "model" / path.name)
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [e["loss"] for e in one.history if "loss" in e] == [e["loss"] for e in other.history if "loss" in e]
    assert one.flops == other.flops


_KILLED = """
import os, signal, sys
from coala.baselines import train
from tests.test_baselines import QUICK, SMALL, mixed
from dataclasses import replace
def kill(step, steps, logs):
    if step == 3 and sys.argv[3] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
settings = replace(QUICK, epochs=2, lora=SMALL, save_every=1, disable_dropout=False)
train("orpo", mixed(), sys.argv[1], out=sys.argv[2], settings=settings, on_step=kill)
"""


@pytest.mark.slow
@pytest.mark.nightly  # test_an_interrupted_run_ends_with_the_same_weights, by a kill
def test_a_killed_process_ends_with_the_same_weights_and_says_nothing(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    # With dropout, so that a resumed run has to find its random numbers again.
    settings = replace(QUICK, epochs=2, lora=SMALL, save_every=1, disable_dropout=False)
    whole = train("orpo", mixed(), base("gpt2"), out=tmp_path / "whole", settings=settings)

    def run(word: str) -> Any:
        command = [sys.executable, "-c", _KILLED, str(base("gpt2")), str(tmp_path / "broken"), word]
        return subprocess.run(command, cwd=REPOSITORY, env={**os.environ}, capture_output=True, text=True, check=False)

    assert run("kill").returncode == -9
    done = run("go on")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert_same_run(whole, load_trained(tmp_path / "broken"))


def test_seeds_decide_the_weights(base: Callable[[str], Path], tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> dict[str, torch.Tensor]:
        settings = replace(QUICK, lora=SMALL, seed=seed, steps=1)
        train("orpo", mixed(), base("gpt2"), out=tmp_path / name, settings=settings)
        return load_file(tmp_path / name / "model" / "adapter_model.safetensors")  # type: ignore[no-any-return]

    one, same, other = weights("a", 1), weights("b", 1), weights("c", 2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_nothing_is_reported_to_anyone(
    base: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's client as a user has it: online, telemetry on. Outside of training it would send."""
    telemetry, constants = import_module("huggingface_hub.utils._telemetry"), import_module("huggingface_hub.constants")
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr(telemetry, "_start_telemetry_thread", lambda: None)
    sent: list[Any] = []
    monkeypatch.setattr(telemetry._TELEMETRY_QUEUE, "put", sent.append)
    train("sft", separable(), base("gpt2"), out=tmp_path, settings=QUICK)
    assert sent == []
    assert not constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_DISABLE_TELEMETRY
    telemetry.send_telemetry("control")
    assert len(sent) == 1


# --- cost ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lora", "factor"), [(None, 4), (SMALL, 3)])
def test_flops_are_those_of_the_tokens_that_were_read(
    loaded: Callable[[str], LanguageModel], trained: Callable[..., Trained], lora: Lora | None, factor: int
) -> None:
    backbone = loaded("gpt2")
    rows = render_pairs(mixed(), backbone, QUICK)
    lengths = [len(row.tokens) for pair in rows for row in (pair.chosen, pair.rejected)]
    assert trained("dpo", "gpt2", lora).flops == 2 * factor * full_flops(backbone.shape, lengths)  # two epochs
    assert trained("reward", "gpt2", lora).flops == 2 * (factor - 1) * body_flops(backbone.shape, lengths)


# --- drift ---------------------------------------------------------------------------------------------------------


def test_a_model_has_not_drifted_from_itself(loaded: Callable[[str], LanguageModel]) -> None:
    found = drift(loaded("gpt2"), loaded("gpt2"), [p.prompt for p in mixed(4)], max_new_tokens=5)
    assert found.kl.value == 0
    assert found.kl.n == 4


def test_drift_over_one_token_is_the_divergence_of_next_tokens(
    base: Callable[[str], Path], loaded: Callable[[str], LanguageModel], trained: Callable[..., Trained]
) -> None:
    from transformers import AutoModelForCausalLM

    result, prompts = trained("dpo", "gpt2", None), [p.prompt for p in mixed(5)]
    found = drift(result, loaded("gpt2"), prompts, max_new_tokens=1)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(w).eval() for w in (result.folder / "model", base("gpt2")))
    for value, prompt in zip(found.values[:, 0], prompts, strict=True):
        row = torch.tensor([loaded("gpt2").render(prompt).tokens])
        with torch.no_grad():
            p, q = (m(row).logits[0, -1].double().log_softmax(-1) for m in (ours, theirs))
        assert value == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3, abs=1e-6)
    assert found.kl.low < found.values.mean() < found.kl.high
    assert (found.tokens == 1).all()


def test_drift_over_two_tokens_is_unbiased(
    loaded: Callable[[str], LanguageModel], trained: Callable[..., Trained]
) -> None:
    """Against the sum over every first token, by the chain rule; a reply that stops there has no second."""
    result, prompt = trained("simpo", "gpt2", None), user("hello there")
    policy, base = result.backbone(), loaded("gpt2")
    row = base.render(prompt).tokens
    p, q = (m.start([row]).log_probs()[0].double() for m in (policy, base))
    exact = (p.exp() * (p - q)).sum()
    vocabulary = [t for t in range(len(p)) if t not in policy.stop_tokens]
    p2, q2 = (m.start([[*row, t] for t in vocabulary]).log_probs().double() for m in (policy, base))
    exact += (p[vocabulary].exp() * (p2.exp() * (p2 - q2)).sum(-1)).sum()
    found = drift(policy, base, [prompt], samples=600, max_new_tokens=2, batch_size=200)
    error = found.values.std() / np.sqrt(found.values.size)
    assert abs(found.kl.value - float(exact)) < 4 * error
    assert error < 0.1 * float(exact)
    assert found.kl.high == float("inf")  # one prompt has no interval


def test_drift_does_not_depend_on_batches(
    loaded: Callable[[str], LanguageModel], trained: Callable[..., Trained]
) -> None:
    result, prompts = trained("dpo", "gpt2", SMALL), [p.prompt for p in mixed(5)]
    one, many = (drift(result, loaded("gpt2"), prompts, samples=2, max_new_tokens=6, batch_size=b) for b in (1, 7))
    np.testing.assert_allclose(one.values, many.values, rtol=1e-3)
    np.testing.assert_array_equal(one.tokens, many.tokens)
    assert (one.values >= 0).all()
    with pytest.raises(CoalaError, match="writes no replies"):
        drift(trained("reward", "gpt2", SMALL), loaded("gpt2"), prompts)
    with pytest.raises(SpecMismatch, match="renders as"):
        drift(result.backbone(), loaded("llama"), prompts)


# --- settings ------------------------------------------------------------------------------------------------------

_TABLE_13 = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
_NAMES = {
    "learning_rate": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "beta": "beta",
    "gamma": "simpo_gamma",
    "gradient_checkpointing": "gradient_checkpointing",
    "disable_dropout": "disable_dropout",
    "max_length": "max_length",
    "schedule": "lr_scheduler_type",
    "warmup": "warmup_steps",
    "optimiser": "optim",
    "weight_decay": "weight_decay",
    "adam_epsilon": "adam_epsilon",
    "clip": "max_grad_norm",
    "seed": "seed",
    "log_every": "logging_steps",
    "save_every": "save_steps",
}


@pytest.mark.parametrize("method", METHODS)
def test_trls_defaults_are_trls(method: Any, tmp_path: Path) -> None:
    with trl_adapter.silence():
        module, _, name = trl_adapter._PLACES[method]
        config = getattr(import_module(module), name)(str(tmp_path), use_cpu=True)
    settings = trl(method)
    for ours, theirs in _NAMES.items():
        if hasattr(config, theirs):
            assert getattr(settings, ours) == getattr(config, theirs), theirs
    assert settings.adam_betas == (config.adam_beta1, config.adam_beta2)
    assert settings.bf16 == config.bf16
    assert settings.lora is None


def test_the_papers_settings_are_those_of_its_tables(shared: Path) -> None:
    text = (shared / "papers" / "coala.md").read_text()
    settings = paper("dpo")
    assert settings.lora is not None

    def said(pattern: str) -> float:
        (found,) = re.findall(pattern, text)
        return float(found)

    assert settings.learning_rate == pytest.approx(said(r"optimizer\.lr ([\d.]+)\\times 10\^\{-4\}") * 1e-4)
    assert settings.weight_decay == said(r"optimizer\.weight_decay ([\d.]+)")
    assert settings.warmup == 1000 == said(r"scheduler\.warmup_num_steps (\d) 000") * 1000
    assert settings.accumulation == said(r"gradient_accumulation_steps (\d+)")
    assert settings.batch_size == said(r"train_micro_batch_size_per_gpu (\d+)")
    assert settings.clip == said(r"gradient_clipping ([\d.]+)")
    assert settings.lora.rank == said(r"\nR (\d+) ")
    assert settings.lora.alpha == said(r"\nLora_alpha (\d+) ")
    assert settings.lora.dropout == said(r"\nLora_dropout ([\d.]+)")
    assert f"[{_TABLE_13}]" in text


@pytest.mark.parametrize("method", ["sft", "simpo"])
def test_every_setting_reaches_trl(loaded: Callable[[str], LanguageModel], tmp_path: Path, method: Any) -> None:
    settings = TrainSettings(
        learning_rate=3e-4,
        epochs=5.0,
        batch_size=3,
        accumulation=7,
        beta=0.7,
        gamma=0.9,
        bf16=False,
        gradient_checkpointing=False,
        disable_dropout=False,
        schedule="cosine",
        warmup=11,
        optimiser="adamw_torch",
        weight_decay=0.02,
        adam_betas=(0.8, 0.99),
        adam_epsilon=1e-7,
        clip=0.5,
        seed=13,
        save_every=17,
        log_every=19,
    )
    found = trainer_of(method, loaded("gpt2"), mixed(), settings, tmp_path).args
    for ours, theirs in _NAMES.items():
        if hasattr(found, theirs) and ours != "max_length":  # rows are cut before
            assert getattr(settings, ours) == getattr(found, theirs), theirs
            assert getattr(settings, ours) != getattr(TrainSettings(), ours), ours
    assert (found.adam_beta1, found.adam_beta2, found.bf16) == (0.8, 0.99, False)
    assert found.report_to == []
    if method == "simpo":
        assert (found.loss_type, found.cpo_alpha) == ("simpo", 0.0)


def test_the_rate_warms_up_and_decays(base: Callable[[str], Path], tmp_path: Path) -> None:
    settings = replace(QUICK, warmup=2, epochs=2)
    result = train("sft", mixed(), base("gpt2"), out=tmp_path, settings=settings)
    rates = [entry["learning_rate"] for entry in result.history if "loss" in entry]
    np.testing.assert_allclose(rates, np.array([0, 0.5, 1, 0.5]) * settings.learning_rate)


def test_a_sweep_differs_in_the_rate_alone() -> None:
    rates = [1e-6, 1e-5, 1e-4]
    swept = sweep(paper("dpo"), rates)
    assert [s.learning_rate for s in swept] == rates
    assert {replace(s, learning_rate=0.0) for s in swept} == {replace(paper("dpo"), learning_rate=0.0)}


@pytest.mark.parametrize(
    "wrong",
    [{"batch_size": 0}, {"learning_rate": -1.0}, {"epochs": 0}, {"beta": 0.0}, {"max_length": 1}, {"steps": 0}],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(CoalaError, match=next(iter(wrong))):
        TrainSettings(**wrong)


def test_what_cannot_be_trained_is_refused(
    base: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt(method: Any = "sft", pairs: Any = None, **change: Any) -> None:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        given = separable(2) if pairs is None else pairs
        train(method, given, base("llama"), out=out, settings=replace(QUICK, **change))

    with pytest.raises(CoalaError, match="No baseline is called 'ppo'"):
        attempt("ppo")
    with pytest.raises(CoalaError, match="There are no pairs"):
        attempt(pairs=[])
    empty = [Pair(user("hello"), "good", "", "a")]
    with pytest.raises(CoalaError, match=r"Pair 0 .*the rejected reply has no tokens"):
        attempt("orpo", pairs=empty, ends_with_eos=False)
    with pytest.raises(CoalaError, match=r"cannot be trained by dpo .*nowhere"):
        attempt("dpo", lora=Lora(targets=("nowhere",)))
    with pytest.raises(CoalaError, match="deepspeed, which is not installed"):
        attempt(deepspeed="zero3.json")
    monkeypatch.setattr(trl_adapter, "find_spec", lambda name: None if name == "trl" else object())
    with pytest.raises(CoalaError, match=r"needs trl, .*coala-align\[baselines\]"):
        attempt()
