"""Judges: which of two replies is better, or how good one is. A judge sees texts, never how they were made.

A judge is any object with a ``name`` and ``compare``. Failing is allowed: raise, or return a preference of ``None``;
a failure is counted (:func:`coala.evaluation.win_rate`), never imputed at random. The folders beside this file are
the shipped instructions.
"""

from coala.endpoint import Completion as Answer
from coala.endpoint import RetryPolicy as Patience
from coala.evaluation.judges.chat import ChatJudge, OpenAIJudge, VerdictMemory, VerdictStore
from coala.evaluation.judges.endpoint import Budget, JudgeEndpoint, OpenAIEndpoint
from coala.evaluation.judges.instructions import SHIPPED, Exchange, Instructions, JudgePrompt, asked, read_instructions
from coala.evaluation.judges.language_model import LanguageModelJudge, LocalEndpoint
from coala.evaluation.judges.named import NamedJudge, local_judge, named_judge
from coala.evaluation.judges.protocol import Cost, Judge, JudgeFailure, JudgeStopped, Paid, preference
from coala.evaluation.judges.replay import ReplayJudge
from coala.evaluation.judges.scorers import RULES, HeadJudge, RuleJudge, WordJudge
from coala.evaluation.judges.verdicts import Verdict, read_rating, read_verdict

__all__ = [
    "RULES",
    "SHIPPED",
    "Answer",
    "Budget",
    "ChatJudge",
    "Cost",
    "Exchange",
    "HeadJudge",
    "Instructions",
    "Judge",
    "JudgeEndpoint",
    "JudgeFailure",
    "JudgePrompt",
    "JudgeStopped",
    "LanguageModelJudge",
    "LocalEndpoint",
    "NamedJudge",
    "OpenAIEndpoint",
    "OpenAIJudge",
    "Paid",
    "Patience",
    "ReplayJudge",
    "RuleJudge",
    "Verdict",
    "VerdictMemory",
    "VerdictStore",
    "WordJudge",
    "asked",
    "local_judge",
    "named_judge",
    "preference",
    "read_instructions",
    "read_rating",
    "read_verdict",
]
