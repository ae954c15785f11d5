"""The report of a comparison: one HTML page, one JSON file, LaTeX and Markdown tables, from its content alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from coala.compare import figures, tables
from coala.compare.results import content_of
from coala.compare.study import Study
from coala.compare.text import detail_tables, findings, latex, markdown, notes, place_tables, place_title, started
from coala.pages.parts import (
    Part,
    aside,
    beneath,
    code_block,
    details,
    element,
    gallery,
    headed,
    joined,
    listing,
    page,
    paragraphs,
    section,
)
from coala.store import plain, save_json, write_atomic


def write_report(
    study: Study, out: Path, *, command: str = "", machine: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write ``report.html``, ``.json``, ``.tex`` and ``.md`` into ``out``; the content."""
    out = Path(out)
    content: dict[str, Any] = plain({**content_of(study, out), "command": command, "machine": dict(machine or {})})
    save_json(out / "report.json", content)
    write_atomic(out / "report.html", render(content))
    write_atomic(out / "report.tex", latex(content))
    write_atomic(out / "report.md", markdown(content))
    return content


def render(content: Mapping[str, Any]) -> str:
    """The page of a content: no script, nothing fetched, the same bytes for the same content."""
    counts = content["counts"]
    facts = [f"{counts['done']} of {counts['cells']} cells done"]
    facts += [f"{counts['failed']} failed"] if counts["failed"] else []
    facts += [f"{counts['missing']} missing"] if counts["missing"] else []
    facts += [f"{name}: {value}" for name, value in sorted(content["machine"].items())]
    more = (tables.stage_one(content), tables.published(content), tables.failures(content))
    places = list(enumerate(content["places"], 1))
    told = [_found(place, f"place-{number}") for number, place in places if findings(place)]
    nothing = None if told else aside("No cell is done yet, so there is nothing to conclude.")
    short = element("dl", joined(told), class_="findings") if told else nothing
    return page(
        content["title"],
        "COALA comparison",
        section("In short", short, aside(content["reproduces"]), name="short"),
        *(_place(place, f"place-{number}") for number, place in places),
        section(
            "Costs as published, and what failed", headed(*(table for table in more if table is not None)), name="more"
        ),
        section(
            "How it was made",
            paragraphs(*_how(content)),
            listing(notes(content)),
            code_block(content["command"]),
            name="how",
        ),
        facts=facts,
        footer="All numbers are in report.json next to this page.",
    )


def _found(place: Mapping[str, Any], name: str) -> Part:
    """The findings of a place beside its title, which leads to its section."""
    items = []
    for one in findings(place):
        word = element("span", f"{one['word']}:", class_=f"verdict {one['verdict']}".rstrip())
        items.append(beneath(word + " " + one["said"], one["figures"]))
    title = beneath(element("a", place["dataset"], href=f"#{name}"), started(place))
    return element("div", element("dt", title), element("dd", listing(items, "conclusions")))


def _place(place: Mapping[str, Any], name: str) -> Part:
    shown = (
        figures.margin_curves(place),
        figures.accuracy_by_flops(place),
        figures.accuracy_by_flops(place, "win_rate"),
        figures.wins_by_kl(place),
    )
    drawn = gallery(*shown) if place["ranks"] else ""
    more = [details(table.caption, table) for table in detail_tables(place)]
    return section(
        place_title(place), aside(_worded(place["pairs"])), headed(*place_tables(place)), drawn, *more, name=name
    )


def _worded(pairs: Mapping[str, Any]) -> str:
    names = {"train": "training", "validation": "of them for choosing rates", "test": "held-out"}
    return "; ".join(
        f"{pairs[key]['pairs']:,} {name} ({pairs[key]['groups']:,} groups)"
        for key, name in names.items()
        if key in pairs
    )


def _how(content: Mapping[str, Any]) -> Iterator[str]:
    yield (
        "Every method saw the same pairs as the same tokens, and was measured on the same held-out pairs. Learning "
        "rates were chosen on a part of the training pairs with the first seed; the chosen rate then trained on all of "
        "them, with every seed. COALA chooses what it chooses on folds of the training pairs, inside its fit."
    )
    if content["untuned"]:
        yield (
            f"Fewer than four rates were tried for {', '.join(content['untuned'])}: a comparison with these says "
            "little."
        )
    seeds = content["settings"]["seeds"]
    yield f"Seeds: {', '.join(map(str, seeds))}."
