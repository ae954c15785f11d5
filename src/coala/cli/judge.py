"""`coala eval judge` and `coala eval grade`: verdicts from a judge, paid for once, with what they are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coala.cli.options import (
    AskAgain,
    Attempts,
    BaseUrl,
    By,
    Cache,
    Concurrency,
    Download,
    KeyEnv,
    Local,
    MaxCalls,
    MaxTokens,
    Model,
    RunOption,
    Sampling,
    Timeout,
    TrustCode,
    service_of,
)
from coala.cli.output import NOT_ALL, command_line, say, tell_failures
from coala.leaderboards.judges import asking, choose, kept_beside, load_replies, stem
from coala.leaderboards.record import (
    about,
    comparisons,
    cost_rows,
    figure,
    judged_rows,
    keep,
    order_figures,
    run_of,
    spending,
    spent,
    spread,
    told,
)

if TYPE_CHECKING:
    from coala.evaluation.grading import Answered
    from coala.leaderboards.judges import Chosen
    from coala.store import RunFolder
    from coala.values import Generation, Turn


def judge(
    ours: Annotated[
        Path, typer.Argument(metavar="GENERATIONS_A", help="Replies: a generations-*.jsonl of a run, or a run folder.")
    ],
    reference: Annotated[
        Path | None,
        typer.Argument(metavar="[GENERATIONS_B]", help="Replies to the same prompts; a run folder's unguided ones."),
    ] = None,
    by: By = None,
    model: Model = None,
    base_url: BaseUrl = None,
    key_env: KeyEnv = "OPENAI_API_KEY",
    local: Local = None,
    pairs: Annotated[
        Path | None, typer.Option(help="Pairs with the prompts (default: pairs-eval.jsonl next to the replies).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output file (default: judgements-JUDGE.jsonl next to A).")] = None,
    cache: Cache = None,
    one_order: Annotated[
        bool, typer.Option("--one-order", help="Ask with A first only; biased, at half cost.")
    ] = False,
    into: RunOption = None,
    concurrency: Concurrency = 8,
    max_calls: MaxCalls = None,
    max_tokens: MaxTokens = None,
    attempts: Attempts = 6,
    timeout: Timeout = 180.0,
    ask_again: AskAgain = False,
    sampling: Sampling = None,
    trust_remote_code: TrustCode = False,
    download: Download = False,
) -> None:
    """Judge A's replies against B's in both orders, or a run's guided ones against its unguided ones.

    Tells win rate, position bias, inconsistency and cost.

    Rerun the same command to resume; cached verdicts are not paid for twice. Exit code 1: judged in part.

    `coala eval judge RUN/generations-guided.jsonl RUN/generations-unguided.jsonl --model gpt-4o`
    """
    from coala.cli.output import finish, progress, say, table
    from coala.evaluation import win_rate
    from coala.evaluation.arena import score
    from coala.evaluation.arena_judging import battles
    from coala.evaluation.harness import judge_many
    from coala.evaluation.judges import ChatJudge
    from coala.evaluation.order_effects import remarks_on
    from coala.report import Evaluation
    from coala.store import save_judgements
    from coala.values import CoalaError

    named = by or ("weighted" if local else "pairwise")
    sides = _sides(ours, reference)
    mine, theirs = (load_replies(path) for path in sides)
    target = out or sides[0].parent / f"judgements-{stem(named)}.jsonl"
    run = run_of(into, *sides)
    service = service_of(model, base_url, key_env, max_calls, max_tokens, attempts, timeout, ask_again, sampling or ())
    kept = cache or kept_beside(sides[0].parent, target.parent, say)
    chosen = choose(named, local, service, kept, say)
    with nullcontext() if chosen.kept is None else chosen.kept, progress() as show:
        prompts = _prompts(pairs, sides[0], mine, needed=chosen.sees_prompts)
        found = judge_many(
            mine,
            theirs,
            chosen.judge,
            swap=not one_order,
            prompts=prompts,
            concurrency=chosen.at_once(concurrency),
            on_progress=lambda done, total: show("judge", done, total),
            on_failure=tell_failures(),
        )
        if found.stopped and not found.judgements:
            raise CoalaError(found.stopped)
        fought = None
        if isinstance(chosen.judge, ChatJudge) and chosen.judge.instructions.mode == "arena":
            fought = battles(mine, theirs, chosen.judge, prompts)
    save_judgements(target, found.judgements)
    rate = win_rate(found.judgements)
    remarks = (*chosen.remarks, *remarks_on(found.judgements))
    result: dict[str, Any] = {"out": str(target), "judge": chosen.judge.name, "win_rate": rate, **about(found)}
    rows = [["win rate", told(rate)], *judged_rows(found)]
    figures = [figure("win rate", rate, even=0.5), *order_figures(found)]
    if fought is not None and len(fought):
        points = next(iter(score(fought, str(fought.second[0])).values())).score
        remarks += fought.remarks
        result["arena"] = points
        figures.insert(1, figure("percent of battles, a strong verdict being three", points, "percent", 50.0))
        rows.insert(1, ["percent of battles, a strong verdict being three", told(points)])
    ahead = found.judgements[0].first if found.judgements else "nothing to judge"
    table(rows, [ahead, f"judged by {chosen.judge.name}"])
    if found.stopped:
        say(f"stopped: {found.stopped}")
    if run is not None and rate.n:
        names = [path.name.partition(".")[0].removeprefix("generations-") for path in sides]
        evaluation = Evaluation(
            kind="judge",
            of=f"{' '.join(names)} {stem(named)}",
            title=f"{names[0]} against {names[1]}, judged by {chosen.judge.name}",
            command=command_line(),
            figures=figures,
            files={"replies": sides[0], "reference": sides[1], "judgements": target, **chosen.files},
            judge=chosen.facts,
            settings={"orders": "ours first" if one_order else "both"},
            facts=spending(found.n_unjudged, found.n_comparisons, found.stopped, found.cost, found.words),
            failures=found.failures,
            remarks=remarks,
            samples=comparisons(mine, theirs, found.judgements, prompts, names=(names[0], names[1])),
        )
        result |= keep(run, evaluation, say)
    finish(result, remarks)
    if found.stopped:
        raise typer.Exit(NOT_ALL)


def grade(
    questions: Annotated[Path, typer.Argument(help="Questions: question_id, category, turns; JSON Lines, also .gz.")],
    answers: Annotated[Path, typer.Argument(help="Answers: question_id, model_id, choices with turns.")],
    out: Annotated[Path, typer.Option(help="Where the graded rows go.")],
    references: Annotated[Path | None, typer.Option(help="Reference answers, in the form of answers.")] = None,
    by: Annotated[
        str, typer.Option("--judge", help="grade, a folder with judge.yaml, or a .jsonl of prompt templates.")
    ] = "grade",
    local: Local = None,
    model: Model = None,
    base_url: BaseUrl = None,
    key_env: KeyEnv = "OPENAI_API_KEY",
    cache: Cache = None,
    concurrency: Concurrency = 8,
    max_calls: MaxCalls = None,
    max_tokens: MaxTokens = None,
    attempts: Attempts = 6,
    timeout: Timeout = 180.0,
    ask_again: AskAgain = False,
    sampling: Sampling = None,
    into: RunOption = None,
    trust_remote_code: TrustCode = False,
    download: Download = False,
) -> None:
    """Grade answers from 1 to 10, turn by turn, the way MT-Bench does; `coala eval mtbench` reads what is written.

    `coala eval grade question.jsonl answers.jsonl --references gpt-4.jsonl --model gpt-4 --out graded.jsonl`
    """
    from coala.evaluation.grading import read_answered
    from coala.evaluation.judges import read_instructions

    answered = read_answered(questions, answers, references)
    service = service_of(model, base_url, key_env, max_calls, max_tokens, attempts, timeout, ask_again, sampling or ())
    files = {"questions": questions, "answers": answers, **({} if references is None else {"references": references})}
    grade_all(
        answered,
        by,
        asking(
            read_instructions(by, kind="single"),
            local,
            service,
            cache or kept_beside(answers.parent, out.parent, say),
            say,
        ),
        out=out,
        concurrency=concurrency,
        run=run_of(into, answers, out),
        files=files,
    )


def grade_all(
    answered: Sequence[Answered],
    by: str,
    named: Chosen,
    *,
    out: Path,
    concurrency: int,
    run: RunFolder | None,
    files: Mapping[str, Path],
    settings: Mapping[str, Any] | None = None,
    kind: str = "grade",
    trust_remote_code: TrustCode = False,
    download: Download = False,
) -> None:
    """Have ``named``, called ``by``, grade; write the grades to ``out``, show and keep what they come to.

    Exit code 1 if the judge stopped.
    """
    import json

    from coala.cli.output import finish, progress, say, table
    from coala.evaluation import mtbench
    from coala.evaluation.grading import grade_many
    from coala.evaluation.judges import ChatJudge
    from coala.report import Evaluation, Sample
    from coala.store import write_atomic
    from coala.values import CoalaError

    chosen = named.judge
    assert isinstance(chosen, ChatJudge)
    with nullcontext() if named.kept is None else named.kept, progress() as show:
        found = grade_many(
            answered,
            chosen,
            concurrency=named.at_once(concurrency),
            on_progress=lambda done, total: show("grade", done, total),
            on_failure=tell_failures(),
        )
    if found.stopped and not found.rows:
        raise CoalaError(found.stopped)
    write_atomic(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows))
    ratings, remarks = mtbench.read_ratings(out)
    scores = mtbench.scores(ratings)
    remarks = (*named.remarks, *remarks, *(f"{m}: {said}" for m, one in scores.items() for said in one.remarks))
    figures = []
    for one in scores.values():
        parts = {"overall": one.overall, **{f"turn {turn}": value for turn, value in one.by_turn.items()}}
        table([[name, told(value)] for name, value in parts.items()], [one.model, f"graded by {chosen.name}"])
        parts |= dict(one.by_category)
        figures += [figure(f"{one.model}, {name}", value, "plain") for name, value in parts.items()]
    table(cost_rows(found.failures, found.cost, f"{found.n_unjudged} of {found.n_grades} grades", found.words))
    if found.stopped:
        say(f"stopped: {found.stopped}")
    result = {
        "out": str(out),
        "judge": chosen.name,
        "scores": {name: {"overall": one.overall, "by_turn": one.by_turn} for name, one in scores.items()},
        **spent(found.failures, found.n_unjudged, found.stopped, found.cost, found.words),
    }
    names = ", ".join(scores)
    evaluation = Evaluation(
        kind=kind,
        of=f"{names} {stem(by)} {chosen.model}",
        title=f"{names}, graded by {chosen.name}",
        command=command_line(),
        figures=figures,
        files={**files, "grades": out},
        judge=named.facts,
        settings=settings or {},
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
    finish(result | keep(run, evaluation, say), remarks)
    if found.stopped:
        raise typer.Exit(NOT_ALL)


def _grades(one: Answered, rows: Sequence[Mapping[str, Any]]) -> str:
    """The grades of one answer's turns, in words."""
    mine = [row for row in rows if row["question_id"] == one.question and row["model"] == one.model]
    said = [f"turn {row['turn']}: " + (f"{row['score']:g}" if row["score"] > 0 else "no grade") for row in mine]
    return f"Grades from 1 to 10. {'; '.join(said) or 'Not graded'}."


def _sides(ours: Path, reference: Path | None) -> tuple[Path, Path]:
    """The two files; of one run folder its guided and its unguided replies."""
    from coala.values import CoalaError

    if reference is not None:
        return _replies_file(ours), _replies_file(reference)
    found = ours / "generations-guided.jsonl", ours / "generations-unguided.jsonl"
    if not all(path.is_file() for path in found):
        there = "has no guided and unguided replies yet: finish it with `coala align`" if ours.is_dir() else "is a file"
        raise CoalaError(f"{ours}: {there}. To compare two files of replies, name both.")
    return found


def _replies_file(path: Path) -> Path:
    """The file itself, or the only generations-*.jsonl of a folder."""
    from coala.values import CoalaError

    if not path.is_dir():
        return path
    found = sorted(path.glob("generations-*.jsonl"))
    if len(found) != 1:
        names = ", ".join(one.name for one in found) or "none"
        raise CoalaError(f"{path}: is a folder; expected one generations-*.jsonl in it, found {names}. Name the file.")
    return found[0]


def _prompts(
    pairs: Path | None, replies: Path, mine: Sequence[Generation], *, needed: bool
) -> Mapping[str, Sequence[Turn]]:
    """Prompts by id, as far as they are there; CoalaError for one that is ``needed`` and is not."""
    from coala.alignment.answers import read_prompts
    from coala.values import CoalaError

    path = pairs or replies.parent / "pairs-eval.jsonl"
    found = {one.id: one.prompt for one in read_prompts(path)} if pairs is not None or path.exists() else {}
    lacking = [reply.prompt_id for reply in mine if reply.prompt_id not in found]
    if needed and lacking:
        raise CoalaError(
            f"{len(lacking)} of {len(mine)} replies are to prompts that {path} does not hold (the first is "
            f"{lacking[0]!r}), and this judge has to see them. Give the run's pairs with --pairs."
        )
    return found
