"""A causal model that somebody else loaded and holds, as decoding needs it. Knows no text: it has no tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from coala.backbone.files import weights_digest
from coala.backbone.model import LanguageModel
from coala.backbone.network import BackboneError, Network
from coala.backbone.template import Renderer
from coala.values import FeatureSpec, SpecMismatch


class _NoText(Renderer):
    """Stands where a tokenizer would: there is none to render or decode with."""

    def __init__(self, stop_tokens: frozenset[int]) -> None:
        self.kind, self.stop_tokens = "continuation", stop_tokens

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise BackboneError("A model held without its tokenizer has no text. Load it with load_backbone for that.")

    digest = property(_refuse)
    render = decode = _refuse


def hold(model: Any, stop_tokens: Iterable[int]) -> LanguageModel:
    """``model``, a decoder of transformers, as it is; replies end at ``stop_tokens``.

    Raises :class:`BackboneError` for a model that cannot be decoded from, or that is not made of one stack of layers.
    """
    if model.config.is_encoder_decoder:
        raise BackboneError(f"{type(model).__name__} has an encoder and a decoder; expected a decoder-only model.")
    network = Network(model, encoder=False)
    network.check_head()
    name = str(getattr(model, "name_or_path", "") or type(model).__name__)
    renderer = _NoText(frozenset(map(int, stop_tokens)))
    return LanguageModel(network, renderer, name=name, revision="", weights="", generates=True)


def require_held(backbone: LanguageModel, spec: FeatureSpec, width: int, what: str) -> None:
    """Raise :class:`SpecMismatch` where a held model cannot make features of ``spec``, ``width`` numbers each.

    ``what`` needs them: the "head" or the "policy".

    The weights are compared where the model came from a folder that is still there, and have no adapter or quantisation
    to tell of; a model by another name is taken at its word.
    """
    if spec.layer > backbone.n_layers or width != backbone.width:
        raise SpecMismatch(
            f"The {what} was fitted on layer {spec.layer} of {spec.backbone}, {width} wide; {backbone.name} has "
            f"{backbone.n_layers} layers, {backbone.width} wide. Load the model it was fitted for."
        )
    folder = Path(backbone.name)
    if spec.backbone == backbone.name and any(folder.glob("*.safetensors")):
        found = weights_digest(folder)
        if found != spec.weights:
            raise SpecMismatch(
                f"The {what} was fitted on weights {spec.weights[:12]} of {spec.backbone}, but {folder} now holds "
                f"{found[:12]}. Fit the {what} again."
            )


def prompts(tokens: Sequence[Sequence[int]], mask: Sequence[Sequence[int]] | None) -> list[list[int]]:
    """Rows of tokens without their padding."""
    if mask is None:
        return [list(row) for row in tokens]
    return [[t for t, real in zip(row, seen, strict=True) if real] for row, seen in zip(tokens, mask, strict=True)]
