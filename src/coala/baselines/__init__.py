"""The methods COALA is compared with, trained by TRL on the same tokens: SFT, DPO, ORPO, SimPO and a reward model.

No loss of theirs is written here. Knows the frozen model's rendering and likelihoods; nothing of heads or reports.
"""

from coala.baselines.drift import Drift, drift
from coala.baselines.likelihoods import PairLikelihoods, log_likelihoods, reward_margins
from coala.baselines.rows import Demonstration
from coala.baselines.settings import METHODS, BaselineMethod, Lora, TrainSettings, paper, sweep, trl
from coala.baselines.training import Trained, load_trained, train, whole_model
from coala.baselines.weights import trainable

__all__ = [
    "METHODS",
    "BaselineMethod",
    "Demonstration",
    "Drift",
    "Lora",
    "PairLikelihoods",
    "TrainSettings",
    "Trained",
    "drift",
    "load_trained",
    "log_likelihoods",
    "paper",
    "reward_margins",
    "sweep",
    "train",
    "trainable",
    "trl",
    "whole_model",
]
