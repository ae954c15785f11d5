"""What decides an adapter that is trained on a teacher's replies; the policy's own settings are the recipe's.

Imports nothing that is slow to load: commands make their flags of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

from annotated_types import Ge

from coala.messages import CoalaError
from coala.settings import Setting, Vehicle

RATES = (3e-4, 1e-3, 2e-3)  # to both sides of 1e-3, a usual rate of adapters


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


def check_vehicle(into: Vehicle, given: Mapping[str, Any], adapter: AdapterSettings) -> None:
    """CoalaError for what was ``given`` and the vehicle does not have, rather than leave it out in silence."""
    usual = AdapterSettings()
    changed = [one.name for one in fields(adapter) if getattr(adapter, one.name) != getattr(usual, one.name)]
    found = [name for name in _OF_OUTPUT if name in given] if into == "adapter" else changed
    if found:
        flags = ", ".join("--rate" if name == "rates" else "--" + name.replace("_", "-") for name in found)
        other = "output" if into == "adapter" else "adapter"
        raise CoalaError(f"Found {flags} with --into {into}; expected it only with --into {other}. Fix: remove it.")
