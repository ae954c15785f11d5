"""What distilling a planned run would cost, into the output layer and into an adapter; DPO's best rate beside it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING

from coala.costs import (
    adapter_bytes,
    decoding_bytes,
    imitation_flops,
    output_fit_bytes,
    output_fit_flops,
    states_flops,
    sweep_flops,
    teacher_flops,
    usual_solves,
)
from coala.distil.accounts import DPO_RATES
from coala.distil.settings import AdapterSettings, DistilSettings
from coala.plan.tokens import Counts
from coala.recipe import Recipe

if TYPE_CHECKING:
    from coala.backbone import Outline

NUCLEUS = 24  # tokens of a step's nucleus, padding included, as top-k 50 and top-p 0.9 leave them
ROWS = 60  # that the teacher's replies take of the model together
TARGETS = 7  # matrices of a layer that an adapter changes


@dataclass(frozen=True)
class DistilPlan:
    """By vehicle, ``output``, ``adapter`` and ``dpo``: FLOPs by what they are spent on, at most; bytes by part.

    With the default settings of ``coala distil``, replies that all run to their full length, and the usual steps of the
    solver. ``dpo`` trains adapters on the run's pairs for an epoch, at each of four learning rates.
    """

    flops: dict[str, dict[str, int]]
    bytes: dict[str, dict[str, int]]
    replies: int
    reply_tokens: int


def distil_plan(recipe: Recipe, outline: Outline, counts: Counts, *, on_gpu: bool) -> DistilPlan | None:
    """The plan; None for a model that writes nothing."""
    if outline.encoder or "train" not in counts.surveys:
        return None
    shape, settings, adapter = outline.shape, DistilSettings(), AdapterSettings()
    prompts = _prompts(recipe, counts, settings.prompts)
    new, n = recipe.evaluation.max_new_tokens, len(prompts)
    replies, rows = [new] * n, [prompt + new for prompt in prompts]
    shown = rows[: n - n // 5]
    states = sum(replies)
    once = states_flops(shape, rows, replies)
    teacher = teacher_flops(shape, prompts, replies, candidates=settings.candidates)
    rates = len(adapter.rates)
    survey = counts.surveys["train"]
    chosen, rejected = (survey.lengths[survey.index[:, side]] for side in (0, 1))
    training = imitation_flops(shape, shown, epochs=adapter.epochs, rates=rates, checkpointing=on_gpu)
    held_out = (1 + rates * adapter.epochs) * once * (n - len(shown)) // n
    sweep = sweep_flops(shape, chosen, rejected, rates=DPO_RATES, checkpointing=on_gpu)
    solver = output_fit_flops(states, NUCLEUS * states, shape.width, usual_solves(shape.width))
    size = 4 if (recipe.model.dtype == "float32" or (recipe.model.dtype == "auto" and not on_gpu)) else 2
    weights = outline.parameters * size
    writing = weights + decoding_bytes(shape, outline.cached, ROWS, max(prompts), new, size=size)
    fit = output_fit_bytes(states, NUCLEUS * states, shape.width, shape.vocabulary)
    adapted = adapter.adapter_rank * shape.n_layers
    adapted *= shape.body_matmul_parameters // (shape.n_layers * shape.width) + TARGETS * shape.width

    def trained(rows: int, tokens: int) -> dict[str, int]:
        step = 2 if on_gpu else 4
        return adapter_bytes(shape, outline.parameters, adapted, rows, tokens, size=step, checkpointing=on_gpu)

    return DistilPlan(
        flops={
            "output": {"teacher": teacher, "states": once, "solver": solver},
            "adapter": {"teacher": teacher, "training": training, "held_out": held_out},
            "dpo": {"training": counts.scaled(sweep)},
        },
        bytes={
            "output": {"writing replies": writing, "solver": sum(fit.values())},
            "adapter": {"writing replies": writing, "training": sum(trained(adapter.batch, max(rows)).values())},
            "dpo": {"training": sum(trained(2 * adapter.batch, counts.longest_row).values())},
        },
        replies=n,
        reply_tokens=new,
    )


def _prompts(recipe: Recipe, counts: Counts, most: int) -> list[int]:
    """Tokens of the training prompts that get a reply of the teacher."""
    survey = counts.surveys["train"]
    first = survey.index[:, 0].tolist()
    distinct = {tuple(survey.tokens[row][: survey.start[row]]): int(survey.start[row]) for row in first}
    # Stand-ins are all alike: each stands for a prompt of its own.
    n = counts.scaled(len(distinct)) if recipe.pairs else counts.pairs("train")
    return list(islice(cycle(distinct.values()), max(2, min(most, n))))
