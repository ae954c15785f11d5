"""Exports served by llama.cpp: the greedy tokens of the policy, its logits at each strength, how far off at most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coala.backbone import LanguageModel, load_backbone
from coala.decoding.distilled import divergence
from coala.export.policy_gguf import export_gguf, export_gguf_lora
from coala.policies import DistilledPolicy
from coala.statistics.intervals import mean_estimate
from coala.values import user

from .test_backbone_gguf import make_folder, write_gguf
from .test_backbone_gguf_parity import ARITHMETIC, PROMPTS, asked, serving
from .test_distil import policy_of

GREEDY: dict[str, Any] = {"temperature": 0, "cache_prompt": False, "return_tokens": True}


def logits_of(llama: Any, row: list[int], n: int, **settings: Any) -> torch.Tensor | None:
    """Log-probabilities (V,) of the token after ``row``, over the whole vocabulary of ``n``.

    None where its greedy token is a part of a character: the server tells nothing of those.
    """
    answer = asked(llama, "completion", prompt=row, n_predict=1, n_probs=n, **GREEDY, **settings)
    if not answer.get("completion_probabilities"):
        return None
    (step,) = answer["completion_probabilities"]
    found = torch.full((n,), -torch.inf)
    for one in step["top_logprobs"]:
        found[one["id"]] = one["logprob"]
    return found


def log_probs_of(model: LanguageModel, policy: DistilledPolicy, states: torch.Tensor) -> torch.Tensor:
    """The policy's log-probabilities (n, V) after final states (n, d), as it is sampled here."""
    return torch.log_softmax(model.with_policy(policy).changed().logits(states), -1)


def leaves_within(log_probs: torch.Tensor, reply: list[int], nats: float) -> bool:
    """Whether ``reply`` is greedy up to where the two best are closer than ``nats``, or to its end."""
    best = log_probs.argmax(-1).tolist()
    at = next((at for at, token in enumerate(reply) if best[at] != token), None)
    return at is None or float(log_probs[at, best[at]] - log_probs[at, reply[at]]) < nats


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LanguageModel]:
    """A random Llama whose output layer is tied, as a GGUF file in float32."""
    folder = tmp_path_factory.mktemp("served")
    file = write_gguf(make_folder(folder / "hf", tie_word_embeddings=True), folder / "tiny.gguf")
    return file, load_backbone(file, device="cpu", dtype="float32")


@pytest.mark.parametrize("precision", ["f16", "q8_0"])
def test_llama_cpp_writes_the_policys_greedy_tokens(
    precision: Any, tiny: tuple[Path, LanguageModel], tmp_path: Path
) -> None:
    _, model = tiny
    policy = policy_of(model, 0.02)
    llama = serving(export_gguf(policy, model, tmp_path / "changed.gguf", precision=precision).path)
    told = 0
    for prompt in PROMPTS:
        row = model.render(user(prompt)).tokens[-40:]
        reply = asked(llama, "completion", prompt=row, n_predict=8, ignore_eos=True, **GREEDY)["tokens"]
        states = model.hidden([row + reply], -1)[0, len(row) - 1 : -1]
        # llama.cpp rounds states to as many bits as the layer has.
        assert leaves_within(log_probs_of(model, policy, states), reply, 0.1 if precision == "f16" else 0.5), prompt
        told += model.logits(states).argmax(-1).tolist() != reply
    assert told > len(PROMPTS) / 2  # the base model's are others


def test_an_adapter_in_gguf_has_the_policys_logits_at_the_strength_of_each_request(
    tiny: tuple[Path, LanguageModel], tmp_path: Path
) -> None:
    _, model = tiny
    policy = policy_of(model, 0.05)
    made = export_gguf_lora(policy, model, tmp_path / "lora")
    assert made.difference == 0
    llama = serving(made.path / "base.gguf", made.path / "adapter.gguf")
    row = model.render(user("once upon a time")).tokens
    state = model.hidden([row], -1)[0, -1:]
    for strength in (0.0, 0.5, 1.0, 0.0):
        found = logits_of(llama, row, len(model.tokenizer), lora=[{"id": 0, "scale": strength}])
        assert found is not None
        wanted = log_probs_of(model, policy.scaled(strength), state)[0]
        # llama.cpp attends in half precision.
        assert (found - wanted).abs().max() < 0.05, strength
    apart = [log_probs_of(model, policy.scaled(strength), state)[0] for strength in (0.0, 0.5, 1.0)]
    assert min(float((apart[i] - apart[i + 1]).abs().max()) for i in (0, 1)) > 0.5


@pytest.fixture(scope="module")
def chat_model(smollm2: Path) -> tuple[LanguageModel, DistilledPolicy]:
    model = load_backbone(smollm2, device="cpu", dtype="float32")
    return model, policy_of(model, 0.004, rank=8)


@pytest.mark.nightly
def test_a_served_policy_is_as_near_ours_as_the_served_model_is(
    chat_model: tuple[LanguageModel, DistilledPolicy], tmp_path: Path, smollm2: Path
) -> None:
    """KL(ours || llama.cpp's) after 20 prompts: of the exported files against that of the quantised file itself."""
    model, policy = chat_model
    rows = [model.render(user(prompt)).tokens for prompt in PROMPTS]
    states = [model.hidden([row], -1)[0, -1:] for row in rows]
    wanted = {
        "base": [model.logits(state).log_softmax(-1)[0] for state in states],
        "policy": [log_probs_of(model, policy, state)[0] for state in states],
    }
    files = {"base": smollm2} | {
        precision: export_gguf(policy, model, tmp_path / f"{precision}.gguf", precision=precision).path
        for precision in ("f16", "q8_0")
    }
    told = {}
    for name, file in files.items():
        llama = serving(file)
        ours = wanted["base" if name == "base" else "policy"]
        found = [logits_of(llama, row, len(one)) for row, one in zip(rows, ours, strict=True)]
        nats = [float(divergence(one, other)) for one, other in zip(ours, found, strict=True) if other is not None]
        assert len(nats) >= 15
        told[name] = mean_estimate(nats)
    print({name: str(estimate) for name, estimate in told.items()})
    moved = np.mean([float(divergence(*pair)) for pair in zip(wanted["policy"], wanted["base"], strict=True)])
    for precision in ("f16", "q8_0"):
        assert told[precision].value <= told["base"].high < 0.1 * moved


@pytest.mark.nightly
def test_a_real_models_adapter_has_the_policys_logits_at_each_strength(
    chat_model: tuple[LanguageModel, DistilledPolicy], tmp_path: Path
) -> None:
    model, policy = chat_model
    made = export_gguf_lora(policy, model, tmp_path / "lora").path
    llama = serving(made / "base.gguf", made / "adapter.gguf")
    row = model.render(user(PROMPTS[0])).tokens
    state = model.hidden([row], -1)[0, -1:]
    for strength in (0.0, 0.5, 1.0):
        wanted = log_probs_of(model, policy.scaled(strength), state)[0]
        found = logits_of(llama, row, len(wanted), lora=[{"id": 0, "scale": strength}])
        assert found is not None
        likely = wanted > np.log(1e-4)
        assert (found - wanted)[likely].abs().max() < ARITHMETIC["as it is"], strength
