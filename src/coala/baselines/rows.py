"""Pairs as the token rows every method trains on: those of the frozen model's renderer, so that all see one text.

Knows nothing of TRL beyond the names of the columns its trainers read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coala.backbone import LanguageModel, RenderedRow
from coala.baselines.settings import BaselineMethod, TrainSettings
from coala.values import CoalaError, Pair, conversation_text

# What a label of this value is: no part of the loss (torch's cross-entropy and TRL agree on it).
IGNORED = -100


@dataclass(frozen=True)
class PairRows:
    """One pair in tokens."""

    chosen: RenderedRow
    rejected: RenderedRow


def render_pairs(pairs: Sequence[Pair], backbone: LanguageModel, settings: TrainSettings) -> list[PairRows]:
    """Each pair's two rows of prompt and reply; :class:`CoalaError` if a reply has no token left."""
    if not pairs:
        raise CoalaError("There are no pairs; a baseline needs at least one.")
    rows = []
    for number, pair in enumerate(pairs):
        sides = []
        for name, reply in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            row = backbone.render(
                pair.prompt, reply, max_tokens=settings.max_length, ends_with_eos=settings.ends_with_eos
            )
            if row.start >= len(row.tokens):
                raise CoalaError(
                    f"Pair {number} ({conversation_text(pair.prompt)[:60]!r}): the {name} reply has no tokens, and "
                    "nothing can be learnt from it. Leave the pair out, or train with ends_with_eos."
                )
            sides.append(row)
        rows.append(PairRows(*sides))
    return rows


def columns(method: BaselineMethod, rows: Sequence[PairRows]) -> list[dict[str, list[int]]]:
    """The rows under the names that TRL's trainer of ``method`` reads; labels count the reply's tokens only."""
    if method == "sft":
        return [{"input_ids": pair.chosen.tokens, "labels": labels(pair.chosen)} for pair in rows]
    if method == "reward":
        return [{"chosen_ids": pair.chosen.tokens, "rejected_ids": pair.rejected.tokens} for pair in rows]
    return [
        {f"{name}_{kind}": values for name, row in _sides(pair) for kind, values in _whole(row).items()}
        for pair in rows
    ]


def labels(row: RenderedRow) -> list[int]:
    """The row's tokens with the prompt ignored."""
    return [IGNORED] * row.start + row.tokens[row.start :]


def _sides(pair: PairRows) -> tuple[tuple[str, RenderedRow], tuple[str, RenderedRow]]:
    return ("chosen", pair.chosen), ("rejected", pair.rejected)


def _whole(row: RenderedRow) -> dict[str, list[int]]:
    return {"input_ids": row.tokens, "attention_mask": [1] * len(row.tokens), "labels": labels(row)}


def collate_pairs(examples: Sequence[dict[str, Any]], pad: int) -> dict[str, Any]:
    """A batch for TRL's DPO: chosen rows, then rejected ones, padded on the right (2 B, T).

    TRL's own collator puts one prompt before both replies; a renderer that cuts long rows may keep more of the prompt
    before the shorter reply.
    """
    import torch

    rows = [(e[f"{side}_input_ids"], e[f"{side}_labels"]) for side in ("chosen", "rejected") for e in examples]
    width = max(len(tokens) for tokens, _ in rows)
    return {
        "input_ids": torch.tensor([[*tokens, *[pad] * (width - len(tokens))] for tokens, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t, _ in rows]),
        "completion_mask": torch.tensor(
            [[int(label != IGNORED) for label in given] + [0] * (width - len(given)) for _, given in rows]
        ),
    }
