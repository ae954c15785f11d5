"""One set of replies against another: a run's guided ones against its unguided ones, or any two files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coala.callbacks import OnFailure, OnNote, OnProgress, quiet
from coala.leaderboards.judges import JudgeSettings, choose, kept_beside, load_replies, stem
from coala.leaderboards.record import (
    Outcome,
    about,
    comparisons,
    judged_rows,
    measure,
    order_measures,
    spending,
    told,
)
from coala.values import CoalaError, prompt_id

if TYPE_CHECKING:
    from coala.values import Generation, Turn


def run_pairwise(
    ours: Path,
    reference: Path | None = None,
    *,
    judge: JudgeSettings,
    pairs: Path | None = None,
    out: Path | None = None,
    one_order: bool = False,
    on_progress: OnProgress,
    command: str = "",
    on_failure: OnFailure | None = None,
    on_note: OnNote = quiet,
) -> Outcome:
    """Judge the replies in ``ours`` against those in ``reference`` in both orders; of one run folder, guided against
    unguided.

    Judgements go to ``out`` (default: beside the replies). Prompts come from ``pairs`` (default: pairs-eval.jsonl
    beside the replies). Called again it resumes: verdicts are cached, beside the replies unless ``judge`` says where.
    """
    from coala.evaluation import win_rate
    from coala.evaluation.arena import score
    from coala.evaluation.arena_judging import battles
    from coala.evaluation.harness import judge_many
    from coala.evaluation.judges import ChatJudge
    from coala.evaluation.win_rates import remarks_on
    from coala.report import Evaluation
    from coala.store import save_judgements

    sides = sides_of_run(ours, reference)
    mine, theirs = (load_replies(path) for path in sides)
    target = out or sides[0].parent / f"judgements-{stem(judge.name)}.jsonl"
    cache = judge.cache or kept_beside(sides[0].parent, target.parent, on_note)
    chosen = choose(judge.name, judge.local, judge.service, cache, on_note)
    with nullcontext() if chosen.kept is None else chosen.kept:
        prompts = _prompts(pairs, sides[0], mine, needed=chosen.sees_prompts)
        found = judge_many(
            mine,
            theirs,
            chosen.judge,
            swap=not one_order,
            prompts=prompts,
            concurrency=chosen.at_once(judge.concurrency),
            on_progress=lambda done, total: on_progress("judge", done, total),
            on_failure=on_failure,
        )
        if found.stopped and not found.judgements:
            raise CoalaError(found.stopped)
        fought = None
        if isinstance(chosen.judge, ChatJudge) and chosen.judge.instructions.mode == "arena":
            fought = battles(mine, theirs, chosen.judge, prompts)
    save_judgements(target, found.judgements)
    rate = win_rate(found.judgements)
    remarks = (*chosen.remarks, *remarks_on(found.judgements))
    result: dict[str, Any] = {"out": str(target), "judge": chosen.judge.name, "win_rate": rate, **about(found)}
    rows = [["win rate", told(rate)], *judged_rows(found)]
    measures = [measure("win rate", rate, even=0.5), *order_measures(found)]
    if fought is not None and len(fought):
        points = next(iter(score(fought, str(fought.second[0])).values())).score
        remarks += fought.remarks
        result["arena"] = points
        measures.insert(1, measure("percent of battles, a strong verdict being three", points, "percent", 50.0))
        rows.insert(1, ["percent of battles, a strong verdict being three", told(points)])
    ahead = found.judgements[0].first if found.judgements else "nothing to judge"
    names = [path.name.partition(".")[0].removeprefix("generations-") for path in sides]
    evaluation = Evaluation(
        kind="judge",
        of=f"{' '.join(names)} {stem(judge.name)}",
        title=f"{names[0]} against {names[1]}, judged by {chosen.judge.name}",
        command=command,
        measures=measures,
        files={"replies": sides[0], "reference": sides[1], "judgements": target, **chosen.files},
        judge=chosen.facts,
        settings={"orders": "ours first" if one_order else "both"},
        facts=spending(found.n_unjudged, found.n_comparisons, found.stopped, found.cost, found.words),
        failures=found.failures,
        remarks=remarks,
        samples=comparisons(mine, theirs, found.judgements, prompts, names=(names[0], names[1])),
    )
    table = rows, [ahead, f"judged by {chosen.judge.name}"]
    return Outcome(evaluation if rate.n else None, result, [table], found.stopped, remarks)


def sides_of_run(ours: Path, reference: Path | None) -> tuple[Path, Path]:
    """The two files; of one run folder its guided and its unguided replies."""
    if reference is not None:
        return _replies_file(ours), _replies_file(reference)
    found = ours / "generations-guided.jsonl", ours / "generations-unguided.jsonl"
    if not all(path.is_file() for path in found):
        there = "has no guided and unguided replies yet: finish it with `coala align`" if ours.is_dir() else "is a file"
        raise CoalaError(f"{ours}: {there}. To compare two files of replies, name both.")
    return found


def _replies_file(path: Path) -> Path:
    """The file itself, or the only generations-*.jsonl of a folder."""
    if not path.is_dir():
        return path
    found = sorted(path.glob("generations-*.jsonl"))
    if len(found) != 1:
        names = ", ".join(one.name for one in found) or "none"
        raise CoalaError(f"{path}: is a folder; expected one generations-*.jsonl in it, found {names}. Name the file.")
    return found[0]


def _prompts(
    pairs: Path | None, replies: Path, mine: Sequence[Generation], *, needed: bool
) -> Mapping[str, Sequence[Turn]]:
    """Prompts by id, as far as they are there; CoalaError for one that is ``needed`` and is not."""
    from coala.alignment.answers import read_prompts
    from coala.store import load_pairs

    path = pairs or replies.parent / "pairs-eval.jsonl"
    found: dict[str, Sequence[Turn]] = {}
    if pairs is not None:
        found = {one.id: one.prompt for one in read_prompts(pairs)}
    elif path.exists():
        found = {prompt_id(pair.prompt): pair.prompt for pair in load_pairs(path)}
    lacking = [reply.prompt_id for reply in mine if reply.prompt_id not in found]
    if needed and lacking:
        raise CoalaError(
            f"{len(lacking)} of {len(mine)} replies are to prompts that {path} does not hold (the first is "
            f"{lacking[0]!r}), and this judge needs them. Fix: pass the run's pairs with --pairs."
        )
    return found
