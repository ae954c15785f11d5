"""Arena-Hard: from saved judgements or battles, or end to end with a run and a judge of mode arena."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coala.callbacks import OnFailure, OnNote, OnProgress, quiet
from coala.leaderboards.contest import RunVsReference, described, given_reference, hold, own_name
from coala.leaderboards.judges import JudgeSettings
from coala.leaderboards.record import (
    Outcome,
    about,
    comparisons,
    judged_rows,
    measure,
    order_measures,
    spending,
    told_interval,
)
from coala.settings import Board, VerdictRule

if TYPE_CHECKING:
    from coala.alignment.answers import ReplySettings
    from coala.evaluation.arena import Battles
    from coala.evaluation.arena_style import StyleControlled
    from coala.store import RunFolder


def run_arena(
    run: RunFolder,
    prompts: Path,
    reference: str | None = None,
    *,
    judge: JudgeSettings,
    manner: ReplySettings,
    on_progress: OnProgress,
    name: str | None = None,
    limit: int | None = None,
    style: Sequence[str] = (),
    board: Board = "v0.1",
    draws: int = 1000,
    command: str = "",
    on_failure: OnFailure | None = None,
    on_note: OnNote = quiet,
) -> Outcome:
    """Have the run answer ``prompts`` and the judge say how much better than ``reference`` it did, in both orders.

    ``reference`` is a file of replies, ``unguided``, or None for the outputs in the file of prompts. ``style`` names
    the answers of each model (NAME=FILE) to hold style fixed. Called again it resumes: replies and verdicts are kept.
    The published interval is that of ``board``; ``draws`` of the bootstrap are seeded by ``manner``.
    """
    from coala.evaluation.judges import read_instructions
    from coala.values import CoalaError

    if read_instructions(judge.name).mode != "arena":
        raise CoalaError(
            f"--judge {judge.name} does not use mode arena, so its verdicts carry no strength. Use --judge arena."
        )
    held = hold(
        run,
        prompts,
        reference,
        name=name or own_name(run, manner),
        manner=manner,
        limit=limit,
        judge=judge,
        orders="both",
        on_progress=on_progress,
        on_failure=on_failure,
        note=on_note,
    )
    assert held.battles is not None
    if not len(held.battles):
        words = "; ".join(f"{kind}: {text}" for kind, text in held.found.words.items())
        raise CoalaError(f"No game has a verdict. {words or 'The judge said nothing.'} The replies are kept.")
    return _outcome(
        held.battles,
        held.reference[0].method,
        held,
        files={"prompts": prompts, **given_reference(reference), **held.chosen.files},
        settings=described(run, manner),
        style=style,
        board=board,
        draws=draws,
        seed=manner.seed,
        command=command,
    )


def count_arena(
    judgements: Path,
    *,
    baseline: str = "gpt-4-0314",
    model: str | None = None,
    rule: VerdictRule = "last",
    style: Sequence[str] = (),
    board: Board = "v0.1",
    draws: int = 1000,
    seed: int = 0,
    command: str = "",
) -> Outcome:
    """Scores of saved judgements of two games each, or of battles; ``model`` is the judged one where rows lack it."""
    from coala.evaluation.arena import read_battles

    return _outcome(
        read_battles(judgements, model=model, baseline=baseline, rule=rule),
        baseline,
        None,
        files={"judgements": judgements},
        settings={"rule": rule},
        style=style,
        board=board,
        draws=draws,
        seed=seed,
        command=command,
    )


def _outcome(
    battles: Battles,
    baseline: str,
    held: RunVsReference | None,
    *,
    files: Mapping[str, Path],
    settings: Mapping[str, Any],
    style: Sequence[str],
    board: Board,
    draws: int,
    seed: int,
    command: str,
) -> Outcome:
    from coala.evaluation.arena import score
    from coala.evaluation.win_rates import remarks_on
    from coala.report import Evaluation

    scores = score(battles, baseline, board=board, draws=draws, seed=seed)
    controlled = _styled(battles, style, baseline, board, draws, seed) if style else None
    result: dict[str, Any] = {"baseline": baseline, "scores": scores, "failed_games": battles.n_failed}
    measures = [measure(f"{one.model}, percent of battles", one.score, "percent", 50.0) for one in scores.values()]
    measures += [
        measure(f"{one.model}, excluding ties", one.excluding_ties, "percent", 50.0) for one in scores.values()
    ]
    if controlled:
        result["style_controlled"] = controlled
        measures += [
            measure(f"{n}, style controlled", value, "percent", 50.0) for n, value in controlled.scores.items()
        ]
    facts: dict[str, Any] = {"baseline": baseline, "games without a verdict": battles.n_failed}
    facts |= {f"{one.model}, win / loss / tie": f"{one.wins} / {one.losses} / {one.ties}" for one in scores.values()}
    tables, remarks = [_table(scores, controlled, board)], battles.remarks
    if held is not None:
        found = held.found
        remarks = (*held.chosen.remarks, *remarks, *remarks_on(found.judgements))
        tables.append((judged_rows(found), []))
        result |= {"judge": held.chosen.judge.name, **about(found)}
        measures += order_measures(found)
        facts |= spending(found.n_unjudged, found.n_comparisons, found.stopped, found.cost, found.words)
    whose = ", ".join(scores)
    evaluation = Evaluation(
        kind="arena",
        of=f"{whose} {baseline}",
        title=f"Arena-Hard: {whose} against {baseline}",
        command=command,
        measures=measures,
        files=dict(files),
        judge={} if held is None else held.chosen.facts,
        settings={**settings, "board": board, "draws": draws, "seed": seed},
        facts=facts,
        failures=held.found.failures if held is not None else {},
        samples=[] if held is None else comparisons(held.ours, held.reference, held.found.judgements, held.prompts),
        remarks=remarks,
    )
    return Outcome(evaluation, result, tables, "" if held is None else held.found.stopped, remarks)


def _table(
    scores: Mapping[str, Any], controlled: StyleControlled | None, board: Board
) -> tuple[list[list[str]], list[str]]:
    """One row per model, the best first."""
    rows = []
    for one in sorted(scores.values(), key=lambda one: -one.score.value):
        spread = one.published_interval
        rows.append(
            [
                one.model,
                told_interval(one.score),
                f"[{spread.low:.2f}, {spread.high:.2f}]" if math.isfinite(spread.value) else spread.absent,
                told_interval(one.excluding_ties),
                f"{one.wins} / {one.losses} / {one.ties}",
                f"{one.rating:.1f}" if math.isfinite(one.rating) else "-",
                str(one.score.n),
                *([told_interval(controlled.scores[one.model])] if controlled else []),
            ]
        )
    head = ["model", "score, over questions", f"over rows ({board})", "excluding ties", "win / loss / tie", "rating"]
    return rows, [*head, "battles", *(["style controlled"] if controlled else [])]


def _styled(
    battles: Battles, named: Sequence[str], baseline: str, version: Board, draws: int, seed: int
) -> StyleControlled:
    """Style control with answer files given as NAME=FILE."""
    import numpy as np

    from coala.evaluation.arena_style import read_styles, style_controlled
    from coala.values import CoalaError

    files = {}
    for item in named:
        name, sign, file = item.rpartition("=")
        if not sign or not name or not file:
            raise CoalaError(f"--style {item!r}: expected NAME=ANSWERS, such as {baseline}=answers.jsonl.")
        files[name] = read_styles(file)
    if lacking := [name for name in battles.models if name not in files]:
        raise CoalaError(f"Style control needs the answers of every model; missing {lacking[0]!r}. Add --style for it.")
    sides = []
    for side in (battles.first.tolist(), battles.second.tolist()):
        for name, question in zip(side, battles.question.tolist(), strict=True):
            if question not in files[name]:
                raise CoalaError(f"The answers of {name!r} have none for question {question!r}. Add it to the file.")
        sides.append(np.array([files[n][q] for n, q in zip(side, battles.question.tolist(), strict=True)]))
    # Every draw refits the model: no more of them than the published boards use.
    return style_controlled(battles, sides[0], sides[1], baseline, version=version, draws=min(draws, 100), seed=seed)
