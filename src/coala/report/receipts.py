"""Receipts of a run: kept as files under RUN/receipts, and what the report's page shows of them.

    influence-*.json    the pairs whose absence would change a measure most, and what poisoned pairs could do
    raters-by-*.json    which raters, sources or groups agree with the others
    forget-*.json       what was forgotten, what it changed, and what is not claimed

Words and tables only; computes nothing. ``coala.receipts`` makes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coala.pages.parts import Part, Table, aside, beneath, details, element, facts, listing, titled
from coala.pages.words import number
from coala.report.content import mapping_of
from coala.report.raters import rater_parts, rater_words
from coala.store import RunFolder, StoreError, file_digest, load_json, save_json

FOLDER = "receipts"
KINDS = ("influence", "raters", "forget")
ATTACKS = {"flip": "flipped", "remove": "removed", "add": "added"}


def add_receipt(run: RunFolder, record: Mapping[str, Any], name: str) -> Path:
    """Keep a receipt in the run, put it on its page if there is one, and return its file."""
    from coala.report import write_report

    path = run.path / FOLDER / f"{name}.json"
    save_json(path, record)
    if (run.path / "report.json").exists():
        write_report(run, load_json(run.path / "report.json"))
    return path


def saved_receipts(run: RunFolder) -> list[dict[str, Any]]:
    """All receipts of a run, the oldest first; one of another head than the run has now is ``stale``.

    What poisoned pairs can do is the same whatever influence was measured on: the latest of the head says it.
    """
    found = []
    head = run.path / "head" / "head.safetensors"
    now = file_digest(head) if head.is_file() else None
    for path in sorted((run.path / FOLDER).glob("*.json")):
        row = load_json(path)
        if not isinstance(row, dict) or row.get("kind") not in KINDS:
            raise StoreError(f"{path}: is not a receipt. Fix: delete it and rerun its command.")
        found.append({**row, "stale": row["kind"] != "forget" and row.get("head") != now})
    found.sort(key=lambda row: str(row.get("created")))
    last = max((k for k, row in enumerate(found) if row["kind"] == "influence" and not row["stale"]), default=None)
    return [row if k == last else {**row, "poison": None} for k, row in enumerate(found)]


def forgotten_since(receipts: Sequence[Mapping[str, Any]], created: Any) -> bool:
    """Whether the head was refitted without some of its pairs at or after that time."""
    return any(
        row.get("kind") == "forget" and row.get("head_changed") and str(row.get("created")) >= str(created)
        for row in receipts
    )


# --- as the page shows them ----------------------------------------------------------------------------------------


def shown(row: Mapping[str, Any]) -> list[Part]:
    """The parts of the page on one receipt."""
    if row.get("kind") == "raters":
        return rater_parts(row)
    return _influence(row) if row.get("kind") == "influence" else _forgotten(row)


def spoken(row: Mapping[str, Any]) -> list[str]:
    """A sentence or two for the top of the report."""
    if row.get("kind") == "raters":
        return [] if row.get("stale") else rater_words(row)[:1]
    if row.get("kind") == "influence":
        if row.get("stale"):
            return []
        largest = (row.get("poison") or {}).get("largest", {}).get("flip")
        if largest is None:
            return []
        if not largest:
            return ["Poisoning: the bound is vacuous even for one flipped pair; nothing is proved."]
        return [
            f"Poisoning: no {_pairs(largest)} flipped with full knowledge of all this can take held-out accuracy to "
            "50 % or below: proved."
        ]
    return [
        f"{_pairs(int(row.get('removed') or 0)).capitalize()} were forgotten on {str(row.get('created'))[:10]}; see "
        "Receipts."
    ]


def effect_words(row: Mapping[str, Any], effect: float) -> str:
    """What the absence of a pair would do, in words."""
    rises = "would rise" if effect > 0 else "would fall"
    if row.get("name") == "accuracy":
        return f"accuracy {rises} by {100 * abs(effect):.2f} points"
    return f"{row.get('name')} {rises} by {abs(effect):.3g}"


def proof_words(row: Mapping[str, Any], side: str) -> str:
    """How far a list is proved complete."""
    found = mapping_of(mapping_of(row.get("lists")).get(side))
    listed, proved, outside = len(found.get("rows") or []), int(found.get("proved") or 0), found.get("outside")
    unit = str(row.get("by") or "pair")
    if outside is None or not math.isfinite(float(outside)):
        return f"Nothing is proved for unlisted {unit}s: the bound is infinite for some."
    end = f"no other {unit} can do more than {float(outside):.3g}"
    if not listed:
        return f"Proved: {end}."
    if proved == listed:
        return f"Proved complete: {end}, and the {listed} listed do at least as much."
    return f"Proved for the first {proved} of {listed}: {end}."


def poison_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Attack, pairs, how far a held-out margin can move, how many can turn, accuracy kept, and what proves it."""
    rows = []
    for one in found.get("bounds") or []:
        margin = one.get("margin")
        none = one.get("by") == "nothing" or margin is None
        kept = f"{100 * float(one['accuracy']):.1f} %"
        rows.append(
            [
                ATTACKS[str(one["attack"])],
                str(one["k"]),
                "no bound" if none else f"{float(margin):.3g}",
                f"{one['could_turn']} of {one['held_out']}",
                kept if float(one["accuracy"]) > 0.5 else f"{kept}: vacuous",
                "nothing" if none else str(one["by"]),
            ]
        )
    return rows


POISON_HEAD = ("pairs", "how many", "margins move at most", "could turn", "accuracy kept", "proved by")


def poison_words(found: Mapping[str, Any]) -> list[str]:
    """What the bounds come to, in sentences."""
    largest = mapping_of(found.get("largest"))
    told = []
    for attack, word in ATTACKS.items():
        k = int(largest.get(attack) or 0)
        if k:
            told.append(f"Up to {_pairs(k)} {word}: held-out accuracy is proved to stay above 50 %; beyond, vacuous.")
        else:
            told.append(f"One pair {word}: the bound is vacuous, nothing is proved.")
    told.append(
        f"An added pair is assumed to be no more unusual than the most unusual one seen (norm "
        f"{number(found.get('cap'))} in the inverse of the Hessian)."
    )
    if search := mapping_of(found.get("attack")):
        last = search["accuracy"][-1]
        told.append(
            f"A greedy search over flips brought accuracy from {100 * float(found['accuracy']):.1f} % to "
            f"{100 * last:.1f} % with {search['k']}: the worst found, not the worst possible."
        )
    return told


def _influence(row: Mapping[str, Any]) -> list[Part]:
    title = str(row.get("title"))
    by = str(row.get("by") or "pair")
    better = int(row.get("good") or 0)
    parts: list[Part] = [
        element("h3", f"Influence on {title}"),
        aside("Made with another head than the run has now: run `coala influence` again.")
        if row.get("stale")
        else None,
    ]
    for side in ("raises", "lowers"):
        found = mapping_of(mapping_of(row.get("lists")).get(side))
        cells = [
            (
                beneath(str(one["name"]), _counted(one, by)),
                effect_words(row, float(one["effect"])),
                beneath(str(one["chosen"]), f"rather than: {one['rejected']}"),
                str(one["prompt"]),
            )
            for one in found.get("rows") or []
        ]
        caption = side_words(side, better, by)
        heads = ("Left out", "Then", "Chosen", "Prompt (its end)")
        parts += [titled(caption, Table(caption, heads, cells, kind="words")), aside(proof_words(row, side))]
    against = [
        (
            f"line {one['line']}",
            f"{float(one['margin']):.3g}",
            beneath(str(one["chosen"]), f"rather than: {one['rejected']}"),
            str(one["prompt"]),
        )
        for one in row.get("contradicted") or []
    ]
    caption = "Most contradicted by all other pairs: check these first for swapped replies"
    heads = ("Pair", "Margin by the others", "Chosen", "Prompt (its end)")
    parts.append(titled(caption, Table(caption, heads, against, kind="words")))
    bounds, twins = mapping_of(row.get("bounds")), mapping_of(row.get("copies"))
    poison = mapping_of(row.get("poison"))
    parts += [
        titled("Maximum effect of poisoned pairs", listing(poison_words(poison))) if poison else None,
        details(
            "Maximum effect of poisoned pairs, as a table",
            Table("Bounds on poisoned pairs", POISON_HEAD, poison_rows(poison), left=(5,)),
        ),
        details(
            "What stays fixed, and how exact this is",
            facts(
                f"Influence on {title}: bounds",
                [
                    ("Held", str(row.get("held"))),
                    ("Value now", number(row.get("value"))),
                    ("Estimates within, median", number(bounds.get("median_slack"))),
                    ("Estimates within, at most", number(bounds.get("largest_slack"))),
                    ("Saved head from the optimum, at most", number(bounds.get("head_from_optimum"))),
                    ("Gradient left", number(bounds.get("gradient_left"))),
                    ("Modulus", number(bounds.get("modulus"))),
                    ("Exact refits", number(row.get("refits"))),
                    (
                        "Pairs that share their features with another",
                        f"{twins.get('pairs')} in {twins.get('sets')} sets",
                    ),
                    ("Of these, with the opposite label", number(twins.get("contrary"))),
                ],
            ),
        ),
        aside(str(row.get("created") or "")),
    ]
    return parts


def side_words(side: str, better: int, by: str) -> str:
    """The name of a list: whose absence raises the measure, or in terms of help and harm where one is better."""
    if not better:
        return f"The {by}s that hold the score {'down' if side == 'raises' else 'up'} most"
    helps = (side == "raises") == (better < 0)
    return f"The {by}s that {'helped' if helps else 'harmed'} most"


def _counted(one: Mapping[str, Any], by: str) -> str:
    if by == "pair":
        return f"group {one.get('group')}"
    return f"{_pairs(int(one.get('pairs') or 0))}, shown: line {one['lines'][0]}"


def _forgotten(row: Mapping[str, Any]) -> list[Part]:
    digests = mapping_of(row.get("digests"))
    rows = [
        (name, _start(mapping_of(digests.get("before")).get(name)), _start(mapping_of(digests.get("after")).get(name)))
        for name in sorted({*mapping_of(digests.get("before")), *mapping_of(digests.get("after"))})
    ]
    bound, beside = row.get("bound"), mapping_of(row.get("beside"))
    again = (
        f"{beside['n_neurons']} gates; {100 * beside['accuracy']:.1f} % of held-out pairs ranked right instead of "
        f"{100 * beside['accuracy_held']:.1f} %; log-odds differ by {number(beside['log_odds_apart'])} at most"
        if beside
        else ""
    )
    return [
        element("h3", f"{_pairs(int(row.get('removed') or 0))} forgotten"),
        facts(
            "What forgetting changed",
            [
                ("Removed", f"{row.get('removed_train')} to fit, {row.get('removed_held_out')} held out"),
                ("Remaining", f"{row.get('remaining_train')} to fit, {row.get('remaining_held_out')} held out"),
                ("How", str(row.get("how"))),
                ("Relative gap of the old weights on the remaining pairs", number(row.get("gap_before"))),
                ("Relative gap of the new weights", number(row.get("gap_after"))),
                ("Weights moved by", number(row.get("distance"))),
                ("Proved to move at most by", "no bound (gates)" if bound is None else number(bound)),
                ("Held-out margins moved by at most", number(row.get("margins_moved"))),
                *([("Gates chosen again would give", again)] if again else []),
            ],
        ),
        Table("Digests (SHA-256, first 16 digits)", ("File", "Before", "After"), rows, left=(1, 2)),
        listing([f"Claimed: {text}" for text in row.get("claimed") or []]),
        listing([f"Not claimed: {text}" for text in row.get("not_claimed") or []]),
        listing([f"Stale: {text}" for text in row.get("stale_files") or []]),
        aside(str(row.get("created") or "")),
    ]


def _start(digest: Any) -> str:
    return str(digest)[:16] if digest else "deleted"


def _pairs(n: int) -> str:
    return f"{n:,} pair{'' if n == 1 else 's'}"
