"""How much attention each token pays to itself, overheard at one layer while the model reads.

The model's own attention runs as it is and gives what it gives, by whatever kernel; what one layer's queries and keys
make of each other is looked at beside it, some queries at a time, by the model's own plain (eager) formula. Knows how
transformers dispatches attention; nothing of rows, replies or caches.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Implementations that see the queries and keys of all tokens in one place.
_KERNELS = ("eager", "sdpa")
_OVERHEARD = "coala_overheard_"
# Attention weights made at once: 64 MB of them in float32.
WEIGHTS = 1 << 24
# Half precision rounds the smallest weights to zero, which has no logarithm.
_LEAST = 1e-30


@contextmanager
def overheard(layer: nn.Module) -> Iterator[list[Tensor]]:
    """While it lasts, each pass of tokens through ``layer`` leaves their scores (B, T) float32 in the list.

    A score is the logarithm of the attention that a token pays to itself, of all it pays to what it sees; the mean over
    heads is taken before the logarithm. A layer that does not attend by transformers' interface leaves nothing.
    """
    heard: list[Tensor] = []
    changed: list[tuple[Any, Any]] = []
    for module in layer.modules():
        config: Any = vars(module).get("config")
        kernel = getattr(config, "_attn_implementation", None)
        if kernel in _KERNELS:
            # This layer alone looks its kernel up under another name: masks and all other layers know nothing of it.
            theirs = copy.copy(config)
            theirs._attn_implementation_internal = _OVERHEARD + kernel
            theirs._coala_heard = heard
            changed.append((module, config))
            module.config = theirs
    _register()
    try:
        yield heard
    finally:
        for owner, config in changed:
            owner.config = config


def _register() -> None:
    from transformers import AttentionInterface

    for kernel in _KERNELS:
        AttentionInterface.register(_OVERHEARD + kernel, _attend)


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    """The attention that ``module`` would have run, the scores of its tokens left with whoever listens."""
    # The plain formula is a function of each model's own file.
    home = vars(sys.modules[type(module).__module__])
    plain = home["eager_attention_forward"]
    kernel = module.config._attn_implementation.removeprefix(_OVERHEARD)
    result = home["ALL_ATTENTION_FUNCTIONS"].get_interface(kernel, plain)(module, query, key, value, mask, **options)
    batch, heads, length, _ = query.shape
    before = key.shape[2] - length  # the tokens' own keys are the latest
    size = max(1, WEIGHTS // (batch * heads * key.shape[2]))
    found = []
    for first in range(0, length, size):
        last = min(first + size, length)
        if kernel == "eager":
            weights = result[1][:, :, first:last]
        else:
            some = _additive(module, query, key, mask, first, last, options)
            # Of the values one column will do: their product is not wanted.
            weights = plain(module, query[:, :, first:last], key, value[..., :1], some, **options)[1]
        own = weights[..., before + first : before + last].diagonal(dim1=-2, dim2=-1)
        found.append(own.float().mean(1))
    module.config._coala_heard.append(torch.cat(found, dim=1).clamp(min=_LEAST).log())
    return result


def _additive(
    module: Any, query: Tensor, key: Tensor, mask: Tensor | None, first: int, last: int, options: dict[str, Any]
) -> Tensor | None:
    """What the plain formula adds to the products of queries ``first`` to ``last``, from the fused kernel's mask."""
    lowest = torch.finfo(query.dtype).min
    if mask is None:
        told = options.get("is_causal")
        if query.shape[2] == 1 or not (getattr(module, "is_causal", True) if told is None else told):
            return None
        queries = torch.arange(first, last, device=query.device) + (key.shape[2] - query.shape[2])
        seen = torch.arange(key.shape[2], device=query.device) <= queries[:, None]
    else:
        # A mask may be one row for all queries.
        mask = mask[:, :, first:last] if mask.shape[2] > 1 else mask
        if mask.dtype != torch.bool:
            return mask
        seen = mask
    return torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~seen, lowest)


def attended_mean(states: Tensor, inside: Tensor) -> Tensor:
    """Means (B, d) float32 over ``inside`` (B, T) of ``states`` (B, T, d + 1), weighted by exp of their last column."""
    weights = states[..., -1].float().masked_fill(~inside, -torch.inf).softmax(-1)
    # `where`, not a product: what stands outside may be inf or nan.
    return (torch.where(inside[..., None], states[..., :-1].float(), 0.0) * weights[..., None]).sum(1)
