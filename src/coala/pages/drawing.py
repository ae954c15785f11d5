"""Figures as inline SVG: the same bytes for the same numbers, text as text, nothing fetched."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from markupsafe import Markup

from coala.pages.parts import element

BLUE, ORANGE, GREEN, GREY, INK, LINE = "#1f6f8b", "#d1603d", "#5b8a3c", "#8a929c", "#2b3138", "#b4bac2"
COLOURS = (BLUE, ORANGE, GREEN, "#8b5fa8", "#b08a1e", "#c2527f", "#3f4a56", "#4f9c95", "#7a6a58", "#5d6fc4")
FEWEST = 3  # points of a figure: fewer are numbers, which a table has
FEW_DECADES = 100  # from end to end of a logarithmic axis, below which numbers between powers of ten are shown
SOFT, GRID, PAPER = "#59616b", "#e7eaee", "#ffffff"
# page.css has another of each for a dark screen, under its number here.
PALETTE = (*COLOURS, GREY, INK, LINE, SOFT, GRID, PAPER)
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.9,
    "lines.solid_capstyle": "round",
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.color": INK,
    # A label is a name, never a formula: a dollar sign in it is a dollar sign.
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Drawing:
    """An SVG element, a sentence for those who cannot see it, and its caption; a ``wide`` one has a row of its own."""

    svg: str
    title: str
    caption: str = ""
    wide: bool = False

    def __html__(self) -> str:
        plate = element("div", Markup(_adaptable(self.svg)), class_="plate", role="img", aria_label=self.title)
        caption = [element("figcaption", self.caption)] if self.caption else []
        return element("figure", plate, *caption, class_="wide" if self.wide else None)


def colours(n: int) -> Iterator[str]:
    """``n`` colours, the first again once there are no more."""
    return islice(cycle(COLOURS), n)


def drawing(
    name: str,
    title: str,
    caption: str,
    draw: Callable[[Any], None],
    *,
    size: tuple[float, float] = (5.4, 3.1),
    wide: bool = False,
) -> Drawing:
    """What ``draw`` puts on the axes it is given, ``size`` inches large; ``name`` is the figure's own on its page."""
    import matplotlib.style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogFormatter, LogFormatterSciNotation, LogLocator, NullFormatter

    key = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:8]
    # "default" first: the reader's own matplotlib settings must not change the page.
    style = matplotlib.style.context(["default", STYLE, {"svg.hashsalt": f"coala-{key}"}])
    with style, warnings.catch_warnings():
        # Text stays text: the reader's fonts have the signs that matplotlib's own lacks.
        warnings.filterwarnings("ignore", "Glyph")
        figure = Figure(figsize=size, facecolor="none")
        axes = figure.subplots()
        axes.set_facecolor("none")
        draw(axes)
        for axis in (axes.xaxis, axes.yaxis):
            # Ticks that were named stay so.
            if axis.get_scale() == "log" and isinstance(axis.get_major_formatter(), LogFormatterSciNotation):
                # 1e-4, not a power set as mathematics: parsing those takes most of the time of a figure.
                low, high = axis.get_view_interval()
                if high / low < FEW_DECADES:
                    # Powers of ten alone would leave one number, or none.
                    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                else:
                    axis.set_major_formatter(LogFormatter(labelOnlyBase=True))
                axis.set_minor_formatter(NullFormatter())
                axes.tick_params(which="minor", length=0)
        _fill(figure, axes)
        text = io.StringIO()
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(text, metadata={"Date": None, "Creator": None})
    return Drawing(_inline(text.getvalue(), key), title, caption, wide)


def _fill(figure: Any, axes: Any, margin: float = 3.0) -> None:
    """Let axes and labels fill the figure but for ``margin`` points; matplotlib's own engines measure three times."""
    from matplotlib.ticker import FixedLocator

    figure.subplots_adjust(left=0.12, right=0.97, bottom=0.17, top=0.96)
    for axis in (axes.xaxis, axes.yaxis):
        # Other ticks on the final size would have wider labels than those that are measured here.
        if axis.get_scale() == "linear":
            axis.set_major_locator(FixedLocator(axis.get_majorticklocs()))
    inner, outer, whole = axes.bbox, axes.get_tightbbox(), figure.bbox
    pixels = margin * figure.dpi / 72
    left, bottom = inner.x0 - outer.x0 + pixels, inner.y0 - outer.y0 + pixels
    right, top = outer.x1 - inner.x1 + pixels, outer.y1 - inner.y1 + pixels
    figure.subplots_adjust(
        left=left / whole.width,
        right=1 - right / whole.width,
        bottom=bottom / whole.height,
        top=1 - top / whole.height,
    )


def _inline(svg: str, key: str) -> str:
    """The ``<svg>`` element alone, its ids made unique among the page's figures."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>fig-{key}-", svg)
    # Coordinates to a hundredth of a point are enough for a screen; texts between the tags keep their digits.
    return re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), svg)


def _adaptable(svg: str) -> str:
    """With colours that its page may change; texts between the tags keep their signs."""

    def named(colour: re.Match[str]) -> str:
        return f"var(--c{PALETTE.index(colour[0])}, {colour[0]})" if colour[0] in PALETTE else colour[0]

    return re.sub(r'(?<=style=")[^"]*', lambda style: re.sub(r"#[0-9a-f]{6}\b", named, style[0]), svg)
