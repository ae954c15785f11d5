"""COALA: align language models with preferences by convex optimisation.

The public names, imported when first used, so that ``import coala`` is quick and loads neither torch nor JAX. Solvers
and programs are in ``coala.convex``, games in ``coala.nash``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coala.alignment import Run, align, load_run
    from coala.audit import audit_preferences
    from coala.backbone import LanguageModel, Prefix, load_backbone
    from coala.convex import Fit
    from coala.convex import fit as fit_head
    from coala.data import alternate, read_conversations, read_pairs
    from coala.data import check as check_pairs
    from coala.data import split as split_pairs
    from coala.decoding import Guidance, generate, guide, log_likelihood
    from coala.evaluation import Judge, WordJudge, win_rate
    from coala.evaluation import judge as compare_replies
    from coala.features import extract as extract_features
    from coala.receipts import forget_pairs, pair_influence, rater_effects
    from coala.statistics.scores import ranking_accuracy
    from coala.store import load_features, load_head, load_pairs, save_features, save_head, save_pairs
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

# Where each public name lives, and by which name where it has a shorter one there.
_HOMES: dict[str, tuple[str, ...]] = {
    "coala.alignment": ("Run", "align", "load_run"),
    "coala.audit": ("audit_preferences",),
    "coala.backbone": ("LanguageModel", "Prefix", "load_backbone"),
    "coala.convex": ("Fit", "fit_head = fit"),
    "coala.data": (
        *("alternate", "read_conversations", "read_pairs"),
        *("check_pairs = check", "split_pairs = split"),
    ),
    "coala.decoding": ("Guidance", "generate", "guide", "log_likelihood"),
    "coala.evaluation": ("Judge", "WordJudge", "win_rate", "compare_replies = judge"),
    "coala.statistics.scores": ("ranking_accuracy",),
    "coala.features": ("extract_features = extract",),
    "coala.receipts": ("forget_pairs", "pair_influence", "rater_effects"),
    "coala.store": ("load_features", "load_head", "load_pairs", "save_features", "save_head", "save_pairs"),
    "coala.values": (
        *("Certificate", "CoalaError", "ConvexHead", "Estimate", "FeatureSet", "FeatureSpec", "Generation"),
        *("Judgement", "Pair", "Turn"),
    ),
}
_HOME = {
    name: (home, own or name)
    for home, entries in _HOMES.items()
    for name, _, own in (entry.partition(" = ") for entry in entries)
}
# What was here by another name.
_MOVED = {
    "check": "coala.check_pairs",
    "split": "coala.split_pairs",
    "extract": "coala.extract_features",
    "fit": "coala.fit_head",
    "judge": "coala.compare_replies",
    **{name: f"coala.convex.{name}" for name in ("Program", "Solution", "sample_patterns", "solve")},
}

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
    "Run",
    "Turn",
    "WordJudge",
    "align",
    "alternate",
    "audit_preferences",
    "check_pairs",
    "compare_replies",
    "extract_features",
    "fit_head",
    "forget_pairs",
    "generate",
    "guide",
    "load_backbone",
    "load_features",
    "load_head",
    "load_pairs",
    "load_run",
    "log_likelihood",
    "pair_influence",
    "ranking_accuracy",
    "rater_effects",
    "read_conversations",
    "read_pairs",
    "save_features",
    "save_head",
    "save_pairs",
    "split_pairs",
    "win_rate",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("coala-align")
        except PackageNotFoundError:  # run from its source, not installed
            return "unknown"
    if name in _MOVED:
        raise AttributeError(f"coala.{name} is now {_MOVED[name]}")
    if name not in _HOME:
        raise AttributeError(f"module 'coala' has no attribute {name!r}")
    home, own = _HOME[name]
    return getattr(import_module(home), own)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
