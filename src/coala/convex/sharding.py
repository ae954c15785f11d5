"""Programs whose rows are spread over devices, of one process or of several.

    with jax.set_mesh(row_mesh()):
        solution = solve(spread(program), GatedNewton())

Inside such a block every product of ``rows.py`` runs where the rows lie, and sums over devices are all that travels:
(d, P) numbers per product. Several processes call ``jax.distributed.initialize`` first and then all do the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jaxtyping import Array, Shaped

from coala.convex.pairwise import PairProgram
from coala.convex.program import GatedProgram
from coala.convex.rows import AXIS, row_spec
from coala.values import CoalaError

ProgramT = TypeVar("ProgramT", GatedProgram, PairProgram)

# The axis of rows of every array of a program; those not named are on every device.
ROW_AXES = {"X": 0, "y": 0, "rows": 1, "patterns": -2, "margin": 0, "weight": 0}


def row_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of one axis over ``devices``, by default all devices of all processes."""
    chosen = np.asarray(jax.devices() if devices is None else devices)
    return Mesh(chosen, (AXIS,), axis_types=(AxisType.Auto,))


def spread(program: ProgramT) -> ProgramT:
    """The program with its rows dealt out evenly over the mesh in force, as each process holds all of them.

    Rows of zeros fill the last device: no pattern opens them, or they weigh nothing, so that the optimum stays.

    Raises:
        CoalaError: outside of ``jax.set_mesh(row_mesh())``.
    """
    mesh = jax.sharding.get_mesh()
    if AXIS not in mesh.axis_names:
        raise CoalaError("No mesh is in force; call this inside `with jax.set_mesh(row_mesh()):`.")
    placed: dict[str, Any] = {}
    for field in fields(program):
        whole = np.asarray(getattr(program, field.name))
        placed[field.name] = _deal(whole, mesh, ROW_AXES[field.name]) if field.name in ROW_AXES else whole
    return replace(program, **placed)


def _deal(whole: Shaped[np.ndarray, "..."], mesh: Mesh, axis: int) -> Shaped[Array, "..."]:
    """The array on the mesh, zeros after its last row; only the rows of this process are touched."""
    axis %= whole.ndim
    n = whole.shape[axis]
    shape = tuple(n + -n % mesh.size if k == axis else size for k, size in enumerate(whole.shape))
    sharding = NamedSharding(mesh, row_spec(whole.ndim, axis))

    def part(index: tuple[slice, ...] | None) -> Shaped[np.ndarray, "..."]:
        index = (slice(None),) * whole.ndim if index is None else index
        held = whole[index]
        first, last, _ = index[axis].indices(shape[axis])
        missing = (last - first) - held.shape[axis]
        return np.pad(held, [(0, missing if k == axis else 0) for k in range(whole.ndim)])

    return jax.make_array_from_callback(shape, sharding, part)
