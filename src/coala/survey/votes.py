"""From raters' records to votes for methods: here positions become methods, and rules say whose votes count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from coala.survey.form import Survey
from coala.survey.records import Rater
from coala.values import CoalaError


@dataclass(frozen=True)
class Vote:
    """One rater's choice at one question; ``seconds`` since the page was first shown, if that is known."""

    rater: int
    question: int
    method: int
    position: int
    seconds: float | None


@dataclass(frozen=True)
class Repeated:
    """A question answered twice by one rater; ``same`` method both times."""

    rater: int
    question: int
    same: bool


@dataclass(frozen=True)
class Checked:
    """An attention check answered."""

    rater: int
    check: int
    passed: bool


@dataclass(frozen=True)
class Attendance:
    """How many raters there are in each state; ``answered`` gave at least one vote, ``withdrawn`` left no data."""

    invited: int
    began: int
    answered: int
    finished: int
    withdrawn: int


@dataclass(frozen=True)
class Votes:
    """All votes, checks and repeats of all raters, and who is excluded by the survey's rules, with the reason."""

    votes: tuple[Vote, ...]
    repeated: tuple[Repeated, ...]
    checked: tuple[Checked, ...]
    excluded: tuple[tuple[int, str], ...]
    attendance: Attendance

    def counted(self) -> tuple[Vote, ...]:
        """The votes of raters who are not excluded."""
        out = {rater for rater, _ in self.excluded}
        return tuple(vote for vote in self.votes if vote.rater not in out)


def read_votes(survey: Survey, raters: Sequence[Rater]) -> Votes:
    """Votes of ``raters``. A repeat is no vote: it only tells how steady a rater is.

    Raters who did not finish keep the votes they gave; the rules for exclusion are those fixed in the survey.
    """
    votes: list[Vote] = []
    repeated: list[Repeated] = []
    checked: list[Checked] = []
    excluded: list[tuple[int, str]] = []
    for rater in raters:
        chosen: dict[int, int] = {}
        own: list[Vote] = []
        failed = checks = 0
        # In the order of pages, so that a question comes before its repeat.
        for page in sorted(rater.choices):
            if page >= len(rater.pages) or not 0 <= rater.choices[page] < len(rater.pages[page].order):
                raise CoalaError(
                    f"Rater {rater.id} has an answer to page {page + 1} that this page does not offer: the file of "
                    "answers was changed by something else. Fix: restore a backup."
                )
            item, position = rater.pages[page], rater.choices[page]
            answer = item.order[position]
            if item.kind == "question":
                chosen[item.index] = answer
                own.append(Vote(rater.id, item.index, answer, position, rater.seconds.get(page)))
            elif item.kind == "repeat":
                repeated.append(Repeated(rater.id, item.index, chosen[item.index] == answer))
            else:
                checks += 1
                passed = answer == survey.checks[item.index].right
                failed += not passed
                checked.append(Checked(rater.id, item.index, passed))
        votes += own
        if not own:
            continue
        spent = [vote.seconds for vote in own if vote.seconds is not None]
        if failed > survey.max_failed_checks:
            allowed = survey.max_failed_checks
            excluded.append((rater.id, f"failed {failed} of {checks} attention checks, at most {allowed} allowed"))
        elif spent and median(spent) < survey.min_seconds:
            excluded.append((rater.id, f"median below {survey.min_seconds:g} s per question"))
    begun = [rater for rater in raters if rater.began and not rater.withdrawn]
    attendance = Attendance(
        invited=sum(not rater.began and not rater.withdrawn for rater in raters),
        began=len(begun),
        answered=len({vote.rater for vote in votes}),
        finished=sum(rater.next_page is None for rater in begun),
        withdrawn=sum(rater.withdrawn for rater in raters),
    )
    return Votes(tuple(votes), tuple(repeated), tuple(checked), tuple(excluded), attendance)
