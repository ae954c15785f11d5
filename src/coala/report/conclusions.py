"""What a run showed and what it did not, in plain sentences; every doubt that an interval leaves is spoken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coala.pages.words import Interval, number
from coala.report.content import plain
from coala.report.distilled import spoken as spoken_of_policy
from coala.report.evaluations import spoken
from coala.report.receipts import spoken as spoken_of_receipt


def conclusions(content: Mapping[str, Any]) -> list[str]:
    """Sentences for the top of the report, the data's faults first; empty for an empty content."""
    content = plain(content)
    summary = content.get("summary") or {}
    return [
        *_data(content.get("data_findings") or []),
        *_ranking(summary),
        *_evidence(content.get("head") or {}, (content.get("settings") or {}).get("guidance") or {}),
        *_linear(summary, content.get("head") or {}),
        *_calibration(content.get("reliability") or {}, summary),
        *_lengths(content.get("by_length") or []),
        *_path(content.get("path") or [], content.get("head") or {}),
        *_certificate(summary, content.get("head") or {}),
        *(sentence for row in content.get("win_rates") or [] for sentence in _win_rate(row)),
        *_perplexity(content.get("perplexity") or {}),
        *_policy(content.get("policy") or {}),
        *spoken_of_policy(content.get("distilled") or {}),
        *(sentence for row in content.get("evaluations") or [] for sentence in spoken(row)),
        *(sentence for row in content.get("receipts") or [] for sentence in spoken_of_receipt(row)),
    ]


def _data(findings: list[Any]) -> list[str]:
    errors = sum(isinstance(f, Mapping) and f.get("severity") == "error" for f in findings)
    return [f"The data has {_count(errors, 'error')}: fix the data before trusting any number here."] if errors else []


def _ranking(summary: Mapping[str, Any]) -> list[str]:
    accuracy, train = Interval(summary.get("accuracy_eval")), Interval(summary.get("accuracy_train"))
    sentences = []
    if accuracy:
        start = f"On {_count(accuracy.n, 'held-out pair')} the head ranks {accuracy.percent()} right"
        if accuracy.above(0.5):
            sentences.append(f"{start}: better than chance.")
        elif accuracy.below(0.5):
            sentences.append(f"{start}: worse than chance. Check that chosen and rejected are not swapped.")
        else:
            sentences.append(f"{start}. The interval includes 50 %: no better than chance on this data.")
    if accuracy and train and accuracy.below(train.value):
        sentences.append(
            f"It ranks {100 * train.value:.1f} % of its own training pairs right, more than the held-out interval "
            "reaches: part of what it learnt does not generalise to new pairs."
        )
    return sentences


def _evidence(head: Mapping[str, Any], guidance: Mapping[str, Any]) -> list[str]:
    if head.get("least_slope") != 0:
        return []
    start = "Cross-validation on the training pairs cannot distinguish the head from chance"
    if guidance.get("rule") == "calibrated":
        return [f"{start}, so its guidance leaves the text unchanged."]
    return [f"{start}; by rule {guidance.get('rule', 'unknown')} it still guides at full strength."]


def _linear(summary: Mapping[str, Any], head: Mapping[str, Any]) -> list[str]:
    gain, linear = Interval(summary.get("gain_over_linear")), Interval(summary.get("linear_accuracy_eval"))
    if head.get("n_neurons") == 0:
        if ((head.get("certificate") or {}).get("facts") or {}).get("method") == "linear":
            return ["The head is linear, as requested: whether neurons would help was not tried."]
        return ["The head is linear: validation kept no neuron, so gates do not help on this data."]
    if gain:
        start = f"Against a linear head on the same pairs the difference in accuracy is {gain.percent(points=True)}"
        if gain.above(0):
            return [f"{start}: the neurons help."]
        if gain.below(0):
            return [f"{start}: the linear head is better, prefer it."]
        return [f"{start}. The interval includes 0: the head is not shown to be better than a linear one."]
    accuracy = Interval(summary.get("accuracy_eval"))
    if linear and accuracy and accuracy.value <= linear.value:
        return [f"The head is not better than a linear one, which ranks {linear.percent()} right."]
    return []


def _calibration(found: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    confidence, accuracy = found.get("confidence"), Interval(summary.get("accuracy_eval"))
    error, chance = Interval(found.get("error")), found.get("error_by_chance")
    if confidence is None or not accuracy:
        return []
    start = f"On average it gives {100 * confidence:.1f} % to the reply it prefers, and it is right in "
    start += f"{100 * accuracy.value:.1f} % of cases"
    if accuracy.below(confidence):
        return [f"{start}: its probabilities are overconfident."]
    if accuracy.above(confidence):
        return [f"{start}: its probabilities are underconfident."]
    if error and chance is not None and error.above(2 * chance):
        return [f"{start}, but its probabilities are off by {100 * error.value:.1f} points: see the reliability curve."]
    return [f"{start}: its probabilities are consistent with the held-out pairs."]


def _lengths(rows: list[Any]) -> list[str]:
    bad = [row for row in rows if Interval(row.get("accuracy")).below(0.5)]
    if not bad:
        return []
    shorter = all((row.get("low") or 0) + (row.get("high") or 0) < 0 for row in bad)
    which = "where the chosen reply is the shorter one" if shorter else "in some ranges of length difference"
    return [f"The head ranks worse than chance {which}: it rewards length, in part."]


def _path(rows: list[Any], head: Mapping[str, Any]) -> list[str]:
    facts = (head.get("certificate") or {}).get("facts") or {}
    if (facts.get("cv") or {}).get("signal_found") is False:
        return ["Validation found no signal: on held-out pairs no head was better than chance."]
    if facts.get("separable"):
        return ["The head ranks every training pair right, so only the regularisation keeps its scores finite."]
    if head.get("n_neurons") == 0:
        return []
    known = [row for row in rows if row.get("cv_nll") is not None and row.get("beta_rel") is not None]
    if len(known) < 2:
        return []
    best = min(known, key=lambda row: float(row["cv_nll"]))
    if best["beta_rel"] == max(row["beta_rel"] for row in known) and not best.get("n_neurons"):
        return ["Validation chose the strongest regularisation on the path: it found no signal that neurons could use."]
    if best["beta_rel"] == min(row["beta_rel"] for row in known):
        return ["Validation chose the weakest regularisation on the path: a longer path may do better."]
    return []


def certified_gap(summary: Mapping[str, Any], head: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """The proved relative gap and the tolerance that was asked for."""
    certificate = head.get("certificate") or {}
    found = (summary.get("certified_gap"), certificate.get("relative_gap"))
    gap = next((float(g) for g in found if isinstance(g, int | float)), None)
    tolerance = certificate.get("tolerance")
    return gap, float(tolerance) if isinstance(tolerance, int | float) else None


def _certificate(summary: Mapping[str, Any], head: Mapping[str, Any]) -> list[str]:
    gap, tolerance = certified_gap(summary, head)
    if gap is None:
        return ["No optimality gap was certified for this head."] if head else []
    # A gap of a share of the objective; below this it is rounding.
    share = f"{100 * gap:.2g} %" if gap > 1e-12 else "rounding error"
    if tolerance is not None and gap > tolerance:
        return [
            f"The solver stopped at a certified gap of {share} of the objective, above the {number(tolerance)} "
            f"requested: the head may not "
            "be optimal. Allow more steps."
        ]
    return [f"The fit is proved optimal to within {share} of its objective, for its own convex program."]


def _win_rate(row: Mapping[str, Any]) -> list[str]:
    rate, name = Interval(row.get("estimate")), row.get("judge") or "the judge"
    if not rate:
        _, void, why = rate.method.partition("; void: ")
        return [f"The judge {name} decided nothing: there is no win rate{f' ({why})' if void else ''}."]
    start = f"The judge {name} prefers the guided reply in {rate.percent()} of {_count(rate.n, 'comparison')}"
    if rate.above(0.5):
        return [f"{start}: guidance helps by this judge."]
    if rate.below(0.5):
        return [f"{start}: guidance makes the replies worse by this judge."]
    return [f"{start}. The interval includes 50 %: this does not show that guidance helps."]


def _perplexity(both: Mapping[str, Any]) -> list[str]:
    plain_text, guided = Interval(both.get("unguided")), Interval(both.get("guided"))
    if not (plain_text and guided) or plain_text.value <= 0:
        return []
    change = f"{number(plain_text.value)} without guidance, {number(guided.value)} with it"
    apart = f"({100 * (guided.value / plain_text.value - 1):+.0f} %)"
    if guided.low > plain_text.high:
        return [f"Guided text is less natural to the base model: perplexity {change} {apart}."]
    if guided.high < plain_text.low:
        return [f"Guided text is more predictable to the base model: perplexity {change} {apart}."]
    return [f"Perplexity under the base model is {change} {apart}; the two intervals overlap."]


def _policy(policy: Mapping[str, Any]) -> list[str]:
    rate = Interval(policy.get("accuracy"))
    if not rate:
        return []
    start = (
        f"The guided policy's log-ratio to the base ranks {rate.percent()} of {_count(rate.n, 'held-out pair')} right"
    )
    if rate.above(0.5):
        return [f"{start}: better than chance."]
    return [f"{start}: worse than chance." if rate.below(0.5) else f"{start}. The interval includes 50 %."]


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
