"""One program for all raters: a shared head, and for each rater a deviation that is zero unless the choices ask for it.

    min_{w,d} sum_j weight_j softplus(margin_j - F_j.(w + d_r(j))) + ridge/2 ||w||^2
              + level sum_r share_r ||d_r|| + ridge/2 sum_r ||d_r||^2,            share_r = sqrt(pairs of r / n)

At fixed gates this is a convex problem in all weights at once; its bounds are finite whatever the level. With every d_r
at zero it is the head's own program. Knows names as numbers, and nothing of files (docs/derivations/raters.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Scalar, Shaped

from coala.convex.held import HeldProgram
from coala.convex.newton import GatedNewton
from coala.convex.pairwise import WIDTHS
from coala.convex.program import Bounds, gated_product, gated_product_adjoint, group_norms
from coala.convex.pytree import pytree
from coala.convex.rows import moments, normal_product
from coala.convex.solvers import solve
from coala.convex.validation import grouped_folds
from coala.statistics.logistic import sigmoid
from coala.values import CoalaError, ConvexHead

FOLDS = 4
DRAWS = 199  # permutations; 190 of their statistics are at most the level
CHANCE = 0.05  # that a deviation is found where there is none
ROUNDING = 1e-9  # of a level, within which a gradient touches it
TOLERANCE = 1e-9  # relative gap of a solve
RELAXATIONS = (1.0, 0.3, 0.1, 0.03, 0.0)  # of the level, at which the deviations that were found are weighed


@pytree()
@dataclass(frozen=True)
class RaterProgram:
    """The program for some of the raters, those that may deviate; a :class:`~coala.convex.program.GroupProgram`.

    ``rows`` (n, d) are differences of pairs, ``patterns`` (n, P) bool whose pairs they are: column 0, all pairs, is the
    shared head w, the others one rater each. ``levels`` and ``ridges`` (P,); weights are (d, P).
    """

    rows: Float[Array, "n d"]
    patterns: Bool[Array, "n P"]
    margin: Float[Array, "n"]
    weight: Float[Array, "n"]
    levels: Float[Array, "P"]
    ridges: Float[Array, "P"]

    def zeros(self) -> Float[Array, "d P"]:
        return jnp.zeros((self.rows.shape[1], self.patterns.shape[1]), self.margin.dtype)

    def predict(self, u: Float[Array, "d P"]) -> Float[Array, "n"]:
        """F_j.(w + d_r(j)), (n,)."""
        return gated_product(self.rows, self.patterns, u)

    def predict_adjoint(self, z: Float[Array, "n"]) -> Float[Array, "d P"]:
        return gated_product_adjoint(self.rows, self.patterns, z)

    def normal_product(self, curvature: Float[Array, "n"], u: Float[Array, "d P"]) -> Float[Array, "d P"]:
        """F^T diag(curvature) F u, (d, P)."""
        return normal_product(self.rows[None], self.patterns[None], (1.0,), curvature, u)

    def moments(self, curvature: Float[Array, "n"]) -> tuple[Float[Array, "d"], Float[Array, "P P"]]:
        """spectrum (d,) and overlap (P, P): F^T diag(curvature) F is about their Kronecker product."""
        return moments(self.rows[None], self.patterns[None], (1.0,), curvature)

    def loss(self, z: Float[Array, "n"]) -> Scalar:
        return jnp.sum(self.weight * jax.nn.softplus(self.margin - z))

    def slope(self, z: Float[Array, "n"]) -> Float[Array, "n"]:
        return -self.weight * jax.nn.sigmoid(self.margin - z)

    def curvature(self, z: Float[Array, "n"]) -> Float[Array, "n"]:
        return self.weight * jax.nn.sigmoid(self.margin - z) * jax.nn.sigmoid(z - self.margin)

    def objective(self, u: Float[Array, "d P"]) -> Scalar:
        return self._value(u, self.predict(u))

    def _value(self, u: Float[Array, "d P"], z: Float[Array, "n"]) -> Scalar:
        norms = group_norms(u)
        return self.loss(z) + jnp.sum(self.levels * norms + self.ridges / 2 * norms**2)

    def bounds(self, u: Float[Array, "d P"], multipliers: Array | None = None) -> Bounds:
        """Objective and dual value at the pulls a = sigmoid(margin - z), which need no scaling:

        sum_j weight_j (margin_j a_j + H(a_j)) - sum_i max(||q_i|| - levels_i, 0)^2 / (2 ridges_i),  q = F^T (weight a).
        """
        z = self.predict(u)
        return self.bounds_at(u, z, self.predict_adjoint(self.slope(z)))

    def bounds_at(self, u: Float[Array, "d P"], z: Float[Array, "n"], gradient: Float[Array, "d P"]) -> Bounds:
        """:meth:`bounds` for z = F u and gradient = F^T slope(z), which a solver has at hand."""
        a = jax.nn.sigmoid(self.margin - z)
        entropy = jax.scipy.special.entr(a) + jax.scipy.special.entr(1 - a)
        beyond = jnp.maximum(group_norms(gradient) - self.levels, 0.0)
        lower = jnp.sum(self.weight * (self.margin * a + entropy)) - jnp.sum(beyond**2 / (2 * self.ridges))
        return Bounds(self._value(u, z), lower)


@dataclass(frozen=True)
class TouchedProgram(HeldProgram):
    """A held program whose penalties are one ridge on all weights, in stretched coordinates."""

    @property
    def width(self) -> int:
        return int(self.rows.shape[1])

    @property
    def n_neurons(self) -> int:
        return 0


@dataclass(frozen=True)
class RaterFit:
    """Weights (p,) of the shared head, and ``deviations`` (k, p) of the raters ``own`` (k,) that are not zero.

    In the coordinates of :class:`Raters`. The optimal value lies in [``lower``, ``objective``], in double precision.
    ``norms`` (R,) are ||gradient of r|| / (level share_r): a rater with at most 1 has no deviation. ``only`` are
    those that may deviate, where that was decided before at another level; None is all.
    """

    level: float
    weights: Float[np.ndarray, "p"]
    own: Int[np.ndarray, "k"]
    deviations: Float[np.ndarray, "k p"]
    objective: float
    lower: float
    norms: Float[np.ndarray, "R"]
    only: Int[np.ndarray, "only"] | None = None

    @property
    def relative_gap(self) -> float:
        return (self.objective - self.lower) / self.objective if self.objective > 0 else 0.0

    def of(self, rater: int) -> Float[np.ndarray, "p"]:
        """w + d_r; for a rater without a deviation, and for -1, nobody, w."""
        found = np.flatnonzero(self.own == rater)
        return self.weights + self.deviations[found[0]] if len(found) else self.weights

    def margins(self, rows: Float[np.ndarray, "n p"], member: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
        """What each pair's rater would make of it."""
        found = rows @ self.weights
        for rater, deviation in zip(self.own, self.deviations, strict=True):
            mine = member == rater
            found[mine] += rows[mine] @ deviation
        return found


@dataclass(frozen=True)
class Raters:
    """The pairs of a head's program by who chose: ``member`` (n,) holds numbers below ``count``, or -1 for nobody.

    ``stretch`` (p,) leads from these coordinates to those of ``held``: a neuron's group norm s ||u|| is replaced by the
    quadratic s ||u||^2 / (2 ||u*||) + constant that touches it at the head's own weights u*, and coordinates are
    stretched until it is the ridge of the linear block. The optimum without deviations is the head's, as it was.
    """

    held: HeldProgram
    program: TouchedProgram
    stretch: Float[np.ndarray, "p"]
    member: Int[np.ndarray, "n"]
    count: int
    shared: Float[np.ndarray, "p"]

    @classmethod
    def of(cls, held: HeldProgram, member: Int[np.ndarray, "n"], count: int | None = None) -> Raters:
        """Solves the head's own program to the last digits first.

        Raises:
            CoalaError: if ``member`` does not have a number for each pair.
        """
        member = np.asarray(member, np.intp)
        if member.shape != (len(held),):
            raise CoalaError(f"found {len(member)} raters, expected one for each of {len(held)} pairs, fix: name them")
        weights = held.solve(held.saved)
        blocks = np.linalg.norm(weights.reshape(-1, held.width), axis=1)
        blocks[0] = held.sparsity / held.ridge
        # A neuron at zero is no part of the head, and none of any rater's.
        factor = np.sqrt(held.ridge * blocks / held.sparsity) if held.sparsity else np.ones(len(blocks))
        stretch = np.repeat(factor, held.width)
        program = TouchedProgram(held.rows * stretch, held.margin, held.ridge, 0.0, held.design, held.features)
        shared = np.divide(weights, stretch, out=np.zeros_like(weights), where=stretch > 0)
        number = int(member.max(initial=-1)) + 1 if count is None else count
        return cls(held, program, stretch, member, number, program.solve(shared))

    @cached_property
    def sizes(self) -> Int[np.ndarray, "R"]:
        """Pairs of each rater."""
        return np.bincount(self.member[self.member >= 0], minlength=self.count)

    @property
    def shares(self) -> Float[np.ndarray, "R"]:
        """sqrt(pairs / n): in proportion to it a sum of as many independent pulls grows."""
        return np.sqrt(np.maximum(self.sizes, 1) / max(1, len(self.member)))

    def head(self, weights: Float[np.ndarray, "p"]) -> ConvexHead:
        """The head with these weights; its gates, temperature and certificate are those of the head held."""
        return self.held.design.folded(self.stretch * weights)

    def compared(self, rows: Float[np.ndarray, "k p"]) -> Float[np.ndarray, "k p"]:
        """Rows of the held program in these coordinates."""
        return rows * self.stretch

    # --- the level ---------------------------------------------------------------------------------------------------

    def pulls(self, weights: Float[np.ndarray, "p"]) -> Float[np.ndarray, "n p"]:
        """weight_j a_j F_j: what each pair adds to the gradient of its rater, at ``weights``."""
        return self.program.rows * (self.program.even * self.program.pull(weights))[:, None]

    @property
    def largest_level(self) -> float:
        """The least level at which nobody deviates: max_r ||gradient of r|| / share_r at the shared optimum."""
        sums = _sums(self.pulls(self.shared), self.member, self.count)
        there = self.sizes > 0
        return float((np.linalg.norm(sums, axis=1) / self.shares)[there].max(initial=0.0))

    def null_level(self, group: Int[np.ndarray, "n"], *, draws: int = DRAWS, seed: int = 0) -> tuple[float, bool]:
        """The level that, were raters exchangeable, anybody would exceed with a probability of at most 5 %.

        The choices of a rater on one ``group`` (n,) are moved together. Where every group has choices of several
        raters names are exchanged within groups, and the second value is true; else among all.
        """
        pulls = self.pulls(self.shared)
        blocks, block = np.unique(np.stack([group, self.member]), axis=1, return_inverse=True)
        block = block.reshape(-1)
        sums, size = _sums(pulls, block, blocks.shape[1]), np.bincount(block)
        places, names = blocks
        within = bool((np.bincount(np.unique(places, return_inverse=True)[1]) > 1).all())
        rng = np.random.default_rng(seed)
        found = np.zeros(draws)
        for draw in range(draws):
            # In random order, then by group, stably: a permutation within each group.
            order = rng.permutation(len(names))
            moved = np.empty_like(names)
            moved[order[np.argsort(places[order], kind="stable")] if within else order] = names
            pairs = np.bincount(moved[moved >= 0], size[moved >= 0], self.count)
            norms = np.linalg.norm(_sums(sums, moved, self.count), axis=1)
            shares = np.sqrt(np.where(pairs > 0, pairs, 1) / len(self.member))
            found[draw] = (norms / shares)[pairs > 0].max(initial=0.0)
        rank = int(np.ceil((1 - CHANCE) * (draws + 1))) - 1
        return float(np.sort(found)[rank]) * (1 + ROUNDING), within

    # --- the program -------------------------------------------------------------------------------------------------

    def fit(
        self,
        level: float,
        *,
        weight: Float[np.ndarray, "n"] | None = None,
        start: RaterFit | None = None,
        only: Int[np.ndarray, "only"] | None = None,
    ) -> RaterFit:
        """The optimum at ``level``: solved for the raters that may deviate, until no other's gradient exceeds it.

        With ``only`` no others may: the program is then that of these deviations.

        Raises:
            CoalaError: if more raters deviate than one program can hold, or for a level below 0.
        """
        if not level >= 0:
            raise CoalaError(f"found level {level}, expected a number of at least 0, fix: leave it out")
        used = self.program.even if weight is None else weight
        weights = self.shared if weight is None else self.program.solve(self.shared, used)
        own = np.zeros(0, np.intp) if start is None else start.own
        deviations = np.zeros((0, len(weights))) if start is None else start.deviations
        allowed = np.ones(self.count, bool) if only is None else np.isin(np.arange(self.count), only)
        limits = level * self.shares
        tried = own
        if start is not None and len(own):
            weights, deviations = self._solved(level, used, own, start.weights, deviations)
        while True:
            alive = np.abs(deviations).max(axis=1, initial=0.0) > 0
            made = RaterFit(level, weights, own[alive], deviations[alive], 0.0, 0.0, np.zeros(0), only)
            made, norms = self._bounded(made, used, allowed)
            new = np.setdiff1d(np.flatnonzero(allowed & (norms > limits * (1 + ROUNDING))), tried)
            if not len(new):
                return made
            tried = np.concatenate([own, new])
            own, deviations = tried, np.concatenate([deviations, np.zeros((len(new), len(weights)))])
            weights, deviations = self._solved(level, used, own, weights, deviations)

    def relaxed(
        self, found: RaterFit, group: Shaped[np.ndarray, "n"], seed: int = 0
    ) -> tuple[RaterFit, Float[np.ndarray, "2 n"] | None]:
        """The deviations that were ``found``, weighed anew at the share of the level that validates best.

        A level that keeps chance out shrinks what it lets in. Shares are compared by the loss of those raters' pairs,
        whole groups left out; the margins (2, n) come with the fit, by the shared head alone and by w + d_r. None, and
        the fit as it was found, for fewer than two groups.
        """
        folds = grouped_folds(group, FOLDS, seed)
        if folds is None or not len(found.own):
            return replace(found, only=found.own), None
        theirs = np.isin(self.member, found.own)
        best: tuple[float, RaterFit, Float[np.ndarray, "2 n"]] | None = None
        for share in RELAXATIONS:
            fit = self.fit(share * found.level, start=found, only=found.own)
            margins = np.zeros((2, len(self.member)))
            for fold in range(int(folds.max()) + 1):
                out = folds == fold
                part = self.fit(fit.level, weight=~out / (~out).sum(), start=fit, only=found.own)
                margins[0, out] = self.program.rows[out] @ part.weights
                margins[1, out] = part.margins(self.program.rows[out], self.member[out])
            loss = float(np.logaddexp(0, self.program.margin - margins[1])[theirs].mean())
            if best is None or loss < best[0]:
                best = loss, fit, margins
        assert best is not None
        return best[1:]

    def _solved(
        self,
        level: float,
        weight: Float[np.ndarray, "n"],
        own: Int[np.ndarray, "k"],
        weights: Float[np.ndarray, "p"],
        deviations: Float[np.ndarray, "k p"],
    ) -> tuple[Float[np.ndarray, "p"], Float[np.ndarray, "k p"]]:
        """The program whose columns are the shared head and the raters ``own``, by the solvers' driver."""
        if len(own) >= WIDTHS[-1]:
            raise CoalaError(
                f"found {len(own)} raters that may deviate, expected fewer than {WIDTHS[-1]}, fix: name fewer raters, "
                "or sources in their place"
            )
        # Few shapes, few compilations: columns of nobody fill up.
        columns = next(width for width in WIDTHS if width > len(own))
        patterns = np.zeros((len(self.member), columns), bool)
        patterns[:, 0] = True
        levels = np.full(columns, level if level > 0 else 1.0)
        levels[0] = 0.0
        for column, rater in enumerate(own, 1):
            patterns[:, column] = self.member == rater
            levels[column] = level * self.shares[rater]
        first = np.zeros((len(weights), columns))
        first[:, 0], first[:, 1 : 1 + len(own)] = weights, deviations.T
        with jax.enable_x64(True):
            parts = (self.program.rows, patterns, self.program.margin, weight, levels, np.full(columns, self.ridge))
            program = RaterProgram(*map(jnp.asarray, parts))
            found = solve(program, GatedNewton(), tolerance=TOLERANCE, start=jnp.asarray(first), exact=False).value
        return np.asarray(found[:, 0]), np.asarray(found[:, 1 : 1 + len(own)].T)

    @property
    def ridge(self) -> float:
        return self.program.ridge

    def _bounded(
        self, made: RaterFit, weight: Float[np.ndarray, "n"], allowed: Bool[np.ndarray, "R"]
    ) -> tuple[RaterFit, Float[np.ndarray, "R"]]:
        """The fit with the bounds of the whole program, all raters in it; and the norm of each rater's gradient."""
        program = self.program
        scores = made.margins(program.rows, self.member)
        pull = sigmoid(program.margin - scores)
        pulls = program.rows * (weight * pull)[:, None]
        norms = np.linalg.norm(_sums(pulls, self.member, self.count), axis=1)
        limits = made.level * self.shares
        sizes = np.linalg.norm(made.deviations, axis=1)
        objective = float(weight @ np.logaddexp(0, program.margin - scores))
        objective += self.ridge / 2 * float(made.weights @ made.weights + sizes @ sizes)
        objective += float(sizes @ limits[made.own])
        safe = np.clip(pull, 1e-300, 1 - 1e-16)
        entropy = -pull * np.log(safe) - (1 - pull) * np.log1p(-safe)
        beyond = np.append(np.linalg.norm(pulls.sum(axis=0)), np.maximum(norms - limits, 0.0)[allowed])
        lower = float(weight @ (program.margin * pull + entropy)) - float(beyond @ beyond) / (2 * self.ridge)
        shown = np.divide(norms, limits, out=np.zeros_like(norms), where=limits > 0)
        return replace(made, objective=objective, lower=min(lower, objective), norms=shown), norms


def _sums(rows: Float[np.ndarray, "n p"], label: Int[np.ndarray, "n"], count: int) -> Float[np.ndarray, "count p"]:
    """Sums (count, p) of the rows with each label; -1 counts nowhere."""
    from scipy.sparse import csr_array

    there = label >= 0
    places = (label[there], np.flatnonzero(there))
    return np.asarray(csr_array((np.ones(int(there.sum())), places), shape=(count, len(rows))) @ rows)
