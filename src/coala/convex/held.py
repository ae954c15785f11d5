"""The pairwise program with everything held but its weights and its pairs: gates, ridge, sparsity and coordinates.

    J(w) = sum_j weight_j softplus(margin_j - F_j.w) + ridge/2 ||b||^2 + sparsity sum_i ||u_i||,  w = (b, u_1, ...)

F_j is the difference of both sides of a pair, behind each gate. NumPy in float64; gated programs are solved by
:class:`~coala.convex.newton.GatedNewton`. Knows nothing of which pairs are left out, nor why.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from coala.convex.newton import GatedNewton
from coala.convex.pairwise import PairProgram
from coala.convex.prepare import Standardisation
from coala.convex.rows import available_bytes
from coala.convex.solvers import solve
from coala.statistics.logistic import sigmoid
from coala.values import CoalaError, ConvexHead, FeatureSet

STEPS = 60  # of Newton's method
EXACT = 1e-12  # gradient at which a solve is exact, as a share of the gradient's parts


@dataclass(frozen=True)
class Design:
    """From features to the rows of a program: the ``coordinates`` of a block, and the gates of ``head``."""

    coordinates: Standardisation
    head: ConvexHead

    @property
    def width(self) -> int:
        """r, the coordinates of one block."""
        return int(self.coordinates.rotation.shape[1])

    def scored(self, h: Float[np.ndarray, "k d"], prompt: Float[np.ndarray, "k d"] | None) -> Float[np.ndarray, "k p"]:
        """Rows whose product with the weights is the score of each feature vector (k, d)."""
        x = self.coordinates.rows(h)
        if not self.head.n_neurons:
            return x
        return np.concatenate([x, *(x * is_open[:, None] for is_open in self.open(h, prompt).T)], axis=1)

    def compared(self, features: FeatureSet) -> Float[np.ndarray, "k p"]:
        """Rows whose product with the weights is the margin of each pair (k,)."""
        if not self.head.n_neurons:
            return self.coordinates.differences(features.chosen, features.rejected)
        return self.scored(features.chosen, features.prompt) - self.scored(features.rejected, features.prompt)

    def open(self, h: Float[np.ndarray, "k d"], prompt: Float[np.ndarray, "k d"] | None) -> Bool[np.ndarray, "k m"]:
        """Which gates are open at each feature vector."""
        seen = prompt if self.head.gate_on == "prompt" and prompt is not None else h
        return np.asarray(seen @ self.head.gates[:, :-1].T + self.head.gates[:, -1] >= 0)

    def unfolded(self, head: ConvexHead) -> Float[np.ndarray, "p"]:
        """A head's weights in these coordinates, as they were rounded to float32."""
        return np.concatenate([self._unfolded(row) for row in (head.linear, *head.weights)])

    def _unfolded(self, row: Float[np.ndarray, "columns"]) -> Float[np.ndarray, "r"]:
        on_h, constant = row[:-1].astype(np.float64), float(row[-1])
        factor = self.coordinates.factor
        on_x = np.append(np.divide(on_h, factor, out=np.zeros_like(on_h), where=factor > 0), 0.0)
        on_x[-1] = (constant + float(on_h @ self.coordinates.center)) / self.coordinates.constant
        return np.asarray(self.coordinates.rotation.T @ on_x)

    def folded(self, weights: Float[np.ndarray, "p"]) -> ConvexHead:
        """The head with these weights; its gates, temperature and certificate stay those of ``head``."""
        rows = self.coordinates.fold(weights.reshape(-1, self.width).T).astype(np.float32)
        return replace(self.head, linear=rows[0], weights=rows[1:])


@dataclass(frozen=True)
class HeldProgram:
    """``rows`` F (n, p) with p = r (1 + m): the linear block, then the neurons; ``margin`` (n,).

    ``design`` makes rows of ``features``, those of the pairs.
    """

    rows: Float[np.ndarray, "n p"]
    margin: Float[np.ndarray, "n"]
    ridge: float
    sparsity: float
    design: Design
    features: FeatureSet

    @classmethod
    def of(
        cls,
        features: FeatureSet,
        head: ConvexHead,
        *,
        reference_scale: float | None = None,
        ridge_relative: float | None = None,
    ) -> HeldProgram:
        """The program that ``head`` was fitted by, on ``features``: those it was fitted on, or what is left of them.

        Its ridge, or with ``ridge_relative`` that share of the curvature of these features, the unit in which a fit
        chooses it.

        Raises:
            CoalaError: for a head of another program, of other features, or one that does not say how it was fitted.
        """
        facts = {} if head.certificate is None else head.certificate.facts
        if facts.get("method") not in ("learnt", "direct", "linear") or not facts.get("ridge"):
            raise CoalaError(
                f"found a head of method {facts.get('method', 'unknown')!r}, expected one of the pairwise program, "
                "whose certificate names its ridge, fix: fit with --method learnt, direct or linear"
            )
        if not head.spec.same_features(features.spec) or features.width != head.width:
            raise CoalaError(
                "found features of another model or layer than the head's, expected its own, fix: align again"
            )
        margin = np.zeros(len(features))
        if reference_scale is not None:
            if features.log_ratio is None:
                raise CoalaError(
                    "found features without log ratios, expected those the head was fitted with, fix: extract again"
                )
            margin = reference_scale * features.log_ratio
        # Rows and a few arrays of their size; a Hessian, its factor and its eigenvectors.
        columns = (features.width + 1) * (1 + head.n_neurons)
        needed, free = 8 * (5 * len(features) * columns + 4 * columns**2), available_bytes()
        if free is not None and needed > free:
            raise CoalaError(
                f"found {len(features):,} pairs of {columns:,} columns, which need about {needed / 2**30:.1f} GiB, "
                f"expected what {free / 2**30:.1f} GiB can hold, fix: use a machine with more memory"
            )
        design = Design(Standardisation.of(features.chosen, features.rejected), head)
        rows = design.compared(features)
        ridge = float(facts["ridge"])
        if ridge_relative is not None:
            scale = float((rows[:, : design.width] ** 2).sum()) / (4 * max(1, len(rows)))
            ridge = ridge_relative * (scale if scale > 0 else 1.0)
        return cls(rows, margin, ridge, float(facts["sparsity"]) if head.n_neurons else 0.0, design, features)

    def __len__(self) -> int:
        return len(self.margin)

    @property
    def width(self) -> int:
        """r, the coordinates of one block."""
        return self.design.width

    @property
    def n_neurons(self) -> int:
        return self.design.head.n_neurons

    @property
    def linear(self) -> bool:
        return self.n_neurons == 0

    @property
    def saved(self) -> Float[np.ndarray, "p"]:
        """The head's own weights in these coordinates."""
        return self.design.unfolded(self.design.head)

    # --- the objective -----------------------------------------------------------------------------------------------

    @property
    def even(self) -> Float[np.ndarray, "n"]:
        """The weights of a fit: 1 / n for every pair."""
        return np.full(len(self), 1 / max(1, len(self)))

    def pull(self, weights: Float[np.ndarray, "p"]) -> Float[np.ndarray, "n"]:
        """sigmoid(margin - F w): by how much each pair pulls at the weights, in [0, 1]."""
        return sigmoid(self.margin - self.rows @ weights)

    def gradient(
        self,
        weights: Float[np.ndarray, "p"],
        weight: Float[np.ndarray, "n"],
        scores: Float[np.ndarray, "n"] | None = None,
    ) -> Float[np.ndarray, "p"]:
        """The smallest subgradient of the objective; a neuron at zero has none beyond what the sparsity holds back.

        ``scores`` are F w where they are known, here and in :meth:`value`: a product with the rows less.
        """
        pull = self.pull(weights) if scores is None else sigmoid(self.margin - scores)
        loss = -(self.rows.T @ (weight * pull))
        blocks, slopes = weights.reshape(-1, self.width), loss.reshape(-1, self.width)
        found = np.array(slopes)
        found[0] += self.ridge * blocks[0]
        for i in range(1, len(blocks)):
            norm, held = np.linalg.norm(blocks[i]), np.linalg.norm(slopes[i])
            if norm > 0:
                found[i] += self.sparsity * blocks[i] / norm
            else:
                found[i] *= max(0.0, 1 - self.sparsity / held) if held > 0 else 0.0
        return found.reshape(-1)

    def value(
        self,
        weights: Float[np.ndarray, "p"],
        weight: Float[np.ndarray, "n"],
        scores: Float[np.ndarray, "n"] | None = None,
    ) -> float:
        """The objective."""
        blocks = weights.reshape(-1, self.width)
        scores = self.rows @ weights if scores is None else scores
        loss = float(weight @ np.logaddexp(0, self.margin - scores))
        penalty = self.sparsity * float(np.linalg.norm(blocks[1:], axis=1).sum())
        return loss + penalty + self.ridge / 2 * float(blocks[0] @ blocks[0])

    def bounds(self, weights: Float[np.ndarray, "p"], weight: Float[np.ndarray, "n"]) -> tuple[float, float]:
        """(objective, lower bound) as :meth:`PairProgram.bounds` has them."""
        margins = self.rows @ weights
        pull = sigmoid(self.margin - margins)
        slopes = (self.rows.T @ (weight * pull)).reshape(-1, self.width)
        objective = self.value(weights, weight, margins)
        largest = np.linalg.norm(slopes[1:], axis=1).max(initial=0.0)
        shrunk = pull * (min(1.0, self.sparsity / largest) if largest > 0 else 1.0)
        safe = np.clip(shrunk, 1e-300, 1 - 1e-16)
        entropy = -shrunk * np.log(safe) - (1 - shrunk) * np.log1p(-safe)
        linear = (self.rows[:, : self.width].T @ (weight * shrunk)) if largest > 0 else slopes[0]
        lower = weight @ (self.margin * shrunk + entropy) - float(linear @ linear) / (2 * self.ridge)
        return float(objective), float(min(lower, objective))  # by rounding a bound can lie above what it bounds

    def curvature(self, weights: Float[np.ndarray, "p"]) -> Float[np.ndarray, "n"]:
        """The second derivative of each pair's loss."""
        pull = self.pull(weights)
        return pull * (1 - pull)

    @property
    def ridges(self) -> Float[np.ndarray, "p"]:
        """The diagonal of the ridge's Hessian: on the linear block alone."""
        return np.where(np.arange(self.rows.shape[1]) < self.width, self.ridge, 0.0)

    def bending(self, weights: Float[np.ndarray, "p"]) -> Float[np.ndarray, "p p"]:
        """The Hessian of the sum of norms, on the neurons that are not zero."""
        found = np.zeros((len(weights), len(weights)))
        for i in range(1, 1 + self.n_neurons):
            block = slice(i * self.width, (i + 1) * self.width)
            norm = float(np.linalg.norm(weights[block]))
            if norm > 0:
                unit = weights[block] / norm
                found[block, block] = self.sparsity / norm * (np.eye(self.width) - np.outer(unit, unit))
        return found

    # --- solving -----------------------------------------------------------------------------------------------------

    def solve(
        self,
        start: Float[np.ndarray, "p"],
        weight: Float[np.ndarray, "n"] | None = None,
        *,
        factor: Float[np.ndarray, "p p"] | None = None,
        exact: float = EXACT,
    ) -> Float[np.ndarray, "p"]:
        """The optimum to the last digits that float64 has, or to ``exact``, from ``start``.

        ``factor`` of a Hessian near it (:meth:`factor`) saves one for a linear head.
        """
        weight = self.even if weight is None else weight
        if not self.linear:
            start, factor = self._near(start, weight), None
        return self._polished(start, weight, factor, exact)

    def factor(self, weights: Float[np.ndarray, "p"]) -> Float[np.ndarray, "p p"]:
        """The lower Cholesky factor of the Hessian of a linear head at ``weights``, all pairs counted alike."""
        return self._factor(weights, self.even, np.ones(len(weights), bool))

    def _near(self, start: Float[np.ndarray, "p"], weight: Float[np.ndarray, "n"]) -> Float[np.ndarray, "p"]:
        """Newton's method for group-sparse programs, which can leave and reach zero."""
        both = (self.features.chosen, self.features.rejected)
        sides = np.stack([self.design.coordinates.rows(h) for h in both])
        gates = np.stack([self.design.open(h, self.features.prompt) for h in both])
        patterns = np.concatenate([np.ones((*gates.shape[:2], 1), bool), gates], axis=-1)
        with jax.enable_x64(True):
            program = PairProgram(
                jnp.asarray(sides),
                jnp.asarray(patterns),
                jnp.asarray(self.margin),
                jnp.asarray(weight),
                jnp.asarray(self.sparsity),
                jnp.asarray(self.ridge),
            )
            first = jnp.asarray(start.reshape(-1, self.width).T)
            return np.asarray(solve(program, GatedNewton(), tolerance=1e-10, start=first, exact=False).value).T.reshape(
                -1
            )

    def _polished(
        self,
        start: Float[np.ndarray, "p"],
        weight: Float[np.ndarray, "n"],
        factor: Float[np.ndarray, "a a"] | None,
        exact: float,
    ) -> Float[np.ndarray, "p"]:
        """Newton's method on the blocks that are not zero, where the objective is smooth."""
        weights = np.array(start)
        blocks = np.linalg.norm(weights.reshape(-1, self.width), axis=1) > 0
        blocks[0] = True
        alive = np.repeat(blocks, self.width)
        scores = self.rows @ weights
        before = np.inf
        for _ in range(STEPS):
            slopes = self.gradient(weights, weight, scores)[alive]
            size = float(np.linalg.norm(slopes))
            scale = float(np.linalg.norm(self.ridges * weights)) + self.sparsity + 1e-300
            if size <= exact * scale or not size < before:
                break
            # A factor serves as long as a step halves the gradient.
            if factor is None or size > before / 2:
                factor = self._factor(weights, weight, alive)
            before = size
            step = np.zeros_like(weights)
            step[alive] = -_solved(factor, slopes)
            weights, scores = self._searched(weights, scores, step, weight)
        return weights

    def _factor(
        self, weights: Float[np.ndarray, "p"], weight: Float[np.ndarray, "n"], alive: Bool[np.ndarray, "p"]
    ) -> Float[np.ndarray, "a a"]:
        bend = weight * self.curvature(weights)
        used = bend > 0
        rows = self.rows if used.all() else self.rows[used]
        rows = rows if alive.all() else rows[:, alive]
        # A matrix times its own transpose is half the work.
        scaled = rows * np.sqrt(bend[used])[:, None]
        hessian = scaled.T @ scaled
        if not self.linear:
            hessian += self.bending(weights)[np.ix_(alive, alive)]
        hessian[np.diag_indices_from(hessian)] += self.ridges[alive]
        # Directions of a neuron that no row sees have no curvature: a trace of damping keeps the factor finite.
        hessian[np.diag_indices_from(hessian)] += 1e-14 * np.trace(hessian) / len(hessian)
        return np.asarray(np.linalg.cholesky(hessian))

    def _searched(
        self,
        weights: Float[np.ndarray, "p"],
        scores: Float[np.ndarray, "n"],
        step: Float[np.ndarray, "p"],
        weight: Float[np.ndarray, "n"],
    ) -> tuple[Float[np.ndarray, "p"], Float[np.ndarray, "n"]]:
        """Weights and scores after the step, halved until the objective does not rise beyond rounding."""
        here = self.value(weights, weight, scores)
        image = self.rows @ step
        for halving in range(40):
            ahead, seen = weights + step / 2**halving, scores + image / 2**halving
            if self.value(ahead, weight, seen) <= here + 1e-13 * abs(here):
                break
        return ahead, seen


def _solved(factor: Float[np.ndarray, "a a"], right: Float[np.ndarray, "a"]) -> Float[np.ndarray, "a"]:
    from scipy.linalg import cho_solve

    return np.asarray(cho_solve((factor, True), right))
