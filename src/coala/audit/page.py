"""An audit as rows of a terminal, as JSON by name, and as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from coala.audit.comparisons import ALL, BAG
from coala.audit.measure import FEATURES, SHUFFLED, Audit, Cue, CueExample, Part
from coala.pages.parts import Part as PagePart
from coala.pages.parts import Table, aside, bar, beneath, facts, listing, page, section, sides, titled
from coala.pages.words import bracketed
from coala.values import Estimate

LONGEST = 600  # characters of a text that are shown
CUE_HEAD = ("sees only", "picked right, %", "ties, %")
SYSTEM_HEAD = (
    *("system", "right, %", "ties, %", "where cues are right, %", "where wrong, %", "at even cues, %"),
    *("of its lead, %", "with the cues, %", "beyond them, %"),
)
# What a subset is shown by: these rules, and the classifiers that see all.
_SHOWN = (ALL, "longer", "shorter", "more markdown", "more list items", "refuses", "shown first", "likelier", BAG)


def render(audit: Audit, title: str) -> str:
    """The page; every text of the data is escaped."""
    leaks = " and leaks" if any(name.startswith("leaks") for name in audit.counts) else ""
    chance = f"{100 * audit.whole.chance:.1f} %"
    rules = [one for one in audit.cues if not one.fitted]
    fitted = [one for one in audit.cues if one.fitted]
    return page(
        title,
        "COALA audit",
        section("In short", listing(audit.verdicts, "conclusions"), *map(aside, audit.remarks)),
        section(
            "What cues alone pick right",
            aside(
                f"Per cent of {audit.whole.n:,} items with 95 % interval clustered by group; replies that share the "
                f"top count their share of right ones. The line marks chance, {chance}."
            ),
            titled("Rules, nothing fitted", _cue_table("Rules", rules, audit.whole.chance)),
            titled(
                "Classifiers that see only this",
                aside("Logistic regression on differences of replies, five folds by group, ridge chosen within."),
                _cue_table("Classifiers", fitted, audit.whole.chance),
            ),
        ),
        section(
            "By subset",
            aside("Classifiers are those of the whole set, tested out of fold. Per cent with 95 % interval."),
            Table("By subset", subset_head(audit), _narrow(subset_rows(audit))),
        )
        if audit.parts
        else None,
        section(
            "Systems compared with the cues",
            aside(
                "Right: by the system's score alone, a tie its share of right ones (leaderboards count it as wrong); "
                "the same where the model of all cues is right, and wrong, out of fold. At even cues: weighed so that "
                "the cues are right as often as chance; of its lead: what is left there of what the score has above "
                "chance. With the cues: a logistic model of cues and score, out of fold; beyond them: the share of the "
                "score's information, in nats, that the cues do not hold."
            ),
            Table("Systems compared with the cues", SYSTEM_HEAD, _narrow(system_rows(audit))),
        )
        if audit.systems
        else None,
        section("How right and wrong replies differ", *_styles(audit)),
        section(
            f"Repeats{leaks}",
            aside("Nearly the same: Jaccard similarity of three-word runs of 0.8 and more, between different groups."),
            facts("Repeats", ((name, f"{n:,}") for name, n in audit.counts.items())),
        ),
        section(
            "What cues give away most plainly",
            *map(_example, audit.examples),
            None if audit.examples else aside("None: the cues rank no pair right."),
        ),
        facts=[f"{audit.whole.n:,} items in {audit.n_groups:,} groups", f"chance {chance}"],
    )


def cue_rows(audit: Audit) -> list[list[str]]:
    """A row for each cue: what it alone picks right with its interval, and how often it is tied, in per cent."""
    return [[_name(one), bracketed(one.accuracy), f"{100 * one.tied:.1f}"] for one in audit.cues]


def subset_head(audit: Audit) -> list[str]:
    """The head of :func:`subset_rows`."""
    return ["subset", "n", "chance, %", *_named(audit)]


def subset_rows(audit: Audit) -> list[list[str]]:
    """A row for each subset: its items, chance, and the chief rules and classifiers in per cent."""
    return [
        [part.name, f"{part.n:,}", f"{100 * part.chance:.1f}", *(_cell(part, name) for name in _named(audit))]
        for part in audit.parts
    ]


def system_rows(audit: Audit) -> list[list[str]]:
    """A row for each system, as :data:`SYSTEM_HEAD` names its cells."""
    return [
        [
            one.name,
            bracketed(one.accuracy),
            f"{100 * one.tied:.1f}",
            *(f"{bracketed(value)} of {value.n:,}" for value in (one.along, one.against)),
            bracketed(one.even),
            bracketed(one.survives, ".0f"),
            bracketed(one.with_cues),
            bracketed(one.beyond, ".0f"),
        ]
        for one in audit.systems
    ]


def audit_summary(audit: Audit) -> dict[str, Any]:
    """The figures of an audit by name."""
    return {
        "items": audit.whole.n,
        "comparisons": audit.n_comparisons,
        "groups": audit.n_groups,
        **_part(audit.whole),
        "subsets": {part.name: {"items": part.n, **_part(part)} for part in audit.parts},
        "systems": {one.name: vars(one) for one in audit.systems},
        "context_gain": audit.context_gain,
        "features_gain": audit.features_gain,
        "chosen_has_more": {one.name: one.chosen_has_more for one in audit.styles},
        "counts": dict(audit.counts),
        "verdicts": list(audit.verdicts),
        "remarks": list(audit.remarks),
    }


def _part(part: Part) -> dict[str, Any]:
    return {
        "chance": part.chance,
        "rules": {one.name: one.accuracy for one in part.cues if not one.fitted},
        "cues": {one.name: one.accuracy for one in part.cues if one.fitted},
        "ties": {one.name: one.tied for one in part.cues},
    }


def _named(audit: Audit) -> list[str]:
    there = {one.name for one in audit.cues}
    return [name for name in _SHOWN if name in there]


def _cell(part: Part, name: str) -> str:
    return bracketed(part.cue(name).accuracy)


def _narrow(rows: Sequence[Sequence[str]]) -> list[list[PagePart]]:
    """Rows with intervals below their values, for a page that is narrower than a terminal."""
    return [
        [beneath(value, f"[{ends}" if ends else "") for value, _, ends in (cell.partition(" [") for cell in row)]
        for row in rows
    ]


def _name(one: Cue) -> str:
    return f"{one.name} (for comparison)" if one.name in (SHUFFLED, FEATURES) else one.name


def _cue_table(caption: str, cues: Sequence[Cue], chance: float) -> Table:
    return Table(
        caption,
        ("picks" if caption == "Rules" else CUE_HEAD[0], CUE_HEAD[1], "", CUE_HEAD[2]),
        [(_name(one), *_shown(one.accuracy, chance), f"{100 * one.tied:.1f}") for one in cues],
    )


def _styles(audit: Audit) -> tuple[PagePart, ...]:
    return (
        aside(
            "Means (lengths and counts as log(1 + n), words and marks as shares of replies), and of the comparisons "
            "that differ the share in which the right reply has more."
        ),
        Table(
            "How right and wrong replies differ",
            ("", "right", "wrong", "right has more, %", "", "comparisons that differ"),
            [
                (
                    one.name,
                    f"{one.chosen:.2f}",
                    f"{one.rejected:.2f}",
                    *_shown(one.chosen_has_more, 0.5),
                    f"{one.chosen_has_more.n:,}",
                )
                for one in sorted(audit.styles, key=lambda one: -abs(one.chosen_has_more.value - 0.5))
            ],
        ),
    )


def _shown(estimate: Estimate, chance: float) -> tuple[str, Markup]:
    """An estimate in per cent with its interval, and the interval drawn."""
    return bracketed(estimate), bar(estimate.low, estimate.value, estimate.high, chance)


def _example(one: CueExample) -> Markup:
    because = aside(f"margin {one.margin:.1f}, mostly by {', '.join(one.because) or 'its first word'}")
    return sides(_cut(one.prompt), {name: (name, _cut(getattr(one, name))) for name in ("chosen", "rejected")}, because)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else "... " + text[-LONGEST:]
