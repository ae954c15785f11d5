"""The report of a comparison: one HTML page, one JSON file, LaTeX and Markdown tables, from its content alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from coala.compare import figures, tables
from coala.compare.results import content_of, finite
from coala.compare.study import Study
from coala.compare.text import latex, markdown, place_tables, place_title, sentences
from coala.report.figures import Drawing
from coala.store import save_json, write_atomic


def write_report(
    study: Study, out: Path, *, command: str = "", machine: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write ``report.html``, ``.json``, ``.tex`` and ``.md`` into ``out``; the content."""
    out = Path(out)
    content: dict[str, Any] = finite({**content_of(study, out), "command": command, "machine": dict(machine or {})})
    save_json(out / "report.json", content)
    write_atomic(out / "report.html", render(content))
    write_atomic(out / "report.tex", latex(content))
    write_atomic(out / "report.md", markdown(content))
    return content


def render(content: Mapping[str, Any]) -> str:
    """The page of a content: no script, nothing fetched, the same bytes for the same content."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader([here, here.parent / "report"]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Both packages have a page.html; this folder comes first, the stylesheet is the report's.
    return environment.get_template("page.html").render(_view(content)).rstrip() + "\n"


def _view(content: Mapping[str, Any]) -> dict[str, Any]:
    counts = content["counts"]
    facts = [f"{counts['done']} of {counts['cells']} cells done"]
    facts += [f"{counts['failed']} failed"] if counts["failed"] else []
    facts += [f"{counts['missing']} missing"] if counts["missing"] else []
    facts += [f"{name}: {value}" for name, value in sorted(content["machine"].items())]
    more = [tables.stage_one(content), tables.published(content), tables.failures(content)]
    return {
        "title": content["title"],
        "reproduces": content["reproduces"],
        "facts": facts,
        "conclusions": sentences(content),
        "places": [
            {
                "title": place_title(place),
                "pairs": _worded(place["pairs"]),
                "tables": place_tables(place),
                "figures": _drawn(
                    figures.margin_curves(place),
                    figures.accuracy_by_flops(place),
                    figures.accuracy_by_flops(place, "win_rate"),
                )
                if place["ranks"]
                else [],
            }
            for place in content["places"]
        ],
        "tables": [table for table in more if table is not None],
        "how": list(_how(content)),
        "command": content["command"],
    }


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


def _drawn(*drawings: Drawing | None) -> list[dict[str, Any]]:
    from markupsafe import Markup

    return [{"svg": Markup(d.svg), "title": d.title, "caption": d.caption} for d in drawings if d is not None]
