"""From saved replies to judgements and win rates; every number comes with its interval and its n.

The published benchmarks are modules of their own: `alpaca` and `length_control`, `mtbench`, `arena` and `arena_style`,
`reward_benchmarks`. What is computed of arrays alone is in :mod:`coala.statistics`.
"""

from coala.evaluation.harness import Judged, judge, judge_many
from coala.evaluation.judges import (
    HeadJudge,
    Judge,
    JudgeFailure,
    JudgeStopped,
    LanguageModelJudge,
    OpenAIJudge,
    ReplayJudge,
    RuleJudge,
    WordJudge,
    read_instructions,
)
from coala.evaluation.win_rates import Consistency, consistency, win_rate

__all__ = [
    "Consistency",
    "HeadJudge",
    "Judge",
    "JudgeFailure",
    "JudgeStopped",
    "Judged",
    "LanguageModelJudge",
    "OpenAIJudge",
    "ReplayJudge",
    "RuleJudge",
    "WordJudge",
    "consistency",
    "judge",
    "judge_many",
    "read_instructions",
    "win_rate",
]
