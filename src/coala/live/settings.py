"""What decides a session. Imports nothing that is slow to load: commands make their flags of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from coala.messages import CoalaError
from coala.settings import Seed, Setting

Selection = Literal["active", "mixed", "random"]
Policy = Literal["unguided", "current"]


@dataclass(frozen=True, kw_only=True)
class LiveSettings:
    """``ask`` active: nine questions of ten are those expected to tell most, mixed: half of them, random: none.

    ``policy`` current: every second reply is guided by the head of the time, once there is one.
    """

    ask: Annotated[Selection, Setting("Which pairs are asked about: those that tell most, drawn, or half of each.")] = (
        "random"
    )
    policy: Annotated[
        Policy, Setting("Who writes the replies: the model by itself, or every second one guided by the head so far.")
    ] = "unguided"
    replies: Annotated[int, Ge(2), Setting("Replies drawn for each prompt.")] = 4
    max_new_tokens: Annotated[int, Ge(1), Setting("Longest reply, in tokens.")] = 100
    temperature: Annotated[float, Gt(0), Setting("Sampling temperature of the replies.")] = 1.0
    held_out: Annotated[
        float, Gt(0), Lt(1), Setting("Share of prompts, and of questions, that are held out to measure.")
    ] = 0.2
    ahead: Annotated[int, Ge(1), Setting("Pairs that are to be ready; beyond that no replies are drawn.")] = 100
    batch: Annotated[int, Ge(2), Setting("Replies drawn at a time, once some are there.")] = 8
    seed: Seed = 0

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise CoalaError(
                f"found --held-out {self.held_out:g}, expected a share between 0 and 1, fix: leave it out for a fifth"
            )
        if not self.temperature > 0:
            raise CoalaError(
                f"found --temperature {self.temperature:g}, at which all replies to a prompt are the same, expected "
                "more than 0, fix: leave it out"
            )
