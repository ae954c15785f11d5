"""A run's evaluations for others to read: the Hub's ``.eval_results/*.yaml`` and Every Eval Ever's JSON.

Both are made of the records that the run keeps; nothing is measured, and nothing is sent. A number without a value is
left out and named. Knows no benchmark: which data set of the Hub an evaluation stands for is for the caller to say.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from coala.report.evaluations import saved_evaluations
from coala.store import RunFolder, digest, save_json, write_atomic
from coala.values import CoalaError

SCHEMA_VERSION = "0.3.0"  # of Every Eval Ever's aggregate records
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Of the judge, not of the model; they stay in the run's own record.
_OF_JUDGES = ("position bias", "inconsistency", "preference for the reply shown first")
_LESS_IS_BETTER = ("loss", "perplexity", "error", "divergence", "failure", "nats")
_BOUNDS: dict[str, tuple[Any, Any]] = {"share": (0, 1), "percent": (0, 100)}
_UNITS = {"share": "proportion", "percent": "percent"}


@dataclass(frozen=True)
class SharedEvaluations:
    """The files that were written, and a sentence for everything that was left out."""

    hub: tuple[Path, ...]
    every_eval_ever: tuple[Path, ...]
    left_out: tuple[str, ...]


def share_evaluations(
    run: Path | str, out: Path, *, model: str, organisation: str, datasets: Mapping[str, str] | None = None
) -> SharedEvaluations:
    """Write every evaluation of ``run`` below ``out``: ``data/...json``, and ``.eval_results/*.yaml``.

    ``model`` is the name the guided model has or will have on the Hub (``owner/name``), ``organisation`` who evaluated
    it. ``datasets`` names, for a kind of evaluation (``rewardbench``), the benchmark's data set there and its task
    (``owner/name`` or ``owner/name:task``); the Hub's form holds only evaluations with one. Written again, a file
    replaces itself. CoalaError for a run without evaluations, and for names that are none.
    """
    named = {kind: _dataset(where) for kind, where in (datasets or {}).items()}
    _require_name(model, "the model's name")
    opened = RunFolder.open(run)
    rows = saved_evaluations(opened)
    if not rows:
        raise CoalaError(f"{run}: holds no evaluation. Fix: make one first, for example by `coala eval judge {run}`.")
    if unknown := sorted(set(named) - {row["kind"] for row in rows}):
        known = ", ".join(sorted({row["kind"] for row in rows}))
        raise CoalaError(f"Found a data set for {', '.join(unknown)}, expected one for {known}, which {run} holds.")
    hub, ever, left = [], [], []
    for row in rows:
        told = f"{row['kind']} {row['of']}"
        left += [f"{told}: {one['name']} has no value" for one in _figures(row) if not _has_value(one["estimate"])]
        name = _slug(told)
        if row["changed"] or row.get("stale"):
            left.append(f"{told}: its files have changed since then; evaluate again")
            continue
        if not any(_has_value(one["estimate"]) for one in _figures(row)):
            continue
        record = every_eval_ever_record(row, model, organisation, opened.settings, named.get(row["kind"]))
        target = out / "data" / _slug(row["kind"]) / Path(*model.split("/")) / f"{_stable_uuid(row, model)}.json"
        save_json(target, record)
        ever.append(target)
        entries = hub_entries(row, named.get(row["kind"]))
        if not entries:
            left.append(f"{told}: not in .eval_results, which only takes results on a Hub dataset (datasets=)")
            continue
        page = out / ".eval_results" / f"{name}.yaml"
        write_atomic(page, yaml.safe_dump(entries, sort_keys=False, allow_unicode=True))
        hub.append(page)
    return SharedEvaluations(tuple(hub), tuple(ever), tuple(left))


def hub_entries(row: Mapping[str, Any], dataset: tuple[str, str] | None) -> list[dict[str, Any]]:
    """The first number of an evaluation as the Hub takes it, shares in percent; nothing without a data set."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    figures = [one for one in _figures(row) if _has_value(one["estimate"])]
    if dataset is None or not figures:
        return []
    first, scale = figures[0], 100 if figures[0]["form"] == "share" else 1
    found = first["estimate"]
    interval = f" [{scale * found['low']:.4g}, {scale * found['high']:.4g}]" if _bounded(found) else ""
    notes = f"{first['name']}{interval}, n = {found['n']}, {found['method']}; guided by a COALA head"
    entry = EvalResultEntry(
        dataset_id=dataset[0],
        task_id=dataset[1],
        value=round(scale * found["value"], 6),
        date=row["created"],
        notes=notes,
    )
    return eval_result_entries_to_yaml([entry])


def every_eval_ever_record(
    row: Mapping[str, Any],
    model: str,
    organisation: str,
    settings: Mapping[str, Any],
    dataset: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """One evaluation as an aggregate record: a result with its interval for each number that has a value."""
    seconds = datetime.fromisoformat(row["created"]).timestamp()
    name = row["title"]
    if dataset is None:
        source: dict[str, Any] = {"dataset_name": row["of"], "source_type": "other"}
    else:
        source = {"dataset_name": dataset[0].split("/")[1], "source_type": "hf_dataset", "hf_repo": dataset[0]}
    version = row["versions"]["coala"]
    base = settings.get("model", {})
    guided = {f"guidance {key}": value for key, value in settings.get("guidance", {}).items() if value is not None}
    return {
        "schema_version": SCHEMA_VERSION,
        "evaluation_id": f"{_slug(row['kind'])}/{model}/{seconds:.0f}",
        "evaluation_timestamp": row["created"],
        "retrieved_timestamp": f"{seconds:.0f}",
        "source_metadata": {
            "source_name": "a COALA run",
            "source_type": "evaluation_run",
            "source_organization_name": organisation,
            "evaluator_relationship": "first_party",
        },
        "eval_library": {"name": "coala", "version": version},
        "model_info": {
            "name": model,
            "id": model,
            "inference_engine": {"name": "coala", "version": version},
            "additional_details": {
                "deployment_type": "self_deployed",
                "model_availability": "open_weights",
                "base_model": Path(str(base.get("name", "unknown"))).name,
                **_texts(guided),
            },
        },
        "evaluation_results": [_result(row, one, name, source) for one in _figures(row) if _has_value(one["estimate"])],
    }


def _result(row: Mapping[str, Any], one: Mapping[str, Any], name: str, source: Mapping[str, Any]) -> dict[str, Any]:
    found, form = one["estimate"], one["form"]
    low, high = _BOUNDS.get(form, ("-Infinity", "Infinity"))
    score: dict[str, Any] = {"score": found["value"], "uncertainty": {"num_samples": found["n"]}}
    if _bounded(found):
        level = 0.99 if "99 %" in found["method"] else 0.95
        interval = {"lower": found["low"], "upper": found["high"], "confidence_level": level}
        score["uncertainty"]["confidence_interval"] = {**interval, "method": found["method"]}
    if beside := one.get("beside"):
        score["details"] = {
            f"{key} {end}": repr(value[end])
            for key, value in beside.items()
            for end in ("value", "low", "high")
            if value[end] is not None
        }
    identity = f"coala.{_slug(row['kind'])}.{_slug(one['name'])}"
    return {
        "evaluation_result_id": identity,
        "evaluation_name": name,
        "source_data": dict(source),
        "evaluation_timestamp": row["created"],
        "metric_config": {
            "metric_id": identity,
            "metric_name": one["name"],
            **({"metric_unit": _UNITS[form]} if form in _UNITS else {}),
            "lower_is_better": any(word in one["name"].lower() for word in _LESS_IS_BETTER),
            "score_type": "continuous",
            "min_score": low,
            "max_score": high,
            "additional_details": _texts({"how": found["method"], **_prefixed("judge", row.get("judge") or {})}),
        },
        "score_details": score,
        "generation_config": {
            "generation_args": {"execution_command": row["command"]},
            "additional_details": _texts(row.get("settings") or {}),
        },
    }


def _figures(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The numbers of an evaluation that speak of the guided model; of a contrast those of its second side."""
    for one in row["figures"]:
        if one["name"] not in _OF_JUDGES:
            yield {"name": one["name"], "form": one["form"], "estimate": one["estimate"]}
    for one in row.get("contrasts") or []:
        first, ours = one["sides"][:2]
        beside = {first["name"]: first["value"], f"less {first['name']}": ours["difference"]}
        yield {"name": one["name"], "form": one["form"], "estimate": ours["value"], "beside": beside}


def _has_value(estimate: Mapping[str, Any]) -> bool:
    return estimate["value"] is not None and bool(estimate["n"])


def _bounded(estimate: Mapping[str, Any]) -> bool:
    return estimate["low"] is not None and estimate["high"] is not None


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {str(name): str(value) for name, value in values.items() if value not in (None, "")}


def _prefixed(word: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{word} {name}": value for name, value in values.items()}


def _dataset(given: str) -> tuple[str, str]:
    where, _, task = given.partition(":")
    _require_name(where, "a data set")
    return where, task or "default"


def _require_name(given: str, what: str) -> None:
    if not _NAME.fullmatch(given):
        raise CoalaError(f"Found {given!r} as {what}, expected owner/name. Fix: give the name it has on the Hub.")


def _slug(said: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", said.lower()).strip("-")[:80]


def _stable_uuid(row: Mapping[str, Any], model: str) -> uuid.UUID:
    """A name in the form of a random UUID, the same for the same evaluation of the same model."""
    same = digest(model, row["kind"], row["of"], [one["path"] for one in row["files"]], row.get("settings"))
    return uuid.UUID(hex=same[:32], version=4)
