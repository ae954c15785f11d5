"""Signs that texts are not what they stand for: labels for replies, chat markup in texts; and too few pairs.

Pairs in, findings out; a part of :mod:`coala.data.doctor`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from coala.data.findings import Finding, Severity, describe, listed
from coala.data.formats.reader import Located
from coala.data.records import names
from coala.data.turns import is_name

SAME_SIDE = 0.95  # share of pairs with one and the same text on a side from which it is no reply
SURE = 10  # pairs from which even a plain word that never changes is an error
FEWEST = 3
LABELS = names(
    "a b 0 1 2 chosen rejected better worse good bad win lose winner loser true false positive negative first second "
    "left right tie null none nan n/a"
)
# What the templates of common chat models write around turns.
MARKUP = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<<SYS>>", "<|user|>"),
    *("<|assistant|>", "<|system|>", "<|end|>", "<|eot|>", "<|END_OF_TURN_TOKEN|>", "<|start|>", "<|message|>"),
)
ALPHA_Z, POWER_Z = 1.959964, 0.841621  # two-sided 5 %, power 80 %


def no_replies(located: Sequence[Located]) -> Iterator[Finding]:
    """Names of models or columns for replies, or a side with one short text down the file."""
    named = [one for one in located if is_name(one.pair.chosen) and is_name(one.pair.rejected)]
    if located and 2 * len(named) >= len(located):
        first = named[0].pair
        found = f"names ({describe(first.chosen)}, {describe(first.rejected)}) in {len(named)} of {len(located)} pairs"
        mend = "name the columns that hold the replies themselves"
        yield Finding(located[0].file, None, "chosen", found, "the texts of replies", mend)
        return
    for side in ("chosen", "rejected") if located else ():
        said = Counter(getattr(one.pair, side).strip() for one in located)
        text, n = said.most_common(1)[0]
        if len(text.split()) > 2 or len(text) > 40 or n < SAME_SIDE * len(located):
            continue
        name = is_name(text) or text.casefold() in LABELS or (bool(re.search(r"[_\d]", text)) and " " not in text)
        severity: Severity = "error" if len(located) >= SURE or (name and len(located) >= FEWEST) else "warning"
        if len(located) < FEWEST and not is_name(text):
            continue
        found = f"{describe(text)} in {n} of {len(located)} pairs"
        mend = "name the column that holds the replies `" + side + "` (this one looks like labels)"
        yield Finding(located[0].file, None, side, found, "a reply to each prompt", mend, severity=severity)


def markup(located: Sequence[Located], tokens: Sequence[str], counts: dict[str, int | float]) -> Iterator[Finding]:
    """Texts that hold tokens which a chat template writes: they open or close turns where none should be."""
    known = [one for one in dict.fromkeys(tokens or MARKUP) if one.strip() and len(one) > 1]
    if not known:
        return
    pattern = re.compile("|".join(re.escape(one) for one in sorted(known, key=len, reverse=True)))
    inside: dict[str, list[tuple[Located, str]]] = {"prompt": [], "chosen": [], "rejected": []}
    ends: Counter[str] = Counter()
    for one in located:
        for place, texts in (
            ("prompt", [turn.text for turn in one.pair.prompt]),
            ("chosen", [one.pair.chosen]),
            ("rejected", [one.pair.rejected]),
        ):
            found = [match[0] for text in texts for match in pattern.finditer(text)]
            if found:
                inside[place].append((one, found[0]))
                ends[place] += any(text.rstrip().endswith(found[-1]) for text in texts)
    counts["with_special_tokens"] = sum(map(len, inside.values()))
    whose = "special tokens of the model" if tokens else "markup of chat templates"
    for place, held in inside.items():
        if not held:
            continue
        shown = listed(dict.fromkeys(token for _, token in held), 4)
        what = f"{whose} ({shown}) in {len(held)} of {len(located)} texts"
        if place == "prompt":
            expected = "plain text: they open and close turns of their own"
        elif ends[place]:
            expected = "plain text: the token that ends a reply would stand twice"
        else:
            expected = "plain text: they would be read as markup"
        mend = "take them out; the template writes its own"
        yield Finding(held[0][0].file, held[0][0].row, place, what, expected, mend, severity="warning")


def special_tokens(tokenizer: Any) -> list[str]:
    """The tokens of a tokenizer that no text should hold: its special ones, and added ones that are marked so."""
    added = getattr(tokenizer, "added_tokens_decoder", {}) or {}
    marked = [str(token.content) for token in added.values() if getattr(token, "special", False)]
    return list(dict.fromkeys([*map(str, getattr(tokenizer, "all_special_tokens", [])), *marked]))


def pairs_needed(accuracy: float = 0.6, chance: float = 0.5) -> int:
    """Held-out pairs from which an accuracy is told from chance (two-sided 5 %, power 80 %; normal approximation)."""
    spread = ALPHA_Z * math.sqrt(chance * (1 - chance)) + POWER_Z * math.sqrt(accuracy * (1 - accuracy))
    return math.ceil((spread / (accuracy - chance)) ** 2)


def power(located: Sequence[Located], held_out: Sequence[Located] | None = None) -> Iterator[Finding]:
    """One or two pairs are a warning; too few to hold out are a note that says how many it takes."""
    needed = pairs_needed()
    if located and len(located) < FEWEST:
        found = f"{len(located)} pair{'s' * (len(located) > 1)}"
        mend = f"give more: {needed} held-out pairs distinguish an accuracy of 60 % from 50 %"
        yield Finding(located[0].file, None, "", found, "hundreds to learn from", mend, severity="warning")
        return
    n = len(held_out) if held_out is not None else len(located) // 10
    if n < needed and (held_out is None or held_out):
        what = f"{n} held-out pairs" if held_out is not None else f"a tenth held out of {len(located)} pairs is {n}"
        said = f"{what}; it takes about {needed} to distinguish an accuracy of 60 % from 50 % (at 5 %, power 80 %)"
        file = held_out[0].file if held_out else located[0].file
        yield Finding(file, None, "", said, "", "", severity="note")
