"""Judges by name that need no endpoint: the grammar that `coala align --judge` and `coala eval judge` share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from coala.evaluation.judges.scorers import RULES, RuleJudge, WordJudge
from coala.values import CoalaError

JudgeKind = Literal["head", "rule", "words", "replay"]
KINDS: tuple[JudgeKind, ...] = ("head", "rule", "words", "replay")
GRAMMAR = "head:RUN, rule:NAME[:ARGUMENT], words:FILE or a word-judge file"


@dataclass(frozen=True)
class NamedJudge:
    """A judge's ``kind`` and what stands behind the colon: a run folder, a rule or a file."""

    kind: JudgeKind
    rest: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.rest}"

    @property
    def path(self) -> Path | None:
        """The file or folder it is read from; None for a rule."""
        return None if self.kind == "rule" else Path(self.rest)

    def scorer(self) -> RuleJudge | WordJudge:
        """The judge itself, for kinds that score a text by itself; :class:`CoalaError` for one that cannot be had."""
        if self.kind == "rule":
            return RuleJudge.parse(self.rest)
        if self.kind == "words":
            return WordJudge.load(self.rest)
        raise CoalaError(f"--judge {self}: found a judge of kind {self.kind}, expected rule or words.")


def named_judge(text: str) -> NamedJudge | None:
    """``head:RUN``, ``rule:...``, ``words:FILE`` or ``replay:FILE``; None for what has none of these forms."""
    named, colon, rest = text.partition(":")
    kind = next((one for one in KINDS if colon and one == named), None)
    if kind is None:
        return None
    if not rest:
        example = {"head": "head:runs/mine", "rule": f"rule:{next(iter(RULES))}", "replay": "replay:judgements.jsonl"}
        raise CoalaError(f"--judge {text}: names none; expected one such as {example.get(kind, 'words:judge.json')}.")
    return NamedJudge(kind, rest)


def local_judge(text: str) -> NamedJudge:
    """A judge of a new run's replies: in the form of :func:`named_judge`, or a plain file of word weights.

    Raises :class:`CoalaError` for any other text.
    """
    found = named_judge(text)
    if found is None and Path(text).is_file():
        return NamedJudge("words", text)
    if found is None:
        kind, colon, _ = text.partition(":")
        if not colon and text in RULES:
            raise CoalaError(f"--judge {text}: found no such file; did you mean rule:{text}? Expected {GRAMMAR}.")
        what = f"found no judge of kind {kind!r} and no such file" if colon else "found no such file"
        raise CoalaError(f"--judge {text}: {what}. Expected {GRAMMAR}.")
    if found.kind == "replay":
        raise CoalaError(f"--judge {text}: new replies have no stored judgements. Expected {GRAMMAR}.")
    return found
