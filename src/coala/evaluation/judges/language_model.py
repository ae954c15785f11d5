"""A loaded language model as a judge: which of the verdicts does it expect to follow the question?

No text is sampled, so nothing has to be parsed and nothing is random. Knows no model: it is given a function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coala.evaluation.judges.instructions import Instructions, asked
from coala.evaluation.judges.protocol import JudgeFailure, JudgeStopped
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
            raise JudgeStopped(f"Judge {self.name!r} has to see the prompts, and they were not given. Give them by id.")
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
