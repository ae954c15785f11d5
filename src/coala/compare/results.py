"""From the files of the cells to the content of one report: tables, comparisons and costs as plain values.

Reads cell files, the split and nothing else, so that a comparison that was cut off and went on gives the same report.
What was measured of time, memory and energy is under ``measured`` keys; all else is decided by the study.

    title, reproduces, settings, notes
    counts       {cells, done, failed, missing}
    failures     [{cell, error, plan}]
    untuned      baselines for which fewer than four rates were tried
    places       [{dataset, model, init, pairs, methods: [ROW], differences: [...], ranks, verdict: [sentence],
                  measured: [sentence], layers, judge, contests, survival, capability, agreement, benchmarks}]
    stage_one    rows of the paper's Table 7

A ROW: label, kind, seeds, accuracy (ESTIMATE over pairs, of the mean over seeds) with seed_mean and seed_sd,
margin_ratio {mean, sd}, nll, kl, perplexity, win_rate (ESTIMATE), rate, curves, falling {share, steps}, costs; what
:mod:`coala.compare.contests` tells of replies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from coala.compare import conclusions
from coala.compare.cell import read
from coala.compare.conclusions import main_coala
from coala.compare.contests import (
    agreement,
    capability_changes,
    contests,
    policy_told,
    put_ratios,
    put_start_scores,
    writing_of,
)
from coala.compare.costs import FoundCosts, costs_of, put_shares, spread
from coala.compare.data import counts as pair_counts
from coala.compare.data import part
from coala.compare.judging import labels_judged
from coala.compare.matrix import Cell, cells, teacher_of
from coala.compare.study import CHANGED, Study
from coala.compare.survival import survival
from coala.compare.writing import answered
from coala.evaluation import win_rate
from coala.statistics.intervals import clustered, mean_estimate, share_estimate
from coala.values import Estimate, Judgement


def content_of(study: Study, out: Path) -> dict[str, Any]:
    """The content of the report of ``study`` in ``out``; cells that are missing or failed are said to be."""
    everything = cells(study)
    found: FoundCosts = {}
    failures, missing = [], 0
    for cell in everything:
        record = read(Path(out) / "cells" / cell.id)
        if record is None:
            missing += 1
        elif record["status"] == "done":
            found[cell.id] = record
        else:
            failures.append({"cell": cell.id, "error": record["error"], "plan": record.get("plan")})
    places = [
        _place(study, Path(out), place, [cell for cell in everything if cell.place == place], found)
        for place in dict.fromkeys(cell.place for cell in everything)
    ]
    return {
        "title": study.title,
        "reproduces": study.reproduces,
        "settings": study.model_dump(mode="json", exclude={"models": {"__all__": {"config"}}}),
        "counts": {"cells": len(everything), "done": len(found), "failed": len(failures), "missing": missing},
        "failures": failures,
        "untuned": study.untuned(),
        "places": [place for place in places if place["methods"]],
        "stage_one": _stage_one(study, places),
        "published_costs": PUBLISHED_COSTS,
    }


# COALA paper, Table 5, "TFLOPs measurements", and why they cannot be reproduced.
PUBLISHED_COSTS = {
    "rows": [
        {"model": "DistilGPT2", "COALA": 152.56, "DPO": 537.12, "ORPO": 643.33, "SFT": 271},
        {"model": "GPT-2", "COALA": 379.89, "DPO": 1087.45, "ORPO": 1305.27, "SFT": 522},
        {"model": "Mistral-7B", "COALA": 1580.45, "DPO": 9284.71, "ORPO": 11241.89, "SFT": 2492},
        {"model": "Llama-8B", "COALA": 1805.39, "DPO": 10253.37, "ORPO": 12352.98, "SFT": 2851},
        {"model": "Dolphin-7B", "COALA": 1794.66, "DPO": 10091.25, "ORPO": 12116.50, "SFT": 2804},
    ],
    "why": (
        "The paper's Table 5 cannot be reproduced: its figures are 30 to 540 times below what a pass over its pairs "
        "takes at 512 tokens, by factors that differ from row to row; ORPO costs more than DPO in it, which equal data "
        "and epochs do not allow (at most 0.75 of it); and from GPT-2 to Llama-8B it grows 4.8 times where the work "
        "grows at least 57 times. Shares of DPO are therefore given here by formula and by counter on equal tokens."
    ),
}


def _place(
    study: Study, out: Path, place: tuple[str, str, str], here: Sequence[Cell], found: FoundCosts
) -> dict[str, Any]:
    """One dataset with one model and one start: every method there, and COALA against each."""
    dataset, model, init = place
    rows: list[dict[str, Any]] = []
    if any(cell.id in found for cell in here):
        test = part(out, dataset, "test")
        group = [pair.group for pair in test]
        labels = list(dict.fromkeys((cell.method, cell.setting) for cell in here if cell.kind in _METHODS))
        for method, setting in labels:
            mine = [c for c in here if (c.method, c.setting) == (method, setting) and c.kind in _METHODS]
            done = [c for c in mine if c.id in found]
            if done:
                rows.append(_row(study, done, len(mine), here, found, group))
        put_shares(rows)
        put_ratios(rows)
        put_start_scores(rows)
    pairs = pair_counts(out, dataset) if rows else {}
    told: dict[str, Any] = {"dataset": dataset, "model": model, "init": init, "pairs": pairs, "methods": rows}
    told["ranks"] = study.ranks
    if rows:
        told["differences"] = _differences(rows, group) if study.ranks else []
        told["judge"] = None
        if any(row["win_rate"] for row in rows):
            told["judge"] = labels_judged(study.datasets[dataset], [*part(out, dataset, "train"), *test])
        told["contests"] = contests(rows, _answered(study, out, dataset))
        told["survival"] = survival(rows, _answered(study, out, dataset))
        told["agreement"] = agreement(rows)
        told["capability"] = capability_changes(rows)
        told["benchmarks"] = [found[c.id]["result"] for c in here if c.kind == "benchmark" and c.id in found]
        ranking = (*conclusions.of_ranking(told), *conclusions.of_heads(told)) if study.ranks else ()
        found_here = [
            *ranking,
            *conclusions.of_judge(told),
            *conclusions.of_pooling(told),
            *conclusions.of_writing(told),
            *conclusions.of_survival(told),
            *conclusions.of_capability(told),
            *conclusions.of_agreement(told),
            *conclusions.of_benchmarks(told),
            *conclusions.of_flops(told),
        ]
        told["findings"] = [asdict(one) for one in found_here]
        told["measured"] = [asdict(one) for one in conclusions.of_measured(told)]
        told["layers"] = next(
            (
                {"cell": c.id, "rows": found[c.id]["result"]["layers"]}
                for c in here
                if c.kind == "features" and c.id in found and found[c.id]["result"]["layers"]
            ),
            None,
        )
        for row in rows:
            for values in ("hits", "judge_scores", "start_scores", "answered", "per_prompt", "along"):
                row.pop(values)
    return told


_METHODS = ("base", "train", "head", "adamw", "layers", "cues", "prompt", "guided", *CHANGED)


def _row(
    study: Study, done: Sequence[Cell], wanted: int, here: Sequence[Cell], found: FoundCosts, group: Sequence[str]
) -> dict[str, Any]:
    first = done[0]
    results = [found[cell.id]["result"] for cell in done]
    margins = np.array([result["margins"] for result in results])
    hits = ((margins > 0) + 0.5 * (margins == 0)).mean(axis=0)
    by_seed = [result["accuracy"]["value"] for result in results]
    method = next((m for m in study.methods if m.name == first.method), None)
    taught = None if method is None else teacher_of(study, method)
    row: dict[str, Any] = {
        "label": first.label,
        "method": first.method,
        "kind": "base" if method is None else method.kind,
        "coala": method is not None and method.kind == "coala" and method.reference == "none",
        "convex": method is not None and method.kind == "coala",
        "of": None if method is None else method.of,
        "setting": first.setting,
        "about": "" if method is None else method.about,
        "reward": results[0].get("reward"),
        "seeds": len(done),
        "seeds_wanted": wanted,
        "hits": hits,
        "accuracy": asdict(share_estimate(hits, group, "share of pairs ranked right, mean over seeds")),
        "seed_accuracy": spread(by_seed),
        "margin_ratio": spread([result["margin_ratio"] for result in results]),
        "nll": spread([result["nll"] for result in results]),
        "rate": results[0].get("rate"),
        "trials": results[0].get("trials") or [],
        "layer": results[0].get("layer"),
        "pooling": results[0].get("pooling"),
        "mode": None if method is None or method.guidance is None else method.guidance.mode,
        "neurons": results[0].get("neurons"),
        "relative_gap": results[0].get("relative_gap"),
        "chosen": {name: results[0].get(name) for name in ("ridge", "rank", "epochs", "multiple", "round")},
        "teacher": None if taught is None else taught.name,
        "curves": [curve_of(result) for result in results if result.get("curve")],
        "win_rate": _win_rate(results),
        "perplexity": _over_seeds([r["perplexity"] for r in results if r.get("perplexity")]),
        "kl": _over_seeds([r["kl"] for r in results if r.get("kl")]),
        "tokens": spread([r["mean_tokens"] for r in results if "mean_tokens" in r]),
    }
    row |= writing_of(results, [found[cell.id]["costs"] for cell in done])
    row["policy"] = policy_told(row, results[0])
    row["falling"] = falling(row["curves"])
    row["costs"] = costs_of(first, method, done, here, found)
    return row


def _answered(study: Study, out: Path, dataset: str) -> list[str]:
    """Groups of the prompts that are answered, in their order."""
    return [pair.group for pair in answered(study, dataset, part(out, dataset, "test"))]


def curve_of(result: Mapping[str, Any]) -> list[list[float]]:
    """Share of the run and held-out mean margin, in units of the deviation of the final margins on the test pairs."""
    rows, unit = result["curve"], result["margin_sd"] or 1.0
    last = max((row["step"] for row in rows), default=0.0) or 1.0
    return [[row["step"] / last, row["margin"] / unit] for row in rows]


def falling(curves: Sequence[Sequence[Sequence[float]]]) -> dict[str, Any] | None:
    """How many of the steps between two looks at the held-out margin lower it; what rounding hides is no fall."""
    falls = steps = 0
    for curve in curves:
        values = np.array([value for _, value in curve])
        if len(values) > 1:
            drops = -np.diff(values)
            falls += int((drops > 1e-4 * np.abs(values).max()).sum())
            steps += len(drops)
    return {"falls": falls, "steps": steps, "share": falls / steps} if steps else None


def _win_rate(results: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    judged = [Judgement(**row) for result in results for row in result.get("judgements") or []]
    if not judged:
        return None
    return {**asdict(win_rate(judged)), "judge": judged[0].judge}


def _over_seeds(estimates: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The first seed's estimate with its interval, and the spread over seeds."""
    if not estimates:
        return None
    return {**estimates[0], "seeds": spread([e["value"] for e in estimates])}


# --- comparisons -------------------------------------------------------------------------------------------------


def _differences(rows: Sequence[dict[str, Any]], group: Sequence[str]) -> list[dict[str, Any]]:
    """COALA minus every other method: paired over pairs, groups as clusters; p-values by Holm over these."""
    from scipy.special import stdtr

    from coala.statistics.votes import holm

    ours = main_coala(rows)
    if ours is None:
        return []
    told, p_values = [], []
    for row in rows:
        # A guided method ranks as the head it is guided by.
        if row is ours or row["kind"] == "guided":
            continue
        difference = ours["hits"] - row["hits"]
        estimate = mean_estimate(difference, group)
        _, error, groups = clustered(difference, group)
        if not np.any(difference):
            # Equal on every pair says little of the next one: Wilson's bound on a share never seen.
            reach = share_estimate(np.zeros(len(difference)), group).high
            estimate = Estimate(0.0, -reach, reach, len(difference), "equal on every pair")
        p = 2 * float(stdtr(groups - 1, -abs(estimate.value / error))) if groups > 1 and error > 0 else 1.0
        p_values.append(p)
        told.append({"of": ours["label"], "minus": row["label"], "kind": row["kind"], "difference": asdict(estimate)})
    for entry, p, adjusted in zip(told, p_values, holm(p_values), strict=True):
        entry["p"], entry["p_holm"] = p, adjusted
    return told


def _stage_one(study: Study, places: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the paper's Table 7: how well stage one's classifier tells chosen from rejected, against AdamW."""
    wanted = [m.name for m in study.methods if m.kind in ("coala", "adamw")]
    if not any(m.kind == "adamw" for m in study.methods):
        return []
    rows = []
    for place in places:
        entry = {row["method"]: row["accuracy"] for row in place["methods"] if row["method"] in wanted}
        if entry:
            rows.append({**{k: place[k] for k in ("dataset", "model", "init")}, "accuracy": entry})
    return rows
