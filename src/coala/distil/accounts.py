"""What distillation into the output layer has taken by formula, and what DPO's best rate would on the same pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from coala.costs import (
    Solve,
    decoding_flops,
    output_fit_flops,
    states_flops,
    sweep_flops,
    teacher_flops,
    vocabulary_fit_flops,
)
from coala.store import RunFolder, load_pairs
from coala.values import Turn

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.convex.output_fit import OutputFit
    from coala.decoding import Guidance
    from coala.policies import DistilStates
    from coala.values import ConvexHead

DPO_RATES = 4  # learning rates of a sweep, as few as a comparison may try (docs/compare.md)


def reply_states_flops(
    backbone: LanguageModel,
    head: ConvexHead,
    guidance: Guidance,
    prompts: Sequence[tuple[Turn, ...]],
    states: DistilStates,
) -> dict[str, int]:
    """FLOPs of the replies that ``guidance`` wrote to ``prompts``, as long as their ``states`` are, and of these."""
    shape = backbone.shape
    groups, steps = np.unique(states.group, return_counts=True)
    lengths = [len(backbone.render(prompts[group]).tokens) for group in groups]
    if guidance.mode == "block":
        teacher = teacher_flops(shape, lengths, steps, candidates=guidance.candidates)
    else:
        looked, n = guidance.looked_at, head.n_neurons
        teacher = sum(
            decoding_flops(shape, prompt, int(reply), candidates=looked, every=guidance.interval, n_neurons=n)
            for prompt, reply in zip(lengths, steps, strict=True)
        )
    rows = [a + int(b) - 1 for a, b in zip(lengths, steps, strict=True)]
    return {"teacher": teacher, "states": states_flops(shape, rows, steps)}


def pair_states_flops(run: RunFolder, backbone: LanguageModel, states: DistilStates) -> int:
    """FLOPs of the states of the training pairs' own replies, which nobody wrote for it."""
    chosen, rejected = pair_lengths(run, backbone)
    _, steps = np.unique(states.group, return_counts=True)
    return states_flops(backbone.shape, [*chosen, *rejected], steps)


def fit_flops(found: OutputFit, width: int, vocabulary: int) -> tuple[int, int]:
    """FLOPs of the products of a fit by the steps that it took: of all that was tried before, and of the last fit."""
    facts = found.certificate.facts
    tried = [row for row in found.path if "steps" in row]
    if facts["support"] == "vocabulary":
        n = facts["n_counted"]
        return (
            vocabulary_fit_flops(n, vocabulary, width, sum(row["steps"] for row in tried)),
            vocabulary_fit_flops(n, vocabulary, width, facts["steps"]),
        )
    before = [Solve(width, 0)]  # the unit of the ridge
    before += [Solve(row.get("inputs", width), row["steps"], held_out=1) for row in tried]
    cut = "steps_within_rank" in facts
    again = int(cut or found.strength != 1)  # the objective of the change as it is taken
    strengths = sum("strength" in row for row in found.path)
    last = [Solve(width, facts["steps"], certificates=facts["certificates"] + again, held_out=strengths)]
    if cut:
        last += [Solve(facts["inputs_within_rank"], facts["steps_within_rank"], facts["certificates_within_rank"])]
    search, fit = (output_fit_flops(facts["n_rows"], facts["n_support"], width, some) for some in (before, last))
    return search, fit


def dpo_flops(run: RunFolder, backbone: LanguageModel) -> int:
    """DPO of adapters on the run's training pairs, one epoch at each of :data:`DPO_RATES` learning rates."""
    return sweep_flops(backbone.shape, *pair_lengths(run, backbone), rates=DPO_RATES)


def pair_lengths(run: RunFolder, backbone: LanguageModel) -> tuple[list[int], list[int]]:
    """Tokens of prompt and reply of the training pairs, chosen and rejected."""
    pairs = load_pairs(run.path / "pairs-train.jsonl")

    def length(prompt: Sequence[Turn], reply: str) -> int:
        return len(backbone.render(prompt, reply, ends_with_eos=True).tokens)

    return [length(pair.prompt, pair.chosen) for pair in pairs], [length(pair.prompt, pair.rejected) for pair in pairs]
