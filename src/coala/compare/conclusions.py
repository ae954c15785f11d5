"""What a comparison found, in sentences that its intervals allow; of ranking, of FLOPs, and of what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from coala.compare.study import CHANGED

Verdict = Literal["yes", "no", "open", ""]


@dataclass(frozen=True)
class Finding:
    """One sentence: the ``word`` it begins with, what is ``said``, and the ``figures`` that it rests on.

    ``verdict`` says whether the word is good news for whom the sentence is of, bad, or none yet; empty where nothing is
    decided by it.
    """

    word: str
    said: str
    figures: str = ""
    verdict: Verdict = ""


Outcome = tuple[str, Verdict]  # a word and what it means
BETTER: Outcome = ("Better", "yes")
WORSE: Outcome = ("Worse", "no")
UNDECIDED: Outcome = ("Undecided", "open")


def _found(outcome: Outcome, said: str, figures: str) -> Finding:
    return Finding(outcome[0], said, figures, outcome[1])


def _outcome(interval: Mapping[str, Any], level: float = 0.0) -> Outcome:
    """Where an interval lies beside ``level``."""
    return BETTER if interval["low"] > level else WORSE if interval["high"] < level else UNDECIDED


def _apart(
    entries: Iterable[Mapping[str, Any]], outcome: Callable[[Mapping[str, Any]], Outcome]
) -> list[tuple[Outcome, list[Mapping[str, Any]]]]:
    """Entries by their outcome, those that are decided first; without those that nobody has."""
    given = list(entries)
    sorts = [(each, [entry for entry in given if outcome(entry) == each]) for each in (BETTER, WORSE, UNDECIDED)]
    return [(each, some) for each, some in sorts if some]


def main_coala(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The study's COALA: the first of its convex heads without a reference."""
    return next((row for row in rows if row["coala"]), None)


def of_ranking(place: Mapping[str, Any]) -> list[Finding]:
    """Whether COALA ranks as well as the best baseline here, in words that its interval allows."""
    rows = place["methods"]
    ours = main_coala(rows)
    baselines = [row for row in rows if row["kind"] in ("sft", "dpo", "orpo", "simpo", "reward")]
    if ours is None or not baselines:
        return []
    best = max(baselines, key=lambda row: float(row["accuracy"]["value"]))
    entry = next(d for d in place["differences"] if d["minus"] == best["label"])
    outcome = _outcome(entry["difference"])
    said = {
        BETTER: f"{ours['label']} ranks more pairs right than the best baseline, {best['label']}.",
        WORSE: f"{ours['label']} ranks fewer pairs right than the best baseline, {best['label']}.",
        UNDECIDED: f"{ours['label']} against the best baseline, {best['label']}: no difference is established.",
    }[outcome]
    told = [
        f"{100 * ours['accuracy']['value']:.1f} % of {ours['accuracy']['n']} held-out pairs against "
        f"{100 * best['accuracy']['value']:.1f} %: {_points(entry['difference'])}, paired, "
        f"p = {entry['p_holm']:.2g} after Holm."
    ]
    if len(baselines) > 1:
        told.append(f"The best of {len(baselines)} is chosen on these same pairs, which flatters it.")
    if outcome == WORSE:
        heads = [row for row in rows if row["coala"]]
        closest = max(heads, key=lambda row: float(row["accuracy"]["value"]))
        told.append(
            "COALA's features are those of the frozen model, which the baselines may change. Of its choices "
            f"{closest['label']} comes closest, with {100 * closest['accuracy']['value']:.1f} %."
        )
    return [_found(outcome, said, " ".join(told))]


def of_heads(place: Mapping[str, Any]) -> list[Finding]:
    """COALA against the other ways to rank by frozen features or by none: linear, all layers, surface cues."""
    kinds = {"coala": "", "layers": "a gate at every layer", "cues": "surface cues", "adamw": "AdamW"}
    entries = [d for d in place["differences"] if d["kind"] in kinds]
    told = []
    for outcome, some in _apart(entries, lambda entry: _outcome(entry["difference"])):
        ours, n = some[0]["of"], some[0]["difference"]["n"]
        others = _named(e["minus"] + (f" ({kinds[e['kind']]})" if kinds[e["kind"]] else "") for e in some)
        said = {
            BETTER: f"{ours} ranks more pairs right than {others}.",
            WORSE: f"{ours} ranks fewer pairs right than {others}.",
            UNDECIDED: f"{ours} against {others}: no difference in ranking is established.",
        }[outcome]
        each = "; ".join(f"{entry['minus']} {_points(entry['difference'])}" for entry in some)
        told.append(_found(outcome, said, f"{ours} minus each on {n} held-out pairs, paired: {each}."))
    return told


def of_judge(place: Mapping[str, Any]) -> list[Finding]:
    """Whether the judge of replies goes by the preference that the pairs hold, by how it judges them."""
    judge = place["judge"]
    if judge is None:
        return []
    outcome = _outcome(judge["agrees"], 0.5)
    meaning = {
        BETTER: "wins by it are of the preference of the pairs, as far as it agrees with them.",
        WORSE: "wins by it are against the preference of the pairs.",
        UNDECIDED: "that wins by it are of the preference of the pairs is not established.",
    }[outcome]
    figures = f"It prefers the chosen reply in {_share(judge['agrees'])} of {judge['agrees']['n']:,} pairs."
    return [Finding("Judge", f"{judge['name']}: {meaning}", figures, "" if outcome == BETTER else outcome[1])]


def of_pooling(place: Mapping[str, Any]) -> list[Finding]:
    """Heads that guide and read the last token alone, which ranks whole replies and says little of unfinished ones."""
    rows = place["methods"]
    guiding = {row["of"] or row["method"] for row in rows if row["mode"] not in (None, "none", "best_of")}
    heads = [row["label"] for row in rows if row["pooling"] == "last" and row["method"] in guiding]
    if not heads:
        return []
    said = (
        f"{_named(heads)} reads the last token alone, which says little of the unfinished replies that guidance scores."
    )
    return [Finding("Pooling", said, "With pooling: mean guidance may win more often.", "open")]


def of_writing(place: Mapping[str, Any]) -> list[Finding]:
    """Whether COALA's guidance writes better than prompting, training or another way to guide, or worse, or neither."""
    families: dict[str, Callable[[Mapping[str, Any]], bool]] = {
        "prompting": lambda c: c["kind"] == "prompt",
        "training": lambda c: c["kind"] in ("dpo", "sft", "orpo", "simpo"),
        "best of N": lambda c: c["mode"] == "best_of",
        "the output layer alone": lambda c: c["kind"] in CHANGED,
        "other guidance": lambda c: c["kind"] in ("guided", "coala") and c["mode"] != "best_of",
        "no guidance": lambda c: c["kind"] == "base",
    }
    told = []
    # The wins are the others'.
    worse = {BETTER: WORSE, WORSE: BETTER, UNDECIDED: UNDECIDED}
    for outcome, some in _apart(place["contests"], lambda contest: worse[_outcome(contest["wins"], 0.5)]):
        by = [(family, [c for c in some if belongs(c)]) for family, belongs in families.items()]
        ordered = [contest for _, theirs in by for contest in theirs]
        if not ordered:
            continue
        ours, others = ordered[0]["against"], _named(contest["of"] for contest in ordered)
        said = {
            BETTER: f"the judge prefers the replies of {ours} to those of {others}.",
            WORSE: f"the judge prefers the replies of {others} to those of {ours}.",
            UNDECIDED: f"{ours} against {others}: neither wins nor loses for certain.",
        }[outcome]
        listed = {family: [f"{one['of']} {_share(one['wins'])}" for one in theirs] for family, theirs in by}
        each = "; ".join(f"{family}: {', '.join(shares)}" for family, shares in listed.items() if shares)
        how = f"Share of {ordered[0]['wins']['n']} prompts where the other's reply is preferred, a tie one half"
        told.append(_found(outcome, said, f"{how}. {each[:1].upper()}{each[1:]}."))
    return told


def of_survival(place: Mapping[str, Any]) -> list[Finding]:
    """How much of its teacher's gain each policy keeps, and how it stands to DPO at equal KL and perplexity."""
    found = place["survival"]
    told = []
    kept = [one for one in found if one["retention"] is not None]
    if kept:
        teachers = _named(dict.fromkeys(one["teacher"] for one in kept))
        each = ", ".join(f"{one['of']} {_share(one['retention'])}" for one in kept)
        told.append(Finding("Kept", f"of the gain of {teachers} over one half, {each}."))
    reasons = dict.fromkeys(one["why"] for one in found if one["teacher"] and one["retention"] is None)
    told += [Finding("Unknown", f"how much of the teacher's gain is kept: {why}.") for why in reasons]
    met = [{"of": one["of"], **at} for one in found for at in one["at"] if at["difference"]]
    for measure, words in (("kl", "KL"), ("perplexity", "perplexity")):
        for dpo in dict.fromkeys(at["dpo"] for at in met):
            here = [at for at in met if at["measure"] == measure and at["dpo"] == dpo]
            for outcome, some in _apart(here, lambda at: _outcome(at["difference"])):
                names = _named(at["of"] for at in some)
                said = {
                    BETTER: f"at the {words} of {dpo}, more wins than it by {names}.",
                    WORSE: f"at the {words} of {dpo}, fewer wins than it by {names}.",
                    UNDECIDED: f"at the {words} of {dpo}, no difference in wins is established of {names}.",
                }[outcome]
                each = ", ".join(f"{at['of']} {_points(at['difference'])}" for at in some)
                told.append(_found(outcome, said, f"Wins minus its: {each}."))
    spent = [(one["of"], (one["flops"] or {}).get("of") or {}) for one in found]
    for dpo in dict.fromkeys(label for _, of in spent for label in of):
        listed = _listed([(name, of.get(dpo)) for name, of in spent])
        told.append(Finding("Cost", f"of the FLOPs of {dpo} at all its rates, by formula: {listed}."))
    return told


def of_capability(place: Mapping[str, Any]) -> list[Finding]:
    """What each way to write costs or gains on questions that the pairs do not speak of."""
    told = []
    for outcome, some in _apart(place["capability"], lambda entry: _outcome(entry["difference"])):
        names = _named(entry["of"] for entry in some)
        said = {
            BETTER: f"more questions answered than by the unguided start: {names}.",
            WORSE: f"fewer questions answered than by the unguided start: {names}.",
            UNDECIDED: f"no change in the questions answered is established of {names}.",
        }[outcome]
        each = "; ".join(f"{entry['of']} {_points(entry['difference'])}" for entry in some)
        n = some[0]["difference"]["n"]
        told.append(_found(outcome, said, f"Share of {n} questions, minus the unguided start's, paired: {each}."))
    return told


def of_agreement(place: Mapping[str, Any]) -> list[Finding]:
    """How well ranking accuracy, policy accuracy and wins agree over the methods."""
    found = [row for row in place["agreement"] if row["tau"] is not None]
    if not found:
        return []
    told = "; ".join(
        f"{row['first']} and {row['second']}, tau = {row['tau']:+.2f} (n = {row['n']}, p = {row['p']:.2g})"
        for row in found
    )
    said = "how far the measures order the methods alike; of so few methods only strong agreement shows."
    return [Finding("Agreement", said, f"Kendall's tau over methods: {told}.")]


def of_benchmarks(place: Mapping[str, Any]) -> list[Finding]:
    """What our heads and the published models rank right of a benchmark, beside the rule "longer"."""
    told = []
    for found in place["benchmarks"]:
        rows = {name: ranking["rows"] for name, ranking in found["rankings"].items()}
        first, *more = found["ours"]
        said = f"{first} ranks {_share(rows[first])} right, the longer reply {_share(rows['longer reply'])}."
        figures = [f"{found['items']} of {found['of']} items, all comparisons."]
        if more:
            figures.append(f"Other heads: {', '.join(f'{name} {_share(rows[name])}' for name in more)}.")
        if found["published"]:
            theirs = ", ".join(f"{name} {_share(rows[name])}" for name in found["published"])
            figures.append(f"Published models: {theirs}.")
        told.append(Finding(found["benchmark"], said, " ".join(figures)))
    return told


def _points(found: Mapping[str, Any]) -> str:
    return f"{100 * found['value']:+.1f} points [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"


def _share(found: Mapping[str, Any]) -> str:
    return f"{100 * found['value']:.1f} % [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def of_flops(place: Mapping[str, Any]) -> list[Finding]:
    """The shares of DPO's FLOPs that COALA's heads take, by counter."""
    reference, heads = _reference(place), _heads(place)
    shares = [(row["label"], (row["costs"]["of"].get(reference) or {}).get("flops")) for row in heads]
    told = _listed(shares)
    return [Finding("Cost", f"of the FLOPs of {reference}, by counter, {told}.")] if told else []


def of_measured(place: Mapping[str, Any]) -> list[Finding]:
    """The shares of DPO's seconds and peak memory that COALA's heads take."""
    reference, heads = _reference(place), _heads(place)
    measured = [(row["label"], (row["costs"]["of"].get(reference) or {}).get("measured") or {}) for row in heads]
    seconds = _listed([(label, found.get("seconds")) for label, found in measured])
    peaks = [(label, found.get("bytes") or {}) for label, found in measured]
    memory = _listed([(label, found.get("device", found.get("host"))) for label, found in peaks])
    told = [f"of the seconds of {reference}, {seconds}"] if seconds else []
    told += [f"of its peak memory, {memory}"] if memory else []
    return [Finding("Cost", f"{'; '.join(told)}.")] if told else []


def _heads(place: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """COALA's heads whose FLOPs were counted; all if none were."""
    heads = [row for row in place["methods"] if row["coala"] and row["costs"]]
    return [row for row in heads if row["costs"]["counter"]] or heads


def _reference(place: Mapping[str, Any]) -> str:
    """The first DPO there is, which studies have on all weights."""
    return next((row["label"] for row in place["methods"] if row["kind"] == "dpo" and row["costs"]), "")


def _listed(shares: Sequence[tuple[str, float | None]]) -> str:
    return ", ".join(f"{label} {100 * share:.3g} %" for label, share in shares if share is not None)


def _named(names: Iterable[str]) -> str:
    """Names as a sentence lists them."""
    *some, last = names
    return f"{', '.join(some)} and {last}" if some else last
