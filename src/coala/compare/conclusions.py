"""What a comparison found, in sentences that its intervals allow; of ranking, of FLOPs, and of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coala.compare.study import CHANGED


def main_coala(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The study's COALA: the first of its convex heads without a reference."""
    return next((row for row in rows if row["coala"]), None)


def of_ranking(place: Mapping[str, Any]) -> list[str]:
    """Whether COALA ranks as well as the best baseline here, in words that its interval allows."""
    rows = place["methods"]
    ours = main_coala(rows)
    baselines = [row for row in rows if row["kind"] in ("sft", "dpo", "orpo", "simpo", "reward")]
    if ours is None or not baselines:
        return []
    best = max(baselines, key=lambda row: float(row["accuracy"]["value"]))
    entry = next(d for d in place["differences"] if d["minus"] == best["label"])
    found = entry["difference"]
    points = _points(found)
    told = (
        f"{_where(place)}: {ours['label']} ranks {100 * ours['accuracy']['value']:.1f} % of {ours['accuracy']['n']} "
        f"held-out pairs right, the best baseline, {best['label']}, {100 * best['accuracy']['value']:.1f} %: "
        f"{points}, paired, p = {entry['p_holm']:.2g} after Holm. The best of {len(baselines)} is chosen on these "
        "same pairs, which flatters it. "
    )
    if found["high"] < 0:
        heads = [row for row in rows if row["coala"]]
        closest = max(heads, key=lambda row: float(row["accuracy"]["value"]))
        return [
            f"{told}COALA is below by more than its interval: its features are those of the frozen model, which the "
            f"baselines may change. Of its choices {closest['label']} comes closest, with "
            f"{100 * closest['accuracy']['value']:.1f} %."
        ]
    if found["low"] > 0:
        return [f"{told}COALA is above by more than its interval."]
    return [f"{told}The interval includes no difference."]


def of_heads(place: Mapping[str, Any]) -> list[str]:
    """COALA against the other ways to rank by frozen features or by none: linear, all layers, surface cues."""
    names = {"coala": "", "layers": "a gate at every layer, ", "cues": "surface cues, ", "adamw": "AdamW, "}
    entries = [d for d in place["differences"] if d["kind"] in names]
    if not entries:
        return []
    told = "; ".join(
        f"{names[entry['kind']]}{entry['minus']}, {_points(entry['difference'])} ({_verdict(entry['difference'])})"
        for entry in entries
    )
    n = entries[0]["difference"]["n"]
    return [f"{_where(place)}: {entries[0]['of']} minus the others on {n} held-out pairs, paired: {told}."]


def of_writing(place: Mapping[str, Any]) -> list[str]:
    """Where prompting, training or another way to guide writes better than COALA's guidance, or worse, or neither."""
    found = place["contests"]
    if not found:
        return []
    families = {
        "Prompting": [c for c in found if c["kind"] == "prompt"],
        "DPO and other training": [c for c in found if c["kind"] in ("dpo", "sft", "orpo", "simpo")],
        "Best-of-N": [c for c in found if c["mode"] == "best_of"],
        "The output layer alone": [c for c in found if c["kind"] in CHANGED],
        "Other guidance": [c for c in found if c["kind"] in ("guided", "coala") and c["mode"] != "best_of"],
        "No guidance": [c for c in found if c["kind"] == "base"],
    }
    told = []
    for family, some in families.items():
        by: dict[str, list[str]] = {}
        for c in some:
            by.setdefault(_won(c["wins"]), []).append(f"{c['of']} {_share(c['wins'])}")
        told += [f"{family} {verdict}: {', '.join(each)}." for verdict, each in by.items()]
    where, n = _where(place), found[0]["wins"]["n"]
    return [
        f"{where}: {found[0]['against']} against the others, share of {n} prompts where the judge prefers the other's "
        f"reply, a tie one half. {' '.join(told)}"
    ]


def of_survival(place: Mapping[str, Any]) -> list[str]:
    """How much of its teacher's gain each policy keeps, and how it stands to DPO at equal KL and perplexity."""
    found = place["survival"]
    told = []
    kept = [f"{one['of']} {_share(one['retention'])}" for one in found if one["retention"] is not None]
    if kept:
        teachers = ", ".join(dict.fromkeys(one["teacher"] for one in found if one["retention"] is not None))
        told.append(f"{_where(place)}: of the gain of {teachers} over one half is kept by {', '.join(kept)}.")
    reasons = dict.fromkeys(one["why"] for one in found if one["teacher"] and one["retention"] is None)
    told += [f"{_where(place)}: how much is kept is unknown: {why}." for why in reasons]
    for measure, words in (("kl", "KL"), ("perplexity", "perplexity")):
        at = [(one["of"], met) for one in found for met in one["at"] if met["measure"] == measure and met["difference"]]
        for dpo in dict.fromkeys(met["dpo"] for _, met in at):
            here = ", ".join(
                f"{name} {_points(met['difference'])} ({_verdict(met['difference'])})"
                for name, met in at
                if met["dpo"] == dpo
            )
            told.append(f"{_where(place)}: at the {words} of {dpo}, wins minus its: {here}.")
    spent = [(one["of"], (one["flops"] or {}).get("of") or {}) for one in found]
    for dpo in dict.fromkeys(label for _, of in spent for label in of):
        listed = _listed([(name, of.get(dpo)) for name, of in spent])
        told.append(f"{_where(place)}: FLOPs by formula, of those of {dpo} at all its rates: {listed}.")
    return told


def of_capability(place: Mapping[str, Any]) -> list[str]:
    """What each way to write costs or gains on questions that the pairs do not speak of."""
    found = place["capability"]
    if not found:
        return []
    told = "; ".join(f"{c['of']} {_points(c['difference'])}" for c in found)
    n = found[0]["difference"]["n"]
    return [f"{_where(place)}: share of {n} questions answered, minus the unguided start's, paired: {told}."]


def of_agreement(place: Mapping[str, Any]) -> list[str]:
    """How well ranking accuracy, policy accuracy and wins agree over the methods."""
    found = [row for row in place["agreement"] if row["tau"] is not None]
    if not found:
        return []
    told = "; ".join(
        f"{row['first']} and {row['second']}, tau = {row['tau']:+.2f} (n = {row['n']}, p = {row['p']:.2g})"
        for row in found
    )
    return [f"{_where(place)}: Kendall's tau over methods: {told}. With so few methods only strong agreement shows."]


def of_benchmarks(place: Mapping[str, Any]) -> list[str]:
    """Which of our heads, and of the published models, rank a benchmark better than the rule "longer"."""
    told = []
    for found in place["benchmarks"]:
        rows = {name: ranking["rows"] for name, ranking in found["rankings"].items()}
        rule = rows["longer reply"]
        ours = ", ".join(f"{name} {_share(rows[name])}" for name in found["ours"])
        theirs = ", ".join(f"{name} {_share(rows[name])}" for name in found["published"])
        told.append(
            f"{_where(place)}: {found['benchmark']}, {found['items']} of {found['of']} items, all comparisons: {ours}; "
            f"the longer reply {_share(rule)}" + (f"; published models {theirs}." if theirs else ".")
        )
    return told


def _points(found: Mapping[str, Any]) -> str:
    return f"{100 * found['value']:+.1f} points [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"


def _share(found: Mapping[str, Any]) -> str:
    return f"{100 * found['value']:.1f} % [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def _verdict(difference: Mapping[str, Any]) -> str:
    return "above" if difference["low"] > 0 else "below" if difference["high"] < 0 else "no difference established"


def _won(wins: Mapping[str, Any]) -> str:
    return "wins" if wins["low"] > 0.5 else "loses" if wins["high"] < 0.5 else "neither wins nor loses for certain"


def of_flops(place: Mapping[str, Any]) -> list[str]:
    """The shares of DPO's FLOPs that COALA's heads take, by counter."""
    reference, heads = _reference(place), _heads(place)
    shares = [(row["label"], (row["costs"]["of"].get(reference) or {}).get("flops")) for row in heads]
    told = _listed(shares)
    return [f"{_where(place)}: of the FLOPs of {reference}, by counter, {told}."] if told else []


def of_measured(place: Mapping[str, Any]) -> list[str]:
    """The shares of DPO's seconds and peak memory that COALA's heads take."""
    reference, heads = _reference(place), _heads(place)
    measured = [(row["label"], (row["costs"]["of"].get(reference) or {}).get("measured") or {}) for row in heads]
    seconds = _listed([(label, found.get("seconds")) for label, found in measured])
    peaks = [(label, found.get("bytes") or {}) for label, found in measured]
    memory = _listed([(label, found.get("device", found.get("host"))) for label, found in peaks])
    told = [f"of the seconds of {reference}, {seconds}"] if seconds else []
    told += [f"of its peak memory, {memory}"] if memory else []
    return [f"{_where(place)}: {'; '.join(told)}."] if told else []


def _where(place: Mapping[str, Any]) -> str:
    return f"{place['dataset']}, {place['model']}" + (", after SFT" if place["init"] == "sft" else "")


def _heads(place: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """COALA's heads whose FLOPs were counted; all if none were."""
    heads = [row for row in place["methods"] if row["coala"] and row["costs"]]
    return [row for row in heads if row["costs"]["counter"]] or heads


def _reference(place: Mapping[str, Any]) -> str:
    """The first DPO there is, which studies have on all weights."""
    return next((row["label"] for row in place["methods"] if row["kind"] == "dpo" and row["costs"]), "")


def _listed(shares: Sequence[tuple[str, float | None]]) -> str:
    return ", ".join(f"{label} {100 * share:.3g} %" for label, share in shares if share is not None)
