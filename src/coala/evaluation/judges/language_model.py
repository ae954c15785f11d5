"""A loaded language model as a judge: which of the verdicts does it expect to follow the question?

No text is sampled, so nothing is random and no thought comes before a verdict. Knows no model: it is given a function.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coala.endpoint import Completion as Answer
from coala.evaluation.judges.instructions import Instructions, asked
from coala.evaluation.judges.protocol import Cost, JudgeFailure, JudgeStopped
from coala.evaluation.mtbench import HIGHEST, LOWEST
from coala.values import CoalaError, Generation, Judgement, Turn, conversation_text

LogProbs = Callable[[Sequence[Turn], Sequence[str]], Sequence[float]]


@dataclass(frozen=True)
class LanguageModelJudge:
    """P(first is better) = exp(l_1) / (exp(l_1) + exp(l_2)), l the log-probabilities of the two labels as the reply.

    ``log_probs(prompt, replies)`` gives the log-probability (nats) of each reply to a prompt, as
    :func:`coala.decoding.log_likelihood` does. ``instructions`` are of mode ``weighted``; labels of one token each
    compare fairly, a longer one loses probability with every token.
    """

    name: str
    instructions: Instructions
    log_probs: LogProbs

    def __post_init__(self) -> None:
        if self.instructions.mode != "weighted":
            raise CoalaError(
                f"Judge {self.instructions.name!r} is of mode {self.instructions.mode}; a local model is read by the "
                "probabilities of two labels. Name a judge of mode weighted."
            )

    def compare(self, prompt: Sequence[Turn], first: Generation, second: Generation) -> Judgement:
        if not prompt:
            raise JudgeStopped(f"Judge {self.name!r} needs the prompts. Fix: pass them by id.")
        exchange = asked([conversation_text(prompt)], [[first.text], [second.text]])
        messages = self.instructions.prompt_for(exchange).fill(exchange)
        # Instructions and question in one turn: not every model's template has a place for a system's turn.
        turn = Turn("user", "\n\n".join(message["content"] for message in messages))
        labels = self.instructions.labels
        found = [float(value) for value in self.log_probs((turn,), labels)]
        if len(found) != 2 or any(map(math.isnan, found)) or not math.isfinite(max(found)):
            raise JudgeFailure("no verdict", f"The model gives the labels {labels} the log-probabilities {found}.")
        value = 1 / (1 + math.exp(min(found[1] - found[0], 700.0)))
        return Judgement(first.prompt_id, first.method, second.method, value, self.name)


class LocalEndpoint:
    """A loaded model in the place of an endpoint: it answers with one of the verdicts that ``instructions`` know.

    Of two or more labels the likeliest, with both log-probabilities for a ``weighted`` judge. A grade is the mean of
    1 to 10 under the probabilities of the ten grades, to two decimals. Each verdict is scored as a whole reply, in the
    form that the judge's parser reads. ``identity`` has to change with the model: answers are kept under it.
    """

    def __init__(self, instructions: Instructions, log_probs: LogProbs, identity: str) -> None:
        self.identity = identity
        self._instructions, self._log_probs = instructions, log_probs
        self._calls = self._answers = 0

    @property
    def cost(self) -> Cost:
        return Cost(calls=self._calls, answers=self._answers)

    def ask(self, request: Mapping[str, Any]) -> Answer:
        told = self._instructions
        verdicts: Sequence[str | int]
        verdicts = range(int(LOWEST), int(HIGHEST) + 1) if told.mode == "grade" else told.labels
        # Instructions and question in one turn: not every model's template has a place for a system's turn.
        turn = Turn("user", "\n\n".join(message["content"] for message in request["messages"]))
        self._calls += 1
        found = [float(value) for value in self._log_probs((turn,), [self._said(verdict) for verdict in verdicts])]
        if len(found) != len(verdicts) or any(map(math.isnan, found)) or not math.isfinite(max(found)):
            raise JudgeFailure("no verdict", f"The model gives the verdicts the log-probabilities {found}.")
        self._answers += 1
        if told.mode == "weighted":
            top = tuple(zip(told.labels, found, strict=True))
            return Answer(max(top, key=lambda one: one[1])[0], top=top)
        if told.mode == "grade":
            weights = [math.exp(value - max(found)) for value in found]
            mean = sum(w * grade for w, grade in zip(weights, range(1, len(found) + 1), strict=True)) / sum(weights)
            return Answer(self._said(round(mean, 2)))
        return Answer(self._said(told.labels[found.index(max(found))]))

    def begin(self) -> None: ...

    def interrupt(self) -> None: ...

    def _said(self, verdict: str | float) -> str:
        """A verdict in the form in which it is read."""
        if self._instructions.parser == "json":
            name = "rating" if self._instructions.mode == "grade" else "verdict"
            return json.dumps({"reason": "", name: verdict})
        return str(verdict) if self._instructions.mode == "weighted" else f"[[{verdict}]]"
