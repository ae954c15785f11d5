"""AlpacaEval 2: from saved annotations, or end to end with a run and a judge; length control either way."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from coala.callbacks import OnFailure, OnNote, OnProgress, quiet
from coala.leaderboards.contest import RunVsReference, described, given_reference, hold, own_name
from coala.leaderboards.judges import JudgeSettings, stem
from coala.leaderboards.record import (
    Outcome,
    about,
    comparisons,
    judged_rows,
    measure,
    order_measures,
    spending,
    spread,
    told_interval,
)
from coala.settings import DifficultyBy, Stopping
from coala.values import CoalaError

if TYPE_CHECKING:
    from coala.alignment.answers import ReplySettings
    from coala.evaluation.alpaca import Annotations, WinRate
    from coala.evaluation.length_control import LengthControlled
    from coala.report import Measure
    from coala.statistics.intervals import Float
    from coala.store import RunFolder


@dataclass(frozen=True)
class LengthControl:
    """How length is controlled for: by the published calibration and difficulty files, or by the rows alone.

    ``penalty`` is C of the L1 fit, ``cv`` (chosen by five folds) or None (maximum likelihood); ``stopping`` is
    `optimum`, or `liblinear`: where the published fits stopped; ``difficulty_by`` says how an instruction finds its
    difficulty.
    """

    calibration: Path | None = None
    difficulty: Path | None = None
    difficulty_by: DifficultyBy = "position"
    penalty: float | Literal["cv"] | None = "cv"
    stopping: Stopping = "optimum"
    draws: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.calibration is None) != (self.difficulty is None):
            raise CoalaError("Length control needs two files: give both --calibration and --difficulty, or neither.")
        if self.files and self.stopping == "liblinear":
            from coala.evaluation.length_control import published_solver

            published_solver()  # what it needs is missed before anything is generated and judged

    @property
    def files(self) -> dict[str, Path]:
        both = {"calibration": self.calibration, "difficulty": self.difficulty}
        return {role: path for role, path in both.items() if path is not None}

    @property
    def settings(self) -> dict[str, Any]:
        if not self.files:
            return {}
        chosen = "none" if self.penalty is None else self.penalty
        by = {"penalty": chosen, "stopping": self.stopping, "difficulty by": self.difficulty_by}
        return {**by, "draws": self.draws, "seed": self.seed}

    def measures(self, rows: Annotations, outputs: Float | None, *, alone: bool) -> _Found:
        """All measures of annotated rows; ``alone`` controls length by them alone where there are no files."""
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
        measures = [measure("win rate", raw.win_rate, "percent", 50.0)]
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
            measures.append(measure("length-controlled win rate", controlled.win_rate, "percent", 50.0))
            facts["standard error of the length-controlled"] = error
            remarks += tuple(remark for remark in controlled.remarks if remark not in remarks)
        measures.append(measure("excluding ties", raw.excluding_ties, "percent", 50.0))
        facts |= {
            "wins / losses / ties": f"{raw.n_wins} / {raw.n_wins_base} / {raw.n_draws}",
            "without a preference": raw.n_missing,
            "average length": f"{raw.average_length} characters",
            "reference": f"{raw.baseline}, {raw.baseline_length:.0f} characters on average",
        }
        return _Found(raw, shown, result, measures, facts, remarks)

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
            stopping=self.stopping,
            difficulty_by=self.difficulty_by,
            draws=self.draws,
            seed=self.seed,
        )


def count_alpaca(
    annotations: Path, *, control: LengthControl, outputs: Path | None = None, command: str = ""
) -> Outcome:
    """The measures of saved annotations of one model; ``outputs`` is its whole output file, for its average length."""
    from coala.evaluation.alpaca import read_annotations, read_output_lengths
    from coala.report import Evaluation

    rows = read_annotations(annotations)
    found = control.measures(rows, None if outputs is None else read_output_lengths(outputs), alone=False)
    evaluation = Evaluation(
        kind="alpaca",
        of=f"{found.raw.model} {annotations.name.partition('.')[0]}",
        title=f"AlpacaEval 2: {found.raw.model} against {found.raw.baseline}",
        command=command,
        measures=found.measures,
        files={"annotations": annotations, **control.files, **({} if outputs is None else {"outputs": outputs})},
        judge=_annotators(annotations),
        settings=control.settings,
        facts=found.facts,
        samples=_samples(annotations),
        remarks=found.remarks,
    )
    return Outcome(evaluation, found.result, [(found.shown, [found.raw.model, "percent"])], remarks=found.remarks)


def run_alpaca(
    run: RunFolder,
    prompts: Path,
    reference: str | None = None,
    *,
    judge: JudgeSettings,
    manner: ReplySettings,
    control: LengthControl,
    on_progress: OnProgress,
    name: str | None = None,
    limit: int | None = None,
    one_order: bool = False,
    command: str = "",
    on_failure: OnFailure | None = None,
    on_note: OnNote = quiet,
) -> Outcome:
    """Have the run answer ``prompts`` and the judge compare with ``reference``, in both orders or one that is drawn.

    ``reference`` is a file of replies, ``unguided``, or None for the outputs in the file of prompts. Called again it
    resumes: replies and verdicts are kept. Without files of length control the run's own rows alone decide it.
    Annotations, outputs and judgements lie in RUN/alpaca, in the published forms.
    """
    from coala.evaluation.alpaca import read_annotations
    from coala.evaluation.win_rates import remarks_on
    from coala.report import Evaluation

    held = hold(
        run,
        prompts,
        reference,
        name=name or own_name(run, manner),
        manner=manner,
        limit=limit,
        judge=judge,
        orders="drawn" if one_order else "both",
        on_progress=on_progress,
        on_failure=on_failure,
        note=on_note,
    )
    sides, asks = (held.ours[0].method, held.reference[0].method), judge.service.model or judge.local
    parts = [*sides, judge.name, *(() if asks is None else (asks,)), *(("one-order",) * one_order)]
    folder = run.path / "alpaca" / "-".join(stem(str(part)) for part in parts)
    saved = _save(folder, held)
    found = control.measures(read_annotations(saved["annotations"]), None, alone=True)
    more = (*held.chosen.remarks, *remarks_on(held.found.judgements))
    said = held.found
    evaluation = Evaluation(
        kind="alpaca",
        of=f"{found.raw.model} {folder.name}",
        title=f"AlpacaEval 2: {found.raw.model} against {found.raw.baseline}, judged by {held.chosen.judge.name}",
        command=command,
        measures=[*found.measures, *order_measures(said)],
        files={"prompts": prompts, **given_reference(reference), **saved, **control.files, **held.chosen.files},
        judge=held.chosen.facts,
        settings={**control.settings, **described(run, manner), "orders": "one, drawn" if one_order else "both"},
        facts={**found.facts, **spending(said.n_unjudged, said.n_comparisons, said.stopped, said.cost, said.words)},
        failures=said.failures,
        samples=comparisons(held.ours, held.reference, said.judgements, held.prompts),
        remarks=(*found.remarks, *(remark for remark in more if remark not in found.remarks)),
    )
    paths = {role: str(path) for role, path in saved.items()}
    result = {**found.result, "judge": held.chosen.judge.name, **about(said), **paths}
    rows = [*found.shown, ["judged by", held.chosen.judge.name], *judged_rows(said)]
    return Outcome(evaluation, result, [(rows, [found.raw.model, "percent"])], said.stopped, evaluation.remarks)


@dataclass(frozen=True)
class _Found:
    """The measures, as they are printed, emitted and kept."""

    raw: WinRate
    shown: list[list[str]]
    result: dict[str, Any]
    measures: list[Measure]
    facts: dict[str, Any]
    remarks: tuple[str, ...]


def _save(folder: Path, held: RunVsReference) -> dict[str, Path]:
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
