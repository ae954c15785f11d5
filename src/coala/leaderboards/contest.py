"""A run against a reference on a benchmark's prompts, end to end: replies, judgements, and what can be resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from coala.callbacks import OnFailure, OnNote, OnProgress, quiet
from coala.leaderboards.judges import VERDICTS, Chosen, JudgeSettings, choose

if TYPE_CHECKING:
    from coala.alignment.answers import PromptRow, ReplySettings
    from coala.evaluation.arena import Battles
    from coala.evaluation.harness import Judged
    from coala.store import RunFolder
    from coala.values import Generation, Turn


@dataclass(frozen=True)
class RunVsReference:
    """Both sides' replies in the order of the prompts, and what the judge said of them."""

    asked: Sequence[PromptRow]
    ours: Sequence[Generation]
    reference: Sequence[Generation]
    chosen: Chosen
    found: Judged
    battles: Battles | None

    @property
    def prompts(self) -> Mapping[str, Sequence[Turn]]:
        return {one.id: one.prompt for one in self.asked}


def hold(
    run: RunFolder,
    prompts: Path,
    reference: str | None,
    *,
    name: str,
    manner: ReplySettings,
    limit: int | None,
    judge: JudgeSettings,
    orders: Literal["both", "drawn"],
    on_progress: OnProgress,
    on_failure: OnFailure | None = None,
    note: OnNote = quiet,
) -> RunVsReference:
    """Answer what is not answered yet, judge what is not judged yet."""
    from coala.alignment.answers import UNGUIDED, answer, read_prompts, read_reference
    from coala.evaluation.arena_judging import battles
    from coala.evaluation.harness import judge_many
    from coala.evaluation.judges import ChatJudge
    from coala.values import CoalaError

    asked = read_prompts(prompts)[:limit]
    # What can be wrong with the judge or the reference is told before hours of answering.
    try:
        theirs = [] if reference == UNGUIDED else read_reference(reference or prompts, asked)
    except CoalaError as error:
        if reference is not None:
            raise
        raise CoalaError(
            f"{error}\nThe prompts come without a baseline's replies: name them with --reference FILE, or compare with "
            "the run's own model by --reference unguided."
        ) from None
    chosen = choose(judge.name, judge.local, judge.service, judge.cache or run.path / VERDICTS, note)
    with nullcontext() if chosen.kept is None else chosen.kept:
        ours = answer(run, asked, manner, on_reply=lambda done, total: on_progress("replies", done, total))
        if reference == UNGUIDED:
            plain = replace(manner, guided=False)
            theirs = answer(run, asked, plain, on_reply=lambda done, total: on_progress("unguided", done, total))
        ours = [replace(reply, method=name) for reply in ours]
        method = UNGUIDED if reference == UNGUIDED else theirs[0].method
        theirs = [
            replace(reply, method=method if method != name else f"{method} (reference)", seed=ours[0].seed)
            for reply in theirs
        ]
        found = judge_many(
            ours,
            theirs,
            chosen.judge,
            swap=True if orders == "both" else "drawn",
            prompts={one.id: one.prompt for one in asked},
            concurrency=chosen.at_once(judge.concurrency),
            on_progress=lambda done, total: on_progress("judge", done, total),
            on_failure=on_failure,
        )
        if found.stopped and all(judgement.preference is None for judgement in found.judgements):
            raise CoalaError(f"{found.stopped} The replies are saved; rerun the same command to resume.")
        fought = None
        if isinstance(chosen.judge, ChatJudge) and chosen.judge.instructions.mode == "arena":
            fought = battles(ours, theirs, chosen.judge, {one.id: one.prompt for one in asked})
    return RunVsReference(asked, ours, theirs, chosen, found, fought)


def one_source(run: RunFolder | None, prompts: Path | None, saved: Path | None, what: str) -> None:
    """CoalaError unless either ``run`` is to answer ``prompts`` or ``saved`` judgements are to be counted."""
    from coala.values import CoalaError

    if (saved is None) == (prompts is None):
        raise CoalaError(
            f"Give either a file of {what}, or --run RUN and --prompts FILE to have a run answer and a judge judge."
        )
    if prompts is not None and run is None:
        raise CoalaError("--prompts needs --run RUN, the run that answers them.")


def own_name(run: RunFolder, manner: ReplySettings) -> str:
    """What a run is called in results if nothing else is said."""
    other = " ".join(f"{value}" for value in manner.guidance.values())
    return " ".join(filter(None, (run.path.resolve().name, other if manner.guided else "unguided")))


def described(run: RunFolder, manner: ReplySettings) -> dict[str, Any]:
    """How the run answered, for a record: flags over the recipe."""
    settings = run.settings
    return {
        "model": settings["model"]["name"],
        "guidance": {**settings["guidance"], **manner.guidance} if manner.guided else "none",
        "max new tokens": manner.max_new_tokens or settings["evaluation"]["max_new_tokens"],
        "temperature": settings["evaluation"]["temperature"] if manner.temperature is None else manner.temperature,
        "seed": manner.seed,
    }


def given_reference(reference: str | None) -> dict[str, Path]:
    """The file of replies, if one was named."""
    return {"reference": Path(reference)} if reference is not None and Path(reference).is_file() else {}
