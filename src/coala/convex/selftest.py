"""A check, once per process and shape, that compiled operators compute what they say.

Some releases of the compiler have returned wrong numbers for chains of masked products on CPUs. The operators here
avoid the construction that showed it; this makes sure.
"""

from __future__ import annotations

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from coala.convex.pairwise import PairProgram
from coala.values import CoalaError


@jax.jit
def _products(
    program: PairProgram, u: Float[Array, "d P"], v: Float[Array, "d P"], bend: Float[Array, "n"]
) -> tuple[Float[Array, "n"], Float[Array, "d P"], Float[Array, "d P"]]:
    image = program.predict(u)
    return image, program.predict_adjoint(bend), program.predict_adjoint(bend * program.predict(v))


@lru_cache(maxsize=64)
def check_operators(n_pairs: int, width: int, n_columns: int, dtype: str = "float32") -> float:
    """Largest relative error of F, F^T and F^T diag F, compiled, against NumPy in float64.

    Raises:
        CoalaError: if it exceeds what rounding explains.
    """
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2, n_pairs, width)) / np.sqrt(max(width, 1))
    patterns = rng.random((2, n_pairs, n_columns)) < 0.5
    u, v = rng.standard_normal((2, width, n_columns))
    bend = rng.random(n_pairs)
    one = jnp.ones((), dtype)
    margin, weight = jnp.zeros(n_pairs, dtype), jnp.ones(n_pairs, dtype)
    program = PairProgram(jnp.asarray(rows, dtype), jnp.asarray(patterns), margin, weight, one, one)
    found = _products(program, *(jnp.asarray(a, dtype) for a in (u, v, bend)))

    def predict(w: Float[np.ndarray, "d P"]) -> Float[np.ndarray, "n"]:
        chosen, rejected = np.where(patterns, rows @ w, 0).sum(axis=-1)
        return np.asarray(chosen - rejected)

    def adjoint(z: Float[np.ndarray, "n"]) -> Float[np.ndarray, "d P"]:
        back: Float[np.ndarray, "d P"] = np.einsum(
            "snd,snp->dp", rows, np.where(patterns, np.stack([z, -z])[..., None], 0)
        )
        return back

    expected = (predict(u), adjoint(bend), adjoint(bend * predict(v)))
    error = max(
        float(np.abs(np.asarray(a) - b).max(initial=0.0) / max(np.abs(b).max(initial=0.0), 1e-30))
        for a, b in zip(found, expected, strict=True)
    )
    limit = 1e3 * float(np.finfo(dtype).eps)
    if not error <= limit:
        raise CoalaError(
            f"The compiled operators of the solver are wrong on this machine: relative error {error:.1e}, expected at "
            f"most {limit:.1e}. This is a fault of the installed jaxlib; set the environment variable "
            "XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= before starting Python, or install another jaxlib."
        )
    return error
