"""An audit as one HTML page that needs nothing else; the template is ``audit.html`` beside this module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coala.data.audit import FEATURES, SHUFFLED, Audit
from coala.values import Estimate

LONGEST = 600  # characters of a text that are shown


def render(audit: Audit, title: str) -> str:
    """The page; every text of the data reaches it through Jinja's escaping."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "cut": _cut, "bar": _bar}
    return environment.get_template("audit.html").render(
        title=title,
        audit=audit,
        controls=(SHUFFLED, FEATURES),
        # A column in which no pair differs says nothing.
        styles=sorted(
            (one for one in audit.styles if one.chosen_has_more.n),
            key=lambda one: -abs(one.chosen_has_more.value - 0.5),
        ),
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


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _bar(estimate: Estimate) -> dict[str, str]:
    """Places of the interval and its value on a scale from 0 to 1, as CSS percentages."""
    low, high = max(0.0, estimate.low), min(1.0, estimate.high)
    return {
        "left": f"{100 * low:.2f}%",
        "width": f"{100 * (high - low):.2f}%",
        "at": f"{100 * min(1.0, max(0.0, estimate.value)):.2f}%",
    }


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else "... " + text[-LONGEST:]
