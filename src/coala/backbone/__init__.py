"""The frozen language model (torch, transformers): load it, render conversations, read hidden states, decode from it.

The only package that calls a model, a tokenizer, a chat template or a KV cache. Knows nothing of heads or stages.
"""

from coala.backbone.load import load_backbone
from coala.backbone.model import LanguageModel
from coala.backbone.network import BackboneError, OutputChange
from coala.backbone.outline import Outline, outline
from coala.backbone.pooling import POOLINGS, Pooling, RunningState
from coala.backbone.prefix import Prefix
from coala.backbone.reading import Reading
from coala.backbone.template import RenderedRow

__all__ = [
    "POOLINGS",
    "BackboneError",
    "LanguageModel",
    "Outline",
    "OutputChange",
    "Pooling",
    "Prefix",
    "Reading",
    "RenderedRow",
    "RunningState",
    "load_backbone",
    "outline",
]
