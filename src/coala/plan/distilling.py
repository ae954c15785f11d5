"""What distilling a planned run would cost, into the output layer and into an adapter; DPO's best rate beside it."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from coala.costs import (
    Shape,
    adapter_bytes,
    decoding_bytes,
    decoding_flops,
    imitation_flops,
    output_fit_bytes,
    output_fit_flops,
    states_flops,
    sweep_flops,
    teacher_flops,
    usual_solves,
    vocabulary_fit_flops,
)
from coala.distil.accounts import DPO_RATES
from coala.distil.settings import AdapterSettings
from coala.plan.tokens import Counts
from coala.recipe import Recipe
from coala.settings import DistilSettings

if TYPE_CHECKING:
    from coala.backbone import Outline

NUCLEUS = 24  # tokens of a step's nucleus, padding included, as top-k 50 and top-p 0.9 leave them
FOLDS, STRENGTHS = 5, 5  # of coala.convex.output_fit, which is slow to load: parts of the prompts, strengths tried
ROWS = 60  # that the teacher's replies take of the model together
TARGETS = 7  # matrices of a layer that an adapter changes


@dataclass(frozen=True)
class DistilPlan:
    """By vehicle, ``output``, ``adapter`` and ``dpo``: FLOPs by what they are spent on, at most; bytes by part.

    With the recipe's settings, in as many rounds as there may be, replies that all run to their full length, and the
    usual steps of the solver. The teacher ``weighted`` has the pairs' own ``replies`` and writes none; an adapter
    learns of guided ones. ``dpo`` trains adapters on the run's pairs for an epoch, at each of four learning rates.
    """

    flops: dict[str, dict[str, int]]
    bytes: dict[str, dict[str, int]]
    replies: int
    reply_tokens: int


def distil_plan(recipe: Recipe, outline: Outline, counts: Counts, *, on_gpu: bool) -> DistilPlan | None:
    """The plan; None for a model that writes nothing."""
    if outline.encoder or "train" not in counts.surveys:
        return None
    shape, settings, adapter = outline.shape, recipe.distil, AdapterSettings()
    there = counts.prompts_of("train")
    prompts = (2 * there)[: max(2, min(settings.prompts, len(there)))]
    new, n = recipe.evaluation.max_new_tokens, len(prompts)
    replies, rows = [new] * n, [prompt + new for prompt in prompts]
    shown = rows[: n - n // 5]
    once = states_flops(shape, rows, replies)
    teacher = teacher_flops(shape, prompts, replies, candidates=settings.candidates)
    rates = len(adapter.rates)
    survey = counts.surveys["train"]
    chosen, rejected = (survey.lengths[survey.index[:, side]] for side in (0, 1))
    training = imitation_flops(shape, shown, epochs=adapter.epochs, rates=rates, checkpointing=on_gpu)
    held_out = (1 + rates * adapter.epochs) * once * (n - len(shown)) // n
    sweep = sweep_flops(shape, chosen, rejected, rates=DPO_RATES, checkpointing=on_gpu)
    size = 4 if (recipe.model.dtype == "float32" or (recipe.model.dtype == "auto" and not on_gpu)) else 2
    weights = outline.parameters * size
    writing = weights + decoding_bytes(shape, outline.cached, ROWS, max(prompts), new, size=size)
    output = _output(settings, shape, counts, teacher, rows, replies)
    if settings.strength == "auto" and settings.teacher == "guided":
        # A fifth of the prompts is answered at every strength.
        some = prompts[: min(settings.held_out, -(-len(prompts) // FOLDS))]
        output.flops["choice"] = STRENGTHS * sum(decoding_flops(shape, prompt, new) for prompt in some)
    fit = output_fit_bytes(output.states, NUCLEUS * output.states, shape.width, shape.vocabulary)
    adapted = adapter.adapter_rank * shape.n_layers
    adapted *= shape.body_matmul_parameters // (shape.n_layers * shape.width) + TARGETS * shape.width

    def trained(rows: int, tokens: int) -> dict[str, int]:
        step = 2 if on_gpu else 4
        return adapter_bytes(shape, outline.parameters, adapted, rows, tokens, size=step, checkpointing=on_gpu)

    return DistilPlan(
        flops={
            "output": {name: flops * settings.rounds for name, flops in output.flops.items()},
            "adapter": {"teacher": teacher, "training": training, "held_out": held_out},
            "dpo": {"training": counts.scaled(sweep)},
        },
        bytes={
            "output": {"writing replies": writing if output.flops["teacher"] else 0, "solver": sum(fit.values())},
            "adapter": {"writing replies": writing, "training": sum(trained(adapter.batch, max(rows)).values())},
            "dpo": {"training": sum(trained(2 * adapter.batch, counts.longest_row).values())},
        },
        replies=output.replies,
        reply_tokens=output.longest,
    )


@dataclass(frozen=True)
class _Output:
    """Of one round of the output layer's vehicle: FLOPs, states that are learnt from, the replies they are of."""

    flops: dict[str, int]
    states: int
    replies: int
    longest: int


def _output(
    settings: DistilSettings, shape: Shape, counts: Counts, teacher: int, rows: list[int], replies: list[int]
) -> _Output:
    """``teacher``: FLOPs of guided replies of these tokens, in ``rows`` with their prompts."""
    scale = Fraction(1)
    if settings.teacher == "weighted":
        survey = counts.surveys["train"]
        some = np.unique(survey.index)
        teacher, scale = 0, counts.scale
        lengths = np.minimum(survey.stop - survey.start, max(replies, default=0))[some]
        rows, replies = (survey.start[some] + lengths).tolist(), lengths.tolist()
    states = round(sum(replies) * scale)
    if settings.support == "vocabulary":
        steps = sum(one.steps for one in usual_solves(shape.width))
        solver = vocabulary_fit_flops(states, shape.vocabulary, shape.width, steps)
    else:
        solver = output_fit_flops(states, NUCLEUS * states, shape.width, usual_solves(shape.width))
    once = round(states_flops(shape, rows, replies) * scale)
    flops = {"teacher": teacher, "states": once, "solver": solver}
    return _Output(flops, states, round(len(replies) * scale), max(replies, default=0))
