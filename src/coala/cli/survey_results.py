"""`coala survey results`: what the votes say, as tables, a page, one JSON line, and in the report of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coala.cli.options import RunOption
from coala.cli.output import command_line
from coala.cli.terminal import write
from coala.leaderboards.record import keep, measure, run_of, spread

if TYPE_CHECKING:
    from coala.report import Evaluation
    from coala.survey import Results, Survey, Votes

Folder = Annotated[Path, typer.Argument(metavar="SURVEY", help="A folder made by `coala survey build`.")]


def results(
    survey: Folder,
    of: Annotated[str | None, typer.Option(help="Method compared with the others question by question.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results.html and results.json; SURVEY.")] = None,
    save_votes: Annotated[
        Path | None, typer.Option(help="File for the counted votes, one JSON row each, without personal data.")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Bootstrap draws.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstraps.")] = 0,
    into: RunOption = None,
) -> None:
    """Win rates, differences, agreement and the quality of the votes: tables, a page, one JSON line."""
    from coala.cli.output import emit, say
    from coala.store import plain, save_json, write_atomic
    from coala.survey import Records, analyse, load_survey, read_votes
    from coala.survey.page import results_page
    from coala.survey.records import FILE
    from coala.values import CoalaError

    loaded = load_survey(survey)
    if not (survey / FILE).exists():
        raise CoalaError(f"{survey}: has no answers yet. Serve it with `coala survey serve {survey}`.")
    records = Records(survey, loaded)
    try:
        votes, changed = read_votes(loaded, records.raters()), records.n_changed
    finally:
        records.close()
    found = analyse(loaded, votes, of=of, draws=draws, seed=seed, n_changed=changed)
    page = (out or survey) / "results.html"
    write_atomic(page, results_page(found))
    save_json(page.with_suffix(".json"), plain(found))
    if save_votes is not None:
        write_atomic(save_votes, "".join(json.dumps(row) + "\n" for row in _vote_rows(loaded, votes)))
    _show(found)
    for remark in found.remarks:
        say(f"note: {remark}")
    summary = plain(found) | {"page": str(page)}
    del summary["everybody"]
    emit(summary | keep(run_of(into, survey), _evaluation(found, survey, page, draws, seed), say))


def _evaluation(found: Results, survey: Path, page: Path, draws: int, seed: int) -> Evaluation:
    """What a run's report shows of the votes."""
    from coala.report import Evaluation, Sample
    from coala.survey.form import FILE
    from coala.survey.page import p_value

    measures = [measure(f"{part.name}: {rate.method}", rate.over_both) for part in found.parts for rate in part.rates]
    tests = {
        f"{part.name}: {one.over_both.first} - {one.over_both.second}, p by Holm": p_value(one.over_both.adjusted)
        for part in found.parts
        for one in part.differences
    }
    measures += [
        measure(f"{part.name}: {one.over_both.first} - {one.over_both.second}", one.over_both.difference, "plain", 0.0)
        for part in found.parts
        for one in part.differences
    ]
    here = found.attendance
    left_out = {f"left out: {reason}": n for reason, n in found.excluded.items()}
    return Evaluation(
        kind="survey",
        of=survey.resolve().name,
        title=f"Survey of people: {', '.join(found.methods)}",
        command=command_line(),
        measures=measures,
        files={"survey": survey / FILE, "results": page.with_suffix(".json")},
        settings={"draws": draws, "seed": seed},
        facts={
            "raters": f"{here.began} began, {here.finished} finished, {here.withdrawn} withdrew",
            **left_out,
            **tests,
        },
        samples=[
            Sample(
                question.prompt,
                {},
                ", ".join(f"{method} {100 * share.value:.0f} %" for method, share in question.shares.items())
                + f" of {question.n} votes.",
            )
            for question in spread(found.questions)
        ],
        remarks=found.remarks,
    )


def _vote_rows(survey: Survey, votes: Votes) -> Iterator[dict[str, Any]]:
    """Rows of the counted votes; raters are numbers in the order in which they came."""
    for vote in votes.counted():
        question = survey.questions[vote.question]
        yield {
            "rater": vote.rater,
            "prompt_id": question.prompt_id,
            "category": question.category,
            "method": survey.methods[vote.method],
            "position": vote.position,
            "seconds": vote.seconds,
        }


def _show(found: Results) -> None:
    """The tables on stdout."""
    from coala.cli.output import table
    from coala.survey.page import p_value, percent, points, seconds

    def ends(low: float, high: float) -> str:
        return f"{100 * low:.1f} to {100 * high:.1f}"

    for part in found.parts:
        write(f"\n{part.name}: {part.n_votes} votes, {part.n_raters} raters, {part.n_questions} questions")
        rows = [
            [
                rate.method,
                str(rate.votes),
                f"{100 * rate.over_both.value:.1f}",
                *(
                    ends(one.low, one.high)
                    for one in (rate.over_both, rate.over_raters, rate.over_questions, rate.published)
                ),
            ]
            for rate in part.rates
        ]
        table(rows, ["method", "votes", "share %", "over both", "over raters", "over questions", "as published"])
        write()
        table(
            [
                [
                    f"{one.over_both.first} - {one.over_both.second}",
                    points(one.over_both.difference),
                    p_value(one.over_both.adjusted),
                    points(one.over_raters.difference),
                    p_value(one.over_raters.adjusted),
                ]
                for one in part.differences
            ],
            ["difference", "over both", "Holm", "over raters", "Holm"],
        )
        for name, agreement in (("Krippendorff's alpha", part.alpha), ("Fleiss' kappa", part.kappa)):
            if agreement is not None:
                write(f"{name}: {agreement}")
    write()
    short = [
        [
            " ".join(question.prompt.split())[:40],
            question.category,
            *(f"{100 * share.value:.0f}" for share in question.shares.values()),
            str(question.n),
            "-" if question.seconds is None else f"{question.seconds.value:.1f}",
        ]
        for question in found.questions
    ]
    table(short, ["question", "category", *(f"{method} %" for method in found.methods), "votes", "median s"])
    here = found.attendance
    write(f"\nraters: {here.began} began, {here.finished} finished, {here.withdrawn} withdrew, {here.invited} invited")
    for reason, n in found.excluded.items():
        write(f"left out: {n}, {reason}")
    if found.checks_passed is not None:
        write(f"attention checks passed, all raters: {percent(found.checks_passed)}, n = {found.checks_passed.n}")
    if found.repeats_same is not None and found.repeats_by_chance is not None:
        chance = f"{100 * found.repeats_by_chance:.1f} % between raters"
        write(f"repeats answered alike: {percent(found.repeats_same)}, n = {found.repeats_same.n} ({chance})")
    if found.seconds is not None:
        write(f"median time per question: {seconds(found.seconds)}, n = {found.seconds.n}")
    places = ", ".join(percent(place) for place in found.positions)
    write(f"votes by place on the page: {places}\n")
