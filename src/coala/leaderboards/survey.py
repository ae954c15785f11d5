"""A survey of people from files to files: its questions from replies, its results from votes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coala.leaderboards.judges import load_replies
from coala.leaderboards.record import Outcome, measure, spread
from coala.survey import (
    Check,
    Records,
    Results,
    Survey,
    SurveyPrompt,
    Votes,
    analyse,
    build,
    load_survey,
    read_votes,
    save_survey,
)
from coala.survey.form import FILE, clean, said_text
from coala.survey.page import p_value, percent, points, results_page, seconds
from coala.survey.records import FILE as ANSWERS
from coala.values import CoalaError

if TYPE_CHECKING:
    from coala.report import Evaluation, Sample

Tables = list[tuple[Sequence[Sequence[str]], Sequence[str]]]


def build_survey(
    generations: Sequence[str],
    out: Path,
    *,
    prompts: Sequence[str] = (),
    asks: Sequence[str] = (),
    consent: Path | None = None,
    check_file: Path | None = None,
    **settings: Any,
) -> tuple[Path, Survey]:
    """A survey from files of replies, ``[NAME=]FILE`` each, saved in the folder ``out``; its file and what it holds.

    ``prompts`` are files ``[CATEGORY=]FILE`` (default: the pairs beside the replies), ``asks`` sentences
    ``[CATEGORY=]TEXT``. ``settings`` are those of :func:`coala.survey.build` and the survey's fields; None is left out.
    Raises :class:`~coala.values.CoalaError` for files that do not fit, and for a folder that holds answers already.
    """
    methods: dict[str, Any] = {}
    beside: list[Path] = []
    for argument in generations:
        name, file = _named(argument)
        name = name or Path(file).name.partition(".")[0].removeprefix("generations-")
        if name in methods:
            raise CoalaError(f"Two files are of a method {name!r}. Name them: coala survey build one=FILE other=FILE.")
        methods[name] = load_replies(Path(file))
        beside.append(Path(file).parent / "pairs-eval.jsonl")
    found = [prompt for argument in prompts or _beside(beside) for prompt in _read_prompts(*_named(argument))]
    if not prompts:  # runs on the same pairs hold the same prompts
        found = list({prompt.prompt_id: prompt for prompt in found}.values())
    if consent is not None:
        settings["consent"] = _text(consent)
    survey = build(
        methods,
        found,
        asks=_asks(asks, [prompt.category for prompt in found]),
        own_checks=_read_checks(check_file) if check_file else (),
        **{name: value for name, value in settings.items() if value is not None},
    )
    if (out / ANSWERS).exists():
        raise CoalaError(f"{out}: holds answers to a survey already. Give another --out, or move {ANSWERS} away.")
    return save_survey(out, survey), survey


def survey_summary(path: Path, survey: Survey, repeats: int) -> dict[str, Any]:
    """What a survey holds, for the JSON line; ``repeats`` questions per category are seen twice."""
    return {
        "survey": path,
        "methods": list(survey.methods),
        "questions": {name: len(survey.of_category(name)) for name in survey.categories},
        "checks": len(survey.checks),
        "pages_per_rater": len(survey.questions) + repeats * len(survey.categories) + len(survey.checks),
        "digest": survey.digest,
        "remarks": list(survey.remarks),
    }


def count_survey(
    survey: Path,
    *,
    of: str | None = None,
    out: Path | None = None,
    save_votes: Path | None = None,
    draws: int = 1000,
    seed: int = 0,
    command: str = "",
) -> Outcome:
    """Win rates, differences, agreement and the quality of the votes in the folder ``survey``.

    Writes results.html and results.json in ``out`` (default: the survey's folder), and the counted votes, without
    personal data, in ``save_votes``. ``of`` is a method that is compared with the others question by question. Raises
    :class:`~coala.values.CoalaError` for a survey without answers.
    """
    from coala.store import plain, save_json, write_atomic

    loaded = load_survey(survey)
    if not (survey / ANSWERS).exists():
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
    result = plain(found) | {"page": str(page)}
    del result["everybody"]
    evaluation = _evaluation(found, survey, page, {"draws": draws, "seed": seed}, command)
    return Outcome(evaluation, result, _tables(found), remarks=found.remarks)


# --- what a run's report and a terminal show ---------------------------------------------------------------------


def _evaluation(found: Results, survey: Path, page: Path, settings: Mapping[str, Any], command: str) -> Evaluation:
    """What a run's report shows of the votes."""
    from coala.report import Evaluation

    measures = [measure(f"{part.name}: {rate.method}", rate.over_both) for part in found.parts for rate in part.rates]
    tests = {}
    for part in found.parts:
        for one in (difference.over_both for difference in part.differences):
            name = f"{part.name}: {one.first} - {one.second}"
            tests[f"{name}, p by Holm"] = p_value(one.adjusted)
            measures.append(measure(name, one.difference, "plain", 0.0))
    here = found.attendance
    left_out = {f"left out: {reason}": n for reason, n in found.excluded.items()}
    return Evaluation(
        kind="survey",
        of=survey.resolve().name,
        title=f"Survey of people: {', '.join(found.methods)}",
        command=command,
        measures=measures,
        files={"survey": survey / FILE, "results": page.with_suffix(".json")},
        settings=settings,
        facts={
            "raters": f"{here.began} began, {here.finished} finished, {here.withdrawn} withdrew",
            **left_out,
            **tests,
        },
        samples=_samples(found),
        remarks=found.remarks,
    )


def _samples(found: Results) -> list[Sample]:
    from coala.report import Sample

    def shares(question: Any) -> str:
        parts = ", ".join(f"{method} {100 * share.value:.0f} %" for method, share in question.shares.items())
        return f"{parts} of {question.n} votes."

    return [Sample(question.prompt, {}, shares(question)) for question in spread(found.questions)]


def _tables(found: Results) -> Tables:
    """Votes by part, by question, and what can be said of the raters; a line of text is a table of one cell."""
    tables: Tables = []

    def line(text: str) -> None:
        tables.append(([[text]], ()))

    for part in found.parts:
        line(f"\n{part.name}: {part.n_votes} votes, {part.n_raters} raters, {part.n_questions} questions")
        tables += [_rates(part), ([[""]], ()), _differences(part)]
        for name, agreement in (("Krippendorff's alpha", part.alpha), ("Fleiss' kappa", part.kappa)):
            if agreement is not None:
                line(f"{name}: {agreement}")
    line("")
    tables.append(_questions(found))
    here = found.attendance
    line(f"\nraters: {here.began} began, {here.finished} finished, {here.withdrawn} withdrew, {here.invited} invited")
    for reason, n in found.excluded.items():
        line(f"left out: {n}, {reason}")
    if found.checks_passed is not None:
        line(f"attention checks passed, all raters: {percent(found.checks_passed)}, n = {found.checks_passed.n}")
    if found.repeats_same is not None and found.repeats_by_chance is not None:
        chance = f"{100 * found.repeats_by_chance:.1f} % between raters"
        line(f"repeats answered alike: {percent(found.repeats_same)}, n = {found.repeats_same.n} ({chance})")
    if found.seconds is not None:
        line(f"median time per question: {seconds(found.seconds)}, n = {found.seconds.n}")
    line(f"votes by place on the page: {', '.join(percent(place) for place in found.positions)}\n")
    return tables


def _rates(part: Any) -> tuple[Sequence[Sequence[str]], Sequence[str]]:
    def ends(rate: Any) -> list[str]:
        ways = (rate.over_both, rate.over_raters, rate.over_questions, rate.published)
        return [f"{100 * one.low:.1f} to {100 * one.high:.1f}" for one in ways]

    rows = [[one.method, str(one.votes), f"{100 * one.over_both.value:.1f}", *ends(one)] for one in part.rates]
    return rows, ["method", "votes", "share %", "over both", "over raters", "over questions", "as published"]


def _differences(part: Any) -> tuple[Sequence[Sequence[str]], Sequence[str]]:
    rows = [
        [
            f"{one.over_both.first} - {one.over_both.second}",
            points(one.over_both.difference),
            p_value(one.over_both.adjusted),
            points(one.over_raters.difference),
            p_value(one.over_raters.adjusted),
        ]
        for one in part.differences
    ]
    return rows, ["difference", "over both", "Holm", "over raters", "Holm"]


def _questions(found: Results) -> tuple[Sequence[Sequence[str]], Sequence[str]]:
    rows = [
        [
            " ".join(said_text(question.prompt).split())[:40],
            question.category,
            *(f"{100 * share.value:.0f}" for share in question.shares.values()),
            str(question.n),
            "-" if question.seconds is None else f"{question.seconds.value:.1f}",
        ]
        for question in found.questions
    ]
    return rows, ["question", "category", *(f"{method} %" for method in found.methods), "votes", "median s"]


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


# --- files of a survey to be made ---------------------------------------------------------------------------------


def _named(argument: str) -> tuple[str, str]:
    """NAME=FILE, or a file alone; a path that exists is never cut at its equals sign."""
    name, sign, file = argument.partition("=")
    return (name, file) if sign and not Path(argument).exists() else ("", argument)


def _asks(given: Sequence[str], categories: Sequence[str]) -> Mapping[str, str]:
    """The sentence of each category: its own, or the one given without a category."""
    asks: dict[str, str] = {}
    for argument in given:
        name, sign, text = argument.partition("=")
        if sign and name in categories:
            asks[name] = text
        else:
            asks |= {category: argument for category in categories if category not in asks}
    return asks


def _beside(files: Sequence[Path]) -> list[str]:
    """The runs' own pairs, each once."""
    there = list(dict.fromkeys(str(path) for path in files if path.exists()))
    if not there:
        raise CoalaError(
            f"Found no pairs-eval.jsonl next to the generations ({files[0].parent}). Fix: pass the prompts with "
            "--prompts."
        )
    return there


def _read_prompts(category: str, file: str) -> list[SurveyPrompt]:
    from coala.alignment.answers import read_prompts

    return [
        SurveyPrompt(one.id, one.prompt if len(one.prompt) > 1 else one.text, one.category or category or "questions")
        for one in read_prompts(file)
    ]


def _read_checks(file: Path) -> list[Check]:
    from coala.evaluation.rows import read_rows

    found = []
    for row in read_rows(file):
        answers, right = row.get("answers"), row.get("right")
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise row.fault("answers", "something else", "a list of texts", "correct or delete the row")
        if isinstance(right, bool) or not isinstance(right, int):
            raise row.fault("right", "something else", "the number of an answer, from 0", "correct or delete the row")
        found.append(Check(clean(row.text("prompt")), tuple(map(clean, answers)), right))
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise CoalaError(f"{file}: cannot be read ({error.strerror}). Check the path.") from None
    except UnicodeDecodeError:
        raise CoalaError(f"{file}: is not UTF-8 text. Save it as UTF-8.") from None
