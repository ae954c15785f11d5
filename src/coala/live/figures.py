"""What can be said of a session, in sentences: what is measured with its interval, what is proved, what is guessed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from coala.convex.questions import UNSETTLED, Outlook
from coala.live.session import Session
from coala.pages.words import Interval
from coala.pages.words import seconds as in_words
from coala.statistics.anytime import running_mean
from coala.values import Estimate

ENOUGH = 10  # clicks to learn from before anything is said of those to come


@dataclass(frozen=True)
class Figure:
    """A line of the page: what it is of, what is found, and how that is known."""

    name: str
    value: str
    how: str


def figures(session: Session) -> list[Figure]:
    """The lines of a session as it stands."""
    with session.lock:
        journal, learner = session.journal, session.learner
        verdicts = Counter(answer.verdict for answer in journal.answered.values())
        outcomes = journal.outcomes()
        n_fitted = 0 if learner is None else len(learner)
        gap, ridge_of = (0.0, 0) if learner is None else (learner.optimality.relative_gap, learner.ridge_of)
        ahead, undone = session.outlook, journal.undone
        n_waiting = len(journal.pairs(held_out=False)) - n_fitted
        scaled_by = session.scaled_by if learner is None else 0
        edited = sum(one.verdict == "edited" and journal.asked[one.id].held_out for one in journal.answered.values())
    # A click is taught once its features are there, and the first ones once the features' scale is settled.
    until = f"{scaled_by} replies are written" if scaled_by else "the edited reply is read"
    fitted = f"{n_fitted} to learn from" + (f" and {n_waiting} more once {until}" if n_waiting else "")
    held_out = f"{len(outcomes)} held out"
    if edited:
        # Their better reply is the rater's own, which no head had ordered before.
        held_out += f", {edited} held out and edited, which no accuracy counts"
    apart = [f"{verdicts['same']} the same", f"{verdicts['skip']} skipped", f"{undone} undone"]
    lines = [
        Figure(
            "Clicks",
            f"{sum(verdicts.values())}",
            f"{fitted}, {held_out}; {', '.join(apart)}",
        ),
        accuracy_figure(running_mean(outcomes)),
    ]
    if n_fitted:
        chosen = f"its ridge is chosen on the first {ridge_of}" if ridge_of else "its ridge is still the default"
        proved = (
            f"no other linear head fits these clicks better by more than {gap:.0e} of the objective (proved); {chosen}"
        )
        lines.append(Figure("Fit", "optimal", proved))
    if n_fitted >= ENOUGH and ahead is not None:
        lines.append(outlook_figure(ahead))
    return lines


def accuracy_figure(found: Estimate) -> Figure:
    """Held-out accuracy, and whether it is better than chance."""
    if not found.n:
        return Figure("Held-out accuracy", "unknown", "no held-out pair has been answered yet")
    if found.low > 0.5:
        said = "better than chance"
    elif found.high < 0.5:
        said = "worse than chance"
    else:
        said = "not shown to be better than chance"
    how = (
        f"{said}; n = {found.n} pairs never fitted, each scored by the head at that time. "
        "The interval is 95 %, however often you check."
    )
    return Figure("Held-out accuracy", Interval(found).percent(), how)


def outlook_figure(ahead: Outlook) -> Figure:
    """What more clicks are likely to change."""
    share = f"about {100 * ahead.now:.0f} % of pairs may still flip"
    needed = ahead.needed()
    if needed == 0:
        value = "more clicks are likely to change little"
    elif needed is None:
        value = f"more than {ahead.answers[-1]:,} clicks to settle the order"
    else:
        value = f"about {needed:,} more clicks to settle the order"
    how = (
        f"{share}; settled is {100 * UNSETTLED:.0f} %. A guess, assuming consistent raters whose "
        "preferences the model's states can express"
    )
    return Figure("What more clicks would change", value, how)


def waiting_for(session: Session, trouble: str, wait: tuple[float, float | None] | None) -> str:
    """Why there is no question now, in a sentence."""
    if trouble:
        return f"No reply is being sampled: {trouble} Clicks are safe; retrying."
    if wait is not None:
        so_far, left = wait
        if left is None:
            return f"Replies are being written, for {in_words(so_far)} so far; how long they take is not known yet."
        if left < 0:
            return f"Replies are being written; it takes longer than before ({in_words(so_far)} so far)."
        return f"Replies are being written: about {in_words(max(1.0, left))} more, at the pace so far."
    with session.lock:
        prompts = list(session.journal.prompts.values())
        drawing = bool(prompts) and session.work() is not None
        written = sum(session.pool.written.values())
    if not prompts:
        return "There is no prompt yet. Type one below."
    if drawing:
        return "Replies are about to be written."
    if written and not session.pool.replies:
        return "All replies of the model are empty. Other prompts may help."
    return "Every pair of these prompts has been answered. Type another prompt, or finish."
