"""Tables of what methods write, of benchmarks and of what agrees, as rows of text; computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from coala.compare.tables import over_seeds
from coala.pages.parts import Table
from coala.pages.words import bracketed, number

_Cell = Callable[[Mapping[str, Any]], str]
# Columns after the method's name; a column that no row has anything for is left out.
_COLUMNS: tuple[tuple[str, str, _Cell], ...] = (
    ("rules_kept", "rules kept of 5", lambda row: bracketed(row["rules_kept"], ".2f", 1)),
    ("win_rate", "wins against the unguided start, %", lambda row: bracketed(row["win_rate"])),
    ("perplexity", "perplexity under the start", lambda row: bracketed(row["perplexity"], ".3g", 1)),
    ("perplexity_ratio", "times the start's", lambda row: bracketed(row["perplexity_ratio"], ".3g", 1)),
    ("distinct", "distinct bigrams, %", lambda row: bracketed(row["distinct"])),
    ("kl", "KL to the start, nats", lambda row: bracketed(row["kl"], ".3g", 1)),
    ("policy_accuracy", "policy accuracy, %", lambda row: bracketed(row["policy_accuracy"])),
    ("policy", "likelihood", lambda row: row["policy"]),
    ("capability", "questions answered, %", lambda row: bracketed(row["capability"])),
    ("forwards", "forwards a token", lambda row: number(row["forwards"])),
    ("tokens", "tokens", lambda row: over_seeds(row["tokens"])),
)


def replies(place: Mapping[str, Any]) -> Table | None:
    """The paper's Tables 3 and 4: win rates, and what they are bought with."""
    rows = [row for row in place["methods"] if row["perplexity"] or row["win_rate"]]
    if not rows:
        return None
    columns = [(title, cell) for name, title, cell in _COLUMNS if any(row[name] for row in rows)]
    timed = any(row["measured"]["ms_a_token"] for row in rows)
    head = ("method", *(title for title, _ in columns), *(("ms a token",) if timed else ()))
    told = [
        (
            row["label"],
            *(cell(row) for _, cell in columns),
            *((number(row["measured"]["ms_a_token"]),) if timed else ()),
        )
        for row in rows
    ]
    n = max((row["perplexity"]["n"] for row in rows if row["perplexity"]), default=0)
    return Table(
        "Replies to held-out prompts",
        head,
        told,
        f"{n} prompts; 95 % intervals. A tie counts one half. KL of whole replies at temperature 1; of guidance it is "
        "known in mode shift alone, within top-k and top-p, and of the best of N it is at most log N - (N - 1)/N. "
        "Distinct bigrams: of each reply, distinct two-word runs over all of them. Policy accuracy: the share of "
        "held-out pairs that log p(reply) - log p(reply) of the start ranks right. Milliseconds are of all that was "
        "decoded, for each token that was kept.",
    )


def rules(place: Mapping[str, Any]) -> Table | None:
    """The share of replies that keep each rule of the judge."""
    rows = [row for row in place["methods"] if row["rules"]]
    if not rows:
        return None
    names = list(rows[0]["rules"])
    return Table(
        "Rules kept, % of replies",
        ("method", *names),
        [(row["label"], *(bracketed(row["rules"][name]) for name in names)) for row in rows],
    )


def contests(place: Mapping[str, Any]) -> Table | None:
    found = place["contests"]
    if not found:
        return None
    return Table(
        f"On the same prompts against {found[0]['against']}, by the judge",
        ("method", "preferred, % [95 %]", "prompts"),
        [(entry["of"], bracketed(entry["wins"]), f"{entry['wins']['n']}") for entry in found],
        "A tie counts one half. Above 50 the method beats COALA's guidance.",
    )


def agreement(place: Mapping[str, Any]) -> Table | None:
    rows = [row for row in place["agreement"] if row["tau"] is not None]
    if not rows:
        return None
    return Table(
        "Do the measures order the methods alike?",
        ("measures", "Kendall's tau-b", "p", "methods", "which"),
        [
            (
                f"{row['first']}, {row['second']}",
                f"{row['tau']:+.2f}",
                f"{row['p']:.2g}",
                f"{row['n']}",
                ", ".join(row["methods"]),
            )
            for row in rows
        ],
        "Guided methods rank as the head that guides them, so that they tie there.",
    )


def benchmarks(place: Mapping[str, Any]) -> list[Table]:
    """One table of sections for every benchmark."""
    return [_sections(found) for found in place["benchmarks"]]


def matrices(place: Mapping[str, Any]) -> list[Table]:
    """RM-Bench's matrix of every head of ours."""
    return [table for found in place["benchmarks"] for table in _matrices(found)]


def _sections(found: Mapping[str, Any]) -> Table:
    names = list(dict.fromkeys(name for ranking in found["rankings"].values() for name in ranking["sections"]))
    remarks = list(dict.fromkeys(r for ranking in found["rankings"].values() for r in ranking["remarks"]))
    rows = [
        (scorer, bracketed(ranking["rows"]), *(bracketed(ranking["sections"].get(name)) for name in names))
        for scorer, ranking in found["rankings"].items()
    ]
    note = (
        f"{found['items']} of {found['of']} items, drawn evenly from the subsets; {found['cut']} of {found['replies']} "
        "replies with their prompts were cut to the model's max_tokens. Share ranked right, a tie wrong; the longer "
        "reply is a rule that reads nothing."
    )
    return Table(f"{found['benchmark']}, %", ("scorer", "all comparisons", *names), rows, " ".join([note, *remarks]))


def _matrices(found: Mapping[str, Any]) -> list[Table]:
    styles = ("concise", "long plain text", "long markdown")
    return [
        Table(
            f"{found['benchmark']}, {scorer}: right reply (rows) by wrong reply (columns), %",
            ("", *styles),
            [(style, *(bracketed(cell) for cell in row)) for style, row in zip(styles, ranking["matrix"], strict=True)],
            "Easy below the diagonal, normal on it, hard above it.",
        )
        for scorer, ranking in found["rankings"].items()
        if ranking["matrix"]
    ]
