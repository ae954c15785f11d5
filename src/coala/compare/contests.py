"""What the methods that write come to in one place: their replies, contests on the same prompts, and what agrees.

From cell files to plain values, as :mod:`coala.compare.results`, which puts them into the content.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np

from coala.statistics.intervals import paired_difference, share_estimate
from coala.values import Estimate

# What of a method is held against what: by its rows' field, and in words.
MEASURES = {"accuracy": "ranking accuracy", "policy_accuracy": "policy accuracy", "win_rate": "wins"}


def writing_of(results: Sequence[Mapping[str, Any]], costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields of a row that tell of replies: of the first seed, whose replies every other method's stand beside."""
    first = results[0]
    seconds = sum(part["replies"]["measured"]["seconds"] for part in costs if "replies" in part)
    tokens = sum(part["replies"].get("tokens", 0) for part in costs if "replies" in part)
    return {
        "judge": first.get("judge"),
        "judge_scores": first.get("judge_scores"),
        "start_scores": first.get("start_scores"),
        "per_prompt": first.get("per_prompt"),
        "along": first.get("along") or [],
        "distinct": first.get("distinct"),
        "forwards": first.get("forwards"),
        "rules": first.get("rules"),
        "rules_kept": first.get("rules_kept"),
        "capability": first.get("capability"),
        "answered": first.get("answered"),
        "policy_accuracy": first.get("policy_accuracy"),
        "measured": {"ms_a_token": 1000 * seconds / tokens if tokens else None},
    }


def policy_told(row: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Whether a method is a policy whose likelihoods are known, and why they are not."""
    if row["policy_accuracy"] is not None:
        return "known" + (f"; {result['policy_note']}" if result.get("policy_note") else "")
    if row["kind"] == "base":
        return "the start itself"
    return str(result.get("policy_unknown") or "writes nothing")


def put_start_scores(rows: Sequence[dict[str, Any]]) -> None:
    """The start's scores by a head that judges, which was not there when the start was written."""
    scores = next((row["start_scores"] for row in rows if row["start_scores"]), None)
    for row in rows:
        if row["kind"] == "base" and row["per_prompt"] and not row["judge_scores"]:
            row["judge_scores"] = scores


def put_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Perplexities as multiples of the unguided start's; intervals combined on the logarithm's scale."""
    base = next((row["perplexity"] for row in rows if row["kind"] == "base" and row["perplexity"]), None)
    for row in rows:
        mine = row["perplexity"]
        row["perplexity_ratio"] = None if base is None or mine is None else _ratio(mine, base)


def _ratio(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    value = ours["value"] / theirs["value"]

    def reach(*sides: float) -> float:
        return math.hypot(*(math.log(max(side, 1.0)) for side in sides))

    up = reach(ours["high"] / ours["value"], theirs["value"] / theirs["low"])
    down = reach(ours["value"] / ours["low"], theirs["high"] / theirs["value"])
    how = "ratio of two perplexities, their 95 % intervals combined on the log scale"
    return asdict(Estimate(value, value * math.exp(-down), value * math.exp(up), ours["n"], how))


def main_writer(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """COALA's way to write: the first guided method, else the first head that guides."""
    guided = [row for row in rows if row["judge_scores"] and (row["kind"] == "guided" or row["convex"])]
    return next((row for row in guided if row["kind"] == "guided"), guided[0] if guided else None)


def contests(rows: Sequence[Mapping[str, Any]], group: Sequence[str]) -> list[dict[str, Any]]:
    """Every other method that writes against COALA's guidance: the share of prompts where the judge scores it higher.

    A tie counts one half; prompts of one group are one cluster.
    """
    ours = main_writer(rows)
    told = []
    for row in rows:
        if ours is None or row is ours or not row["judge_scores"]:
            continue
        a, b = np.array(row["judge_scores"]), np.array(ours["judge_scores"])
        wins = (a > b) + 0.5 * (a == b)
        estimate = share_estimate(wins, group, "share of prompts won, a tie one half")
        told.append(
            {
                "of": row["label"],
                "against": ours["label"],
                "kind": row["kind"],
                "mode": row["mode"],
                "wins": asdict(estimate),
            }
        )
    return told


def capability_changes(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every method's share of questions answered minus the start's, paired over the questions."""
    base = next((row for row in rows if row["kind"] == "base" and row["answered"]), None)
    if base is None:
        return []
    return [
        {"of": row["label"], "difference": asdict(paired_difference(row["answered"], base["answered"]))}
        for row in rows
        if row["answered"] and row is not base
    ]


def agreement(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Kendall's tau-b over the methods of a place, of each two of ranking accuracy, policy accuracy and wins."""
    from scipy.stats import kendalltau

    told = []
    for first, second in combinations(MEASURES, 2):
        values = [(row["label"], _value(row, first), _value(row, second)) for row in rows]
        both = [(label, a, b) for label, a, b in values if a is not None and b is not None]
        if len(both) < 3:
            continue
        found = kendalltau([a for _, a, _ in both], [b for _, _, b in both])
        tau = float(found.statistic)
        told.append(
            {
                "first": MEASURES[first],
                "second": MEASURES[second],
                "tau": None if math.isnan(tau) else tau,
                "p": None if math.isnan(tau) else float(found.pvalue),
                "n": len(both),
                "methods": [label for label, _, _ in both],
            }
        )
    return told


def _value(row: Mapping[str, Any], name: str) -> float | None:
    """A method's figure; the start, which every other is judged against, wins one half against itself."""
    if name == "win_rate" and row["kind"] == "base" and row["judge_scores"]:
        return 0.5
    return float(row[name]["value"]) if row[name] else None
