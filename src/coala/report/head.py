"""The page's sections on the head: its certificate, how it ranks held-out pairs, how it was fitted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from coala.pages.drawing import FEWEST
from coala.pages.parts import (
    Part,
    Table,
    beneath,
    details,
    element,
    facts,
    gallery,
    joined,
    missing,
    paragraphs,
    titled,
)
from coala.pages.words import Interval, number
from coala.report import figures
from coala.report.conclusions import certified_gap
from coala.report.content import mapping_of, rows_of

MEASURES = ("Measure", "Value (95 % interval)", "How")


def certificate_parts(summary: Mapping[str, Any], head: Mapping[str, Any]) -> list[Part]:
    claims = _claims(summary, head)
    if claims is None:
        return [missing("No head was saved, so nothing is certified.")]
    certificate = mapping_of(head.get("certificate"))
    boxes = [
        element("div", element("dt", name), element("dd", claims[kind]), class_=kind)
        for kind, name in (("proved", "Proved"), ("estimated", "Estimated"), ("unclaimed", "Not claimed"))
    ]
    return [
        element("dl", joined(boxes), class_="certificate"),
        facts("What was solved", _solved(certificate)),
        folded("All values of the certificate", "Values of the certificate", certificate),
        folded("What the head reads", "Feature specification", head.get("spec")),
    ]


def ranking_parts(content: Mapping[str, Any], summary: Mapping[str, Any]) -> list[Part]:
    rows = _measured(summary, mapping_of(content.get("reliability")))
    lengths, unit = rows_of(content.get("by_length")), str(content.get("length_unit") or "characters")
    scores, reliable = mapping_of(content.get("scores")), mapping_of(content.get("reliability"))
    chart = figures.length_chart(lengths, unit)
    drawn = gallery(figures.histograms(scores), figures.reliability_curve(reliable), chart)
    by_length = [
        (
            f"{number(row.get('low'))} to {number(row.get('high'))}",
            Interval(row.get("accuracy")).percent(),
            str(Interval(row.get("accuracy")).n),
        )
        for row in lengths
    ]
    head = (f"Chosen minus rejected, {unit}", "Ranked right (95 % interval)", "Pairs")
    return [
        Table("Ranking of replies by the head", MEASURES, rows, kind="measures")
        or missing("No ranking accuracy was saved for this run."),
        joined([drawn, *_few_scores(scores, reliable)])
        or missing("No held-out scores were saved, so there are no histograms."),
        details(
            "Accuracy by length difference, as a table",
            Table("Ranking accuracy by length difference", head, by_length, left=(1,)),
            opened=chart is None,
        ),
    ]


def fit_parts(content: Mapping[str, Any], summary: Mapping[str, Any], curves: Mapping[str, Any]) -> list[Part]:
    solver, path, layers = rows_of(curves.get("solver")), rows_of(content.get("path")), rows_of(content.get("layers"))
    margins, by_path = rows_of(curves.get("margin")), (figures.ridge_chart(path), figures.path_chart(path))
    drawn = gallery(figures.margin_curve(margins), figures.gap_curve(solver), figures.objective_curve(solver), *by_path)
    told = (
        "A linear head on each layer, held-out pairs of a sample. Chosen is the lowest within one standard error of "
        "the best, or the last if the sample cannot decide."
    )
    columns = {"Layer": "layer", "Share of a forward pass": "cost", "CV NLL": "nll", "Above the best": "excess"}
    columns |= {"Std. error": "excess_error", "CV accuracy": "accuracy"}
    by_layer = _columns("Held-out loss by layer", columns, layers, "chosen", 0)
    columns = {"Ridge": "tau", "Gates on": "gate_on", "Relative sparsity": "beta_rel", "Relaxed to": "relaxation"}
    columns |= {"CV NLL": "cv_nll", "Std. error": "cv_se", "CV accuracy": "cv_accuracy", "Neurons": "n_neurons"}
    named = [{**row, "beta_rel": "linear" if row.get("beta_rel") is None else row["beta_rel"]} for row in path]
    by_setting = _columns("Regularisation path", columns, named, "selected", 2, left=(1, 2))
    return [
        joined([drawn, *_few_steps(margins, solver)]) or missing("No solver history was saved for this run."),
        paragraphs(str(summary["layer"])) if summary.get("layer") else None,
        details("The layer used, and how the others compare", paragraphs(told), by_layer) if by_layer else None,
        details("Regularisation path, as a table", by_setting, opened=not any(by_path)),
    ]


def _few_scores(scores: Mapping[str, Any], reliable: Mapping[str, Any]) -> Iterator[Part]:
    """What would be a figure of hardly a point, as numbers."""
    both = [[number(one) for one in scores.get(name) or []] for name in ("chosen", "rejected")]
    if 0 < min(map(len, both)) < FEWEST:
        rows = [(str(place), *pair) for place, pair in enumerate(zip_longest(*both, fillvalue=""), 1)]
        yield Table("Held-out scores", ("Pair", "Score of the chosen", "Score of the rejected"), rows)
    bins = [(row.get("predicted"), Interval(row.get("observed"))) for row in rows_of(reliable.get("bins"))]
    told = [
        (f"{100 * given:.1f} %", found.percent(), found.how) for given, found in bins if given is not None and found
    ]
    if len(told) < FEWEST:
        heads = ("Probability given to the reply it prefers", "Ranked right (95 % interval)", "How")
        yield Table("Reliability", heads, told, kind="measures")


def _few_steps(margins: Sequence[Mapping[str, Any]], solver: Sequence[Mapping[str, Any]]) -> Iterator[Part]:
    for caption, rows, names in (
        ("Mean margin / its deviation", margins, {"Solver step": "step", "Training": "train", "Held-out": "eval"}),
        ("Objective and gap", solver, {"Solver step": "step", "Objective": "objective", "Gap": "gap"}),
    ):
        if len(rows) < FEWEST:
            cells = [[number(row.get(name)) for name in names.values()] for row in rows]
            yield titled(caption, Table(caption, list(names), cells))


def _columns(
    caption: str, names: Mapping[str, str], rows: Sequence[Mapping[str, Any]], mark: str, at: int, **options: Any
) -> Table:
    """The values of each row by the heads of their columns; rows of which ``mark`` is true say so in column ``at``."""
    cells = [[number(row.get(name)) for name in names.values()] for row in rows]
    marked = [place for place, row in enumerate(rows) if row.get(mark)]
    for place in marked:
        cells[place][at] += f" ({mark})"
    return Table(caption, list(names), cells, marked=marked, **options)


def folded(summary: str, caption: str, values: Any) -> Part:
    return details(summary, facts(caption, _flat(values)))


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as dotted names and words, in the order of the names (report.json keeps no other)."""
    for key, inner in sorted(mapping_of(value).items()):
        name = f"{prefix}{key}"
        if isinstance(inner, Mapping) and inner:
            yield from _flat(inner, f"{name}.")
        elif isinstance(inner, list) and any(isinstance(row, Mapping) for row in inner):
            yield name, f"{len(inner)} rows, in report.json"
        elif isinstance(inner, list):
            yield name, ", ".join(map(number, inner)) or "none"
        else:
            yield name, number(inner) if inner is not None else "not set"


# --- in words ----------------------------------------------------------------------------------------------------


def _measured(summary: Mapping[str, Any], found: Mapping[str, Any]) -> list[tuple[Part, str, str]]:
    """Rows of label, worded estimate, and how it was made."""
    rows: list[tuple[Part, str, str]] = []
    for key, label, form in (
        ("accuracy_eval", "Held-out pairs ranked right", "percent"),
        ("accuracy_train", "Training pairs ranked right", "percent"),
        ("linear_accuracy_eval", "Held-out pairs ranked right by a linear head", "percent"),
        ("gain_over_linear", "Gain over the linear head", "points"),
        ("nll_eval", "Held-out NLL per pair (chance: 0.693)", "plain"),
    ):
        estimate = Interval(summary.get(key))
        if estimate:
            worded = estimate.plain() if form == "plain" else estimate.percent(points=form == "points")
            rows.append((label, worded, estimate.how))
    error = Interval(summary.get("calibration_error"))
    if error:
        chance = found.get("error_by_chance")
        comment = "" if chance is None else f"By chance alone: {100 * chance:.1f} points"
        rows.append((beneath("Held-out calibration error", comment), _points(error), error.how))
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
        yield "Relative gap", number(gap) if asked is None else f"{number(gap)}, {number(asked)} requested"
    first = mapping_of(mapping_of(certificate.get("facts")).get("phase_one")).get("relative_gap")
    if first is not None:
        yield "Relative gap of Phase I", number(first)
    violation = certificate.get("violation")
    if violation is not None:
        worded = "no constraint is violated" if violation == 0 else f"constraints are violated by {number(violation)}"
        yield "Feasibility", worded
    for key, label in (("n_patterns", "Gates"), ("precision", "Precision"), ("seed", "Seed")):
        if certificate.get(key) is not None:
            yield label, number(certificate[key])
    versions = mapping_of(certificate.get("versions"))
    if versions:
        yield "Versions", ", ".join(f"{name} {versions[name]}" for name in sorted(versions))


def _claims(summary: Mapping[str, Any], head: Mapping[str, Any]) -> dict[str, str] | None:
    """The three parts of the box: what is proved, what is only estimated, what nobody claims."""
    if not head and not summary.get("statement"):
        return None
    certificate = mapping_of(head.get("certificate"))
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
        proved += f" The requested tolerance, {number(tolerance)}, was {met}."
    estimated = _search(mapping_of(mapping_of(certificate.get("facts")).get("gates_estimate")))
    measured = (
        "Accuracies, win rates and perplexities are measured on samples, each with a 95 % interval; none "
        "of them is part of the proof."
    )
    return {
        "proved": proved.strip() or "Nothing: no optimality gap was certified for this head.",
        "estimated": f"{estimated} {measured}".strip(),
        "unclaimed": "That no other gates, layer or larger network could do better, or that text guided by an optimal "
        "head is better text. The proof is about the fit alone.",
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
