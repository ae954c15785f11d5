"""What held-out pairs say of a run's head, in one line for whoever is about to be guided by it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from coala.statistics import scores
from coala.store import StoreError, load_features
from coala.values import ConvexHead, Estimate

if TYPE_CHECKING:
    from coala.decoding import Guidance


def evidence_notes(run: Path | str, head: ConvexHead, guidance: Guidance) -> list[str]:
    """Sentences for a head that is not told from chance on the run's held-out pairs, or whose scores were not weighed.

    Empty for everybody's head that is better than chance and calibrated; a rater's is named. A run whose held-out
    features are gone is judged by the head's own validation alone.
    """
    if guidance.rater is None:
        return _notes(run, head, guidance)
    told = [f"Guided by the head of {guidance.rater[:60]!r} alone."]
    if guidance.weighs and head.evidence == 0:
        return [*told, "It has no evidence that it ranks this rater's choices, so replies stay unguided."]
    return told


def _notes(run: Path | str, head: ConvexHead, guidance: Guidance) -> list[str]:
    active = guidance.active or guidance.mode == "beam"
    silent = guidance.weighs and head.evidence == 0
    accuracy = _held_out(Path(run), head)
    if accuracy is not None and not accuracy.low > 0.5:
        return [_chance(accuracy, head, guidance) if active else _told(accuracy)]
    if not (active and guidance.weighs):
        return []
    if silent:
        return [
            "Cross-validation on the training pairs cannot distinguish the head from chance, so replies stay "
            "unguided. More pairs may change that."
        ]
    if head.least_slope is None:
        facts = head.certificate.facts.get("calibration", {}) if head.certificate is not None else {}
        if facts.get("held_out") or head.temperature != 1:
            return [
                f"This head has a temperature ({head.temperature:.3g}) but no measure of its certainty, so "
                "guidance uses the temperature unweighted. Fix: fit the head again."
            ]
        return ["This head was never calibrated on held-out pairs: guidance uses its scores as log-odds."]
    return []


def _held_out(run: Path, head: ConvexHead) -> Estimate | None:
    """Ranking accuracy on the pairs that the run holds out; ``None`` if their features are gone or do not fit."""
    if not (run / "features" / "eval" / "features.json").is_file():
        return None
    try:
        features = load_features(run / "features" / "eval", mmap=True)
    except StoreError:  # guidance needs no features: what is wrong with them is for the report to say
        return None
    if not len(features) or features.width != head.width or (head.needs_prompt and features.prompt is None):
        return None
    return scores.accuracy_of_margins(head.margins(features), features.group)


def _told(accuracy: Estimate) -> str:
    value, low, high = (100 * end for end in (accuracy.value, accuracy.low, accuracy.high))
    found = f"accuracy {value:.1f} % "
    if not (math.isfinite(low) and math.isfinite(high)):
        return (
            f"The head is not distinguishable from chance: {found}of n = {accuracy.n}, too few pairs for an interval."
        )
    found += f"[{low:.1f}, {high:.1f}], n = {accuracy.n}"
    if high < 50:
        return f"The head is worse than chance on held-out pairs: {found}. Fix: check for swapped chosen and rejected."
    return f"The head is not distinguishable from chance on held-out pairs: {found}, includes 50 %."


def _chance(accuracy: Estimate, head: ConvexHead, guidance: Guidance) -> str:
    if not guidance.weighs:
        return (
            f"{_told(accuracy)} By rule {guidance.rule} it still steers at full strength; rule calibrated follows the "
            "evidence."
        )
    if head.evidence == 0:
        return f"{_told(accuracy)} Cross-validation finds no evidence either, so replies stay unguided."
    if head.least_slope is None:
        return f"{_told(accuracy)} Guidance uses its temperature ({head.temperature:.3g}) unweighted."
    return f"{_told(accuracy)} Guidance follows the evidence of cross-validation on the training pairs."
