"""`coala eval alpaca`: AlpacaEval 2 from saved annotations, or end to end with a run that answers and a judge."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from coala.cli.options import (
    AskAgain,
    Attempts,
    BaseUrl,
    By,
    Cache,
    Concurrency,
    Download,
    KeyEnv,
    Limit,
    Local,
    MaxCalls,
    MaxNewTokens,
    MaxTokens,
    Model,
    OneOrder,
    Prompts,
    Reference,
    RunOption,
    Sampling,
    Temperature,
    Timeout,
    TrustCode,
    Unguided,
    service_of,
)
from coala.cli.output import NOT_ALL, command_line, tell_failures
from coala.leaderboards.contest import Contest, described, given_reference, hold, manner_of, needed, own_name
from coala.leaderboards.judges import JudgeSettings, stem
from coala.leaderboards.record import (
    about,
    comparisons,
    figure,
    judged_rows,
    keep,
    order_figures,
    run_of,
    spending,
    spread,
    told_interval,
)

if TYPE_CHECKING:
    from coala.evaluation.alpaca import Annotations, WinRate
    from coala.evaluation.length_control import LengthControlled
    from coala.evaluation.statistics import Float
    from coala.report import Figure


class DifficultyBy(StrEnum):
    """How an instruction finds its difficulty."""

    position = "position"
    instruction = "instruction"


class Stopping(StrEnum):
    """Where the fit of length control ends."""

    optimum = "optimum"
    liblinear = "liblinear"


Seed = Annotated[int, typer.Option(min=0, help="Seed of replies, of the bootstrap and of cross-validation's folds.")]


def alpaca(
    annotations: Annotated[
        Path | None, typer.Argument(help="Annotations of one model: JSON Lines or one list, plain or .gz.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="The authors' df_gamed.csv, or a stand-in; needed for length control.")
    ] = None,
    difficulty: Annotated[
        Path | None, typer.Option(help="Difficulty of every instruction; needed for length control.")
    ] = None,
    difficulty_by: Annotated[
        DifficultyBy,
        typer.Option(help="`position` as the published figures, even where rows are missing; or `instruction`."),
    ] = DifficultyBy.position,
    penalty: Annotated[
        str, typer.Option(help="C of the L1 fit: a number, `cv` (chosen by five folds) or `none` (maximum likelihood).")
    ] = "cv",
    stopping: Annotated[
        Stopping, typer.Option(help="`optimum`, or `liblinear`: where the published fits stopped, to reproduce them.")
    ] = Stopping.optimum,
    outputs: Annotated[
        Path | None, typer.Option(help="The model's whole output file, for the average length that is published.")
    ] = None,
    draws: Annotated[int, typer.Option(min=0, help="Bootstrap draws for the length-controlled interval.")] = 200,
    seed: Seed = 0,
    into: RunOption = None,
    prompts: Prompts = None,
    reference: Reference = None,
    name: Annotated[str | None, typer.Option(help="The model's name (default: the run folder's).")] = None,
    unguided: Unguided = False,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    limit: Limit = None,
    by: By = None,
    local: Local = None,
    model: Model = None,
    base_url: BaseUrl = None,
    key_env: KeyEnv = "OPENAI_API_KEY",
    one_order: OneOrder = False,
    cache: Cache = None,
    concurrency: Concurrency = 8,
    max_calls: MaxCalls = None,
    max_tokens: MaxTokens = None,
    attempts: Attempts = 6,
    timeout: Timeout = 180.0,
    ask_again: AskAgain = False,
    sampling: Sampling = None,
    trust_remote_code: TrustCode = False,
    download: Download = False,
) -> None:
    """AlpacaEval 2: win rate, its counts and lengths, and the length-controlled win rate.

    From annotations, or end to end: with --run and --prompts the run answers, a judge (`weighted` if none is named)
    compares with the reference, and the same command goes on after a kill: no reply is made and no verdict bought
    twice. Without both files of length control the run's own rows alone decide it.

    `coala eval alpaca --run RUN --prompts alpaca_eval.json --model gpt-4-1106-preview`
    """
    from coala.cli.output import finish, progress, say, table
    from coala.evaluation.alpaca import read_annotations, read_output_lengths
    from coala.evaluation.order_effects import remarks_on
    from coala.report import Evaluation
    from coala.values import CoalaError

    if (calibration is None) != (difficulty is None):
        raise CoalaError("Length control needs two files: give both --calibration and --difficulty, or neither.")
    control = _Control(calibration, difficulty, difficulty_by, _penalty(penalty), stopping, draws, seed)
    run = run_of(into, annotations)
    if not needed(into, prompts, annotations, "annotations"):
        assert annotations is not None
        rows = read_annotations(annotations)
        found = control.figures(rows, None if outputs is None else read_output_lengths(outputs), alone=False)
        table(found.shown, [found.raw.model, "percent"])
        files = {"annotations": annotations, **control.files, **({} if outputs is None else {"outputs": outputs})}
        evaluation = Evaluation(
            kind="alpaca",
            of=f"{found.raw.model} {annotations.name.partition('.')[0]}",
            title=f"AlpacaEval 2: {found.raw.model} against {found.raw.baseline}",
            command=command_line(),
            figures=found.figures,
            files=files,
            judge=_annotators(annotations),
            settings=control.settings,
            facts=found.facts,
            samples=_samples(annotations),
            remarks=found.remarks,
        )
        finish(found.result | keep(run, evaluation, say), found.remarks)
        return
    assert prompts is not None
    assert run is not None
    named = by or "weighted"
    service = service_of(model, base_url, key_env, max_calls, max_tokens, attempts, timeout, ask_again, sampling or ())
    manner = manner_of(unguided, max_new_tokens, temperature, seed)
    with progress() as show:
        held = hold(
            run,
            prompts,
            reference,
            name=name or own_name(run, manner),
            manner=manner,
            limit=limit,
            judge=JudgeSettings(named, service, local, cache, concurrency),
            orders="drawn" if one_order else "both",
            on_progress=show,
            on_failure=tell_failures(),
            note=say,
        )
    sides = held.ours[0].method, held.reference[0].method
    parts = [*sides, named, *(() if (model or local) is None else (model or local,)), *(("one-order",) * one_order)]
    folder = run.path / "alpaca" / "-".join(stem(str(part)) for part in parts)
    saved = _save(folder, held)
    found = control.figures(read_annotations(saved["annotations"]), None, alone=True)
    more = (*held.chosen.remarks, *remarks_on(held.found.judgements))
    remarks = (*found.remarks, *(said for said in more if said not in found.remarks))
    rate = ["judged by", held.chosen.judge.name]
    table([*found.shown, rate, *judged_rows(held.found)], [found.raw.model, "percent"])
    if held.found.stopped:
        say(f"stopped: {held.found.stopped}")
    given = given_reference(reference)
    evaluation = Evaluation(
        kind="alpaca",
        of=f"{found.raw.model} {folder.name}",
        title=f"AlpacaEval 2: {found.raw.model} against {found.raw.baseline}, judged by {held.chosen.judge.name}",
        command=command_line(),
        figures=[*found.figures, *order_figures(held.found)],
        files={"prompts": prompts, **given, **saved, **control.files, **held.chosen.files},
        judge=held.chosen.facts,
        settings={**control.settings, **described(run, manner), "orders": "one, drawn" if one_order else "both"},
        facts={
            **found.facts,
            **spending(
                held.found.n_unjudged, held.found.n_comparisons, held.found.stopped, held.found.cost, held.found.words
            ),
        },
        failures=held.found.failures,
        samples=comparisons(held.ours, held.reference, held.found.judgements, held.prompts),
        remarks=remarks,
    )
    paths = {role: str(path) for role, path in saved.items()}
    result = {**found.result, "judge": held.chosen.judge.name, **about(held.found), **paths}
    finish(result | keep(run, evaluation, say), remarks)
    if held.found.stopped:
        raise typer.Exit(NOT_ALL)


@dataclass(frozen=True)
class _Found:
    """The figures, as they are printed, emitted and kept."""

    raw: WinRate
    shown: list[list[str]]
    result: dict[str, Any]
    figures: list[Figure]
    facts: dict[str, Any]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class _Control:
    """What the flags say of length control."""

    calibration: Path | None
    difficulty: Path | None
    difficulty_by: DifficultyBy
    penalty: float | Literal["cv"] | None
    stopping: Stopping
    draws: int
    seed: int

    @property
    def files(self) -> dict[str, Path]:
        both = {"calibration": self.calibration, "difficulty": self.difficulty}
        return {role: path for role, path in both.items() if path is not None}

    @property
    def settings(self) -> dict[str, Any]:
        if not self.files:
            return {}
        chosen = "none" if self.penalty is None else self.penalty
        by = {"penalty": chosen, "stopping": self.stopping.value, "difficulty by": self.difficulty_by.value}
        return {**by, "draws": self.draws, "seed": self.seed}

    def figures(self, rows: Annotations, outputs: Float | None, *, alone: bool) -> _Found:
        """All figures of annotated rows; ``alone`` controls length by them alone where there are no files."""
        from coala.evaluation.alpaca import win_rate

        raw = win_rate(rows, outputs)
        shown = [
            ["win rate", told_interval(raw.win_rate)],
            ["standard error", _number(raw.standard_error)],
            ["wins / losses / ties", f"{raw.n_wins} / {raw.n_wins_base} / {raw.n_draws}"],
            ["discrete", _number(raw.discrete)],
            ["excluding ties", told_interval(raw.excluding_ties)],
            ["average length", f"{raw.average_length} characters"],
            ["reference", f"{raw.baseline}, {raw.baseline_length:.0f} characters on average"],
        ]
        result: dict[str, Any] = {"model": raw.model, "raw": raw}
        figures = [figure("win rate", raw.win_rate, "percent", 50.0)]
        facts: dict[str, Any] = {"standard error": raw.standard_error}
        remarks = raw.remarks
        controlled = self._controlled(rows, alone)
        if controlled is not None:
            mean = f"{controlled.baseline_length:.0f} characters"
            beside = f"n = {controlled.win_rate.n}, against {controlled.baseline} ({mean})"
            error = controlled.standard_error
            shown.insert(1, ["length-controlled", f"{told_interval(controlled.win_rate)} {beside}"])
            shown.insert(3, ["its published error" if self.files else "its standard error", _number(error)])
            result["length_controlled"] = {k: v for k, v in vars(controlled).items() if k != "predictions"}
            figures.append(figure("length-controlled win rate", controlled.win_rate, "percent", 50.0))
            facts["standard error of the length-controlled"] = error
            remarks += tuple(remark for remark in controlled.remarks if remark not in remarks)
        figures.append(figure("excluding ties", raw.excluding_ties, "percent", 50.0))
        facts |= {
            "wins / losses / ties": f"{raw.n_wins} / {raw.n_wins_base} / {raw.n_draws}",
            "without a preference": raw.n_missing,
            "average length": f"{raw.average_length} characters",
            "reference": f"{raw.baseline}, {raw.baseline_length:.0f} characters on average",
        }
        return _Found(raw, shown, result, figures, facts, remarks)

    def _controlled(self, rows: Annotations, alone: bool) -> LengthControlled | None:
        import numpy as np

        from coala.evaluation.length_control import length_controlled, read_calibration, read_difficulty

        if rows.nothing_said:
            return None
        if self.difficulty is None or self.calibration is None:
            if not alone or not np.isfinite(rows.preference).any():
                return None
            return length_controlled(rows, None, None, draws=self.draws, seed=self.seed)
        return length_controlled(
            rows,
            read_difficulty(self.difficulty),
            read_calibration(self.calibration),
            penalty=self.penalty,
            stopping="optimum" if self.stopping is Stopping.optimum else "liblinear",
            difficulty_by="position" if self.difficulty_by is DifficultyBy.position else "instruction",
            draws=self.draws,
            seed=self.seed,
        )


def _save(folder: Path, held: Contest) -> dict[str, Path]:
    """Annotations and outputs in the published forms, and the judgements."""
    from coala.evaluation.alpaca_judging import annotation_rows
    from coala.store import save_json, save_judgements, write_atomic

    model, baseline = held.ours[0].method, held.reference[0].method
    text, kind = {one.id: one.text for one in held.asked}, {one.id: one.category for one in held.asked}
    rows = annotation_rows(
        held.ours,
        held.reference,
        held.found.judgements,
        instructions=text,
        model=model,
        baseline=baseline,
        datasets=kind,
    )
    written = [
        {"instruction": text[r.prompt_id], "output": r.text, "generator": model, "dataset": kind[r.prompt_id]}
        for r in held.ours
    ]
    write_atomic(folder / "annotations.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    save_json(folder / "outputs.json", written)
    save_judgements(folder / "judgements.jsonl", held.found.judgements)
    return {
        "annotations": folder / "annotations.jsonl",
        "outputs": folder / "outputs.json",
        "judgements": folder / "judgements.jsonl",
    }


def _annotators(path: Path) -> dict[str, Any]:
    """Who annotated, as far as the rows tell."""
    from coala.evaluation.rows import read_rows

    names = sorted({str(row.get("annotator")) for row in read_rows(path) if row.get("annotator") is not None})
    return {"name": ", ".join(names)} if names else {}


def _samples(path: Path) -> list[Any]:
    """Rows that hold the texts they are about."""
    from coala.evaluation.rows import read_rows
    from coala.report import Sample

    fields = ("instruction", "output_1", "output_2", "preference")
    whole = [row for row in read_rows(path) if all(row.get(name) is not None for name in fields)]
    return [
        Sample(
            row.text("instruction"),
            {row.label("generator_2"): row.text("output_2"), row.label("generator_1"): row.text("output_1")},
            f"Preference {row.value('preference'):.3f}; 2 says that {row.label('generator_2')} is surely better.",
        )
        for row in spread(whole)
    ]


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"


def _penalty(text: str) -> float | Literal["cv"] | None:
    from coala.values import CoalaError

    if text == "cv":
        return "cv"
    if text == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise CoalaError(f"--penalty {text!r}: expected a positive number, `cv` or `none`.")
    return value
