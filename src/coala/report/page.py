"""Lays the content of a report out as one HTML page; the template is ``page.html`` beside this module.

Everything reaches the page through Jinja's autoescaping; only the figures, made here of numbers, are marked as safe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from coala.report import figures
from coala.report.conclusions import certified_gap, conclusions
from coala.report.content import Interval, flops, number, seconds, size
from coala.report.evaluations import view
from coala.report.figures import Drawing


def render(content: Mapping[str, Any]) -> str:
    """The page of a plain content (:func:`coala.report.content.plain`)."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "seconds": seconds, "flops": flops, "size": size}
    return environment.get_template("page.html").render(_view(content)).rstrip() + "\n"


def _view(content: Mapping[str, Any]) -> dict[str, Any]:
    summary, head, curves = (_mapping(content.get(name)) for name in ("summary", "head", "curves"))
    costs, win_rates, samples = (_rows(content.get(name)) for name in ("costs", "win_rates", "samples"))
    solver, perplexity = _rows(curves.get("solver")), _mapping(content.get("perplexity"))
    unit = str(content.get("length_unit") or "characters")
    return {
        "title": str(content.get("title") or "COALA alignment report"),
        "command": content.get("command"),
        "created": content.get("created"),
        "settings": list(_flat(content.get("settings"))),
        "summary": summary,
        "conclusions": [sentence.replace(" %", "\u00a0%") for sentence in conclusions(content)],
        "tiles": _tiles(content, summary, head),
        "reads": [str(line) for line in content.get("reads") or []],
        "findings": _rows(content.get("data_findings")),
        "data_read": content.get("data_findings") is not None,
        "certificate": _certificate(summary, head),
        "certificate_table": list(_solved(_mapping(head.get("certificate")))),
        "certificate_figures": _drawn(figures.gap_bar(_mapping(head.get("certificate")))),
        "certificate_facts": list(_flat(head.get("certificate"))),
        "spec": list(_flat(head.get("spec"))),
        "fit_figures": _drawn(
            figures.margin_curve(_rows(curves.get("margin"))),
            figures.gap_curve(solver),
            figures.objective_curve(solver),
            figures.ridge_chart(_rows(content.get("path"))),
            figures.path_chart(_rows(content.get("path"))),
        ),
        "ranking_figures": _drawn(
            figures.histograms(_mapping(content.get("scores"))),
            figures.reliability_curve(_mapping(content.get("reliability"))),
            figures.length_chart(_rows(content.get("by_length")), unit),
        ),
        "layer_choice": summary.get("layer"),
        "layers": _rows(content.get("layers")),
        "path": _rows(content.get("path")),
        "ranking": _ranking(summary, _mapping(content.get("reliability"))),
        "by_length": [
            {**row, "worded": Interval(row.get("accuracy")).percent(), "n": Interval(row.get("accuracy")).n}
            for row in _rows(content.get("by_length"))
        ],
        "length_unit": unit,
        "win_rates": [_contest(row) for row in win_rates],
        "perplexity": [
            (name, "", estimate.plain(), _how(estimate))
            for name, estimate in ((name, Interval(perplexity.get(name))) for name in ("unguided", "guided"))
            if estimate
        ],
        "samples": [{**row, "scores": _mapping(row.get("scores"))} for row in samples],
        "evaluations": [view(row) for row in _rows(content.get("evaluations"))],
        "costs": [{**row, "over_bound": _over_bound(row)} for row in costs],
        "costs_bounded": any(_over_bound(row) is not None for row in costs),
    }


def _over_bound(row: Mapping[str, Any]) -> float | None:
    """Work done over the least that could be, where both are known."""
    done, least = row.get("flops"), row.get("flops_bound")
    if isinstance(done, int | float) and isinstance(least, int | float) and least > 0:
        return done / least
    return None


def _tiles(content: Mapping[str, Any], summary: Mapping[str, Any], head: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The key numbers; those that are shares carry their interval on the scale from 0 to 1."""
    tiles: list[dict[str, Any]] = []

    def share(label: str, estimate: Any, note: str) -> None:
        rate = Interval(estimate)
        if rate:
            span = f"{100 * rate.low:.1f} to {100 * rate.high:.1f} %" if rate.bounded else "no interval"
            bar = {"low": 100 * max(0.0, rate.low), "high": 100 * min(1.0, rate.high), "at": 100 * rate.value}
            tiles.append({"label": label, "value": f"{100 * rate.value:.1f} %", "note": f"{span}, {note}", "bar": bar})

    accuracy = Interval(summary.get("accuracy_eval"))
    share("Ranked right, held-out", summary.get("accuracy_eval"), f"n = {accuracy.n:,}")
    for row in _rows(content.get("win_rates"))[:2]:
        rate = Interval(row.get("estimate"))
        share(f"Guided wins, {row.get('judge') or 'judge'}", row.get("estimate"), f"n = {rate.n:,}")
    gap, _ = certified_gap(summary, head)
    if gap is not None:
        tiles.append({"label": "Certified gap", "value": f"{100 * gap:.2g} %", "note": "of the objective, proved"})
    both = _mapping(content.get("perplexity"))
    guided, unguided = Interval(both.get("guided")), Interval(both.get("unguided"))
    if guided and unguided:
        note = f"without guidance {number(unguided.value)}"
        tiles.append({"label": "Perplexity, guided", "value": number(guided.value), "note": note})
    if summary.get("seconds") is not None:
        work = summary.get("gflops")
        note = flops(work * 1e9) if isinstance(work, int | float) else "wall time"
        tiles.append({"label": "Whole run", "value": seconds(summary["seconds"]), "note": note})
    return tiles


def _ranking(summary: Mapping[str, Any], found: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of label, comment, worded estimate, and how it was made."""
    rows = []
    for key, label, form in (
        ("accuracy_eval", "Held-out pairs ranked right", "percent"),
        ("accuracy_train", "Training pairs ranked right", "percent"),
        ("linear_accuracy_eval", "Held-out pairs ranked right by a linear head", "percent"),
        ("gain_over_linear", "Gain over the linear head", "points"),
        ("nll_eval", "Held-out NLL per pair (a coin: 0.693)", "plain"),
    ):
        estimate = Interval(summary.get(key))
        if estimate:
            worded = estimate.plain() if form == "plain" else estimate.percent(points=form == "points")
            rows.append((label, "", worded, _how(estimate)))
    error = Interval(summary.get("calibration_error"))
    if error:
        chance = found.get("error_by_chance")
        comment = "" if chance is None else f"By chance alone: {100 * chance:.1f} points"
        rows.append(("Held-out calibration error", comment, _points(error), _how(error)))
    return rows


def _points(error: Interval) -> str:
    ends = f"({100 * error.low:.1f} to {100 * error.high:.1f})" if error.bounded else "(no interval)"
    return f"{100 * error.value:.1f} points {ends}"


def _solved(certificate: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The certificate as a table: what was solved, how well, and with what."""
    for key, label in (("program", "Convex program"), ("status", "Status")):
        if certificate.get(key):
            yield label, str(certificate[key])
    objective, bound, gap = (certificate.get(key) for key in ("objective", "lower_bound", "relative_gap"))
    if objective is not None and bound is not None:
        yield "Optimal value", f"at least {_fine(bound)} (dual), at most {_fine(objective)} (primal)"
    if gap is not None:
        asked = certificate.get("tolerance")
        yield "Relative gap", number(gap) if asked is None else f"{number(gap)}, of {number(asked)} asked for"
    first = _mapping(_mapping(certificate.get("facts")).get("phase_one")).get("relative_gap")
    if first is not None:
        yield "Relative gap of Phase I", number(first)
    violation = certificate.get("violation")
    if violation is not None:
        worded = "no constraint is violated" if violation == 0 else f"constraints are violated by {number(violation)}"
        yield "Feasibility", worded
    for key, label in (("n_patterns", "Gates"), ("precision", "Precision"), ("seed", "Seed")):
        if certificate.get(key) is not None:
            yield label, number(certificate[key])
    versions = _mapping(certificate.get("versions"))
    if versions:
        yield "Versions", ", ".join(f"{name} {versions[name]}" for name in sorted(versions))


def _how(estimate: Interval) -> str:
    return f"n = {estimate.n:,}{'; ' if estimate.method else ''}{estimate.method}"


def _certificate(summary: Mapping[str, Any], head: Mapping[str, Any]) -> dict[str, str] | None:
    """The three parts of the box: what is proved, what is only estimated, what nobody claims."""
    if not head and not summary.get("statement"):
        return None
    certificate = _mapping(head.get("certificate"))
    gap, tolerance = certified_gap(summary, head)
    proved = str(certificate.get("statement") or summary.get("statement") or "")
    if gap is not None and not proved:
        proved = (
            "A dual solution shows that no weights of this convex program, with these gates and penalties, have an "
            f"objective lower by more than {100 * gap:.2g} % of it."
        )
    if certificate.get("objective") is not None and certificate.get("lower_bound") is not None:
        objective, bound = (_fine(certificate[key]) for key in ("objective", "lower_bound"))
        proved += f" The objective is {objective}; nothing below {bound} can be reached."
    if tolerance is not None and gap is not None:
        met = "met" if gap <= tolerance else "not met"
        proved += f" The tolerance asked for, {number(tolerance)}, was {met}."
    estimated = _search(_mapping(_mapping(certificate.get("facts")).get("gates_estimate")))
    measured = (
        "Accuracies, win rates and perplexities are measured on samples, each with a 95 % interval; none of them is "
        "a part of the proof."
    )
    return {
        "proved": proved.strip() or "Nothing: no optimality gap was certified for this head.",
        "estimated": f"{estimated} {measured}".strip(),
        "unclaimed": "That other gates, another layer or a larger network could not do better, and that text guided by "
        "an optimal head is better text. The proof is about the fit alone.",
    }


def _search(found: Mapping[str, Any]) -> str:
    """What the local search over all gates says, and whether that is good news."""
    violation, starts = found.get("largest_violation"), found.get("starts")
    if violation is None:
        return ""
    where = f"a local search{f' from {number(starts)} starts' if starts is not None else ''}"
    if isinstance(violation, int | float) and violation > 1.1:
        return (
            f"Over all possible gates this head is not optimal: {where} found one that pulls at the objective with "
            f"{number(violation)} times what the penalty holds back. Allowing more neurons would fit the training "
            "pairs better."
        )
    return (
        f"Over all possible gates: {where} found none that pulls at the objective with more than {number(violation)} "
        "of what the penalty holds back (at most 1 at an optimum). A search may miss one."
    )


def _fine(value: Any) -> str:
    """Enough digits to tell an objective from a bound that is close to it."""
    return f"{value:.9g}" if isinstance(value, float) else number(value)


def _contest(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    rate = Interval(row.get("estimate"))
    return str(row.get("judge") or "judge"), str(row.get("comment") or ""), rate.percent(), _how(rate)


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as dotted names and words, in the order of the names (report.json keeps no other)."""
    for key, inner in sorted(_mapping(value).items()):
        name = f"{prefix}{key}"
        if isinstance(inner, Mapping) and inner:
            yield from _flat(inner, f"{name}.")
        elif isinstance(inner, list) and any(isinstance(row, Mapping) for row in inner):
            yield name, f"{len(inner)} rows, in report.json"
        elif isinstance(inner, list):
            yield name, ", ".join(map(number, inner)) or "none"
        else:
            yield name, number(inner) if inner is not None else "not set"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _rows(value: Any) -> list[Mapping[str, Any]]:
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def _drawn(*drawings: Drawing | None) -> list[dict[str, Any]]:
    from markupsafe import Markup

    return [{"svg": Markup(d.svg), "title": d.title, "caption": d.caption} for d in drawings if d is not None]
