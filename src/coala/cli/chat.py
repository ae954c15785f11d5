"""`coala chat`: talk to the guided model."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coala.cli.options import Download, TrustCode

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.decoding import Guidance
    from coala.values import ConvexHead, Turn

COMMANDS = """/guide on|off   guided or plain replies
/strength X     how strongly the head guides, token by token
/compare        on or off: the plain reply beside the guided one, which the conversation goes on with
/score          the head's score of the last reply, and of it as it stood after every token
/seed N         fix the next reply
/new            forget the conversation
/help           this list
/quit           leave (or Ctrl-D)"""
# From low to high, in the 256 colours of terminals; ink that can be read on each.
HEAT = ((124, 231), (173, 16), (223, 16), (255, 16), (153, 16), (74, 16), (25, 231))


def chat(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder made by `coala align`.")],
    mode: Annotated[str | None, typer.Option(help="block, token, prefix, shift, best_of, beam or none.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="Guidance strength, in mode token if no other is given.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    trust_remote_code: TrustCode = False,
    download: Download = False,
) -> None:
    """Talk to the run's model, guided by its head; replies appear as they are made.

    Example: `coala chat runs/demo`   (then /help)
    """
    from coala.align import load_run
    from coala.cli.screen import emit, say

    backbone, head, guidance = load_run(run)
    for line in backbone.reads(head.spec):
        say(line)
    guidance = guidance.changed(mode=mode, strength=strength)
    if mode is None:
        guidance = guidance.at(temperature)
    talk = _Talk(backbone, head, guidance, max_new_tokens, temperature, seed, guided=guidance.mode != "none")
    say("Type a message; /help lists commands, Ctrl-D ends.")
    while True:
        try:
            line = input("you> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            break
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
    guidance: Guidance
    max_new_tokens: int
    temperature: float
    seed: int
    guided: bool
    compare: bool = False
    replies: int = 0
    turns: list[Turn] = field(default_factory=list)

    def obey(self, line: str) -> None:
        """A command; one that is not known or does not fit is told so and changes nothing."""
        from coala.cli.screen import say
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
                if self.guided and self.guidance.mode == "none":
                    self.guidance = replace(self.guidance, mode="token")
            elif command == "strength":
                self.guidance = self.guidance.changed(strength=_number(value))
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

    def answer(self, line: str) -> None:
        """The reply to a message; Ctrl-C takes both back."""
        from coala.cli.screen import say, side_by_side
        from coala.values import CoalaError, Turn

        asked = [*self.turns, Turn("user", line)]
        plain = replace(self.guidance, mode="none", budget=None)
        try:
            if self.compare:
                unguided = self._reply(asked, plain, streams=False)
                reply = self._reply(asked, self.guidance, streams=False)
                side_by_side(unguided, reply, ("unguided", "guided"))
            else:
                reply = self._reply(asked, self.guidance if self.guided else plain, streams=True)
                print(flush=True)
        except KeyboardInterrupt:
            print(flush=True)
            return
        except CoalaError as error:
            say(f"error: {error}")
            return
        self.turns = [*asked, Turn("assistant", reply)]
        self.replies, self.seed = self.replies + 1, self.seed + 1

    def _reply(self, asked: list[Turn], guidance: Guidance, *, streams: bool) -> str:
        from coala.decoding import generate

        return generate(
            [asked],
            self.backbone,
            self.head,
            guidance,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
            on_token=(lambda _, piece: print(piece, end="", flush=True)) if streams else None,
        )[0].text

    def score(self) -> None:
        """What the head makes of the last reply; on a terminal with a colour for every token."""
        from coala.cli.screen import say
        from coala.serve.scoring import score

        if not self.turns:
            say("/score: there is no reply yet.")
            return
        work = score([self.turns[:-1]], [self.turns[-1].text], self.head, self.backbone, positions=True)
        try:
            while True:
                next(work)
        except StopIteration as end:
            found = end.value[0]
        print(f"score {found.score:.4f}", flush=True)
        if not found.scores:
            return
        low, high = min(found.scores), max(found.scores)
        if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
            print("".join(map(_heat, found.pieces, _shares(found.scores))))
        else:
            print(" ".join(f"{score:.2f}" for score in found.scores))
        print(f"after each token: {low:.4f} to {high:.4f}", flush=True)


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
