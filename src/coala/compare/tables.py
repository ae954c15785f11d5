"""The tables of a comparison as rows of text, the same for the page, LaTeX and the terminal.

Words and rounds; computes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coala.pages.parts import Table
from coala.pages.words import UNKNOWN, bracketed, flops, number, seconds, size


def with_values(head: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Without the columns in which no row has anything; the first names the rows."""
    kept = [k for k in range(len(head)) if not k or any(row[k] != UNKNOWN for row in rows)]
    return [head[k] for k in kept], [[row[k] for k in kept] for row in rows]


def ranking(place: Mapping[str, Any]) -> Table | None:
    if not place["ranks"]:
        return None
    head = (
        "method",
        "rate",
        "ranked right, %",
        "sd over seeds",
        "margin / its sd",
        "calibrated NLL",
        "steps that fall",
    )
    rows = []
    for row in place["methods"]:
        if row["kind"] == "guided":
            continue
        fell = row["falling"]
        rows.append(
            (
                row["label"],
                UNKNOWN if row["rate"] is None else f"{row['rate']:g}",
                bracketed(row["accuracy"]),
                deviation(row["seed_accuracy"], 100),
                over_seeds(row["margin_ratio"]),
                over_seeds(row["nll"]),
                UNKNOWN if fell is None else f"{fell['falls']} of {fell['steps']} ({100 * fell['share']:.0f} %)",
            )
        )
    return Table(
        "Ranking of held-out pairs by each method's own reward",
        *with_values(head, rows),
        "95 % intervals by group, of the mean over seeds. Rewards have no common scale: margins are in units of their "
        "own deviation, the loss is that of the best single scale. A fall is a step along the run that lowers the "
        "held-out margin.",
    )


def differences(place: Mapping[str, Any]) -> Table | None:
    if not place["differences"]:
        return None
    rows = [
        (
            f"minus {entry['minus']}",
            bracketed(entry["difference"], "+.1f"),
            f"{entry['p']:.2g}",
            f"{entry['p_holm']:.2g}",
        )
        for entry in place["differences"]
    ]
    ours = place["differences"][0]["of"]
    return Table(f"{ours} against every other method", ("difference", "points [95 %]", "p", "p, Holm"), rows)


def costs(place: Mapping[str, Any]) -> Table | None:
    rows = []
    shares = list(dict.fromkeys(label for row in place["methods"] if row["costs"] for label in row["costs"]["of"]))
    for row in place["methods"]:
        found = row["costs"]
        if found is None:
            continue
        counter = found["counter"]
        rows.append(
            (
                row["label"],
                flops(found["flops"]["run"]),
                flops(counter["run"]) if counter else UNKNOWN,
                flops(counter["head"]) if counter and "head" in counter else UNKNOWN,
                flops((counter or found["flops"])["run"] + (counter or found["flops"])["search"]),
                *(percent((found["of"].get(label) or {}).get("flops")) for label in shares),
                *(percent((found["of"].get(label) or {}).get("flops_with_search")) for label in shares),
            )
        )
    if not rows:
        return None
    head = (
        "method",
        "FLOPs, formula",
        "FLOPs, counter",
        "of them the fit",
        "with search",
        *(f"of {label}" for label in shares),
        *(f"of {label}, both with search" for label in shares),
    )
    return Table(
        "FLOPs of one run",
        *with_values(head, rows),
        "Two per multiply-add of matrix products. Of heads the formula has the extraction alone, the counter the fit "
        "with all its validation too. Search: every learning rate tried, or the layers.",
    )


_MEASURED = "Seconds and joules are means over seeds; peaks are those of the first seed, in a process of its own."


def measured(place: Mapping[str, Any]) -> Table | None:
    rows = []
    shares = list(dict.fromkeys(label for row in place["methods"] if row["costs"] for label in row["costs"]["of"]))
    for row in place["methods"]:
        found = row["costs"]
        if found is None:
            continue
        took = found["measured"]
        compiling = took["compiling"]
        joules = took["joules"]
        rows.append(
            (
                row["label"],
                seconds(took["seconds"]["mean"]) if took["seconds"] else UNKNOWN,
                seconds(compiling["mean"]) if compiling else UNKNOWN,
                seconds(took["search_seconds"]),
                size(took["peak_bytes"]),
                size(took["own_bytes"]),
                number(joules["mean"]) if joules else UNKNOWN,
                *(percent(_of(found, label, "seconds")) for label in shares),
                *(percent(_largest(_of(found, label, "bytes"))) for label in shares),
                *(percent(_largest(_of(found, label, "own_bytes"))) for label in shares),
            )
        )
    if not rows:
        return None
    head = (
        "method", "seconds", "of them compiling", "search", "peak", "above libraries", "joules",
        *(f"seconds of {label}" for label in shares),
        *(f"peak of {label}" for label in shares),
        *(f"above libraries of {label}" for label in shares),
    )  # fmt: skip
    return Table("Time and memory of one run, measured", *with_values(head, rows), _MEASURED)


def published(content: Mapping[str, Any]) -> Table | None:
    # Beside costs that nobody counted they would say nothing.
    if not content["settings"].get("count_flops", True):
        return None
    found = content["published_costs"]
    rows = [
        (
            row["model"],
            *(number(row[name]) for name in ("COALA", "DPO", "ORPO", "SFT")),
            percent(row["COALA"] / row["DPO"]),
            percent(row["ORPO"] / row["DPO"]),
        )
        for row in found["rows"]
    ]
    head = ("TFLOPs, Table 5", "COALA", "DPO", "ORPO", "SFT", "COALA of DPO", "ORPO of DPO")
    return Table("As the COALA paper prints them", head, rows, found["why"])


def stage_one(content: Mapping[str, Any]) -> Table | None:
    rows = content["stage_one"]
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows for name in row["accuracy"]))
    return Table(
        "Stage one: heads on the same features (the paper's Table 7)",
        ("model, data", *names),
        [
            (f"{row['model']}, {row['dataset']}" + (", after SFT" if row["init"] == "sft" else ""),
             *(bracketed(row["accuracy"].get(name)) for name in names))
            for row in rows
        ],
    )  # fmt: skip


def failures(content: Mapping[str, Any]) -> Table | None:
    if not content["failures"]:
        return None
    rows = []
    for entry in content["failures"]:
        plan = entry["plan"] or {}
        needs = plan.get("bytes") or {}
        told = ", ".join(f"{name} {size(value)}" for name, value in needs.items())
        rows.append(
            (
                entry["cell"],
                entry["error"],
                f"{size(sum(needs.values()))} ({plan.get('how', 'planned')}: {told})" if needs else UNKNOWN,
            )
        )
    return Table("Cells that failed", ("cell", "what happened", "planned memory"), rows, kind="words")


# --- single cells ------------------------------------------------------------------------------------------------


def over_seeds(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return UNKNOWN
    return f"{found['mean']:.3g}" + ("" if found["sd"] is None else f" ({found['sd']:.2g})")


def deviation(found: Mapping[str, Any] | None, scale: float) -> str:
    if found is None or found["sd"] is None:
        return UNKNOWN
    # Equal values leave rounding behind.
    return f"{scale * found['sd'] if found['sd'] > 1e-12 else 0:.2g} (n={found['n']})"


def percent(value: float | None) -> str:
    return UNKNOWN if value is None else f"{100 * value:.3g} %"


def _of(found: Mapping[str, Any], label: str, name: str) -> Any:
    return ((found["of"].get(label) or {}).get("measured") or {}).get(name)


def _largest(found: Mapping[str, float] | None) -> float | None:
    """The device's share where there is one, else the host's."""
    return None if not found else found.get("device", found.get("host"))
