"""AlpacaEval annotations from judgements of a model's replies against a reference's; asks no judge itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from coala.values import Generation, Judgement


def annotation_rows(
    ours: Sequence[Generation],
    reference: Sequence[Generation],
    judgements: Sequence[Judgement],
    *,
    instructions: Mapping[str, str],
    model: str,
    baseline: str,
    datasets: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """A row per prompt in the published form, in the order of ``ours``, one reply to a prompt on each side.

    ``preference`` is 1 + P(ours is better), the mean of both orders where both were judged; null where a verdict failed
    or was never given, so that no row is missing and difficulties by position stay in place. Rows judged in both orders
    have both, our reply shown second and first, in ``preference_by_order``; rows judged in one tell it in
    ``judge_saw_swapped_order``: whether our reply was shown first. ``instructions`` and ``datasets`` are by prompt id;
    judgements name our side by ``method``.
    """
    side = {mine.prompt_id: mine.method for mine in ours}
    found: dict[str, list[tuple[bool, float | None]]] = defaultdict(list)
    for judgement in judgements:
        first, value = judgement.first == side[judgement.prompt_id], judgement.preference
        found[judgement.prompt_id].append((first, value if first or value is None else 1 - value))
    judges = sorted({judgement.judge for judgement in judgements})
    theirs = {reply.prompt_id: reply for reply in reference}
    rows = []
    for mine in ours:
        verdicts = found.get(mine.prompt_id, [])
        known = [value for _, value in verdicts if value is not None]
        whole = bool(verdicts) and len(known) == len(verdicts)
        row: dict[str, Any] = {
            "dataset": (datasets or {}).get(mine.prompt_id, ""),
            "instruction": instructions[mine.prompt_id],
            "output_1": theirs[mine.prompt_id].text,
            "generator_1": baseline,
            "output_2": mine.text,
            "generator_2": model,
            "annotator": ", ".join(judges),
            "preference": 1 + sum(known) / len(known) if whole else None,
        }
        if whole and len(verdicts) == 2 and verdicts[0][0] != verdicts[1][0]:
            straight = {first: value for first, value in verdicts if value is not None}
            row["preference_by_order"] = [1 + straight[False], 1 + straight[True]]
        if len(verdicts) == 1:
            row["judge_saw_swapped_order"] = verdicts[0][0]
        rows.append(row)
    return rows
