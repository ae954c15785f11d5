"""Phase II minimisers beside each other: seconds until the objective is within 1e-6 and 1e-10 of its minimum.

    python benchmarks/phase2.py [--seeds 3] [--seconds 6]

Synthetic pairs whose preferences follow a Bradley-Terry model of the hidden features, float64, start at zero. All
methods of an instance and seed run in one process, one after another, on the same program; compilation and the
transfer of the features are excluded, and so are the looks at the objective between steps. The minimum is Newton's at
a certified relative gap of 1e-13. Prints a table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coala.convex.papers.losses import Logistic, SecondLayer
from coala.convex.papers.minimisers import LBFGS, AdamW, DampedNewton, Minimiser, Nesterov
from coala.convex.solvers import solve

INSTANCES = [(60_000, 64, 1e-4), (60_000, 256, 1e-4), (6_000, 64, 1e-6)]  # pairs, neurons, ridge
TARGETS = (1e-6, 1e-10)
LOOK_AFTER = 0.02  # seconds of steps between looks at the objective


def pairs(n: int, m: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Non-negative, correlated hidden features (n, m) of the preferred and the other reply."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((m, m)) * np.arange(1, m + 1) ** -0.5 / np.sqrt(m)
    first, second = np.maximum(rng.standard_normal((2, n, m)) @ mixing.T, 0)
    reward = (first - second) @ rng.standard_normal(m) * 2
    better = rng.random(n) < 1 / (1 + np.exp(-reward))
    return np.where(better[:, None], first, second), np.where(better[:, None], second, first)


def methods(seed: int) -> dict[str, Minimiser]:
    key = jax.random.key(seed)
    return {
        "Newton": DampedNewton(),
        "L-BFGS": LBFGS(),
        "Nesterov": Nesterov(),
        "AdamW 1e-3": AdamW(key, rate=1e-3),
        "AdamW 1e-2": AdamW(key, rate=1e-2),
    }


def race(program: SecondLayer, minimiser: Minimiser, optimum: float, limit: float) -> dict[str, Any]:
    """Seconds of steps to each target (None if not within ``limit``), the steps made and the smallest excess seen."""
    objective = jax.jit(lambda program, theta: program.objective(theta))

    def excess(state: Any) -> float:
        return float(objective(program, minimiser.solution(program, state)[0])) - optimum

    state = jax.block_until_ready(minimiser.init(program))
    excess(minimiser.step(program, state))  # compiles
    begin = time.perf_counter()
    state = jax.block_until_ready(minimiser.init(program))
    spent, steps = time.perf_counter() - begin, 0
    reached: dict[float, float] = {}
    smallest = now = excess(state)
    while len(reached) < len(TARGETS) and spent < limit:
        begin = time.perf_counter()
        while True:
            state = jax.block_until_ready(minimiser.step(program, state))
            steps += 1
            if time.perf_counter() - begin > LOOK_AFTER:
                break
        spent += time.perf_counter() - begin
        now = excess(state)
        smallest = min(smallest, now)
        for target in TARGETS:
            if now <= target:
                reached.setdefault(target, spent)
    seconds = {f"{target:.0e}": reached.get(target) for target in TARGETS}
    return {"seconds": seconds, "steps": steps, "smallest": smallest, "last": now}


def median(values: list[float | None]) -> float | None:
    """The median, if more than half the runs arrived."""
    ranked = sorted(np.inf if value is None else value for value in values)
    middle = float(ranked[len(ranked) // 2])
    return middle if np.isfinite(middle) else None


def show(value: float | None) -> str:
    return "never" if value is None else f"{value:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="limit for each run")
    args = parser.parse_args()
    rows = []
    print("medians over seeds")
    print(
        f"{'n, m, ridge':<20}{'method':<12}{'to 1e-6 s':>10}{'to 1e-10 s':>11}{'/ Newton':>9}{'steps':>8}  best excess"
    )
    for n, m, ridge in INSTANCES:
        runs: dict[str, list[dict[str, Any]]] = {}
        for seed in range(args.seeds):
            with jax.enable_x64(True):
                chosen, rejected = map(jnp.asarray, pairs(n, m, seed))
                program = jax.block_until_ready(SecondLayer.of(chosen, rejected, Logistic(), ridge=ridge))
                del chosen, rejected
                optimum = solve(program, DampedNewton(), tolerance=1e-13, exact=False).objective
                for name, minimiser in methods(seed).items():
                    runs.setdefault(name, []).append(race(program, minimiser, optimum, args.seconds))
        newton = median([run["seconds"]["1e-10"] for run in runs["Newton"]])
        for name, of_method in runs.items():
            loose, tight = (median([run["seconds"][key] for run in of_method]) for key in ("1e-06", "1e-10"))
            ratio = tight / newton if tight is not None and newton else None
            steps = int(np.median([run["steps"] for run in of_method]))
            worst = max(run["smallest"] for run in of_method)
            rows.append({"n": n, "m": m, "ridge": ridge, "method": name, "runs": of_method, "ratio": ratio})
            print(
                f"{f'{n}, {m}, {ridge:.0e}':<20}{name:<12}{show(loose):>10}{show(tight):>11}"
                f"{'' if ratio is None else f'{ratio:.1f}':>9}{steps:>8}  {max(worst, 0):.1e} (worst of {args.seeds})",
                flush=True,
            )
    print(json.dumps({"seeds": args.seeds, "limit": args.seconds, "rows": rows}))


if __name__ == "__main__":
    main()
