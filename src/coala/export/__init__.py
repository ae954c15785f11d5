"""A fitted head for others to use: as a Hugging Face reward model, as a reward function for TRL, on RewardBench.

Knows what those expect; nothing of how a head is fitted.
"""

from coala.export.card import RunFacts, facts_of
from coala.export.folder import Exported, export_linear_head, export_reward_model, verify_folder
from coala.export.network import ExportError
from coala.export.rewardbench import results
from coala.export.rewards import RewardFunction, as_reward_func, score_replies

__all__ = [
    "ExportError",
    "Exported",
    "RewardFunction",
    "RunFacts",
    "as_reward_func",
    "export_linear_head",
    "export_reward_model",
    "facts_of",
    "results",
    "score_replies",
    "verify_folder",
]
