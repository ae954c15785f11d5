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

    ask: Annotated[Selection, Setting("Which pairs are asked: the most informative, random ones, or half of each.")] = (
        "random"
    )
    policy: Annotated[
        Policy, Setting("What writes the replies: the model alone, or every second one guided by the current head.")
    ] = "unguided"
    replies: Annotated[int, Ge(2), Setting("Number of replies sampled per prompt.")] = 4
    max_new_tokens: Annotated[int, Ge(1), Setting("Longest reply, in tokens.")] = 100
    temperature: Annotated[float, Gt(0), Setting("Sampling temperature of the replies.")] = 1.0
    held_out: Annotated[
        float, Gt(0), Lt(1), Setting("Fraction of prompts, and of questions, held out to measure accuracy.")
    ] = 0.2
    ahead: Annotated[int, Ge(1), Setting("Number of pairs to prepare in advance; sampling pauses beyond that.")] = 100
    batch: Annotated[int, Ge(2), Setting("Batch size of sampling, in replies, once a first pair is ready.")] = 8
    seed: Seed = 0

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise CoalaError(
                f"found --held-out {self.held_out:g}, expected a fraction between 0 and 1, fix: remove it "
                f"(default: 0.2)"
            )
        if not self.temperature > 0:
            raise CoalaError(
                f"found --temperature {self.temperature:g}, at which all replies to a prompt are the same, expected "
                "more than 0, fix: remove it (default: 1)"
            )
