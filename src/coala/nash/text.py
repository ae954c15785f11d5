"""Solved games as rows for a terminal and as plain values for JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from coala.nash.paper import PaperStudy
from coala.nash.solvers import Result
from coala.store import plain

SHOWN = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
COLUMNS = 8  # answers whose probabilities fit beside each other


def summary(result: Result) -> dict[str, Any]:
    """What came out: policy, Nash strategy, gap and warnings; JSON has no infinity, which is None."""
    told = {
        "method": result.method,
        "converged": result.converged,
        "reason": result.reason,
        "updates": len(result.history) - 1,
        "gap": result.gap,
        "kl": result.history.kl[-1],
        "policy": _named(result, result.policy),
        "nash": _named(result, result.nash.strategy),
        "nash_unique": result.nash.unique,
        "warnings": [note.text for note in result.notes if note.level == "warning"],
    }
    return plain(told)


def path_tables(result: Result) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """For each prompt its name, a header and rows: policies after a few updates, and the Nash strategy."""
    solved, history = result.game, result.history
    last = len(history) - 1
    updates = [update for update in SHOWN if update < last] + [last]
    nash = solved.parts(result.nash.strategy)
    for prompt, names, strategy, z in zip(solved.prompts, solved.names, nash, history.log_policy, strict=True):
        shown = np.sort(np.argsort(-np.maximum(strategy, np.exp(z[-1])), kind="stable")[:COLUMNS])
        rows = [
            [str(t), f"{history.gap[t]:.2e}", f"{history.kl[t]:.2e}", *(f"{p:.6f}" for p in np.exp(z[t, shown]))]
            for t in updates
        ]
        rows.append(["Nash", "0", "0", *(f"{p:.6f}" for p in strategy[shown])])
        yield prompt, ["update", "gap", "KL", *(names[i] for i in shown)], rows


def study_table(study: PaperStudy) -> tuple[list[str], list[list[str]]]:
    """A header and a row for each method of the paper's experiment."""
    noisy = {row.entry.name: row.tail_gap for row in study.sampled}
    rows = [
        [
            row.entry.name,
            f"{row.first.gap:.2e}",
            str(row.first.converged).lower(),
            str(noisy.get(row.entry.name) or "-"),
        ]
        for row in study.noiseless
    ]
    return ["method", "gap, no noise", "converged", f"gap, {study.pairs} pairs per step: mean [95 %]"], rows


def study_summary(study: PaperStudy) -> dict[str, Any]:
    """The gaps of each method, without noise and sampled."""
    return {
        "noiseless": {row.entry.name: row.first.gap for row in study.noiseless},
        "sampled": {row.entry.name: row.tail_gap for row in study.sampled},
    }


def _named(result: Result, policy: Any) -> dict[str, Any]:
    """Probabilities by label, by prompt first where there are several."""
    solved = result.game
    parts: Sequence[dict[str, Any]] = [
        dict(zip(names, part.tolist(), strict=True))
        for names, part in zip(solved.names, solved.parts(policy), strict=True)
    ]
    return dict(zip(solved.prompts, parts, strict=True)) if solved.contextual else parts[0]
