"""How likely texts are under the base model; knows nothing of heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from coala.backbone import LanguageModel
from coala.values import CoalaError, Prompt, prompts_of


def log_likelihood(
    prompts: Sequence[Prompt], texts: Sequence[str], backbone: LanguageModel, *, batch_size: int = 16
) -> list[tuple[float, int]]:
    """Log-probability of each text as a reply to its prompt under the base model, and how many tokens it has.

    The text is tokenised as the backbone renders it; the end of the reply is not counted, and prompt and text are cut
    to the context as features are. Perplexity is ``exp(-sum of log-probabilities / sum of tokens)``.
    """
    if len(texts) != len(prompts):
        raise CoalaError(f"{len(prompts)} prompts need as many texts; found {len(texts)}.")
    if batch_size < 1:
        raise CoalaError(f"batch_size is {batch_size}; expected at least 1.")
    rows = [backbone.render(prompt, text) for prompt, text in zip(prompts_of(prompts), texts, strict=True)]
    replies = [row.tokens[row.start :] for row in rows]
    totals = [0.0] * len(rows)
    # Texts of like length share a batch, so that few rows wait for the longest.
    order = sorted((index for index, reply in enumerate(replies) if reply), key=lambda index: len(replies[index]))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        prefix = backbone.start([rows[index].tokens[: rows[index].start] for index in batch])
        step = 0
        while True:
            tokens = torch.tensor([replies[index][step] for index in batch], device=backbone.device)
            for index, value in zip(batch, _pick(prefix.log_probs(), tokens), strict=True):
                totals[index] += value
            step += 1
            going = [row for row, index in enumerate(batch) if len(replies[index]) > step]
            if not going:
                break
            if len(going) < len(batch):
                batch, prefix, tokens = [batch[row] for row in going], prefix.select(going), tokens[going]
            prefix.push(tokens)
    return [(total, len(reply)) for total, reply in zip(totals, replies, strict=True)]


def _pick(log_probs: torch.Tensor, tokens: torch.Tensor) -> list[float]:
    return [float(value) for value in log_probs.gather(1, tokens[:, None])[:, 0].cpu()]
