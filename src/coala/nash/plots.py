"""Paths over the triangle of three answers, and gap and distance by update, as inline SVG.

The same bytes for the same numbers, text as text, nothing fetched. Each function returns one ``<svg>`` element.
"""

from __future__ import annotations

import html
import io
import re
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from coala.nash.game import Policies, Series, Vector
from coala.values import CoalaError

COLOURS = ("#1f6f8b", "#d1603d", "#5b8a3c", "#8b5fa8", "#b08a1e", "#3f4a56", "#c2527f", "#4f9c95", "#7a6a58", "#5d6fc4")
GREY, INK = "#8a929c", "#2b3138"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#b4bac2",
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e7eaee",
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "svg.fonttype": "none",
    "xtick.color": "#59616b",
    "ytick.color": "#59616b",
    "text.color": INK,
    # A label is a name, never a formula: a dollar sign in it is a dollar sign.
    "text.parse_math": False,
}
CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(3) / 2]])
MOST_POINTS = 1500  # of a path; a longer one is thinned


def simplex_plot(
    paths: Mapping[str, Policies], labels: Sequence[str], nash: Vector | None = None, title: str = "", key: str = ""
) -> str:
    """Policies (T, 3) of each named path over the triangle of three answers; a cross marks ``nash`` (3,).

    A hollow dot is the start, a full one the end.
    """
    for name, policies in paths.items():
        if policies.ndim != 2 or policies.shape[1] != 3:
            raise CoalaError(f"Path {name!r} has shape {policies.shape}; a triangle shows policies (T, 3).")

    def draw(axes: Any) -> None:
        axes.set_axis_off()
        axes.set_aspect("equal")
        axes.plot(*np.vstack([CORNERS, CORNERS[:1]]).T, color="#b4bac2", linewidth=1)
        for (x, y), label, side in zip(CORNERS, labels, ("right", "left", "center"), strict=True):
            axes.annotate(_short(label), (x, y), xytext=(0, 4 if y else -12), textcoords="offset points", ha=side)
        for (name, policies), colour in zip(paths.items(), _colours(len(paths)), strict=True):
            kept = _thinned(len(policies))
            x, y = (policies[kept] @ CORNERS).T
            axes.plot(x, y, color=colour, linewidth=1, alpha=0.8, label=_short(name))
            axes.plot(x[0], y[0], "o", ms=5, mfc="white", mec=colour)
            axes.plot(x[-1], y[-1], "o", ms=5, color=colour)
        if nash is not None:
            axes.plot(*(nash @ CORNERS), "+", color=INK, ms=12, mew=1.6)
        if len(paths) > 1:
            axes.legend(fontsize=8, loc="upper left")
        if title:
            axes.set_title(_short(title))

    return _svg("simplex" + key + title + "".join(paths), draw, (3.4, 3.2))


def curves(series: Mapping[str, Series], ylabel: str, *, floor: float = 1e-16, xlabel: str = "outer update") -> str:
    """Each named series (T,) by update, logarithmic; values below ``floor`` (rounding) are drawn at it."""

    def draw(axes: Any) -> None:
        for (name, values), colour in zip(series.items(), _colours(len(series)), strict=True):
            kept = _thinned(len(values))
            axes.semilogy(kept, np.maximum(values[kept], floor), color=colour, label=_short(name))
        # Not the default 10^-2 in mathematical type, for text is not parsed as formulas here.
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(which="minor", visible=False)
        if len(series) > 1:
            # Beside the lines: among many there is no free corner.
            axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    return _svg(ylabel + "".join(series), draw, (5.4 if len(series) == 1 else 6.4, 3.1))


def probability_curves(policies: Policies, labels: Sequence[str], title: str = "") -> str:
    """Probability of each answer (T, n) by outer update; for games that no triangle shows. At most ten lines."""
    largest = np.argsort(-policies[-1], kind="stable")[: len(COLOURS)]

    def draw(axes: Any) -> None:
        kept = _thinned(len(policies))
        for i, colour in zip(largest, COLOURS, strict=False):
            axes.plot(kept, policies[kept, i], color=colour, label=_short(labels[i]))
        axes.set(xlabel="outer update", ylabel="probability", ylim=(-0.02, 1.02), title=_short(title))
        axes.legend(fontsize=8)

    return _svg("probability" + title + "".join(labels), draw, (5.4, 3.1))


def _colours(n: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(n)]


def _thinned(n: int) -> Any:
    return np.unique(np.linspace(0, n - 1, min(n, MOST_POINTS)).round().astype(int))


def _short(text: str) -> str:
    # Control characters have no place in XML, and one that turns the direction of writing would turn its neighbours.
    clean = "".join(" " if unicodedata.category(sign).startswith("C") else sign for sign in text)
    # A leading underscore would hide the line from the legend.
    clean = clean.strip().lstrip("_")
    return clean if len(clean) <= 28 else clean[:27] + "…"


def _svg(name: str, draw: Callable[[Any], None], size: tuple[float, float]) -> str:
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, NullFormatter

    key = re.sub(r"\W", "-", name)[:80]
    # "default" first: the reader's own matplotlib settings must not change the figure.
    style = matplotlib.style.context(["default", STYLE, {"svg.hashsalt": f"coala-{key}"}])
    with style, warnings.catch_warnings():
        # Text stays text: the reader's fonts have the signs that matplotlib's own lacks.
        warnings.filterwarnings("ignore", "Glyph")
        figure = Figure(figsize=size, layout="constrained", facecolor="none")
        axes = figure.subplots()
        axes.set_facecolor("none")
        draw(axes)
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                # 1e-4, not a power set as mathematics: parsing those takes most of the time of a figure.
                axis.set_major_formatter(LogFormatter(labelOnlyBase=True))
                axis.set_minor_formatter(NullFormatter())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # Ids are made unique among the figures of a page.
    svg = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>fig-{html.escape(key)}-", svg)
    # Coordinates to a hundredth of a point are enough for a screen.
    return re.sub(r"(\d+\.\d{2})\d+", r"\1", svg).strip()
