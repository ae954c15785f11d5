"""A comparison's tables as LaTeX, as Markdown and for the terminal, from its content alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coala.compare import survival_tables, tables, writing_tables
from coala.compare.study import Study
from coala.pages.parts import Part, Table
from coala.pages.words import bracketed, flops, seconds, size

# LaTeX's own signs, and those that its fonts lack.
_SIGNS = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\N{EN DASH}": "--",
}  # fmt: skip


def place_title(place: Mapping[str, Any]) -> str:
    return f"{place['dataset']} {started(place)}"


def started(place: Mapping[str, Any]) -> str:
    """What every method of a place started from."""
    return f"with {place['model']}" + (", after SFT" if place["init"] == "sft" else "")


def findings(place: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What was found at a place, then what it took."""
    return [*place["findings"], *place["measured"]]


def notes(content: Mapping[str, Any]) -> list[str]:
    """What readers should know of models and pairs before they read a figure."""
    settings = content["settings"]
    found = [
        f"{name} is a GGUF file: every method starts from one copy of its dequantised weights, in float32."
        for name, model in (settings.get("models") or {}).items()
        if str(model["path"]).endswith(".gguf")
    ]
    for name, dataset in (settings.get("datasets") or {}).items():
        found += [f"{name}: {dataset['source']}."] if dataset.get("source") else []
    return found


def place_tables(place: Mapping[str, Any]) -> list[Table]:
    """The tables of one dataset, model and start that answer the study's questions."""
    found = (
        tables.ranking(place),
        tables.differences(place),
        writing_tables.replies(place),
        writing_tables.rules(place),
        writing_tables.contests(place),
        survival_tables.kept(place),
        survival_tables.met(place),
        survival_tables.dial(place),
        survival_tables.spent(place),
        writing_tables.agreement(place),
        *writing_tables.benchmarks(place),
        tables.costs(place),
        tables.measured(place),
    )
    return [table for table in found if table is not None]


def detail_tables(place: Mapping[str, Any]) -> list[Table]:
    """Further tables, for whoever asks how these came about."""
    layers = _layers(place)
    return [*writing_tables.matrices(place), *([] if layers is None else [layers])]


def _layers(place: Mapping[str, Any]) -> Table | None:
    found = place.get("layers")
    if not found:
        return None
    rows = [
        (
            f"{row['layer']}"
            + (f", {row['pooling']}" if "pooling" in row else "")
            + (" (chosen)" if row["chosen"] else ""),
            tables.percent(row["cost"]),
            f"{row['nll']:.4f}",
            f"{row['excess']:+.4f} ({row['excess_error']:.4f})",
            f"{100 * row['accuracy']:.1f}",
        )
        for row in found["rows"]
    ]
    return Table(
        "Layers, on a sample of the training pairs",
        ("layer", "cost", "held-out NLL", "above the best (error)", "ranked right, %"),
        rows,
    )


def latex(content: Mapping[str, Any]) -> str:
    """Every table as a ``tabular`` in a ``table``, without packages."""
    parts = []
    for place in content["places"]:
        parts += [
            _tabular(table, f"{table.caption}: {place_title(place)}")
            for table in (*place_tables(place), *detail_tables(place))
        ]
    for table in (tables.stage_one(content), tables.published(content)):
        if table is not None:
            parts.append(_tabular(table, table.caption))
    return "\n".join(parts)


def _tabular(table: Table, caption: str) -> str:
    def line(cells: Sequence[Part]) -> str:
        return " & ".join(_escaped(str(cell)) for cell in cells) + r" \\"

    body = [line(table.head), r"\hline", *map(line, table.rows)]
    columns = "l" + "r" * (len(table.head) - 1)
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{_escaped(caption)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\hline",
            *body,
            r"\hline",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _escaped(text: str) -> str:
    return "".join(_SIGNS.get(sign, sign) for sign in text)


def markdown(content: Mapping[str, Any]) -> str:
    """The conclusions and every table, with machine, commit and command, for a repository's pages."""
    counts = content["counts"]
    machine = "; ".join(f"{name} {value}" for name, value in sorted(content["machine"].items()))
    parts = [f"# {content['title']}", ""]
    parts += [f"`{content['command']}`", ""] if content["command"] else []
    parts += [f"{machine}.", ""] if machine else []
    parts += [f"{counts['done']} of {counts['cells']} cells done, {counts['failed']} failed.", ""]
    parts += ["## In short"]
    for place in content["places"]:
        lines = [f"- **{one['word']}:** {one['said']} {one['figures']}".rstrip() for one in findings(place)]
        parts += ["", f"### {place_title(place)}", "", *lines] if lines else []
    parts += [] if any(map(findings, content["places"])) else ["", "No cell is done yet."]
    if told := notes(content):
        parts += ["", "## Models and pairs", "", *(f"- {note}" for note in told)]
    for place in content["places"]:
        parts += ["", f"## {place_title(place)}"]
        for table in (*place_tables(place), *detail_tables(place)):
            parts += _piped(table)
    for more in (tables.stage_one(content), tables.published(content), tables.failures(content)):
        if more is not None:
            parts += _piped(more)
    return "\n".join(parts) + "\n"


def _piped(table: Table) -> list[str]:
    def line(cells: Sequence[Part]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rows = [line(table.head), line(["---"] * len(table.head)), *map(line, table.rows)]
    return ["", f"**{table.caption}**", "", *rows, *(["", table.note] if table.note else [])]


# --- the terminal ------------------------------------------------------------------------------------------------

SUMMARY_HEAD = ("data, model", "method", "ranked right, %", "wins, %", "FLOPs", "of DPO")


def summary_rows(content: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A head and a row for every method of every place."""
    rows: list[tuple[str, ...]] = [SUMMARY_HEAD]
    for place in content["places"]:
        for row in place["methods"]:
            costs = row["costs"]
            first: Mapping[str, Any] = next(iter(costs["of"].values()), {}) if costs else {}
            run = (costs["counter"] or costs["flops"])["run"] if costs else None
            rows.append(
                (
                    place_title(place),
                    row["label"],
                    bracketed(row["accuracy"]),
                    bracketed(row["win_rate"]),
                    flops(run) + ("" if costs is None or costs["counter"] else " (formula)"),
                    tables.percent(first.get("flops")),
                )
            )
    return rows


PLAN_HEAD = ("cell", "pairs", "FLOPs", "memory", "time")


def plan_rows(planned: Sequence[Mapping[str, Any]], study: Study) -> list[tuple[str, ...]]:
    """The plan of every cell as text."""
    rows: list[tuple[str, ...]] = []
    for row in planned:
        needed = sum(row["bytes"].values())
        sign = "at least " if row["how"].startswith("lower") else "at most " if row["how"].startswith("upper") else ""
        rows.append(
            (
                row["cell"],
                f"{row['pairs']:,}",
                flops(row["flops"]),
                f"{sign}{size(needed)}" + (" (more than there is)" if _short(row, needed, study) else ""),
                seconds(row["seconds"]),
            )
        )
    return rows


def _short(row: Mapping[str, Any], needed: int, study: Study) -> bool:
    """Whether a lower bound is above the device's memory, or the plan of a head is short of some."""
    there = study.machine.device_memory_gib
    return bool(row.get("short")) or (row["how"].startswith("lower") and there is not None and needed > there * 2**30)
