"""How much of a teacher's gain survives in the policies that learn from it, and what it costs beside DPO.

From the per-prompt values of rows to plain values. Everything is paired: a draw of the bootstrap takes the same
prompts of every method. Knows nothing of files.

    retention   (wins of the policy - 1/2) / (wins of its teacher - 1/2)
    at          wins where the policy, made weaker or stronger, has the KL (or the perplexity) of DPO; minus DPO's
    dial        wins, KL and perplexity at every strength that was measured
    flops       teacher's replies, states and fit, as a share of DPO's training at all its rates
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from coala.compare.study import CHANGED
from coala.statistics.intervals import Float, group_numbers, over, percentiles, resamples
from coala.values import Estimate

DRAWS = 1000
# What DPO is met at.
MEASURES = {"kl": "KL", "perplexity": "perplexity"}


def survival(rows: Sequence[Mapping[str, Any]], group: Sequence[str]) -> list[dict[str, Any]]:
    """Of every policy that has a teacher, or changes the output layer, what is told of it beside teacher and DPO."""
    base = next((row for row in rows if row["kind"] == "base" and row["judge_scores"]), None)
    if base is None or not base["per_prompt"]:
        return []
    sample = Sample(group, base)
    dpos = [row for row in rows if row["kind"] == "dpo" and row["judge_scores"] and row["per_prompt"]]
    found = []
    for row in rows:
        if not row["judge_scores"] or not row["per_prompt"] or not (row["teacher"] or row["kind"] in CHANGED):
            continue
        teacher = next((other for other in rows if other["label"] == row["teacher"] and other["judge_scores"]), None)
        found.append(
            {
                "of": row["label"],
                "kind": row["kind"],
                "teacher": row["teacher"],
                **retention(sample, row, teacher),
                "at": [met for dpo in dpos for met in sample.met(row, dpo)],
                "dial": sample.dial(row),
                "flops": shares(row, dpos),
            }
        )
    return found


class Sample:
    """Draws of the prompts, the first of which is all of them, and what rows come to in each."""

    def __init__(self, group: Sequence[str], base: Mapping[str, Any], draws: int = DRAWS) -> None:
        labels = group_numbers(list(group), len(group))
        self._n, self._groups, self._draws = len(labels), int(labels.max()) + 1, draws
        self._times: Float = np.array([np.ones(self._n), *resamples(labels, draws, 0)], dtype=np.float64)
        self._base = base

    def mean(self, values: Any) -> Float:
        """The mean of ``values`` (n,) in every draw."""
        found: Float = self._times @ np.asarray(values, np.float64) / self._times.sum(1)
        return found

    def wins(self, scores: Any) -> Float:
        """The share of prompts where ``scores`` (n,) are above the start's, a tie one half."""
        ours, theirs = np.asarray(scores), np.asarray(self._base["judge_scores"])
        return self.mean((ours > theirs) + 0.5 * (ours == theirs))

    def perplexity(self, per_prompt: Mapping[str, Any]) -> Float:
        """Perplexity under the start as a multiple of the start's own."""

        def loss(some: Mapping[str, Any]) -> Float:
            found: Float = -self.mean(some["log_likelihood"]) / self.mean(some["tokens"])
            return found

        return np.exp(loss(per_prompt) - loss(self._base["per_prompt"]))

    def measure(self, name: str, per_prompt: Mapping[str, Any]) -> Float:
        """KL or perplexity in every draw; nan where it is not known."""
        if name == "perplexity":
            return self.perplexity(per_prompt)
        known = per_prompt["kl"] is not None
        return self.mean(per_prompt["kl"]) if known else np.full(len(self._times), np.nan)

    def estimate(self, values: Float, name: str) -> Estimate | None:
        """The value of all prompts and the percentiles of the draws; None where it is not defined."""
        if not np.isfinite(values[0]):
            return None
        drawn = values[1:][np.isfinite(values[1:])]
        if self._groups < 2 or not len(drawn):
            return Estimate(float(values[0]), -np.inf, np.inf, self._n, f"{name}; one prompt, so no interval")
        about = f"{name}, paired percentile bootstrap 95 % ({self._draws} draws){over(self._groups, self._n)}"
        if len(drawn) < self._draws:
            about += f"; undefined in {self._draws - len(drawn)} draws"
        low, high = percentiles(drawn)
        return Estimate(float(values[0]), min(low, float(values[0])), max(high, float(values[0])), self._n, about)

    def points(self, row: Mapping[str, Any]) -> list[tuple[float, Any, Any]]:
        """Strength, scores and per-prompt values of a policy: of none the start's, then from weak to strong."""
        nothing = {**self._base["per_prompt"], "kl": [0.0] * self._n}
        own = [(1.0, row["judge_scores"], row["per_prompt"])]
        more = [(one["strength"], one["judge_scores"], one["per_prompt"]) for one in row["along"]]
        return [(0.0, self._base["judge_scores"], nothing), *sorted([*own, *more], key=lambda point: point[0])]

    def dial(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Wins, KL and perplexity at every strength; empty for a policy that has but its own."""
        if not row["along"]:
            return []
        return [
            {
                "strength": strength,
                "wins": _plain(self.estimate(self.wins(scores), "wins")),
                "kl": _plain(self.estimate(self.measure("kl", values), "KL a reply")),
                "perplexity": _plain(self.estimate(self.perplexity(values), "perplexity, times the start's")),
            }
            for strength, scores, values in self.points(row)[1:]
        ]

    def met(self, row: Mapping[str, Any], dpo: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Wins of a policy at DPO's KL and at its perplexity, between the strengths that were measured; minus DPO's."""
        if not row["along"]:
            return []
        points = self.points(row)
        wins = np.array([self.wins(scores) for _, scores, _ in points])
        found = []
        for name, words in MEASURES.items():
            reached = np.array([self.measure(name, values) for _, _, values in points])
            wanted = self.measure(name, dpo["per_prompt"])
            here = between(reached, wins, wanted)
            told = self.estimate(here, f"wins at {dpo['label']}'s {words}")
            minus = self.estimate(here - self.wins(dpo["judge_scores"]), "difference of wins")
            why = "" if told is not None else _beyond(dpo["label"], wanted[0], reached[:, 0])
            entry = {"dpo": dpo["label"], "measure": name, "value": float(wanted[0]), "why": why}
            found.append({**entry, "wins": _plain(told), "difference": _plain(minus)})
        return found


def _beyond(dpo: str, wanted: float, reached: Float) -> str:
    """Why a policy is not met where DPO is."""
    if not np.isfinite(wanted):
        return f"the KL of {dpo} is not known on these prompts: evaluation.kl is not replies"
    return f"{dpo} has {wanted:.3g}, the strengths {np.min(reached):.3g} to {np.max(reached):.3g}"


def between(reached: Float, wins: Float, wanted: Float) -> Float:
    """Wins (draws,) where ``reached`` (points, draws) first comes to ``wanted`` (draws,), linearly between two points.

    nan where it never does: nothing is told beyond the strengths that were measured.
    """
    found = np.full(len(wanted), np.nan)
    for i in range(len(reached) - 1):
        a, b = reached[i], reached[i + 1]
        step = b - a
        share = np.where(step != 0, (wanted - a) / np.where(step != 0, step, 1.0), np.where(a == wanted, 0.0, np.nan))
        inside = np.isnan(found) & (share >= 0) & (share <= 1)
        found = np.where(inside, wins[i] + share * (wins[i + 1] - wins[i]), found)
    return found


def retention(sample: Sample, row: Mapping[str, Any], teacher: Mapping[str, Any] | None) -> dict[str, Any]:
    """The policy's gain over one half as a share of its teacher's, or why there is none to tell."""
    if teacher is None:
        return {"retention": None, "why": "it has no teacher" if row["teacher"] is None else "its teacher is not there"}
    taught = sample.wins(teacher["judge_scores"])
    gain = sample.estimate(taught, "wins")
    if gain is None or not gain.low > 0.5:
        return {"retention": None, "why": f"no gain of {teacher['label']} over the start is established"}
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (sample.wins(row["judge_scores"]) - 0.5) / np.where(taught > 0.5, taught - 0.5, np.nan)
    return {"retention": _plain(sample.estimate(share, "share of the teacher's gain")), "why": ""}


def shares(row: Mapping[str, Any], dpos: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """FLOPs by formula of what a policy took, and all of it as a share of each DPO's training at all its rates."""
    costs = row["costs"]
    if costs is None or "parts" not in costs:
        return None
    whole = sum(costs["parts"].values())
    of = {
        dpo["label"]: whole / (dpo["costs"]["flops"]["run"] + dpo["costs"]["flops"]["search"])
        for dpo in dpos
        if dpo["costs"] is not None
    }
    return {**costs["parts"], "whole": whole, "of": of}


def _plain(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else asdict(estimate)
