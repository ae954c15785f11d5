"""The benchmarks by the names of their commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from coala.evaluation.reward_benchmarks.benchmark import Ranking, RewardBenchmark, Scored
from coala.evaluation.reward_benchmarks.judgebench import rank_judgebench
from coala.evaluation.reward_benchmarks.reading import (
    Paths,
    read_judgebench,
    read_rewardbench,
    read_rewardbench2,
    read_rm_bench,
)
from coala.evaluation.reward_benchmarks.rewardbench import rank_rewardbench
from coala.evaluation.reward_benchmarks.rewardbench2 import rank_rewardbench2
from coala.evaluation.reward_benchmarks.rm_bench import rank_rm_bench


@dataclass(frozen=True)
class Form:
    """A benchmark: what it is called, what its overall figure is, its reader, its formula, and what chance gives."""

    title: str
    overall: str
    read: Callable[[Paths], RewardBenchmark]
    rank: Callable[[Scored], Ranking]
    chance: float


FORMS: Mapping[str, Form] = {
    "rewardbench": Form("RewardBench", "mean of sections", read_rewardbench, rank_rewardbench, 0.5),
    "rewardbench2": Form("RewardBench 2", "mean of the six subsets", read_rewardbench2, rank_rewardbench2, 0.25),
    "rmbench": Form("RM-Bench", "mean of the four domains", read_rm_bench, rank_rm_bench, 0.5),
    "judgebench": Form("JudgeBench", "all pairs", read_judgebench, rank_judgebench, 0.5),
}
