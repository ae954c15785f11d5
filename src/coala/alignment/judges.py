"""The judges of a run's replies: checked before the work begins, loaded when there is something to judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from coala.alignment.parts import load_parts
from coala.evaluation.judges.named import NamedJudge, local_judge
from coala.recipe import recipe_of
from coala.store import RunFolder, StoreError, digest, file_digest, head_stamp, load_head
from coala.values import Generation, Pair, Turn, user

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.evaluation.judges import Judge
    from coala.values import ConvexHead


def check_judge(text: str) -> NamedJudge:
    """Raise :class:`~coala.values.CoalaError` unless ``text`` names a judge that can judge; loads no model."""
    found = local_judge(text)
    if found.kind == "head":
        _head_of(found)
    else:
        found.scorer()
    return found


def judge_stamp(text: str) -> str:
    """A digest of all that decides a judge's verdicts."""
    found = local_judge(text)
    if found.kind == "head":
        run = _head_of(found)
        rater = recipe_of(run.settings, run.path / "run.json").guidance.rater
        return digest("head", head_stamp(run.path / "head", rater))
    return digest(found.kind, found.rest) if found.path is None else file_digest(found.path)


def judge_name(text: str) -> tuple[str, str]:
    """A judge's name for people, and what its file says about it."""
    found = local_judge(text)
    if found.kind == "head":
        return f"head {_head_of(found).path.resolve().name}", ""
    scorer = found.scorer()
    return scorer.name, getattr(scorer, "about", "")


def open_judge(text: str) -> Judge:
    """The judge itself; that of a head loads its model."""
    from coala.evaluation.judges import HeadJudge

    found = local_judge(text)
    if found.kind != "head":
        return found.scorer()
    backbone, head, _ = load_parts(_head_of(found).path)
    return HeadJudge(judge_name(text)[0], HeadScorer(head, backbone))


@dataclass
class HeadScorer:
    """The head's score of a reply; each is read once, however often it is asked about."""

    head: ConvexHead
    backbone: LanguageModel
    known: dict[tuple[Any, str], float] = field(default_factory=dict)

    def __call__(self, prompt: Sequence[Turn], reply: Generation) -> float:
        from coala.features import extract

        key = tuple(prompt), reply.text
        if key not in self.known:
            pair = Pair(tuple(prompt) or user(""), reply.text, reply.text, "")
            found = extract([pair], self.backbone, self.head.spec, prompt_features=self.head.needs_prompt)
            self.known[key] = float(self.head.score(found.chosen, found.prompt)[0])
        return self.known[key]


def _head_of(named: NamedJudge) -> RunFolder:
    assert named.path is not None
    run = RunFolder.open(named.path)
    if not (run.path / "head" / "head.json").is_file():
        raise StoreError(f"{run.path}: has no fitted head yet, so it cannot judge. Fix: finish it with `coala align`.")
    load_head(run.path / "head")
    return run
