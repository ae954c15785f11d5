"""Rows and the products that walk over them, block by block; rows mapped from a file; the memory a solve takes.

A product reads every row once, in blocks that stay in cache, and widens a block, never the whole, where the weights
are of a wider type than the rows. Rows spread over the devices of a mesh (``sharding.py``) are walked where they lie.
Knows no loss, no penalty and no solver.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Scalar, Shaped

from coala.convex.linear import matmul
from coala.values import CoalaError

BLOCK = 256  # rows; between 128 and 2048 the time hardly depends on it
AXIS = "rows"  # the name of the mesh axis over which rows are spread
EVERYWHERE = PartitionSpec()

Rows = Float[Array, "*sides n d"]
Patterns = Bool[Array, "*sides n P"]
PerRow = Float[Array, "*sides n"]
PerRowOrPair = Float[Array, "... n"]
Weights = Float[Array, "d P"]
FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def _compiled(**options: Any) -> Callable[[FunctionT], FunctionT]:
    """``jax.jit`` that keeps the signature."""
    return cast(Callable[[FunctionT], FunctionT], partial(jax.jit, **options))


@_compiled()
def gated_product(X: Rows, patterns: Patterns, u: Weights) -> PerRow:
    """sum_i D_i X u_i, of the type of u."""

    def kernel(x: Rows, is_open: Patterns, u: Weights) -> PerRow:
        return jnp.where(is_open, matmul(x.astype(u.dtype), u), 0.0).sum(axis=-1)

    def in_blocks(X: Rows, patterns: Patterns, u: Weights) -> PerRow:
        def advance(i: Scalar, z: PerRow) -> PerRow:
            start = _start(i, X.shape[-2])
            return jax.lax.dynamic_update_slice_in_dim(
                z, kernel(_block(X, start), _block(patterns, start), u), start, -1
            )

        return jax.lax.fori_loop(0, _n_blocks(X), advance, jnp.zeros(X.shape[:-1], u.dtype))

    def local(X: Rows, patterns: Patterns, u: Weights) -> PerRow:
        # Of one type, a single product is as fast as one by blocks.
        return (in_blocks if X.dtype != u.dtype and X.shape[-2] > BLOCK else kernel)(X, patterns, u)

    specs = (row_spec(X.ndim, -2), row_spec(patterns.ndim, -2), EVERYWHERE)
    z: PerRow = _where_rows_lie(local, specs, row_spec(X.ndim - 1, -1))(X, patterns, u)
    return z


@_compiled()
def gated_product_adjoint(X: Rows, patterns: Patterns, z: PerRow) -> Weights:
    """(X^T D_i z)_i as columns, summed over all rows."""
    back: Weights = _sum_over_rows(_masked_rows, X, patterns, z).T
    return back


@_compiled(static_argnames="signs")
def normal_product(
    X: Rows, patterns: Patterns, signs: tuple[float, ...], curvature: Float[Array, "n"], u: Weights
) -> Weights:
    """F^T diag(curvature) F u in one pass, for F u = sum_s signs_s gated_product(X_s, patterns_s, u)."""

    def kernel(x: Rows, is_open: Patterns, curvature: Float[Array, "n"], u: Weights) -> Float[Array, "P d"]:
        side = jnp.asarray(signs, x.dtype)[:, None]
        scores = jnp.where(is_open, matmul(x, u), 0.0).sum(axis=-1)
        return _masked_rows(x, is_open, side * (curvature * (side * scores).sum(axis=0))[None])

    curved: Weights = _sum_over_rows(kernel, X, patterns, curvature, u).T
    return curved


@_compiled(static_argnames="signs")
def moments(
    X: Rows, patterns: Patterns, signs: tuple[float, ...], curvature: Float[Array, "n"]
) -> tuple[Float[Array, "d"], Float[Array, "P P"]]:
    """spectrum of sum 1 and overlap with F^T diag(curvature) F ~ spectrum_k overlap_ij sum_j curvature_j.

    overlap_ij is exactly the trace of the block (i, j); that each block is diagonal, and in proportion to the second
    moments of the features, holds as far as gates do not depend on the rows, in rotated coordinates.
    """

    def kernel(
        x: Rows, is_open: Patterns, curvature: Float[Array, "n"]
    ) -> tuple[Float[Array, "d"], Float[Array, "P P"]]:
        spectrum = matmul(curvature, (x * x).sum(axis=0))
        openings = is_open.astype(x.dtype)
        overlap = jnp.zeros((is_open.shape[-1],) * 2, x.dtype)
        for s, sign in enumerate(signs):
            for t, other in enumerate(signs):
                shared = sign * other * curvature * (x[s] * x[t]).sum(axis=-1)
                overlap += matmul((openings[s] * shared[:, None]).T, openings[t])
        return spectrum, overlap

    spectrum, overlap = _sum_over_rows(kernel, X, patterns, curvature)
    total, weight = spectrum.sum(), curvature.sum()
    return spectrum / jnp.where(total > 0, total, 1.0), overlap / jnp.where(weight > 0, weight, 1.0)


def _masked_rows(x: Rows, is_open: Patterns, z: PerRow) -> Float[Array, "P d"]:
    """The adjoint transposed."""
    # (masked z)^T x and not x^T (masked z), nor a sum of transposes: on CPUs either takes several times as long.
    over_rows = tuple(range(x.ndim - 1))
    return jnp.tensordot(jnp.where(is_open, z[..., None], 0.0), x, (over_rows, over_rows), precision="highest")


def _sum_over_rows(kernel: Callable[..., Any], X: Rows, patterns: Patterns, weight: PerRowOrPair, *rest: Any) -> Any:
    """kernel(X, patterns, weight, *rest), a sum over rows and linear in ``weight`` (..., n), by blocks of rows."""
    dtype = weight.dtype

    def whole(X: Rows, patterns: Patterns, weight: PerRowOrPair, *rest: Array) -> Any:
        return kernel(X.astype(dtype), patterns, weight, *rest)

    def in_blocks(X: Rows, patterns: Patterns, weight: PerRowOrPair, *rest: Array) -> Any:
        def at(i: Scalar) -> Any:
            start = _start(i, X.shape[-2])
            # The last block reaches back over rows that the one before it has counted.
            new = start + jnp.arange(BLOCK) >= i * BLOCK
            part = _block(weight, start, axis=-1)
            part = jnp.where(jnp.broadcast_to(new, part.shape), part, 0)
            return whole(_block(X, start), _block(patterns, start), part, *rest)

        none = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(at, jnp.asarray(0)))
        return jax.lax.fori_loop(0, _n_blocks(X), lambda i, total: jax.tree.map(jnp.add, total, at(i)), none)

    def local(X: Rows, *others: Array) -> Any:
        if X.shape[-2] <= BLOCK:
            return whole(X, *others)
        if X.dtype != dtype:
            return in_blocks(X, *others)
        # An accelerator has no cache to stay in, and starts kernels slowly.
        return jax.lax.platform_dependent(X, *others, cpu=in_blocks, default=whole)

    def summed(*arrays: Array) -> Any:
        return jax.lax.psum(local(*arrays), AXIS)

    if not _on_mesh():
        return local(X, patterns, weight, *rest)
    along = (row_spec(X.ndim, -2), row_spec(patterns.ndim, -2), row_spec(weight.ndim, -1))
    return _where_rows_lie(summed, (*along, *[EVERYWHERE] * len(rest)), EVERYWHERE)(X, patterns, weight, *rest)


def _start(i: Scalar, n: int) -> Scalar:
    return jnp.minimum(i * BLOCK, n - BLOCK)


def _n_blocks(X: Float[Array, "... n d"]) -> int:
    return -(-X.shape[-2] // BLOCK)


def _block(a: Shaped[Array, "..."], start: Scalar, axis: int = -2) -> Shaped[Array, "..."]:
    return jax.lax.dynamic_slice_in_dim(a, start, BLOCK, axis)


def _on_mesh() -> bool:
    return AXIS in jax.sharding.get_abstract_mesh().axis_names


def _where_rows_lie(product: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """The product on every device's own rows, if rows are spread over a mesh; otherwise the product itself."""
    if not _on_mesh():
        return product
    return jax.shard_map(product, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def row_spec(ndim: int, axis: int) -> PartitionSpec:
    """How an array lies on a mesh of rows: spread along ``axis``."""
    names = [AXIS if k == axis % ndim else None for k in range(ndim)]
    return PartitionSpec(*names)


def open_rows(path: str | Path) -> Float[Array, "... n d"]:
    """The array of a ``.npy`` file on the CPU, without reading it: the system brings pages in and drops them again.

    An ordinary array to every program and solver, though larger than memory. Do not change the file while it is used.

    Raises:
        CoalaError: if the file holds numbers other than float32 or float64, or not in rows (..., n, d) of C order.
    """
    mapped = np.load(path, mmap_mode="r")
    if mapped.dtype not in (np.float32, np.float64) or mapped.ndim < 2 or not mapped.flags.c_contiguous:
        raise CoalaError(
            f"{path} holds {mapped.dtype} of shape {mapped.shape}; expected rows (..., n, d) of float32 or float64 in "
            "C order. Write it with `coala.store.write_rows`."
        )
    rows: Float[Array, "... n d"] = jax.device_put(mapped, jax.devices("cpu")[0], may_alias=True)
    return rows


def solve_bytes(
    n: int, d: int, n_patterns: int, *, sides: int = 1, dtype: Any = np.float32, mapped: bool = False
) -> int:
    """Bytes at the peak of a certified solve by Newton's method: rows (sides, n, d) and P patterns.

    ``mapped`` rows take none: the system may drop their pages. The rest is masks, scores of all patterns, vectors
    over rows, and some weights, in float64 while the certificate is computed.
    """
    size = np.dtype(dtype).itemsize
    rows = 0 if mapped else sides * n * d * size
    over_rows = n * (sides * n_patterns * (1 + 2 * size) + 24 * size)
    weights = d * n_patterns * (24 * size + 6 * 8)
    blocks = 4 * sides * BLOCK * (d + n_patterns) * 8
    return int(rows + over_rows + weights + blocks)


def available_bytes() -> int | None:
    """Bytes of memory this process may still take: what the system says is free, or less if its group is limited."""
    free: list[int] = []
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(int(fields["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            free.append(max(0, int(limit) - used))
    except (OSError, ValueError):
        pass
    return min(free, default=None)


def check_memory(needed: int, available: int | None = None) -> None:
    """Refuse a solve of ``needed`` bytes (:func:`solve_bytes`) that cannot fit; silent where nothing is known.

    Raises:
        CoalaError: with both numbers and the way out.
    """
    available = available_bytes() if available is None else available
    if available is not None and needed > available:
        raise CoalaError(
            f"The solve needs about {needed / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are available. Map the "
            "rows from a file (`write_rows`, `open_rows`), spread them over machines, or use fewer patterns or rows."
        )
