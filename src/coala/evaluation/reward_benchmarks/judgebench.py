"""JudgeBench: pairs of replies to hard questions, one of them objectively right; overall and by category.

A tie counts as wrong. Source: Tan et al. 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from coala.evaluation.reward_benchmarks.benchmark import Ranking, Scored, require_some
from coala.values import Estimate

# Categories, and what the sources of their questions are called.
CATEGORIES: Mapping[str, Callable[[str], bool]] = {
    "knowledge": lambda source: source.startswith("mmlu-pro"),
    "reasoning": lambda source: source == "livebench-reasoning",
    "math": lambda source: source == "livebench-math",
    "coding": lambda source: source == "livecodebench",
}
UNKNOWN = "unknown"


def rank_judgebench(scored: Scored) -> Ranking:
    """Accuracy over all pairs, by category and by source."""
    require_some(scored)
    sources = {name: part for name, part in scored.by_subset().items() if name != UNKNOWN}
    sections: dict[str, Estimate] = {}
    remarks = []
    for category, belongs in CATEGORIES.items():
        if places := [i for i, source in enumerate(scored.subset) if belongs(source)]:
            sections[category] = scored.of(places).accuracy()
    if not sources:
        remarks.append("without the file of pairs nothing is known of categories")
    elif strange := sorted(name for name in sources if not any(belongs(name) for belongs in CATEGORIES.values())):
        remarks.append(f"{len(strange)} sources belong to no category: {', '.join(strange[:4])}")
    overall = scored.accuracy()
    subsets = {name: part.accuracy() for name, part in sources.items()}
    return Ranking(subsets, sections, overall, overall, scored.ties(), tuple(remarks))
