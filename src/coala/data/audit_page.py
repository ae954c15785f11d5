"""An audit as one HTML page that needs nothing else."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from coala.data.audit import FEATURES, SHUFFLED, Audit, CueExample
from coala.pages.parts import Table, aside, bar, facts, listing, page, section, sides
from coala.pages.words import bracketed
from coala.values import Estimate

LONGEST = 600  # characters of a text that are shown


def render(audit: Audit, title: str) -> str:
    """The page; every text of the data is escaped."""
    leaks = " and leaks" if "leaks: pairs of the other split" in audit.counts else ""
    return page(
        title,
        "COALA data audit",
        section("In short", listing(audit.verdicts, "conclusions")),
        section(
            "What cues alone rank right",
            aside(
                "Logistic regression on the difference of the two replies, five folds by group, ridge chosen within; "
                "per cent with 95 % interval clustered by group, a tie counting one half. The line marks one half."
            ),
            Table(
                "What cues alone rank right",
                ("sees only", "ranked right, %", "", "ties, %"),
                [
                    (
                        Markup("{} <small>(for comparison)</small>").format(cue.name)
                        if cue.name in (SHUFFLED, FEATURES)
                        else cue.name,
                        *_shown(cue.accuracy),
                        f"{100 * cue.tied:.1f}",
                    )
                    for cue in audit.cues
                ],
            ),
        ),
        section(
            "How chosen and rejected replies differ",
            aside(
                "Means (lengths as log(1 + n), words and marks as shares of replies), and of the pairs that differ the "
                "share in which the chosen reply has more."
            ),
            Table(
                "How chosen and rejected replies differ",
                ("", "chosen", "rejected", "chosen has more, %", "", "pairs that differ"),
                [
                    (
                        one.name,
                        f"{one.chosen:.2f}",
                        f"{one.rejected:.2f}",
                        *_shown(one.chosen_has_more),
                        f"{one.chosen_has_more.n:,}",
                    )
                    # A column in which no pair differs says nothing.
                    for one in sorted(audit.styles, key=lambda one: -abs(one.chosen_has_more.value - 0.5))
                    if one.chosen_has_more.n
                ],
            ),
        ),
        section(
            f"Repeats{leaks}",
            aside("Nearly the same: Jaccard similarity of three-word runs of 0.8 and more, between different groups."),
            facts("Repeats", ((name, f"{n:,}") for name, n in audit.counts.items())),
        ),
        section(
            "The pairs that cues give away most plainly",
            *map(_example, audit.examples),
            None if audit.examples else aside("None: the cues rank no pair right."),
        ),
        facts=[f"{audit.n_pairs:,} pairs in {audit.n_groups:,} groups"],
    )


def cue_rows(audit: Audit) -> list[list[str]]:
    """A row for each cue: how often it alone ranks a pair right, with its interval, and how often it is tied."""
    return [
        [
            cue.name,
            f"{cue.accuracy.value:.3f}",
            f"[{cue.accuracy.low:.3f}, {cue.accuracy.high:.3f}]",
            f"{cue.tied:.3f}",
        ]
        for cue in audit.cues
    ]


def audit_summary(audit: Audit) -> dict[str, Any]:
    """The figures of an audit by name."""
    return {
        "pairs": audit.n_pairs,
        "groups": audit.n_groups,
        "cues": {cue.name: cue.accuracy for cue in audit.cues},
        "ties": {cue.name: cue.tied for cue in audit.cues},
        "context_gain": audit.context_gain,
        "features_gain": audit.features_gain,
        "chosen_longer": next(one.chosen_has_more for one in audit.styles if one.name == "characters"),
        "counts": dict(audit.counts),
    }


def _shown(estimate: Estimate) -> tuple[str, Markup]:
    """An estimate in per cent with its interval, and the interval drawn."""
    return bracketed(estimate), bar(estimate.low, estimate.value, estimate.high)


def _example(one: CueExample) -> Markup:
    because = aside(f"margin {one.margin:.1f}, mostly by {', '.join(one.because)}")
    return sides(_cut(one.prompt), {name: (name, _cut(getattr(one, name))) for name in ("chosen", "rejected")}, because)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else "... " + text[-LONGEST:]
