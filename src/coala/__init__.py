"""COALA: align language models with preferences by convex optimisation.

The public names, imported when first used, so that ``import coala`` is quick and loads neither torch nor JAX.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coala.backbone import LanguageModel, Prefix, load_backbone
    from coala.convex import Fit, Program, Solution, fit, sample_patterns, solve
    from coala.data import alternate, check, read_conversations, read_pairs, split
    from coala.decoding import Guidance, generate, guide, log_likelihood
    from coala.evaluation import Judge, WordJudge, judge, ranking_accuracy, win_rate
    from coala.features import extract
    from coala.store import Run, load_features, load_head, load_pairs, save_features, save_head, save_pairs
    from coala.values import (
        Certificate,
        CoalaError,
        ConvexHead,
        Estimate,
        FeatureSet,
        FeatureSpec,
        Generation,
        Judgement,
        Pair,
        Turn,
    )

_HOMES = {
    "coala.backbone": ("LanguageModel", "Prefix", "load_backbone"),
    "coala.convex": ("Fit", "Program", "Solution", "fit", "sample_patterns", "solve"),
    "coala.data": ("alternate", "check", "read_conversations", "read_pairs", "split"),
    "coala.decoding": ("Guidance", "generate", "guide", "log_likelihood"),
    "coala.evaluation": ("Judge", "WordJudge", "judge", "ranking_accuracy", "win_rate"),
    "coala.features": ("extract",),
    "coala.store": ("Run", "load_features", "load_head", "load_pairs", "save_features", "save_head", "save_pairs"),
    "coala.values": (
        *(
            "Certificate",
            "CoalaError",
            "ConvexHead",
            "Estimate",
            "FeatureSet",
            "FeatureSpec",
            "Generation",
            "Judgement",
            "Pair",
        ),
        "Turn",
    ),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Certificate",
    "CoalaError",
    "ConvexHead",
    "Estimate",
    "FeatureSet",
    "FeatureSpec",
    "Fit",
    "Generation",
    "Guidance",
    "Judge",
    "Judgement",
    "LanguageModel",
    "Pair",
    "Prefix",
    "Program",
    "Run",
    "Solution",
    "Turn",
    "WordJudge",
    "alternate",
    "check",
    "extract",
    "fit",
    "generate",
    "guide",
    "judge",
    "load_backbone",
    "load_features",
    "load_head",
    "load_pairs",
    "log_likelihood",
    "ranking_accuracy",
    "read_conversations",
    "read_pairs",
    "sample_patterns",
    "save_features",
    "save_head",
    "save_pairs",
    "solve",
    "split",
    "win_rate",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("coala-align")
        except PackageNotFoundError:  # run from its source, not installed
            return "unknown"
    if name not in _HOME:
        raise AttributeError(f"module 'coala' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
