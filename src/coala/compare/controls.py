"""Methods that heads are compared with on the same pairs: a network by AdamW, a gate at every layer, surface cues."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from coala.compare.cell_context import CellContext, Costs, calibrated_nll, measured_margins
from coala.compare.every_layer import loaded, of_layer
from coala.compare.matrix import GATED_POOLING
from coala.store import write_atomic
from coala.values import FeatureSet

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

FOLDS = 4
# Weights of the penalty that the gated layers are validated at, for features of which each layer's have length 1.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
STEPS = 100
# Of the loss and its gradient, after which L-BFGS takes no further step; its last line search may pass it.
EVALUATIONS = 125


# --- surface cues --------------------------------------------------------------------------------------------------


def cues_cell(context: CellContext, costs: Costs) -> dict[str, Any]:
    """A logistic rule on what can be seen without reading: length, punctuation, markup."""
    from coala.data.cues import fit_cues

    with costs.of("head"):
        rule = fit_cues(context.part("train"))
    test = context.part("test")
    return {"reward": "surface cues", "weights": dict(rule.weights), **measured_margins(rule.margins(test), test)}


# --- a linear gate at every layer ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GatedLayers:
    """score(x) = sum_l sigmoid(gate_l . x_l + bias_l) (weight_l . x_l) of pooled states x (n, L, d).

    The idea of ELHSR (arXiv:2505.12225), which gates every token; here states are pooled over the reply first, as all
    heads of a comparison read them. ``centre`` and ``spread`` (L, d) put features on one scale.
    """

    weight: NDArray[np.float32]
    gate: NDArray[np.float32]
    bias: NDArray[np.float32]
    centre: NDArray[np.float32]
    spread: NDArray[np.float32]

    def score(self, states: NDArray[np.float32]) -> NDArray[np.float64]:
        """Scores (n,) of states (n, L, d)."""
        x = (states - self.centre) / self.spread
        gates = 1 / (1 + np.exp(-(np.einsum("nld,ld->nl", x, self.gate) + self.bias)))
        return np.asarray((gates * np.einsum("nld,ld->nl", x, self.weight)).sum(1), np.float64)

    def save(self, path: Path) -> None:
        write_atomic(path, save(vars(self)))

    @classmethod
    def load(cls, path: Path) -> GatedLayers:
        return cls(**load_file(path))


def layers_cell(context: CellContext, costs: Costs) -> dict[str, Any]:
    """One linear gate at every layer, its penalty chosen on folds of whole groups of the training pairs."""
    train, test = stacked(context, "train"), stacked(context, "test")
    group = [pair.group for pair in context.part("train")]
    with costs.of("head") as about:
        head, ridge, trials = fit_gated(*train, group, context.study.seeds[0])
        about["pairs"] = len(group)
    head.save(context.folder / "layers.safetensors")
    pairs = context.part("test")
    margins = head.score(test[0]) - head.score(test[1])
    return {
        "rate": None,
        "ridge": ridge,
        "ridges": trials,
        "reward": "gated sum over layers",
        **measured_margins(margins, pairs),
    }


def stacked(context: CellContext, part: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """States of chosen and rejected replies at every layer, (n, L, d) each."""
    n_layers = context.features_result()["n_layers"]
    found = [of_layer(context, layer, GATED_POOLING, part) for layer in range(1, n_layers + 1)]
    return np.stack([f.chosen for f in found], 1), np.stack([f.rejected for f in found], 1)


def fit_gated(
    chosen: NDArray[np.float32], rejected: NDArray[np.float32], group: list[str], seed: int
) -> tuple[GatedLayers, float, list[dict[str, float]]]:
    """The gated layers of pairs' states (n, L, d), the penalty, and the held-out loss at every penalty."""
    from coala.convex.validation import grouped_folds

    fold = grouped_folds(np.array(group), FOLDS, seed)
    trials = []
    for ridge in RIDGES if fold is not None else ():
        margins = np.zeros(len(chosen))
        assert fold is not None
        for held_out in np.unique(fold):
            out = fold == held_out
            head = _gated(chosen[~out], rejected[~out], ridge)
            margins[out] = head.score(chosen[out]) - head.score(rejected[out])
        trials.append({"ridge": ridge, "nll": float(np.logaddexp(0, -margins).mean())})
    ridge = min(trials, key=lambda row: (row["nll"], -row["ridge"]))["ridge"] if trials else max(RIDGES)
    return _gated(chosen, rejected, ridge), ridge, trials


def _gated(chosen: NDArray[np.float32], rejected: NDArray[np.float32], ridge: float) -> GatedLayers:
    """Minimise mean log(1 + exp(-margin)) + ridge/2 (|weight|^2 + |gate|^2), from no weights and gates half open."""
    import torch

    both = np.concatenate([chosen, rejected])
    centre, deviation = both.mean(0), both.std(0)
    # Of features that are constant nothing can be learnt.
    spread = np.where(deviation > 1e-6, deviation, np.inf) * np.sqrt(both.shape[2])
    # (L, 2n, d): a layer's states lie together, so that one product reads them once for weight and gate. With these two
    # as its left rows the product is twice as fast as with them as its right columns.
    x = torch.tensor(np.ascontiguousarray(((both - centre) / spread).swapaxes(0, 1), np.float32))
    n_layers, rows, width = x.shape
    heads, bias = torch.zeros(n_layers, 2, width, requires_grad=True), torch.zeros(n_layers, 1, requires_grad=True)
    optimiser = torch.optim.LBFGS([heads, bias], max_iter=STEPS, max_eval=EVALUATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        weighed, gated = torch.bmm(heads, x.mT).unbind(1)
        scores = (torch.sigmoid(gated + bias) * weighed).sum(0)
        margins = scores[: rows // 2] - scores[rows // 2 :]
        loss = torch.nn.functional.softplus(-margins).mean() + ridge / 2 * heads.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    found, c = heads.detach().numpy(), bias.detach().numpy()[:, 0]
    w, g = (np.ascontiguousarray(found[:, row]) for row in (0, 1))
    return GatedLayers(w, g, c, centre.astype(np.float32), spread.astype(np.float32))


# --- the control of the paper's Table 7 ----------------------------------------------------------------------------


def adamw_cell(context: CellContext, costs: Costs) -> dict[str, Any]:
    """A two-layer ReLU network of 64 neurons on the same features, trained by AdamW on the pairwise logistic loss.

    What COALA's convex head stands in for: its rate is chosen on folds of whole groups among the training pairs.
    """
    from coala.convex.validation import grouped_folds

    train, test = loaded(context, "train"), loaded(context, "test")
    seed = context.cell.seed or 0
    if context.cell.seed == context.study.seeds[0]:
        fold = grouped_folds(train.group, 4, seed)
        held_out = np.ones(len(train), bool) if fold is None else fold == 0
        rows = []
        with costs.of("search", rates=len(context.method.rates)):
            for rate in context.method.rates:
                scores = _adamw(train.take(~held_out if fold is not None else held_out), rate, seed)
                margins = scores(train.take(held_out))
                rows.append({"rate": rate, "nll": calibrated_nll(margins), "accuracy": float((margins > 0).mean())})
        rate = min(rows, key=lambda row: (row["nll"], row["rate"]))["rate"]
    else:
        found = context.result(context.cell.id.rpartition(".s")[0] + f".s{context.study.seeds[0]}")
        rows, rate = [], found["rate"]
    with costs.of("head"):
        scores = _adamw(train, rate, seed)
    return {
        "rate": rate,
        "trials": rows,
        "reward": "score of the network",
        **measured_margins(scores(test), context.part("test")),
    }


def _adamw(features: FeatureSet, rate: float, seed: int, *, neurons: int = 64, epochs: int = 100) -> Any:
    """Scores of pairs' differences by a network trained on ``features``."""
    import torch

    both = np.concatenate([features.chosen, features.rejected])
    centre, spread = both.mean(0), both.std(0)
    spread = np.where(spread > 1e-6, spread, 1.0) * np.sqrt(both.shape[1])
    rng = torch.Generator().manual_seed(seed)
    width = both.shape[1]
    first = (torch.randn(width, neurons, generator=rng) * (2 / width) ** 0.5 * width**0.5).requires_grad_()
    second = (torch.randn(neurons, generator=rng) / neurons**0.5).requires_grad_()
    optimiser = torch.optim.AdamW([first, second], lr=rate)

    def rows(values: Any) -> torch.Tensor:
        return torch.tensor(np.asarray((values - centre) / spread, np.float32))

    def score(values: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(values @ first)
        return torch.mv(hidden, second)

    chosen, rejected = rows(features.chosen), rows(features.rejected)
    for _ in range(epochs):
        for batch in torch.randperm(len(chosen), generator=rng).split(256):  # type: ignore[no-untyped-call]
            loss = torch.nn.functional.softplus(score(rejected[batch]) - score(chosen[batch])).mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()

    def margins(other: FeatureSet) -> Any:
        with torch.no_grad():
            return (score(rows(other.chosen)) - score(rows(other.rejected))).double().numpy()

    return margins
