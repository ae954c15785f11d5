"""B growing rows with their cache: what the next token may be, what a candidate would look like, and keeping one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coala.backbone.attention import attended_mean
from coala.backbone.cache import CopiedMemory, Memory, TreeMemory
from coala.backbone.network import BackboneError, Network, Scored


class Prefix:
    """B rows of tokens that grow by one token a step.

    ``layer`` is the hidden state that ``state`` and ``peek`` speak of; ``lengths`` (B,) counts each row's tokens;
    ``tree`` tells whether candidates are peeked under a tree mask, else ``note`` tells why not. Hidden states and
    log-probabilities are float32 on the model's device; those of a :class:`coala.backbone.network.Scored` layer have
    their attention score as one column more.
    """

    def __init__(self, network: Network, rows: Sequence[Sequence[int]], layer: int, *, tree: bool, note: str) -> None:
        tokens, lengths = network.pad(rows, left=True)
        self.layer, self.tree, self.note = layer, tree, note
        self.lengths = lengths
        self._network = network
        self._memory: Memory = TreeMemory(network) if tree else CopiedMemory(network)
        at_layer, final = self._memory.prefill(tokens, lengths, layer)
        real = torch.arange(tokens.shape[1], device=tokens.device) >= (tokens.shape[1] - lengths)[:, None]
        if isinstance(layer, Scored):
            self._prompt_sum = attended_mean(at_layer, real) * lengths[:, None]
        else:
            # `where`, not a product: what stands at padding may be inf in half precision.
            self._prompt_sum = torch.where(real[..., None], at_layer.float(), 0.0).sum(1)
        self._prompt_lengths = lengths
        self._state, self._final = at_layer[:, -1].float(), final[:, -1]
        self._log_probs: Tensor | None = None
        self._peeked: tuple[Tensor, Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def room(self) -> int:
        """Tokens that still fit, in the row that is longest."""
        return self._network.context - int(self.lengths.max()) if len(self) else 0

    @property
    def prompt_lengths(self) -> Tensor:
        """Tokens each row began with (B,)."""
        return self._prompt_lengths

    def logits(self) -> Tensor:
        """Next-token logits (B, V), before any softmax."""
        return self._network.logits(self._final)

    def log_probs(self) -> Tensor:
        """Next-token log-probabilities (B, V)."""
        if self._log_probs is None:
            self._log_probs = self._network.log_probs(self._final)
        return self._log_probs

    def state(self) -> Tensor:
        """Hidden state (B, d) of each row's last token (with a score, (B, d + 1))."""
        return self._state

    def prompt_mean(self) -> Tensor:
        """Mean hidden state (B, d) of the tokens each row began with, weighted if they have scores."""
        return self._prompt_sum / self._prompt_lengths[:, None]

    def peek(self, tokens: Tensor) -> Tensor:
        """Hidden states (B, k, d) of each row extended by each of k candidates ``tokens`` (B, k), in one forward."""
        tokens = tokens.to(self.lengths.device)
        if tokens.ndim != 2 or len(tokens) != len(self):
            raise BackboneError(f"Candidates of {len(self)} rows are a (B, k) array; found {tuple(tokens.shape)}.")
        self._need_room()
        at_layer, final = self._memory.peek(tokens, self.lengths, self.layer)
        self._peeked = (tokens, at_layer.float(), final)
        return self._peeked[1]

    def push(self, tokens: Tensor) -> None:
        """Append ``tokens`` (B,): for free if they are among the candidates last peeked, else by one forward."""
        tokens = tokens.to(self.lengths.device)
        if tokens.shape != (len(self),):
            raise BackboneError(f"{len(self)} rows grow by as many tokens; found {tuple(tokens.shape)}.")
        self._need_room()
        kept = self._peeked and (self._peeked[0] == tokens[:, None])
        if self._peeked is not None and isinstance(kept, Tensor) and bool(kept.any(1).all()):
            which = kept.int().argmax(1)
            self._memory.keep(which)
            at = torch.arange(len(self), device=which.device)
            self._state, self._final = self._peeked[1][at, which], self._peeked[2][at, which]
        else:
            at_layer, final = self._memory.push(tokens, self.lengths, self.layer)
            self._state, self._final = at_layer[:, -1].float(), final[:, -1]
        self.lengths = self.lengths + 1
        self._log_probs, self._peeked = None, None

    def select(self, rows: Tensor | Sequence[int]) -> Prefix:
        """A prefix of its own with these rows, each as often as it is named; candidates last peeked go with them."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.lengths.device)
        new = object.__new__(Prefix)
        new.layer, new.tree, new.note = self.layer, self.tree, self.note
        new._network = self._network
        new._memory = self._memory.select(index, candidates=self._peeked is not None)
        new.lengths, new._prompt_lengths = self.lengths[index], self._prompt_lengths[index]
        new._prompt_sum = self._prompt_sum[index]
        new._state, new._final = self._state[index], self._final[index]
        new._log_probs = None if self._log_probs is None else self._log_probs[index]
        new._peeked = None
        if self._peeked is not None:
            peeked, at_layer, final = self._peeked
            new._peeked = peeked[index], at_layer[index], final[index]
        return new

    @property
    def joins(self) -> bool:
        """Whether rows of several prefixes of this model can be put together: their memory is one buffer."""
        return self.tree

    @staticmethod
    def joined(prefixes: Sequence[Prefix]) -> Prefix:
        """A prefix of its own with the rows of all, in their order; candidates last peeked are forgotten."""
        first = prefixes[0]
        memories = [prefix._memory for prefix in prefixes if isinstance(prefix._memory, TreeMemory)]
        if len(memories) < len(prefixes) or len({(id(prefix._network), prefix.layer) for prefix in prefixes}) > 1:
            raise BackboneError(
                "Only rows of one model and layer that share a forward under a tree mask can be joined."
            )
        new = object.__new__(Prefix)
        new.layer, new.tree, new.note, new._network = first.layer, first.tree, first.note, first._network
        new._memory = TreeMemory.joined(memories)
        new.lengths = torch.cat([prefix.lengths for prefix in prefixes])
        new._prompt_lengths = torch.cat([prefix._prompt_lengths for prefix in prefixes])
        new._prompt_sum = torch.cat([prefix._prompt_sum for prefix in prefixes])
        new._state = torch.cat([prefix._state for prefix in prefixes])
        new._final = torch.cat([prefix._final for prefix in prefixes])
        new._log_probs = new._peeked = None
        return new

    def _need_room(self) -> None:
        if self.room < 1:
            raise BackboneError(
                f"The context of {self._network.context} tokens is full. Ask for fewer new tokens, or cut the prompt."
            )
