"""Evaluations of a run: each kept as one file under RUN/evaluations, and what the report's page shows of them.

A record says what was evaluated (files and their digests), by whom (judge, digests of its prompts), with which command,
and what came out: estimates, counts, failures, a few samples. Computes no measure; knows no judge and no benchmark.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from coala.pages.parts import Part, Table, aside, beneath, code_block, details, element, facts, listing, sides
from coala.pages.words import Interval, bracketed, number
from coala.report.content import conversation_of
from coala.store import RunFolder, StoreError, digest, file_digest, load_json, save_json
from coala.values import Estimate, Turn

FOLDER = "evaluations"
SAMPLES = 5
MeasureForm = Literal["share", "percent", "plain"]


@dataclass(frozen=True)
class Measure:
    """One estimate under its name. ``form``: a ``share`` in [0, 1], a ``percent`` in [0, 100], or ``plain``.

    ``even`` is the value that would mean no difference; the report then says whether the interval includes it.
    """

    name: str
    estimate: Estimate
    form: MeasureForm = "share"
    even: float | None = None


@dataclass(frozen=True)
class Side:
    """What one side of a contrast came to, and the paired ``difference``, it less the first side; of that one none."""

    name: str
    value: Estimate
    difference: Estimate | None = None


@dataclass(frozen=True)
class Contrast:
    """One measure of several ``sides`` on the same prompts, the first of which the others are held against.

    ``about`` says in a few words what is measured.
    """

    name: str
    sides: Sequence[Side]
    form: MeasureForm = "share"
    about: str = ""

    @property
    def values(self) -> dict[str, Estimate]:
        return {side.name: side.value for side in self.sides}

    @property
    def differences(self) -> dict[str, Estimate]:
        """Of each side but the first, less that one."""
        return {side.name: side.difference for side in self.sides if side.difference is not None}

    def heads(self) -> list[str]:
        """What :meth:`told` holds, by column."""
        return _heads([side.name for side in self.sides])

    def told(self) -> list[str]:
        """Values, then differences, with their intervals, for a table of plain text; shares in percent."""
        form = (".1f", 100.0) if self.form == "share" else (".2f", 1.0)
        return [bracketed(one, *form) for one in (*self.values.values(), *self.differences.values())]


def _heads(sides: Sequence[str]) -> list[str]:
    return [*sides, *(f"{side} less {sides[0]}" for side in sides[1:])]


@dataclass(frozen=True)
class Sample:
    """A prompt, the replies to it by the name of their side, and what was said of them."""

    prompt: str | Sequence[Turn]
    replies: Mapping[str, str]
    verdict: str


@dataclass(frozen=True)
class Evaluation:
    """One evaluation as it is kept.

    ``kind`` is the command's name; ``of`` names what was evaluated, for people and in the file's name. ``files`` by
    their role are what it rests on. ``judge`` holds name and digests; ``settings`` is what else decides the outcome.
    ``contrasts`` are measures of several sides. ``facts`` are counts and other values without an interval. ``command``
    is the line that was given.
    """

    kind: str
    of: str
    title: str
    command: str
    measures: Sequence[Measure]
    files: Mapping[str, Path]
    contrasts: Sequence[Contrast] = ()
    judge: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    remarks: Sequence[str] = ()


def save_evaluation(run: RunFolder, evaluation: Evaluation) -> Path:
    """Keep ``evaluation`` in the run and return its file; the same evaluation done again replaces itself.

    Evaluations are the same if kind, paths, judge and settings are.
    """
    paths = {role: _within(run, path) for role, path in evaluation.files.items()}
    same = digest(evaluation.kind, paths, evaluation.judge, evaluation.settings)
    named = re.sub(r"[^\w.]+", "-", f"{evaluation.kind} {evaluation.of}").strip("-")[:80]
    target = run.path / FOLDER / f"{named}-{same[:6]}.json"
    files = [
        {"role": role, "path": paths[role], "sha256": file_digest(path)} for role, path in evaluation.files.items()
    ]
    made = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"coala": version("coala-align"), "python": platform.python_version()},
    }
    kept = vars(evaluation) | {"figures": evaluation.measures, "files": files} | made
    del kept["measures"]
    save_json(target, kept)
    return target


def saved_evaluations(run: RunFolder) -> list[dict[str, Any]]:
    """All evaluations of a run, the oldest first, each with the names of files that are ``changed`` since."""
    found = []
    for path in sorted((run.path / FOLDER).glob("*.json")):
        row = load_json(path)
        if not isinstance(row, dict) or not isinstance(row.get("figures"), list):
            raise StoreError(f"{path}: is not an evaluation. Fix: delete it, or evaluate again.")
        found.append({**row, "changed": [one["path"] for one in row.get("files", []) if _differs(run, one)]})
    return sorted(found, key=lambda row: str(row.get("created")))


def _within(run: RunFolder, path: Path) -> str:
    """A path from the run's folder on if it lies there, else from the root."""
    home, there = run.path.resolve(), path.resolve()
    return there.relative_to(home).as_posix() if there.is_relative_to(home) else str(there)


def _differs(run: RunFolder, file: Mapping[str, Any]) -> bool:
    """Whether a file of the run is another one now; of files elsewhere nothing is said."""
    path = Path(file["path"])
    there = run.path / path
    return not path.is_absolute() and there.is_file() and file_digest(there) != file["sha256"]


# --- as the page shows them ----------------------------------------------------------------------------------------


def shown(row: Mapping[str, Any]) -> list[Part]:
    """The parts of the page's section on one evaluation."""
    title = str(row.get("title") or row.get("kind") or "evaluation")
    counts = [(name, _worded(value)) for name, value in (row.get("facts") or {}).items()]
    failures = row.get("failures") or {}
    if failures:
        counts.append(("failed verdicts", ", ".join(f"{kind} {n}" for kind, n in failures.items())))
    measures = [
        (str(one.get("name")), _value(one), Interval(one.get("estimate")).how) for one in row.get("figures") or []
    ]
    changed = ", ".join(row.get("changed") or [])
    samples = [
        sides(
            conversation_of(one.get("prompt")) or "(the prompt was not given)",
            {name: (name, text) for name, text in (one.get("replies") or {}).items()},
            aside(one["verdict"]),
        )
        for one in row.get("samples") or []
    ]
    rests_on = [
        *((f"judge: {name}", text) for name, text in _flat(row.get("judge") or {})),
        *((f"setting: {name}", text) for name, text in _flat(row.get("settings") or {})),
        *((f"file: {one.get('role')}", f"{one.get('path')}, SHA-256 {one.get('sha256')}") for one in row["files"]),
        *((f"version of {name}", str(value)) for name, value in (row.get("versions") or {}).items()),
    ]
    heads = ("Measure", "Value (95 % interval unless stated otherwise)", "How")
    return [
        element("h3", title),
        aside("Stale: made with the head before pairs were forgotten. Evaluate again.") if row.get("stale") else None,
        aside(f"Made on files that have changed in the run since: {changed}. Evaluate again.") if changed else None,
        Table(title, heads, measures, kind="measures"),
        _contrasted(title, row.get("contrasts") or []),
        facts(f"Counts of {title}", counts),
        listing(map(str, row.get("remarks") or [])),
        details("Samples of what was judged", *samples),
        details("Judge, files and digests", facts(f"Sources of {title}", rests_on)),
        code_block(str(row.get("command") or "")),
        aside(str(row.get("created") or "")),
    ]


def _contrasted(title: str, contrasts: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each measure, a column for each side and each difference; intervals stand below their values."""
    rows = []
    for one in contrasts:
        share = one.get("form") == "share"
        cells = []
        for part in ("value", "difference"):
            for side in one.get("sides") or []:
                if side.get(part) is None:
                    continue
                estimate = Interval(side[part])
                told = estimate.percent(points=part == "difference") if share else estimate.plain()
                value, opened, ends = told.partition(" (")
                cells.append(beneath(value, ends.removesuffix(")") if opened else None))
        rows.append((beneath(str(one.get("name")), str(one.get("about") or "")), *cells))
    sides = [side for one in contrasts for side in one.get("sides") or []]
    names = list(dict.fromkeys(str(side.get("name")) for side in sides))
    heads = ["Measure", *(head.capitalize() for head in _heads(names))]
    n = sorted({Interval(side.get("value")).n for side in sides})
    note = f"n = {', '.join(map(str, n))} prompts; below each value its 95 % interval, of differences a paired one."
    return Table(f"{title}: {', '.join(names)}", heads, rows, note)


def spoken(row: Mapping[str, Any]) -> list[str]:
    """A sentence for each measure that can show no difference: whether it does; one for all contrasts of a side."""
    sentences = []
    apart: dict[tuple[str, str], dict[str, list[str]]] = {}
    for one in row.get("contrasts") or []:
        for side in (one.get("sides") or [])[1:]:
            change = Interval(side.get("difference"))
            way = "up" if change.above(0) else "down" if change.below(0) else "no difference shown"
            against = str(side.get("name")), str(one["sides"][0].get("name"))
            apart.setdefault(against, {}).setdefault(way, []).append(str(one.get("name")))
    for (side, first), ways in apart.items():
        told = "; ".join(f"{way}: {', '.join(names)}" for way, names in ways.items())
        sentences.append(f"{row.get('title')}, {side} against {first}: {told}.")
    for one in row.get("figures") or []:
        rate, even = Interval(one.get("estimate")), one.get("even")
        if even is None or not rate:
            continue
        start = f"{row.get('title')}: {one.get('name')} {_value(one)}, n = {rate.n:,}"
        level = f"{100 * even:g} %" if one.get("form") == "share" else f"{even:g}"
        if rate.bounded and (rate.above(even) or rate.below(even)):
            sentences.append(f"{start}, {'above' if rate.above(even) else 'below'} {level}.")
        else:
            sentences.append(f"{start}. The interval includes {level}: this shows no difference.")
    return sentences


def _value(one: Mapping[str, Any]) -> str:
    estimate = Interval(one.get("estimate"))
    if not estimate:
        return "void" if "; void: " in estimate.method else "unknown" if estimate.n else "no verdicts"
    if one.get("form") == "share":
        return estimate.percent()
    return estimate.plain() + (" %" if one.get("form") == "percent" and estimate else "")


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{name}, ")
        else:
            yield f"{prefix}{name}", _worded(inner)


def _worded(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_worded, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_worded(inner)}" for name, inner in value.items()) or "none"
    return number(value)
