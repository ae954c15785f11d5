"""The report's figures: each function draws a part of the content, ``None`` when there is nothing to draw.

Fewer than :data:`coala.pages.drawing.FEWEST` points are numbers, not a figure: a table has them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from coala.pages.drawing import BLUE, FEWEST, GREEN, GREY, INK, ORANGE, SOFT, Drawing, drawing
from coala.pages.words import Interval, number

ABOVE = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3, "borderaxespad": 0.2}  # no line passes there


def margin_curve(rows: Sequence[Mapping[str, Any]]) -> Drawing | None:
    """Mean reward margin of training and held-out pairs by solver step."""
    series = {name: _series(rows, name) for name in ("train", "eval")}
    if not any(len(steps) >= FEWEST for steps, _ in series.values()):
        return None

    def draw(axes: Any) -> None:
        axes.axhline(0, color=GREY, linewidth=1)
        for name, label, look in (("train", "training pairs", {"color": GREY, "ls": "--"}), ("eval", "held-out", {})):
            steps, values = series[name]
            if len(steps):
                few = "o" if len(steps) < 12 else None
                axes.plot(steps, values, label=label, **({"color": BLUE, "marker": few, "ms": 4} | look))
        axes.set(xlabel="solver step", ylabel="mean margin / its deviation")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(**ABOVE)

    ends = "; ".join(
        f"{'training' if name == 'train' else 'held-out'} pairs from {number(values[0])} to {number(values[-1])}"
        for name, (steps, values) in series.items()
        if len(steps)
    )
    watched = "eval" if len(series["eval"][0]) else "train"
    caption = (
        "Mean of score(chosen) minus score(rejected), in units of its standard deviation. "
        f"{_steadiness('held-out' if watched == 'eval' else 'training', series[watched][1])} Where held-out and "
        f"training pairs diverge, "
        "the head memorises its training set."
    )
    return drawing("margin", f"Reward margin by solver step: {ends}.", caption, draw)


def _steadiness(name: str, values: Any) -> str:
    """Whether the line only rises; what rounding to four digits hides is not called a fall."""
    falls = -np.diff(values)
    falls = falls[falls > 1e-4 * float(np.abs(values).max(initial=0.0))]
    if not len(falls):
        return f"That of {name} pairs never falls."
    steps = f"{len(falls)} of {len(values) - 1} steps"
    return f"That of {name} pairs is not monotone: it falls at {steps}, by {number(float(falls.max()))} at most."


def gap_curve(rows: Sequence[Mapping[str, Any]]) -> Drawing | None:
    """Duality gap as a share of the objective by solver step, logarithmic."""
    shares = [
        {"step": row.get("step", i), "gap": row["gap"] / row["objective"]}
        for i, row in enumerate(rows)
        if row.get("gap") is not None and (row.get("objective") or 0) > 0
    ]
    steps, gaps = _series(shares, "gap")
    steps, gaps = steps[gaps > 0], gaps[gaps > 0]
    if len(steps) < FEWEST:
        return None

    def draw(axes: Any) -> None:
        axes.semilogy(steps, gaps, color=BLUE, marker="o" if len(steps) < 12 else None, ms=4)
        axes.set(xlabel="solver step", ylabel="gap / objective")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(which="minor", visible=False)

    title = f"Duality gap by solver step, from {number(gaps[0])} to {number(gaps[-1])}."
    caption = (
        "Upper bound on the distance to the optimum, as a fraction "
        "of the objective. It jumps when gates are added: the program is then a larger one."
    )
    return drawing("gap", title, caption, draw)


def objective_curve(rows: Sequence[Mapping[str, Any]]) -> Drawing | None:
    """Objective by solver step."""
    steps, values = _series(rows, "objective")
    if len(steps) < FEWEST:
        return None

    def draw(axes: Any) -> None:
        axes.plot(steps, values, color=BLUE, marker="o" if len(steps) < 12 else None, ms=4)
        axes.set(xlabel="solver step", ylabel="objective")
        axes.xaxis.get_major_locator().set_params(integer=True)

    title = f"Objective by solver step, from {number(values[0])} to {number(values[-1])}."
    return drawing("objective", title, "The training objective, penalties included.", draw)


def histograms(scores: Mapping[str, Any]) -> Drawing | None:
    """Held-out scores of chosen and rejected replies on one axis."""
    chosen, rejected = (_finite(scores.get(name) or []) for name in ("chosen", "rejected"))
    if min(len(chosen), len(rejected)) < FEWEST:
        return None
    both = np.concatenate([chosen, rejected])
    low, high = float(both.min()), float(both.max())
    if high - low < 1e-9 * max(1.0, abs(low)):
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, int(np.clip(np.sqrt(len(both)), 8, 40)) + 1)

    def draw(axes: Any) -> None:
        for values, label, colour in ((rejected, "rejected", ORANGE), (chosen, "chosen", BLUE)):
            axes.hist(values, edges, color=colour, alpha=0.32, label=label)
            axes.hist(values, edges, color=colour, histtype="step", linewidth=1.5)
        axes.set(xlabel="score", ylabel="replies")
        axes.legend(**ABOVE)

    title = (
        f"Histograms of held-out scores: {len(chosen)} chosen replies with median {number(float(np.median(chosen)))}, "
        f"{len(rejected)} rejected with median {number(float(np.median(rejected)))}."
    )
    caption = "Overlap alone is not a problem: prompts differ in level, and only the two replies to one prompt compete."
    return drawing("scores", title, caption, draw)


def reliability_curve(found: Mapping[str, Any]) -> Drawing | None:
    """Share of held-out pairs ranked right by the probability that the head gave, with Wilson intervals."""
    bins = [
        (float(row["predicted"]), Interval(row.get("observed")))
        for row in found.get("bins") or []
        if row.get("predicted") is not None
    ]
    bins = [(predicted, observed) for predicted, observed in bins if observed]
    if len(bins) < FEWEST:
        return None

    def draw(axes: Any) -> None:
        axes.plot([50, 100], [50, 100], color=GREY, linewidth=1.2, linestyle=":", label="as predicted")
        axes.axhline(50, color=GREY, linewidth=0.8)
        x, y = ([100 * value for value in column] for column in zip(*((p, o.value) for p, o in bins), strict=True))
        ends = [[100 * (o.value - o.low) for _, o in bins], [100 * (o.high - o.value) for _, o in bins]]
        axes.errorbar(x, y, ends, fmt="o", color=BLUE, ms=5, capsize=3, elinewidth=1.3, label="held-out pairs")
        axes.set(xlim=(48, 102), ylim=(min(38, min(o.low for _, o in bins) * 100 - 2), 102))
        axes.set(xlabel="probability of the preferred reply, %", ylabel="ranked right, %")
        axes.legend(**ABOVE)

    parts = "; ".join(f"at {100 * predicted:.0f} %: {o.percent()}, n={o.n}" for predicted, o in bins)
    caption = (
        "Reliability: of the pairs to which the head gives 80 %, 80 % should be ranked right. Above the dotted line it "
        "is underconfident, below it overconfident. Bars are 95 % intervals."
    )
    return drawing("reliability", f"Pairs ranked right by predicted probability. {parts}.", caption, draw)


def length_chart(rows: Sequence[Mapping[str, Any]], unit: str) -> Drawing | None:
    """Ranking accuracy with its interval by length difference."""
    kept = [(row, Interval(row.get("accuracy"))) for row in rows]
    kept = [(row, accuracy) for row, accuracy in kept if accuracy]
    if len(kept) < FEWEST:
        return None
    names = [f"{number(row.get('low'))} to\n{number(row.get('high'))}" for row, _ in kept]

    def draw(axes: Any) -> None:
        axes.axhline(50, color=GREY, linewidth=1.2, linestyle=":")
        for i, (_, accuracy) in enumerate(kept):
            low, high = max(0.0, accuracy.low), min(1.0, accuracy.high)
            axes.plot([i, i], [100 * low, 100 * high], color=BLUE, linewidth=6, alpha=0.25, solid_capstyle="butt")
            axes.plot(i, 100 * accuracy.value, "o", color=BLUE, ms=6)
            axes.annotate(f"n={accuracy.n}", (i, 2), ha="center", va="bottom", fontsize=8, color=SOFT)
        axes.set_xticks(range(len(names)), names)
        axes.set(ylim=(0, 102), xlim=(-0.6, len(names) - 0.4), ylabel="ranked right, %")
        axes.set_xlabel(f"length of chosen minus rejected, {re.sub(r'[^a-z ]', '', unit.lower()) or 'characters'}")
        axes.grid(axis="x", visible=False)

    parts = "; ".join(f"{name.replace(chr(10), ' ')}: {a.percent()}" for name, (_, a) in zip(names, kept, strict=True))
    caption = (
        "A head that only likes long replies is right on the right and wrong on the left. Bars are 95 % intervals."
    )
    return drawing("length", f"Ranking accuracy by length difference. {parts}.", caption, draw)


def path_chart(rows: Sequence[Mapping[str, Any]]) -> Drawing | None:
    """Cross-validated NLL by regularisation, one line per ridge and kind of gates, against the linear head.

    Of the settings that differ in nothing else (how far weights were relaxed), the best is drawn.
    """
    known = [row for row in rows if row.get("cv_nll") is not None]
    gated = [row for row in known if (row.get("beta_rel") or 0) > 0]
    if len({row["beta_rel"] for row in gated}) < FEWEST:
        return None
    linear = min((float(row["cv_nll"]) for row in known if row.get("beta_rel") is None), default=None)
    selected = next((row for row in gated if row.get("selected")), None)
    best = min(gated, key=lambda row: float(row["cv_nll"]))
    many = len({row.get("tau") for row in gated}) > 4  # a grid: the best ridge, or the lines would hide each other
    lines: dict[tuple[float, str], dict[float, Mapping[str, Any]]] = {}
    for row in sorted(gated, key=lambda row: float(row["cv_nll"])):
        name = (0.0 if many else float(row.get("tau") or 0), str(row.get("gate_on") or ""))
        lines.setdefault(name, {}).setdefault(float(row["beta_rel"]), row)
    ridges, kinds = (sorted({name[part] for name in lines}) for part in (0, 1))
    shades = dict(zip(ridges, np.linspace(0.35, 1.0, len(ridges)) if len(ridges) > 1 else [1.0], strict=True))

    def draw(axes: Any) -> None:
        for (ridge, kind), points in sorted(lines.items()):
            line = [points[sparsity] for sparsity in sorted(points)]
            x, y = ([float(row[name]) for row in line] for name in ("beta_rel", "cv_nll"))
            label = f"gates on the {kind}" if len(kinds) > 1 else "gated head"
            label = f"ridge {number(ridge)}" if len(ridges) > 1 else label
            label += " at its best ridge" if many else ""
            look = {"color": GREEN if kind == "prompt" else BLUE, "alpha": float(shades[ridge])}
            axes.plot(x, y, "o-", ms=4, label=label, **look)
            errors = [float(row.get("cv_se") or 0) for row in line]
            axes.errorbar(x, y, errors, fmt="none", capsize=2.5, elinewidth=1, **look)
        if linear is not None:
            axes.axhline(linear, color=ORANGE, linestyle="--", linewidth=1.5, label="linear head")
        if selected is not None:
            spot = (float(selected["beta_rel"]), float(selected["cv_nll"]))
            axes.plot(*spot, "o", ms=11, mfc="none", mec=INK, mew=1.5, label="selected")
        axes.set_xscale("log")
        axes.invert_xaxis()
        ticks = sorted({float(row["beta_rel"]) for row in gated})
        ticks = ticks[:: -(-len(ticks) // 8)]
        axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(which="minor", visible=False)
        axes.set(xlabel="sparsity / its largest useful value (weaker →)", ylabel="cross-validated NLL")
        axes.legend(fontsize=9, **ABOVE)

    title = (
        f"Regularisation path: the lowest cross-validated NLL of gated heads is {number(float(best['cv_nll']))} at "
        f"relative sparsity {number(float(best['beta_rel']))}"
        + (f"; the linear head has {number(linear)}." if linear is not None else ".")
    )
    caption = "Negative log-likelihood per pair on held-out folds; log 2 = 0.693 is chance. Bars are standard errors."
    return drawing("path", title, caption, draw)


def ridge_chart(rows: Sequence[Mapping[str, Any]]) -> Drawing | None:
    """Cross-validated NLL of the linear head by ridge."""
    linear = [
        (float(row["tau"]), float(row["cv_nll"]), float(row.get("cv_se") or 0))
        for row in rows
        if row.get("cv_nll") is not None and row.get("beta_rel") is None and (row.get("tau") or 0) > 0
    ]
    if len(linear) < FEWEST:
        return None
    ridges, losses, errors = zip(*sorted(linear), strict=True)

    def draw(axes: Any) -> None:
        axes.errorbar(ridges, losses, errors, fmt="o-", color=ORANGE, ms=4, capsize=2.5, elinewidth=1)
        axes.set_xscale("log")
        axes.invert_xaxis()
        axes.grid(which="minor", visible=False)
        axes.set(xlabel="ridge (weaker →)", ylabel="cross-validated NLL")

    best = min(linear, key=lambda point: point[1])
    title = (
        f"Cross-validated NLL of the linear head by ridge, lowest {number(best[1])} at a ridge of {number(best[0])}."
    )
    return drawing("ridge", title, "The linear head alone, on which the ridge of every head here was chosen.", draw)


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[Any, Any]:
    points = [(i if row.get("step") is None else row["step"], row.get(name)) for i, row in enumerate(rows)]
    kept = [(float(step), float(value)) for step, value in points if value is not None]
    table = np.array(kept, dtype=float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _finite(values: Sequence[Any]) -> Any:
    return np.array([float(value) for value in values if value is not None])
