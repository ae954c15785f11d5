"""From the weights of a convex program to the network they stand for, with balanced layers.

A block of norm c becomes a neuron whose two layers both have norm sqrt(c), so that
(||Theta_1i||^2 + theta_2i^2) / 2 = c: the group lasso of the program is the weight decay of the network.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class ReluNetwork(NamedTuple):
    """f(x) = sum_i second_layer_i (first_layer_i . x)_+: first_layer (m, d), second_layer (m,)."""

    first_layer: Float[np.ndarray, "m d"]
    second_layer: Float[np.ndarray, "m"]

    def hidden(self, x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n m"]:
        """(n, m) activations of rows x (n, d)."""
        return np.asarray(np.maximum(x @ self.first_layer.T, 0.0))


class GatedNetwork(NamedTuple):
    """f(x) = sum_i second_layer_i 1(gates_i . x >= 0) first_layer_i . x: gates and first_layer (m, d)."""

    gates: Float[np.ndarray, "m d"]
    first_layer: Float[np.ndarray, "m d"]
    second_layer: Float[np.ndarray, "m"]

    def hidden(self, x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n m"]:
        """(n, m) gated activations of rows x (n, d)."""
        return np.where(x @ self.gates.T >= 0, x @ self.first_layer.T, 0.0)


def recover_network(u: Float[np.ndarray, "2 d P"]) -> ReluNetwork:
    """The ReLU network of cone-constrained weights u (2, d, P), u[0] = v, u[1] = w; zero blocks give no neuron.

    For a feasible u it predicts on the training rows what the program predicts.
    """
    blocks = np.concatenate([u[0], u[1]], axis=1).T
    signs = np.repeat([1.0, -1.0], u.shape[2]).astype(u.dtype)
    root = np.sqrt(np.linalg.norm(blocks, axis=1))
    alive = root > 0
    return ReluNetwork(blocks[alive] / root[alive, None], signs[alive] * root[alive])


def recover_gated(u: Float[np.ndarray, "d P"], gates: Float[np.ndarray, "d P"]) -> GatedNetwork:
    """The gated network of weights u (d, P) with gates (d, P); zero blocks give no neuron."""
    root = np.sqrt(np.linalg.norm(u, axis=0))
    alive = root > 0
    return GatedNetwork(gates.T[alive], u.T[alive] / root[alive, None], root[alive])
