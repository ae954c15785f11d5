"""Lays the content of a report out as one HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from coala.pages.parts import (
    Part,
    Table,
    bar,
    beneath,
    code_block,
    details,
    element,
    facts,
    gallery,
    joined,
    listing,
    missing,
    page,
    paragraphs,
    section,
    sides,
    titled,
)
from coala.pages.words import Interval, flops, number, seconds, size
from coala.report import distilled, figures
from coala.report.conclusions import certified_gap, conclusions
from coala.report.evaluations import shown
from coala.report.receipts import shown as receipt_parts

MEASURES = ("Measure", "Value (95 % interval)", "How")


def render(content: Mapping[str, Any]) -> str:
    """The page of a plain content (:func:`coala.report.content.plain`)."""
    summary, head, curves = (_mapping(content.get(name)) for name in ("summary", "head", "curves"))
    evaluations = [part for row in _rows(content.get("evaluations")) for part in shown(row)]
    receipts = [part for row in _rows(content.get("receipts")) for part in receipt_parts(row)]
    said = [sentence.replace(" %", "\u00a0%") for sentence in conclusions(content)]
    line = [
        content.get("created"),
        f"{number(summary['n_train'])} training pairs" if summary.get("n_train") is not None else None,
        f"{number(summary['n_eval'])} held-out pairs" if summary.get("n_eval") is not None else None,
    ]
    return page(
        str(content.get("title") or "COALA alignment report"),
        "COALA report",
        _tiles(content, summary, head),
        section(
            "In short",
            listing(said, "conclusions")
            or missing("There is nothing to conclude yet: no result was saved for this run."),
            name="short",
        ),
        section("Certificate", *_certificate(summary, head), name="proof"),
        section("Does the head rank replies?", *_ranking(content, summary), name="ranking"),
        section("How the head was fitted", *_fit(content, summary, curves), name="fit"),
        section("Does guidance change the text?", *_text(content), name="text"),
        section("The distilled policy", *distilled.shown(_mapping(content.get("distilled"))), name="distilled"),
        section("Evaluations", *evaluations, name="evaluations"),
        section("Receipts", *receipts, name="receipts"),
        section("Data", *_data(content), name="data"),
        section("Costs", *_costs(_rows(content.get("costs")), summary), name="costs"),
        section("Reproduce", *_again(content), name="again"),
        facts=[str(fact) for fact in line if fact],
        footer="All values on this page are in report.json next to it.",
    )


def _tiles(content: Mapping[str, Any], summary: Mapping[str, Any], head: Mapping[str, Any]) -> Part:
    """The key numbers; those that are shares carry their interval on the scale from 0 to 1."""
    tiles: list[Part] = []

    def tile(label: str, value: str, note: str, drawn: Part = None) -> None:
        above = element("p", label, class_="label"), element("p", value, class_="value")
        tiles.append(element("div", *above, drawn, element("p", note, class_="note"), class_="tile"))

    def share(label: str, estimate: Any) -> None:
        rate = Interval(estimate)
        if rate:
            span = f"{100 * rate.low:.1f} to {100 * rate.high:.1f} %" if rate.bounded else "no interval"
            drawn = bar(rate.low, rate.value, rate.high)
            tile(label, f"{100 * rate.value:.1f} %", f"{span}, n = {rate.n:,}", drawn)

    share("Ranked right, held-out", summary.get("accuracy_eval"))
    for row in _rows(content.get("win_rates"))[:2]:
        share(f"Guided wins, {row.get('judge') or 'judge'}", row.get("estimate"))
    gap, _ = certified_gap(summary, head)
    if gap is not None:
        tile("Certified gap", f"{100 * gap:.2g} %", "of the objective, proved")
    both = _mapping(content.get("perplexity"))
    guided, unguided = Interval(both.get("guided")), Interval(both.get("unguided"))
    if guided and unguided:
        tile("Perplexity, guided", number(guided.value), f"without guidance {number(unguided.value)}")
    if summary.get("seconds") is not None:
        work = summary.get("gflops")
        note = flops(work * 1e9) if isinstance(work, int | float) else "wall time"
        tile("Whole run", seconds(summary["seconds"]), note)
    return element("section", joined(tiles), class_="tiles", aria_label="Key numbers") if tiles else None


# --- the head ----------------------------------------------------------------------------------------------------


def _certificate(summary: Mapping[str, Any], head: Mapping[str, Any]) -> list[Part]:
    claims = _claims(summary, head)
    if claims is None:
        return [missing("No head was saved, so nothing is certified.")]
    certificate = _mapping(head.get("certificate"))
    boxes = [
        element("div", element("dt", name), element("dd", claims[kind]), class_=kind)
        for kind, name in (("proved", "Proved"), ("estimated", "Estimated"), ("unclaimed", "Not claimed"))
    ]
    return [
        element("dl", joined(boxes), class_="certificate"),
        facts("What was solved", _solved(certificate)),
        gallery(figures.gap_bar(certificate)),
        _folded("All values of the certificate", "Values of the certificate", certificate),
        _folded("What the head reads", "Feature specification", head.get("spec")),
    ]


def _folded(summary: str, caption: str, values: Any) -> Part:
    return details(summary, facts(caption, _flat(values)))


def _ranking(content: Mapping[str, Any], summary: Mapping[str, Any]) -> list[Part]:
    rows = _measured(summary, _mapping(content.get("reliability")))
    lengths, unit = _rows(content.get("by_length")), str(content.get("length_unit") or "characters")
    drawn = gallery(
        figures.histograms(_mapping(content.get("scores"))),
        figures.reliability_curve(_mapping(content.get("reliability"))),
        figures.length_chart(lengths, unit),
    )
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
        drawn or missing("No held-out scores were saved, so there are no histograms."),
        details(
            "Accuracy by length difference, as a table",
            Table("Ranking accuracy by length difference", head, by_length, left=(1,)),
        ),
    ]


def _fit(content: Mapping[str, Any], summary: Mapping[str, Any], curves: Mapping[str, Any]) -> list[Part]:
    solver, path, layers = _rows(curves.get("solver")), _rows(content.get("path")), _rows(content.get("layers"))
    drawn = gallery(
        figures.margin_curve(_rows(curves.get("margin"))),
        figures.gap_curve(solver),
        figures.objective_curve(solver),
        figures.ridge_chart(path),
        figures.path_chart(path),
    )
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
        drawn or missing("No solver history was saved for this run."),
        paragraphs(str(summary["layer"])) if summary.get("layer") else None,
        details("The layer used, and how the others compare", paragraphs(told), by_layer) if by_layer else None,
        details("Regularisation path, as a table", by_setting),
    ]


def _columns(
    caption: str, names: Mapping[str, str], rows: Sequence[Mapping[str, Any]], mark: str, at: int, **options: Any
) -> Table:
    """The values of each row by the heads of their columns; rows of which ``mark`` is true say so in column ``at``."""
    cells = [[number(row.get(name)) for name in names.values()] for row in rows]
    marked = [place for place, row in enumerate(rows) if row.get(mark)]
    for place in marked:
        cells[place][at] += f" ({mark})"
    return Table(caption, list(names), cells, marked=marked, **options)


# --- text, data, costs -------------------------------------------------------------------------------------------


def _text(content: Mapping[str, Any]) -> list[Part]:
    contests = [
        (beneath(str(row.get("judge") or "judge"), str(row.get("comment") or "")), rate.percent(), rate.how)
        for row, rate in ((row, Interval(row.get("estimate"))) for row in _rows(content.get("win_rates")))
    ]
    both = _mapping(content.get("perplexity"))
    found = {name: Interval(both.get(name)) for name in ("unguided", "guided")}
    perplexities = [(name, estimate.plain(), estimate.how) for name, estimate in found.items() if estimate]
    heads = ("Judge", "Guided preferred (95 % interval)", "How")
    measure = "Perplexity under the base model"
    return [
        Table("Win rates of guided against unguided replies", heads, contests, kind="measures")
        or missing("No judge compared guided with unguided replies in this run."),
        Table(measure, ("Replies", measure, "How"), perplexities, kind="measures")
        or missing("No perplexity was measured in this run."),
        *_policy(_mapping(content.get("policy"))),
        titled("Replies side by side", *map(_sample, _rows(content.get("samples"))))
        or missing("No replies were generated in this run."),
    ]


def _policy(policy: Mapping[str, Any]) -> list[Part]:
    if not policy:
        return []
    found = {"as decoded": Interval(policy.get("accuracy")), "without top-k and top-p": Interval(policy.get("lifted"))}
    rows = [(name, rate.percent(), rate.how) for name, rate in found.items() if rate]
    measure = "Pairs that the policy's log-ratio to the base ranks right"
    if not rows:
        return [missing(f"No policy accuracy: {policy.get('unknown')}.")]
    note = str(policy.get("note") or "")
    return [Table(measure, ("Policy accuracy", measure, "How"), rows, kind="measures", note=note)]


def _sample(row: Mapping[str, Any]) -> Part:
    scores = _mapping(row.get("scores"))

    def side(name: str) -> tuple[Part, str]:
        score = scores.get(name)
        shown = None if score is None else element("span", f"score {number(score)}", class_="score")
        return joined([name, shown]), str(row.get(name) or "")

    return sides(str(row.get("prompt") or ""), {name: side(name) for name in ("unguided", "guided")})


def _data(content: Mapping[str, Any]) -> list[Part]:
    rows = []
    for finding in _rows(content.get("data_findings")):
        severity = str(finding.get("severity") or "note")
        kind = severity if severity in ("error", "warning") else "note"
        rows.append((element("span", severity, class_=f"badge {kind}"), str(finding.get("text") or "")))
    checked = content.get("data_findings") is not None
    return [
        Table("Findings in the data", ("Severity", "Finding"), rows, kind="words")
        or (paragraphs("The data was checked; no problems were found.") if checked else None)
        or missing("No findings on the data were saved."),
        titled("As the model reads it", listing(map(str, content.get("reads") or []))),
    ]


def _costs(costs: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[Part]:
    if not costs:
        return [missing("No costs were recorded for this run.")]
    bounds = [_over_bound(row) for row in costs]
    bounded = any(bound is not None for bound in bounds)

    def row(name: Any, took: Any, work: Any, bound: float | None, peak: Any) -> list[str]:
        over = ["" if bound is None else f"{number(bound)} x"] if bounded else []
        return [str(name), seconds(took), flops(work), *over, peak]

    rows = [
        row(one.get("stage") or "", one.get("seconds"), one.get("flops"), bound, size(one.get("peak_bytes")))
        for one, bound in zip(costs, bounds, strict=True)
    ]
    work = summary.get("gflops")
    whole = row("Whole run", summary.get("seconds"), work * 1e9 if isinstance(work, int | float) else None, None, "")
    told = (
        "FLOPs are two per multiply-add of matrix products only. Peak memory is that of the process up to the end of "
        "the stage."
    )
    over = ["Over the lower bound"] if bounded else []
    heads = ("Stage", "Wall time", "FLOPs by formula", *over, "Peak memory")
    foot = whole if "seconds" in summary or "gflops" in summary else ()
    return [Table("Costs by stage", heads, rows, told, foot=foot)]


def _again(content: Mapping[str, Any]) -> list[Part]:
    return [
        code_block(str(content.get("command") or "")) or missing("The command of this run was not saved."),
        _folded("All settings", "Settings", content.get("settings")),
    ]


# --- in words ----------------------------------------------------------------------------------------------------


def _over_bound(row: Mapping[str, Any]) -> float | None:
    """Work done over the least that could be, where both are known."""
    done, least = row.get("flops"), row.get("flops_bound")
    if isinstance(done, int | float) and isinstance(least, int | float) and least > 0:
        return done / least
    return None


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


def _claims(summary: Mapping[str, Any], head: Mapping[str, Any]) -> dict[str, str] | None:
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
        proved += f" The requested tolerance, {number(tolerance)}, was {met}."
    estimated = _search(_mapping(_mapping(certificate.get("facts")).get("gates_estimate")))
    measured = (
        "Accuracies, win rates and perplexities are measured on samples, each with a 95 % interval; none "
        "of them is part of the proof."
    )
    return {
        "proved": proved.strip() or "Nothing: no optimality gap was certified for this head.",
        "estimated": f"{estimated} {measured}".strip(),
        "unclaimed": "That no other gates, layer or larger network could do "
        "better, or that text guided by an optimal head is better text. The proof is about the fit alone.",
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
