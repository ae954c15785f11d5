"""Rows read once and kept, so that rows which begin like one of them go on from there.

What a causal model makes of a row's first tokens does not depend on what follows. Two replies to one prompt, or the
turns of one conversation, therefore need each token once. Knows nothing of text, and nothing of who shares what.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from coala.backbone.network import Network


class _Kept(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values of the rows that were read; a branch sees those it asks for and leaves none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows: Tensor | None = None
        self.columns = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.rows is None:
            self.keys, self.values, self.is_initialized = key_states, value_states, True
            return key_states, value_states
        return self._before(self.keys, key_states), self._before(self.values, value_states)

    def _before(self, kept: Tensor | None, new: Tensor) -> Tensor:
        assert kept is not None
        # Gathered layer by layer as the forward passes through: never a copy of more than one layer at a time.
        return torch.cat([kept[:, :, : self.columns].index_select(0, self.rows), new], dim=2)  # type: ignore[arg-type]

    def get_seq_length(self) -> int:
        return self.columns


class Reading:
    """B right-padded rows as a causal model read them.

    ``states`` holds their hidden states (B, T, d) at each of ``layers``, ``final`` those at the end with ``to_end``;
    what stands at padding is arbitrary. With ``keep``, rows may branch off; the keys and values of every layer that
    was run then stay in memory as long as this object.
    """

    def __init__(
        self, network: Network, rows: Sequence[Sequence[int]], layers: Sequence[int], *, to_end: bool, keep: bool
    ) -> None:
        self._network, self._layers, self._to_end = network, tuple(layers), to_end
        self._kept = [_Kept() for _ in range(network.n_layers if keep else 0)]
        self._cache = Cache(layers=list(self._kept)) if keep else None
        tokens, self.lengths = network.pad(rows)
        self.tokens = tokens
        mask = None
        if network.encoder:
            mask = (torch.arange(tokens.shape[1], device=tokens.device) < self.lengths[:, None]).long()
        # A causal model's rows never see the padding on their right; without a mask its fast kernel is used.
        self.states, self.final = network.run(tokens, self._layers, mask=mask, cache=self._cache, to_end=to_end)

    def branch(
        self, trunk: Sequence[int], shared: Sequence[int], own: Sequence[Sequence[int]]
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Hidden states (R, W, d), as ``states`` and ``final``, of the rows that go on otherwise.

        Row r has the first ``shared[r]`` >= 1 tokens of row ``trunk[r]`` and then ``own[r]``, at least one in all rows
        or none in any. Only these are computed; W is the longest shared and own together.
        """
        device = self.tokens.device
        rows = torch.tensor(trunk, device=device)
        begun = torch.tensor(shared, device=device)
        width = max(s + len(o) for s, o in zip(shared, own, strict=True))
        if not any(map(len, own)):
            end = None if self.final is None else self.final[rows, :width]
            return tuple(states[rows, :width] for states in self.states), end
        tokens, lengths = self._network.pad(own)
        columns = max(shared)
        for layer in self._kept:
            layer.rows, layer.columns = rows, columns
        queries, before = (torch.arange(k, device=device) for k in (tokens.shape[1], columns))
        positions = begun[:, None] + queries
        distance = torch.cat(
            [
                positions[:, :, None] - before,
                (queries[:, None] - queries).expand(len(own), -1, -1),
            ],
            dim=2,
        )
        visible = torch.cat(
            [
                (before < begun[:, None, None]).expand(-1, len(queries), -1),
                (queries[:, None] >= queries).expand(len(own), -1, -1),
            ],
            dim=2,
        )
        states, final = self._network.run(
            tokens,
            self._layers,
            mask=self._network.mask(visible, distance),
            positions=positions.clamp(max=self._network.context - 1),
            cache=self._cache,
            to_end=self._to_end,
        )
        real = (queries < lengths[:, None]).nonzero(as_tuple=True)
        place = real[0], positions[real]

        def whole(start: Tensor, rest: Tensor) -> Tensor:
            out = start.new_zeros(len(own), width, start.shape[2])
            out[:, :columns] = start[rows, :columns]
            out[place] = rest[real]
            return out

        joined = tuple(whole(a, b) for a, b in zip(self.states, states, strict=True))
        return joined, None if self.final is None or final is None else whole(self.final, final)
