"""Pairs as the token rows every method trains on: those of the frozen model's renderer, so that all see one text.

Knows nothing of TRL beyond the names of the columns its trainers read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coala.backbone import LanguageModel, RenderedRow
from coala.baselines.settings import BaselineMethod, TrainSettings
from coala.values import CoalaError, Pair, Turn, conversation_text

# What a label of this value is: no part of the loss (torch's cross-entropy and TRL agree on it).
IGNORED = -100


@dataclass(frozen=True)
class PairRows:
    """One pair in tokens."""

    chosen: RenderedRow
    rejected: RenderedRow


@dataclass(frozen=True)
class Demonstration:
    """A reply to imitate, for SFT alone; ``ended`` if its stop token is part of it, as where the writer ended it."""

    prompt: tuple[Turn, ...]
    text: str
    ended: bool = True


Rows = Sequence[PairRows] | Sequence[RenderedRow]


def render(
    examples: Sequence[Pair] | Sequence[Demonstration], backbone: LanguageModel, settings: TrainSettings
) -> list[PairRows] | list[RenderedRow]:
    """Examples of either kind in tokens; a demonstration ends as it says, whatever ``settings.ends_with_eos``."""
    demonstrations = [example for example in examples if isinstance(example, Demonstration)]
    pairs = [example for example in examples if isinstance(example, Pair)]
    if demonstrations and pairs:
        raise CoalaError("Found pairs and demonstrations together; expected one kind.")
    if not demonstrations:
        return render_pairs(pairs, backbone, settings)
    rows = []
    for number, one in enumerate(demonstrations):
        row = backbone.render(one.prompt, one.text, max_tokens=settings.max_length, ends_with_eos=one.ended)
        if row.start >= len(row.tokens):
            raise CoalaError(
                f"Demonstration {number} ({conversation_text(one.prompt)[:60]!r}): its reply has no tokens, and "
                "nothing can be learnt from it. Fix: leave it out."
            )
        rows.append(row)
    return rows


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


def columns(method: BaselineMethod, rows: Rows) -> list[dict[str, list[int]]]:
    """The rows under the names that TRL's trainer of ``method`` reads; labels count the reply's tokens only."""
    if method == "sft":
        return [{"input_ids": row.tokens, "labels": labels(row)} for row in imitated(rows)]
    pairs = [pair for pair in rows if isinstance(pair, PairRows)]
    if method == "reward":
        return [{"chosen_ids": pair.chosen.tokens, "rejected_ids": pair.rejected.tokens} for pair in pairs]
    return [
        {f"{name}_{kind}": values for name, row in _sides(pair) for kind, values in _whole(row).items()}
        for pair in pairs
    ]


def imitated(rows: Rows) -> list[RenderedRow]:
    """What SFT sees: demonstrations, and of pairs the chosen replies."""
    return [row.chosen if isinstance(row, PairRows) else row for row in rows]


def every_row(rows: Rows) -> list[RenderedRow]:
    """Demonstrations, and both rows of pairs."""
    found: list[RenderedRow] = []
    for row in rows:
        found += [row.chosen, row.rejected] if isinstance(row, PairRows) else [row]
    return found


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
