"""What a page and a terminal say of raters, sources or groups: sentences and one table. Computes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coala.pages.parts import Part, Table, aside, details, element, facts, listing
from coala.pages.words import number

SHOWN = 30  # rows of the table; all are in the record
NAMED = 10  # names in a sentence
LONGEST = 40  # characters of a name
HEAD = ("choices", "as the others' head", "slope", "own 95 %", "deviates", "verdict")


def rater_words(record: Mapping[str, Any]) -> list[str]:
    """Who is reversed, random, of another mind or undecided, in sentences with n and interval."""
    by, rows = str(record["by"]), list(record["rows"])
    counts = ", ".join(f"{n} {verdict}" for verdict, n in record["verdicts"].items() if n)
    told = [
        f"{len(rows):,} {by}s: {counts}; all of this holds together at {100 * (1 - record['miss']):g} % (Bonferroni "
        f"over {record['judged']:,} with choices)."
    ]
    told += [_sentence(row, by) for row in rows if row["verdict"] in ("reversed", "random")][:SHOWN]
    weaker = [row for row in rows if row["verdict"] == "consistent" and row["why"]]
    if weaker:
        told.append(f"Agree, but less than the rest: {_listed(weaker)}.")
    own = [row for row in rows if row["deviates"]]
    if own:
        told.append(
            f"Deviating from the shared head, with one of their own (`guidance.rater`): {_listed(own)}. If all "
            f"were alike, the chance that "
            "any deviates is at most 5 %."
        )
    told += [_gain(row, by) for row in own if row.get("own_head")][:NAMED]
    if not own:
        told.append(f"No {by} deviates from the shared head by more than exchangeable ones do in 95 % of draws.")
    undecided = [row for row in rows if row["verdict"] == "undecided"]
    less = [row for row in undecided if "less" in row["why"]]
    if less:
        told.append(f"Agree less than the rest, at random or in reverse: {_listed(less)}.")
    undecided = [row for row in undecided if row not in less]
    if undecided and not record["at_chance"]:
        told.append(f"Undecided, with too few choices or too little agreement: {_listed(undecided)}.")
    if record["at_chance"]:
        told.append("The head of the others is not distinguishable from chance, so raters cannot be compared.")
    if record["unnamed"]:
        told.append(f"{record['unnamed']:,} pairs name no {by} and are counted with the others.")
    return told


def rater_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """One row for each of the first: name, choices, agreement, slope, interval, deviation, verdict."""
    return [
        [
            _short(row["name"]),
            f"{row['n']:,}",
            _share(row["share"]) if row["n"] else "",
            _number(row["slope"]),
            _interval(row["low"], row["high"]),
            f"{row['deviation']:.2f} of the shared" if row["deviates"] else "no",
            row["verdict"] + (f": {row['why']}" if row["why"] else ""),
        ]
        for row in record["rows"][:SHOWN]
    ]


def rater_head(record: Mapping[str, Any]) -> tuple[str, ...]:
    return (str(record["by"]), *HEAD)


def rater_parts(record: Mapping[str, Any]) -> list[Part]:
    """The section of the page on one record."""
    by = str(record.get("by"))
    more = len(record["rows"]) - SHOWN
    return [
        element("h3", f"Who agrees with whom, by {by}"),
        aside(f"Made with another head than the run has now: run `coala fit RUN --by {by}` again.")
        if record.get("stale")
        else None,
        listing(rater_words(record)),
        Table(f"{by.capitalize()}s", rater_head(record), rater_rows(record), left=(6,)),
        aside(f"{more:,} more are in the run's receipts/raters-by-{by}.json.") if more > 0 else None,
        aside(
            "Slope: with a head fitted without this one and without the "
            "prompt; 1 agrees like the rest, 0 is random, below 0 is reversed. The interval is each one's own, "
            "verdicts are by a wider one that holds for all. "
            "Reversed is relative: to what most choices agree on."
        ),
        details(
            "How deviations were found",
            facts(
                f"Deviations by {by}",
                [
                    ("Pairs", f"{record['pairs']:,} fitted on, {record['held_out']:,} held out"),
                    ("Level of the penalty", number(record["level"])),
                    ("From", f"{record['draws']} permutations, {_within(record)}"),
                    ("Relative gap, proved", number(record["relative_gap"])),
                ],
            ),
        ),
        aside(str(record.get("created") or "")),
    ]


def _within(record: Mapping[str, Any]) -> str:
    return "names shuffled within prompts" if record["exchanged_within"] else "names shuffled over all prompts"


def _sentence(row: Mapping[str, Any], by: str) -> str:
    share, others = row["share"], row["others"]
    against = row["verdict"] == "reversed"
    ends = (share["value"], share["low"], share["high"])
    value, low, high = (1 - share["value"], 1 - share["high"], 1 - share["low"]) if against else ends
    how = "the opposite of the others" if against else "as the others"
    usual = "" if others is None else f" (they do in {100 * (1 - others if against else others):.0f} % of theirs)"
    return (
        f"{by} {_short(row['name'])}: chose {how} in {100 * value:.0f} % [{100 * low:.0f}, {100 * high:.0f}] of "
        f"{row['n']:,} pairs{usual}: {row['verdict']}."
    )


def _gain(row: Mapping[str, Any], by: str) -> str:
    own = row["own_head"]
    apart = own["difference"]
    low, high = (100 * float(apart[end]) if apart[end] is not None else float("nan") for end in ("low", "high"))
    return (
        f"{by} {_short(row['name'])}: the own head ranks {100 * own['accuracy']:.0f} % of its {row['pairs']:,} pairs "
        f"right, their prompts left out, the shared one {100 * own['accuracy_shared']:.0f} % (difference {low:+.0f} to "
        f"{high:+.0f} points)."
    )


def _listed(rows: Sequence[Mapping[str, Any]]) -> str:
    names = ", ".join(f"{_short(row['name'])} ({row['n']:,})" for row in rows[:NAMED])
    return names + (f" and {len(rows) - NAMED:,} more" if len(rows) > NAMED else "")


def _share(share: Mapping[str, Any]) -> str:
    return f"{100 * share['value']:.0f} % [{100 * share['low']:.0f}, {100 * share['high']:.0f}]"


def _interval(low: float | None, high: float | None) -> str:
    return f"[{_number(low, '-inf')}, {_number(high, 'inf')}]"


def _number(value: float | None, otherwise: str = "") -> str:
    return otherwise if value is None or not abs(value) < float("inf") else f"{value:.2f}"


def _short(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "\N{HORIZONTAL ELLIPSIS}"
