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
        Teacher, Setting("guided: the head's replies; weighted: the pairs' by score; shift: exact distributions.")
    ] = "guided"
    prompts: Annotated[int, Ge(2), Setting("Training prompts that are answered, for `guided` and `shift`.")] = 300
    candidates: Annotated[int, Ge(2), Setting("Blocks (`guided`) or tokens (`shift`) that the head looks at.")] = 10
    block_tokens: Annotated[int, Ge(1), Setting("Tokens of a block, for `guided`.")] = 5
    beta: Annotated[float, Gt(0), Setting("Standard deviations of score per factor e of weight, for `weighted`.")] = 1.0
    support: Annotated[
        Support, Setting("What steps are normalised over; vocabulary sharpens the model besides, and takes longer.")
    ] = "nucleus"
    ridge: Annotated[Annotated[float, Gt(0)] | None, Setting("Weight of half the squared change.")] = None
    strength: Annotated[
        Annotated[float, Gt(0)] | Literal["auto"],
        Setting("Times the change is taken; auto: until its own replies score as the teacher's do (`guided`), else 1."),
    ] = "auto"
    rank: Annotated[
        Annotated[int, Ge(1)] | Literal["auto", "full"], Setting("Rank of the change; full is cut to none.")
    ] = "auto"
    tolerance: Annotated[float, Gt(0), Lt(1), Setting("Certified gap, as a share of what the change gains.")] = 1e-3
    rounds: Annotated[
        int, Ge(1), Setting("Rounds at most; in each the head guides the policy of the round before, and teaches anew.")
    ] = 1
    held_out: Annotated[int, Ge(2), Setting("Held-out prompts at most that tell what each round gained.")] = 100
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """How an adapter is trained on the teacher's replies: at each of ``rates``, for at most ``epochs``.

    The rate, and the epoch that is kept, are those with the lowest loss on the held-out fifth of prompts.
    """

    rates: Annotated[
        tuple[float, ...],
        Setting("Learning rate of an adapter to try; may be repeated (default: 3e-4, 1e-3, 2e-3).", flag="--rate"),
    ] = RATES
    epochs: Annotated[int, Ge(1), Setting("Epochs of an adapter at most; the best on held-out prompts is kept.")] = 3
    adapter_rank: Annotated[int, Ge(1), Setting("Rank of an adapter's two factors at each matrix.")] = 16
    batch: Annotated[int, Ge(1), Setting("Replies of a training step of an adapter.")] = 8

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
        raise CoalaError(f"Found {flags} with --into {into}; expected it with --into {other} alone. Fix: leave it out.")
