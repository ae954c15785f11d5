"""Benchmarks of reward models: RewardBench, RewardBench 2, RM-Bench, JudgeBench; read, scored, ranked.

Each is items of a prompt with right and wrong replies, and a formula of its own that turns scores into figures. Readers
give a :class:`RewardBenchmark`, whose ``replies`` are to be scored once each; ``ranking(scores)`` gives the figures.
Nothing here knows a model.
"""

from coala.evaluation.reward_benchmarks.benchmark import RULES, Item, Ranking, RewardBenchmark, Scored
from coala.evaluation.reward_benchmarks.forms import FORMS, Form
from coala.evaluation.reward_benchmarks.judged import (
    read_alpaca_annotations,
    read_arena_games,
    read_mtbench_games,
    read_vicuna_reviews,
)
from coala.evaluation.reward_benchmarks.labelled import read_autoj, read_llmbar, read_shp
from coala.evaluation.reward_benchmarks.reading import (
    read_judgebench,
    read_rewardbench,
    read_rewardbench2,
    read_rm_bench,
)
from coala.evaluation.reward_benchmarks.saved_scores import read_scores, score_rows

__all__ = [
    "FORMS",
    "RULES",
    "Form",
    "Item",
    "Ranking",
    "RewardBenchmark",
    "Scored",
    "read_alpaca_annotations",
    "read_arena_games",
    "read_autoj",
    "read_judgebench",
    "read_llmbar",
    "read_mtbench_games",
    "read_rewardbench",
    "read_rewardbench2",
    "read_rm_bench",
    "read_scores",
    "read_shp",
    "read_vicuna_reviews",
    "score_rows",
]
