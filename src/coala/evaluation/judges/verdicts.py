"""From a judge's answer to its verdict, strictly: what cannot be read is a failure of a named kind, never a guess.

A judge may think aloud: what it thinks is no verdict, and is taken off before anything is read.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any

from coala.data.reasoning import opens_thought, spoken
from coala.endpoint import Completion as Answer
from coala.evaluation.alpaca import preference_from_logprobs
from coala.evaluation.arena import parse_verdict, verdicts_in
from coala.evaluation.judges.instructions import ARENA_LABELS, Instructions
from coala.evaluation.judges.protocol import JudgeFailure
from coala.evaluation.mtbench import ERROR, HIGHEST, LOWEST, parse_game, parse_rating, ratings_in
from coala.evaluation.rows import as_number, shown

_BLOCK = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?```", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Verdict:
    """P(the reply shown first is better) in [0, 1], the label it was read from, and whether the answer had others."""

    preference: float
    label: str
    is_last_of_several: bool = False


def read_verdict(answer: Answer, instructions: Instructions) -> Verdict:
    """The verdict of a comparison. Raises :class:`JudgeFailure` where there is none.

    A strong verdict of the five-step scale is a win like a slight one: how it weighs is the business of
    :mod:`coala.evaluation.arena`, which gets the label.
    """
    _check_whole(answer, instructions)
    if instructions.mode == "weighted":
        return _weighted(answer, instructions)
    if instructions.parser == "json":
        label = _field(answer, "verdict", instructions)
        if label not in instructions.labels:
            raise JudgeFailure("no verdict", f"The verdict is {shown(label)}; expected {instructions.labels}.")
        place = instructions.labels.index(label)
        known = ARENA_LABELS if instructions.mode == "arena" else ("A", "B", "C")
        return _decided(known[place])
    if instructions.mode == "arena":
        found = parse_verdict(answer.text)
        if found is None:
            raise _none(answer)
        # Of several the last, as the benchmark's own code reads its judge.
        return replace(_decided(found), is_last_of_several=len(set(verdicts_in(answer.text))) > 1)
    outcome = parse_game(answer.text, swapped=False)
    if outcome == "error":
        raise _none(answer)
    return _decided({"model_1": "A", "model_2": "B", "tie": "C"}[outcome])


def read_rating(answer: Answer, instructions: Instructions) -> float:
    """The grade in 1..10. Raises :class:`JudgeFailure` where there is none."""
    _check_whole(answer, instructions)
    if instructions.parser == "json":
        value = _field(answer, "rating", instructions)
        number = None if isinstance(value, str) else as_number(value)
        if number is None or not LOWEST <= number <= HIGHEST:
            raise JudgeFailure("no verdict", f"The rating is {shown(value)}; expected a number from 1 to 10.")
        return number
    if len(several := ratings_in(answer.text)) > 1:
        listed = ", ".join(f"{one:g}" for one in several[:5])
        raise JudgeFailure("no verdict", f"The answer gives ratings that differ: {listed}.")
    rating = parse_rating(answer.text)
    if rating == ERROR:
        raise _none(answer)
    return rating


def _decided(label: str) -> Verdict:
    return Verdict(0.5 if label in ("C", "A=B") else float(label.startswith("A")), label)


def _weighted(answer: Answer, instructions: Instructions) -> Verdict:
    if not answer.top:
        raise JudgeFailure(
            "no log-probabilities", "The answer came without log-probabilities, which a weighted judge is read from."
        )
    likeliest = max(answer.top, key=lambda one: one[1])[0]
    if answer.reasoning or opens_thought(answer.text) or opens_thought(likeliest):
        raise JudgeFailure(
            "thinks first",
            "The first token opens a thought, so its log-probabilities are no verdict. Turn thinking off for a "
            "weighted judge, or use --judge pairwise.",
        )
    first, second = instructions.labels
    found = preference_from_logprobs(answer.top, swapped=False, tokens=(first, second))
    if found is None:
        raise JudgeFailure("no verdict", f"Neither {first!r} nor {second!r} is among the most likely tokens.")
    return Verdict(2 - found, first if found < 1.5 else second)


def _check_whole(answer: Answer, instructions: Instructions) -> None:
    if answer.refusal or answer.finish == "content_filter":
        raise JudgeFailure("refused", f"The judge refused: {shown(answer.refusal or answer.finish)}.")
    # A one-token verdict always ends at its limit.
    if instructions.mode == "weighted":
        return
    if answer.finish == "length":
        raise JudgeFailure("cut short", "The answer ended at its limit of tokens. Raise max_tokens of the judge.")
    # An object may hold anything in its texts.
    is_object = instructions.parser == "json" and _unblocked(answer.text).startswith("{")
    if not is_object and spoken(answer.text) is None:
        raise JudgeFailure("cut short", "The answer is a thought without an end. Raise max_tokens of the judge.")
    if answer.reasoning and not answer.text.strip():
        raise JudgeFailure("no verdict", "The answer is empty: the judge thought and said nothing.")


def _unblocked(text: str) -> str:
    """A text without the code block that may be around the whole of it."""
    block = _BLOCK.fullmatch(text.strip())
    return (block[1] if block else text).strip()


def _none(answer: Answer) -> JudgeFailure:
    return JudgeFailure("no verdict", f"The answer holds no verdict: {shown(answer.text[-60:])}.")


def _field(answer: Answer, name: str, instructions: Instructions) -> Any:
    """One field of an answer that is exactly one object of the schema's fields, each once."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a field comes twice")
        return dict(pairs)

    document, fault = None, ""
    # As it came first: the object's own texts may hold marks of thoughts.
    for text in dict.fromkeys((_unblocked(answer.text), _unblocked(spoken(answer.text) or ""))):
        try:
            document, fault = json.loads(text, object_pairs_hook=once), ""
            break
        except (ValueError, RecursionError) as error:
            fault = fault or ascii(str(error))[1:-1]
    if fault:
        raise JudgeFailure("no verdict", f"The answer is not JSON ({fault}).")
    wanted = instructions.schema()
    if not isinstance(document, dict) or wanted is None or set(document) != set(wanted["properties"]):
        found = ascii(sorted(document)) if isinstance(document, dict) else shown(document)
        raise JudgeFailure("no verdict", f"The answer holds {shown(found)}; expected the schema's fields, no others.")
    return document[name]
