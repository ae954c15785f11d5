"""Decoding by a distilled policy: plain sampling at one forward a token, its divergence from the base model known.

What is sampled is what an exported checkpoint samples: softmax(W (h + A h)), then temperature, top-k and top-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from coala.backbone import LanguageModel
from coala.decoding.decoder import Batch, Decoder
from coala.decoding.generation import decoded
from coala.decoding.guidance import Guidance
from coala.decoding.replies import OnToken
from coala.decoding.requests import Request, generation, identified, prepare_all
from coala.decoding.sampling import Nucleus, restrict
from coala.policies import DistilledPolicy
from coala.values import CoalaError, Generation, Prompt, SpecMismatch, prompts_of


class Changed:
    """The output layer of ``backbone`` as ``policy`` changes it; refuses a policy of other weights."""

    def __init__(self, backbone: LanguageModel, policy: DistilledPolicy) -> None:
        backbone.require_head("Distilled policies")
        if backbone.weights != policy.spec.weights:
            raise SpecMismatch(
                f"The policy changes {policy.spec.backbone} (weights {policy.spec.weights[:12]}), but the loaded "
                f"model is {backbone.name} (weights {backbone.weights[:12]}). Load the model it was distilled from."
            )
        self._backbone = backbone
        self._left, self._right = (torch.tensor(part, device=backbone.device) for part in policy.factors())

    def log_probs(self, final: torch.Tensor) -> torch.Tensor:
        """Next-token log-probabilities (B, V) float32 after final states (B, d)."""
        states = final.float()
        changed = states + states @ self._right.T @ self._left.T
        return torch.log_softmax(self._backbone.logits(changed), -1)


def divergence(policy: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """KL(policy || base) in nats (B,), of log-probabilities (B, V); float64."""
    policy, base = policy.double(), base.double()
    return torch.where(policy > -torch.inf, policy.exp() * (policy - base), 0.0).sum(-1)


class DistilledDecoder(Decoder):
    """A decoder without a head whose next token is the policy's; what a step diverges is entered in the accounts."""

    def __init__(
        self, backbone: LanguageModel, policy: DistilledPolicy, guidance: Guidance, *, temperature: float
    ) -> None:
        super().__init__(backbone, None, guidance, temperature=temperature)
        self._changed = Changed(backbone, policy)

    def nucleus(self, batch: Batch) -> Nucleus:
        base = batch.prefix.log_probs()
        policy = self._changed.log_probs(batch.prefix.state())
        for reply, nats in zip(batch.replies, divergence(policy, base).tolist(), strict=True):
            reply.account.spent += nats
        found = restrict(policy, temperature=self.temperature, top_k=self.guidance.top_k, top_p=self.guidance.top_p)
        tokens = torch.from_numpy(found.tokens).to(base.device)
        return replace(found, base=base.gather(1, tokens).cpu().double().numpy())


def generate_distilled(
    prompts: Sequence[Prompt],
    backbone: LanguageModel,
    policy: DistilledPolicy,
    *,
    max_new_tokens: int,
    seed: int,
    strength: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 50,
    top_p: float = 0.9,
    stop: Sequence[str] = (),
    prompt_ids: Sequence[str] | None = None,
    batch_size: int = 16,
    on_token: OnToken | None = None,
) -> list[Generation]:
    """One reply per prompt, sampled from ``policy`` at ``strength``; all else as in :func:`coala.decoding.generate`.

    With the same seed and ids, strength 0 gives the unguided text token for token. ``log_prob`` is the base model's;
    ``divergence`` the sum over a reply's steps of KL(policy || base) over the whole vocabulary, at temperature 1: its
    mean over replies is the divergence between the two distributions of replies, before top-k and top-p.
    """
    conversations = prompts_of(prompts)
    ids = identified(conversations, prompt_ids, batch_size)
    guidance = Guidance.unguided(top_k=top_k, top_p=top_p)
    decoder = DistilledDecoder(backbone, policy.scaled(strength), guidance, temperature=temperature)
    asked = partial(
        Request, guidance=guidance, max_new_tokens=max_new_tokens, seed=seed, temperature=temperature, stop=stop
    )
    parts = prepare_all(asked, conversations, ids, backbone, None, on_token=on_token)
    for _ in decoded(decoder, parts, guidance, batch_size):
        pass
    method = "distilled" if strength == 1 else f"distilled, strength {strength:g}"
    return [
        replace(generation(part.reply, None, guidance), method=method, divergence=part.reply.account.spent)
        for part in parts
    ]


def policy_likelihood(
    prompts: Sequence[Prompt], texts: Sequence[str], backbone: LanguageModel, policy: DistilledPolicy
) -> list[tuple[float, float, int]]:
    """Log-probability of each text as a reply under the policy and under the base model, and its tokens.

    Over the whole vocabulary, at temperature 1; the end of the reply is not counted.
    """
    if len(texts) != len(prompts):
        raise CoalaError(f"{len(prompts)} prompts need as many texts; found {len(texts)}.")
    changed, found = Changed(backbone, policy), []
    for prompt, text in zip(prompts_of(prompts), texts, strict=True):
        row = backbone.render(prompt, text)
        tokens = np.asarray(row.tokens[row.start : row.stop])
        if not len(tokens) or row.start < 1:
            found.append((0.0, 0.0, 0))
            continue
        final = backbone.hidden([row.tokens], -1)[0, row.start - 1 : row.stop - 1]
        at = torch.from_numpy(tokens).to(final.device)[:, None]
        both = (changed.log_probs(final), torch.log_softmax(backbone.logits(final), -1))
        totals = [float(one.gather(1, at).double().sum()) for one in both]
        found.append((totals[0], totals[1], len(tokens)))
    return found
