"""How far training moved a model from its base: the Kullback-Leibler divergence of its replies, estimated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from coala.backbone import LanguageModel
from coala.baselines.likelihoods import Float64, loaded_like
from coala.baselines.training import Trained
from coala.statistics.intervals import mean_estimate
from coala.values import CoalaError, Estimate, SpecMismatch, Turn


@dataclass(frozen=True)
class Drift:
    """KL(trained || base) of replies in nats: ``kl`` with its interval over prompts.

    ``values`` (prompts, samples) are the single replies' sums, ``tokens`` (prompts, samples) their lengths, the stop
    token counted.
    """

    kl: Estimate
    values: Float64
    tokens: Float64


def drift(
    trained: Trained | LanguageModel,
    base: LanguageModel,
    prompts: Sequence[Sequence[Turn]],
    *,
    base_prompts: Sequence[Sequence[Turn]] | None = None,
    samples: int = 1,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    seed: int = 0,
) -> Drift:
    """KL(pi || base) of whole replies up to ``max_new_tokens``, from ``samples`` replies of pi to each prompt.

    By the chain rule the divergence is the expected sum over a reply's positions of KL(pi(. | before) || base(. |
    before)). Replies are sampled from pi at temperature 1, to a stop token or to their end; each position's term is
    computed over the whole vocabulary, which is unbiased, never negative, and has a smaller variance than the log
    ratio of the token that was drawn. Each reply has random numbers of its own, so that batches change nothing but
    rounding. The interval is Student's over prompts, cut at 0. ``base_prompts`` are what the base is given instead of
    ``prompts``, in their order: how far a system prompt or examples move a model.

    Raises ``SpecMismatch`` if the two do not render alike, :class:`CoalaError` for a reward model.
    """
    if samples < 1 or max_new_tokens < 1 or batch_size < 1 or not prompts:
        raise CoalaError(
            f"{len(prompts)} prompts, samples {samples}, max_new_tokens {max_new_tokens}, batch_size {batch_size}; "
            "expected at least 1 of each."
        )
    if isinstance(trained, Trained):
        if trained.method == "reward":
            raise CoalaError("A reward model writes no replies, so it has no drift. Ask for that of another method.")
        trained = loaded_like(trained, base)
    if trained.template != base.template:
        raise SpecMismatch(
            f"{trained.name} renders as {trained.template}, {base.name} as {base.template}; drift compares a model "
            "with its own base. Load both with one template."
        )
    longest = min(trained.max_tokens, base.max_tokens) - max_new_tokens
    if base_prompts is not None and len(base_prompts) != len(prompts):
        raise CoalaError(f"{len(prompts)} prompts need as many base_prompts; found {len(base_prompts)}.")
    rows, base_rows = (
        [trained.render(prompt, max_tokens=longest).tokens for prompt in some for _ in range(samples)]
        for some in (prompts, prompts if base_prompts is None else base_prompts)
    )
    values, tokens = np.zeros(len(rows)), np.zeros(len(rows))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        chances = [np.random.default_rng([seed, i]).random(max_new_tokens) for i in batch]
        both = [rows[i] for i in batch], [base_rows[i] for i in batch]
        _sample(trained, base, both, np.array(chances), batch, values, tokens)
    by_prompt = values.reshape(-1, samples)
    return Drift(_estimate(by_prompt.mean(axis=1), samples), by_prompt, tokens.reshape(-1, samples))


def _sample(
    policy: LanguageModel,
    base: LanguageModel,
    rows: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]],
    chances: Float64,
    which: Sequence[int],
    values: Float64,
    tokens: Float64,
) -> None:
    """Sample a reply to each of ``rows``, as the policy and as the base reads them, by ``chances`` (B, steps).

    The terms are added to ``values`` and ``tokens`` at ``which``.
    """
    ours, theirs = policy.start(rows[0]), base.start(rows[1])
    going, stops = list(range(len(rows[0]))), torch.tensor(sorted(policy.stop_tokens), dtype=torch.long)
    for step in range(chances.shape[1]):
        p, q = ours.log_probs().double().cpu(), theirs.log_probs().double().cpu()
        # `where`, for a token of probability 0 adds nothing and 0 times infinity is not 0.
        terms = torch.where(p > -math.inf, p.exp() * (p - q), 0.0).sum(-1)
        for row, term in zip(going, terms.tolist(), strict=True):
            values[which[row]] += term
            tokens[which[row]] += 1
        cumulative = p.exp().cumsum(-1)
        drawn = torch.tensor(chances[going, step])[:, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, drawn, right=True)[:, 0].clamp(max=p.shape[1] - 1)
        alive = (~torch.isin(token, stops)).nonzero()[:, 0].tolist()
        if not alive or step + 1 == chances.shape[1]:
            return
        if len(alive) < len(going):
            going, token = [going[i] for i in alive], token[alive]
            ours, theirs = ours.select(alive), theirs.select(alive)
        ours.push(token)
        theirs.push(token)


def _estimate(means: Float64, samples: int) -> Estimate:
    """The mean over prompts with Student's interval."""
    found = mean_estimate(means)
    how = ", t interval 95 % over prompts" if found.n > 1 else "; one prompt, so no interval"
    about = f"KL of replies in nats, {samples} sample(s) a prompt{how}"
    return Estimate(found.value, max(0.0, found.low), found.high, found.n, about)
