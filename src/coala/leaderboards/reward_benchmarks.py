"""Benchmarks of reward models: from saved scores, with a run's head as the scorer, or by a rule that reads nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coala.callbacks import OnProgress
from coala.leaderboards.record import Outcome, fitted, interval, measure
from coala.messages import CoalaError
from coala.settings import RewardRule, SubsetWeights

if TYPE_CHECKING:
    from coala.evaluation.reward_benchmarks import Form, Ranking, RewardBenchmark, Scored
    from coala.report import Measure
    from coala.values import Estimate


def count_scores(
    form: str,
    scores: Path,
    *,
    files: Sequence[Path] = (),
    weights: SubsetWeights = "published",
    command: str = "",
) -> Outcome:
    """Figures of saved scores on the benchmark called ``form``; with its ``files``, items are known by their ids.

    ``weights`` says what subsets of RewardBench weigh: their published counts, or the rows there are.
    """
    from coala.evaluation.reward_benchmarks import FORMS, read_scores

    benchmark = FORMS[form].read(list(files)) if files else None
    found = {
        name or scores.name.partition(".")[0]: _ranked(form, scored, weights)
        for name, scored in read_scores(scores, form, benchmark).items()
    }
    paths = {"scores": scores, **_roles(files)}
    settings = {"weights": weights} if form == "rewardbench" else {}
    alone = _alone(form, benchmark, weights)
    return _outcome(FORMS[form], form, found, alone, files=paths, settings=settings, command=command)


def count_rule(form: str, rule: RewardRule, files: Sequence[Path], *, command: str = "") -> Outcome:
    """Figures of a rule that knows only the replies' lengths, or their styles: what a scorer has to be above."""
    from coala.evaluation.reward_benchmarks import FORMS

    benchmark = FORMS[form].read(list(files))
    found = {f"rule {rule}": FORMS[form].rank(benchmark.by_rule(rule))}
    return _outcome(FORMS[form], form, found, {}, files=_roles(files), settings={"rule": rule}, command=command)


def run_benchmark(
    form: str,
    run: Path,
    files: Sequence[Path],
    *,
    out: Path | None = None,
    name: str | None = None,
    batch_tokens: int = 4096,
    on_progress: OnProgress,
    command: str = "",
) -> Outcome:
    """The run's head scores the replies of ``files``, each distinct one once; replies to a prompt share its pass.

    ``out`` gets results.json in upstream's form, scores.json and ranking.json.
    """
    from coala.evaluation.reward_benchmarks import FORMS, score_rows
    from coala.export.rewardbench import results
    from coala.features import extract
    from coala.store import plain, save_json

    benchmark = FORMS[form].read(list(files))
    backbone, head = fitted(run)
    features = extract(
        benchmark.pairs,
        backbone,
        head.spec,
        prompt_features=head.needs_prompt,
        batch_tokens=batch_tokens,
        on_batch=lambda done, total, tokens: on_progress("replies", done, total),
    )
    scored = benchmark.scored(head.score(features.chosen, features.prompt))
    found = FORMS[form].rank(scored)
    called = name or run.resolve().name
    if out is not None:
        sections = {key: value.value for key, value in found.sections.items()}
        save_json(out / "results.json", results(found, called, head.spec))
        save_json(out / "scores.json", score_rows(scored))
        save_json(out / "ranking.json", {"by_section": sections, **plain(found)})
    settings = {"weights": "published"} if form == "rewardbench" else {}
    alone = _alone(form, benchmark, "published")
    paths = _roles(files)
    return _outcome(FORMS[form], form, {called: found}, alone, files=paths, settings=settings, command=command)


def one_source(scores: Path | None, files: Sequence[Path], rule: str | None, run: Path | None) -> None:
    """CoalaError unless it is clear who scores: saved scores, a rule or a run's head, the latter two with files."""
    if scores is not None and rule is not None:
        raise CoalaError("Found both saved scores and --rule, expected one scorer. Fix: leave one of them out.")
    if scores is None and not files:
        raise CoalaError(
            "Found no scores and no replies to score, expected one of them. Fix: name a file of scores, or give "
            "--replies FILE with --run RUN or --rule longer."
        )
    if scores is None and rule is None and run is None:
        raise CoalaError("Found replies and no scorer, expected one. Fix: add --run RUN or --rule longer.")


def _ranked(form: str, scored: Scored, weights: SubsetWeights) -> Ranking:
    from coala.evaluation.reward_benchmarks import FORMS
    from coala.evaluation.reward_benchmarks.rewardbench import rank_rewardbench

    return rank_rewardbench(scored, weights=weights) if form == "rewardbench" else FORMS[form].rank(scored)


def _alone(form: str, benchmark: RewardBenchmark | None, weights: SubsetWeights) -> dict[str, Ranking]:
    """What length alone would give, where texts are there."""
    if benchmark is None:
        return {}
    return {f"rule {rule}": _ranked(form, benchmark.by_rule(rule), weights) for rule in ("longer", "shorter")}


def _roles(files: Sequence[Path]) -> dict[str, Path]:
    from coala.evaluation.reward_benchmarks.reading import files_of

    files = [Path(file) for file in files_of(files)] if files else []
    return {"benchmark" if len(files) == 1 else f"benchmark {n}": file for n, file in enumerate(files, 1)}


def _outcome(
    form: Form,
    kind: str,
    found: Mapping[str, Ranking],
    alone: Mapping[str, Ranking],
    *,
    files: Mapping[str, Path],
    settings: Mapping[str, Any],
    command: str,
) -> Outcome:
    """One record for all scorers of a file; ``alone`` are rules that are shown beside them."""
    from coala.report import Evaluation
    from coala.store import plain

    several = len(found) > 1
    tables: list[tuple[Sequence[Sequence[str]], Sequence[str]]] = []
    measures: list[Measure] = []
    facts: dict[str, Any] = {}
    remarks: list[str] = []
    for name, one in found.items():
        tag = f"{name}: " if several else ""
        headline = {form.overall: one.overall} if form.overall != "all pairs" else {}
        named = {**one.sections, "all pairs" if kind == "judgebench" else "all rows": one.rows, **headline}
        rows = [[part, interval(value, 4), str(value.n)] for part, value in (*one.subsets.items(), *named.items())]
        rows.append(["share of ties", f"{one.ties:.4f}", ""])
        tables += [([[f"\n{name}"]], ())] if several else []
        tables.append((rows, ["subset or section", "accuracy", "n"]))
        tables += [(_matrix(one), ["chosen \\ rejected", *_styles()])] if one.matrix else []
        measures += [measure(tag + part, value, even=_even(form, part, value)) for part, value in named.items()]
        measures += [measure(tag + part, value) for part, value in one.subsets.items()]
        facts |= {f"{tag}share of ties": one.ties}
    for remark in dict.fromkeys(remark for one in found.values() for remark in one.remarks):
        who = [name for name, one in found.items() if remark in one.remarks]
        remarks.append(remark if len(who) == len(found) else f"{', '.join(who)}: {remark}")
    for name, one in alone.items():
        best = one.rows if math.isnan(one.overall.value) else one.overall
        about = "all rows" if best is one.rows else form.overall
        measures.append(measure(f"{name}, {about}", best))
        tables.append(([[f"{name}: {about} {interval(best, 4)} (n={best.n})"]], ()))
    of = next(iter(found)) if not several else f"{len(found)} scorers"
    evaluation = Evaluation(
        kind=kind,
        of=of,
        title=f"{form.title}: {of}",
        command=command,
        measures=measures,
        files=dict(files),
        settings=dict(settings),
        facts=facts,
        remarks=tuple(remarks),
    )
    result = {"scorers": {name: plain(one) for name, one in found.items()}} if several else plain(found[of])
    return Outcome(evaluation, result, tables, remarks=tuple(remarks))


def _even(form: Form, part: str, value: Estimate) -> float | None:
    """What a coin gives, where one number says it."""
    return None if part.startswith("Ties") or math.isnan(value.value) else form.chance


def _matrix(found: Ranking) -> list[list[str]]:
    return [[style, *(interval(cell) for cell in row)] for style, row in zip(_styles(), found.matrix, strict=True)]


def _styles() -> Sequence[str]:
    from coala.evaluation.reward_benchmarks.rm_bench import STYLES

    return STYLES
