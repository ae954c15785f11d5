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

from coala.cli.flags import Given, Of, with_settings
from coala.cli.options import Download, OwnTemperature, TrustCode
from coala.cli.terminal import styled, write
from coala.messages import CoalaError
from coala.settings import GuidanceSettings

if TYPE_CHECKING:
    from coala.alignment.talking import Talker
    from coala.values import Turn

COMMANDS = """/system TEXT    set the system prompt; without TEXT remove it
/guide on|off   guided or unguided replies
/strength X     guidance strength
/temperature X  sampling temperature; 0 is greedy
/retry          regenerate the last reply
/compare        on or off: also show the unguided reply; the conversation continues with the guided one
/score          the head's score of the last reply, in full and after every token
/seed N         set the random seed of the next reply
/new            forget the conversation
/help           show this list
/quit           exit (also Ctrl-D, or Ctrl-C twice)

Ctrl-C stops a reply; the text so far is kept."""
# From low to high, in the 256 colours of terminals; ink that can be read on each.
HEAT = ((124, 231), (173, 16), (223, 16), (255, 16), (153, 16), (74, 16), (25, 231))


@with_settings
def chat(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder made by `coala align`.")],
    *,
    system: Annotated[str | None, typer.Option(help="System prompt (default: none).")] = None,
    guidance: Annotated[Given, Of(GuidanceSettings, ("mode", "strength", "over", "rule", "rater"))],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of a reply, in tokens.")] = 200,
    temperature: OwnTemperature = None,
    sampling: Annotated[Given, Of(GuidanceSettings, ("top_p", "top_k"))],
    seed: Annotated[int, typer.Option(min=0, help="Random seed of sampling.")] = 0,
    trust_remote_code: TrustCode = False,
    download: Download = False,
    cut: Annotated[
        bool, typer.Option("--cut", help="Truncate conversations that are too long, from the start.")
    ] = False,
) -> None:
    """Chat with the run's model, guided by its head; replies are streamed.

    Example: `coala chat runs/demo`   (then /help)
    """
    from coala.alignment.talking import open_talker
    from coala.cli.output import emit, say

    talker = open_talker(run, {"temperature": temperature, **sampling}, guidance, say)
    talk = _Talk(talker, max_new_tokens, seed, guided=talker.chosen.mode != "none", system=system, cut=cut)
    say("Type a message. /help lists the commands, Ctrl-D exits.")
    while (line := talk.read()) is not None:
        if line.startswith("/"):
            talk.obey(line)
        elif line:
            talk.answer(line)
    emit({"replies": talk.replies})


@dataclass
class _Talk:
    """A conversation and how it is carried on."""

    talker: Talker
    max_new_tokens: int
    seed: int
    guided: bool
    system: str | None = None
    cut: bool = False
    compare: bool = False
    interrupted: bool = False
    replies: int = 0
    turns: list[Turn] = field(default_factory=list)

    def read(self) -> str | None:
        """What is typed next; None at the end: /quit, Ctrl-D, or Ctrl-C twice."""
        from coala.cli.output import say

        while True:
            try:
                line = input("you> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return None
            except KeyboardInterrupt:
                if self.interrupted:
                    return None
                self.interrupted = True
                write()
                say("Press Ctrl-C again, or Ctrl-D, to exit.")
                continue
            self.interrupted = False
            return None if line in ("/quit", "/exit") else line

    def obey(self, line: str) -> None:
        """A command; one that is not known or does not fit is told so and changes nothing."""
        from coala.cli.output import say

        command, _, value = line[1:].partition(" ")
        value = value.strip()
        with_value: dict[str, Callable[[str], object]] = {
            "help": lambda _: say(COMMANDS),
            "guide": self._guide,
            "strength": self._strengthen,
            "temperature": self._warm,
            "system": self._tell,
            "seed": self._fix,
        }
        alone: dict[str, Callable[[], object]] = {
            "retry": self.retry,
            "compare": self._compare,
            "score": self.score,
            "new": self.turns.clear,
        }
        try:
            if command in with_value:
                with_value[command](value)
            elif command in alone and not value:
                alone[command]()
            else:
                say(f"{line}: unknown command; /help lists them.")
        except CoalaError as error:
            say(f"{line}: {error}")

    def _guide(self, value: str) -> None:
        if value not in ("on", "off"):
            raise CoalaError(f"found {value!r}; expected on or off.")
        self.guided = value == "on"
        if self.guided and self.talker.chosen.mode == "none":
            self.talker = replace(self.talker, chosen=self.talker.chosen.changed(mode="token"))

    def _strengthen(self, value: str) -> None:
        from coala.cli.output import say

        self.talker = replace(self.talker, chosen=self.talker.chosen.changed(strength=_number(value)))
        guidance = self.talker.guidance
        if self.guided:
            say(f"strength is {guidance.strength:g}: {guidance}")
        else:
            say(f"strength is {guidance.strength:g}; replies are unguided until /guide on")

    def _warm(self, value: str) -> None:
        from coala.cli.output import say

        temperature = _number(value)
        if not 0 <= temperature < math.inf:
            raise CoalaError(f"temperature is {temperature}; expected a finite number of at least 0 (0 is greedy).")
        self.talker = self.talker.changed(temperature=temperature)
        say(f"temperature is {temperature:g}")

    def _tell(self, value: str) -> None:
        from coala.cli.output import say

        self.system = value or None
        say("system prompt set" if value else "no system prompt")

    def _fix(self, value: str) -> None:
        self.seed = _seed(value)

    def _compare(self) -> None:
        from coala.cli.output import say

        self.compare = not self.compare
        say(f"compare is {'on' if self.compare else 'off'}")

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
        from coala.cli.output import say
        from coala.values import Turn

        asked = [*self.turns, Turn("user", line)]
        pieces: list[str] = []
        try:
            reply = self._written(asked, pieces)
        except KeyboardInterrupt:
            self.interrupted = True
            write()
            reply = "".join(pieces)
            say("stopped; the text so far is kept." if reply else "stopped; the message was dropped.")
            if not reply:
                return False
        except CoalaError as error:
            say(f"error: {error}")
            return False
        self.turns = [*asked, Turn("assistant", reply)]
        self.replies, self.seed = self.replies + 1, self.seed + 1
        return True

    def _written(self, asked: Sequence[Turn], pieces: list[str]) -> str:
        """The reply, shown as it is made and kept in ``pieces``; beside the plain one if both are wanted."""
        from coala.alignment.talking import conversation
        from coala.cli.output import side_by_side

        def hear(piece: str) -> None:
            pieces.append(piece)
            write(piece, end="")

        talker, prompt = self.talker, conversation(self.system, *asked)
        mend = "Start over with /new, or restart with --cut to truncate it."
        length = [talker.room(prompt, self.max_new_tokens, cut=self.cut, mend=mend)]
        if self.compare:
            unguided = talker.reply([prompt], talker.unguided, length, seed=self.seed)[0].text
            reply = talker.reply([prompt], talker.guidance, length, seed=self.seed)[0].text
            side_by_side(unguided, reply, ("unguided", "guided"))
            return reply
        guidance = talker.guidance if self.guided else talker.unguided
        reply = talker.reply([prompt], guidance, length, seed=self.seed, on_piece=hear)[0].text
        write()
        return reply

    def score(self) -> None:
        """What the head makes of the last reply; on a terminal with a colour for every token."""
        from coala.alignment.talking import conversation
        from coala.cli.output import say
        from coala.serve.scoring import score

        if not self.turns:
            say("/score: there is no reply yet.")
            return
        prompt = conversation(self.system, *self.turns[:-1])
        work = score([prompt], [self.turns[-1].text], self.talker.head, self.talker.backbone, positions=True)
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
    try:
        return float(text)
    except ValueError:
        raise CoalaError(f"could not convert {text!r}; expected a number of at least 0, such as 2.5.") from None


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise CoalaError(f"could not convert {text!r}; expected a whole number of at least 0.")
    return int(text)
