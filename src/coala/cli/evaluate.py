"""`coala eval`: figures of published benchmarks from saved judgements; `judge` and `grade` make judgements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from coala.cli import judge

if TYPE_CHECKING:
    from coala.evaluation.arena import Battles
    from coala.evaluation.arena_style import StyleControlled
    from coala.values import Estimate

app = typer.Typer(no_args_is_help=True, help="Have replies judged; compute benchmark figures from saved judgements.")
app.command("judge")(judge.judge)
app.command("grade")(judge.grade)

Seed = Annotated[int, typer.Option(min=0, help="Seed of the bootstrap, and of the folds of cross-validation.")]


class By(StrEnum):
    """How an instruction finds its difficulty."""

    position = "position"
    instruction = "instruction"


class Board(StrEnum):
    """Which published interval to print."""

    old = "v0.1"
    new = "v2.0"


class Rule(StrEnum):
    """Which of several verdicts counts."""

    last = "last"
    unanimous = "unanimous"


class Weigh(StrEnum):
    """What subsets weigh in their section."""

    published = "published"
    rows = "rows"


@app.command(
    epilog="Example: `coala eval alpaca annotations.jsonl.gz --calibration df_gamed.csv "
    "--difficulty instruction_difficulty.csv`"
)
def alpaca(
    annotations: Annotated[
        Path, typer.Argument(help="Annotations of one model: JSON Lines or one list, plain or .gz.")
    ],
    calibration: Annotated[
        Path | None, typer.Option(help="The authors' df_gamed.csv, or a stand-in; needed for length control.")
    ] = None,
    difficulty: Annotated[
        Path | None, typer.Option(help="Difficulty of every instruction; needed for length control.")
    ] = None,
    difficulty_by: Annotated[
        By, typer.Option(help="`position` as the published figures, even where rows are missing; or `instruction`.")
    ] = By.position,
    penalty: Annotated[
        str, typer.Option(help="C of the L1 fit: a number, `cv` (chosen by five folds) or `none` (maximum likelihood).")
    ] = "cv",
    outputs: Annotated[
        Path | None, typer.Option(help="The model's whole output file, for the average length that is published.")
    ] = None,
    draws: Annotated[int, typer.Option(min=0, help="Bootstrap draws for the length-controlled interval.")] = 200,
    seed: Seed = 0,
) -> None:
    """AlpacaEval 2: win rate, its counts and lengths and, with both files, the length-controlled win rate."""
    from coala.cli.screen import table
    from coala.evaluation.alpaca import read_annotations, read_output_lengths, win_rate
    from coala.evaluation.length_control import length_controlled, read_calibration, read_difficulty
    from coala.values import CoalaError

    if (calibration is None) != (difficulty is None):
        raise CoalaError("Length control needs two files: give both --calibration and --difficulty, or neither.")
    wanted = _penalty(penalty)
    rows = read_annotations(annotations)
    raw = win_rate(rows, None if outputs is None else read_output_lengths(outputs))
    shown = [
        ["win rate", _interval(raw.win_rate)],
        ["standard error", f"{raw.standard_error:.4f}"],
        ["wins / losses / ties", f"{raw.n_wins} / {raw.n_wins_base} / {raw.n_draws}"],
        ["discrete", f"{raw.discrete:.4f}"],
        ["excluding ties", _interval(raw.excluding_ties)],
        ["average length", f"{raw.average_length} characters"],
        ["reference", f"{raw.baseline}, {raw.baseline_length:.0f} characters on average"],
    ]
    result: dict[str, Any] = {"model": raw.model, "raw": raw}
    remarks = raw.remarks
    if calibration is not None and difficulty is not None:
        controlled = length_controlled(
            rows,
            read_difficulty(difficulty),
            read_calibration(calibration),
            penalty=wanted,
            difficulty_by="position" if difficulty_by is By.position else "instruction",
            draws=draws,
            seed=seed,
        )
        beside = (
            f"n = {controlled.win_rate.n}, against {controlled.baseline} ({controlled.baseline_length:.0f} characters)"
        )
        shown.insert(1, ["length-controlled", f"{_interval(controlled.win_rate)} {beside}"])
        shown.insert(3, ["its published error", f"{controlled.standard_error:.4f}"])
        result["length_controlled"] = {k: v for k, v in vars(controlled).items() if k != "predictions"}
        remarks += tuple(remark for remark in controlled.remarks if remark not in remarks)
    table(shown, [raw.model, "percent"])
    finish(result, remarks)


@app.command(epilog="Example: `coala eval mtbench gpt-4_single.jsonl --questions question.jsonl`")
def mtbench(
    judgements: Annotated[Path, typer.Argument(help="Single-answer or pairwise judgements: JSON Lines, plain or .gz.")],
    questions: Annotated[
        Path | None, typer.Option(help="Question file with categories, where judgements name none.")
    ] = None,
) -> None:
    """MT-Bench: mean ratings overall, by turn and by category; or wins, losses and ties of two models."""
    from coala.cli.screen import table
    from coala.evaluation import mtbench as bench

    if bench.is_pairwise(judgements):
        matches, remarks = bench.read_matches(judgements)
        contests = bench.contests(matches)
        table(
            [
                [
                    one.model,
                    f"{one.wins} / {one.losses} / {one.ties}",
                    *(f"{rate.value:.4f}" for rate in (one.win_rate, one.loss_rate)),
                    *map(_interval, (one.adjusted, one.excluding_ties)),
                    str(one.n_errors),
                ]
                for one in contests.values()
            ],
            ["model", "win / loss / tie", "win rate", "loss rate", "adjusted", "excluding ties", "errors"],
        )
        finish({"matches": contests}, remarks + _said(contests))
        return
    categories = None if questions is None else bench.read_categories(questions)
    ratings, remarks = bench.read_ratings(judgements, categories)
    scores = bench.scores(ratings)
    for one in scores.values():
        parts = {"overall": one.overall}
        parts |= {f"turn {turn}": value for turn, value in one.by_turn.items()} | dict(one.by_category)
        table([[name, _interval(value), str(value.n)] for name, value in parts.items()], [one.model, "score", "n"])
    finish({"scores": scores}, remarks + _said(scores))


@app.command(epilog="Example: `coala eval arena judgements.jsonl --model MODEL --baseline gpt-4-0314`")
def arena(
    judgements: Annotated[
        Path,
        typer.Argument(help="Judgements of two games each, or battles (model, question, winner); JSON Lines or CSV."),
    ],
    baseline: Annotated[str, typer.Option(help="The model that all others are compared with.")] = "gpt-4-0314",
    model: Annotated[str | None, typer.Option(help="The judged model, where the rows do not name it.")] = None,
    board: Annotated[Board, typer.Option(help="Published interval: v0.1 95 %, v2.0 90 %, both over rows.")] = Board.old,
    rule: Annotated[
        Rule, typer.Option(help="Of several verdicts: the `last`, or none unless `unanimous`.")
    ] = Rule.last,
    style: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=ANSWERS", help="Answers of a model, the baseline's too, to hold style fixed; repeat."
        ),
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Bootstrap draws.")] = 1000,
    seed: Seed = 0,
) -> None:
    """Arena-Hard: win rate against the baseline with the interval that counts questions, beside the published one."""
    from coala.cli.screen import table
    from coala.evaluation.arena import read_battles, score

    battles = read_battles(
        judgements, model=model, baseline=baseline, rule="last" if rule is Rule.last else "unanimous"
    )
    published: Literal["v0.1", "v2.0"] = "v0.1" if board is Board.old else "v2.0"
    scores = score(battles, baseline, board=published, draws=draws, seed=seed)
    controlled = _styled(battles, style, baseline, published, draws, seed) if style else None
    rows = []
    for one in sorted(scores.values(), key=lambda one: -one.score.value):
        rating = f"{one.rating:.1f}" if math.isfinite(one.rating) else "-"
        ends = f"[{one.published_interval.low:.2f}, {one.published_interval.high:.2f}]"
        counts = f"{one.wins} / {one.losses} / {one.ties}"
        cells = [one.model, _interval(one.score), ends, _interval(one.excluding_ties), counts, rating, str(one.score.n)]
        rows.append([*cells, *([_interval(controlled.scores[one.model])] if controlled else [])])
    head = ["model", "score, over questions", f"over rows ({board.value})", "excluding ties", "win / loss / tie"]
    table(rows, [*head, "rating", "battles", *(["style controlled"] if controlled else [])])
    result: dict[str, Any] = {"baseline": baseline, "scores": scores, "failed_games": battles.n_failed}
    if controlled:
        result["style_controlled"] = controlled
    finish(result, battles.remarks)


@app.command(epilog="Example: `coala eval rewardbench scores.jsonl`")
def rewardbench(
    scores: Annotated[
        Path, typer.Argument(help="Rows with subset, chosen_score and rejected_score: JSON Lines or CSV, plain or .gz.")
    ],
    weights: Annotated[
        Weigh, typer.Option(help="What subsets weigh: their `published` example counts, or the file's `rows`.")
    ] = Weigh.published,
) -> None:
    """RewardBench: ranking accuracy by subset, a tie counting as wrong, and example-weighted section scores."""
    from coala.cli.screen import table
    from coala.evaluation.rewardbench import ranking, read_scores

    found = ranking(read_scores(scores), weights="published" if weights is Weigh.published else "rows")
    named = {**found.sections, "all rows": found.rows}
    table(
        [[name, _interval(value, 4), str(value.n)] for name, value in (*found.subsets.items(), *named.items())]
        + [["mean of sections", f"{found.overall:.4f}", ""], ["share of ties", f"{found.ties:.4f}", ""]],
        ["subset or section", "accuracy", "n"],
    )
    finish(asdict(found), found.remarks)


def _styled(
    battles: Battles, named: Sequence[str], baseline: str, version: Literal["v0.1", "v2.0"], draws: int, seed: int
) -> StyleControlled:
    """Style control with answer files given as NAME=FILE."""
    import numpy as np

    from coala.evaluation.arena_style import read_styles, style_controlled
    from coala.values import CoalaError

    files = {}
    for item in named:
        name, sign, file = item.rpartition("=")
        if not sign or not name or not file:
            raise CoalaError(f"--style {item!r}: expected NAME=ANSWERS, such as {baseline}=answers.jsonl.")
        files[name] = read_styles(file)
    if lacking := [name for name in battles.models if name not in files]:
        raise CoalaError(f"Style control needs the answers of every model; missing {lacking[0]!r}. Add --style for it.")
    sides = []
    for side in (battles.first.tolist(), battles.second.tolist()):
        for name, question in zip(side, battles.question.tolist(), strict=True):
            if question not in files[name]:
                raise CoalaError(f"The answers of {name!r} have none for question {question!r}. Add it to the file.")
        sides.append(np.array([files[n][q] for n, q in zip(side, battles.question.tolist(), strict=True)]))
    # Every draw refits the model: no more of them than the published boards use.
    return style_controlled(battles, sides[0], sides[1], baseline, version=version, draws=min(draws, 100), seed=seed)


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


def _interval(found: Estimate, digits: int = 2) -> str:
    if not math.isfinite(found.value):
        return "-"
    ends = (f"{end:.{digits}f}" if math.isfinite(end) else "?" for end in (found.low, found.high))
    return f"{found.value:.{digits + 2}f} [{', '.join(ends)}]"


def _said(parts: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{name}: {remark}" for name, part in parts.items() for remark in part.remarks)


def finish(result: Mapping[str, Any], remarks: Sequence[str]) -> None:
    """Remarks on stderr, then the JSON line, in which a number that is not finite is null."""
    from coala.cli.screen import emit, say

    def plain(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    for remark in remarks:
        say(f"note: {remark}")
    emit({**plain(result), "remarks": list(remarks)})
