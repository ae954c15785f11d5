"""Figures of a comparison as inline SVG, in the style of :mod:`coala.pages.drawing`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from coala.pages.drawing import FEWEST, GREY, Drawing, colours, drawing


def margin_curves(place: Mapping[str, Any]) -> Drawing | None:
    """Figures 1, 3 and 4: held-out margin along the run of every method, the mean over seeds and their range."""
    rows = [row for row in place["methods"] if any(len(curve) >= FEWEST for curve in row["curves"])]
    if not rows:
        return None
    grid = np.linspace(0, 1, 41)

    shades = _shades(place)

    def draw(axes: Any) -> None:
        axes.axhline(0, color=GREY, linewidth=1)
        for row in rows:
            colour = shades[row["label"]]
            lines = np.array([np.interp(grid, *np.array(curve).T) for curve in row["curves"] if curve])
            axes.plot(grid, lines.mean(0), color=colour, label=row["label"])
            if len(lines) > 1:
                axes.fill_between(grid, lines.min(0), lines.max(0), color=colour, alpha=0.15, linewidth=0)
        axes.set(xlabel="share of the run", ylabel="mean margin / its deviation at the end")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    ends = "; ".join(f"{row['label']} ends at {np.mean([c[-1][1] for c in row['curves']]):.2f}" for row in rows)
    caption = (
        "Mean held-out margin of each method's own reward, in units of the deviation of its final margins; bands are "
        "the range over seeds. Steps of solvers and of training are not alike: only the shapes compare."
    )
    return drawing(f"margins-{_key(place)}", f"Held-out margins along the run. {ends}.", caption, draw)


def accuracy_by_flops(place: Mapping[str, Any], measure: str = "accuracy") -> Drawing | None:
    """Figure 5: ranking accuracy, or win rate, against the FLOPs of a run with its search."""
    rows = [row for row in place["methods"] if row["costs"] and row[measure]]
    points = []
    for row in rows:
        costs = row["costs"]["counter"] or row["costs"]["flops"]
        points.append((row, costs["run"], costs["run"] + costs["search"]))
    if len(points) < FEWEST:
        return None
    name = "ranked right" if measure == "accuracy" else "wins against the base"

    shades = _shades(place)

    def draw(axes: Any) -> None:
        axes.axhline(50, color=GREY, linewidth=1, linestyle=":")
        for row, run, searched in points:
            colour, estimate = shades[row["label"]], row[measure]
            value = 100 * estimate["value"]
            ends = [[value - 100 * estimate["low"]], [100 * estimate["high"] - value]]
            axes.errorbar(
                [run], [value], ends, fmt="o", color=colour, ms=5, capsize=2.5, elinewidth=1, label=row["label"]
            )
            if searched > run:
                axes.plot([run, searched], [value, value], ":", color=colour, linewidth=1.2)
                axes.plot(searched, value, "o", mfc="none", mec=colour, ms=5)
        axes.set_xscale("log")
        axes.grid(which="minor", visible=False)
        axes.set(xlabel="FLOPs", ylabel=f"{name}, %")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    parts = "; ".join(
        f"{row['label']}: {100 * row[measure]['value']:.1f} % at {run:.2g} FLOP" for row, run, _ in points
    )
    caption = (
        "A full dot is one run, a hollow one the run with the search of its learning rate. Bars are 95 % intervals."
    )
    return drawing(f"{measure}-flops-{_key(place)}", f"Held-out pairs, {name}, by FLOPs. {parts}.", caption, draw)


def wins_by_kl(place: Mapping[str, Any]) -> Drawing | None:
    """Wins against what they are bought with: every policy along its strengths, all others where they are."""
    dials = {one["of"]: one["dial"] for one in place["survival"]}
    shown = [row for row in place["methods"] if row["win_rate"] and row["kl"]]
    if not any(dials.get(row["label"]) for row in shown):
        return None

    def points(row: Mapping[str, Any]) -> list[tuple[float, Mapping[str, Any]]]:
        dial = [(one["kl"]["value"], one["wins"]) for one in dials.get(row["label"]) or []]
        return dial or [(row["kl"]["value"], row["win_rate"])]

    if sum(len(points(row)) for row in shown) < FEWEST:
        return None

    shades = _shades(place)

    def draw(axes: Any) -> None:
        axes.axhline(50, color=GREY, linewidth=1, linestyle=":")
        for row in shown:
            colour, found = shades[row["label"]], points(row)
            at, wins = [kl for kl, _ in found], [100 * one["value"] for _, one in found]
            ends = [[100 * (one["value"] - one["low"]) for _, one in found]]
            ends += [[100 * (one["high"] - one["value"]) for _, one in found]]
            mark = "o" if len(found) > 1 else "s"
            axes.errorbar(at, wins, ends, fmt=mark, color=colour, ms=4, capsize=2, elinewidth=0.8, label=row["label"])
            if len(found) > 1:
                axes.plot([0, *at], [50, *wins], color=colour, linewidth=1.2)
        axes.set(xlabel="KL a reply, nats", ylabel="wins against the unguided start, %")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    parts = "; ".join(
        f"{row['label']}: " + ", ".join(f"{100 * one['value']:.0f} % at {kl:.2g} nats" for kl, one in points(row))
        for row in shown
    )
    caption = (
        "A line is one policy along its strengths, from the start at none; squares have one strength. Bars are 95 % "
        "intervals. Up and to the left is better."
    )
    return drawing(f"wins-kl-{_key(place)}", f"Wins by KL. {parts}.", caption, draw, size=(9.0, 4.2), wide=True)


def _shades(place: Mapping[str, Any]) -> dict[str, str]:
    """A colour for each method, the same in every figure of a place."""
    names = [row["label"] for row in place["methods"]]
    return dict(zip(names, colours(len(names)), strict=True))


def _key(place: Mapping[str, Any]) -> str:
    return "-".join(str(place[name]) for name in ("dataset", "model", "init"))
