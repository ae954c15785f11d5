"""The results as one HTML page, and the templates of all pages; nothing is computed here.

The look is that of the run report. Every text reaches a page through Jinja's autoescaping.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from coala.survey.results import Results
from coala.values import Estimate

if TYPE_CHECKING:
    from jinja2 import Environment


def environment() -> Environment:
    """Templates of ``pages`` beside this module, with the style sheet of the run report."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    here = Path(__file__).parent
    found = Environment(
        loader=FileSystemLoader([here / "pages", here.parent / "report"]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"percent": percent, "points": points, "seconds": seconds, "p_value": p_value, "bar": bar}
    return found


def results_page(results: Results) -> str:
    """One self-contained page: no script, nothing fetched, the same bytes for the same results."""
    return (
        environment().get_template("results.html").render(results=results, verdicts=verdicts(results)).rstrip() + "\n"
    )


def verdicts(results: Results) -> list[str]:
    """What can be said of each category in a sentence."""
    said = []
    for part in results.parts:
        rates = sorted(part.rates, key=lambda rate: -rate.over_both.value)
        best, second = rates[0], rates[1]
        contrast = next(
            d.over_both
            for d in part.differences
            if {d.over_both.first, d.over_both.second} == {best.method, second.method}
        )
        head = f"{part.name}: {best.method} has the most votes, {percent(best.over_both)}"
        if contrast.adjusted < 0.05:
            said.append(f"{head}; its lead over {second.method} is more than chance ({p_value(contrast.adjusted)}).")
        else:
            said.append(f"{head}; that it leads {second.method} may be chance ({p_value(contrast.adjusted)}).")
    # A number and its unit stay on one line.
    return [sentence.replace(" %", "\u00a0%").replace("p = ", "p\u00a0=\u00a0") for sentence in said]


def percent(found: Estimate, digits: int = 1) -> str:
    """``39.1 % (35.0 to 43.4 %)``."""
    if not math.isfinite(found.value):
        return "unknown"
    if not (math.isfinite(found.low) and math.isfinite(found.high)):
        return f"{100 * found.value:.{digits}f} % (no interval)"
    # A published interval may leave [0, 1]; it is shown as it is.
    return f"{100 * found.value:.{digits}f} % ({100 * found.low:.{digits}f} to {100 * found.high:.{digits}f} %)"


def points(found: Estimate) -> str:
    """``+10.3 points (+2.1 to +18.4)``."""
    return f"{100 * found.value:+.1f} points ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def seconds(found: Estimate) -> str:
    """``12.4 s (10.1 to 15.0)``."""
    ends = f"({found.low:.1f} to {found.high:.1f})" if math.isfinite(found.low + found.high) else "(no interval)"
    return f"{found.value:.1f} s {ends}"


def p_value(p: float) -> str:
    if math.isnan(p):
        return "p unknown"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def bar(found: Estimate) -> dict[str, float]:
    """Where the ends and the value of a share lie on a scale from 0 to 100."""
    low, high = (100 * min(1.0, max(0.0, end)) for end in (found.low, found.high))
    return {"low": low, "width": high - low, "at": 100 * found.value}
