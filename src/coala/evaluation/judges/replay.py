"""A judge that repeats stored judgements, so that what was bought once can be counted again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from coala.evaluation.judges.protocol import JudgeFailure
from coala.values import CoalaError, Generation, Judgement, Turn


class ReplayJudge:
    """Answers from ``judgements``, found by prompt and by the sides' methods in their order.

    A comparison that was stored in the other order only is a failure (``not stored``), as a verdict says nothing
    about the order it was not given in; a stored failure is one again (``stored failure``). Judgements carry no texts:
    two that differ for one prompt and order cannot be told apart and are a :class:`CoalaError`.
    """

    def __init__(self, judgements: Iterable[Judgement], name: str | None = None) -> None:
        self._stored: dict[tuple[str, str, str], Judgement] = {}
        names = set()
        for judgement in judgements:
            names.add(judgement.judge)
            key = judgement.prompt_id, judgement.first, judgement.second
            found = self._stored.setdefault(key, judgement)
            if found != judgement:
                raise CoalaError(
                    f"Prompt {judgement.prompt_id!r} has two judgements of {judgement.first!r} against "
                    f"{judgement.second!r} that differ; a replay needs one. Keep one judge and one reply to a prompt."
                )
        if not self._stored:
            raise CoalaError("There is no judgement to repeat; expected at least one. Judge first.")
        self.name = name or min(names)

    def compare(self, prompt: Sequence[Turn], first: Generation, second: Generation) -> Judgement:
        sides = first.method, second.method
        if sides[0] == sides[1]:
            raise JudgeFailure("not stored", f"Both sides are {sides[0]!r}: stored judgements cannot distinguish them.")
        found = self._stored.get((first.prompt_id, *sides))
        if found is None:
            raise JudgeFailure(
                "not stored", f"No stored judgement of {sides[0]!r} against {sides[1]!r} for {first.prompt_id!r}."
            )
        if found.preference is None:
            raise JudgeFailure("stored failure", f"The stored judgement for {first.prompt_id!r} is a failure.")
        return Judgement(first.prompt_id, *sides, found.preference, self.name)
