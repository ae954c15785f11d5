"""The page's section on the distilled policy: beside unguided and guided replies, with its certificate in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coala.pages.parts import Part, Table, beneath, facts, missing, paragraphs
from coala.pages.words import Interval, number

NAMES = {"unguided": "unguided", "guided": "guided by the head", "distilled": "distilled"}


def shown(content: Mapping[str, Any]) -> list[Part]:
    """The parts of the section; none of a run that was not distilled at the end of its alignment."""
    if not content:
        return []
    if content.get("nothing"):
        return [missing(f"Nothing was distilled. {content['nothing']}")]
    if content.get("stale"):
        return [missing("Distilled again since this was measured: `coala align ... --distil` measures the new policy.")]
    judge = content.get("judge")
    heads = [
        "Replies",
        *([f"Wins against unguided ({judge})"] if judge else []),
        "Head score, difference to unguided",
        "Perplexity, relative to unguided",
        "KL per reply, nats",
        "Forwards a token",
    ]
    rows = [_row(row, judged=bool(judge)) for row in content.get("rows") or []]
    n = sorted({Interval(row.get("gain")).n for row in content.get("rows") or []})
    told = (
        f"n = {', '.join(map(str, n))} held-out prompts, one reply each with the same noise; below each value its 95 % "
        "interval, paired. Perplexity is the base model's. KL of the distilled policy is over the whole vocabulary, of "
        "mode shift within what top-k and top-p leave; of other guidance it is not known. Forwards: tokens that the "
        "model computes for one of the reply, at most."
    )
    return [
        Table("Unguided, guided and distilled replies", heads, rows, told),
        paragraphs(str(content.get("statement") or "")),
        facts("The distilled policy", [(name, value) for name, value in content.get("summary") or []]),
    ]


def _row(row: Mapping[str, Any], *, judged: bool) -> list[Part]:
    base = row.get("name") == "unguided"

    def cell(estimate: Any, *, share: bool = False, otherwise: str = "not known") -> Part:
        found = Interval(estimate)
        if not found:
            return otherwise
        value, opened, ends = (found.percent() if share else found.plain()).partition(" (")
        return beneath(value, ends.removesuffix(")") if opened else None)

    return [
        beneath(NAMES.get(str(row.get("name")), str(row.get("name"))), "" if base else str(row.get("method") or "")),
        *([cell(row.get("wins"), share=True, otherwise="" if base else "no verdicts")] if judged else []),
        "0" if base else cell(row.get("gain")),
        "1" if base else cell(row.get("perplexity_ratio")),
        "0" if base else cell(row.get("divergence")),
        number(row.get("forwards")),
    ]


def spoken(content: Mapping[str, Any]) -> list[str]:
    """A sentence on what the policy kept."""
    if content.get("nothing"):
        return [f"Nothing was distilled. {content['nothing']}"]
    rows = {row.get("name"): row for row in content.get("rows") or []}
    ours = rows.get("distilled")
    if ours is None or content.get("stale"):
        return []
    wins, gain, nats = (Interval(ours.get(name)) for name in ("wins", "gain", "divergence"))
    start = "The distilled policy, at one forward pass per token,"
    if wins:
        even = "" if wins.above(0.5) or wins.below(0.5) else ", which includes 50 %"
        said = f"{start} is preferred to unguided replies in {wins.percent()}{even}"
    else:
        way = "above" if gain.above(0) else "below" if gain.below(0) else "not distinguishable from"
        said = f"{start} has a head score {way} that of unguided replies by {gain.plain()}"
    cost = f", at {nats.plain()} nats per reply" if nats else ""
    return [f"{said}, n = {(wins or gain).n}{cost}."]
