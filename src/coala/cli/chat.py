"""`coala chat`: talk to the guided model."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coala.choices import Mode, Rule
from coala.cli.options import Download, TrustCode
from coala.cli.terminal import styled, write

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.decoding import Guidance
    from coala.values import ConvexHead, Turn

COMMANDS = """/system TEXT    what the model is told first; without TEXT nothing
/guide on|off   guided or plain replies
/strength X     how strongly the head guides
/temperature X  how freely tokens are drawn; 0 is greedy
/retry          another reply to the last message
/compare        on or off: the plain reply beside the guided one, which the conversation goes on with
/score          the head's score of the last reply, and of it as it stood after every token
/seed N         fix the next reply
/new            forget the conversation
/help           this list
/quit           leave (or Ctrl-D, or Ctrl-C twice)

Ctrl-C stops a reply; what was written of it stays."""
# From low to high, in the 256 colours of terminals; ink that can be read on each.
HEAT = ((124, 231), (173, 16), (223, 16), (255, 16), (153, 16), (74, 16), (25, 231))


def chat(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder made by `coala align`.")],
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    mode: Annotated[Mode | None, typer.Option(help="How the head guides decoding.")] = None,
    strength: Annotated[float | None, typer.Option(help="Guidance strength; 0 is unguided.")] = None,
    rule: Annotated[Rule | None, typer.Option(help="How scores count; calibrated: by their evidence.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 is greedy. Default: the recipe's, else the model's own.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Likeliest tokens that add up to this probability.")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="So many likeliest tokens; 0 is all.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    trust_remote_code: TrustCode = False,
    download: Download = False,
    cut: Annotated[bool, typer.Option("--cut", help="Cut the beginning of conversations that are too long.")] = False,
) -> None:
    """Talk to the run's model, guided by its head; replies appear as they are made.

    Example: `coala chat runs/demo`   (then /help)
    """
    from coala.cli.answering import opened
    from coala.cli.output import emit, say

    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    found = opened(run, sampling, mode, strength=strength, rule=rule)
    for line in found.backbone.reads(found.head.spec):
        say(line)
    talk = _Talk(
        found.backbone,
        found.head,
        found.chosen,
        max_new_tokens,
        found.temperature,
        seed,
        guided=found.chosen.mode != "none",
        system=system,
        cut=cut,
    )
    say("Type a message; /help lists commands, Ctrl-D ends.")
    while True:
        try:
            line = input("you> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            if talk.interrupted:
                break
            talk.interrupted = True
            write()
            say("Ctrl-C again ends, and so does Ctrl-D.")
            continue
        talk.interrupted = False
        if line in ("/quit", "/exit"):
            break
        if line.startswith("/"):
            talk.obey(line)
        elif line:
            talk.answer(line)
    emit({"replies": talk.replies})


@dataclass
class _Talk:
    """A conversation and how it is carried on."""

    backbone: LanguageModel
    head: ConvexHead
    chosen: Guidance
    max_new_tokens: int
    temperature: float
    seed: int
    guided: bool
    system: str | None = None
    cut: bool = False
    compare: bool = False
    interrupted: bool = False
    replies: int = 0
    turns: list[Turn] = field(default_factory=list)

    @property
    def guidance(self) -> Guidance:
        """What was chosen, as it is at this temperature."""
        return self.chosen.at(self.temperature)

    def obey(self, line: str) -> None:
        """A command; one that is not known or does not fit is told so and changes nothing."""
        from coala.cli.output import say
        from coala.values import CoalaError

        command, _, value = line[1:].partition(" ")
        value = value.strip()
        try:
            if command == "help":
                say(COMMANDS)
            elif command == "guide":
                if value not in ("on", "off"):
                    raise CoalaError(f"found {value!r}; expected on or off.")
                self.guided = value == "on"
                if self.guided and self.chosen.mode == "none":
                    self.chosen = self.chosen.changed(mode="token")
            elif command == "strength":
                self.chosen = self.chosen.changed(strength=_number(value))
                if not self.guided:
                    say(f"strength is {self.guidance.strength:g}; replies stay plain until /guide on")
                else:
                    say(f"strength is {self.guidance.strength:g}: {self.guidance}")
            elif command == "temperature":
                self._warm(_number(value))
            elif command == "system":
                self.system = value or None
                say("system prompt set" if value else "no system prompt")
            elif command == "retry" and not value:
                self.retry()
            elif command == "seed":
                self.seed = _seed(value)
            elif command == "compare" and not value:
                self.compare = not self.compare
                say(f"compare is {'on' if self.compare else 'off'}")
            elif command == "score" and not value:
                self.score()
            elif command == "new" and not value:
                self.turns = []
            else:
                say(f"{line}: is no command; /help lists them.")
        except CoalaError as error:
            say(f"{line}: {error}")

    def _warm(self, temperature: float) -> None:
        from coala.cli.answering import cooled
        from coala.cli.output import say
        from coala.values import CoalaError

        if not 0 <= temperature < math.inf:
            raise CoalaError(f"temperature is {temperature}; expected a finite number of at least 0 (0 is greedy).")
        self.temperature = temperature
        cooled(self.chosen, temperature)
        say(f"temperature is {temperature:g}")

    def retry(self) -> None:
        """Another reply to the last message, with the next seed."""
        from coala.cli.output import say

        if not self.turns:
            say("/retry: there is no reply yet.")
            return
        line = self.turns[-2].text
        before, self.turns = self.turns, self.turns[:-2]
        if not self.answer(line):
            self.turns = before

    def answer(self, line: str) -> bool:
        """The reply to a message, and whether there is one: Ctrl-C ends it, and takes both back if nothing is there."""
        from coala.cli.answering import conversation, room
        from coala.cli.output import say, side_by_side
        from coala.values import CoalaError, Turn

        asked = [*self.turns, Turn("user", line)]
        plain = replace(self.guidance, mode="none", budget=None)
        pieces: list[str] = []

        def hear(piece: str) -> None:
            pieces.append(piece)
            write(piece, end="")

        try:
            prompt = conversation(self.system, *asked)
            mend = "/new forgets the conversation; --cut loses its beginning."
            length = room(self.backbone, prompt, self.max_new_tokens, cut=self.cut, mend=mend)
            if self.compare:
                unguided = self._reply(prompt, plain, length)
                reply = self._reply(prompt, self.guidance, length)
                side_by_side(unguided, reply, ("unguided", "guided"))
            else:
                reply = self._reply(prompt, self.guidance if self.guided else plain, length, hear)
                write()
        except KeyboardInterrupt:
            self.interrupted = True
            write()
            reply = "".join(pieces)
            say("stopped; what was written stays." if reply else "stopped; the message is forgotten.")
            if not reply:
                return False
        except CoalaError as error:
            say(f"error: {error}")
            return False
        self.turns = [*asked, Turn("assistant", reply)]
        self.replies, self.seed = self.replies + 1, self.seed + 1
        return True

    def _reply(
        self, prompt: Sequence[Turn], guidance: Guidance, length: int, hear: Callable[[str], None] | None = None
    ) -> str:
        from coala.decoding import generate

        return generate(
            [prompt],
            self.backbone,
            self.head,
            guidance,
            max_new_tokens=length,
            temperature=self.temperature,
            seed=self.seed,
            on_token=None if hear is None else lambda _, piece: hear(piece),
        )[0].text

    def score(self) -> None:
        """What the head makes of the last reply; on a terminal with a colour for every token."""
        from coala.cli.answering import conversation
        from coala.cli.output import say
        from coala.serve.scoring import score

        if not self.turns:
            say("/score: there is no reply yet.")
            return
        prompt = conversation(self.system, *self.turns[:-1])
        work = score([prompt], [self.turns[-1].text], self.head, self.backbone, positions=True)
        try:
            while True:
                next(work)
        except StopIteration as end:
            found = end.value[0]
        write(f"score {found.score:.4f}")
        if not found.scores:
            return
        low, high = min(found.scores), max(found.scores)
        if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
            styled("".join(map(_heat, found.pieces, _shares(found.scores))))
        else:
            write(" ".join(f"{score:.2f}" for score in found.scores))
        write(f"after each token: {low:.4f} to {high:.4f}")


def _shares(scores: tuple[float, ...]) -> list[float]:
    """Where each score lies between the lowest (0) and the highest (1)."""
    low, high = min(scores), max(scores)
    return [(score - low) / (high - low) if high > low else 0.5 for score in scores]


def _heat(piece: str, share: float) -> str:
    """A token's text on its colour; colours do not run over the end of a line, nor does a token end them."""
    ground, ink = HEAT[min(int(share * len(HEAT)), len(HEAT) - 1)]
    lines = "".join(c if c == "\n" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in piece).split("\n")
    return "\n".join(f"\x1b[48;5;{ground};38;5;{ink}m{line}\x1b[0m" if line else "" for line in lines)


def _number(text: str) -> float:
    from coala.values import CoalaError

    try:
        return float(text)
    except ValueError:
        raise CoalaError(f"could not convert {text!r}; expected a number of at least 0, such as 2.5.") from None


def _seed(text: str) -> int:
    from coala.values import CoalaError

    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise CoalaError(f"could not convert {text!r}; expected a whole number of at least 0.")
    return int(text)
