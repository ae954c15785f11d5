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
    """One layer's keys and values of the rows that were read; a branch sees those it asks for.

    ``places`` (R, W), if set, are the columns of a branch's rows, beginning and own tokens, in their order: what is
    there is left in ``taken`` for a branch that is to be branched off itself.
    """

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.is_initialized = keys, values, keys is not None
        self.rows: Tensor | None = None
        self.columns = 0
        self.places: Tensor | None = None
        self.taken: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.keys, self.values, self.is_initialized = key_states, value_states, True
            return key_states, value_states
        both = self._before(self.keys, key_states), self._before(self.values, value_states)
        if self.places is not None:
            self.taken = self._in_order(both[0]), self._in_order(both[1])
        return both

    def _before(self, kept: Tensor | None, new: Tensor) -> Tensor:
        assert kept is not None
        # Gathered layer by layer as the forward passes through: never a copy of more than one layer at a time.
        return torch.cat([kept[:, :, : self.columns].index_select(0, self.rows), new], dim=2)  # type: ignore[arg-type]

    def _in_order(self, states: Tensor) -> Tensor:
        assert self.places is not None
        index = self.places[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
        return states.gather(2, index)

    def get_seq_length(self) -> int:
        return self.columns


class Reading:
    """B right-padded rows as a causal model read them.

    ``states`` holds their hidden states (B, T, d) at each of ``layers``, ``final`` those at the end with ``to_end``;
    what stands at padding is arbitrary. With ``keep``, rows may branch off; the keys and values of every layer that
    was run then stay in memory as long as this object.
    """

    states: tuple[Tensor, ...]
    final: Tensor | None

    def __init__(
        self, network: Network, rows: Sequence[Sequence[int]], layers: Sequence[int], *, to_end: bool, keep: bool
    ) -> None:
        self._network, self._layers, self._to_end = network, tuple(layers), to_end
        self._kept = [_Kept() for _ in range(network.n_layers if keep else 0)]
        tokens, lengths = network.pad(rows)
        mask = None
        if network.encoder:
            mask = (torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]).long()
        cache = Cache(layers=list(self._kept)) if keep else None
        # A causal model's rows never see the padding on their right; without a mask its fast kernel is used.
        self.states, self.final = network.run(tokens, self._layers, mask=mask, cache=cache, to_end=to_end)

    def branch(
        self, parent: Sequence[int], shared: Sequence[int], own: Sequence[Sequence[int]], *, keep: bool = False
    ) -> Reading:
        """The rows that go on otherwise: row r has the first ``shared[r]`` >= 1 tokens of row ``parent[r]``, then
        ``own[r]``, at least one token in all rows or none in any. Only these are computed.
        """
        device = self.states[0].device
        rows, begun = torch.tensor(parent, device=device), torch.tensor(shared, device=device)
        width = max(s + len(o) for s, o in zip(shared, own, strict=True))
        found = object.__new__(Reading)
        found._network, found._layers, found._to_end = self._network, self._layers, self._to_end
        found._kept = []
        if not any(map(len, own)):
            found.states = tuple(states[rows, :width] for states in self.states)
            found.final = None if self.final is None else self.final[rows, :width]
            if keep:
                found._kept = [
                    _Kept(kept.keys[rows], kept.values[rows])
                    for kept in self._kept
                    if kept.keys is not None and kept.values is not None
                ]
            return found
        tokens, lengths = self._network.pad(own)
        columns = max(shared)
        queries, before = (torch.arange(k, device=device) for k in (tokens.shape[1], columns))
        at = torch.arange(width, device=device)
        # Column of token t of a branch behind the beginnings of the widest; what lies behind its end is arbitrary.
        places = torch.where(at < begun[:, None], at, columns + (at - begun[:, None]).clamp(0, len(queries) - 1))
        for layer in self._kept:
            layer.rows, layer.columns, layer.places, layer.taken = rows, columns, places if keep else None, None
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
            cache=Cache(layers=list(self._kept)),
            to_end=self._to_end,
        )
        real = (queries < lengths[:, None]).nonzero(as_tuple=True)
        place = real[0], positions[real]

        def whole(start: Tensor, rest: Tensor) -> Tensor:
            out = start.new_zeros(len(own), width, start.shape[2])
            out[:, :columns] = start[rows, :columns]
            out[place] = rest[real]
            return out

        found.states = tuple(whole(a, b) for a, b in zip(self.states, states, strict=True))
        found.final = None if self.final is None or final is None else whole(self.final, final)
        # Layers above the last one that is run have nothing to keep.
        found._kept = [_Kept(*layer.taken) if layer.taken else _Kept() for layer in self._kept] if keep else []
        for layer in self._kept:
            layer.taken = None
        return found
