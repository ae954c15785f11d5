"""Decoding by a model with an adapter, as its base decodes; the same weights with the adapter off are the base.

The adapter changes states, so that base and policy are two passes over a reply: what each of its steps diverges is
taken from these, over the whole vocabulary, once it is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from coala.backbone import LanguageModel, load_backbone
from coala.backbone.adapters import find_adapter
from coala.decoding.decoder import Decoder
from coala.decoding.distilled import divergence
from coala.decoding.generation import decoded
from coala.decoding.guidance import Guidance
from coala.decoding.replies import OnToken
from coala.decoding.requests import Prepared, Request, generation, identified, prepare_all
from coala.policies import DistilledAdapter
from coala.values import CoalaError, Generation, Prompt, SpecMismatch, prompts_of


def load_adapted(
    adapter: DistilledAdapter, *, merge: bool = False, trust_remote_code: bool = False, **options: Any
) -> LanguageModel:
    """The model of ``adapter`` with it beside the weights (``merge``: in them); ``options`` are ``load_backbone``'s.

    Raises ``SpecMismatch`` unless the model is the one it was trained from.
    """
    spec = adapter.spec
    model = load_backbone(
        spec.backbone,
        revision=spec.revision or None,
        template=spec.template.partition(":")[0],
        adapter=adapter.folder,
        merge=merge,
        trust_remote_code=trust_remote_code,
        # A file of the folder names the model, not whoever asks for it.
        **{"download": False, **options},
    )
    change = f"adapter {find_adapter(str(adapter.folder), download=False).digest}"
    if model.weights != hashlib.sha256(f"{spec.weights}\n{change}".encode()).hexdigest():
        raise SpecMismatch(
            f"The adapter in {adapter.folder} was trained from weights {spec.weights[:12]} of {spec.backbone}, and "
            "there are others now. Fix: give back the model that it was trained from, or distil again."
        )
    return model


@contextmanager
def adapter_off(model: LanguageModel) -> Iterator[LanguageModel]:
    """``model`` without the adapter that lies beside its weights: its base, while the block runs."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in model.transformer.modules() if isinstance(layer, BaseTunerLayer)]
    if not layers:
        raise CoalaError(f"{model.name} has no separate adapter. Fix: load it with merge=False.")
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield model
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def generate_adapted(
    prompts: Sequence[Prompt],
    model: LanguageModel,
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    top_k: int = 50,
    top_p: float = 0.9,
    stop: Sequence[str] = (),
    prompt_ids: Sequence[str] | None = None,
    batch_size: int = 16,
    on_token: OnToken | None = None,
) -> list[Generation]:
    """One reply per prompt, sampled from ``model`` (:func:`load_adapted`); all else as in :func:`generate_distilled`.

    ``log_prob`` is the base model's; ``divergence`` the sum over a reply's steps of KL(policy || base) over the whole
    vocabulary, at temperature 1. Steps behind a stop string, which the reply does not have, are not counted.
    """
    conversations = prompts_of(prompts)
    ids = identified(conversations, prompt_ids, batch_size)
    guidance = Guidance.unguided(top_k=top_k, top_p=top_p)
    decoder = Decoder(model, None, guidance, temperature=temperature)
    asked = partial(
        Request, guidance=guidance, max_new_tokens=max_new_tokens, seed=seed, temperature=temperature, stop=stop
    )
    parts = prepare_all(asked, conversations, ids, model, None, on_token=on_token)
    for _ in decoded(decoder, parts, guidance, batch_size):
        pass
    return [_measured(model, part, guidance) for part in parts]


@torch.no_grad()
def _measured(model: LanguageModel, part: Prepared, guidance: Guidance) -> Generation:
    """The reply with its likelihood under the base and what its steps diverge, the one that drew a stop token too."""
    reply, tokens = part.reply, part.reply.tokens
    n = len(tokens) + (reply.finish == "stop" and reply.cut is None)
    policy = step_log_probs(model, part.row, tokens, n)
    with adapter_off(model):
        base = step_log_probs(model, part.row, tokens, n)
    taken = torch.tensor(tokens, dtype=torch.long, device=base.device)[:, None]
    log_prob = float(base[: len(tokens)].gather(1, taken).double().sum())
    found = generation(reply, None, guidance)
    return replace(found, method="adapter", log_prob=log_prob, divergence=float(divergence(policy, base).sum()))


@torch.no_grad()
def step_log_probs(model: LanguageModel, row: Sequence[int], tokens: Sequence[int], n: int) -> torch.Tensor:
    """Log-probabilities (n, V) of every token at the first ``n`` steps of ``tokens``, a reply to the prompt ``row``."""
    final = model.hidden([[*row, *tokens]], -1)[0, len(row) - 1 : len(row) - 1 + n]
    return torch.log_softmax(model.logits(final), -1)
