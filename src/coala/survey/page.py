"""The results as one HTML page; nothing is computed here."""

from __future__ import annotations

import math

from markupsafe import Markup

from coala.pages.parts import (
    Part,
    Table,
    aside,
    bar,
    beneath,
    details,
    element,
    facts,
    facts_line,
    joined,
    listing,
    page,
    section,
    titled,
)
from coala.pages.words import Interval
from coala.statistics.votes import Contrast
from coala.survey.form import said_text
from coala.survey.results import Part as Category
from coala.survey.results import QuestionResult, Results
from coala.values import Estimate

MINUS = "\N{MINUS SIGN}"
MEASURES = ("Measure", "Value (95 % interval)", "How")


def results_page(results: Results) -> str:
    """One self-contained page: no script, nothing fetched, the same bytes for the same results."""
    chance = 1 / len(results.methods)
    note = (
        "An interval over both lets raters and questions vary: what to expect from other people "
        "and other prompts of the same kind. p-values are adjusted for all pairs of methods of a category."
    )
    return page(
        results.title,
        "COALA survey",
        section("In short", listing(verdicts(results), "conclusions"), aside(note), name="short"),
        *(_category(part, chance, f"part{number}") for number, part in enumerate(results.parts, 1)),
        section("Can the votes be trusted?", *_quality(results, chance), name="quality"),
        section("Question by question", _questions(results), name="each"),
        section("Remarks", listing(results.remarks, "conclusions"), name="remarks"),
        facts=[
            f"{max(part.n_raters for part in results.parts)} raters counted",
            f"{len(results.questions)} questions",
            f"{max(part.n_votes for part in results.parts):,} votes counted",
        ],
        footer="All values on this page, with more digits, are in results.json next to it.",
        tab=f"{results.title} \N{EN DASH} results",
    )


def _category(part: Category, chance: float, name: str) -> Part:
    rates = [
        element(
            "div",
            element("p", rate.method, class_="rate-name"),
            element("div", bar(rate.over_both.low, rate.over_both.value, rate.over_both.high, chance)),
            element("p", percent(rate.over_both), class_="rate-value"),
            class_="rate",
        )
        for rate in part.rates
    ]
    intervals = Table(
        f"Win rates and their intervals, {part.name}",
        ("Method", "Votes", "Share", "Over both", "Over raters", "Over questions", "As published (Wald)"),
        [
            (
                rate.method,
                str(rate.votes),
                f"{100 * rate.over_both.value:.1f} %",
                *map(_ends, (rate.over_both, rate.over_raters, rate.over_questions, rate.published)),
            )
            for rate in part.rates
        ],
        f"As published: share \N{PLUS-MINUS SIGN} 1.96 \N{SQUARE ROOT}(share (1 {MINUS} share) / {part.n_raters}), the "
        "raters as n. It counts each rater as one vote and ignores the questions.",
    )
    differences = Table(
        f"Differences between methods, {part.name}",
        ("Methods", "Over both, points", "Holm", "Over raters, points", "Holm"),
        [
            (
                f"{one.over_both.first} {MINUS} {one.over_both.second}",
                *_contrast(one.over_both),
                *_contrast(one.over_raters),
            )
            for one in part.differences
        ],
        "Marked rows differ by more than chance, over both.",
        marked=[place for place, one in enumerate(part.differences) if one.over_both.adjusted < 0.05],
    )
    agreement = [
        (name, f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})", _how(found))
        for name, found in (("Krippendorff's alpha", part.alpha), ("Fleiss' kappa", part.kappa))
        if found and part.alpha
    ]
    return section(
        part.name,
        facts_line([f"{part.n_raters} raters", f"{part.n_questions} questions", f"{part.n_votes:,} votes"]),
        element("div", joined(rates), class_="rates"),
        aside(
            "Scale from 0 to 100 %, interval over raters and questions; the thin line is an equal share, "
            f"{100 * chance:.1f} %."
        ),
        details("Every interval", intervals, opened=True),
        titled("Differences", differences),
        titled("Agreement of raters", Table(f"Agreement, {part.name}", MEASURES, agreement, kind="measures")),
        name=name,
    )


def _quality(results: Results, chance: float) -> list[Part]:
    here = results.attendance
    left_out = "; ".join(f"{n}: {reason}" for reason, n in results.excluded.items()) or "nobody"
    rows: list[tuple[str, str, str]] = []
    if results.checks_passed:
        rows.append(
            ("Attention checks passed, all raters", percent(results.checks_passed), _how(results.checks_passed))
        )
    if results.repeats_same:
        by_chance = f"two different raters: {100 * (results.repeats_by_chance or 0):.1f} %; "
        rows.append(
            ("Repeated questions answered alike", percent(results.repeats_same), by_chance + _how(results.repeats_same))
        )
    if results.seconds:
        rows.append(("Median time per question", seconds(results.seconds), _how(results.seconds)))
    for place, one in enumerate(results.positions, 1):
        rows.append((f"Chose place {place} on the page", percent(one), _how(one)))
    shown = [(part.name, *(percent(rate.over_both) for rate in part.rates)) for part in results.everybody]
    everybody = Table("Win rates with nobody excluded", ("Part", *results.methods), shown)
    return [
        facts(
            "Raters",
            [
                ("Raters who gave a vote", f"{here.answered}, of {here.began} who began; {here.finished} finished"),
                ("Withdrawn, data deleted", str(here.withdrawn)),
                ("Excluded by the rules", left_out),
                ("Answers changed by raters", str(results.n_changed)),
            ],
        ),
        Table("Quality of the votes", MEASURES, rows, kind="measures"),
        aside(
            "Each method is shown equally often in each place, so a preference for a place adds noise and "
            f"favours no method. Without it each place has {100 * chance:.1f} %."
        ),
        titled("With nobody excluded", everybody) if results.excluded else None,
    ]


def _questions(results: Results) -> Table:
    return Table(
        "Votes by question",
        ("Prompt", *results.methods, "Votes", "Median time"),
        [_question(one) for one in results.questions],
        "Wilson intervals; every vote on a question is of another rater. * differs from "
        f"{results.of} on this question by more than chance (multinomial difference, Holm over the category).",
    )


def _question(found: QuestionResult) -> list[Part]:
    ahead = {one.second for one in found.against if one.adjusted < 0.05}
    prompt = said_text(found.prompt)
    prompt = prompt if len(prompt) <= 90 else prompt[:87].rsplit(" ", 1)[0] + "..."
    shares = [
        beneath(
            Markup("<strong>{:.0f} %</strong>{}").format(100 * share.value, "*" if method in ahead else ""),
            f"{100 * share.low:.0f} to {100 * share.high:.0f}",
        )
        for method, share in found.shares.items()
    ]
    median = f"{found.seconds.value:.1f} s" if found.seconds else "\N{EN DASH}"
    return [beneath(element("span", prompt, dir="auto"), found.category), *shares, str(found.n), median]


def verdicts(results: Results) -> list[str]:
    """What can be said of each category in a sentence."""
    said = []
    for part in results.parts:
        rates = sorted(part.rates, key=lambda rate: -rate.over_both.value)
        best, second = rates[0], rates[1]
        contrast = next(
            d.over_both
            for d in part.differences
            if {d.over_both.first, d.over_both.second} == {best.method, second.method}
        )
        head = f"{part.name}: {best.method} has the most votes, {percent(best.over_both)}"
        if contrast.adjusted < 0.05:
            said.append(f"{head}; its lead over {second.method} is more than chance ({p_value(contrast.adjusted)}).")
        else:
            said.append(f"{head}; that it leads {second.method} may be chance ({p_value(contrast.adjusted)}).")
    # A number and its unit stay on one line.
    return [sentence.replace(" %", "\u00a0%").replace("p = ", "p\u00a0=\u00a0") for sentence in said]


def percent(found: Estimate) -> str:
    """``39.1 % (35.0 to 43.4 %)``; a published interval may leave [0, 1], and is shown as it is."""
    return Interval(found).percent()


def points(found: Estimate) -> str:
    """``+10.3 points (+2.1 to +18.4)``."""
    return Interval(found).percent(points=True)


def seconds(found: Estimate) -> str:
    """``12.4 s (10.1 to 15.0)``."""
    ends = f"({found.low:.1f} to {found.high:.1f})" if math.isfinite(found.low + found.high) else "(no interval)"
    return f"{found.value:.1f} s {ends}"


def p_value(p: float) -> str:
    if math.isnan(p):
        return "p unknown"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _ends(found: Estimate) -> str:
    return f"{100 * found.low:.1f} to {100 * found.high:.1f}"


def _contrast(found: Contrast) -> tuple[str, str]:
    one = found.difference
    return f"{100 * one.value:+.1f} ({100 * one.low:+.1f} to {100 * one.high:+.1f})", p_value(found.adjusted)


def _how(found: Estimate) -> str:
    return f"n = {found.n:,}; {found.method}"
