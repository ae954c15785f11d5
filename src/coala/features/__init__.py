"""Pairs to features: what is read and what it shares, the passes that read it, the shards that keep it."""

from coala.features.extraction import extract
from coala.features.prefix_tree import PrefixTree, distinct_lengths, distinct_tokens, survey
from coala.features.workers import ExtractionTask, workers

__all__ = [
    "ExtractionTask",
    "PrefixTree",
    "distinct_lengths",
    "distinct_tokens",
    "extract",
    "survey",
    "workers",
]
