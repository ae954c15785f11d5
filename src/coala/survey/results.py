"""What the votes say: win rates with the published and with honest intervals, differences, agreement, quality.

A vote is not an independent trial. One rater gives many votes, and all votes on one question are about the same texts;
other raters or other questions would have given other numbers. Three intervals answer three questions: over raters
(would other raters agree, on these questions), over questions (would these raters agree, on others), and over both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from coala.statistics.agreement import fleiss_kappa, krippendorff_alpha
from coala.statistics.intervals import bootstrap, share_estimate, wald
from coala.statistics.votes import (
    Contrast,
    adjusted,
    multinomial_difference,
    two_way_difference,
    two_way_share,
    vote_difference,
)
from coala.survey.form import Said, Survey
from coala.survey.votes import Attendance, Vote, Votes
from coala.values import CoalaError, Estimate

PUBLISHED_Z = 1.96
ALL = "all categories"


@dataclass(frozen=True)
class Rate:
    """The share of votes for one method.

    ``published`` is the COALA paper's interval: Wald's with the number of raters as n (Eq. 10). ``over_both`` lets
    raters and questions vary; it is the one to report.
    """

    method: str
    votes: int
    published: Estimate
    over_raters: Estimate
    over_questions: Estimate
    over_both: Estimate


@dataclass(frozen=True)
class MethodDifference:
    """One method's share minus another's, over raters and over both; p-values adjusted over all pairs (Holm)."""

    over_raters: Contrast
    over_both: Contrast


@dataclass(frozen=True)
class Part:
    """One category, or all of them."""

    name: str
    n_votes: int
    n_raters: int
    n_questions: int
    rates: tuple[Rate, ...]
    differences: tuple[MethodDifference, ...]
    alpha: Estimate | None
    kappa: Estimate | None


@dataclass(frozen=True)
class QuestionResult:
    """One question: votes per method, and the method under test against each other one.

    Here every vote is of another rater, so plain Wilson and multinomial intervals hold. p-values are adjusted over all
    contrasts of the category.
    """

    prompt_id: str
    category: str
    prompt: Said
    n: int
    shares: Mapping[str, Estimate]
    against: tuple[Contrast, ...]
    seconds: Estimate | None


@dataclass(frozen=True)
class Results:
    """Everything `coala survey results` reports. ``everybody`` holds the rates with nobody excluded."""

    title: str
    methods: tuple[str, ...]
    of: str
    attendance: Attendance
    excluded: Mapping[str, int]
    n_changed: int
    parts: tuple[Part, ...]
    everybody: tuple[Part, ...]
    questions: tuple[QuestionResult, ...]
    positions: tuple[Estimate, ...]
    checks_passed: Estimate | None
    repeats_same: Estimate | None
    repeats_by_chance: float | None
    seconds: Estimate | None
    remarks: tuple[str, ...]


def analyse(
    survey: Survey, votes: Votes, *, of: str | None = None, draws: int = 1000, seed: int = 0, n_changed: int = 0
) -> Results:
    """Results of ``votes``; ``of`` is the method that each question's contrasts are about (by default the first).

    ``draws`` and ``seed`` are those of the bootstraps (agreement and times). CoalaError when no vote counts.
    """
    of = survey.methods[0] if of is None else of
    if of not in survey.methods:
        raise CoalaError(f"There is no method {of!r} in this survey; its methods are {', '.join(survey.methods)}.")
    counted = votes.counted()
    if not counted:
        reason = "nobody has answered yet" if not votes.votes else "all raters are excluded by the survey's rules"
        raise CoalaError(f"Found no vote to count: {reason}. Fix: serve the survey with `coala survey serve`.")
    remaining = {vote.rater for vote in counted}
    repeated = [one for one in votes.repeated if one.rater in remaining]
    excluded = Counter(reason for _, reason in votes.excluded)
    parts = _parts(survey, counted, draws, seed)
    return Results(
        title=survey.title,
        methods=survey.methods,
        of=of,
        attendance=votes.attendance,
        excluded=dict(sorted(excluded.items())),
        n_changed=n_changed,
        parts=parts,
        everybody=_parts(survey, votes.votes, 0, seed) if excluded else parts,
        questions=_questions(survey, counted, of, draws, seed),
        positions=_positions(survey, counted),
        # Of all raters who saw one, as those who fail are the ones left out.
        checks_passed=_share([c.passed for c in votes.checked], [c.rater for c in votes.checked], "checks passed"),
        repeats_same=_share([r.same for r in repeated], [r.rater for r in repeated], "repeats answered alike"),
        repeats_by_chance=_chance(survey, counted, [one.question for one in repeated]),
        seconds=_median(counted, draws, seed, by_rater=True),
        remarks=tuple(_remarks(survey, votes, counted)),
    )


# --- parts -------------------------------------------------------------------------------------------------------


def _parts(survey: Survey, votes: Sequence[Vote], draws: int, seed: int) -> tuple[Part, ...]:
    by_category = {
        category: [vote for vote in votes if survey.questions[vote.question].category == category]
        for category in survey.categories
    }
    parts = [_part(survey, name, some, draws, seed) for name, some in by_category.items() if some]
    if len(parts) > 1:
        parts.append(_part(survey, ALL, votes, draws, seed))
    return tuple(parts)


def _part(survey: Survey, name: str, votes: Sequence[Vote], draws: int, seed: int) -> Part:
    raters, questions = np.array([vote.rater for vote in votes]), np.array([vote.question for vote in votes])
    chosen = [survey.methods[vote.method] for vote in votes]
    n_raters = len(set(raters.tolist()))
    rates = []
    for method in survey.methods:
        x = (np.array(chosen) == method).astype(float)
        share = float(x.mean())
        about = f"share of votes, Wald 95 % with the {n_raters} raters as n (Eq. 10 of the COALA paper)"
        rates.append(
            Rate(
                method,
                int(x.sum()),
                Estimate(share, *wald(share, n_raters, PUBLISHED_Z), n_raters, about),
                share_estimate(x, raters, "share of votes, over raters"),
                share_estimate(x, questions, "share of votes, over questions"),
                two_way_share(x, raters, questions, "share of votes, over both"),
            )
        )
    pairs = list(combinations(survey.methods, 2))
    by_rater = adjusted([vote_difference(chosen, a, b, raters.tolist()) for a, b in pairs])
    by_both = adjusted([two_way_difference(chosen, a, b, raters, questions) for a, b in pairs])
    alpha, kappa = _agreement(votes, len(survey.methods), draws, seed) if draws else (None, None)
    return Part(
        name,
        len(votes),
        n_raters,
        len(set(questions.tolist())),
        tuple(rates),
        tuple(map(MethodDifference, by_rater, by_both)),
        alpha,
        kappa,
    )


def _agreement(votes: Sequence[Vote], m: int, draws: int, seed: int) -> tuple[Estimate | None, Estimate | None]:
    """Krippendorff's alpha where any question has two votes; Fleiss' kappa where all have as many."""
    by_question: dict[int, list[int]] = {}
    for vote in votes:
        by_question.setdefault(vote.question, []).append(vote.method)
    ratings = list(by_question.values())
    if max(map(len, ratings)) < 2:
        return None, None
    alpha = krippendorff_alpha(ratings, draws=draws, seed=seed)
    if len(set(map(len, ratings))) > 1:
        return alpha, None
    return alpha, fleiss_kappa([np.bincount(some, minlength=m) for some in ratings], draws=draws, seed=seed)


def _questions(survey: Survey, votes: Sequence[Vote], of: str, draws: int, seed: int) -> tuple[QuestionResult, ...]:
    others = [method for method in survey.methods if method != of]
    found: dict[str, list[QuestionResult]] = {category: [] for category in survey.categories}
    for number, question in enumerate(survey.questions):
        some = [vote for vote in votes if vote.question == number]
        if not some:
            continue
        chosen = np.array([survey.methods[vote.method] for vote in some])
        counts = {method: int((chosen == method).sum()) for method in survey.methods}
        against = [
            replace(multinomial_difference(counts[of], counts[other], len(some)), first=of, second=other)
            for other in others
        ]
        found[question.category].append(
            QuestionResult(
                question.prompt_id,
                question.category,
                question.prompt,
                len(some),
                {method: share_estimate(chosen == method, name="share of votes") for method in survey.methods},
                tuple(against),
                _median(some, min(draws, 200), seed, by_rater=False),
            )
        )
    rows = []
    for category in found.values():
        together = iter(adjusted([one for question in category for one in question.against]))
        rows += [replace(question, against=tuple(next(together) for _ in question.against)) for question in category]
    return tuple(rows)


# --- the quality of the votes ------------------------------------------------------------------------------------


def _positions(survey: Survey, votes: Sequence[Vote]) -> tuple[Estimate, ...]:
    """Share of votes for each place on the page; with balanced orders 1/M each, unless raters favour a place."""
    place, raters = np.array([vote.position for vote in votes]), [vote.rater for vote in votes]
    return tuple(
        share_estimate(place == i, raters, f"share of votes for place {i + 1}") for i in range(len(survey.methods))
    )


def _share(values: Sequence[bool], raters: Sequence[int], name: str) -> Estimate | None:
    return share_estimate(np.array(values, dtype=float), list(raters), f"share of {name}") if values else None


def _chance(survey: Survey, votes: Sequence[Vote], repeated: Sequence[int]) -> float | None:
    """Share of repeats two different raters would answer alike: sum of squared shares of each repeated question."""
    if not repeated:
        return None
    squares = {}
    for question in set(repeated):
        counts = np.bincount([v.method for v in votes if v.question == question], minlength=len(survey.methods))
        squares[question] = float(np.square(counts / counts.sum()).sum())
    return float(np.mean([squares[question] for question in repeated]))


def _median(votes: Sequence[Vote], draws: int, seed: int, *, by_rater: bool) -> Estimate | None:
    known = [vote for vote in votes if vote.seconds is not None]
    if not known:
        return None
    seconds = np.array([vote.seconds for vote in known], dtype=float)
    statistic: Callable[[NDArray[np.intp]], float] = lambda rows: float(np.median(seconds[rows]))  # noqa: E731
    groups = [vote.rater for vote in known] if by_rater else None
    name = "median seconds from a page to its answer"
    return bootstrap(statistic, len(known), groups, draws=draws, seed=seed, name=name)


def _remarks(survey: Survey, votes: Votes, counted: Sequence[Vote]) -> list[str]:
    remarks = list(survey.remarks)
    here = votes.attendance
    if here.finished < here.began:
        remarks.append(f"{here.began - here.finished} of {here.began} raters did not finish; the votes they gave count")
    unseen = len(survey.questions) - len({vote.question for vote in counted})
    if unseen:
        remarks.append(f"{unseen} of {len(survey.questions)} questions have no counted vote")
    if len({vote.rater for vote in counted}) < 2:
        remarks.append("the votes are of one rater: intervals over raters are vacuous")
    return remarks
