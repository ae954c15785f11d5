"""Scores that were saved, as files hold them: one row per item, of one scorer or, in JudgeBench's form, of several."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from coala.evaluation.reward_benchmarks.benchmark import RewardBenchmark, Scored
from coala.evaluation.reward_benchmarks.judgebench import UNKNOWN
from coala.evaluation.reward_benchmarks.reading import Paths, domain_of, files_of, label_of, refuse_form
from coala.evaluation.rows import FileRow, as_number, read_rows, shown
from coala.statistics.intervals import Float
from coala.values import CoalaError, prompt_id

_CHOSEN = ("chosen_score", "chosen_scores", "score_chosen", "scores_chosen", "chosen")
_REJECTED = ("rejected_score", "rejected_scores", "score_rejected", "scores_rejected", "rejected")
_Row = tuple[Float, Float, str, str, str]


def read_scores(path: Paths, form: str, benchmark: RewardBenchmark | None = None) -> dict[str, Scored]:
    """Scores of a file for the benchmark called ``form``, by the scorer's name ("" where the file names none).

    A row holds scores of the right replies and of the wrong ones (``chosen_score``, ``rejected_score`` or the names
    upstream uses), numbers or lists of them: one each (rewardbench, judgebench), three each by style (rmbench), one or
    more (rewardbench2, also ``scores`` of which the first ``num_correct`` are of right replies); ``pairs`` is any other
    set of pairs, whose rows are known by their place where they have no ``id``. Beside them
    ``subset``, for rmbench ``domain`` or the file's name; ``prompt``, ``prompt_id`` or ``group`` names the group for
    intervals. JudgeBench's own form is read too: ``label`` with ``scores``, [A, B] or an object of these by scorer.
    With ``benchmark`` items get subset and group from it by their ``id`` or ``pair_id``, and each needs a row.
    """
    found: dict[str, list[_Row]] = {}
    place = 0
    for file in files_of(path):
        for row in read_rows(file):
            for scorer, one in _scored_row(row, form, place).items():
                found.setdefault(scorer, []).append(one)
            place += 1
    for scorer, rows in found.items():
        if len(rows) != place:
            raise CoalaError(
                f"Found scores of {ascii(scorer)[:60]} in {len(rows)} of {place} rows, expected them in each. "
                "Fix: score every row."
            )
    columns = {scorer: Scored(*zip(*rows, strict=True)) for scorer, rows in found.items()}
    return columns if benchmark is None else {name: _joined(one, benchmark) for name, one in columns.items()}


def score_rows(scored: Scored) -> list[dict[str, Any]]:
    """One row per item with its scores, as upstream names them, which :func:`read_scores` reads; no texts.

    Of one right and one wrong reply scores are numbers, of more they are lists.
    """

    def side(scores: Float, alone: bool) -> float | list[float]:
        return float(scores[0]) if alone else scores.tolist()

    rows = []
    columns = (scored.id, scored.subset, scored.group, scored.chosen, scored.rejected)
    for id, subset, group, right, wrong in zip(*columns, strict=True):
        alone = len(right) == len(wrong) == 1
        about: dict[str, Any] = {"id": id, "subset": subset, "group": prompt_digest(group)}
        about |= {"results": int(right[0] > wrong[0])} if alone else {}
        rows.append({**about, "scores_chosen": side(right, alone), "scores_rejected": side(wrong, alone)})
    return rows


def prompt_digest(group: str) -> str:
    """A short name of a prompt that stands in for its text."""
    from coala.values import user

    return prompt_id(user(group))


def _scored_row(row: FileRow, form: str, place: int) -> Mapping[str, _Row]:
    """What a row says of each scorer."""
    names = ("pair_id", "id") if form == "judgebench" else ("id",)
    id = row.label(*names) if row.name_of(*names) else str(place)
    group = next((row.text(name) for name in ("prompt", "prompt_id", "group") if isinstance(row.get(name), str)), None)
    group = f"row {place}" if group is None else group
    if form == "judgebench" and row.name_of("scores"):
        scores, first = row.get("scores"), label_of(row)
        by = scores if isinstance(scores, Mapping) else {"": scores}
        if not by:
            raise row.fault("scores", "an empty object", "scores by the scorer's name", "correct or delete the row")
        source = row.label("source") if row.name_of("source") else UNKNOWN
        found = {}
        for scorer, value in by.items():
            two = _numbers(row, f"scores of {ascii(scorer)[1:-1][:60]}" if scorer else "scores", value)
            if len(two) != 2:
                raise row.fault("scores", f"{len(two)} numbers", "two, of A and of B", "correct or delete the row")
            right, wrong = (two[:1], two[1:]) if first else (two[1:], two[:1])
            found[scorer] = _checked(row, (right, wrong, source, group, id))
        return found
    if form == "rewardbench2" and row.name_of("num_correct", "scores") and not row.name_of(*_CHOSEN):
        everything = _numbers(row, "scores", row.get("scores"))
        n = int(row.value("num_correct", low=1))
        if n >= len(everything):
            raise row.fault(
                "num_correct", str(n), f"fewer than the {len(everything)} scores", "correct or delete the row"
            )
        right, wrong = everything[:n], everything[n:]
    else:
        right, wrong = (_side(row, names) for names in (_CHOSEN, _REJECTED))
    wanted = {"rewardbench": 1, "judgebench": 1, "pairs": 1, "rmbench": 3}.get(form)
    for field, scores in (("chosen", right), ("rejected", wrong)):
        if wanted is not None and len(scores) != wanted:
            expected = "three scores, one of each style" if wanted == 3 else "one score"
            raise row.fault(field, f"{len(scores)} scores", expected, "give scores of this benchmark's replies")
    if form == "rmbench":
        subset = domain_of(row)
        id = id if id.startswith(f"{subset}:") else f"{subset}:{id}"
    elif form in ("judgebench", "pairs"):
        subset = row.label("source", "subset") if row.name_of("source", "subset") else UNKNOWN
    else:
        subset = row.label("subset")
    if form == "rewardbench2":
        refuse_form(row, subset, id, len(right))
    return {"": _checked(row, (right, wrong, subset, group, id))}


def _side(row: FileRow, names: tuple[str, ...]) -> Float:
    value = row.get(*names)
    return (
        _numbers(row, row.name_of(*names) or names[0], value)
        if isinstance(value, list)
        else np.array([row.value(*names)])
    )


def _numbers(row: FileRow, field: str, value: Any) -> Float:
    """A list of numbers (n,), each perhaps in a list of its own."""
    if not isinstance(value, list) or not value:
        raise row.fault(field, shown(value), "a list of numbers", "correct or delete the row")
    flat = [as_number(one[0] if isinstance(one, list) and len(one) == 1 else one) for one in value]
    for number, one in zip(flat, value, strict=True):
        if number is None:
            raise row.fault(field, shown(one), "a number", "correct or delete the row")
    return np.array(flat, dtype=np.float64)


def _checked(row: FileRow, one: _Row) -> _Row:
    right, wrong = one[:2]
    both = np.concatenate([right, wrong])
    with np.errstate(over="ignore"):
        margin = float(both.max() - both.min())
    if not math.isfinite(margin):
        raise row.fault(_CHOSEN[0], f"a margin of {margin}", "scores whose difference is finite", "correct the row")
    return one


def _joined(scored: Scored, benchmark: RewardBenchmark) -> Scored:
    """The same scores in the order of the benchmark's items, with their subsets and groups."""
    places = {id: i for i, id in enumerate(scored.id)}
    items = benchmark.items
    missing = [item.id for item in items if item.id not in places]
    if missing or len(scored) != len(items):
        example = f", e.g. {ascii(missing[0])[:60]}" if missing else ""
        raise CoalaError(
            f"Found {len(scored)} rows of scores for {len(items)} items, {len(missing)} of which have none{example}; "
            "expected one row for each by its id. Fix: give the scores of this file."
        )
    for item in items:
        right, wrong = len(scored.chosen[places[item.id]]), len(scored.rejected[places[item.id]])
        if (right, wrong) != (len(item.chosen), len(item.rejected)):
            raise CoalaError(
                f"Found {right} and {wrong} scores of {ascii(item.id)[:60]}, expected {len(item.chosen)} and "
                f"{len(item.rejected)}, one of each reply. Fix: give the scores of this file."
            )
    order = scored.of([places[item.id] for item in items])
    subsets, groups = (tuple(getattr(item, name) for item in items) for name in ("subset", "group"))
    return Scored(order.chosen, order.rejected, subsets, groups, order.id)
