"""Weights in float32 on a CPU as oneDNN lays them out: the same numbers, so that products read memory in one stream.

Products of a few rows, as guided blocks and batches have them, take 0.6 of the time that torch's own order takes
(docs/decoding.md). Sums are added in another order, so states differ in the last bits, as they do between two CPUs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Smaller models are quick as they are, and are left so.
FEWEST = 1 << 24


class BlockedLinear(nn.Linear):
    """A linear layer whose weights (out, in) are kept in oneDNN's order alone; it cannot be trained.

    ``weight`` is put back in order when it is asked for; of a weight that others hold too (``shared``), it is that one.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, shared: bool = False) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)  # type: ignore[assignment]
        self._blocked = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        # In a tuple, or the module would count it among its own parameters.
        self._shared = (weight,) if shared else ()

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self._shared[0] if self._shared else self._blocked.to_dense()

    def forward(self, input: Tensor) -> Tensor:
        """Products (..., out) with inputs (..., in), both float32."""
        rows = input.reshape(-1, self.in_features)
        if not len(rows):
            return input.new_zeros(*input.shape[:-1], self.out_features)
        found: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._blocked, self.bias, "none", [], "")
        return found.reshape(*input.shape[:-1], self.out_features)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()


def block(model: Any, fewest: int | None = None) -> Any:
    """``model``, its linear layers reordered in place one after the other, where that pays and oneDNN is there.

    It pays from ``fewest`` weights on (:data:`FEWEST`).
    """
    linear = [child for child in model.modules() if type(child) is nn.Linear]
    wanted = all(child.weight.dtype == torch.float32 and child.weight.device.type == "cpu" for child in linear)
    least = FEWEST if fewest is None else fewest
    if not wanted or sum(child.weight.numel() for child in linear) < least or not _sound():
        return model
    tables = {id(child.weight) for child in model.modules() if isinstance(child, nn.Embedding)}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, BlockedLinear(child.weight, child.bias, shared=id(child.weight) in tables))
    return model.eval()


def _sound() -> bool:
    """Whether this torch has the two operations, which it does not promise, and they multiply."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        layer = BlockedLinear(torch.arange(12.0).reshape(3, 4), torch.ones(3))
        expected = torch.tensor([[7.0, 23.0, 39.0]])
        return torch.equal(layer(torch.ones(1, 4)), expected) and float(layer.weight[2, 3]) == 11
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):
        return False
