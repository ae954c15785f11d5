"""What distilled policies, LM-Steer, the best constant and SFT learn from: replies of a teacher, and their states.

CELL/replies.jsonl   the teacher's replies, in the order of the training pairs' prompts
CELL/states/         the final states of their steps, as `coala distil` keeps them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coala.compare.cell_context import CellContext, Costs
from coala.compare.matrix import teacher_guidance, teacher_key, teacher_method
from coala.compare.reply_plan import reply_flops
from coala.compare.study import StudyMethod
from coala.policies import DistilStates
from coala.store import load_generations, load_head, load_json
from coala.values import CoalaError, Pair, Turn, conversation_text, one_per_prompt

if TYPE_CHECKING:
    from coala.decoding import Guidance
    from coala.distil.stage import Taught, Teaching
    from coala.distil.states import Lesson
    from coala.values import ConvexHead


def teacher_cell(context: CellContext, costs: Costs) -> dict[str, Any]:
    """Replies that the head guides to training prompts, or the pairs' own, and the states of their steps."""
    from coala.decoding import Guidance
    from coala.distil.matrix import output_matrix
    from coala.distil.shift import shift_states
    from coala.distil.states import teacher_states

    taught = teacher_method(context.study, context.cell)
    backbone, settings = context.backbone, context.evaluation
    output, folder = output_matrix(backbone), context.folder / "states"
    temperature = settings.temperature or 1.0
    guidance = Guidance.unguided() if taught.of is None else Guidance(**asdict(teacher_guidance(context.study, taught)))
    told: dict[str, Any] = {
        "temperature": temperature,
        "on_reply": lambda done, total: context.show("states", done, total, "replies"),
    }
    if taught.lessons == "shift":
        prompts = training_prompts(context)[: taught.distil_settings.prompts]
        head = _head(context, taught)
        with costs.of("replies"):
            states = shift_states(
                backbone,
                head,
                prompts,
                folder,
                guidance,
                max_new_tokens=settings.max_new_tokens,
                seed=context.cell.seed or 0,
                **told,
            )
        lengths = np.bincount(states.group, minlength=len(prompts)).tolist()
        written = _flops_of_replies(context, prompts, lengths, guidance)
        read = _flops_of_states(context, prompts, lengths)
    else:
        lessons, written = _lessons(context, costs, taught, guidance)
        with costs.of("states"):
            states = teacher_states(backbone, output, lessons, folder, guidance, **told)
        rows = [backbone.render(one.prompt, one.text, ends_with_eos=one.ended) for one in lessons]
        each = _flops_of_states(context, [one.prompt for one in lessons], [row.stop - row.start for row in rows])
        groups = [one.group for one in lessons]
        read = [sum(each[i] for i in np.flatnonzero(np.equal(groups, number))) for number in range(max(groups) + 1)]
    return {
        "prompts": len(np.unique(states.group)),
        "states": len(states),
        "outside_nucleus": int((~states.in_nucleus).sum()),
        "guidance": str(guidance) if taught.of else "none",
        # By prompt, so that a method that learns from fewer has its own share.
        "flops": {"replies": written, "states": read},
    }


def training_prompts(context: CellContext) -> list[tuple[Turn, ...]]:
    """The prompts of the training pairs, each once, in their order."""
    return [pair.prompt for pair in one_per_prompt(context.part("train"))]


def _lessons(
    context: CellContext, costs: Costs, taught: StudyMethod, guidance: Guidance
) -> tuple[list[Lesson], list[int]]:
    """Replies to learn from, and the FLOPs of writing them by prompt: none of the pairs' own."""
    from coala.distil.stage import teacher_replies
    from coala.distil.states import Lesson, guided_lessons, weighted_lessons

    pairs, longest = context.part("train"), context.evaluation.max_new_tokens
    if taught.lessons == "chosen":
        numbers = {conversation_text(prompt): number for number, prompt in enumerate(training_prompts(context))}
        distinct = list({(conversation_text(pair.prompt), pair.chosen): pair for pair in pairs}.values())
        ended = context.model.ends_with_eos
        own = [
            Lesson(pair.prompt, pair.chosen, numbers[conversation_text(pair.prompt)], ended=ended) for pair in distinct
        ]
        return own, []
    if taught.lessons == "weighted":
        from coala.compare.every_layer import loaded

        of = next(method for method in context.study.methods if method.name == taught.of)
        features, beta = loaded(context, "train", method=of), taught.distil_settings.beta
        return weighted_lessons(context.backbone, pairs, features, _head(context, taught), beta, longest), []
    prompts = training_prompts(context)[: taught.distil_settings.prompts]
    work = taught_by(context, taught)
    work.check_evidence()
    with costs.of("replies"):
        replies = teacher_replies(work, kept=context.folder / "replies.jsonl").replies
    flops = _flops_of_replies(context, prompts, [reply.n_tokens for reply in replies], guidance)
    return guided_lessons(context.backbone, prompts, replies, longest), flops


def _head(context: CellContext, taught: StudyMethod) -> ConvexHead:
    name = f"{'.'.join(context.cell.place)}.{taught.of}.s{context.cell.seed}"
    return load_head(context.out / "cells" / name / "head")


def _flops_of_replies(
    context: CellContext, prompts: Sequence[tuple[Turn, ...]], lengths: Sequence[int], guidance: Guidance
) -> list[int]:
    shape = context.backbone.shape
    rows = [len(context.backbone.render(prompt).tokens) for prompt in prompts]
    return [reply_flops(shape, before, new, guidance) for before, new in zip(rows, lengths, strict=True)]


def _flops_of_states(context: CellContext, prompts: Sequence[tuple[Turn, ...]], lengths: Sequence[int]) -> list[int]:
    """The forward pass over each reply of ``lengths`` tokens and its prompt, with logits at the reply's steps."""
    from coala.costs import states_flops

    rows = [len(context.backbone.render(prompt).tokens) for prompt in prompts]
    return [states_flops(context.backbone.shape, [n + k], [k]) if k else 0 for n, k in zip(rows, lengths, strict=True)]


# --- as methods read them --------------------------------------------------------------------------------------------


def teacher_folder(context: CellContext) -> Path:
    """The cell of what this cell's method learns from."""
    method, place = context.method, ".".join(context.cell.place)
    seed = f".s{context.cell.seed}" if method.of else ""
    return context.out / "cells" / f"{place}.{teacher_key(context.study, method, context.cell.place)}{seed}"


def states_of(context: CellContext) -> DistilStates:
    """The states that this cell's method learns from: of as many prompts as it wants."""
    from coala.distil.states import open_states

    folder = teacher_folder(context) / "states"
    found = open_states(folder, load_json(folder / "states.json")["plan"])
    assert found is not None
    if context.method.lessons in ("chosen", "weighted"):
        return found
    # Replies lie in the order of their prompts.
    n = int(np.searchsorted(np.asarray(found.group), context.method.distil_settings.prompts))
    return replace(found, **{field.name: getattr(found, field.name)[:n] for field in fields(found)})


def taught_by(context: CellContext, method: StudyMethod | None = None) -> Teaching:
    """Who teaches ``method``, by default the cell's, which prompts, and how it samples.

    Steps of it are written to CELL/rounds.
    """
    from coala.decoding import Guidance
    from coala.distil.stage import Teaching

    method, evaluation = method or context.method, context.evaluation
    settings = replace(method.distil_settings, seed=context.cell.seed or 0)
    return Teaching(
        settings=settings,
        backbone=context.backbone,
        head=_head(context, method),
        guidance=Guidance(**asdict(teacher_guidance(context.study, method))),
        sampled_at=evaluation.temperature,
        longest=evaluation.max_new_tokens,
        prompts=training_prompts(context)[: settings.prompts],
        folder=context.folder / "rounds",
        on_progress=context.show,
    )


def taught_replies(context: CellContext) -> Taught:
    """The teacher's replies to the prompts that this cell's method learns from; none where it wrote none."""
    from coala.distil.stage import Taught

    if context.method.lessons != "guided":
        return Taught()
    replies = load_generations(teacher_folder(context) / "replies.jsonl")[: context.method.distil_settings.prompts]
    return Taught(training_prompts(context)[: len(replies)], replies)


def choosing_prompts(context: CellContext) -> tuple[list[tuple[Turn, ...]], dict[str, int]]:
    """Prompts that choose the round, and how many of them are of which part: never one whose replies are judged.

    First test prompts that are not answered, which nothing was fitted to; then training prompts that are not taught,
    to which the head alone was.
    """
    from coala.compare.writing import prompts_of

    settings = context.method.distil_settings
    judged = {conversation_text(pair.prompt) for pair in prompts_of(context)}
    training = training_prompts(context)
    seen = judged | {conversation_text(prompt) for prompt in training}
    test = [one.prompt for one in one_per_prompt(context.part("test")) if conversation_text(one.prompt) not in seen]
    untaught = [one for one in training[settings.prompts :] if conversation_text(one) not in judged]
    found = [*test, *untaught][: settings.held_out]
    if len(found) < 2:
        raise CoalaError(
            f"{context.cell.id}: found {len(found)} prompts to choose a round on, neither judged nor taught; expected "
            "at least 2. Fix: fewer distil.prompts or evaluation.prompts."
        )
    return found, {"test": min(len(test), len(found)), "train": max(0, len(found) - len(test))}


def guided_pairs(context: CellContext, part: str) -> list[Pair]:
    """Guided replies as chosen ones, to those of their prompts that are in a part of the training pairs.

    Only chosen replies are trained on: the rejected side is the prompt's own in the pairs.
    """
    replies = load_generations(teacher_folder(context) / "replies.jsonl")[: context.method.distil_settings.prompts]
    inside = {conversation_text(pair.prompt): pair for pair in reversed(context.part(part))}
    prompts = training_prompts(context)[: len(replies)]
    found = [
        replace(inside[conversation_text(prompt)], chosen=reply.text)
        for prompt, reply in zip(prompts, replies, strict=True)
        if reply.text and conversation_text(prompt) in inside
    ]
    if not found:
        raise CoalaError(f"{context.cell.id}: no guided reply is to a prompt of the part {part}. Fix: more prompts.")
    return found


def teaching(context: CellContext) -> dict[str, Any]:
    """What the replies and states that this cell's method learns from took: FLOPs of its prompts, seconds of all."""
    name = teacher_folder(context).name
    found, spent = context.result(name), context.costs(name)
    limited = context.method.lessons in ("guided", "shift")
    n = context.method.distil_settings.prompts if limited else None
    flops = {part: sum(values[:n]) for part, values in found["flops"].items()}
    seconds = sum(part["measured"]["seconds"] for part in spent.values())
    return {
        **flops,
        "prompts": min(n or found["prompts"], found["prompts"]),
        "measured": {"seconds": seconds, "joules": None},
    }
