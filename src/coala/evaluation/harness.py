"""Runs a judge over two sets of replies, matched by prompt; knows nothing of what a judge is or how it decides."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from coala.evaluation.judges import Judge
from coala.values import CoalaError, Generation, Judgement, Turn


def judge(
    ours: Sequence[Generation],
    reference: Sequence[Generation],
    by: Judge,
    *,
    swap: bool = True,
    prompts: Mapping[str, Sequence[Turn]] | None = None,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> list[Judgement]:
    """Compare each of ``ours`` with the reply of ``reference`` to the same prompt, in both orders with ``swap``.

    Replies are matched by ``prompt_id``, and by ``seed`` too where a prompt has several. The judgements come in the
    order of ``ours``, the swapped one right after the straight one; sides are named by ``method`` (the reference's
    gets the suffix `` (reference)`` when both have one name). A judge that raises gives the preference ``None`` and is
    told to ``on_failure(prompt_id, error)``. Replies that have no counterpart are a :class:`CoalaError`.
    """
    judgements = []
    for mine, theirs in _matched(ours, reference):
        names = mine.method, theirs.method if theirs.method != mine.method else f"{theirs.method} (reference)"
        prompt = (prompts or {}).get(mine.prompt_id, ())
        for swapped in (False, True) if swap else (False,):
            sides = (theirs, mine) if swapped else (mine, theirs)
            value: float | None
            try:
                value = by.compare(prompt, *sides).preference
            except Exception as error:  # noqa: BLE001 - whatever a judge dies of, the others' verdicts stand
                value = None
                if on_failure is not None:
                    on_failure(mine.prompt_id, error)
            straight = Judgement(mine.prompt_id, names[0], names[1], value, by.name)
            judgements.append(replace(straight, first=names[1], second=names[0]) if swapped else straight)
    return judgements


def _matched(ours: Sequence[Generation], reference: Sequence[Generation]) -> list[tuple[Generation, Generation]]:
    sides: list[dict[str, list[Generation]]] = []
    for replies in (ours, reference):
        by_prompt: dict[str, list[Generation]] = defaultdict(list)
        for reply in replies:
            by_prompt[reply.prompt_id].append(reply)
        sides.append(by_prompt)
    mine, theirs = sides
    only = sorted(set(mine) ^ set(theirs))
    if only:
        where = "the reference" if only[0] in mine else "ours"
        raise CoalaError(
            f"{len(only)} of {len({*mine, *theirs})} prompts have replies on one side only (the first is {only[0]!r}, "
            f"missing from {where}). Generate both sides from the same prompts."
        )
    partner: dict[tuple[str, int], Generation] = {}
    for prompt_id, replies in mine.items():
        others = theirs[prompt_id]
        if len(replies) == len(others) == 1:
            partner[prompt_id, replies[0].seed] = others[0]
            continue
        seeds, other_seeds = [reply.seed for reply in replies], [reply.seed for reply in others]
        if sorted(seeds) != sorted(other_seeds) or len(set(seeds)) < len(seeds):
            raise CoalaError(
                f"Prompt {prompt_id!r} has replies with the seeds {sorted(seeds)} on one side and "
                f"{sorted(other_seeds)} on the other; several replies to one prompt are matched by seed, so each seed "
                "must be there once on both sides. Generate both sides with the same seeds."
            )
        partner |= {(prompt_id, other.seed): other for other in others}
    return [(reply, partner[reply.prompt_id, reply.seed]) for reply in ours]
