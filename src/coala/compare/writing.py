"""What the methods that write are measured by: replies to held-out prompts, judged; and what their likelihoods prefer.

CELL/generations.jsonl  the replies
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from coala.compare.cell_context import CellContext, Costs
from coala.compare.judging import judged
from coala.compare.study import Study
from coala.store import save_generations
from coala.values import CoalaError, Generation, Pair, Turn, one_per_prompt, prompt_id, user

if TYPE_CHECKING:
    from coala.backbone import LanguageModel, OutputChange
    from coala.baselines import PairLikelihoods
    from coala.decoding import Guidance
    from coala.values import ConvexHead

# From a conversation to the one that a writer is given in its place.
Asked = Callable[[tuple[Turn, ...]], tuple[Turn, ...]]


def as_it_is(prompt: tuple[Turn, ...]) -> tuple[Turn, ...]:
    return prompt


@dataclass(frozen=True)
class Writer:
    """Who writes: a model (None: the start), guided by a head, asked otherwise, or with its output layer changed."""

    model: LanguageModel | None = None
    head: ConvexHead | None = None
    guidance: Guidance | None = None
    asked: Asked = as_it_is
    change: OutputChange | None = None

    def of(self, start: LanguageModel) -> LanguageModel:
        """The model that writes, where ``start`` is the start."""
        own = self.model or start
        return own if self.change is None else own.with_output(self.change)

    @property
    def forwards(self) -> float:
        """Rows of the model that are computed for each token that is kept."""
        if self.guidance is None:
            return 1.0
        ahead, every = self.guidance.looked_at, self.guidance.interval
        # The column of the token that is chosen is among those looked ahead to.
        return self.guidance.written * ((ahead + every - 1) / every if ahead else 1.0)


def answered(study: Study, dataset: str, test: Sequence[Pair]) -> list[Pair]:
    """The held-out pairs whose prompts are answered, each prompt once."""
    distinct = one_per_prompt(test)
    own = study.datasets[dataset].prompts
    return distinct[: study.evaluation.prompts if own is None else own]


def prompts_of(context: CellContext) -> list[Pair]:
    return answered(context.study, context.cell.dataset, context.part("test"))


# --- likelihoods -----------------------------------------------------------------------------------------------------


def policy_of(policy: PairLikelihoods, base: PairLikelihoods, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Policy accuracy of a model whose likelihoods are known, as the start asked otherwise or trained."""
    from coala.statistics.policy import accuracy_of_log_ratios

    chosen, rejected = policy.chosen - base.chosen, policy.rejected - base.rejected
    found = accuracy_of_log_ratios(chosen, rejected, [pair.group for pair in pairs])
    return {"policy_accuracy": asdict(found.accuracy)}


def drift_of(context: CellContext, costs: Costs, policy: LanguageModel, asked: Asked = as_it_is) -> dict[str, Any]:
    """KL of whole replies to the start, of a trained policy or of the start asked otherwise; empty without prompts.

    Empty too where it is taken from the judged replies, which :func:`replies_of` does.
    """
    from coala.baselines import drift

    settings = context.evaluation
    prompts = [pair.prompt for pair in prompts_of(context)[: settings.kl_prompts]]
    if not prompts or settings.kl == "replies":
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

    settings = context.evaluation
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


# --- replies ---------------------------------------------------------------------------------------------------------


def replies_of(
    context: CellContext,
    costs: Costs,
    writer: Writer = Writer(),
) -> dict[str, Any]:
    """Answer the held-out prompts, save the replies, and judge them against those of the unguided start.

    ``perplexity`` is that of the replies under the start, to the prompts as they are. Of what each prompt has, KL,
    log-likelihood and tokens are kept, for comparisons on the same prompts.
    """
    pairs = prompts_of(context)
    if not pairs:
        return {}
    seed = context.study.seeds[0] if context.cell.seed is None else context.cell.seed
    with costs.of("replies") as about:
        replies = _written(context, writer, pairs, seed, "replies")
        about["tokens"] = sum(reply.n_tokens for reply in replies)
    save_generations(context.folder / "generations.jsonl", replies)
    result = {
        "prompts": len(replies),
        "mean_tokens": float(np.mean([reply.n_tokens for reply in replies])),
        "forwards": writer.forwards,
        **_measured(context, writer, pairs, replies),
        **judged(context, pairs, replies),
    }
    return {**result, **_capability(context, costs, writer, seed)}


def along(context: CellContext, costs: Costs, writer: Writer, strengths: Sequence[float]) -> list[dict[str, Any]]:
    """What :func:`replies_of` keeps of each prompt, at other strengths of the writer's change."""
    assert writer.change is not None
    found, pairs = [], prompts_of(context)
    for strength in strengths if pairs else ():
        own = Writer(change=writer.change.times(strength))
        with costs.of(f"strength {strength:g}"):
            replies = _written(context, own, pairs, context.cell.seed or 0, f"replies at strength {strength:g}")
        scores = judged(context, pairs, replies, contests=False).get("judge_scores")
        told = _measured(context, own, pairs, replies)
        found.append({"strength": strength, "judge_scores": scores, **told})
    return found


def _written(context: CellContext, writer: Writer, pairs: Sequence[Pair], seed: int, stage: str) -> list[Generation]:
    settings, base = context.evaluation, context.backbone
    most, n_pieces = len(pairs) * settings.max_new_tokens, count(1)
    context.show(stage, 0, most)
    return _generate(
        writer,
        base,
        [pair.prompt for pair in pairs],
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=seed,
        on_token=lambda index, piece: context.show(stage, next(n_pieces), most, "tokens at most"),
    )


def _generate(
    writer: Writer, base: LanguageModel, prompts: Sequence[tuple[Turn, ...]], **settings: Any
) -> list[Generation]:
    from coala.decoding import Guidance, generate

    return generate(
        [writer.asked(prompt) for prompt in prompts],
        writer.of(base),
        writer.head,
        writer.guidance or Guidance(mode="none"),
        prompt_ids=[prompt_id(prompt) for prompt in prompts],
        batch_size=16,
        **settings,
    )


def _measured(
    context: CellContext, writer: Writer, pairs: Sequence[Pair], replies: Sequence[Generation]
) -> dict[str, Any]:
    """Perplexity, distinct bigrams and KL of replies, and what each prompt has of them."""
    from coala.baselines import TrainSettings, log_likelihoods
    from coala.statistics.intervals import bounded_mean, mean_estimate
    from coala.statistics.scores import perplexity

    texts = [Pair(pair.prompt, reply.text, reply.text, pair.group) for pair, reply in zip(pairs, replies, strict=True)]
    # A closing token, so that an empty reply has one; no token is added to what was written otherwise.
    found = log_likelihoods(
        context.backbone,
        texts,
        TrainSettings(max_length=context.model.max_tokens),
        batch_tokens=context.model.batch_tokens,
    )
    group = [pair.group for pair in pairs]
    spent = _spent(context, writer, pairs, replies)
    return {
        "perplexity": asdict(perplexity(found.chosen, found.chosen_tokens, group)),
        "distinct": asdict(bounded_mean([distinct_bigrams(reply.text) for reply in replies], group)),
        **({} if spent is None else {"kl": asdict(mean_estimate(spent, group))}),
        "per_prompt": {
            "kl": spent,
            "log_likelihood": [float(value) for value in found.chosen],
            "tokens": [int(value) for value in found.chosen_tokens],
        },
    }


def distinct_bigrams(text: str) -> float:
    """The share of a text's two-word runs that are distinct; 1 for a text of fewer than two words."""
    words = text.lower().split()
    runs = list(pairwise(words))
    return len(set(runs)) / len(runs) if runs else 1.0


def _spent(
    context: CellContext, writer: Writer, pairs: Sequence[Pair], replies: Sequence[Generation]
) -> list[float] | None:
    """Nats of each reply's divergence from the start: as its decoder accounts for it, or step by step over the reply.

    None where the distribution of a step is not known, or the study estimates it otherwise.
    """
    if any(reply.divergence is not None for reply in replies):
        return [reply.divergence or 0.0 for reply in replies]
    if writer.change is None:
        itself = writer.model is None and writer.asked is as_it_is
        if writer.head is not None or itself or context.evaluation.kl != "replies":
            return None
    found = []
    for number, (pair, reply) in enumerate(zip(pairs, replies, strict=True)):
        context.show("divergence", number, len(pairs), "replies")
        found.append(divergence_along(context, writer, pair, reply))
    return found


def divergence_along(context: CellContext, writer: Writer, pair: Pair, reply: Generation) -> float:
    """sum of KL(writer || start) over the steps of a reply, in nats, over the whole vocabulary at temperature 1.

    The step that ended the reply counts, where a token of the model's did. Its mean over replies of the writer is the
    divergence of the two distributions of replies, before top-k and top-p.
    """
    import torch

    from coala.decoding import divergence

    base = context.backbone
    ended = not base.stop_texts and reply.n_tokens < context.evaluation.max_new_tokens

    def states(model: LanguageModel, prompt: tuple[Turn, ...]) -> Any:
        row = model.render(prompt, reply.text, ends_with_eos=ended)
        return model.hidden([row.tokens], -1)[0, max(0, row.start - 1) : max(0, row.stop - 1)]

    plain = states(base, pair.prompt)
    if not len(plain):
        return 0.0
    theirs = torch.log_softmax(base.logits(plain), -1)
    model = writer.of(base)
    # A change of the output layer leaves the states as they are.
    logits = model.logits(plain if writer.change is not None else states(model, writer.asked(pair.prompt)))
    if len(logits) != len(theirs):
        raise CoalaError(
            f"A reply has {len(logits)} tokens after the prompt used and {len(theirs)} after the plain prompt, so its "
            "steps cannot be compared. Fix: raise max_tokens, which truncates one of them."
        )
    return float(divergence(torch.log_softmax(logits, -1), theirs).sum())


def _capability(context: CellContext, costs: Costs, writer: Writer, seed: int) -> dict[str, Any]:
    """How many of the bundled questions the same writer answers: what an alignment may cost elsewhere."""
    from coala.evaluation.capability import capability_questions
    from coala.statistics.intervals import share_estimate

    settings = context.evaluation
    questions = capability_questions()[: settings.questions]
    if not questions:
        return {}
    most, n_pieces = len(questions) * settings.question_tokens, count(1)
    with costs.of("capability"):
        replies = _generate(
            writer,
            context.backbone,
            [user(question.prompt) for question in questions],
            max_new_tokens=settings.question_tokens,
            temperature=settings.temperature,
            seed=seed,
            on_token=lambda index, piece: context.show("questions", next(n_pieces), most, "tokens at most"),
        )
    right = [float(question.answered_by(reply.text)) for question, reply in zip(questions, replies, strict=True)]
    return {"answered": right, "capability": asdict(share_estimate(right, name="share of questions answered"))}
