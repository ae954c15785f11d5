"""From a judge's answer to its verdict, strictly: what cannot be read is a failure of a named kind, never a guess."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from coala.evaluation.alpaca import preference_from_logprobs
from coala.evaluation.arena import parse_verdict
from coala.evaluation.judges.instructions import ARENA_LABELS, Instructions
from coala.evaluation.judges.protocol import JudgeFailure
from coala.evaluation.mtbench import ERROR, HIGHEST, LOWEST, parse_game, parse_rating
from coala.evaluation.rows import as_number, shown


@dataclass(frozen=True)
class Answer:
    """What a judge said: ``text``, why it ended, and for one-token verdicts the likeliest first tokens (nats).

    Kept as it came, so that a verdict can be read again without being bought again.
    """

    text: str
    finish: str = "stop"
    refusal: str = ""
    top: tuple[tuple[str, float], ...] | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Answer:
        row = json.loads(text)
        top = None if row["top"] is None else tuple((str(token), float(value)) for token, value in row["top"])
        return cls(**{**row, "top": top})


@dataclass(frozen=True)
class Verdict:
    """P(the reply shown first is better) in [0, 1], and the label it was read from."""

    preference: float
    label: str


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
        return _decided(found)
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
    first, second = instructions.labels
    found = preference_from_logprobs(answer.top, swapped=False, tokens=(first, second))
    if found is None:
        raise JudgeFailure("no verdict", f"Neither {first!r} nor {second!r} is among the likeliest tokens.")
    return Verdict(2 - found, first if found < 1.5 else second)


def _check_whole(answer: Answer, instructions: Instructions) -> None:
    if answer.refusal or answer.finish == "content_filter":
        raise JudgeFailure("refused", f"The judge refused: {shown(answer.refusal or answer.finish)}.")
    # A one-token verdict always ends at its limit.
    if answer.finish == "length" and instructions.mode != "weighted":
        raise JudgeFailure("cut short", "The answer ended at its limit of tokens. Raise max_tokens of the judge.")


def _none(answer: Answer) -> JudgeFailure:
    return JudgeFailure("no verdict", f"The answer holds no verdict: {shown(answer.text[-60:])}.")


def _field(answer: Answer, name: str, instructions: Instructions) -> Any:
    """One field of an answer that is exactly one object of the schema's fields, each once."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a field comes twice")
        return dict(pairs)

    try:
        document = json.loads(answer.text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise JudgeFailure("no verdict", f"The answer is not JSON ({ascii(str(error))[1:-1]}).") from None
    wanted = instructions.schema()
    if not isinstance(document, dict) or wanted is None or set(document) != set(wanted["properties"]):
        found = ascii(sorted(document)) if isinstance(document, dict) else shown(document)
        raise JudgeFailure("no verdict", f"The answer holds {shown(found)}; expected the schema's fields, no others.")
    return document[name]
