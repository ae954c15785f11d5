"""Distillation from end to end: states of replies, the policy as a decoder, and the model with its layer changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coala.backbone import LanguageModel, load_backbone
from coala.decoding import Guidance, generate, generate_distilled, policy_likelihood
from coala.decoding.distilled import divergence
from coala.distil import Lesson, output_matrix, teacher_states
from coala.policies import DistilledPolicy
from coala.values import CoalaError, SpecMismatch, user

from .menagerie import tiny_backbone

PROMPTS = [user(text) for text in ("once upon a time", "a dog", "the film was")]
SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "seed": 3}


def policy_of(backbone: LanguageModel, scale: float, rank: int | None = 3) -> DistilledPolicy:
    rng = np.random.default_rng(1)
    d = backbone.width
    left = (scale * rng.standard_normal((d, rank or d))).astype(np.float32)
    right = None if rank is None else rng.standard_normal((rank, d)).astype(np.float32)
    return DistilledPolicy(left, right, backbone.spec(), "guided", "nucleus", 0.1)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_backbone(tiny_backbone("llama", tmp_path_factory.mktemp("llama")), device="cpu")


def with_layer(folder: Path, output: np.ndarray) -> LanguageModel:
    """A model of its own whose output layer is ``output``."""
    model = load_backbone(folder, device="cpu")
    layer = model.transformer.get_output_embeddings()
    layer.weight = torch.nn.Parameter(torch.from_numpy(output), requires_grad=False)
    return model


def test_a_policy_samples_what_the_model_with_its_layer_changed_samples(backbone: LanguageModel) -> None:
    policy = policy_of(backbone, 0.2)
    output = output_matrix(backbone)
    other = with_layer(Path(backbone.name), output + output @ policy.change)
    ours = generate_distilled(PROMPTS, backbone, policy, **SETTINGS)
    theirs = generate(PROMPTS, other, None, Guidance.unguided(), **SETTINGS)
    assert [one.text for one in ours] == [one.text for one in theirs]
    base = generate(PROMPTS, backbone, None, Guidance.unguided(), **SETTINGS)
    assert [one.text for one in ours] != [one.text for one in base]
    still = generate_distilled(PROMPTS, backbone, policy, strength=0, **SETTINGS)
    assert [one.text for one in still] == [one.text for one in base]
    assert [one.divergence for one in still] == pytest.approx([0.0] * len(base), abs=1e-5)


def test_what_a_reply_diverges_is_the_sum_over_its_steps(backbone: LanguageModel) -> None:
    policy = policy_of(backbone, 0.2, rank=None)
    prompt, length = PROMPTS[0], 3
    replies = generate_distilled([prompt] * 40, backbone, policy, max_new_tokens=length, seed=0)
    rows = [backbone.render(prompt, reply.text) for reply in replies]
    # One whose text is read as the tokens that it was written in.
    reply, row = next(
        (reply, row)
        for reply, row in zip(replies, rows, strict=True)
        if row.stop - row.start == length
        and policy_likelihood([prompt], [reply.text], backbone, policy)[0][1] == pytest.approx(reply.log_prob, rel=1e-4)
    )
    output, at = output_matrix(backbone), policy.change.astype(float)
    final = backbone.hidden([row.tokens], -1)[0, row.start - 1 : row.stop - 1].double().numpy()
    logits = [states @ output.astype(float).T for states in (final + final @ at.T, final)]
    p, q = (np.exp(z - np.logaddexp.reduce(z, axis=1, keepdims=True)) for z in logits)
    assert reply.divergence == pytest.approx((p * np.log(p / q)).sum(), rel=1e-4)
    ((policy_log, base_log, n),) = policy_likelihood([prompt], [reply.text], backbone, policy)
    taken = np.arange(n), row.tokens[row.start : row.stop]
    assert (policy_log, base_log) == pytest.approx((np.log(p[taken]).sum(), np.log(q[taken]).sum()), rel=1e-4)


def test_divergence_is_none_of_equals_and_bears_what_cannot_be() -> None:
    p = torch.log_softmax(torch.randn(3, 7), -1)
    assert torch.equal(divergence(p, p), torch.zeros(3, dtype=torch.float64))
    assert float(divergence(torch.tensor([[0.0, -torch.inf]]), torch.log(torch.tensor([[0.5, 0.5]])))) == pytest.approx(
        np.log(2)
    )


def test_states_are_those_the_model_predicts_from(backbone: LanguageModel, tmp_path: Path) -> None:
    lessons = [
        Lesson(PROMPTS[0], "there was a dog", 0, 2.0, ended=True),
        Lesson(PROMPTS[1], "", 1),
        Lesson(PROMPTS[2], "good", 2),
    ]
    output = output_matrix(backbone)
    told: list[tuple[int, int]] = []
    found = teacher_states(
        backbone,
        output,
        lessons,
        tmp_path,
        Guidance.unguided(top_k=20),
        n_tokens=24,
        on_reply=lambda *n: told.append(n),
    )
    row = backbone.render(lessons[0].prompt, lessons[0].text, ends_with_eos=True)
    first = found.group == 0
    assert first.sum() == row.stop - row.start
    assert set(found.weight[first]) == {2.0}
    assert row.tokens[row.stop - 1] in backbone.stop_tokens
    taken = np.take_along_axis(found.tokens, found.target.argmax(1)[:, None], 1)[:, 0]
    assert taken[first].tolist() == row.tokens[row.start : row.stop]
    logits = found.states @ output.T
    likelihood, n = (
        backbone.log_likelihood(
            backbone.hidden([row.tokens], -1),
            torch.tensor([row.tokens]),
            torch.tensor([row.start]),
            torch.tensor([row.stop]),
        ),
        int(first.sum()),
    )
    ours = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))[first][np.arange(n), taken[first]].sum()
    assert ours == pytest.approx(float(likelihood), rel=1e-4)
    assert found.size.max() <= 20
    # What is there is not made again; a shard that is, is taken as it stands.
    again = teacher_states(backbone, output, lessons, tmp_path, Guidance.unguided(top_k=20), n_tokens=24)
    assert np.array_equal(again.states, found.states)
    assert isinstance(again.states, np.memmap)
    assert told == [(3, 3)]


@pytest.mark.parametrize("kind", ["cohere", "granite"])
def test_a_scale_of_the_logits_is_part_of_the_matrix(kind: str, tmp_path: Path) -> None:
    model = load_backbone(tiny_backbone(kind, tmp_path / kind), device="cpu")
    config = model.transformer.config
    for name in ("logit_scale", "logits_scaling"):
        if hasattr(config, name):
            # Both read it when they are made, or at every step.
            setattr(config, name, 0.25)
    if hasattr(model.transformer, "logit_scale"):
        model.transformer.logit_scale = 0.25
    raw = model.transformer.get_output_embeddings().weight.numpy()
    assert np.allclose(output_matrix(model), raw * (0.25 if kind == "cohere" else 4.0))


def test_models_whose_logits_are_no_product_are_refused_by_name(tmp_path: Path) -> None:
    bent = load_backbone(tiny_backbone("gemma2", tmp_path / "gemma2"), device="cpu")
    with pytest.raises(CoalaError, match="final_logit_softcapping"):
        output_matrix(bent)
    shifted = load_backbone(tiny_backbone("phi", tmp_path / "phi"), device="cpu")
    with pytest.raises(CoalaError, match="bias"):
        output_matrix(shifted)


def test_a_policy_of_another_model_is_refused(backbone: LanguageModel) -> None:
    policy = policy_of(backbone, 0.1)
    other = replace(policy, spec=replace(policy.spec, weights="0" * 64))
    with pytest.raises(SpecMismatch, match="Load the model it was distilled from"):
        generate_distilled(PROMPTS, backbone, other, **SETTINGS)
