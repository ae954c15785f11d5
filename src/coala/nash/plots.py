"""Paths over the triangle of three answers, and gap and distance by update, as figures of a page."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from coala.nash.game import Policies, Series, Vector
from coala.pages.drawing import COLOURS, INK, LINE, PAPER, Drawing, colours, drawing
from coala.values import CoalaError

CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(3) / 2]])
MOST_POINTS = 1500  # of a path; a longer one is thinned


def simplex_plot(
    name: str,
    policies: Policies,
    labels: Sequence[str],
    nash: Vector,
    *,
    title: str = "",
    key: str = "",
    words: str = "",
    caption: str = "",
) -> Drawing:
    """Policies (T, 3) of a method over the triangle of three answers; a cross marks ``nash`` (3,).

    A hollow dot is the start, a full one the end. Of two figures of a page ``name``, ``title`` or ``key`` must differ.
    """
    if policies.ndim != 2 or policies.shape[1] != 3:
        raise CoalaError(f"Path {name!r} has shape {policies.shape}; a triangle shows policies (T, 3).")

    def draw(axes: Any) -> None:
        axes.set_axis_off()
        axes.set_aspect("equal")
        axes.plot(*np.vstack([CORNERS, CORNERS[:1]]).T, color=LINE, linewidth=1)
        for (x, y), label, side in zip(CORNERS, labels, ("right", "left", "center"), strict=True):
            axes.annotate(_short(label), (x, y), xytext=(0, 4 if y else -12), textcoords="offset points", ha=side)
        x, y = (policies[_thinned(len(policies))] @ CORNERS).T
        axes.plot(x, y, color=COLOURS[0], linewidth=1, alpha=0.8)
        axes.plot(x[0], y[0], "o", ms=5, mfc=PAPER, mec=COLOURS[0])
        axes.plot(x[-1], y[-1], "o", ms=5, color=COLOURS[0])
        axes.plot(*(nash @ CORNERS), "+", color=INK, ms=12, mew=1.6)
        if title:
            axes.set_title(_short(title))

    return drawing(f"simplex {key} {title} {name}", words, caption, draw, size=(3.4, 3.2))


def curves(
    series: Mapping[str, Series],
    ylabel: str,
    words: str,
    caption: str = "",
    *,
    floor: float = 1e-16,
    xlabel: str = "outer update",
    first: int = 0,
    wide: bool = False,
) -> Drawing:
    """Each named series (T,) by update, logarithmic; values below ``floor`` (rounding) are drawn at it.

    ``first`` is the number of the first of them.
    """

    def draw(axes: Any) -> None:
        for (name, values), colour in zip(series.items(), colours(len(series)), strict=True):
            kept = _thinned(len(values))
            line = np.maximum(values[kept], floor)
            axes.semilogy(first + kept, line, color=colour, linewidth=1.5, label=_short(name))
        axes.set(xlabel=xlabel, ylabel=ylabel)
        _whole_numbers(axes)
        axes.grid(which="minor", visible=False)
        if len(series) > 1:
            # Beside the lines: among many there is no free corner.
            axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    size = (9.0 if wide else 5.4 if len(series) == 1 else 6.4, 3.4 if wide else 3.1)
    return drawing(ylabel + "".join(series), words, caption, draw, size=size, wide=wide)


def probability_curves(
    policies: Policies, labels: Sequence[str], *, title: str = "", key: str = "", words: str = "", caption: str = ""
) -> Drawing:
    """Probability of each answer (T, n) by outer update; for games that no triangle shows. At most ten lines.

    Of two figures of a page ``title`` or ``key`` must differ.
    """
    largest = np.argsort(-policies[-1], kind="stable")[: len(COLOURS)]

    def draw(axes: Any) -> None:
        kept = _thinned(len(policies))
        for i, colour in zip(largest, COLOURS, strict=False):
            axes.plot(kept, policies[kept, i], color=colour, linewidth=1.5, label=_short(labels[i]))
        axes.set(xlabel="outer update", ylabel="probability", ylim=(-0.02, 1.02), title=_short(title))
        _whole_numbers(axes)
        axes.legend(fontsize=8)

    return drawing(f"probability {key} {title}", words, caption, draw)


def _whole_numbers(axes: Any) -> None:
    """Ticks at updates, of which there are no halves."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def _thinned(n: int) -> Any:
    return np.unique(np.linspace(0, n - 1, min(n, MOST_POINTS)).round().astype(int))


def _short(text: str) -> str:
    # Control characters have no place in XML, and one that turns the direction of writing would turn its neighbours.
    clean = "".join(" " if unicodedata.category(sign).startswith("C") else sign for sign in text)
    # A leading underscore would hide the line from the legend.
    clean = clean.strip().lstrip("_")
    return clean if len(clean) <= 28 else clean[:27] + "…"
