"""The length-controlled win rate of AlpacaEval 2: a logistic model of the preference, read at no length difference.

logit P(model better) = w_length tanh((len_1 - len_2) / sd) + w_difficulty difficulty_i + w_bias. It is fitted on the
model's rows and on calibration rows of two baselines that were told to be concise and verbose, which tie down the first
two weights. Calibration rows and difficulties come from files that the caller names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from coala.evaluation.alpaca import FEW_ROWS, Annotations, instruction_key, standard_error
from coala.evaluation.rows import read_rows
from coala.settings import DifficultyBy, Stopping
from coala.statistics.intervals import Float, percentiles, resamples
from coala.statistics.logistic import fit_logistic, log_loss, sigmoid
from coala.values import CoalaError, Estimate

# Both calibration files together weigh 0.2 of a row of the model per row, each of the two half of it.
CALIBRATION_WEIGHT = 0.2 / 2
PENALTIES = tuple(float(c) for c in np.logspace(-4, 4, 10))  # the C among which cross-validation chooses
FOLDS = 5
PUBLISHED_SEED = 123  # of the order of coordinates in the published fits
BY_POSITION, BY_INSTRUCTION = "position", "instruction"


@dataclass(frozen=True)
class LengthWeights:
    """The model's three coefficients, in nats, in the published order."""

    length: float
    difficulty: float
    bias: float


@dataclass(frozen=True, eq=False)
class Difficulty:
    """A difficulty per instruction (n,) in the benchmark's order, and the place of each instruction by its key."""

    values: Float
    places: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Rows of the two baselines: standardised length difference before the tanh, difficulty, bias column, preference
    in [0, 1], all (n,)."""

    length_difference: Float
    difficulty: Float
    bias: Float
    preference: Float


@dataclass(frozen=True, eq=False)
class LengthControlled:
    """The length-controlled win rate in percent and all that it hangs on.

    ``win_rate`` carries a bootstrap interval over instructions. ``standard_error`` is the published one, which only
    measures how ``predictions`` (n,) in [0, 1] differ between instructions. ``penalty`` is the C of the L1 fit, None
    for maximum likelihood. ``baseline_length`` is the mean of the baseline's characters.
    """

    model: str
    baseline: str
    baseline_length: float
    win_rate: Estimate
    standard_error: float
    weights: LengthWeights
    penalty: float | None
    predictions: Float
    remarks: tuple[str, ...]


def read_difficulty(path: Path | str) -> Difficulty:
    """A CSV (or JSON Lines) with ``instruction_difficulty``, one row per instruction in the benchmark's order.

    ``index``, if there, must count from 0. ``instruction_sha256_16`` or ``instruction`` allow look-up by instruction.
    """
    values: list[float] = []
    places: dict[str, int] = {}
    for i, row in enumerate(read_rows(path)):
        values.append(row.value("instruction_difficulty"))
        if row.get("index") is not None and row.value("index") != i:
            raise row.fault("index", str(row.get("index"))[:40], f"{i}, the row's place", "sort the file by index")
        key = row.get("instruction_sha256_16")
        if key is not None:
            places.setdefault(row.label("instruction_sha256_16"), i)
        elif row.get("instruction") is not None:
            places.setdefault(instruction_key(row.text("instruction")), i)
    return Difficulty(np.array(values), places)


def read_calibration(path: Path | str) -> Calibration:
    """The authors' ``df_gamed.csv`` or a stand-in: ``preference``, ``std_delta_len``, ``instruction_difficulty``.

    Preferences may be on either published scale, [0, 1] or [1, 2] with 0 for a tie; one above 1 tells the second.
    ``not_gamed_baseline`` is the bias column, false where it is missing.
    """
    rows = read_rows(path)
    y = np.array([row.value("preference", low=0, high=2) for row in rows])
    if y.max() > 1:
        if bad := next((i for i in range(len(y)) if 0 < y[i] < 1), None):
            mend = "write all of them on one scale"
            raise rows[bad].fault("preference", f"{y[bad]:g} in a file with values above 1", "one from 1 to 2", mend)
        y = np.where(y == 0, 0.5, y - 1)
    return Calibration(
        length_difference=np.array([row.value("std_delta_len") for row in rows]),
        difficulty=np.array([row.value("instruction_difficulty") for row in rows]),
        bias=np.array(
            [row.get("not_gamed_baseline") is not None and row.flag("not_gamed_baseline") for row in rows], float
        ),
        preference=y,
    )


def predict_winrate(weights: LengthWeights, difficulty: Float) -> Float:
    """P(model better) (n,) at no length difference: sigmoid(w_difficulty difficulty_i + w_bias).

    The win rate is 100 times the mean.
    """
    return sigmoid(weights.difficulty * difficulty + weights.bias)


def length_controlled(
    annotations: Annotations,
    difficulty: Difficulty | None,
    calibration: Calibration | None,
    *,
    penalty: float | Literal["cv"] | None = "cv",
    stopping: Stopping = "optimum",
    difficulty_by: DifficultyBy = "position",
    draws: int = 200,
    seed: int = 0,
) -> LengthControlled:
    """Fit the model and read it at equal lengths.

    Weighted cross-entropy with soft targets: the model's rows weigh 1, calibration rows 0.1. ``penalty`` is the C of
    C loss + |w|_1; "cv" chooses one of ten by five-fold cross-validation of the log loss; None is plain maximum
    likelihood. ``stopping`` "liblinear" ends the fit where the published one ended, a little before the optimum.
    ``difficulty_by`` "position" gives row i of the file the i-th difficulty, which is what the published
    figures do even where rows are missing and everything after the gap is shifted; "instruction" looks each one up.

    With neither ``difficulty`` nor ``calibration``, for prompts or a baseline that have none, the model's own rows
    decide a length weight and a bias by maximum likelihood; ``standard_error`` is then the bootstrap's. The value is
    nan where rows cannot tell it: no reply is longer than the baseline's, none shorter, or length tells who won.

    Rows without a preference are left out of the fit but are predicted. The interval is a percentile bootstrap over the
    model's rows (``draws``, ``seed``) at the C that was found, calibration rows held fixed.
    """
    remarks: list[str] = []
    alone = difficulty is None or calibration is None
    if difficulty is None or calibration is None:
        if (difficulty is None) != (calibration is None):
            raise CoalaError("Length control takes difficulties and calibration rows together, or neither.")
        difficulty, none = Difficulty(np.zeros(len(annotations)), {}), np.zeros(0)
        calibration, penalty, difficulty_by = Calibration(none, none, none, none), None, "position"
        remarks.append("length control by the model's own rows alone: not on the scale of the leaderboard")
    hard = _difficulties(annotations, difficulty, difficulty_by, remarks)
    mean_length = float(annotations.baseline_length.mean()) if len(annotations) else math.nan
    common = annotations.model, annotations.baseline, mean_length
    if annotations.model == annotations.baseline:
        half = np.full(len(hard), 0.5)
        itself = Estimate(50.0, 50.0, 50.0, len(hard), "the baseline against itself is 50 by construction")
        return LengthControlled(*common, itself, 0.0, LengthWeights(0, 0, 0), None, half, ("nothing was fitted",))
    if penalty not in ("cv", None) and not (isinstance(penalty, int | float) and 0 < penalty < math.inf):
        raise CoalaError(f"The penalty C is {penalty!r}; expected a positive number, 'cv' or None.")
    if stopping not in ("optimum", "liblinear"):
        raise CoalaError(f"The fit stops at {stopping!r}; expected 'optimum' or 'liblinear'.")
    if stopping == "liblinear" and penalty is None:
        raise CoalaError("liblinear fits with a penalty: give a C or 'cv', or stop at the optimum.")
    known = np.isfinite(annotations.preference)
    if not known.any():
        raise CoalaError(
            f"None of the {len(annotations)} rows of {annotations.model!r} has a preference; expected at least one to "
            "fit the length-controlled win rate. Judge the outputs first."
        )
    own = np.column_stack([_squashed_difference(annotations, remarks), hard, np.ones(len(hard))])[known]
    others = np.column_stack([np.tanh(calibration.length_difference), calibration.difficulty, calibration.bias])
    if alone and not _told_apart(own[:, 0], annotations.preference[known] - 1):
        remarks.append(
            "the win rate at equal lengths is unknown: replies are all longer or all shorter than the baseline's, or "
            "length alone decides who won"
        )
        unknown = Estimate(math.nan, 0.0, 100.0, len(own), "length-controlled, own rows alone; not identified")
        undefined = np.full(len(hard), math.nan)
        return LengthControlled(*common, unknown, math.nan, LengthWeights(0, 0, 0), None, undefined, tuple(remarks))
    X, n = np.vstack([own, others]), len(own)
    y = np.concatenate([annotations.preference[known] - 1, calibration.preference])
    weight = np.concatenate([np.ones(n), np.full(len(others), CALIBRATION_WEIGHT)])
    c = cross_validated(X, y, weight, seed=seed) if penalty == "cv" else penalty
    l1 = 0.0 if c is None else 1 / float(c)
    if stopping == "liblinear" and c is not None:
        found = _as_published(X, y, weight, float(c))
    else:
        fit = fit_logistic(X, y, weight, l1=l1)
        found = fit.coefficients
        if fit.separated:
            remarks.append("no finite weights fit best (all rows won or lost): the value is the limit")
    weights = LengthWeights(*(float(w) for w in found))
    predictions = predict_winrate(weights, hard)
    value = 100 * float(predictions.mean())
    if annotations.repeated:
        remarks.append(f"{annotations.repeated} rows repeat an instruction: all are kept")
    if n < FEW_ROWS and not alone:
        remarks.append(
            f"{n} rows with {len(others)} calibration rows, which determine the length and difficulty weights"
        )

    def drawn(picked: NDArray[np.intp]) -> float:
        if alone and not _told_apart(own[picked > 0, 0], y[:n][picked > 0]):
            return math.nan
        again = fit_logistic(X, y, np.concatenate([picked, weight[n:]]), l1=l1, start=found, tolerance=1e-8)
        return 100 * float(picked @ predict_winrate(LengthWeights(*again.coefficients), own[:, 1])) / n

    low, high, about = -math.inf, math.inf, "no interval"
    error = math.nan if alone else standard_error(predictions)
    if draws > 0 and n > 1:
        again = np.array([drawn(picked) for picked in resamples(np.arange(n), draws, seed)])
        whole = again[np.isfinite(again)]
        # Draws that cannot tell could have been anything: beyond what the interval leaves out, so could the value.
        if len(whole) > 0.975 * draws:
            low, high = percentiles(whole)
            error = float(np.std(whole, ddof=1)) if alone and draws > 1 else error
        else:
            low, high = 0.0, 100.0
        about = f"percentile bootstrap 95 % over instructions ({draws} draws, seed {seed})"
        about += f", {draws - len(whole)} of which are undefined" if len(whole) < draws else ""
    fitted = "maximum likelihood" if c is None else f"L1 at C = {c:.6g}"
    fitted += " as liblinear stops" if stopping == "liblinear" else ""
    estimate = Estimate(
        value,
        min(low, value),
        max(high, value),
        n,
        f"length-controlled, {fitted}, {'own rows alone' if alone else f'difficulty by {difficulty_by}'}; {about}",
    )
    return LengthControlled(
        *common, estimate, error, weights, None if c is None else float(c), predictions, tuple(remarks)
    )


def published_solver() -> Any:
    """The class of the published fits; CoalaError where its package is not installed."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ModuleNotFoundError as error:
        raise CoalaError(
            "Found no scikit-learn, which ends a fit where liblinear does; stop at the optimum, or install it: "
            "pip install 'coala-align[liblinear]'"
        ) from error
    return LogisticRegression


def _as_published(X: Float, y: Float, weight: Float, c: float) -> Float:
    """Coefficients (3,) of the same fit by the published package at its usual tolerance, which is short of the optimum.

    It takes labels: soft targets are two rows each, labelled 1 and 0 with weights in proportion.
    """
    model = published_solver()(C=c, l1_ratio=1, solver="liblinear", fit_intercept=False, random_state=PUBLISHED_SEED)
    labels, weights = np.repeat([1, 0], len(X)), np.concatenate([weight * y, weight * (1 - y)])
    return np.asarray(model.fit(np.vstack([X, X]), labels, weights).coef_[0])


def cross_validated(
    X: Float, y: Float, weight: Float, *, penalties: tuple[float, ...] = PENALTIES, seed: int = 0
) -> float:
    """The C with the smallest weighted log loss on five held-out folds; both labels of a row are in one fold.

    The likelihood is flat in C: at usual sizes neighbouring values differ by less than the folds do.
    """
    fold: NDArray[np.intp] = np.random.default_rng(seed).permutation(len(y)) % FOLDS
    losses = np.zeros(len(penalties))
    for part in range(FOLDS):
        held = fold == part
        if not weight[held].sum() > 0 or not weight[~held].sum() > 0:
            continue
        start = None
        for i, c in enumerate(penalties):
            start = fit_logistic(X[~held], y[~held], weight[~held], l1=1 / c, start=start, tolerance=1e-9).coefficients
            losses[i] += log_loss(X[held] @ start, y[held], weight[held]) / float(weight[held].sum())
    return penalties[int(np.argmin(losses))]


def _difficulties(annotations: Annotations, difficulty: Difficulty, by: str, remarks: list[str]) -> Float:
    n = len(annotations)
    if n < len(difficulty.values):
        remarks.append(f"{n} rows for {len(difficulty.values)} instructions with a difficulty")
    if by == BY_POSITION:
        if n > len(difficulty.values):
            raise CoalaError(
                f"{n} annotated rows but {len(difficulty.values)} difficulties; expected at most as many rows. Look "
                "difficulties up by instruction, or leave repeated rows out."
            )
        own = [difficulty.places.get(instruction_key(name), i) for i, name in enumerate(annotations.instruction)]
        if shifted := sum(place != i for i, place in enumerate(own)):
            remarks.append(f"{shifted} rows take another instruction's difficulty, as they would on the leaderboard")
        return difficulty.values[:n]
    if by != BY_INSTRUCTION:
        raise CoalaError(f"Difficulty by {by!r}; expected {BY_POSITION!r} or {BY_INSTRUCTION!r}.")
    missing = [i for i, name in enumerate(annotations.instruction) if instruction_key(name) not in difficulty.places]
    if missing:
        raise CoalaError(
            f"{len(missing)} of {n} instructions have no difficulty (the first is row {missing[0] + 1}); the file "
            f"names {len(difficulty.places)} instructions. Use the file of this benchmark, or difficulty by position."
        )
    return difficulty.values[[difficulty.places[instruction_key(name)] for name in annotations.instruction]]


def _told_apart(difference: Float, y: Float) -> bool:
    """Whether rows tell the win rate at no length difference by themselves.

    They do where they lie on both sides of it, and won and lost ones overlap, so that the weights have an optimum.
    """
    if not difference.any():
        return True
    lost, won = difference[y < 1], difference[y > 0]
    overlap = len(lost) and len(won) and lost.max() > won.min() and won.max() > lost.min()
    return bool(overlap and difference.min() < 0 < difference.max())


def _squashed_difference(annotations: Annotations, remarks: list[str]) -> Float:
    """tanh of (len_1 - len_2) over its standard deviation (n - 1); its limit, the sign, where nothing varies."""
    difference = annotations.baseline_length - annotations.model_length
    spread = float(difference.std(ddof=1)) if len(difference) > 1 else 0.0
    if spread > 0:
        return np.asarray(np.tanh(difference / spread))
    remarks.append("all length differences are equal, so the length weight comes from the calibration rows alone")
    return np.sign(difference)
