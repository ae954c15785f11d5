"""What is audited, from files: a published benchmark, judged replies, pairs of any format; systems' scores of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from coala.data.doctor import gather
from coala.data.files import Source, records, sources
from coala.data.findings import Finding, listed
from coala.data.formats import Located, read
from coala.evaluation.reward_benchmarks import (
    FORMS,
    Item,
    RewardBenchmark,
    Scored,
    read_alpaca_annotations,
    read_arena_games,
    read_autoj,
    read_llmbar,
    read_mtbench_games,
    read_scores,
    read_shp,
    read_vicuna_reviews,
)
from coala.evaluation.reward_benchmarks.labelled import LLMBAR
from coala.evaluation.reward_benchmarks.rm_bench import CELLS
from coala.settings import AuditSet
from coala.statistics.intervals import Float
from coala.values import CoalaError, Pair

_ALONE: Mapping[str, Callable[[list[Path | str]], RewardBenchmark]] = {
    **{name: form.read for name, form in FORMS.items()},
    "llmbar": read_llmbar,
    "autoj": read_autoj,
    "shp": read_shp,
    "alpaca": read_alpaca_annotations,
}
# Judgements whose texts lie in files of their own.
_JOINED: Mapping[str, Callable[..., RewardBenchmark]] = {
    "mtbench": read_mtbench_games,
    "arena": read_arena_games,
    "vicuna": read_vicuna_reviews,
}
_SCORED = {**{name: name for name in FORMS}, "llmbar": "rewardbench"}  # forms of files of scores


@dataclass(frozen=True, eq=False)
class PreferenceSet:
    """Items to be audited, ``pairs`` where they were read as pairs, and by system the scores (R,) of all replies."""

    items: tuple[Item, ...]
    pairs: tuple[Pair, ...] = ()
    scores: Mapping[str, Float] | None = None
    remarks: tuple[str, ...] = ()


def read_set(
    source: Source,
    bench: str = "auto",
    *,
    format: str = "auto",
    by: str | None = None,
    subset: Sequence[str] = (),
    questions: Source = (),
    answers: Source = (),
    scores: Sequence[Path | str] = (),
    skip_bad: bool = False,
) -> PreferenceSet:
    """The items of ``source``; what they are is seen from the first row where ``bench`` is ``auto``.

    ``by`` names the column of pairs that says their subset, ``subset`` those that are looked at. ``questions`` and
    ``answers`` hold the texts of judgements that have none. ``scores`` are files of scores, as ``coala eval`` takes
    them, of a system each or of several. RM-Bench becomes its nine comparisons of each prompt. Raises ``CoalaError``
    for what cannot be read, in a sentence.
    """
    names = sources(source)
    if bench not in get_args(AuditSet):
        raise CoalaError(f"Found the set {bench!r}, expected {listed(get_args(AuditSet), 20)}. Fix: name one of them.")
    kind = bench if bench != "auto" else "pairs" if format != "auto" else _recognised(names)
    if kind in _JOINED:
        if not (questions and answers):
            raise CoalaError(
                f"Found judgements without texts ({kind}), expected the questions and the answers that were judged. "
                "Fix: add --questions FILE and --answers FILE, once for each file."
            )
        found = _JOINED[kind](list(names), list(sources(questions)), list(sources(answers)))
    elif kind in _ALONE:
        found = _ALONE[kind](list(names))
    else:
        return _chosen(_of_pairs(names, format, by, scores, skip_bad), subset)
    if by is not None:
        raise CoalaError(f"Found --by {by} with {kind}, which has its own subsets. Fix: remove --by.")
    held = _scores(kind, scores, found) if scores else None
    made = PreferenceSet(found.items, (), held, found.remarks)
    return _chosen(_of_nine(made) if kind == "rmbench" else made, subset)


def item_of(pair: Pair, place: int, subset: str = "") -> Item:
    """A pair as an item of one right and one wrong reply."""
    return Item(str(place), subset, pair.prompt, (pair.chosen,), (pair.rejected,), pair.group)


def _recognised(names: Sequence[str]) -> str:
    """What the first row of the first file looks like."""
    if Path(names[0]).is_dir():
        return "rmbench"
    row: Any = next((one.value for one in records(names[0]) if not isinstance(one, Finding)), None)
    if not isinstance(row, Mapping):
        return "pairs"
    chosen, rejected = row.get("chosen"), row.get("rejected")
    lists = all(isinstance(one, list) and all(isinstance(text, str) for text in one) for one in (chosen, rejected))
    looks: Mapping[str, bool] = {
        "judgebench": {"response_A", "response_B", "pair_id"} <= set(row),
        "llmbar": {"input", "output_1", "output_2"} <= set(row) and str(row.get("subset")) in LLMBAR,
        "autoj": {"response 1", "response 2", "scenario"} <= set(row),
        "shp": {"human_ref_A", "human_ref_B", "domain"} <= set(row),
        "mtbench": bool({"g1_winner", "g1_judgment"} & set(row)),
        "arena": "games" in row,
        "vicuna": {"answer1_id", "answer2_id", "score"} <= set(row),
        "alpaca": {"instruction", "output_1", "output_2", "preference"} <= set(row),
        "rmbench": lists and len(row["chosen"]) == len(row["rejected"]) == 3,
        "rewardbench2": lists and {"prompt", "subset"} <= set(row),
        "rewardbench": isinstance(chosen, str) and isinstance(rejected, str) and {"prompt", "subset"} <= set(row),
    }
    return next((name for name, alike in looks.items() if alike), "pairs")


def _of_pairs(
    names: Sequence[str], format: str, by: str | None, scores: Sequence[Path | str], skip_bad: bool
) -> PreferenceSet:
    """Pairs of any format. Bad rows end it, or are left out and counted; warnings are remarks."""
    findings = gather(names, format)
    remarks = [str(one) for one in findings.warnings]
    if not (skip_bad and findings.pairs):
        findings.raise_for_errors()
    elif findings.errors:
        remarks.append(f"{len(findings.errors)} rows skipped with errors; the first: {findings.errors[0]}")
    subsets = _subsets(names, format, by) if by is not None else [""] * len(findings.pairs)
    pairs = zip(findings.pairs, subsets, strict=True)
    items = tuple(item_of(pair, place, subset) for place, (pair, subset) in enumerate(pairs))
    held = _scores("pairs", scores, RewardBenchmark(items, FORMS["judgebench"].rank)) if scores else None
    return PreferenceSet(items, findings.pairs, held, tuple(remarks))


def _subsets(names: Sequence[str], format: str, by: str) -> list[str]:
    """The field ``by`` of the row that each sound pair came from."""
    fields: dict[tuple[str, int], str] = {}
    seen: set[str] = set()
    for name in names:
        for one in records(name):
            if not isinstance(one, Finding) and isinstance(one.value, Mapping):
                seen |= {str(key) for key in one.value}
                if isinstance(value := one.value.get(by), str | int | float | bool):
                    fields[one.file, one.row] = str(value)
    if not fields:
        raise CoalaError(f"Found no column {by!r} among {listed(sorted(seen))}. Fix: name one of these with --by.")
    located = (event for event in read(names, format) if isinstance(event, Located))
    return [fields.get((one.file, one.row), "(none)") for one in located]


def _scores(kind: str, files: Sequence[Path | str], benchmark: RewardBenchmark) -> dict[str, Float]:
    """Scores of all replies by system, in the order of the items' replies."""
    if kind != "pairs" and kind not in _SCORED:
        raise CoalaError(f"Found --scores of {kind}, expected scores of {', '.join(_SCORED)} or of plain pairs.")
    found: dict[str, Float] = {}
    for file in files:
        for name, scored in read_scores(file, _SCORED.get(kind, kind), benchmark).items():
            system = name or Path(file).name.partition(".")[0]
            if system in found:
                raise CoalaError(f"Found two files of scores called {system!r}, expected names that differ.")
            found[system] = _flat(scored)
    return found


def _flat(scored: Scored) -> Float:
    sides = (side for both in zip(scored.chosen, scored.rejected, strict=True) for side in both)
    return np.concatenate([np.atleast_1d(side) for side in sides])


def _of_nine(made: PreferenceSet) -> PreferenceSet:
    """RM-Bench's items as nine comparisons each, in subsets by domain and by how style speaks: easy, normal, hard."""
    kinds = {(int(a), int(b)): kind for kind in ("easy", "normal", "hard") for a, b in CELLS[kind]}
    items: list[Item] = []
    rows: list[int] = []
    start = 0
    for item in made.items:
        for (a, b), kind in sorted(kinds.items()):
            both = (item.chosen[a],), (item.rejected[b],)
            items.append(Item(f"{item.id}:{a}{b}", f"{item.subset} {kind}", item.prompt, *both, item.group))
            rows += [start + a, start + 3 + b]
        start += 6
    held = None if made.scores is None else {name: given[rows] for name, given in made.scores.items()}
    return replace(made, items=tuple(items), scores=held)


def _chosen(made: PreferenceSet, subsets: Sequence[str]) -> PreferenceSet:
    """The items of ``subsets``, all of them if none is named."""
    if not subsets:
        return made
    known = sorted({item.subset for item in made.items} - {""})
    for name in subsets:
        if name not in known:
            there = f"one of {listed(known, 40)}" if known else "none: these rows have no subsets"
            mend = "name one of these" if known else "remove --subset, or pass --by COLUMN"
            raise CoalaError(f"Found the subset {name!r}, expected {there}. Fix: {mend}.")
    inside = [item.subset in subsets for item in made.items]
    replies = np.repeat(inside, [len(item.replies) for item in made.items])
    return PreferenceSet(
        tuple(item for item, stays in zip(made.items, inside, strict=True) if stays),
        tuple(pair for pair, stays in zip(made.pairs, inside, strict=True) if stays) if made.pairs else (),
        None if made.scores is None else {name: given[replies] for name, given in made.scores.items()},
        made.remarks,
    )
