"""Readers of sets that show two replies and say by a label which is better: LLMBar, Auto-J, Stanford Human Preferences.

Ties are left out and counted. What is shown first is known, so that :attr:`Item.places` is filled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coala.evaluation.reward_benchmarks.benchmark import Item, Ranking, RewardBenchmark, Scored, require_some
from coala.evaluation.reward_benchmarks.reading import Paths, files_of
from coala.evaluation.reward_benchmarks.rewardbench import rank_rewardbench
from coala.evaluation.rows import FileRow, read_rows, shown
from coala.values import CoalaError

# Subsets of LLMBar, and what RewardBench calls them.
LLMBAR = {
    "Natural": "llmbar-natural",
    "Adversarial/Neighbor": "llmbar-adver-neighbor",
    "Adversarial/GPTInst": "llmbar-adver-GPTInst",
    "Adversarial/GPTOut": "llmbar-adver-GPTOut",
    "Adversarial/Manual": "llmbar-adver-manual",
}


@dataclass(frozen=True)
class _Columns:
    """The columns of a form; ``meaning`` of the label: whether the first reply is the better, None for a tie."""

    prompt: str
    first: str
    second: str
    label: str
    meaning: Mapping[str, bool | None]
    subset: str


_LLMBAR = _Columns("input", "output_1", "output_2", "label", {"1": True, "2": False}, "subset")
_AUTOJ = _Columns("prompt", "response 1", "response 2", "label", {"0": True, "1": False, "2": None}, "scenario")
_SHP = _Columns("history", "human_ref_A", "human_ref_B", "labels", {"1": True, "0": False}, "domain")


def read_llmbar(path: Paths) -> RewardBenchmark:
    """Rows with ``input``, ``output_1``, ``output_2``, ``label`` (1 or 2) and ``subset``: LLMBar's own.

    RewardBench has these rows under other names of subsets, and its formula ranks them.
    """
    items, remarks = _read(path, _LLMBAR, LLMBAR)
    return RewardBenchmark(items, rank_rewardbench, remarks)


def read_autoj(path: Paths) -> RewardBenchmark:
    """Rows with ``prompt``, ``response 1``, ``response 2``, ``label`` (0, 1 or 2: a tie) and ``scenario``: Auto-J's."""
    items, remarks = _read(path, _AUTOJ)
    return RewardBenchmark(items, rank_rows, remarks)


def read_shp(path: Paths) -> RewardBenchmark:
    """Rows with ``history``, ``human_ref_A``, ``human_ref_B``, ``labels`` (1: A is preferred) and ``domain``."""
    items, remarks = _read(path, _SHP)
    return RewardBenchmark(items, rank_rows, remarks)


def rank_rows(scored: Scored) -> Ranking:
    """Accuracy over all rows and by subset, where a set has no formula of its own."""
    require_some(scored)
    overall = scored.accuracy()
    subsets = {name: part.accuracy() for name, part in scored.by_subset().items()}
    return Ranking(subsets, {}, overall, overall, scored.ties())


def ties_left(n: int) -> tuple[str, ...]:
    """The remark on rows that prefer nothing."""
    return (f"{n} ties are left out",) if n else ()


def _read(
    path: Paths, columns: _Columns, subsets: Mapping[str, str] | None = None
) -> tuple[tuple[Item, ...], tuple[str, ...]]:
    items: list[Item] = []
    ties = 0
    for file in files_of(path):
        for place, row in enumerate(read_rows(file)):
            first = _first_wins(row, columns)
            subset = row.label(columns.subset)
            if subsets is not None:
                if subset not in subsets:
                    raise row.fault(columns.subset, subset, f"one of {', '.join(subsets)}", "give LLMBar's own file")
                subset = subsets[subset]
            if first is None:
                ties += 1
                continue
            replies = row.text(columns.first), row.text(columns.second)
            items.append(Item.of_two(f"{subset}-{place}", subset, row.text(columns.prompt), replies, first))
    if not items:
        raise CoalaError("Found no row with a preference, expected at least one. Fix: check that the file is complete.")
    return tuple(items), ties_left(ties)


def _first_wins(row: FileRow, columns: _Columns) -> bool | None:
    value = row.value(columns.label)
    if f"{value:g}" not in columns.meaning:
        expected = f"one of {', '.join(columns.meaning)}"
        raise row.fault(columns.label, shown(row.get(columns.label)), expected, "correct or delete the row")
    return columns.meaning[f"{value:g}"]
