"""The distilled policy beside the base model: replies of it, and how likely texts are under both.

Decoding itself knows no policy: mode ``distilled`` is plain sampling of the model with its output layer changed
(:meth:`coala.backbone.LanguageModel.changed`), at one forward a token, and what an exported checkpoint samples. What it
says beside the base model, a second product with the output layer, is read from the finished reply, where it is asked
for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from coala.backbone import LanguageModel
from coala.policies import DistilledPolicy
from coala.values import CoalaError, Prompt, prompts_of

# Logits of one kind that are held at once: 128 MB of them in float32.
LOGITS = 1 << 25


@dataclass(frozen=True)
class Beside:
    """Of the tokens of one text, in nats (n,): log-probabilities under the policy and the base model, and at each step
    the divergence KL(policy || base), all over the whole vocabulary at temperature 1.

    ``divergence`` may have a step more: the one that ended the text.
    """

    policy: torch.Tensor
    base: torch.Tensor
    divergence: torch.Tensor


def divergence(policy: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """KL(policy || base) in nats (B,), of log-probabilities (B, V); float64."""
    policy, base = policy.double(), base.double()
    return torch.where(policy > -torch.inf, policy.exp() * (policy - base), 0.0).sum(-1)


def beside_base(
    base: LanguageModel, changed: LanguageModel, before: Sequence[int], tokens: Sequence[int], *, ended: bool = False
) -> Beside:
    """One forward over the prompt ``before`` and the ``tokens`` behind it; ``ended``: a stop token came next."""
    n = len(tokens)
    steps = n + ended if before else 0
    none = torch.zeros(0, dtype=torch.float64)
    told, own, nats = [none], [none], [none]
    if steps:
        final = base.hidden([[*before, *tokens]], -1)[0, len(before) - 1 :][:steps]
        at = torch.tensor(list(tokens), dtype=torch.long, device=final.device)
        size = max(1, LOGITS // base.shape.vocabulary)
        for first in range(0, steps, size):
            taken = at[first : first + size, None]
            both = [torch.log_softmax(model.logits(final[first : first + size]), -1) for model in (changed, base)]
            for part, log_probs in zip((told, own), both, strict=True):
                part.append(log_probs[: len(taken)].gather(1, taken)[:, 0].double().cpu())
            nats.append(divergence(*both).cpu())
    return Beside(*map(torch.cat, (told, own, nats)))


def policy_likelihood(
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    backbone: LanguageModel,
    policy: DistilledPolicy | None = None,
    *,
    strength: float = 1.0,
    on_texts: Callable[[int, int], None] | None = None,
) -> list[tuple[float, float, int]]:
    """Log-probability of each text as a reply under the policy and under the base model, and its tokens.

    The policy is ``policy`` or else the model's own, at ``strength``. Exact, over the whole vocabulary, at temperature
    1; the end of the reply is not counted.
    """
    if len(texts) != len(prompts):
        raise CoalaError(f"{len(prompts)} prompts need as many texts; found {len(texts)}.")
    base = backbone.changed(0)
    changed = (backbone if policy is None else backbone.with_policy(policy)).changed(strength)
    found = []
    for prompt, text in zip(prompts_of(prompts), texts, strict=True):
        row = backbone.render(prompt, text)
        one = beside_base(base, changed, row.tokens[: row.start], row.tokens[row.start : row.stop])
        found.append((float(one.policy.sum()), float(one.base.sum()), len(one.policy)))
        if on_texts is not None:
            on_texts(len(found), len(texts))
    return found
