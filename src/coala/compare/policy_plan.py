"""FLOPs of teachers and of policies in the output layer before any of them is made; by formula, from counted tokens.

Of what is not known before, a guess that errs upwards: every guided reply is as long as it may be, every nucleus has
``NUCLEUS`` tokens, and a solve takes ``STEPS`` steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from coala.compare.matrix import Cell, teacher_guidance, teacher_method
from coala.compare.reply_plan import likelihoods, reply_flops, writing
from coala.compare.study import Study, StudyMethod
from coala.costs import (
    Solve,
    adam_fit_flops,
    body_flops,
    full_flops,
    head_flops,
    output_fit_flops,
    vocabulary_fit_flops,
)

if TYPE_CHECKING:
    from coala.costs import Shape
    from coala.plan.tokens import Counts

STEPS = 12


def teacher(study: Study, cell: Cell, shape: Shape, counts: Counts) -> dict[str, Any]:
    """Guided replies to training prompts, or none, and the states of what is learned from."""
    method = teacher_method(study, cell)
    if method.lessons in ("chosen", "weighted"):
        survey = counts.surveys["train"]
        sides = (0,) if method.lessons == "chosen" else (0, 1)
        flops = counts.scaled(sum(full_flops(shape, survey.lengths[survey.index[:, side]]) for side in sides))
        return _found(flops, counts)
    prompts = _prompts(method, counts)
    new, guidance = study.evaluation.max_new_tokens, teacher_guidance(study, method)
    replies = sum(reply_flops(shape, tokens, new, guidance) for tokens in prompts)
    return _found(replies + full_flops(shape, [tokens + new for tokens in prompts]), counts)


def policy(study: Study, cell: Cell, shape: Shape, counts: Counts) -> dict[str, Any]:
    """A fit to the states, then replies at every strength, their divergence and the likelihoods of the test pairs."""
    method = next(m for m in study.methods if m.name == cell.method)
    written = writing(study, shape, counts.prompts) + len(method.strengths) * writing(
        study.model_copy(update={"evaluation": study.evaluation.model_copy(update={"questions": 0})}),
        shape,
        counts.prompts,
    )
    new = study.evaluation.max_new_tokens
    diverging = (1 + len(method.strengths)) * full_flops(shape, [tokens + new for tokens in counts.prompts])
    fits = _fit(study, method, shape, counts) * method.distil_settings.rounds
    taught = _choices(study, method, shape, counts) + _rounds(study, method, shape, counts)
    return _found(fits + taught + written + diverging + likelihoods(shape, counts, "eval"), counts)


def judging(study: Study, cell: Cell, shape: Shape, counts: Counts) -> int:
    """The features of replies and of the start's by a head that judges."""
    if study.judging_head(cell.dataset) is None or cell.kind in ("base", "features", "teacher", "count"):
        return 0
    new = study.evaluation.max_new_tokens
    method = next(m for m in study.methods if m.name == cell.method)
    times = 2 + (len(method.strengths) if method.changed else 0)
    return times * body_flops(shape, [tokens + new for tokens in counts.prompts])


def diverging(study: Study, shape: Shape, counts: Counts) -> int:
    """The divergence of a trained or prompted model over the replies that are judged: both models read them."""
    if study.evaluation.kl != "replies":
        return 0
    new = study.evaluation.max_new_tokens
    return 2 * full_flops(shape, [tokens + new for tokens in counts.prompts])


def lesson_lengths(study: Study, method: StudyMethod, counts: Counts) -> list[int]:
    """Tokens of the rows, prompt and reply, of SFT on guided replies."""
    return [tokens + study.evaluation.max_new_tokens for tokens in _prompts(method, counts)]


def _prompts(method: StudyMethod, counts: Counts) -> list[int]:
    """Tokens of the training prompts that are answered."""
    return counts.prompts_of("train")[: method.distil_settings.prompts]


def _choices(study: Study, method: StudyMethod, shape: Shape, counts: Counts) -> int:
    """Replies of a policy to the prompts held out of its fit, at every strength that may be tried, in every round."""
    from coala.convex.output_fit import FOLDS, STRENGTHS

    settings = method.distil_settings
    if method.kind != "distilled" or method.lessons != "guided" or settings.strength != "auto":
        return 0
    prompts, new = _prompts(method, counts), study.evaluation.max_new_tokens
    some = prompts[: min(settings.held_out, -(-len(prompts) // FOLDS))]
    return settings.rounds * len(STRENGTHS) * sum(reply_flops(shape, tokens, new, None) for tokens in some)


def _rounds(study: Study, method: StudyMethod, shape: Shape, counts: Counts) -> int:
    """Beside the fits of all rounds: the teacher's replies from the second on, and what each round's gain takes."""
    settings, new = method.distil_settings, study.evaluation.max_new_tokens
    if settings.rounds == 1:
        return 0
    prompts, guidance = _prompts(method, counts), teacher_guidance(study, method)
    again = sum(reply_flops(shape, tokens, new, guidance) for tokens in prompts)
    again += full_flops(shape, [tokens + new for tokens in prompts])
    # Test prompts that are not answered, then training prompts that are not taught.
    choosing = counts.prompts_of("eval")[len(counts.prompts) :] + counts.prompts_of("train")[len(prompts) :]
    own = sum(reply_flops(shape, tokens, new, None) for tokens in choosing[: settings.held_out])
    return (settings.rounds - 1) * again + (settings.rounds + 1) * own


def _states(study: Study, method: StudyMethod, counts: Counts) -> int:
    survey = counts.surveys["train"]
    sides: Sequence[int] = {"chosen": (0,), "weighted": (0, 1)}.get(str(method.lessons), ())
    if not sides:
        return len(_prompts(method, counts)) * study.evaluation.max_new_tokens
    rows = [survey.index[:, side] for side in sides]
    return counts.scaled(sum(int((survey.stop[some] - survey.start[some]).sum()) for some in rows))


def _fit(study: Study, method: StudyMethod, shape: Shape, counts: Counts) -> int:
    from coala.compare.output_policies import MULTIPLES, TUNED_ON
    from coala.convex.output_fit import RANKS, RIDGES
    from coala.distil.states import N_TOKENS
    from coala.plan.distilling import NUCLEUS

    new = study.evaluation.max_new_tokens
    if method.kind == "mean-difference":
        some = counts.prompts[:TUNED_ON]
        replies = sum(reply_flops(shape, tokens, new, None) + full_flops(shape, [tokens + new]) for tokens in some)
        return (1 + len(MULTIPLES)) * replies
    n, whole, width = _states(study, method, counts), method.distil_settings.support == "vocabulary", shape.width
    if method.kind == "lm-steer":
        looks = head_flops(shape, [n]) if whole else 0
        tokens = n * (shape.vocabulary if whole else N_TOKENS)
        return len(method.rates) * (adam_fit_flops(n, tokens, width, method.epochs) + method.epochs * looks)
    ridges = 1 if method.distil_settings.ridge is not None else len(RIDGES)
    if whole:
        return vocabulary_fit_flops(n, shape.vocabulary, width, STEPS * (ridges + 1))
    if method.kind == "bias":
        return output_fit_flops(n, n * NUCLEUS, width, [Solve(1, STEPS, certificates=1)] * (ridges + 1))
    ranks = [rank for rank in RANKS if rank < width] if method.distil_settings.rank == "auto" else []
    solves = [Solve(width, STEPS, held_out=1)] * (ridges + 1) + [Solve(min(RANKS[-1], width), STEPS, 1)] * len(ranks)
    return output_fit_flops(n, n * NUCLEUS, width, solves)


def _found(flops: int, counts: Counts) -> dict[str, Any]:
    return {"flops": int(flops), "parts": {}, "pairs": counts.pairs("train"), "how": "weights alone"}
