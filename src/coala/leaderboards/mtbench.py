"""MT-Bench: grades of answers by a judge, end to end with a run or not, and the measures of saved judgements."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coala.callbacks import OnFailure, OnNote, OnProgress, quiet
from coala.leaderboards.contest import described, own_name
from coala.leaderboards.judges import VERDICTS, JudgeSettings, asking, kept_beside, stem
from coala.leaderboards.record import Outcome, cost_rows, measure, spending, spent, spread, told, told_interval
from coala.values import CoalaError

if TYPE_CHECKING:
    from coala.alignment.answers import ReplySettings
    from coala.evaluation.grading import Answered
    from coala.leaderboards.judges import Chosen
    from coala.report import Evaluation, Measure
    from coala.store import RunFolder


def run_mtbench(
    run: RunFolder,
    questions: Path,
    *,
    judge: JudgeSettings,
    manner: ReplySettings,
    on_progress: OnProgress,
    references: Path | None = None,
    name: str | None = None,
    limit: int | None = None,
    command: str = "",
    on_failure: OnFailure | None = None,
    on_note: OnNote = quiet,
) -> Outcome:
    """Have the run answer both turns of each question and the judge grade them from 1 to 10.

    Answers and grades lie in RUN/mtbench, in the published forms. Called again it resumes.
    """
    from coala.alignment.answers import converse
    from coala.evaluation.grading import read_answered, read_questions
    from coala.evaluation.judges import read_instructions
    from coala.store import write_atomic

    name = name or own_name(run, manner)
    asked = read_questions(questions)[:limit]
    # What can be wrong with the judge is told before hours of answering.
    instructions = read_instructions(judge.name, kind="single")
    chosen = asking(instructions, judge.local, judge.service, judge.cache or run.path / VERDICTS, on_note)
    turns = [(one.question, one.turns) for one in asked]
    replies = converse(run, turns, manner, on_reply=lambda done, total: on_progress("replies", done, total))
    answers = run.path / "mtbench" / f"{stem(name)}.jsonl"
    rows = [
        {"question_id": one.question, "model_id": name, "choices": [{"index": 0, "turns": list(said)}]}
        for one, said in zip(asked, replies, strict=True)
    ]
    write_atomic(answers, "".join(json.dumps(row) + "\n" for row in rows))
    called = "-".join(map(stem, filter(None, (judge.name, judge.local or judge.service.model))))
    return _graded(
        read_answered(questions, answers, references),
        judge,
        chosen,
        out=answers.with_name(f"{answers.stem}-{called}.jsonl"),
        files={"questions": questions, "answers": answers, **_references(references)},
        settings=described(run, manner),
        kind="mtbench",
        command=command,
        on_progress=on_progress,
        on_failure=on_failure,
    )


def grade_answers(
    questions: Path,
    answers: Path,
    *,
    out: Path,
    judge: JudgeSettings,
    on_progress: OnProgress,
    references: Path | None = None,
    command: str = "",
    on_failure: OnFailure | None = None,
    on_note: OnNote = quiet,
) -> Outcome:
    """Have a judge grade saved ``answers``, turn by turn; grades go to ``out``, which :func:`count_mtbench` reads."""
    from coala.evaluation.grading import read_answered
    from coala.evaluation.judges import read_instructions

    answered = read_answered(questions, answers, references)
    cache = judge.cache or kept_beside(answers.parent, out.parent, on_note)
    chosen = asking(read_instructions(judge.name, kind="single"), judge.local, judge.service, cache, on_note)
    return _graded(
        answered,
        judge,
        chosen,
        out=out,
        files={"questions": questions, "answers": answers, **_references(references)},
        settings={},
        kind="grade",
        command=command,
        on_progress=on_progress,
        on_failure=on_failure,
    )


def count_mtbench(judgements: Path, questions: Path | None = None, *, command: str = "") -> Outcome:
    """Mean ratings overall, by turn and by category, or wins of two models: whichever ``judgements`` holds."""
    from coala.evaluation import mtbench

    if mtbench.is_pairwise(judgements):
        return _matches(judgements, command)
    categories = None if questions is None else mtbench.read_categories(questions)
    ratings, remarks = mtbench.read_ratings(judgements, categories)
    scores = mtbench.scores(ratings)
    measures, tables = [], []
    for one in scores.values():
        parts = {"overall": one.overall}
        parts |= {f"turn {turn}": value for turn, value in one.by_turn.items()} | dict(one.by_category)
        rows = [[name, told_interval(value), str(value.n)] for name, value in parts.items()]
        tables.append((rows, [one.model, "score", "n"]))
        measures += [measure(f"{one.model}, {name}", value, "plain") for name, value in parts.items()]
    remarks += _said(scores)
    failures = {f"error, {one.model}": one.n_errors for one in scores.values() if one.n_errors}
    record = _record(judgements, scores, measures, {}, failures, remarks, command)
    return Outcome(record, {"scores": scores}, tables, remarks=remarks)


def _references(path: Path | None) -> dict[str, Path]:
    return {} if path is None else {"references": path}


def _graded(
    answered: Sequence[Answered],
    judge: JudgeSettings,
    chosen: Chosen,
    *,
    out: Path,
    files: Mapping[str, Path],
    settings: Mapping[str, Any],
    kind: str,
    command: str,
    on_progress: OnProgress,
    on_failure: OnFailure | None,
) -> Outcome:
    from coala.evaluation import mtbench
    from coala.evaluation.grading import grade_many
    from coala.evaluation.judges import ChatJudge
    from coala.report import Evaluation, Sample
    from coala.store import write_atomic

    by = chosen.judge
    assert isinstance(by, ChatJudge)
    with nullcontext() if chosen.kept is None else chosen.kept:
        found = grade_many(
            answered,
            by,
            concurrency=chosen.at_once(judge.concurrency),
            on_progress=lambda done, total: on_progress("grade", done, total),
            on_failure=on_failure,
        )
    if found.stopped and not found.rows:
        raise CoalaError(found.stopped)
    write_atomic(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows))
    ratings, remarks = mtbench.read_ratings(out)
    scores = mtbench.scores(ratings)
    remarks = (*chosen.remarks, *remarks, *_said(scores))
    measures, tables = [], []
    for one in scores.values():
        parts = {"overall": one.overall, **{f"turn {turn}": value for turn, value in one.by_turn.items()}}
        tables.append(([[name, told(value)] for name, value in parts.items()], [one.model, f"graded by {by.name}"]))
        parts |= dict(one.by_category)
        measures += [measure(f"{one.model}, {name}", value, "plain") for name, value in parts.items()]
    costs = cost_rows(found.failures, found.cost, f"{found.n_unjudged} of {found.n_grades} grades", found.words)
    result = {
        "out": str(out),
        "judge": by.name,
        "scores": {name: {"overall": one.overall, "by_turn": one.by_turn} for name, one in scores.items()},
        **spent(found.failures, found.n_unjudged, found.stopped, found.cost, found.words),
    }
    names = ", ".join(scores)
    evaluation = Evaluation(
        kind=kind,
        of=f"{names} {stem(judge.name)} {by.model}",
        title=f"{names}, graded by {by.name}",
        command=command,
        measures=measures,
        files={**files, "grades": out},
        judge=chosen.facts,
        settings=dict(settings),
        facts=spending(found.n_unjudged, found.n_grades, found.stopped, found.cost, found.words),
        failures=found.failures,
        samples=[
            Sample(
                "\n\n".join(one.turns),
                {f"{one.model}, turn {turn}": text for turn, text in enumerate(one.answers, 1)},
                _grades(one, found.rows),
            )
            for one in spread(answered)
        ],
        remarks=remarks,
    )
    return Outcome(evaluation, result, [*tables, (costs, [])], found.stopped, remarks)


def _matches(judgements: Path, command: str) -> Outcome:
    from coala.evaluation import mtbench

    matches, remarks = mtbench.read_matches(judgements)
    contests = mtbench.contests(matches)
    rows = [
        [
            one.model,
            f"{one.wins} / {one.losses} / {one.ties}",
            *(
                f"{rate.value:.4f}" if rate.value == rate.value else rate.absent
                for rate in (one.win_rate, one.loss_rate)
            ),
            *map(told_interval, (one.adjusted, one.excluding_ties)),
            str(one.n_errors),
        ]
        for one in contests.values()
    ]
    head = ["model", "win / loss / tie", "win rate", "loss rate", "adjusted", "excluding ties", "errors"]
    measures = [
        measure(f"{one.model}, {word}", rate, even=0.5 if word != "wins" else None)
        for one in contests.values()
        for word, rate in (("wins", one.win_rate), ("adjusted", one.adjusted), ("no ties", one.excluding_ties))
    ]
    facts = {f"{one.model}, win / loss / tie": f"{one.wins} / {one.losses} / {one.ties}" for one in contests.values()}
    failures = {"error": next(iter(contests.values())).n_errors}
    remarks += _said(contests)
    record = _record(judgements, contests, measures, facts, failures, remarks, command)
    return Outcome(record, {"matches": contests}, [(rows, head)], remarks=remarks)


def _record(
    judgements: Path,
    models: Mapping[str, Any],
    measures: Sequence[Measure],
    facts: Mapping[str, Any],
    failures: Mapping[str, int],
    remarks: Sequence[str],
    command: str,
) -> Evaluation:
    from coala.evaluation.rows import read_rows
    from coala.report import Evaluation, Sample

    rows = read_rows(judgements)
    said = [(row, name) for row in rows if (name := row.name_of("judgment", "g1_judgment")) is not None]
    judges = sorted({str(row.get("judge")) for row in rows if row.get("judge") is not None})
    return Evaluation(
        kind="mtbench",
        of=judgements.name.partition(".")[0],
        title=f"MT-Bench: {', '.join(models)}",
        command=command,
        measures=measures,
        files={"judgements": judgements},
        judge={"name": ", ".join(judges)} if judges else {},
        facts=facts,
        failures={kind: n for kind, n in failures.items() if n},
        samples=[
            Sample(f"question {row.get('question_id')}, turn {row.get('turn')}", {}, str(row.get(name)))
            for row, name in spread(said)
        ],
        remarks=remarks,
    )


def _said(parts: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{name}: {remark}" for name, part in parts.items() for remark in part.remarks)


def _grades(one: Answered, rows: Sequence[Mapping[str, Any]]) -> str:
    """The grades of one answer's turns, in words."""
    mine = [row for row in rows if row["question_id"] == one.question and row["model"] == one.model]
    said = [f"turn {row['turn']}: " + (f"{row['score']:g}" if row["score"] > 0 else "no grade") for row in mine]
    return f"Grades from 1 to 10. {'; '.join(said) or 'Not graded'}."
