"""Weights in 8 bits on a CPU: every product of weights by torch's own integer kernel (fbgemm), each row with its scale.

A row of weights is rounded to 255 steps of its largest. Inputs are not rounded to 8 bits, which costs more than the
weights do: each row goes in as two digits of 7 bits, whose products with the weights are exact. So a row's states are
its own, whoever shares its batch, and the pairwise sums that CPUs without VNNI make in 16 bits never overflow.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from coala.backbone.network import BackboneError

# A row's largest input becomes 63 * 128; a low digit is at most 64, so that 2 * (64 + 64) * 127 < 2^15.
_BASE, _LARGEST, _ZERO = 128, 63 * 128, 64
# Names the numbers that these products make, in the digest of the weights.
SCHEME = "8bit rows by fbgemm"


class PackedLinear(nn.Linear):
    """A linear layer whose weights (out, in) are kept in 8 bits alone; it cannot be trained or saved."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
        self._packed = _pack(weight.detach().float())

    def forward(self, input: Tensor) -> Tensor:
        """Products (..., out) in the input's dtype with inputs (..., in)."""
        rows = input.reshape(-1, self.in_features).float()
        largest = torch.linalg.vector_norm(rows, math.inf, dim=-1, keepdim=True)
        unit = largest.clamp_(min=1e-30).mul_(1 / _LARGEST)
        whole = rows / unit
        high = (whole * (1 / _BASE)).round_()
        # The kernel rounds what is left.
        digits = torch.cat([high, torch.sub(whole, high, alpha=_BASE)])
        products = _product(digits, self._packed)
        found = torch.add(products[len(rows) :], products[: len(rows)], alpha=_BASE).mul_(unit)
        if self.bias is not None:
            found += self.bias
        return found.to(input.dtype).reshape(*input.shape[:-1], self.out_features)


def pack(model: Any) -> Any:
    """``model``, the weights of all its linear layers and of its head packed in place, one after the other."""
    from transformers.pytorch_utils import Conv1D

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child.weight, child.bias))
            elif type(child) is Conv1D:
                setattr(module, name, PackedLinear(child.weight.T, child.bias))
    model.is_quantized = True
    return model


def check_kernel() -> None:
    """Refuse a machine on which torch has no such kernel, or one that gives other products; found out by trying it."""
    try:
        # Sums of neighbours at their largest: an overflow would show.
        layer = PackedLinear(torch.ones(16, 64), None)
        found = layer(torch.tensor([[1.0], [-1.0]]).expand(2, 64))
        sound = bool(((found.abs() - 64).abs() < 1e-2).all())
    except (RuntimeError, AttributeError) as error:
        raise BackboneError(
            f"quantise='8bit' on a CPU: torch {torch.__version__} has no 8-bit product for this machine "
            f"({str(error).splitlines()[0][:80]}); expected its fbgemm kernel (x86 with AVX2). Fix: leave it out."
        ) from error
    if not sound:
        raise BackboneError(
            f"quantise='8bit' on a CPU: the 8-bit product of torch {torch.__version__} is wrong on this machine; "
            "expected 64 from a row of 64 ones. Fix: leave it out."
        )


def _product(digits: Tensor, packed: Any) -> Tensor:
    """Products in float32 of whole numbers -64 to 64, once they are rounded, with packed weights."""
    kernel = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    found: Tensor = kernel(digits, 1.0, _ZERO, packed)
    return found


def _pack(weight: Tensor) -> Any:
    scale = (weight.abs().amax(1) / 127).clamp(min=1e-30)
    with _engine(), warnings.catch_warnings():
        # torch means to drop quantised tensors from its public interface; the kernel takes no other.
        warnings.simplefilter("ignore", UserWarning)
        zeros = torch.zeros(len(scale), dtype=torch.long)  # as numbers of another type they mean another scheme
        rounded = torch.quantize_per_channel(weight, scale.double(), zeros, 0, torch.qint8)
        return torch.ops.quantized.linear_prepack(rounded, None)


@contextmanager
def _engine() -> Iterator[None]:
    """Weights are packed for fbgemm; the setting is the process's, so it is put back."""
    engines: Any = torch.backends.quantized
    before, engines.engine = engines.engine, "fbgemm"
    try:
        yield
    finally:
        engines.engine = before
