"""A model known from its config.json or GGUF header alone: sizes, context and cost, no weight read or stored."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from coala.backbone.files import check_config, check_files, find
from coala.backbone.gguf import is_gguf, stamp
from coala.backbone.kinds import brief, encoder_options, read_config, refuse_foreign_code
from coala.backbone.network import BackboneError, Network
from coala.backbone.placement import DTYPES, QUANTISED
from coala.backbone.silence import quiet
from coala.costs import Shape
from coala.permission import permission


@dataclass(frozen=True)
class Outline:
    """What a model of this configuration will be once loaded.

    ``parameters`` counts all weights, tied ones once; ``in_layers`` those of the layers' matrices, which quantising
    shrinks; ``cached`` the numbers kept per token and row while decoding (keys and values; of an encoder 0).
    """

    name: str
    kind: str
    encoder: bool
    shape: Shape
    context: int
    parameters: int
    in_layers: int
    cached: int

    @property
    def width(self) -> int:
        """d, the length of a final hidden state."""
        return self.shape.width

    @property
    def n_layers(self) -> int:
        return self.shape.n_layers

    def weight_bytes(self, dtype: str = "bfloat16", quantise: str | None = None) -> int:
        """Bytes of the weights in ``dtype``, those of the layers' matrices in ``quantise`` (``8bit``, ``4bit``).

        4 bits come with a float32 scale per 64 weights. The scale of a row in 8 bits is neglected.
        """
        if quantise is None:
            return self.parameters * _size(dtype)
        if quantise not in QUANTISED:
            raise BackboneError(f"quantise={quantise!r}; expected {' or '.join(QUANTISED)}, or None.")
        small = self.in_layers if quantise == "8bit" else self.in_layers // 2 + self.in_layers // 64 * 4
        return small + (self.parameters - self.in_layers) * _size(dtype)


def outline(model: str | Path, revision: str | None = None) -> Outline:
    """The outline of a model folder, a config.json, or a hub name at ``revision``, of which config.json alone is read.

    Of a GGUF file it is the header.

    The model is built without storage and run on one token, once in a process for each configuration. Raises
    :class:`BackboneError` for what :func:`coala.backbone.load_backbone` would refuse by its configuration.
    """
    path = Path(model).expanduser()
    if path.is_file() and not is_gguf(path):
        place, name = path, str(path)
    else:
        folder, name, _ = find(str(model), revision, needed="config.json", wanted=("config.json",))
        place = folder if folder.is_file() else folder / "config.json"
    if not place.is_file():
        raise BackboneError(f"{name}: has no config.json, which is all that an outline needs.")
    stored = check_files(place) if is_gguf(place) else check_config(place)
    refuse_foreign_code(stored, name)
    if permission().code:
        return _built(place, name)  # its own code may have changed since
    told = [str(place.resolve()), *stamp(place)] if is_gguf(place) else stored
    key = json.dumps(told, sort_keys=True)
    if key not in _BUILT:
        _BUILT[key] = _built(place, name)
    return replace(_BUILT[key], name=name)


# Outlines by what decides them: config.json as it is read, or which GGUF file it was and when it was written.
_BUILT: dict[str, Outline] = {}


def _built(place: Path, name: str) -> Outline:
    with quiet():
        config, encoder = read_config(place, name, permission().code)
        try:
            network = Network(_hollow(config, encoder), encoder=encoder)
            cached = 0 if encoder else _cached(network)
        except BackboneError:
            raise
        except Exception as error:  # a foreign model's code raises whatever it does
            raise BackboneError(
                f"{name}: a model of kind {config.model_type} cannot be built without its weights "
                f"({brief(error)}). Load it instead."
            ) from error
    return Outline(
        name=name,
        kind=config.model_type,
        encoder=encoder,
        shape=network.shape,
        context=network.context,
        parameters=sum(parameter.numel() for parameter in network.causal.parameters()),
        in_layers=_in_layers(network.layers),
        cached=cached,
    )


def _size(dtype: str) -> int:
    if dtype not in DTYPES:
        raise BackboneError(f"dtype {dtype!r}; expected {', '.join(DTYPES)}.")
    return DTYPES[dtype].itemsize


def _hollow(config: Any, encoder: bool) -> nn.Module:
    """The model with every weight on the meta device."""
    from transformers import AutoModel, AutoModelForCausalLM

    kind: Any = AutoModel if encoder else AutoModelForCausalLM
    # The experts' grouped product knows shapes without values in this dtype only.
    options = {"dtype": torch.bfloat16, **(encoder_options(config) if encoder else {})}
    options |= {"trust_remote_code": permission().code}
    with torch.device("meta"):
        try:
            model: nn.Module = kind.from_config(config, attn_implementation="sdpa", **options)
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            model = kind.from_config(config, attn_implementation="eager", **options)
    # Models that know their padding look for it among the tokens, which have no values here.
    for module in model.modules():
        if getattr(module, "config", None) is not None:
            cast(Any, module).config.pad_token_id = None
    return model.eval()


def _cached(network: Network) -> int:
    """Numbers that the cache of one token holds."""
    cache = DynamicCache(config=network.config)
    token = torch.ones(1, 1, dtype=torch.long, device=network.device)
    network.run(token, (network.n_layers,), cache=cache)
    kept = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(states.numel() for states in kept if isinstance(states, torch.Tensor))


def _in_layers(layers: nn.ModuleList) -> int:
    from transformers.pytorch_utils import Conv1D

    return sum(m.weight.numel() for m in layers.modules() if isinstance(m, nn.Linear | Conv1D))
