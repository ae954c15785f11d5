"""Lays the content of a report out as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coala.pages.parts import (
    Part,
    Table,
    bar,
    beneath,
    code_block,
    element,
    joined,
    listing,
    missing,
    page,
    paragraphs,
    section,
    sides,
    tiles,
    titled,
)
from coala.pages.words import Interval, flops, number, seconds, size
from coala.report import distilled, next_steps
from coala.report.conclusions import certified_gap, conclusions
from coala.report.content import conversation_of, mapping_of, rows_of
from coala.report.evaluations import shown
from coala.report.head import certificate_parts, fit_parts, folded, ranking_parts
from coala.report.receipts import shown as receipt_parts


def render(content: Mapping[str, Any]) -> str:
    """The page of a plain content (:func:`coala.report.content.plain`)."""
    summary, head, curves = (mapping_of(content.get(name)) for name in ("summary", "head", "curves"))
    evaluations = [part for row in rows_of(content.get("evaluations")) for part in shown(row)]
    receipts = [part for row in rows_of(content.get("receipts")) for part in receipt_parts(row)]
    said = [sentence.replace(" %", "\u00a0%") for sentence in conclusions(content)]
    line = [
        content.get("created"),
        f"{number(summary['n_train'])} training pairs" if summary.get("n_train") is not None else None,
        f"{number(summary['n_eval'])} held-out pairs" if summary.get("n_eval") is not None else None,
    ]
    return page(
        str(content.get("title") or "COALA alignment report"),
        "COALA report",
        section("What next", next_steps.shown(content), name="next"),
        _tiles(content, summary, head),
        section(
            "In short",
            listing(said, "conclusions")
            or missing("There is nothing to conclude yet: no result was saved for this run."),
            name="short",
        ),
        section("Certificate", *certificate_parts(summary, head), name="proof"),
        section("Does the head rank replies?", *ranking_parts(content, summary), name="ranking"),
        section("How the head was fitted", *fit_parts(content, summary, curves), name="fit"),
        section("Does guidance change the text?", *_text(content), name="text"),
        section("The distilled policy", *distilled.shown(mapping_of(content.get("distilled"))), name="distilled"),
        section("Evaluations", *evaluations, name="evaluations"),
        section("Receipts", *receipts, name="receipts"),
        section("Data", *_data(content), name="data"),
        section("Costs", *_costs(rows_of(content.get("costs")), summary), name="costs"),
        section("Reproduce", *_again(content), name="again"),
        facts=[str(fact) for fact in line if fact],
        footer="All values on this page are in report.json next to it.",
    )


def _tiles(content: Mapping[str, Any], summary: Mapping[str, Any], head: Mapping[str, Any]) -> Part:
    """The key numbers; those that are shares carry their interval on the scale from 0 to 1."""
    made: list[Part] = []

    def tile(label: str, value: str, note: str, drawn: Part = None) -> None:
        above = element("p", label, class_="label"), element("p", value, class_="value")
        made.append(element("div", *above, drawn, element("p", note, class_="note"), class_="tile"))

    def share(label: str, estimate: Any) -> None:
        rate = Interval(estimate)
        if rate:
            span = f"{100 * rate.low:.1f} to {100 * rate.high:.1f} %" if rate.bounded else "no interval"
            drawn = bar(rate.low, rate.value, rate.high)
            tile(label, f"{100 * rate.value:.1f} %", f"{span}, n = {rate.n:,}", drawn)

    share("Ranked right, held-out", summary.get("accuracy_eval"))
    for row in rows_of(content.get("win_rates"))[:2]:
        share(f"Guided wins, {row.get('judge') or 'judge'}", row.get("estimate"))
    gap, _ = certified_gap(summary, head)
    if gap is not None:
        tile("Certified gap", f"{100 * gap:.2g} %", "of the objective, proved")
    both = mapping_of(content.get("perplexity"))
    guided, unguided = Interval(both.get("guided")), Interval(both.get("unguided"))
    if guided and unguided:
        tile("Perplexity, guided", number(guided.value), f"without guidance {number(unguided.value)}")
    if summary.get("seconds") is not None:
        work = summary.get("gflops")
        note = flops(work * 1e9) if isinstance(work, int | float) else "wall time"
        tile("Whole run", seconds(summary["seconds"]), note)
    return tiles("Key numbers", *made)


def _text(content: Mapping[str, Any]) -> list[Part]:
    contests = [
        (beneath(str(row.get("judge") or "judge"), str(row.get("comment") or "")), rate.percent(), rate.how)
        for row, rate in ((row, Interval(row.get("estimate"))) for row in rows_of(content.get("win_rates")))
    ]
    both = mapping_of(content.get("perplexity"))
    found = {name: Interval(both.get(name)) for name in ("unguided", "guided")}
    perplexities = [(name, estimate.plain(), estimate.how) for name, estimate in found.items() if estimate]
    heads = ("Judge", "Guided preferred (95 % interval)", "How")
    measure = "Perplexity under the base model"
    return [
        Table("Win rates of guided against unguided replies", heads, contests, kind="measures")
        or missing("No judge compared guided with unguided replies in this run."),
        Table(measure, ("Replies", measure, "How"), perplexities, kind="measures")
        or missing("No perplexity was measured in this run."),
        *_policy(mapping_of(content.get("policy"))),
        titled("Replies side by side", *map(_sample, rows_of(content.get("samples"))))
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
    scores = mapping_of(row.get("scores"))

    def side(name: str) -> tuple[Part, str]:
        score = scores.get(name)
        shown = None if score is None else element("span", f"score {number(score)}", class_="score")
        return joined([name, shown]), str(row.get(name) or "")

    return sides(conversation_of(row.get("prompt")), {name: side(name) for name in ("unguided", "guided")})


def _data(content: Mapping[str, Any]) -> list[Part]:
    rows = []
    for finding in rows_of(content.get("data_findings")):
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
        folded("All settings", "Settings", content.get("settings")),
    ]


def _over_bound(row: Mapping[str, Any]) -> float | None:
    """Work done over the least that could be, where both are known."""
    done, least = row.get("flops"), row.get("flops_bound")
    if isinstance(done, int | float) and isinstance(least, int | float) and least > 0:
        return done / least
    return None
