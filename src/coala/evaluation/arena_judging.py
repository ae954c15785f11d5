"""Weighted battles from what a five-step judge has said of two sets of replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from coala.evaluation.arena import Battles, battles_of
from coala.evaluation.harness import matched_replies, sides_of
from coala.evaluation.judges import ChatJudge
from coala.evaluation.win_rates import place_alone
from coala.values import CoalaError, Generation, Turn


def battles(
    ours: Sequence[Generation],
    reference: Sequence[Generation],
    by: ChatJudge,
    prompts: Mapping[str, Sequence[Turn]],
) -> Battles:
    """Battles of ours against the reference, both orders, from answers that ``by`` has kept; nothing is asked.

    Games without a verdict are counted in ``n_failed``. CoalaError for a judge of another mode.
    """
    if by.instructions.mode != "arena":
        raise CoalaError(f"Battles need a judge of mode arena; {by.name!r} is of mode {by.instructions.mode}.")
    outcomes: list[float] = []
    questions: list[str] = []
    names: list[tuple[str, str]] = []
    both: list[tuple[float, float]] = []
    failed = several = 0
    for mine, theirs in matched_replies(ours, reference):
        shown = []
        for swapped in (False, True):
            verdict = by.known(prompts.get(mine.prompt_id, ()), *((theirs, mine) if swapped else (mine, theirs)))
            if verdict is None:
                failed += 1
                continue
            several += verdict.is_last_of_several
            shown.append(verdict.preference)
            found = battles_of(verdict.label, swapped)
            outcomes += found
            questions += [mine.prompt_id] * len(found)
            names += [sides_of(mine, theirs)] * len(found)
        if len(shown) == 2:
            both.append((shown[0], shown[1]))
    why = place_alone(*zip(*both, strict=True)) if both else ""
    remarks = (f"{several} games give verdicts that differ; the last counts, as published",) if several else ()
    first, second = zip(*names, strict=True) if names else ((), ())
    return Battles(
        np.array(first),
        np.array(second),
        np.array(outcomes),
        np.array(questions),
        failed,
        remarks,
        {names[0]: why} if why else {},
    )
