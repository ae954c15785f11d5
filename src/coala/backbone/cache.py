"""The keys and values of B growing rows, two ways: one buffer under a tree mask, or a copy per candidate.

Both offer ``prefill``, ``peek``, ``keep``, ``push`` and ``select``; :class:`coala.backbone.prefix.Prefix` tells when.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from coala.backbone.network import OWN_PATTERN, BackboneError, Network

# Hidden states of new tokens at the wanted layer and at the end, both (B, k, d).
States = tuple[Tensor, Tensor]


class Memory(Protocol):
    """The cache of B rows. Between ``peek`` and ``keep`` it also holds k candidates' columns per row."""

    def prefill(self, tokens: Tensor, lengths: Tensor, layer: int) -> States:
        """Read left-padded prompts (B, T) into an empty cache."""

    def peek(self, tokens: Tensor, lengths: Tensor, layer: int) -> States:
        """Append each of ``tokens`` (B, k) to its row, on its own, as a candidate."""

    def keep(self, which: Tensor) -> None:
        """Make candidate ``which`` (B,) of the latest ``peek`` part of its row."""

    def push(self, tokens: Tensor, lengths: Tensor, layer: int) -> States:
        """Append ``tokens`` (B,) for good; candidates are forgotten."""

    def select(self, rows: Tensor, *, candidates: bool) -> Memory:
        """A cache of its own with these rows, any of them as often as named, with or without their candidates."""


class _Columns(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values in a buffer with room to grow, so that a new column copies none of the old ones."""

    def __init__(self, columns: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.used = 0
        self._least = columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self._room(key_states, self._least), self._room(value_states, self._least)
        self.is_initialized = True

    @staticmethod
    def _room(like: Tensor, columns: int) -> Tensor:
        return like.new_empty(like.shape[0], like.shape[1], columns, like.shape[3])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        end = self.used + key_states.shape[-2]
        if end > self.keys.shape[-2]:
            self._grow(max(end, self.used + self.used // 2 + 32))
        self.keys[:, :, self.used : end] = key_states
        self.values[:, :, self.used : end] = value_states
        self.used = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _grow(self, columns: int) -> None:
        assert self.keys is not None
        assert self.values is not None
        for name, old in (("keys", self.keys), ("values", self.values)):
            new = self._room(old, columns)
            new[:, :, : self.used] = old[:, :, : self.used]
            setattr(self, name, new)

    def get_seq_length(self) -> int:
        return self.used

    def keep(self, length: int, column: Tensor) -> None:
        """Column ``column`` (B,) of each row becomes column ``length``, the last."""
        assert self.keys is not None
        assert self.values is not None
        rows = torch.arange(len(column), device=column.device)
        for states in (self.keys, self.values):
            states[:, :, length] = states[rows, :, column]
        self.used = length + 1

    def taken(self, rows: Tensor, first: int, used: int) -> _Columns:
        """Columns ``first`` to ``used`` of these rows."""
        assert self.keys is not None
        assert self.values is not None
        new = _Columns()
        columns = used - first + 32
        for name, old in (("keys", self.keys), ("values", self.values)):
            room = old.new_empty(len(rows), old.shape[1], columns, old.shape[3])
            torch.index_select(old[:, :, first:used], 0, rows, out=room[:, :, : used - first])
            setattr(new, name, room)
        new.dtype, new.device, new.is_initialized = self.dtype, self.device, True
        new.used = used - first
        return new

    @staticmethod
    def joined(parts: Sequence[tuple[_Columns, int]]) -> _Columns:
        """The rows of several buffers, each with so many columns in use, flush right under one another."""
        used = max(columns for _, columns in parts)
        new = _Columns()
        for name in ("keys", "values"):
            all_old = [(getattr(part, name), columns) for part, columns in parts]
            like = all_old[0][0]
            # Zeros, not whatever is there: a masked nan is still nan in some attention kernels.
            room = like.new_zeros(sum(len(old) for old, _ in all_old), like.shape[1], used + 64, like.shape[3])
            row = 0
            for old, columns in all_old:
                room[row : row + len(old), :, used - columns : used] = old[:, :, :columns]
                row += len(old)
            setattr(new, name, room)
        new.dtype, new.device, new.is_initialized = parts[0][0].dtype, parts[0][0].device, True
        new.used = used
        return new


class TreeMemory:
    """One column per token and row; candidates of a row stand side by side and a mask hides them from each other."""

    def __init__(self, network: Network, layers: list[_Columns] | None = None) -> None:
        self.network = network
        self.layers = layers if layers is not None else [_Columns() for _ in range(network.n_layers)]
        self.cache = Cache(layers=list(self.layers))
        # Columns in use without candidates, and how many of them are padding on each row's left.
        self.length = 0
        self.padding = torch.zeros(0, dtype=torch.long)
        # Whether a row that is longer by one token sees every column: then no mask is made.
        self._plain = False

    def _pad(self, length: int, padding: Tensor) -> None:
        self.length, self.padding = length, padding
        self._plain = not (bool(padding.any()) or any(self.network.windows.values()))

    def prefill(self, tokens: Tensor, lengths: Tensor, layer: int) -> States:
        self._pad(tokens.shape[1], tokens.shape[1] - lengths)
        for columns in self.layers:
            columns._least = self.length + 64
        at = torch.arange(self.length, device=tokens.device)
        mask = None
        if not self._plain:
            distance = at[:, None] - at
            visible = (distance >= 0) & (at >= self.padding[:, None, None])
            mask = self.network.mask(visible, distance.expand_as(visible))
        positions = (at - self.padding[:, None]).clamp(min=0)
        return self._run(tokens, layer, mask, positions)

    def peek(self, tokens: Tensor, lengths: Tensor, layer: int) -> States:
        self._forget()
        k = tokens.shape[1]
        if k == 1 and self._plain:
            return self._run(tokens, layer, None, lengths[:, None])
        column = torch.arange(self.length + k, device=tokens.device)
        own = column == self.length + torch.arange(k, device=tokens.device)[:, None]
        visible = own | ((column < self.length) & (column >= self.padding[:, None, None]))
        distance = (lengths[:, None, None] - (column - self.padding[:, None, None])).expand_as(visible)
        mask = self.network.mask(visible, torch.where(own, 0, distance))
        return self._run(tokens, layer, mask, lengths[:, None].expand(-1, k))

    def _run(self, tokens: Tensor, layer: int, mask: Any, positions: Tensor) -> States:
        (at_layer,), final = self.network.run(
            tokens, (layer,), mask=mask, positions=positions, cache=self.cache, to_end=True
        )
        assert final is not None
        return at_layer, final

    def _forget(self) -> None:
        for columns in self.layers:
            columns.used = self.length

    def keep(self, which: Tensor) -> None:
        for columns in self.layers:
            columns.keep(self.length, self.length + which)
        self.length += 1

    def push(self, tokens: Tensor, lengths: Tensor, layer: int) -> States:
        states = self.peek(tokens[:, None], lengths, layer)
        self.length += 1
        return states

    def select(self, rows: Tensor, *, candidates: bool) -> TreeMemory:
        padding = self.padding[rows]
        first = int(padding.min()) if len(rows) else 0
        used = self.layers[0].used if candidates else self.length
        new = TreeMemory(self.network, [columns.taken(rows, first, used) for columns in self.layers])
        new._pad(self.length - first, padding - first)
        return new

    @staticmethod
    def joined(memories: Sequence[TreeMemory]) -> TreeMemory:
        """One memory with the rows of all, in their order, without their candidates."""
        network, longest = memories[0].network, max(memory.length for memory in memories)
        layers = [
            _Columns.joined([(memory.layers[i], memory.length) for memory in memories]) for i in range(network.n_layers)
        ]
        new = TreeMemory(network, layers)
        new._pad(longest, torch.cat([memory.padding + (longest - memory.length) for memory in memories]))
        return new


class CopiedMemory:
    """The model's own cache under its own masks; to peek, every row's cache is repeated once per candidate.

    Slower and k times the memory, but right for any model that decodes with a cache.
    """

    def __init__(self, network: Network, cache: Any = None) -> None:
        self.network = network
        self.cache = cache if cache is not None else DynamicCache(config=network.config)
        self.candidates: Any = None
        self.k = 0
        self.mask = torch.zeros(0, 0, dtype=torch.long)

    def prefill(self, tokens: Tensor, lengths: Tensor, layer: int) -> States:
        width = tokens.shape[1]
        at = torch.arange(width, device=tokens.device)
        self.mask = (at >= (width - lengths)[:, None]).long()
        positions = (at - (width - lengths)[:, None]).clamp(min=0)
        return self._run(tokens, layer, self.mask, positions, self.cache)

    def peek(self, tokens: Tensor, lengths: Tensor, layer: int) -> States:
        rows, k = tokens.shape
        repeat = torch.arange(rows, device=tokens.device).repeat_interleave(k)
        self.candidates, self.k = _reordered(self.cache, repeat), k
        mask = _with_column(self.mask[repeat])
        states = self._run(tokens.reshape(-1, 1), layer, mask, lengths[repeat, None], self.candidates)
        return states[0].reshape(rows, k, -1), states[1].reshape(rows, k, -1)

    def keep(self, which: Tensor) -> None:
        rows = torch.arange(len(which), device=which.device) * self.k + which
        self.candidates.reorder_cache(rows)
        self.cache, self.candidates = self.candidates, None
        self.mask = _with_column(self.mask)

    def push(self, tokens: Tensor, lengths: Tensor, layer: int) -> States:
        self.candidates = None
        self.mask = _with_column(self.mask)
        return self._run(tokens[:, None], layer, self.mask, lengths[:, None], self.cache)

    def _run(self, tokens: Tensor, layer: int, mask: Tensor, positions: Tensor, cache: Any) -> States:
        # Unpadded rows need no mask; a purely recurrent model has none left once it has read the prompt.
        absorbed = tokens.shape[1] == 1 and not self.network.attends
        shown = None if absorbed or bool(mask.all()) else mask
        (at_layer,), final = self.network.run(
            tokens, (layer,), mask=shown, positions=positions, cache=cache, to_end=True
        )
        assert final is not None
        return at_layer, final

    def select(self, rows: Tensor, *, candidates: bool) -> CopiedMemory:
        new = CopiedMemory(self.network, _reordered(self.cache, rows))
        new.mask = self.mask[rows]
        if candidates and self.candidates is not None:
            new.k = self.k
            spread = (rows[:, None] * self.k + torch.arange(self.k, device=rows.device)).reshape(-1)
            new.candidates = _reordered(self.candidates, spread)
        return new


def _reordered(cache: Any, rows: Tensor) -> Any:
    """A cache of its own with these rows."""
    new = copy.copy(cache)
    # Plain attention layers replace their tensors when they grow or are reordered, so a shallow copy shares nothing
    # that is written. Recurrent states may be written in place.
    new.layers = [
        copy.copy(layer) if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) else copy.deepcopy(layer)
        for layer in cache.layers
    ]
    new.reorder_cache(rows)
    return new


def _with_column(mask: Tensor) -> Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)


def tree_obstacle(network: Network) -> str:
    """Why candidates cannot share one forward under a tree mask; empty if they can, found out by trying it."""
    name = type(network.body).__name__
    if network.encoder:
        return f"{name} is an encoder"
    kinds = {*network.windows} - {"all", "full_attention", "sliding_attention"}
    if kinds:
        return f"{name} has layers of kind {', '.join(sorted(kinds))}"
    if network.config._attn_implementation not in ("eager", "sdpa"):
        return f"{network.config._attn_implementation} attention takes no mask of its own"
    if network.config.model_type in OWN_PATTERN:
        return f"{name} adds an attention pattern of its own to any mask"
    if not {"position_ids", "past_key_values"} <= network.arguments:
        return f"{name} takes no position ids"
    rows = [[1, 2, 3, 4, 5, 6], [7, 8, 9]]
    tokens, lengths = network.pad([[token % network.vocabulary for token in row] for row in rows], left=True)
    candidates = torch.tensor([[3, 9, 5], [4, 2, 8]], device=network.device) % network.vocabulary
    found = []
    for memory in (TreeMemory(network), CopiedMemory(network)):
        try:
            memory.prefill(tokens, lengths, network.n_layers)
            found.append(memory.peek(candidates, lengths, network.n_layers)[1].float())
        except Exception as error:  # whatever a foreign model's forward raises, it means the same
            if isinstance(memory, CopiedMemory):
                raise BackboneError(
                    f"{name} cannot be decoded from with a cache of keys and values: {error}"
                ) from error
            return f"{name} refuses the mask ({type(error).__name__})"
    tree, copied = found
    # An unhidden token would move the states by far more than rounding does.
    exact = network.dtype == torch.float32 and not getattr(network.causal, "is_quantized", False)
    if (tree - copied).norm() > (1e-3 if exact else 5e-2) * copied.norm():
        return f"{name} does not follow the mask"
    return ""
