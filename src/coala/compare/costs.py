"""What the methods of a comparison cost, from cell files: one run, one run with its search, and shares of DPO's.

Everything measured (seconds, memory, energy) is under ``measured`` keys; all else the study decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from coala.compare.matrix import Cell, features_key
from coala.compare.study import StudyMethod

FoundCosts = dict[str, dict[str, Any]]


def spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean and standard deviation over seeds; None of none, no deviation of one."""
    if not values:
        return None
    array = np.asarray(values, np.float64)
    return {
        "mean": float(array.mean()),
        "sd": float(array.std(ddof=1)) if len(array) > 1 else None,
        "n": len(array),
        "values": [float(value) for value in array],
    }


def costs_of(
    first: Cell,
    method: StudyMethod | None,
    done: Sequence[Cell],
    here: Sequence[Cell],
    found: FoundCosts,
) -> dict[str, Any] | None:
    """What one run costs, and one run with the search that its settings took.

    FLOPs by formula and by counter, an epoch's count times the epochs. Searches are counted by formula times the
    counter's excess over it. A head's run is the extraction and the fit; its search, if any, the choice of a layer.
    """
    if method is None or not (method.trained or method.changed or method.reads):
        return None
    parts = [found[cell.id]["costs"] for cell in done]
    if method.changed:
        return _changed(parts)
    count = next(
        (c for c in here if c.kind == "count" and (c.method, c.setting) == (first.method, first.setting)), None
    )
    counted = found[count.id]["result"] if count is not None and count.id in found else None
    if method.trained:
        # Runs after the first seed's do nothing but train: their time is not shared with a search.
        runs = [part["train"] for part in parts]
        search = parts[0].get("search", {})
        formula = runs[0]["flops"]
        ratio = counted["train"] / counted["formula"] if counted else None
        counter = None if ratio is None else round(formula * ratio)
        return {
            "flops": {"run": formula, "search": search.get("flops", 0)},
            **({"parts": _parts(parts[0], formula, search.get("flops", 0))} if "lessons" in parts[0] else {}),
            "counter": None
            if counter is None or ratio is None
            else {"run": counter, "search": round(search.get("flops", 0) * ratio)},
            "measured": _measured(runs, [run["measured"] for run in runs], search.get("measured", {})),
        }
    key = f"{'.'.join(first.place)}.features-{features_key(method)}"
    if key not in found:
        return None
    read_parts = found[key]["costs"]
    fits = [part["head"] for part in parts if "head" in part]
    search = read_parts.get("search", {})
    features = read_parts["features"]
    return {
        "flops": {"run": features["flops"], "search": search.get("flops", 0), "pair_by_pair": features["pair_by_pair"]},
        "counter": None
        if counted is None
        else {
            "run": counted["features"] + counted["head"],
            "features": counted["features"],
            "head": counted["head"],
            "search": search.get("flops", 0),
        },
        "measured": _measured(
            fits, [features["measured"], *(fit["measured"] for fit in fits)], search.get("measured", {}), features
        ),
    }


def _parts(part: Mapping[str, Any], fit: int, search: int) -> dict[str, int]:
    """FLOPs of a policy that learns from replies: of these, of their states, of the fit and of its search."""
    lessons = part.get("lessons", {})
    return {
        "replies": lessons.get("replies", 0),
        # Training reads the replies itself.
        "states": lessons.get("states", 0) if "fit" in part else 0,
        "fit": fit,
        "search": search,
    }


def _changed(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a change of the output layer takes: no pass through the model but for replies and their states."""
    fits = [part["fit"] for part in parts]
    first = parts[0]
    search = first.get("search", {})
    by = _parts(first, fits[0]["flops"], search.get("flops", 0) + fits[0].get("search_flops", 0))
    return {
        "flops": {"run": by["replies"] + by["states"] + by["fit"], "search": by["search"]},
        "parts": by,
        "counter": None,
        "measured": _measured(
            fits, [fit["measured"] for fit in fits], search.get("measured", {}), first.get("lessons")
        ),
    }


def _measured(
    runs: Sequence[Mapping[str, Any]],
    all_parts: Sequence[Mapping[str, Any]],
    search: Mapping[str, Any],
    before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    own = before["measured"] if before else {}
    seconds = [run["measured"]["seconds"] + own.get("seconds", 0.0) for run in runs]
    compiling = [run["measured"].get("compiling") for run in runs]
    joules = [_joules(run["measured"], own) for run in runs]
    return {
        "seconds": spread(seconds),
        "compiling": spread([c for c in compiling if c is not None]),
        "search_seconds": search.get("seconds", 0.0),
        "joules": spread([j for j in joules if j is not None]),
        "peak_bytes": _most(part["peak_bytes"] for part in all_parts),
        # Above what libraries take before any weight is read.
        "own_bytes": _most(
            {k: v - part.get("at_start", {}).get(k, 0) for k, v in part["peak_bytes"].items()} for part in all_parts
        ),
    }


def _joules(measured: Mapping[str, Any], own: Mapping[str, Any]) -> float | None:
    found = [m["joules"] for m in (measured, own) if m]
    return None if not found or any(j is None for j in found) else float(sum(sum(j.values()) for j in found))


def _most(parts: Any) -> dict[str, int]:
    most: dict[str, int] = {}
    for peak in parts:
        for place, value in peak.items():
            most[place] = max(most.get(place, 0), value)
    return most


def put_shares(rows: Sequence[dict[str, Any]]) -> None:
    """Every method's costs as shares of one epoch of DPO on all weights, and on adapters, in the same place."""
    for row in rows:
        if row["costs"] is not None:
            row["costs"]["of"] = {}
    for dpo in (row for row in rows if row["kind"] == "dpo" and row["costs"] is not None):
        theirs = dpo["costs"]
        for row in rows:
            mine = row["costs"]
            if mine is None:
                continue
            share: dict[str, Any] = {}
            if mine["counter"] and theirs["counter"]:
                share["flops"] = mine["counter"]["run"] / theirs["counter"]["run"]
                searched = mine["counter"]["run"] + mine["counter"]["search"]
                share["flops_with_search"] = searched / (theirs["counter"]["run"] + theirs["counter"]["search"])
            measured, other = mine["measured"], theirs["measured"]
            if measured["seconds"] and other["seconds"]:
                # The first seed's process is the only one that compiles and searches; the least is the work itself.
                share["measured"] = {
                    "seconds": measured["seconds"]["mean"] / other["seconds"]["mean"],
                    "bytes": _shares(measured["peak_bytes"], other["peak_bytes"]),
                    "own_bytes": _shares(measured["own_bytes"], other["own_bytes"]),
                }
            mine["of"][dpo["label"]] = share


def _shares(mine: Mapping[str, int], theirs: Mapping[str, int]) -> dict[str, float]:
    """Of each place that both were measured in."""
    return {place: mine[place] / size for place, size in theirs.items() if size > 0 and place in mine}
