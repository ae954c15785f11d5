"""What has to be true of a loaded network before its states are used, tried on a few tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coala.backbone.cache import CopiedMemory
from coala.backbone.network import BackboneError, Network

# Numbers looked at together: their largest is found without a copy of them.
_PORTION = 1 << 26


def check_weights(model: Any, name: str) -> None:
    """Refuse weights that hold nan or inf. Those that are quantised or not in memory are left to the states."""
    broken = [
        key
        for key, weight in model.named_parameters()
        if weight.is_floating_point() and weight.dtype.itemsize > 1 and not weight.is_meta and not _finite(weight)
    ]
    if broken:
        shown = ", ".join(broken[:3]) + (", ..." if len(broken) > 3 else "")
        raise BackboneError(
            f"{name}: {len(broken)} tensor(s) are not finite, they hold nan or inf ({shown}). Check its weights: "
            f"{_DIVERGED}"
        )


def _finite(weight: Tensor) -> bool:
    flat = weight.detach().reshape(-1)
    return all(
        bool(torch.isfinite(torch.stack(torch.aminmax(part))).all())
        for part in torch.split(flat, _PORTION)
        if len(part)
    )


_DIVERGED = "download them again; if you trained it, the training diverged, so lower its learning rate."


def check_finite(network: Network) -> None:
    """Refuse a model that some tokens take past the largest number of its dtype, and name the first such layer."""
    tokens = torch.arange(1, 6, device=network.device)[None] % network.vocabulary
    layers = tuple(range(network.n_layers + 1))
    states, _ = network.run(tokens, layers)
    for layer, found in zip(layers, states, strict=True):
        if not found.isfinite().all():
            place = "the embedding" if layer == 0 else f"layer {layer} of {network.n_layers}"
            raise BackboneError(
                f"{type(network.body).__name__}: hidden states are not finite at {place}, so its weights hold nan or "
                f"numbers too large for {str(network.dtype).removeprefix('torch.')}. Check its weights, or load it "
                f"with another dtype: {_DIVERGED}"
            )


def check_states(network: Network) -> None:
    """Refuse a model whose states between layers are not one vector per token, or that the padding of a batch changes.

    An encoder is told of padding by a mask, which a few kinds of mixing do not follow. A decoder is told nothing, for
    padding stands on the right; that is right only if no token sees a later one.
    """
    name, layer, read = type(network.body).__name__, min(1, network.n_layers), 3
    tokens = torch.arange(1, 6, device=network.device)[None] % network.vocabulary
    mask = (torch.arange(5, device=network.device)[None] < read).long() if network.encoder else None
    (states,), _ = network.run(tokens, (layer,), mask=mask)
    if states.ndim != 3 or states.shape[:2] != tokens.shape:
        raise BackboneError(
            f"{name} keeps states of shape {tuple(states.shape)} between its layers; expected (1, 5, d), one vector "
            "per token. Use another model."
        )
    check_finite(network)
    (alone,), _ = network.run(tokens[:, :read], (layer,), mask=None if mask is None else mask[:, :read])
    # The median, for rounding may send a single token to another expert.
    if _distances(states[0, :read], alone[0]).median() <= _tolerance(network):
        return
    if network.encoder:
        raise BackboneError(
            f"{name} mixes the padding after a row into its states, so that they depend on the other rows of a batch. "
            "Use an encoder whose attention leaves padding out."
        )
    raise BackboneError(
        f"{name} was taken for a decoder, but its tokens see later ones. If it is an encoder, its config.json should "
        'say so: "architectures" with the name of its masked model, as in BertForMaskedLM. If it was trained as a '
        'decoder, "is_decoder": true is missing there.'
    )


def check_cache(network: Network) -> None:
    """Refuse to decode with a model whose cached states, batched with padding, are not those of each row alone.

    Only tried where :func:`coala.backbone.cache.tree_obstacle` never compares two ways of decoding: models with other
    layers than attention, or that take no positions.
    """
    attention = set(network.windows) <= {"all", "full_attention", "sliding_attention"}
    if attention and {"position_ids", "past_key_values"} <= network.arguments:
        return
    name, last = type(network.body).__name__, network.n_layers
    rows = [[token % network.vocabulary for token in row] for row in ([1, 2, 3, 4, 5, 6], [7, 8, 9])]
    added = [10 % network.vocabulary, 11 % network.vocabulary]
    try:
        tokens, lengths = network.pad(rows, left=True)
        memory = CopiedMemory(network)
        memory.prefill(tokens, lengths, last)
        found = memory.push(torch.tensor(added, device=network.device), lengths, last)[1][:, -1]
    except Exception as error:  # whatever a foreign model's forward raises, it means the same
        raise BackboneError(
            f"{name} cannot be decoded from with a cache ({type(error).__name__}: {error}). "
            "Load it with generation=False for features only."
        ) from error
    longer = [[*row, token] for row, token in zip(rows, added, strict=True)]
    expected = torch.stack([network.run(network.pad([row])[0], (last,))[0][0][0, -1] for row in longer])
    if found.shape != expected.shape or not (_distances(found, expected) <= _tolerance(network)).all():
        raise BackboneError(
            f"{name} does not leave out the padding in front of a shorter row, so a batch of rows cannot be decoded. "
            "Load it with generation=False for features only."
        )


def _distances(found: Tensor, expected: Tensor) -> Tensor:
    """Relative distance of each vector (n, d) from what it should be."""
    found, expected = found.float(), expected.float()
    distances: Tensor = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    return distances


def _tolerance(network: Network) -> float:
    """Rounding; what these checks look for moves states by far more."""
    if getattr(network.causal, "is_quantized", False):
        return 0.2  # 8 bits round the states as well, by a scale that depends on the whole batch
    return 1e-3 if network.dtype == torch.float32 else 5e-2
