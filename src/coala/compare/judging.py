"""The judge of a dataset's replies: a rule, a word judge, or a head of the study itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from coala.compare.cell_context import CellContext
from coala.compare.study import Dataset
from coala.store import load_generations, load_head
from coala.values import Generation, Pair

if TYPE_CHECKING:
    from coala.evaluation.judges import Judge


def labels_judged(dataset: Dataset, pairs: Sequence[Pair]) -> dict[str, Any] | None:
    """How often the judge of replies prefers the chosen ones of ``pairs``: whether its wins are of the same preference.

    None where there is no judge, where it labelled the pairs itself, and for a head, whose accuracy is a row.
    """
    from coala.evaluation.judges.named import local_judge
    from coala.statistics.intervals import share_estimate

    named, labeller = dataset.judge, dataset.sampled.labeller if dataset.sampled else dataset.labeller
    if named is None or named == labeller or named.startswith("head:"):
        return None
    asked = local_judge(named).scorer()
    ahead = np.array([asked.score(pair.chosen) - asked.score(pair.rejected) for pair in pairs])
    hits, group = (ahead > 0) + 0.5 * (ahead == 0), [pair.group for pair in pairs]
    found = share_estimate(hits, group, "share of pairs whose chosen reply the judge prefers, a tie one half")
    return {"name": asked.name, "agrees": asdict(found)}


def judged(
    context: CellContext, pairs: Sequence[Pair], replies: Sequence[Generation], *, contests: bool = True
) -> dict[str, Any]:
    """The judge's score of every reply, which rules it keeps if the judge has some, and judgements against the start's.

    Any two methods may be compared by their scores, prompt by prompt; judgements are what win rates are made of. The
    start is written before any head is there: under a head that judges, every other cell scores its replies too.
    """
    from coala.evaluation import RuleJudge, judge
    from coala.evaluation.judges import HeadJudge
    from coala.evaluation.judges.named import local_judge

    named, head = context.dataset.judge, context.study.judging_head(context.cell.dataset)
    if named is None or (head is not None and context.cell.kind == "base"):
        return {}
    asked: Judge
    if head is None:
        asked = local_judge(named).scorer()
        found: dict[str, Any] = {"judge": asked.name, "judge_scores": [asked.score(reply.text) for reply in replies]}
        if rules := asked.parts if isinstance(asked, RuleJudge) else {}:
            found |= _rules(rules, pairs, replies)
    else:
        score = head_scores(context, head)
        asked = HeadJudge(f"head {head}", lambda _, reply: reply.score)
        found = {"judge": asked.name, "judge_scores": score(pairs, replies)}
    if context.cell.kind == "base" or not contests:
        return found
    dataset, model, init = context.cell.place
    reference = load_generations(context.out / "cells" / f"{dataset}.{model}.{init}.base" / "generations.jsonl")
    ours = [replace(reply, method=context.cell.label) for reply in replies]
    theirs = [replace(reply, method="base") for reply in reference]
    if head is not None:
        found["start_scores"] = score(pairs, reference)
        ours, theirs = (
            [replace(reply, score=value) for reply, value in zip(some, found[name], strict=True)]
            for some, name in ((ours, "judge_scores"), (theirs, "start_scores"))
        )
    return {**found, "judgements": [asdict(j) for j in judge(ours, theirs, asked)]}


def _rules(rules: Any, pairs: Sequence[Pair], replies: Sequence[Generation]) -> dict[str, Any]:
    from coala.statistics.intervals import bounded_mean, share_estimate

    group = [pair.group for pair in pairs]
    kept = {rule: [float(keeps(reply.text)) for reply in replies] for rule, keeps in rules.items()}
    return {
        "rules": {rule: asdict(share_estimate(one, group, "share that keeps it")) for rule, one in kept.items()},
        "rules_kept": asdict(bounded_mean(np.sum([*kept.values()], axis=0), group, of=float(len(rules)))),
    }


Scores = Callable[[Sequence[Pair], Sequence[Generation]], list[float]]


def head_scores(context: CellContext, head: str) -> Scores:
    """Scores of replies to the prompts of pairs by the head that the method ``head`` fitted here."""
    from coala.alignment.judges import HeadScorer

    name = f"{'.'.join(context.cell.place)}.{head}.s{context.study.seeds[0]}"
    scorer = HeadScorer(load_head(context.out / "cells" / name / "head"), context.backbone)
    return lambda pairs, replies: [scorer(pair.prompt, reply) for pair, reply in zip(pairs, replies, strict=True)]
