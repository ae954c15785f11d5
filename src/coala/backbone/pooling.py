"""Pooling: one feature vector for a reply from the hidden states of its tokens, at once or as the reply grows.

A reply of no tokens is worth the hidden state of the last prompt token, in every pooling but ``mean_all``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

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


class Pooling(Protocol):
    """``pool`` and the value of a running state agree on every prefix of a reply, ``pool`` and ``prompt`` on a prompt.

    A prompt by itself is pooled like a reply whose first token is the prompt's.
    """

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


@dataclass
class _Latest:
    value: Tensor

    def peek(self, states: Tensor) -> Tensor:
        return states

    def push(self, states: Tensor) -> None:
        self.value = states

    def select(self, rows: Tensor | Sequence[int]) -> _Latest:
        return _Latest(self.value[torch.as_tensor(rows, dtype=torch.long, device=self.value.device)])


@dataclass(frozen=True)
class Mean:
    """Mean over the reply's tokens, or over prompt and reply (``whole``)."""

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

    def pool(self, hidden: Tensor, start: Tensor, length: Tensor) -> Tensor:
        return hidden[torch.arange(len(hidden), device=hidden.device), length - 1].float()

    def begin(self, prefix: Prefix) -> RunningState:
        return _Latest(prefix.state())

    def prompt(self, prefix: Prefix) -> Tensor:
        return prefix.state()


POOLINGS: Mapping[str, Pooling] = MappingProxyType({"mean": Mean(), "mean_all": Mean(whole=True), "last": Last()})
