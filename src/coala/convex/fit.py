"""``fit``: features of preference pairs to a certified :class:`~coala.values.ConvexHead`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float

from coala.convex.calibration import fit_temperature, least_slope
from coala.convex.certificate import OnFitStep, Recorder, gates_estimate, statement, validation_facts
from coala.convex.gate_sampling import sample_patterns
from coala.convex.gate_search import Search
from coala.convex.gate_sources import GateOn, GateSource, Learnt, SampledGates
from coala.convex.pairwise import WIDTHS
from coala.convex.papers.finetune import Logistic, PairLoss, Pointwise
from coala.convex.papers.two_phase import TwoPhase, fit_paper, fit_two_phase
from coala.convex.path import PairTask, PathChoice, choose, refit
from coala.convex.prepare import Scaling, Standardisation
from coala.convex.rows import available_bytes, check_memory, solve_bytes
from coala.convex.selftest import check_operators
from coala.convex.solvers import Solution
from coala.convex.validation import HeldOut, grouped_folds
from coala.settings import Method, PhaseOne
from coala.values import Certificate, CoalaError, ConvexHead, FeatureSet

# Gates at most (learnt) or sampled, unless the caller says otherwise.
N_PATTERNS: dict[Method, int] = {"learnt": 16, "direct": 8, "two-phase": 32, "linear": 0}
Allocate = Callable[[tuple[int, ...], type[Any]], np.ndarray]


@dataclass(frozen=True)
class Fit:
    """A head, and how it came about.

    ``solutions`` by name ("pairwise", or "phase-one" and "phase-two"). ``path``: one row per setting validated: tau,
    gate_on and beta_rel (None = no gates), relaxation, cv_nll, cv_se, cv_accuracy, n_neurons, gap. ``history``: one
    row per step of the last solve, repeated with one fold held out: objective, gap, and for the pairs fitted and held
    out the mean margin, its standard deviation, their ratio and the accuracy (None where nothing is held out).
    """

    head: ConvexHead
    solutions: dict[str, Solution]
    path: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    held_out: HeldOut | None = None


def fit(
    features: FeatureSet,
    *,
    method: Method = "learnt",
    gate_on: Literal["auto", "reply", "prompt"] = "auto",
    margin: float | Float[np.ndarray, "n"] = 0.0,
    reference_scale: float | None = None,
    loss: PairLoss | None = None,
    phase_one: PhaseOne = "gated",
    paper: bool = False,
    n_patterns: int | None = None,
    n_folds: int = 4,
    scaling: Scaling = "feature",
    precision: Literal["float32", "float64"] = "float32",
    tolerance: float = 1e-4,
    seed: int = 0,
    scratch: Allocate | None = None,
    on_step: OnFitStep | None = None,
) -> Fit:
    """Fit a head to preference pairs; the same features and seed give the same bytes. Nothing needs to be set.

    Args:
        method: "learnt", one convex program with a linear block and the gates that validation asks for, found by
            pattern generation; "direct", the same program with sampled gates; "linear", the same without gates; or
            "two-phase", the papers'.
        gate_on: what gates look at: the reply's features, the prompt's, or whichever validates better of those the
            features have.
        margin: offset the score difference is asked to exceed, one number or one per pair (n,).
        reference_scale: adds the margin of CVX-DPO, this scale times ``features.log_ratio``.
        loss: Phase II loss of the two-phase method; :class:`Logistic` with the margin unless given, :class:`Pointwise`
            with ``paper``.
        phase_one: what solves Phase I: the gated relaxation by Newton's method, the cone-constrained program by ADMM
            ("cronos"), or the ReLU network itself by pattern generation ("network").
        paper: of the two-phase method, the published settings instead of validated ones.
        n_patterns: gates at most (learnt) or sampled (direct, two-phase); 16, 8 and 32 unless given.
        n_folds: folds of whole groups on which everything is chosen.
        scaling: divide each feature by its own standard deviation, or all by one number.
        precision: of the iterations; certificates are always computed in float64.
        tolerance: relative duality gap at which a solve stops.
        scratch: gives arrays mapped from files (:func:`coala.store.scratch`). Where memory cannot hold the rows, they
            are laid there and read block by block; features that are mapped too may then be larger than memory.
        on_step: called with a stage name, a step, the number of steps or None, and facts about the step.

    Raises:
        CoalaError: for no pairs, values that are not finite, settings out of range, or a fit that memory cannot hold.
    """
    report: OnFitStep = on_step if on_step is not None else lambda stage, step, total, info: None
    if paper and method != "two-phase":
        raise CoalaError(f"paper=True is the published two-phase setting; method is {method!r}, use 'two-phase'.")
    margins = _validated(features, method, gate_on, margin, reference_scale, n_patterns, n_folds, tolerance)
    count = N_PATTERNS[method] if n_patterns is None else n_patterns
    double = precision == "float64"
    with jax.enable_x64(double):
        standardisation = Standardisation.of(features.chosen, features.rejected, scaling)
        dtype = np.float64 if double else np.float32
        shape = (2, len(features), standardisation.rotation.shape[1])
        rows = _room(shape, dtype, max(1, count), scratch)
        standardisation.fill(features.chosen, rows[0])
        standardisation.fill(features.rejected, rows[1])
        prompts = None
        if features.prompt is not None and gate_on != "reply" and method in ("learnt", "direct"):
            prompts = Standardisation.of(features.prompt, features.prompt, scaling)
        task = PairTask(
            rows,
            margins,
            features.group,
            grouped_folds(features.group, n_folds, seed),
            seed,
            dtype,
            None if prompts is None or features.prompt is None else prompts.rows(features.prompt).astype(dtype),
        )
        maker = _Maker(features, task, standardisation, prompts, precision, tolerance)
        if method == "two-phase":
            if loss is None:
                offset = margins if np.ndim(margin) or reference_scale else float(margin)
                loss = Pointwise(margin=offset) if paper else Logistic(margin=offset)
            if paper:
                return maker.two_phase(fit_paper(task, loss, n_patterns=count), paper)
            return maker.two_phase(
                fit_two_phase(task, loss, n_patterns=count, tolerance=tolerance, progress=report, phase_one=phase_one),
                paper,
            )
        check_operators(len(features), shape[-1], WIDTHS[2], np.dtype(dtype).name)
        kinds: list[GateOn] = ["reply", "prompt"] if gate_on == "auto" else [gate_on]
        sources: list[GateSource] = []
        for kind in kinds:
            seen = task.prompt_rows if kind == "prompt" else rows.reshape(-1, shape[-1])
            if seen is None or not count:
                continue
            if method == "learnt":
                sources.append(Learnt(kind, Search(max_neurons=count)))
            else:
                _, gates = sample_patterns(seen, count, jax.random.key(seed))
                sources.append(SampledGates(gates, kind))
        return maker.pairwise(method, choose(task, sources, report), report)


def _room(
    shape: tuple[int, int, int], dtype: type[Any], n_patterns: int, scratch: Allocate | None
) -> Float[np.ndarray, "2 n d"]:
    """An empty array for the rows, (2, n, r): in memory if a solve then fits, else from ``scratch``.

    Raises:
        CoalaError: if it fits neither way.
    """
    available = available_bytes()
    needed = solve_bytes(*shape[1:], n_patterns, sides=2, dtype=dtype)
    if scratch is None or available is None or needed <= available:
        check_memory(needed, available)
        return np.empty(shape, dtype)
    check_memory(solve_bytes(*shape[1:], n_patterns, sides=2, dtype=dtype, mapped=True), available)
    return scratch(shape, dtype)


def _validated(
    features: FeatureSet,
    method: str,
    gate_on: str,
    margin: float | Float[np.ndarray, "n"],
    reference_scale: float | None,
    n_patterns: int | None,
    n_folds: int,
    tolerance: float,
) -> Float[np.ndarray, "n"]:
    """The margin of every pair (n,), after the checks that need no mathematics."""
    n = len(features)
    if method not in N_PATTERNS:
        raise CoalaError(f"method is {method!r}; expected one of {', '.join(map(repr, N_PATTERNS))}.")
    if gate_on not in ("auto", "reply", "prompt"):
        raise CoalaError(f"gate_on is {gate_on!r}; expected 'auto', 'reply' or 'prompt'.")
    if gate_on == "prompt" and method in ("two-phase", "linear"):
        raise CoalaError(f"gate_on is 'prompt', which method {method!r} does not know; use 'learnt' or 'direct'.")
    if gate_on == "prompt" and features.prompt is None:
        raise CoalaError(
            "gate_on is 'prompt', but the features hold no prompts. Extract them with prompt features "
            "(`coala extract --prompt-features`), or use gates on the reply."
        )
    if n == 0 or features.width == 0:
        raise CoalaError(
            f"There are {n} pairs with {features.width} features each; fitting needs at least one of both. "
            "Check that the input file has rows and that extraction finished."
        )
    arrays = {"chosen": features.chosen, "rejected": features.rejected, "prompt": features.prompt}
    for name, array in arrays.items():
        bad = np.zeros(n, bool) if array is None else ~np.isfinite(array.sum(axis=1, dtype=np.float64))
        if bad.any():
            raise CoalaError(
                f"The {name} features of {int(bad.sum())} of {n} pairs hold nan or infinity (first: pair "
                f"{int(bad.argmax())}); expected finite numbers. Extract in a wider dtype (float32) or drop the pairs."
            )
    margins = np.asarray(margin, np.float64)
    if margins.shape not in ((), (n,)) or not np.isfinite(margins).all():
        raise CoalaError(f"margin has shape {margins.shape}; expected one finite number or one per pair, ({n},).")
    margins = np.broadcast_to(margins, (n,)).copy()
    if reference_scale is not None:
        if features.log_ratio is None:
            raise CoalaError(
                "reference_scale is given, but the features hold no log ratios of the reference model. Extract them "
                "(`coala extract --log-ratios`), or leave reference_scale out."
            )
        if not (np.isfinite(reference_scale) and np.isfinite(features.log_ratio).all()):
            raise CoalaError("reference_scale and the log ratios of the features must be finite.")
        margins += reference_scale * features.log_ratio
    count = N_PATTERNS[method] if n_patterns is None else n_patterns
    least = 1 if method in ("direct", "two-phase") else 0
    if count < least or n_folds < 2 or not 0 < tolerance < 1:
        raise CoalaError(
            f"n_patterns={n_patterns}, n_folds={n_folds}, tolerance={tolerance}; expected n_patterns >= {least}, "
            "n_folds >= 2 and a tolerance between 0 and 1."
        )
    return margins


def assemble(
    features: FeatureSet,
    standardisation: Standardisation,
    linear: Float[np.ndarray, "r"],
    gates: Float[np.ndarray, "e m"],
    weights: Float[np.ndarray, "r m"],
    prompts: Standardisation | None = None,
) -> ConvexHead:
    """The head that scores feature vectors as ``linear`` (r,), ``gates`` and ``weights`` (r, m) score their rows.

    With ``prompts``, the gates are in its coordinates.
    """
    directions = (standardisation if prompts is None else prompts).fold(gates)
    # A gate's length means nothing; unit length keeps float32 scores well scaled.
    length = np.linalg.norm(directions[:, :-1], axis=1, keepdims=True)
    directions = directions / np.where(length > 0, length, 1.0)
    return ConvexHead(
        gates=directions.astype(np.float32),
        weights=standardisation.fold(weights).astype(np.float32),
        linear=standardisation.fold(linear[:, None])[0].astype(np.float32),
        spec=features.spec,
        gate_on="reply" if prompts is None else "prompt",
    )


@dataclass(frozen=True)
class _Maker:
    """Turns what was chosen and solved into a head with its certificate."""

    features: FeatureSet
    task: PairTask
    standardisation: Standardisation
    prompts: Standardisation | None
    precision: str
    tolerance: float

    def pairwise(self, method: Method, choice: PathChoice, report: OnFitStep) -> Fit:
        task = self.task
        gate_on = "reply" if choice.source is None else choice.source.gate_on
        recorder = Recorder(task, report)
        watched = task.everything(gate_on) if task.fold is None else task.without(0, gate_on)
        refit(task, choice, watched, tolerance=self.tolerance, on_step=recorder.on_step)
        model = refit(task, choice, task.everything(gate_on), tolerance=self.tolerance)
        prompts = self.prompts if gate_on == "prompt" else None
        head = assemble(self.features, self.standardisation, model.linear, model.gates, model.weights, prompts)
        kind = {"learnt": "learnt", "direct": "sampled", "linear": "no"}[method]
        gates = f"{model.n_neurons} {kind} gates on the {gate_on}" if model.n_neurons else "no gates"
        facts = {
            "method": method,
            "gate_on": gate_on if model.n_neurons else None,
            "gates_estimate": gates_estimate(model, choice),
            "ridge": choice.ridge,
            "ridge_relative": choice.ridge_relative,
            "sparsity": None if choice.sparsity is None else choice.sparsity * choice.relaxation,
            "sparsity_relative": choice.sparsity_relative,
            "relaxation": choice.relaxation,
            "cv": validation_facts(task, choice.linear, choice.chosen, choice.difference),
        }
        program = f"pairwise logistic loss, linear block and {gates}"
        head = self._certified(head, program, statement(model), model.solution, facts, choice.chosen)
        return Fit(head, {"pairwise": model.solution}, choice.path, recorder.history, choice.chosen)

    def two_phase(self, result: TwoPhase, paper: bool) -> Fit:
        head = assemble(self.features, self.standardisation, *result.blocks())
        one, two = result.phase_one, result.phase_two
        facts = {
            "method": "two-phase",
            "paper": paper,
            "gate_on": "reply",
            "phase_one": {
                "solver": result.solver,
                "objective": one.objective,
                "lower_bound": one.objective - one.gap,
                "gap": one.gap,
                "relative_gap": one.relative_gap,
                "status": one.status.value,
            },
            "gates_estimate": None,
            "ridge": result.ridge,
            "sparsity": result.sparsity,
            "sparsity_relative": result.sparsity_relative,
            "cv": validation_facts(self.task, None, result.chosen, None),
        }
        gates = "gates of its neurons" if result.solver == "network" else "sampled gates"
        statement = (
            f"Phase I: with the {gates}, no other weights lower its objective by more than {one.relative_gap:.1e} of "
            f"it. Phase II: no other second layer lowers its objective by more than {two.relative_gap:.1e} of it. "
            "Each is proved in double precision for its own phase; nothing is said of other gates."
        )
        program = f"two phases ({result.solver}, {result.n_patterns} sampled gates; then the second layer)"
        head = self._certified(head, program, statement, two, facts, result.chosen)
        history = [{"stage": "phase-one", **row} for row in one.history]
        history += [{"stage": "phase-two", **row} for row in two.history]
        return Fit(head, {"phase-one": one, "phase-two": two}, result.path, history, result.chosen)

    def _certified(
        self,
        head: ConvexHead,
        program: str,
        statement: str,
        solution: Solution,
        facts: dict[str, Any],
        held_out: HeldOut | None,
    ) -> ConvexHead:
        temperature, slope = 1.0, None
        if held_out is not None:
            temperature = fit_temperature(held_out.margins)
            slope = min(least_slope(held_out.margins, self.task.group), 1 / temperature)
        calibration = {"temperature": temperature, "least_slope": slope, "held_out": held_out is not None}
        certificate = Certificate(
            program=program,
            statement=statement,
            objective=solution.objective,
            lower_bound=solution.objective - solution.gap,
            violation=0.0,
            n_patterns=head.n_neurons,
            status=solution.status.value,
            tolerance=self.tolerance,
            precision=f"{self.precision} iterations, float64 certificate",
            seed=self.task.seed,
            versions={name: version(name) for name in ("jax", "jaxlib", "numpy")},
            facts={
                **facts,
                "n_pairs": len(self.features),
                "n_groups": len(np.unique(self.features.group)),
                "n_neurons": head.n_neurons,
                "calibration": calibration,
                "separable": bool((head.margins(self.features) > 0).all()),
            },
        )
        return replace(head, temperature=temperature, least_slope=slope, certificate=certificate)
