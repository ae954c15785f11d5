"""From saved scores and replies to judgements and estimates; every number comes with its interval and its n."""

from coala.evaluation.estimates import (
    LengthBin,
    Reliability,
    ReliabilityBin,
    accuracy_difference,
    accuracy_of_margins,
    auc,
    by_length_difference,
    clustered,
    margins_of,
    mean_estimate,
    pairwise_nll,
    perplexity,
    ranking_accuracy,
    reliability,
    share_estimate,
    tie_share,
    wilson,
    win_rate,
)
from coala.evaluation.harness import judge
from coala.evaluation.judges import HeadJudge, Judge, WordJudge

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
    "by_length_difference",
    "clustered",
    "judge",
    "margins_of",
    "mean_estimate",
    "pairwise_nll",
    "perplexity",
    "ranking_accuracy",
    "reliability",
    "share_estimate",
    "tie_share",
    "wilson",
    "win_rate",
]
