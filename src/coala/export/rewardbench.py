"""A ranking in the flat form in which results of RewardBench and its kin are published."""

from __future__ import annotations

from typing import Any

from coala.evaluation.reward_benchmarks import Ranking
from coala.values import FeatureSpec


def results(found: Ranking, name: str, spec: FeatureSpec) -> dict[str, Any]:
    """The flat form in which results are published: accuracy by subset beside ``model`` and how it was run."""
    kind = spec.template.partition(":")[0]
    about = {"model": name, "model_type": "Seq. Classifier", "chat_template": "tokenizer" if kind == "chat" else kind}
    return {**about, **{subset: accuracy.value for subset, accuracy in found.subsets.items()}}
