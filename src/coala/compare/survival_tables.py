"""Tables of what survives of a teacher, as rows of text; computes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coala.compare.survival import MEASURES
from coala.compare.tables import percent
from coala.pages.parts import Table
from coala.pages.words import UNKNOWN, bracketed, flops


def kept(place: Mapping[str, Any]) -> Table | None:
    """The share of its teacher's gain that each policy keeps."""
    found = [one for one in place["survival"] if one["teacher"]]
    if not found:
        return None
    chosen = {row["label"]: _chosen(row) for row in place["methods"]}
    rows = [
        (one["of"], chosen[one["of"]], one["teacher"], bracketed(one["retention"]), one["why"] or UNKNOWN)
        for one in found
    ]
    return Table(
        "How much of the teacher's gain is kept",
        ("policy", "chosen on held-out prompts", "teacher", "kept, % [95 %]", "why unknown"),
        rows,
        "(wins of the policy - 1/2) / (wins of its teacher - 1/2), both against the start on the same prompts; "
        "bootstrap over prompts.",
    )


def _chosen(row: Mapping[str, Any]) -> str:
    found = {**row["chosen"], "rate": row["rate"]}
    return ", ".join(f"{name} {value:.3g}" for name, value in found.items() if value is not None) or UNKNOWN


def met(place: Mapping[str, Any]) -> Table | None:
    """Wins at DPO's own KL and perplexity."""
    found = [(one["of"], at) for one in place["survival"] for at in one["at"]]
    if not found:
        return None
    return Table(
        "At what DPO spends",
        ("policy", "at", "wins, % [95 %]", "minus DPO, points [95 %]", "why unknown"),
        [
            (
                name,
                f"{MEASURES[at['measure']]} of {at['dpo']}: {at['value']:.3g}",
                bracketed(at["wins"]),
                bracketed(at["difference"], "+.1f"),
                at["why"] or UNKNOWN,
            )
            for name, at in found
        ],
        "Linear between the strengths that were measured, the start at strength 0 among them; nothing is "
        "extrapolated. Perplexity is under the start, as a multiple of its own. Bootstrap over prompts, the same of "
        "both.",
    )


def dial(place: Mapping[str, Any]) -> Table | None:
    """Every policy at every strength that was measured."""
    found = [(one["of"], at) for one in place["survival"] for at in one["dial"]]
    if not found:
        return None
    return Table(
        "Weaker and stronger",
        ("policy", "strength", "wins, % [95 %]", "KL a reply, nats", "perplexity, times the start's"),
        [
            (
                name,
                f"{at['strength']:g}",
                bracketed(at["wins"]),
                bracketed(at["kl"], ".3g", 1),
                bracketed(at["perplexity"], ".3g", 1),
            )
            for name, at in found
        ],
    )


def spent(place: Mapping[str, Any]) -> Table | None:
    """FLOPs of replies, states and fit beside DPO's."""
    found = [one for one in place["survival"] if one["flops"] is not None]
    if not found:
        return None
    labels = list(dict.fromkeys(label for one in found for label in one["flops"]["of"]))
    names = ("replies", "states", "fit", "search", "whole")
    return Table(
        "FLOPs of a policy, by formula",
        ("policy", "teacher's replies", "their states", "fit", "search", "all", *(f"of {label}" for label in labels)),
        [
            (
                one["of"],
                *(flops(one["flops"][name]) for name in names),
                *(percent(one["flops"]["of"].get(label)) for label in labels),
            )
            for one in found
        ],
        "Two per multiply-add of matrix products. Of DPO: the run and its training at all rates that were tried. The "
        "teacher's head is not among them: its features and fit are listed with the others.",
    )
