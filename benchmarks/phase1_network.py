"""Phase I on the ReLU network itself: pattern generation beside L-BFGS and AdamW at the same objective and data.

    python benchmarks/phase1_network.py [--seeds 4] [--quick]

    J = 1/2 ||sum_i theta_i (X Theta_i)_+ - y||^2 + sparsity/2 (||Theta||^2 + ||theta||^2)

at sparsity 0.01 max_i ||X^T D_i y|| over 8 random gates; at its minimum it is the lifted objective of
``coala.convex.papers.patterns``. L-BFGS (SciPy) starts from random networks of 16 and 64 neurons; Adam takes
full-batch steps on 64, its rate on a cosine schedule, with the weight decay in the loss so that it minimises the same
J. Digits (scikit-learn, if it is installed): 1500 rows, 5 to 9 against 0 to 4, centred, mean squared norm 1, a constant
feature of 1/sqrt(d). Compare seconds within one run only. Prints a table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

from coala.convex.papers.patterns import PatternGeneration

Data = tuple[np.ndarray, np.ndarray]
RELATIVE = 0.01


def digits() -> Data | None:
    """Digits 5-9 against 0-4, 1500 rows of 64 pixels and a constant; None without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        return None
    pixels, digit = load_digits(return_X_y=True)
    rows = np.random.default_rng(0).permutation(len(pixels))[:1500]
    return standard(pixels[rows]), np.where(digit[rows] >= 5, 1.0, -1.0)


def synthetic(n: int, d: int) -> Data:
    """Correlated Gaussian features, labelled with noise by a random network of 8 neurons."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.standard_normal((d, d)))[0]
    X = standard(rng.standard_normal((n, d)) * np.arange(1, d + 1) ** -0.5 @ turn)
    teacher = np.maximum(X[:, :-1] @ rng.standard_normal((d, 8)), 0) @ rng.choice([-1.0, 1.0], 8)
    noisy = teacher - np.median(teacher) + 0.3 * teacher.std() * rng.standard_normal(n)
    return X, np.where(noisy > 0, 1.0, -1.0)


def standard(features: np.ndarray) -> np.ndarray:
    """Centred, one scale for mean squared norm 1, and a constant of the size of a feature."""
    X = features - features.mean(axis=0)
    X /= np.sqrt((X**2).sum(axis=1).mean())
    return np.concatenate([X, np.full((len(X), 1), X.shape[1] ** -0.5)], axis=1)


def sparsity_of(X: np.ndarray, y: np.ndarray) -> float:
    gates = np.random.default_rng(0).standard_normal((X.shape[1], 8))
    return RELATIVE * float(np.linalg.norm(X.T @ ((X @ gates >= 0) * y[:, None]), axis=0).max())


def random_network(d: int, m: int, seed: int) -> np.ndarray:
    """First layer (m, d) and second layer (m,), flattened."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.standard_normal(m * d) / np.sqrt(d), rng.choice([-0.5, 0.5], m)])


def lbfgs(X: np.ndarray, y: np.ndarray, sparsity: float, m: int, seed: int, max_steps: int) -> float:
    """J after L-BFGS from a random network."""
    split = m * X.shape[1]

    def value_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        first, second = flat[:split].reshape(m, -1), flat[split:]
        active = np.maximum(X @ first.T, 0)
        residual = active @ second - y
        onto_first = ((active > 0) * residual[:, None] * second).T @ X
        gradient = np.concatenate([onto_first.ravel(), active.T @ residual]) + sparsity * flat
        return float(residual @ residual / 2 + sparsity / 2 * flat @ flat), gradient

    options = {"maxiter": max_steps, "maxfun": 2 * max_steps, "maxcor": 20}
    start = random_network(X.shape[1], m, seed)
    return float(minimize(value_and_gradient, start, jac=True, method="L-BFGS-B", options=options).fun)


def adam(X: np.ndarray, y: np.ndarray, sparsity: float, m: int, seed: int, n_steps: int, rate: float = 1e-2) -> float:
    """J after full-batch Adam from a random network, the rate falling to zero along a cosine."""
    rows, labels, split = jnp.asarray(X, jnp.float32), jnp.asarray(y, jnp.float32), m * X.shape[1]

    def objective(flat: jax.Array) -> jax.Array:
        residual = jnp.maximum(rows @ flat[:split].reshape(m, -1).T, 0) @ flat[split:] - labels
        return residual @ residual / 2 + sparsity / 2 * flat @ flat

    @jax.jit
    def train(flat: jax.Array) -> jax.Array:
        def advance(k: int, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            flat, first, second = state
            gradient = jax.grad(objective)(flat)
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            unbiased = first / (1 - 0.9 ** (k + 1)), second / (1 - 0.999 ** (k + 1))
            pace = rate * (1 + jnp.cos(jnp.pi * k / n_steps)) / 2
            return flat - pace * unbiased[0] / (jnp.sqrt(unbiased[1]) + 1e-8), first, second

        return objective(jax.lax.fori_loop(0, n_steps, advance, (flat, 0 * flat, 0 * flat))[0])

    return float(train(jnp.asarray(random_network(X.shape[1], m, seed), jnp.float32)))


def race(name: str, data: Data, seed: int, settings: PatternGeneration, max_steps: int) -> list[dict[str, Any]]:
    """One row per method: J and seconds, and what pattern generation reports of itself."""
    X, y = data
    sparsity = sparsity_of(X, y)
    rounds: list[tuple[float, float]] = []
    begin = time.perf_counter()
    solution = settings.run(
        X,
        y,
        sparsity,
        jax.random.key(seed),
        on_round=lambda turn, row: rounds.append((time.perf_counter() - begin, row["objective"])),
    )
    ours = {
        "seconds": time.perf_counter() - begin,
        "J": solution.objective,
        "proved_gap": solution.relative_gap,
        "estimated_gap": solution.relative_estimated_gap,
        "violation": solution.violation,
        "neurons": solution.n_neurons,
        "status": solution.status.value,
    }
    rows = [{"data": name, "seed": seed, "method": "patterns", **ours}]
    others = {
        "L-BFGS 16": lambda: lbfgs(X, y, sparsity, 16, seed, max_steps),
        "L-BFGS 64": lambda: lbfgs(X, y, sparsity, 64, seed, max_steps),
        "Adam 64": lambda: adam(X, y, sparsity, 64, seed, max_steps),
    }
    for method, train in others.items():
        begin = time.perf_counter()
        value = train()
        seconds = time.perf_counter() - begin
        # When pattern generation had a value as low, to compare times at equal quality.
        as_low = next((when for when, reached in rounds if reached <= value), None)
        entry = {"data": name, "seed": seed, "method": method, "seconds": seconds, "J": value}
        rows.append({**entry, "J_ratio": value / ours["J"], "patterns_as_low_after": as_low})
    return rows


def instances(quick: bool) -> dict[str, Data]:
    named = {"synthetic 300x17": synthetic(300, 16)} if quick else {"synthetic 2000x129": synthetic(2000, 128)}
    real = digits()
    if real is None:
        print("digits: left out, scikit-learn is not installed")
        return named
    return {"digits 1500x65": real, **named}


def run(seeds: int = 4, quick: bool = False) -> list[dict[str, Any]]:
    """All rows of all instances and seeds; ``quick`` makes few steps, to see that everything runs."""
    rows: list[dict[str, Any]] = []
    settings, max_steps = (PatternGeneration(max_rounds=3), 200) if quick else (PatternGeneration(), 4000)
    for name, data in instances(quick).items():
        if not quick:  # compiles, for most of the widths that will be met
            race(name, data, 0, replace(settings, newton_steps=3), 2)
        for seed in range(seeds):
            rows += race(name, data, seed, settings, max_steps)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    rows = run(args.seeds, args.quick)
    print(f"{'data':<20}{'seed':>5} {'method':<12}{'J':>10}{'/ ours':>8}{'s':>8}{'ours as low':>12}  report")
    for row in rows:
        as_low = row.get("patterns_as_low_after")
        report = ""
        if row["method"] == "patterns":
            report = (
                f"{row['neurons']} neurons, proved gap for their patterns {row['proved_gap']:.1e}, "
                f"estimated for all {row['estimated_gap']:.1e}, {row['status']}"
            )
        print(
            f"{row['data']:<20}{row['seed']:>5} {row['method']:<12}{row['J']:>10.3f}{row.get('J_ratio', 1):>8.3f}"
            f"{row['seconds']:>8.2f}{'' if as_low is None else f'{as_low:.2f}':>12}  {report}"
        )
    print(json.dumps({"seeds": args.seeds, "quick": args.quick, "rows": rows}))


if __name__ == "__main__":
    main()
