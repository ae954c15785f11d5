"""What decides the outcome of COMAL on a language model, validated, and what can be said of it before any run.

Knows nothing of models, judges or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, get_args

from annotated_types import Ge

from coala.messages import CoalaError
from coala.settings import Selection, Setting, StepLoss, Target

if TYPE_CHECKING:
    from coala.nash.criteria import Note

LOSSES: tuple[StepLoss, ...] = get_args(StepLoss)
TO_WIN_RATES = ("sppo", "dro", "rebel")  # losses that are fitted to win rates, not to pairs


@dataclass(frozen=True)
class COMALSettings:
    """What decides the outcome of a run.

    ``eta`` is the step size (or ``beta`` = 1/eta), ``ref_weight`` = eta tau the weight of the reference (or give
    ``tau``); 0 is iterative IPO, and with ``inner_loss="dpo"`` iterative DPO.
    ``outer_steps`` and ``inner_steps`` count updates made: ``outer_steps`` 1 is INPO.
    ``prompts_per_step`` takes the prompts in turns (None: all of them in every step). Pairs: ``random`` pairs up the
    ``num_candidates`` answers to a prompt at random, ``all`` takes every pair, ``best_worst`` the two of highest and
    lowest win rate, which with ``target="hard"`` is the published recipe and solves another game (see docs/nash.md).
    Targets: ``soft`` eta (P - 1/2), ``bernoulli`` a label drawn with probability P, ``hard`` who is preferred; the last
    two ask for a margin of eta/2. ``length_normalize`` divides d(y) by the answer's tokens. ``anchor_nll``, a,
    weighs the mean negative log-likelihood of the sampled answers: pair losses see differences only, and it holds the
    sum where it belongs. To first order it shortens the step of ``inpo`` by the factor 1 - a/4, whatever eta.
    """

    eta: Annotated[float | None, Setting("Step size (default: 500, as published).")] = None
    beta: Annotated[float | None, Setting("1 / eta, instead of --eta (default: 1/500).")] = None
    ref_weight: Annotated[float | None, Setting("Weight of the reference, eta x tau (default: 1/3).")] = None
    tau: Annotated[
        float | None, Setting("Strength of the regularisation, instead of --ref-weight (default: from --ref-weight).")
    ] = None
    outer_steps: Annotated[int, Ge(1), Setting("Number of updates of the reference.", flag="--outer")] = 3
    inner_steps: Annotated[int, Ge(1), Setting("Number of inner steps per update, K.", letter="-k")] = 6
    inner_loss: Annotated[StepLoss, Setting("Loss of the inner steps.", flag="--loss")] = "inpo"
    num_candidates: Annotated[
        int, Ge(2), Setting("Number of answers sampled per prompt and step.", flag="--candidates")
    ] = 5
    pair_selection: Annotated[Selection, Setting("Which pairs of candidates are trained on.", flag="--pairs")] = (
        "random"
    )
    target: Annotated[
        Target, Setting("Target of the loss: the oracle's probability, a sample from it, or its winner.")
    ] = "soft"
    temperature: Annotated[
        float, Setting("Sampling temperature; a value other than 1 changes the game being solved.")
    ] = 1.0
    top_p: Annotated[float, Setting("Nucleus sampling threshold (1: off); a value other than 1 changes the game.")] = (
        1.0
    )
    max_new_tokens: Annotated[int, Ge(1), Setting("Maximum length of an answer, in tokens.")] = 256
    prompts_per_step: Annotated[
        Annotated[int, Ge(1)] | None, Setting("Number of prompts per step, in rotation (default: all).")
    ] = None
    length_normalize: Annotated[bool, Setting("Divide margins by the answer's length in tokens.")] = False
    anchor_nll: Annotated[
        float, Ge(0), Setting("Weight of the likelihood term that prevents drift; see docs/nash.md.")
    ] = 0.0
    learning_rate: Annotated[float, Setting("Learning rate of AdamW, whose state is reset every step.")] = 5e-7
    epochs: Annotated[float, Setting("Number of epochs over each step's pairs.")] = 3.0
    batch_size: Annotated[int, Ge(1), Setting("Batch size of a forward pass, in pairs.")] = 8
    accumulation: Annotated[int, Ge(1), Setting("Number of forward passes per update.")] = 1
    schedule: Annotated[str, Setting("Learning rate schedule: linear, constant, cosine, ...")] = "linear"
    warmup: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0
    bf16: Annotated[bool, Setting("Compute in bfloat16 (autocast).")] = False
    gradient_checkpointing: Annotated[bool, Setting("Recompute activations to save memory.")] = False
    seed: Annotated[int, Ge(0), Setting("Random seed of sampling and training.")] = 0

    def __post_init__(self) -> None:
        eta = _one("eta", self.eta, "beta", self.beta, lambda beta: 1 / beta, 500.0)
        weight = _one("ref_weight", self.ref_weight, "tau", self.tau, lambda tau: eta * tau, 1 / 3)
        for name, value in (("eta", eta), ("beta", 1 / eta), ("ref_weight", weight), ("tau", weight / eta)):
            object.__setattr__(self, name, value)
        if not 0 <= weight <= 1:
            raise CoalaError(f"ref_weight = eta tau is {weight:g}; expected 0 (iterative IPO) to 1.")
        for name in ("outer_steps", "inner_steps", "batch_size", "accumulation", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise CoalaError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if self.num_candidates < 2:
            raise CoalaError(f"num_candidates is {self.num_candidates}; expected at least 2.")
        if self.prompts_per_step is not None and self.prompts_per_step < 1:
            raise CoalaError(f"prompts_per_step is {self.prompts_per_step}; expected at least 1, or None for all.")
        for name, known in (
            ("inner_loss", LOSSES),
            ("pair_selection", ("random", "all", "best_worst")),
            ("target", ("soft", "bernoulli", "hard")),
        ):
            if getattr(self, name) not in known:
                raise CoalaError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}.")
        if self.inner_loss in TO_WIN_RATES and self.target != "soft":
            raise CoalaError(
                f"Loss {self.inner_loss!r} is fitted to win rates; expected target 'soft', found {self.target!r}."
            )
        if self.inner_loss == "dro" and self.pair_selection != "all":
            raise CoalaError("Loss 'dro' uses all answers to a prompt: set pair_selection='all'.")
        if not (self.temperature > 0 and 0 < self.top_p <= 1 and self.learning_rate >= 0 and self.epochs > 0):
            raise CoalaError(
                f"temperature {self.temperature}, top_p {self.top_p}, learning_rate {self.learning_rate}, epochs "
                f"{self.epochs}; expected positive numbers, and top_p of at most 1."
            )

    def notes(self) -> list[Note]:
        """What the settings say before any run."""
        from coala.nash.criteria import Note

        eta, weight = self.step, self.weight
        found = []
        if self.temperature != 1 or self.top_p != 1:
            text = f"answers drawn at temperature {self.temperature:g}, top_p {self.top_p:g} are not samples of mu_k"
            found.append(Note("warning", f"{text}: a different game is solved. Set both to 1."))
        if self.pair_selection == "best_worst" or self.target == "hard":
            text = "best-against-worst pairs or hard labels: the fixed point is the Nash policy of another game"
            found.append(Note("warning", f"{text}. Use pair_selection='random' and target='soft'."))
        if 0 < weight * self.inner_steps < 0.5 and self.outer_steps > 1:
            text = f"inner_steps * eta * tau is {weight * self.inner_steps:.2g}: the inner game is far from solved "
            found.append(Note("warning", text + "before the reference moves. Raise inner_steps or ref_weight."))
        if weight == 0:
            name = "iterative DPO" if self.inner_loss == "dpo" else "iterative IPO"
            text = f"ref_weight 0 is {name}, which moves away from an interior Nash policy."
            found.append(Note("information", text))
        if eta > 10:
            text = f"eta {eta:g}: a step that reached its target would jump between single answers; what prevents that "
            found.append(Note("information", text + "is early stopping. Compare the achieved margin with the target."))
        return found

    @property
    def step(self) -> float:
        """eta, the step size."""
        assert self.eta is not None
        return self.eta

    @property
    def weight(self) -> float:
        """eta tau, the weight of the reference in v."""
        assert self.ref_weight is not None
        return self.ref_weight


def _one(
    name: str, value: float | None, other: str, given: float | None, of: Callable[[float], float], default: float
) -> float:
    if value is not None and given is not None and not math.isclose(value, of(given), rel_tol=1e-9):
        raise CoalaError(f"{name} is {value:g} but {other} is {given:g}, which implies {of(given):g}: set only one.")
    if given is not None and other == "beta" and given <= 0:
        raise CoalaError(f"beta is {given:g}; expected a positive number.")
    found = value if value is not None else of(given) if given is not None else default
    if not math.isfinite(found) or (name == "eta" and found <= 0):
        raise CoalaError(f"{name} is {found:g}; expected a positive number.")
    return found
