"""FLOPs by counters while the real work runs: PyTorch's for what torch does, and one for JAX's matrix products.

Both count 2 per multiply-add of matrix products, as :mod:`coala.costs` does. A counter slows small models down, so
counted work is a cell of its own and never timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from threading import Lock
from typing import Any, TypeVar

T = TypeVar("T")


def torch_flops(work: Callable[[], T]) -> tuple[T, int]:
    """What ``work()`` returns, and its FLOPs by ``FlopCounterMode``, forward and backward.

    Fused attention on a CPU, which the counter does not know, is counted by its own formula for that of GPUs. The
    outer product that makes rotary angles is counted by it too; it is not a layer's work, and below a thousandth.
    """
    import torch
    from torch.utils import flop_counter

    def forward(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **named: Any) -> int:
        return int(flop_counter.sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]

    def backward(grad: Any, query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **named: Any) -> int:
        # The counter's own rule for fused kernels: scores are computed again.
        return int(flop_counter.sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]

    aten = torch.ops.aten
    rules = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    counter = flop_counter.FlopCounterMode(display=False, custom_mapping=rules)
    with counter:
        result = work()
    return result, int(counter.get_total_flops())


@dataclass
class Products:
    """FLOPs of the matrix products that JAX has carried out so far."""

    flops: int = 0
    _lock: Lock = field(default_factory=Lock, repr=False)

    def add(self, flops: int) -> None:
        with self._lock:
            self.flops += flops


@contextmanager
def jax_products() -> Iterator[Products]:
    """Count every ``jnp.matmul``, ``tensordot`` and ``einsum`` as often as it is carried out, in compiled loops too.

    XLA's own count has a loop's body once, whatever it repeats. Here each product in the program carries a callback
    that adds its FLOPs. Compiled functions are dropped before and after, for they hold, or lack, these callbacks.
    """
    import jax
    import jax.numpy as jnp

    counter = Products()
    matmul, tensordot, einsum = jnp.matmul, jnp.tensordot, jnp.einsum

    def counted(product: Callable[..., Any], inner: Callable[[Any, Any, Any], int]) -> Callable[..., Any]:
        def run(a: Any, b: Any, *rest: Any, **named: Any) -> Any:
            out = product(a, b, *rest, **named)
            flops = 2 * int(out.size) * inner(a, b, out)
            jax.debug.callback(lambda: counter.add(flops))
            return out

        return run

    def summed(subscripts: str, *operands: Any, **named: Any) -> Any:
        # Every index runs once: those of the output, and those that are summed over.
        sizes = {
            index: int(size)
            for names, operand in zip(subscripts.partition("->")[0].split(","), operands, strict=True)
            for index, size in zip(names, operand.shape, strict=True)
        }
        flops = 2 * prod(sizes.values())
        jax.debug.callback(lambda: counter.add(flops))
        return einsum(subscripts, *operands, **named)

    jax.clear_caches()  # type: ignore[no-untyped-call]
    jnp.matmul = counted(matmul, lambda a, b, out: int(a.shape[-1]))
    # Each factor's size is its share of the output times the contracted numbers.
    jnp.tensordot = counted(
        tensordot, lambda a, b, out: round((int(a.size) * int(b.size) / max(1, int(out.size))) ** 0.5)
    )
    jnp.einsum = summed  # type: ignore[assignment]
    try:
        yield counter
        jax.effects_barrier()  # type: ignore[no-untyped-call]
    finally:
        jnp.matmul, jnp.tensordot, jnp.einsum = matmul, tensordot, einsum
        jax.clear_caches()  # type: ignore[no-untyped-call]


def standardisation_flops(pairs: int, width: int) -> int:
    """What :func:`coala.convex.fit` does in NumPy, uncounted: moments of the differences, and rows turned, 2n of d."""
    return 2 * pairs * width**2 + 4 * pairs * width**2 * 2
