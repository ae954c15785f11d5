"""What decides a distilled policy, and an adapter trained on the same replies.

Imports nothing that is slow to load: commands make their flags of it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from coala.messages import CoalaError
from coala.settings import Seed, Setting, Support, Teacher, Vehicle

RATES = (3e-4, 1e-3, 2e-3)  # to both sides of 1e-3, a usual rate of adapters


@dataclass(frozen=True, kw_only=True)
class DistilSettings:
    """``guided``: replies to training prompts that the head guides, choosing among ``candidates`` blocks.

    ``weighted``: the training pairs' own replies, weighted by exp(r / ``beta``) for scores r in standard deviations;
    nothing is generated. ``shift``: replies of mode ``shift``, each step to become the exact distribution that its
    token was drawn from, tilted over the ``candidates`` likeliest. ``rank`` "auto" and no ``ridge`` are chosen on
    held-out prompts. More than one of ``rounds``, of the teacher ``guided``, end where replies to held-out prompts
    gain no more (:mod:`coala.distil.rounds`).
    """

    teacher: Annotated[
        Teacher,
        Setting(
            "What the policy learns from: replies the head guides, the pairs' own replies weighted by score, or the "
            "exact distributions of mode shift."
        ),
    ] = "guided"
    prompts: Annotated[int, Ge(2), Setting("Number of training prompts to answer, for `guided` and `shift`.")] = 300
    candidates: Annotated[
        int, Ge(2), Setting("Number of blocks (`guided`) or tokens (`shift`) the head scores per step.")
    ] = 10
    block_tokens: Annotated[int, Ge(1), Setting("Tokens per block, for `guided`.")] = 5
    beta: Annotated[
        float,
        Gt(0),
        Setting("Temperature of the weights exp(score / beta), in standard deviations of the score, for `weighted`."),
    ] = 1.0
    support: Annotated[
        Support, Setting("Tokens each step is normalised over; vocabulary also sharpens the model and is slower.")
    ] = "nucleus"
    ridge: Annotated[
        Annotated[float, Gt(0)] | None,
        Setting("Weight of the penalty on half the squared change (default: chosen on held-out prompts)."),
    ] = None
    strength: Annotated[
        Annotated[float, Gt(0)] | Literal["auto"],
        Setting(
            "Factor on the change; auto: raised until its own replies score like the teacher's (`guided`), else 1."
        ),
    ] = "auto"
    rank: Annotated[
        Annotated[int, Ge(1)] | Literal["auto", "full"],
        Setting("Rank of the change; full leaves it as fitted, auto chooses on held-out prompts."),
    ] = "auto"
    tolerance: Annotated[
        float, Gt(0), Lt(1), Setting("Certified gap at which the fit stops, as a fraction of the gain.")
    ] = 1e-3
    rounds: Annotated[
        int,
        Ge(1),
        Setting("Maximum number of rounds; in each the head guides the previous round's policy and distils it again."),
    ] = 1
    held_out: Annotated[
        int, Ge(2), Setting("Maximum number of held-out prompts that measure the gain of each round.")
    ] = 100
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """How an adapter is trained on the teacher's replies: at each of ``rates``, for at most ``epochs``.

    The rate, and the epoch that is kept, are those with the lowest loss on the held-out fifth of prompts.
    """

    rates: Annotated[
        tuple[float, ...],
        Setting("Learning rate of the adapter to try. Repeatable.", flag="--rate"),
    ] = RATES
    epochs: Annotated[
        int, Ge(1), Setting("Maximum number of epochs of the adapter; the best on held-out prompts is kept.")
    ] = 3
    adapter_rank: Annotated[int, Ge(1), Setting("Rank of the adapter at each matrix.")] = 16
    batch: Annotated[int, Ge(1), Setting("Batch size of the adapter's training, in replies.")] = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", tuple(self.rates))


# What decides one vehicle and says nothing to the other.
_OF_OUTPUT = ("beta", "support", "ridge", "rank", "strength", "tolerance")


def check_vehicle(into: Vehicle, settings: DistilSettings, adapter: AdapterSettings) -> None:
    """CoalaError for settings that the vehicle does not have, rather than leave them out in silence."""
    usual, mine = (DistilSettings(), settings) if into == "adapter" else (AdapterSettings(), adapter)
    names = _OF_OUTPUT if into == "adapter" else tuple(one.name for one in fields(AdapterSettings))
    given = [name for name in names if getattr(mine, name) != getattr(usual, name)]
    if given:
        flags = ", ".join("--rate" if name == "rates" else "--" + name.replace("_", "-") for name in given)
        other = "output" if into == "adapter" else "adapter"
        raise CoalaError(f"Found {flags} with --into {into}; expected it only with --into {other}. Fix: remove it.")
