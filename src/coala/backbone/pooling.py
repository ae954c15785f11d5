"""Pooling: one feature vector for a reply from the hidden states of its tokens, at once or as the reply grows.

A reply of no tokens is worth the hidden state of the last prompt token, in every pooling but ``mean_all``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from coala.backbone.attention import attended_mean
from coala.backbone.prefix import Prefix


class RunningState(Protocol):
    """The pooled feature of B replies while they grow; every update costs O(d), whatever the length."""

    @property
    def value(self) -> Tensor:
        """Feature vectors (B, d) of the replies as they stand."""

    def peek(self, states: Tensor) -> Tensor:
        """Features (B, k, d) if a token of hidden state ``states[:, j]`` were appended; ``states`` is (B, k, d)."""

    def push(self, states: Tensor) -> None:
        """Append tokens of hidden states (B, d)."""

    def select(self, rows: Tensor | Sequence[int]) -> RunningState:
        """These rows, each as often as it is named, in a state of their own."""

    def join(self, others: Sequence[Any]) -> RunningState:
        """The rows of this state and of ``others`` of its kind, in their order, in a state of their own."""


class Pooling(Protocol):
    """``pool`` and the value of a running state agree on every prefix of a reply, ``pool`` and ``prompt`` on a prompt.

    A prompt by itself is pooled like a reply whose first token is the prompt's. A ``scored`` pooling reads hidden
    states with their attention scores, (..., d + 1), here and in its running state: ask for them with ``scored=True``.
    """

    @property
    def scored(self) -> bool:
        """Whether hidden states have to come with their attention scores."""

    def pool(self, hidden: Tensor, start: Tensor, length: Tensor) -> Tensor:
        """Features (B, d) float32 of ``hidden`` (B, T, d); row b's reply is tokens start[b] <= t < length[b]."""

    def begin(self, prefix: Prefix) -> RunningState:
        """The state of B empty replies to the prompts of ``prefix``."""

    def prompt(self, prefix: Prefix) -> Tensor:
        """Features (B, d) of the prompts of ``prefix`` by themselves, before it has grown."""


@dataclass
class _Running:
    """A sum over ``count`` tokens (B, 1); ``empty`` (B, d) is the value while the count is 0."""

    total: Tensor
    count: Tensor
    empty: Tensor

    @property
    def value(self) -> Tensor:
        return torch.where(self.count > 0, self.total / self.count.clamp(min=1), self.empty)

    def peek(self, states: Tensor) -> Tensor:
        return (self.total[:, None] + states) / (self.count[:, None] + 1)

    def push(self, states: Tensor) -> None:
        self.total, self.count = self.total + states, self.count + 1

    def select(self, rows: Tensor | Sequence[int]) -> _Running:
        index = torch.as_tensor(rows, dtype=torch.long, device=self.total.device)
        return _Running(self.total[index], self.count[index], self.empty[index])

    def join(self, others: Sequence[_Running]) -> _Running:
        return _Running(*(torch.cat([getattr(s, n) for s in (self, *others)]) for n in ("total", "count", "empty")))


@dataclass
class _Latest:
    value: Tensor

    def peek(self, states: Tensor) -> Tensor:
        return states

    def push(self, states: Tensor) -> None:
        self.value = states

    def select(self, rows: Tensor | Sequence[int]) -> _Latest:
        return _Latest(self.value[torch.as_tensor(rows, dtype=torch.long, device=self.value.device)])

    def join(self, others: Sequence[_Latest]) -> _Latest:
        return _Latest(torch.cat([state.value for state in (self, *others)]))


@dataclass
class _Attended:
    """Sums (B, d) of states and (B, 1) of their weights exp(score - ``top``), the highest score yet (B, 1)."""

    total: Tensor
    weight: Tensor
    top: Tensor
    empty: Tensor

    @property
    def value(self) -> Tensor:
        return torch.where(self.weight > 0, self.total / self.weight.where(self.weight > 0, 1.0), self.empty)

    def _with(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Total, weight and top of k copies each (B, k, ...) with ``states`` (B, k, d + 1) added."""
        score = states[..., -1:]
        top = torch.maximum(self.top[:, None], score)
        kept, added = torch.exp(self.top[:, None] - top), torch.exp(score - top)
        return self.total[:, None] * kept + states[..., :-1] * added, self.weight[:, None] * kept + added, top

    def peek(self, states: Tensor) -> Tensor:
        total, weight, _ = self._with(states)
        return total / weight

    def push(self, states: Tensor) -> None:
        self.total, self.weight, self.top = (found[:, 0] for found in self._with(states[:, None]))

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.total, self.weight, self.top, self.empty

    def select(self, rows: Tensor | Sequence[int]) -> _Attended:
        index = torch.as_tensor(rows, dtype=torch.long, device=self.total.device)
        return _Attended(*(part[index] for part in self._parts()))

    def join(self, others: Sequence[_Attended]) -> _Attended:
        return _Attended(*map(torch.cat, zip(*(state._parts() for state in (self, *others)), strict=True)))


@dataclass(frozen=True)
class Mean:
    """Mean over the reply's tokens, or over prompt and reply (``whole``)."""

    scored: ClassVar[bool] = False
    whole: bool = False

    def pool(self, hidden: Tensor, start: Tensor, length: Tensor) -> Tensor:
        at = torch.arange(hidden.shape[1], device=hidden.device)
        # An empty reply is read from the token before it.
        first = torch.zeros_like(start) if self.whole else torch.minimum(start, length - 1)
        inside = (at >= first[:, None]) & (at < length[:, None])
        # `where`, not a product: what stands at padding may be inf or nan.
        total = torch.where(inside[..., None], hidden.float(), 0.0).sum(1)
        return total / (length - first)[:, None]

    def begin(self, prefix: Prefix) -> RunningState:
        if not self.whole:
            state = prefix.state()
            return _Running(torch.zeros_like(state), torch.zeros_like(state[:, :1]), state)
        mean, count = prefix.prompt_mean(), prefix.prompt_lengths[:, None].float()
        return _Running(mean * count, count, mean)

    def prompt(self, prefix: Prefix) -> Tensor:
        return prefix.prompt_mean()


@dataclass(frozen=True)
class Last:
    """Hidden state of the last token."""

    scored: ClassVar[bool] = False

    def pool(self, hidden: Tensor, start: Tensor, length: Tensor) -> Tensor:
        return hidden[torch.arange(len(hidden), device=hidden.device), length - 1].float()

    def begin(self, prefix: Prefix) -> RunningState:
        return _Latest(prefix.state())

    def prompt(self, prefix: Prefix) -> Tensor:
        return prefix.state()


@dataclass(frozen=True)
class Attended:
    """Mean over the reply's tokens, each weighted by exp of the attention score that it gives itself.

    Not by the attention of the last token: each new token would change the weights of all before it
    (docs/features.md has the definitions that were compared).
    """

    scored: ClassVar[bool] = True

    def pool(self, hidden: Tensor, start: Tensor, length: Tensor) -> Tensor:
        at = torch.arange(hidden.shape[1], device=hidden.device)
        first = torch.minimum(start, length - 1)
        return attended_mean(hidden, (at >= first[:, None]) & (at < length[:, None]))

    def begin(self, prefix: Prefix) -> RunningState:
        state = prefix.state()[:, :-1]
        weight = torch.zeros_like(state[:, :1])
        return _Attended(torch.zeros_like(state), weight, torch.full_like(weight, -torch.inf), state)

    def prompt(self, prefix: Prefix) -> Tensor:
        return prefix.prompt_mean()


POOLINGS: Mapping[str, Pooling] = MappingProxyType(
    {"mean": Mean(), "mean_all": Mean(whole=True), "last": Last(), "attn": Attended()}
)
