"""The data doctor: everything that is wrong or doubtful in preference data, before anything is trained on them.

Errors are rows that cannot be used; warnings are counted properties of the set that a person should know of.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from hashlib import blake2b

from coala.data.files import Source
from coala.data.findings import DataError, Finding, Findings, Severity
from coala.data.formats import Located, read
from coala.data.signs import markup, no_replies, power
from coala.statistics.intervals import share_estimate
from coala.values import Estimate, Pair

MAX_CONFLICTS = (
    0.05  # people contradict each other now and then; a file where more than this does was put together wrong
)
LENGTH_BIAS = 0.1  # distance of the longer-is-chosen share from one half that is worth a warning
SUSPICIOUS = 0.6  # share of pairs whose rejected reply looks the better, from which the labels are doubted
ENOUGH = 30  # decided pairs below which no share is worth a warning


def check(
    source: Source,
    format: str = "auto",
    *,
    against: Source | None = None,
    count_tokens: Callable[[Pair], int] | None = None,
    max_tokens: int | None = None,
    special_tokens: Sequence[str] = (),
    refusal: Callable[[Pair], str] | None = None,
    specials: Callable[[str], list[str]] | None = None,
) -> Findings:
    """Read every row of ``source`` (as :func:`coala.data.read_pairs` takes it) and list what is wrong.

    Errors: everything ``read_pairs`` refuses; conflicting pairs when they are more than 5 % (of one prompt and two
    replies, each is preferred once: a few are human disagreement, many a mixed-up column); every pair too long.
    Warnings, each with its count: duplicates, fewer conflicts, ties, pairs whose prompt and longer reply pass
    ``max_tokens`` by ``count_tokens`` (they would be cut), length bias, groups or prompts shared with ``against``
    (the other side of a split; its own errors are listed too), signs that chosen and rejected are swapped, one or two
    pairs alone, a side that says the same in every row (an error where that is a name or a label), and texts that hold
    ``special_tokens`` of a model or, where none are given, those of common chat templates. A note tells how many
    held-out pairs it takes to see a difference.
    ``refusal`` tells why a model's chat template does not take a pair (an error of that row), ``specials`` which of its
    special tokens are written out in a text (a warning: in prompts they are read as plain text, a stop token at the end
    of a reply is left out). Raises :class:`DataError` for ``max_tokens`` without ``count_tokens`` and for an unknown
    ``format`` only.
    """
    if max_tokens is not None and count_tokens is None:
        raise DataError([_whole("max_tokens", "", "a limit without a way to count", "a tokenizer", "name the model")])
    listed: list[Finding] = []
    located = _gather(source, format, listed)
    if refusal is not None:
        located = _taken(located, refusal, listed)
    counts: dict[str, int | float] = {
        "pairs": len(located),
        "groups": len({one.pair.group for one in located}),
        "unreadable_rows": sum(finding.severity == "error" for finding in listed),
    }
    pairs = [one.pair for one in located]
    if located:
        listed += _repeats(located, counts)
        listed += _lengths(located, counts)
        listed += _direction(located, counts)
        listed += no_replies(located)
        if specials is None:
            listed += markup(located, special_tokens, counts)
        else:
            listed += _written_out(located, specials, counts)
        if count_tokens is not None and max_tokens is not None:
            listed += _too_long(located, count_tokens, max_tokens, counts)
    if against is not None:
        other = _gather(against, format, listed)
        listed += _leaks(located, other, counts)
        listed += power(located, other)
    elif located:
        listed += power(located)

    def of(severity: Severity) -> tuple[Finding, ...]:
        return tuple(finding for finding in listed if finding.severity == severity)

    return Findings(of("error"), of("warning"), of("note"), tuple(pairs), counts)


def _gather(source: Source, format: str, listed: list[Finding]) -> list[Located]:
    """The sound pairs; errors and notes go to ``listed`` one by one, warnings of one kind and file as one."""
    located: list[Located] = []
    kinds: dict[tuple[str, ...], Finding] = {}
    for event in read(source, format):
        if isinstance(event, Located):
            located.append(event)
        elif event.severity == "warning":
            kind = (event.file, event.field, event.found, event.expected, event.mend)
            seen = kinds.get(kind)
            kinds[kind] = replace(seen, count=seen.count + 1) if seen else event
        else:
            listed.append(event)
    listed.extend(kinds.values())
    return located


def gather(source: Source, format: str = "auto") -> Findings:
    """What reading alone finds, without a look at what the pairs teach; as :func:`check` gives it."""
    listed: list[Finding] = []
    located = _gather(source, format, listed)
    listed += no_replies(located)

    def of(severity: Severity) -> tuple[Finding, ...]:
        return tuple(finding for finding in listed if finding.severity == severity)

    return Findings(of("error"), of("warning"), of("note"), tuple(one.pair for one in located))


def _whole(file: str, field: str, found: str, expected: str, mend: str, severity: Severity = "error") -> Finding:
    return Finding(file, None, field, found, expected, mend, severity)


def _mark(*texts: str) -> bytes:
    """A short stand-in for texts, so that large sets need no second copy of themselves."""
    state = blake2b(digest_size=16)
    for text in texts:
        raw = text.encode()
        state.update(len(raw).to_bytes(8, "little") + raw)
    return state.digest()


def _asked(pair: Pair) -> bytes:
    return _mark(*(part for turn in pair.prompt for part in (turn.role, turn.text)))


# --- as a model reads it -----------------------------------------------------------------------------------------


def _taken(located: Sequence[Located], refusal: Callable[[Pair], str], listed: list[Finding]) -> list[Located]:
    """The pairs that a model's chat template takes."""
    taken = []
    for one in located:
        reason = refusal(one.pair)
        if not reason:
            taken.append(one)
            continue
        listed.append(
            Finding(
                *(one.file, one.row, "prompt"),
                reason,
                "a conversation that the model's chat template takes",
                "change its roles, use the template dialogue, or leave the row out (--skip-bad)",
            )
        )
    return taken


def _written_out(
    located: Sequence[Located], specials: Callable[[str], list[str]], counts: dict[str, int | float]
) -> Iterable[Finding]:
    """Special tokens of the model in texts: what was text once would open a turn or end a reply."""
    places: dict[str, tuple[str, Callable[[Pair], list[str]]]] = {
        "prompt": ("they are read as plain text where a user wrote them", lambda p: [t.text for t in p.prompt]),
        "reply": ("a stop token at the end is left out", lambda p: [p.chosen, p.rejected]),
    }
    for field, (what, texts) in places.items():
        with_some = [(one, found) for one in located if (found := specials("\n".join(texts(one.pair))))]
        counts[f"special_tokens_in_{field}"] = len(with_some)
        if with_some:
            one, found = with_some[0]
            yield Finding(
                *(one.file, one.row, field),
                f"special tokens of the model are written out ({', '.join(sorted(found)[:3])}); {what}",
                "texts without the marks of a template",
                "take them out, unless the model is meant to read them",
                severity="warning",
                count=len(with_some),
            )


# --- repeats -----------------------------------------------------------------------------------------------------


def _repeats(located: Sequence[Located], counts: dict[str, int | float]) -> Iterable[Finding]:
    """Duplicates (the same prompt and replies again) and conflicts (the same, the other way round)."""
    first: dict[tuple[bytes, bytes, bytes], Located] = {}
    twice: list[tuple[Located, Located]] = []
    against: list[tuple[Located, Located]] = []
    for one in located:
        prompt, chosen, rejected = _asked(one.pair), _mark(one.pair.chosen), _mark(one.pair.rejected)
        if (same := first.setdefault((prompt, chosen, rejected), one)) is not one:
            twice.append((one, same))
        elif reverse := first.get((prompt, rejected, chosen)):
            against.append((one, reverse))
    counts["duplicates"], counts["conflicts"] = len(twice), len(against)
    if twice:
        one, same = twice[0]
        yield Finding(
            *(one.file, one.row, ""),
            f"the same pair as in {same.file}:{same.row} ({len(twice)} of {len(located)} pairs are such repeats)",
            "each pair once",
            "delete the repeats, which count double",
            severity="warning",
        )
    if against:
        one, reverse = against[0]
        part = 2 * len(against) / len(located)
        mend = (
            "keep what most annotators said"
            if part <= MAX_CONFLICTS
            else "check whether chosen and rejected are swapped in part of the file"
        )
        yield Finding(
            *(one.file, one.row, ""),
            f"the preferred reply rejected in {reverse.file}:{reverse.row}; {part:.1%} of the pairs contradict another",
            f"at most {MAX_CONFLICTS:.0%}",
            mend,
            severity="warning" if part <= MAX_CONFLICTS else "error",
        )


# --- length ------------------------------------------------------------------------------------------------------


def _lengths(located: Sequence[Located], counts: dict[str, int | float]) -> Iterable[Finding]:
    differences = [len(one.pair.chosen) - len(one.pair.rejected) for one in located]
    wins = sum(d > 0 for d in differences)
    decided = sum(d != 0 for d in differences)
    longer = share_estimate([d > 0 for d in differences if d])
    counts["chosen_longer"] = longer.value if decided else 0.5
    # The better of "take the longer" and "take the shorter", a tie one half.
    rule = max(wins, decided - wins) / len(located) + 0.5 * (len(located) - decided) / len(located)
    counts["length_rule_accuracy"] = rule
    if decided >= ENOUGH and not longer.low <= 0.5 <= longer.high and abs(longer.value - 0.5) >= LENGTH_BIAS:
        way = "longer" if longer.value > 0.5 else "shorter"
        yield _whole(
            located[0].file,
            "chosen",
            f"the longer reply chosen in {_percent(longer)} (taking the {way} one is right for {rule:.1%})",
            "about one half",
            f"compare with that rule: a model can learn from this to write {'more' if way == 'longer' else 'less'}",
            "warning",
        )


def _percent(estimate: Estimate) -> str:
    return f"{estimate.value:.1%} [{estimate.low:.1%}, {estimate.high:.1%}] of {estimate.n} pairs"


def _too_long(
    located: Sequence[Located], count_tokens: Callable[[Pair], int], limit: int, counts: dict[str, int | float]
) -> Iterable[Finding]:
    over = [(count_tokens(one.pair), one) for one in located]
    over = [(tokens, one) for tokens, one in over if tokens > limit]
    counts["too_long"] = len(over)
    if over:
        longest, one = max(over, key=lambda item: item[0])
        every = len(over) == len(located)
        rows = ", ".join(str(item.row) for _, item in over[:10]) + (", ..." if len(over) > 10 else "")
        yield Finding(
            one.file,
            one.row,
            "",
            f"{longest} tokens, the longest of {len(over)} of {len(located)} pairs that are too long (rows {rows})",
            f"at most {limit}",
            "raise max_tokens or take a model with a longer context"
            if every
            else "shorten or drop them, or they will be cut",
            severity="error" if every else "warning",
        )


# --- leaks -------------------------------------------------------------------------------------------------------


def _leaks(train: Sequence[Located], test: Sequence[Located], counts: dict[str, int | float]) -> Iterable[Finding]:
    """Pairs of ``against`` whose group, prompt or reply ``train`` holds too."""
    groups = {one.pair.group for one in train}
    prompts = {_asked(one.pair): one for one in train}
    # One fixed prompt for all (as for reviews) says nothing: then the replies are compared.
    fixed = len(prompts) == 1 and len(train) > 1
    replies = {_mark(text) for one in train for text in (one.pair.chosen, one.pair.rejected)} if fixed else set()
    shared: Counter[str] = Counter()
    example: dict[str, Located] = {}
    for one in test:
        found = {
            "group": one.pair.group in groups,
            "prompt": not fixed and _asked(one.pair) in prompts,
            "reply": fixed and bool({_mark(one.pair.chosen), _mark(one.pair.rejected)} & replies),
        }
        for what, is_shared in found.items():
            if is_shared:
                shared[what] += 1
                example.setdefault(what, one)
    for what, n in shared.items():
        counts[f"shared_{what}s"] = n
        one = example[what]
        yield Finding(
            one.file,
            one.row,
            what,
            f"{n} of {len(test)} pairs with a {what} that the training pairs have too",
            "none",
            "take those pairs out of one side, or the evaluation is not held out",
            severity="warning",
        )


# --- direction ---------------------------------------------------------------------------------------------------

_REFUSAL = re.compile(
    r"\W*(i('m| am) (so |very |really )?(sorry|afraid|unable|not able)|i (can('|no)t|won't|will not|could not)\b|"
    r"sorry\b|as an ai\b|i apologi[sz]e|unfortunately,? i (can|am))",
    re.IGNORECASE,
)


def _is_broken(reply: str) -> bool:
    """Says nothing, or the same again and again: no letters or digits, or a fifth or less of its words are new."""
    words = reply.lower().split()
    return not any(c.isalnum() for c in reply) or (len(words) >= 20 and len(set(words)) <= len(words) / 5)


_LOOKS_WORSE: dict[str, Callable[[str], bool]] = {
    "is broken or repeats itself": _is_broken,
    "refuses": lambda reply: bool(_REFUSAL.match(reply.replace("\u2019", "'"))),
}


def _direction(located: Sequence[Located], counts: dict[str, int | float]) -> Iterable[Finding]:
    """Cheap signs that chosen and rejected are swapped: which side refuses or is broken, which is much shorter.

    Each pair has one vote, by the first sign that parts its replies (broken, refusing, under half as long). A suspicion
    only: in data on harmlessness the refusal is rightly the chosen one.
    """
    votes: dict[str, list[bool]] = defaultdict(list)
    for one in located:
        chosen, rejected = one.pair.chosen, one.pair.rejected
        for name, looks_worse in _LOOKS_WORSE.items():
            if (bad := looks_worse(chosen)) != looks_worse(rejected):
                votes[name].append(bad)
                break
        else:
            if min(len(chosen), len(rejected)) * 2 < max(len(chosen), len(rejected)):
                votes["is under half as long"].append(len(chosen) < len(rejected))
    cast = [vote for part in votes.values() for vote in part]
    doubt = share_estimate(cast)
    counts["rejected_looks_better"] = doubt.value if cast else 0.5
    if len(cast) >= ENOUGH and doubt.low > SUSPICIOUS:
        parts = ", ".join(f"chosen {name} in {sum(part)} of {len(part)}" for name, part in votes.items())
        yield _whole(
            located[0].file,
            "chosen",
            f"the worse-looking reply in {_percent(doubt)} of the pairs that surface cues can judge ({parts})",
            "the better reply",
            "read a few with `coala data show` (this is a suspicion only), and swap the columns if they are reversed",
            "warning",
        )
