"""Benchmarks of reward models: RewardBench, RewardBench 2, RM-Bench, JudgeBench; read, scored, ranked.

Each is items of a prompt with right and wrong replies, and a formula of its own that turns scores into figures. Readers
give a :class:`RewardBenchmark`, whose ``replies`` are to be scored once each; ``ranking(scores)`` gives the figures.
Nothing here knows a model.
"""

from coala.evaluation.reward_benchmarks.benchmark import RULES, Item, Ranking, RewardBenchmark, Scored
from coala.evaluation.reward_benchmarks.forms import FORMS, Form
from coala.evaluation.reward_benchmarks.reading import (
    read_judgebench,
    read_llmbar,
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
    "read_judgebench",
    "read_llmbar",
    "read_rewardbench",
    "read_rewardbench2",
    "read_rm_bench",
    "read_scores",
    "score_rows",
]
