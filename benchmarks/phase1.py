"""Phase I solvers: seconds to a certified gap, cost of an iteration beside its limit, and the same program by others.

    python benchmarks/phase1.py [--part gated|cone|network|all] [--size small|standard|paper] [--seeds 3]

Part ``gated``: GatedNewton in float32 on synthetic, correlated features with sparsity 0.01 of the largest useful, from
rows already rotated; compilation excluded, the certificate in float64 included. On the first instance also FISTA with
restarts on the same program, and R-FISTA of the package ``scnn`` if it is installed; each is stopped at the same
distance from the optimum. Everything of an instance and a seed runs in one process, one after another; on a shared
machine trust the ratios. Size ``paper`` is the shape of the paper's largest run, for an accelerator.
Parts ``cone`` and ``network``: benchmarks/phase1_cone.py and benchmarks/phase1_network.py.
Prints a table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from coala.convex import GatedNewton, GatedProgram, largest_sparsity, solve
from coala.convex.linear import matmul, pcg
from coala.convex.program import in_double
from coala.convex.prox import group_soft_threshold
from coala.convex.pytree import pytree
from coala.convex.rows import check_memory, solve_bytes
from coala.values import CoalaError

RELATIVE = 0.01
# rows, features, patterns, and the seconds to a certified gap of 1e-3 that the design asks for on two quiet CPU cores
INSTANCES: dict[str, list[tuple[int, int, int, float | None]]] = {
    "small": [(2_000, 128, 32, 0.1)],
    "standard": [(2_000, 128, 32, 0.1), (10_000, 128, 32, 0.2), (10_000, 768, 64, 2.0), (50_000, 768, 8, 1.0)],
    "paper": [(118_090, 4_096, 32, None)],
}


def instance(n: int, d: int, P: int, seed: int) -> tuple[GatedProgram, np.ndarray]:
    """Correlated features with a bias column, rows of size about 1, rotated; labels of a non-linear rule with noise.

    The gates (d, P) come with the program.
    """
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((d - 1, d - 1), np.float32) * np.arange(1, d, dtype=np.float32) ** -0.5
    X = rng.standard_normal((n, d - 1), np.float32) @ mixing.T
    X -= X.mean(axis=0)
    X /= np.sqrt((X**2).sum(axis=1).mean())
    X = np.concatenate([X, np.full((n, 1), 1 / np.sqrt(d), np.float32)], axis=1)
    first, second = rng.standard_normal((2, d), np.float32)
    score = 3 * np.abs(X @ first) + 2 * X @ second
    noise = rng.standard_normal(n) * score.std() / 2
    y = np.where(score - np.median(score) + noise > 0, 1, -1)
    _, turn = np.linalg.eigh(X.T @ X)
    X = np.ascontiguousarray(X @ turn[:, ::-1])
    gates = rng.standard_normal((d, P), np.float32)
    patterns, rows = X @ gates >= 0, jnp.asarray(X)
    program = GatedProgram(rows, jnp.asarray(y, jnp.float32), jnp.asarray(patterns), jnp.ones((), jnp.float32))
    return jax.block_until_ready(replace(program, sparsity=RELATIVE * largest_sparsity(program))), gates


def seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """The shortest of several runs, the first of which compiles and does not count."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - begin)
    return min(times)


class Fista(NamedTuple):
    """Weights, the previous ones, and the momentum's counter."""

    u: jax.Array
    before: jax.Array
    k: jax.Array


@partial(jax.jit, static_argnums=3)
def fista(program: GatedProgram, state: Fista, steepness: jax.Array, n_steps: int) -> Fista:
    """Steps of Beck and Teboulle's method with the gradient restart of O'Donoghue and Candes."""

    def advance(_: int, state: Fista) -> Fista:
        v = state.u + (state.k - 1) / (state.k + 2) * (state.u - state.before)
        gradient = program.predict_adjoint(program.slope(program.predict(v)))
        new = group_soft_threshold(v - gradient / steepness, program.levels / steepness)
        restart = jnp.vdot(v - new, new - state.u) > 0
        return Fista(new, state.u, jnp.where(restart, 1.0, state.k + 1))

    return jax.lax.fori_loop(0, n_steps, advance, state)


def fista_seconds(program: GatedProgram, target: float, limit: float) -> float | None:
    """Seconds of FISTA until the objective is at most ``target``, its look-ups and the step length excluded."""
    v = jnp.ones_like(program.zeros())
    for _ in range(30):
        image = program.normal_product(jnp.ones_like(program.y), v)
        v = image / jnp.linalg.norm(image)
    steepness = 1.01 * jnp.linalg.norm(program.normal_product(jnp.ones_like(program.y), v))
    objective = jax.jit(lambda program, u: program.objective(u))
    state = Fista(program.zeros(), program.zeros(), jnp.ones((), program.y.dtype))
    jax.block_until_ready(fista(program, state, steepness, 20))
    spent = 0.0
    while spent < limit:
        if float(objective(program, state.u)) <= target:
            return spent
        begin = time.perf_counter()
        state = jax.block_until_ready(fista(program, state, steepness, 20))
        spent += time.perf_counter() - begin
    return None


def scnn_seconds(program: GatedProgram, gates: np.ndarray, target: float) -> float | None:
    """Seconds by the clock of ``scnn`` until its R-FISTA has an objective of at most ``target``."""
    from scnn.metrics import Metrics
    from scnn.models import ConvexGatedReLU
    from scnn.optimize import optimize_model
    from scnn.regularizers import NeuronGL1
    from scnn.solvers import RFISTA

    X, y = np.asarray(program.X), np.asarray(program.y)
    n = len(y)
    # Their objective is ours over n, with the bias among our columns and columns left as they are.
    model = ConvexGatedReLU(gates)
    _, metrics = optimize_model(
        model,
        RFISTA(model, tol=1e-14, max_iters=5_000),
        Metrics(objective=True, time=True, metric_freq=10),
        X,
        y,
        regularizer=NeuronGL1(float(program.sparsity) / n),
        unitize_data=False,
        verbose=False,
    )
    reached = np.flatnonzero(np.asarray(metrics.objective) * n <= target)
    return float(np.asarray(metrics.time)[reached[0]]) if len(reached) else None


def newton_seconds(program: GatedProgram, tolerance: float) -> dict[str, Any]:
    """The best of three solves to a certified relative gap; steps and what was certified."""
    solution = solve(program, GatedNewton(), tolerance=tolerance)
    spent = seconds(lambda: solve(program, GatedNewton(), tolerance=tolerance).value, 3)
    return {
        "seconds": spent,
        "status": solution.status.value,
        "steps": solution.steps,
        "gap": solution.relative_gap,
        "objective": solution.objective,
    }


def newton_seconds_to(program: GatedProgram, target: float) -> float | None:
    """Seconds of Newton steps until the objective is at most ``target``, the best of three."""
    solver = GatedNewton()
    spent = []
    for _ in range(3):
        begin = time.perf_counter()
        state = solver.init(program)
        steps = 0
        while float(state.bounds.objective) > target and steps < 40:
            state, steps = solver.step(program, state), steps + 1
        if float(state.bounds.objective) <= target:
            spent.append(time.perf_counter() - begin)
    return min(spent, default=None)


products: list[int] = []


@pytree()
@dataclass(frozen=True)
class Counted(GatedProgram):
    """A program that notes each product with its Hessian in ``products``."""

    def normal_product(self, curvature: jax.Array, u: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: products.append(1))
        return super().normal_product(curvature, u)


def cg_steps(program: GatedProgram, tolerance: float) -> int:
    """Conjugate gradient steps in a solve to ``tolerance``."""
    products.clear()
    counted = Counted(program.X, program.y, program.patterns, program.sparsity)
    solve(counted, GatedNewton(), tolerance=tolerance, exact=False)
    jax.effects_barrier()
    return len(products)


def cost_of_an_iteration(program: GatedProgram) -> dict[str, float]:
    """Milliseconds of one conjugate gradient step, of both operators, and of the bare products of their shapes."""
    n, (d, P) = len(program.y), program.zeros().shape
    u, z = jnp.ones((d, P)), jnp.ones(n)
    masked = jnp.ones((n, P))
    bare = jax.jit(matmul)
    bare_back = jax.jit(lambda S, X: jnp.tensordot(S, X, ((0,), (0,)), precision="highest"))
    # A shift of the spectrum's own size: all 20 steps are made, whatever the data.
    twenty = jax.jit(
        lambda program, u: pcg(lambda p: program.normal_product(z, p) + p, u, tolerance=0.0, max_steps=20).value
    )
    forward = jax.jit(lambda program, u: program.predict(u))
    backward = jax.jit(lambda program, z: program.predict_adjoint(z))
    return {
        "cg_ms": seconds(lambda: twenty(program, u)) * 1e3 / 20,
        "F_ms": seconds(lambda: forward(program, u)) * 1e3,
        "F_gemm_ms": seconds(lambda: bare(program.X, u)) * 1e3,
        "FT_ms": seconds(lambda: backward(program, z)) * 1e3,
        "FT_gemm_ms": seconds(lambda: bare_back(masked, program.X)) * 1e3,
        "gemm_gflops": 2 * 2048**3 / seconds(lambda: bare(jnp.ones((2048, 2048)), jnp.ones((2048, 2048)))) / 1e9,
    }


HEADER = f"""{"n x d, P":<18}{"seed":>5}{"gap 1e-3":>10}{"asked":>7}{"CG":>5}{"f64 gap 1e-6":>13}{"J within 1e-6":>14}\
{"ms/CG":>8}{"flop limit":>11}{"/ 2 GEMM":>9}{"GEMM/F":>8}{"GEMM/FT":>8}"""


def run_gated(size: str, seeds: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    print("seconds; CG to a gap of 1e-3; ms of one CG step, of its flops at the speed of a square product, and ratios")
    print(HEADER)
    for number, (n, d, P, asked) in enumerate(INSTANCES[size]):
        # Building the data takes them once more, rotated; on an accelerator the rest of the solve lies there.
        check_memory(2 * solve_bytes(n, d, P) if jax.default_backend() == "cpu" else 3 * n * d * 4)
        for seed in range(seeds):
            program, gates = instance(n, d, P, seed)
            certified = newton_seconds(program, 1e-3)
            with jax.enable_x64(True):
                double = newton_seconds(in_double(program), 1e-6)
            target = double["objective"] * (1 + 1e-6)
            close = newton_seconds_to(program, target)
            cost = cost_of_an_iteration(program)
            limit = 4 * n * d * P / cost["gemm_gflops"] / 1e6
            count = cg_steps(program, 1e-3)
            row = {"n": n, "d": d, "P": P, "seed": seed, "asked": asked, "certified": certified, "double": double}
            rows.append({**row, "close": close, "cg": count, "flop_limit_ms": limit, **cost})
            within = f"{'never':>14}" if close is None else f"{close:>14.3f}"
            print(
                f"{f'{n} x {d}, {P}':<18}{seed:>5}{certified['seconds']:>10.3f}{asked or '-':>7}{count:>5}"
                f"{double['seconds']:>13.3f}{within}{cost['cg_ms']:>8.2f}{limit:>11.2f}"
                f"{cost['cg_ms'] / (cost['F_gemm_ms'] + cost['FT_gemm_ms']):>9.2f}"
                f"{cost['F_gemm_ms'] / cost['F_ms']:>8.0%}{cost['FT_gemm_ms'] / cost['FT_ms']:>8.0%}",
                flush=True,
            )
            if number == 0 and size != "paper":
                rows[-1]["others"] = compare(program, gates, target, close)
    return rows


def compare(program: GatedProgram, gates: np.ndarray, target: float, newton: float | None) -> dict[str, float | None]:
    """Seconds of other methods until their objective is at most ``target``, beside those of Newton's method."""
    others: dict[str, float | None] = {"FISTA": fista_seconds(program, target, limit=60)}
    if find_spec("scnn"):
        others["SCNN R-FISTA"] = scnn_seconds(program, gates, target)
    else:
        print("    SCNN R-FISTA: not installed")
    for name, spent in others.items():
        if spent is None:
            print(f"    {name}: never within 1e-6 of the optimum")
        else:
            ratio = f", {spent / newton:.1f} x Newton" if newton else ""
            print(f"    {name}: {spent:.3f} s to an objective within 1e-6 of the optimum{ratio}", flush=True)
    return others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["gated", "cone", "network", "all"], default="gated")
    parser.add_argument("--size", choices=list(INSTANCES), default="standard")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    parts: dict[str, Any] = {}
    if args.part in ("gated", "all"):
        try:
            parts["gated"] = run_gated(args.size, args.seeds)
        except CoalaError as error:
            sys.exit(str(error))
    sys.path.insert(0, str(Path(__file__).parent))
    for name in ("cone", "network"):
        if args.part in (name, "all"):
            module = importlib.import_module(f"phase1_{name}")
            parts[name] = module.run(args.seeds, args.size == "small")
    device = jax.devices()[0].device_kind
    print(json.dumps({"device": device, "seeds": args.seeds, "size": args.size, "parts": parts}))


if __name__ == "__main__":
    main()
