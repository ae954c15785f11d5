"""Scores of replies by a head on its model, in batches; and the same as a reward function that TRL's trainers call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coala.values import CoalaError, ConvexHead, Float32, Prompt, Turn, prompts_of, user

if TYPE_CHECKING:
    from coala.backbone import LanguageModel

# Tokens of one forward pass, padding counted.
BATCH_TOKENS = 4096
_Rows = list[tuple[tuple[int, ...], int, int]]


def score_replies(
    prompts: Sequence[Prompt],
    replies: Sequence[str],
    head: ConvexHead,
    backbone: LanguageModel,
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> Float32:
    """Scores (n,) of ``replies`` to ``prompts``, one each; what occurs more than once is read once.

    Raises ``SpecMismatch`` unless the head was fitted on features of ``backbone``.
    """
    spec = head.spec
    backbone.require(spec)
    conversations = prompts_of(prompts)
    if len(prompts) != len(replies):
        raise CoalaError(f"{len(prompts)} prompts and {len(replies)} replies; expected one reply to each prompt.")
    if not replies:
        return np.zeros(0, dtype=np.float32)

    def row(prompt: Sequence[Turn], reply: str | None) -> tuple[tuple[int, ...], int, int]:
        made = backbone.render(prompt, reply, max_tokens=spec.max_tokens, ends_with_eos=spec.ends_with_eos)
        # A prompt by itself is pooled from its first token on.
        return tuple(made.tokens), 0 if reply is None else made.start, made.stop

    rows = [row(prompt, reply) for prompt, reply in zip(conversations, replies, strict=True)]
    features = _features(rows, head, backbone, batch_tokens)
    gates = None
    if head.needs_prompt:
        gates = _features([row(prompt, None) for prompt in conversations], head, backbone, batch_tokens)
    return head.score(features, gates)


def _features(rows: _Rows, head: ConvexHead, backbone: LanguageModel, batch_tokens: int) -> Float32:
    """Pooled states (n, d) of rows (tokens, start, stop)."""
    import torch

    from coala.backbone import POOLINGS

    distinct = sorted(set(rows), key=lambda row: -len(row[0]))
    place = {row: i for i, row in enumerate(distinct)}
    pooling = POOLINGS[head.spec.pooling]
    found: list[Float32] = []
    first = 0
    while first < len(distinct):
        # Longest first: the first row of a batch is its width.
        batch = distinct[first : first + max(1, batch_tokens // len(distinct[first][0]))]
        hidden = backbone.hidden([row[0] for row in batch], head.spec.layer, scored=pooling.scored)
        start, stop = (torch.tensor([row[i] for row in batch], device=backbone.device) for i in (1, 2))
        found.append(pooling.pool(hidden, start, stop).cpu().numpy())
        first += len(batch)
    return np.asarray(np.concatenate(found)[[place[row] for row in rows]], dtype=np.float32)


class RewardFunction:
    """A head as TRL's ``reward_funcs`` take it: ``f(prompts=..., completions=..., **columns)`` gives one reward each.

    Prompts are texts (one user turn, rendered by the model's template) or lists of messages, completions texts or lists
    of messages of which the last is the reply. With ``in_log_odds`` rewards are score over temperature, differences of
    which are log-odds of preference; else the head's scores.
    """

    def __init__(self, head: ConvexHead, backbone: LanguageModel, *, in_log_odds: bool = False) -> None:
        backbone.require(head.spec)
        self.head, self.backbone, self.in_log_odds = head, backbone, in_log_odds
        self.__name__ = "coala_reward"  # trainers log the reward under it

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Rewards of ``completions``; other columns of the data set are ignored."""
        if len(prompts) != len(completions):
            raise CoalaError(f"{len(prompts)} prompts and {len(completions)} completions; expected one each.")
        asked, replies = [], []
        for prompt, completion in zip(prompts, completions, strict=True):
            turns = user(prompt) if isinstance(prompt, str) else _turns(prompt)
            if isinstance(completion, str):
                reply = completion
            else:
                *before, last = _turns(completion)
                if last.role != "assistant":
                    raise CoalaError(f"A completion ends with a turn of {last.role!r}; expected the assistant's reply.")
                turns, reply = (*turns, *before), last.text
            asked.append(turns)
            replies.append(reply)
        scores = score_replies(asked, replies, self.head, self.backbone).astype(np.float64)
        return [float(score) for score in scores / (self.head.temperature if self.in_log_odds else 1.0)]


def as_reward_func(
    run_or_head: Path | str | ConvexHead, backbone: LanguageModel | None = None, *, in_log_odds: bool = False
) -> RewardFunction:
    """The reward function of a run folder, whose model is loaded, or of a head with its ``backbone``.

    For ``GRPOTrainer(reward_funcs=as_reward_func("runs/mine"), ...)``, ``RLOOTrainer`` and their kin. Raises
    ``SpecMismatch`` if the head was fitted on another model.
    """
    if not isinstance(run_or_head, ConvexHead):
        from coala.alignment import load_parts

        backbone, head, _ = load_parts(run_or_head)
        return RewardFunction(head, backbone, in_log_odds=in_log_odds)
    if backbone is None:
        raise CoalaError("A head alone has no model to read replies with: as_reward_func(head, backbone).")
    return RewardFunction(run_or_head, backbone, in_log_odds=in_log_odds)


def _turns(messages: Any) -> tuple[Turn, ...]:
    """Messages with ``role`` and ``content``, a text or a list of text parts."""
    if not isinstance(messages, list | tuple) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise CoalaError(f"Found {str(messages)[:60]!r}; expected a text or a list of messages with role and content.")
    return tuple(Turn(message.get("role"), _text(message)) for message in messages)


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        raise CoalaError(f"A message holds {str(content)[:60]!r}; expected a text or parts of text alone.")
    return "".join(part["text"] for part in parts)
