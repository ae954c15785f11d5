"""What the methods that write are measured by: replies to held-out prompts, judged; and what their likelihoods prefer.

CELL/generations.jsonl  the replies
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from coala.compare.cell_context import CellContext, Costs
from coala.compare.study import Study
from coala.store import load_generations, save_generations
from coala.values import Generation, Pair, Turn, conversation_text, prompt_id, user

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.baselines import PairLikelihoods
    from coala.decoding import Guidance
    from coala.values import ConvexHead

# From a conversation to the one that a writer is given in its place.
Asked = Callable[[tuple[Turn, ...]], tuple[Turn, ...]]


def as_it_is(prompt: tuple[Turn, ...]) -> tuple[Turn, ...]:
    return prompt


def answered(study: Study, dataset: str, test: Sequence[Pair]) -> list[Pair]:
    """The held-out pairs whose prompts are answered, each prompt once."""
    distinct = list({conversation_text(pair.prompt): pair for pair in test}.values())
    own = study.datasets[dataset].prompts
    return distinct[: study.evaluation.prompts if own is None else own]


def prompts_of(context: CellContext) -> list[Pair]:
    return answered(context.study, context.cell.dataset, context.part("test"))


def policy_of(policy: PairLikelihoods, base: PairLikelihoods, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Policy accuracy of a model whose likelihoods are known, as the start asked otherwise or trained."""
    from coala.statistics.policy import accuracy_of_log_ratios

    chosen, rejected = policy.chosen - base.chosen, policy.rejected - base.rejected
    found = accuracy_of_log_ratios(chosen, rejected, [pair.group for pair in pairs])
    return {"policy_accuracy": asdict(found.accuracy)}


def drift_of(context: CellContext, costs: Costs, policy: LanguageModel, asked: Asked = as_it_is) -> dict[str, Any]:
    """KL of whole replies to the start, of a trained policy or of the start asked otherwise; empty without prompts."""
    from coala.baselines import drift

    settings = context.study.evaluation
    prompts = [pair.prompt for pair in prompts_of(context)[: settings.kl_prompts]]
    if not prompts:
        return {}
    with costs.of("drift"):
        found = drift(
            policy,
            context.backbone,
            [asked(prompt) for prompt in prompts],
            base_prompts=prompts,
            max_new_tokens=settings.max_new_tokens,
            seed=context.cell.seed or 0,
        )
    return {"kl": asdict(found.kl)}


def guided_policy(context: CellContext, costs: Costs, head: ConvexHead, guidance: Guidance) -> dict[str, Any]:
    """Policy accuracy of guided decoding, or why it has none."""
    from coala.alignment.policy import Guided, policy_accuracy

    settings = context.study.evaluation
    if not settings.policy_pairs or not prompts_of(context):
        return {}
    policy = Guided(head, guidance, settings.temperature, settings.max_new_tokens)
    if policy.unknown:
        return {"policy_unknown": policy.unknown}
    with costs.of("policy"):
        found = policy_accuracy(
            context.part("test"),
            context.backbone,
            policy,
            limit=settings.policy_pairs,
            on_texts=lambda done, total: context.show("likelihoods", done, total),
        )
    return {"policy_accuracy": asdict(found.accuracy), "policy_note": found.note}


def replies_of(
    context: CellContext,
    costs: Costs,
    writer: LanguageModel | None = None,
    *,
    head: ConvexHead | None = None,
    guidance: Guidance | None = None,
    asked: Asked = as_it_is,
) -> dict[str, Any]:
    """Answer the held-out prompts, save the replies, and judge them against those of the unguided start.

    ``writer`` is the start itself unless given, and ``asked`` what it is given for a prompt. ``perplexity`` is that of
    the replies under the start, to the prompts as they are.
    """
    from coala.baselines import TrainSettings, log_likelihoods
    from coala.decoding import Guidance, generate
    from coala.statistics.scores import perplexity

    settings, base = context.study.evaluation, context.backbone
    pairs = prompts_of(context)
    if not pairs:
        return {}
    seed = context.study.seeds[0] if context.cell.seed is None else context.cell.seed
    most, n_pieces = len(pairs) * settings.max_new_tokens, count(1)
    context.show("replies", 0, most)
    with costs.of("replies") as about:
        replies = generate(
            [asked(pair.prompt) for pair in pairs],
            writer or base,
            head,
            guidance or Guidance(mode="none"),
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=seed,
            prompt_ids=[prompt_id(pair.prompt) for pair in pairs],
            batch_size=16,
            on_token=lambda index, piece: context.show("replies", next(n_pieces), most, "tokens at most"),
        )
        about["tokens"] = sum(reply.n_tokens for reply in replies)
    save_generations(context.folder / "generations.jsonl", replies)
    texts = [Pair(pair.prompt, reply.text, reply.text, pair.group) for pair, reply in zip(pairs, replies, strict=True)]
    # A closing token, so that an empty reply has one; no token is added to what was written otherwise.
    found = log_likelihoods(
        base, texts, TrainSettings(max_length=context.model.max_tokens), batch_tokens=context.model.batch_tokens
    )
    group = [pair.group for pair in pairs]
    result: dict[str, Any] = {
        "prompts": len(replies),
        "mean_tokens": float(np.mean([reply.n_tokens for reply in replies])),
        "perplexity": asdict(perplexity(found.chosen, found.chosen_tokens, group)),
    }
    if any(reply.divergence is not None for reply in replies):
        from coala.statistics.intervals import mean_estimate

        spent = [reply.divergence or 0.0 for reply in replies]
        result["kl"] = asdict(mean_estimate(spent, group))
    return {
        **result,
        **_judged(context, replies, group),
        **_capability(context, costs, writer or base, head, guidance, asked, seed),
    }


def _judged(context: CellContext, replies: Sequence[Generation], group: Sequence[str]) -> dict[str, Any]:
    """The judge's score of every reply, which rules it keeps if the judge has some, and judgements against the start's.

    Any two methods may be compared by their scores, prompt by prompt; judgements are what win rates are made of.
    """
    from coala.evaluation import RuleJudge, judge
    from coala.evaluation.judges.named import local_judge
    from coala.statistics.intervals import bounded_mean, share_estimate

    named = context.dataset.judge
    if named is None:
        return {}
    scorer = local_judge(named).scorer()
    found: dict[str, Any] = {"judge": scorer.name, "judge_scores": [scorer.score(reply.text) for reply in replies]}
    if rules := scorer.parts if isinstance(scorer, RuleJudge) else {}:
        kept = {rule: [float(keeps(reply.text)) for reply in replies] for rule, keeps in rules.items()}
        found["rules"] = {rule: asdict(share_estimate(one, group, "share that keeps it")) for rule, one in kept.items()}
        found["rules_kept"] = asdict(bounded_mean(np.sum([*kept.values()], axis=0), group, of=float(len(rules))))
    if context.cell.kind == "base":
        return found
    dataset, model, init = context.cell.place
    reference = load_generations(context.out / "cells" / f"{dataset}.{model}.{init}.base" / "generations.jsonl")
    ours = [Generation(**{**asdict(reply), "method": context.cell.label}) for reply in replies]
    theirs = [Generation(**{**asdict(reply), "method": "base"}) for reply in reference]
    return {**found, "judgements": [asdict(j) for j in judge(ours, theirs, scorer)]}


def _capability(
    context: CellContext,
    costs: Costs,
    writer: LanguageModel,
    head: ConvexHead | None,
    guidance: Guidance | None,
    asked: Asked,
    seed: int,
) -> dict[str, Any]:
    """How many of the bundled questions the same writer answers: what an alignment may cost elsewhere."""
    from coala.decoding import Guidance, generate
    from coala.evaluation.capability import capability_questions
    from coala.statistics.intervals import share_estimate

    settings = context.study.evaluation
    questions = capability_questions()[: settings.questions]
    if not questions:
        return {}
    most, n_pieces = len(questions) * settings.question_tokens, count(1)
    with costs.of("capability"):
        replies = generate(
            [asked(user(question.prompt)) for question in questions],
            writer,
            head,
            guidance or Guidance(mode="none"),
            max_new_tokens=settings.question_tokens,
            temperature=settings.temperature,
            seed=seed,
            prompt_ids=[prompt_id(user(question.prompt)) for question in questions],
            on_token=lambda index, piece: context.show("questions", next(n_pieces), most, "tokens at most"),
        )
    right = [float(question.answered_by(reply.text)) for question, reply in zip(questions, replies, strict=True)]
    return {"answered": right, "capability": asdict(share_estimate(right, name="share of questions answered"))}
