"""An evaluation on its way into a run: which run, samples, order effects and cost, and the record itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coala.callbacks import OnNote, quiet

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.evaluation.harness import Judged
    from coala.evaluation.judges import Cost
    from coala.report import Evaluation, Measure, Sample
    from coala.store import RunFolder
    from coala.values import ConvexHead, Estimate, Generation, Judgement, Turn


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found: the record that goes into a run's report, its tables, and its JSON.

    There is no record of an estimate over no verdict. ``tables`` are rows under headers. ``stopped`` says why the judge
    ended early, if it did.
    """

    evaluation: Evaluation | None
    result: Mapping[str, Any]
    tables: Sequence[tuple[Sequence[Sequence[str]], Sequence[str]]]
    stopped: str = ""
    remarks: Sequence[str] = ()


def run_of(named: Path | None, *files: Path | None) -> RunFolder | None:
    """The run that was named, else the one that the first of ``files`` to be in a run lies in."""
    from coala.store import RunFolder

    if named is not None:
        return RunFolder.open(named)
    for file in files:
        for folder in file.absolute().parents if file is not None else ():
            if (folder / "run.json").is_file() and (folder / "stages").is_dir():
                return RunFolder(folder)
    return None


def require_head(run: Path) -> None:
    """Say so if the run has no head."""
    from coala.store import RunFolder, StoreError

    if not (RunFolder.open(run).path / "head" / "head.json").is_file():
        raise StoreError(f"{run}: has no fitted head yet. Finish it with `coala align`, and try again.")


def fitted(run: Path) -> tuple[LanguageModel, ConvexHead]:
    """Model and head of a run; says so if it has none."""
    from coala.alignment import load_parts

    require_head(run)
    backbone, head, _ = load_parts(run)
    return backbone, head


def measure(name: str, estimate: Estimate, form: str = "share", even: float | None = None) -> Measure:
    from coala.report import Measure

    return Measure(name, estimate, form, even)  # type: ignore[arg-type]


def comparisons(
    ours: Sequence[Generation],
    reference: Sequence[Generation],
    judgements: Sequence[Judgement],
    prompts: Mapping[str, Sequence[Turn]],
    names: tuple[str, str] | None = None,
) -> list[Sample]:
    """A few comparisons, spread evenly over all, with what was said of them in each order.

    Sides are named as in the judgements, or by ``names``, ours first.
    """
    from coala.evaluation.harness import matched_replies, sides_of
    from coala.report import Sample

    said: dict[str, list[tuple[str, str]]] = {}
    for judgement in judgements:
        found = "no verdict" if judgement.preference is None else f"{judgement.preference:.2f}"
        said.setdefault(judgement.prompt_id, []).append((judgement.first, found))
    judged = [pair for pair in matched_replies(ours, reference) if pair[0].prompt_id in said]
    samples = []
    for mine, theirs in spread(judged):
        prompt = tuple(prompts.get(mine.prompt_id, ()))
        sides = sides_of(mine, theirs)
        called = dict(zip(sides, names or sides, strict=True))
        verdict = "; ".join(f"{called[first]} shown first: {found}" for first, found in said[mine.prompt_id])
        verdict = f"Probability that the reply shown first is better. {verdict}."
        replies = {called[sides[0]]: mine.text, called[sides[1]]: theirs.text}
        samples.append(Sample(prompt, replies, verdict))
    return samples


def spread(rows: Sequence[Any]) -> Sequence[Any]:
    """As many rows as a record shows, evenly over all."""
    from coala.report.evaluations import SAMPLES

    return rows[:: max(1, len(rows) // SAMPLES)][:SAMPLES]


def keep(run: RunFolder | None, evaluation: Evaluation, note: OnNote = quiet) -> dict[str, Any]:
    """The evaluation into the run's report, if there is a run; what the JSON line tells of it."""
    from coala.report import add_evaluation

    if run is None:
        return {}
    kept = add_evaluation(run, evaluation)
    page = run.path / "report.html"
    note(f"kept in {kept}" + (f" and shown in {page}" if page.exists() else f"; `coala report {run.path}` shows it"))
    return {"evaluation": str(kept)}


def about(found: Judged) -> dict[str, Any]:
    """Order effects, failures and cost for the JSON line."""
    costs = spent(found.failures, found.n_unjudged, found.stopped, found.cost, found.words)
    return {"n_comparisons": found.n_comparisons, **vars(found.consistency), **costs}


def spent(
    failures: Mapping[str, int], n_unjudged: int, stopped: str, cost: Cost, words: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "failures": failures,
        "failure_words": words,
        "n_unjudged": n_unjudged,
        "stopped": stopped,
        "cost": {**vars(cost), "tokens": cost.tokens},
    }


def order_measures(found: Judged) -> list[Measure]:
    """What order does to the judge, for a record; nothing where no comparison was judged in both orders."""
    from coala.report import Measure

    about = found.consistency
    if not about.position_bias.n:
        return []
    return [
        Measure("position bias", about.position_bias),
        Measure("inconsistency", about.inconsistency),
        Measure("preference for the reply shown first", about.first_place, "share", 0.5),
    ]


def spending(n_unjudged: int, n: int, stopped: str, cost: Cost, words: Mapping[str, str]) -> dict[str, Any]:
    """What was judged and at what cost, for a record."""
    said = f"{cost.calls} calls, {cost.answers} answers, {cost.tokens} tokens; {cost.kept} taken from the cache"
    found: dict[str, Any] = {"not judged": f"{n_unjudged} of {n}"}
    found |= {f"the first failure, {kind}": text for kind, text in words.items()}
    return found | ({"stopped": stopped} if stopped else {}) | {"cost of the last call": said}


def judged_rows(found: Judged) -> list[list[str]]:
    about = found.consistency
    return [
        *(
            [
                [
                    "position bias",
                    f"{about.position_bias}; {about.n_first} times the first, {about.n_second} the second",
                ],
                ["inconsistency", str(about.inconsistency)],
                ["preference for the first", str(about.first_place)],
            ]
            if about.position_bias.n
            else [["position bias", "no verdicts in both orders"]]
        ),
        *cost_rows(found.failures, found.cost, f"{found.n_unjudged} of {found.n_comparisons} comparisons", found.words),
    ]


def told(found: Estimate) -> str:
    """An estimate over verdicts, for a table."""
    return str(found) if found.n else "no verdicts"


def cost_rows(failures: Mapping[str, int], cost: Cost, unjudged: str, words: Mapping[str, str]) -> list[list[str]]:
    return [
        ["failed verdicts", ", ".join(f"{kind} {n}" for kind, n in failures.items()) or "none"],
        *([f"the first of them ({kind})", text] for kind, text in words.items()),
        ["not judged", unjudged],
        ["cost", f"{cost.calls} calls, {cost.answers} answers, {cost.tokens} tokens; {cost.kept} taken from the cache"],
    ]


def told_interval(found: Estimate) -> str:
    """The same without its n, for tables that have it in a column."""
    return interval(found) if found.n else "no verdicts"


def interval(found: Estimate, digits: int = 2) -> str:
    """Value and ends for a table."""
    if not math.isfinite(found.value):
        return found.absent if math.isnan(found.value) else "-"
    ends = (f"{end:.{digits}f}" if math.isfinite(end) else "?" for end in (found.low, found.high))
    return f"{found.value:.{digits + 2}f} [{', '.join(ends)}]"
