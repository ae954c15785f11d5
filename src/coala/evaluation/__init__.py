"""From saved scores and replies to judgements and estimates; every number comes with its interval and its n.

The published benchmarks are modules of their own: `alpaca` and `length_control`, `mtbench`, `arena` and `arena_style`,
`rewardbench`; `survey_statistics` and `agreement` are for votes of people.
"""

from coala.evaluation.estimates import (
    LengthBin,
    Reliability,
    ReliabilityBin,
    accuracy_difference,
    accuracy_of_margins,
    auc,
    by_length_difference,
    margins_of,
    pairwise_nll,
    perplexity,
    ranking_accuracy,
    reliability,
    tie_share,
    win_rate,
)
from coala.evaluation.harness import judge
from coala.evaluation.judges import HeadJudge, Judge, WordJudge
from coala.evaluation.statistics import (
    bootstrap,
    bounded_mean,
    clopper_pearson,
    clustered,
    mean_estimate,
    paired_difference,
    share_estimate,
    wald,
    wilson,
)

__all__ = [
    "HeadJudge",
    "Judge",
    "LengthBin",
    "Reliability",
    "ReliabilityBin",
    "WordJudge",
    "accuracy_difference",
    "accuracy_of_margins",
    "auc",
    "bootstrap",
    "bounded_mean",
    "by_length_difference",
    "clopper_pearson",
    "clustered",
    "judge",
    "margins_of",
    "mean_estimate",
    "paired_difference",
    "pairwise_nll",
    "perplexity",
    "ranking_accuracy",
    "reliability",
    "share_estimate",
    "tie_share",
    "wald",
    "wilson",
    "win_rate",
]
