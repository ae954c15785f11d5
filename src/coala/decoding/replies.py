"""A reply in the making: its tokens, where a stop string cuts it, what it has spent, and its text as a stream.

Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch

from coala.decoding.budget import Account

Decode = Callable[[list[int]], str]
OnToken = Callable[[int, str], None]
Finish = Literal["", "stop", "length", "cancelled"]
# What an unfinished or invalid byte sequence decodes to.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Listener(Protocol):
    """Hears of a reply while it grows."""

    def send(self, reply: Reply, *, last: bool) -> None:
        """Take what has become certain; everything if this is the ``last`` of the reply."""


@dataclass
class Halt:
    """What a reply and its branches have in common: whether they are to end at the next token."""

    asked: bool = False


@dataclass
class Reply:
    """One reply (or one branch of it) that may grow to ``room`` tokens; ``decode`` makes text of its tokens.

    ``seed`` and ``prompt_id`` name its noise; it ends before the first of the ``stop`` strings, and ``finish`` then
    tells why it ended. ``features[t]`` is the pooled feature (d,) after t tokens, kept while a cut back to t tokens is
    possible, else only the latest; ``cut`` is the text a stop string left. ``prompt`` is the prompt's own feature (d,),
    where the head's gates act on it; ``account`` what shifting its distribution has cost. ``alternatives`` are the
    ``n_top`` likeliest tokens at every step of a sampled reply, with their log-probabilities under the base model.
    """

    index: int
    prompt_id: str
    room: int
    decode: Decode
    seed: int = 0
    stop: tuple[str, ...] = ()
    stream: Listener | None = None
    n_top: int = 0
    branch: int = 0
    finish: Finish = ""
    halt: Halt = field(default_factory=Halt)
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    alternatives: list[list[tuple[int, float]]] = field(default_factory=list)
    features: list[torch.Tensor] = field(default_factory=list)
    cut: str | None = None
    prompt: torch.Tensor | None = None
    account: Account = field(default_factory=Account)

    def branched(self, branch: int) -> Reply:
        """A copy that grows on its own, unheard."""
        return replace(
            self,
            branch=branch,
            stream=None,
            tokens=self.tokens.copy(),
            log_probs=self.log_probs.copy(),
            alternatives=self.alternatives.copy(),
            features=self.features.copy(),
        )

    def become(self, branch: Reply) -> None:
        """Take over what ``branch`` has grown to."""
        self.tokens, self.log_probs = branch.tokens, branch.log_probs
        self.features, self.cut = branch.features, branch.cut
        self.alternatives, self.finish = branch.alternatives, branch.finish

    def send(self) -> None:
        """Hand on what has become certain of the text, if somebody listens."""
        if self.stream is not None:
            self.stream.send(self, last=bool(self.finish))

    def cut_at_stop(self) -> bool:
        """Cut the reply before the earliest stop string, if one is there; tokens wholly behind the cut are dropped."""
        text = self.decode(self.tokens)
        places = [place for place in map(text.find, self.stop) if place >= 0]
        if not places:
            return False
        self.cut = text[: min(places)]
        kept = len(self.tokens)
        while kept and self.decode(self.tokens[: kept - 1]).startswith(self.cut):
            kept -= 1
        del self.tokens[kept:], self.log_probs[kept:], self.alternatives[kept:], self.features[kept + 1 :]
        return True

    @property
    def text(self) -> str:
        return self.decode(self.tokens) if self.cut is None else self.cut


class Stream:
    """Text handed on as it becomes certain: the pieces of a reply add up to its final text.

    Only where a tokenizer takes back text of its own (byte fallback does, if bytes turn out not to be UTF-8) do they
    keep what had been certain.
    """

    def __init__(self, on_token: OnToken, stop: Sequence[str]) -> None:
        self._on_token = on_token
        self._beginnings = {s[:length] for s in stop for length in range(1, len(s))}
        self._longest = max(map(len, stop), default=1) - 1
        self._sent: dict[int, str] = {}

    def send(self, reply: Reply, *, last: bool = False) -> None:
        """Hand on what no later token can change; everything if this is the ``last`` of the reply.

        Held back: an unfinished character, and an end that may be the beginning of a stop string.
        """
        text = reply.text
        sent = self._sent.get(reply.index, "")
        if not last:
            text = text.rstrip(REPLACEMENT)
            for length in range(min(self._longest, len(text)), 0, -1):
                if text[-length:] in self._beginnings:
                    text = text[:-length]
                    break
            # A tokenizer that tidies spaces may rewrite its last words; wait until it has settled.
            if not text.startswith(sent):
                return
        piece = text[len(sent) :]
        if piece:
            self._sent[reply.index] = sent + piece
            self._on_token(reply.index, piece)
