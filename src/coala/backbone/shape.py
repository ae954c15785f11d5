"""The numbers that decide a transformer's FLOPs, read off its layers; weights may be on the meta device."""

from __future__ import annotations

from typing import Any

from torch import nn

from coala.costs import Shape

# Kinds of layers that look back at a state of fixed size, not at single tokens.
RECURRENT = {"linear_attention", "conv", "mamba", "recurrent"}


def shape_of(config: Any, layers: nn.ModuleList, width: int, vocabulary: int) -> Shape:
    """The :class:`coala.costs.Shape` of a stack of layers.

    Of a mixture of experts, a token's own share counts: E experts of which it is sent to k weigh k / E of their
    weights. ``attention_width`` is the mean over layers, 0 in a recurrent one; where queries and values differ in
    size, the mean of the two, so that 4 T^2 A L stays the cost of both products.
    """
    products = sum(_products(module, config) for module in layers.modules())
    attention = sum(_attention_width(config, index) for index in range(len(layers)))
    return Shape(len(layers), width, vocabulary, products, attention // len(layers))


def _products(module: nn.Module, config: Any) -> int:
    """Weights a token is multiplied with in this module, its children not counted."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features  # quantised weights are stored packed
    if isinstance(module, Conv1D):
        return int(module.weight.numel())
    experts = _expert_count(module, config)
    if not experts:
        return 0
    own = [(name, p) for name, p in module.named_parameters(recurse=False) if "bias" not in name]
    stacked: int = sum(p.numel() for _, p in own if p.ndim == 3 and p.shape[0] == experts)
    routers = sum(p.numel() for _, p in own if p.ndim == 2 and p.shape[0] == experts)
    return stacked * _chosen(config) // experts + routers


def _expert_count(module: nn.Module, config: Any) -> int:
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        count = getattr(module, name, None) or getattr(config, name, None)
        if isinstance(count, int) and count > 0:
            return count
    return 0


def _chosen(config: Any) -> int:
    """k, the experts a token is sent to."""
    for name in ("num_experts_per_tok", "top_k_experts", "moe_top_k", "moe_k"):
        count = getattr(config, name, None)
        if isinstance(count, int) and count > 0:
            return count
    return 1


def _attention_width(config: Any, index: int) -> int:
    """Query heads * head size of one layer."""
    kinds = getattr(config, "layer_types", None)
    if kinds and index < len(kinds) and kinds[index] in RECURRENT:
        return 0
    varying = getattr(config, "per_layer_config", None)
    layer = varying[index] if varying is not None else config
    heads = int(getattr(layer, "num_attention_heads", 1))
    if getattr(layer, "qk_nope_head_dim", None) is not None and getattr(layer, "v_head_dim", None) is not None:
        return heads * int(layer.qk_nope_head_dim + layer.qk_rope_head_dim + layer.v_head_dim) // 2
    return heads * int(getattr(layer, "head_dim", None) or int(layer.hidden_size) // heads)
