"""The words that settings choose among: one list each, for the recipe, the flags and their help alike.

Imports nothing, so that `coala --help` knows the choices at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Template = Literal["auto", "chat", "dialogue", "continuation"]
Pooling = Literal["mean", "mean_all", "last", "attn"]
Quantise = Literal["8bit", "4bit"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Method = Literal["learnt", "direct", "two-phase", "linear"]
GateOn = Literal["auto", "reply", "prompt"]
Loss = Literal["pairwise", "pointwise"]
PhaseOne = Literal["gated", "cronos", "network"]
Mode = Literal["token", "block", "prefix", "shift", "best_of", "beam", "none"]
Rule = Literal["calibrated", "min-max", "raw", "z-score"]
Engine = Literal["processes", "ray"]
Board = Literal["v0.1", "v2.0"]
VerdictRule = Literal["last", "unanimous"]
DifficultyBy = Literal["position", "instruction"]
Stopping = Literal["optimum", "liblinear"]
SubsetWeights = Literal["published", "rows"]
StepLoss = Literal["inpo", "sppo", "dro", "rebel", "dpo"]
Selection = Literal["random", "all", "best_worst"]
Target = Literal["soft", "bernoulli", "hard"]
Win = Literal["hard", "mean"]

# What others call the same.
DTYPES: Mapping[str, Dtype] = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
    "full": "float32",
}
