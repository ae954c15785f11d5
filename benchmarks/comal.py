"""COMAL, INPO and iterative IPO on a language model whose every probability is known, beside the closed form.

    python benchmarks/comal.py                 # 8 outer updates of 6 steps, three methods; some minutes of CPU
    python benchmarks/comal.py --seeds 0 1 2 --anchor 0.1

A Llama of two layers and eight words answers two prompts with one word each; the judge is a table: the paper's game
and a weighted rock-paper-scissors, both without a best answer. Every step samples 500 answers a prompt, judges,
scores and trains by the same stages as a run on a real model. ``ipo`` is the same with ref_weight 0, ``inpo`` with a
reference that stays, and as many steps. Prints KL(Nash, policy) and the duality gap after every outer update (every 6
steps), measured and predicted (population updates in double precision), and a table of the final gaps with t intervals
over seeds; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from coala.comal.loop import run_comal
from coala.comal.oracles import from_table
from coala.nash import duality_gap, kl_divergence, solve
from coala.statistics.intervals import mean_estimate
from tests.tiny_game import EXACT, EXAMPLES, GAME, START, copy_of, distribution, supervised_start

METHODS = ["comal", "inpo", "ipo"]


def measure(p: Any) -> dict[str, list[float]]:
    nash = [np.asarray(part) for part in GAME.nash().strategy.values()]  # type: ignore[union-attr]
    return {
        "kl": [kl_divergence(best, np.log(part)) for best, part in zip(nash, p, strict=True)],
        "gap": [duality_gap(P, np.asarray(part)) for P, part in zip(GAME.matrices, p, strict=True)],
    }


def predicted(method: str, outer: int) -> list[Any]:
    start = {"q1": START, "q2": START}
    if method == "ipo":
        found = solve(GAME, start, method="ipo", eta=2.0, outer=6 * outer).policy
    elif method == "inpo":
        found = solve(GAME, start, method="inpo", eta=2.0, tau=1 / 6, outer=6 * outer).policy
    else:
        found = solve(GAME, start, inner="md", eta=2.0, tau=1 / 6, inner_steps=6, outer=outer).policy
    return [found["q1"], found["q2"]]  # type: ignore[call-overload]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outer", type=int, default=8)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--anchor", type=float, default=0.0, help="weight of the sampled answers' likelihood")
    given = parser.parse_args()
    start = supervised_start()
    rows = []
    for seed in given.seeds:
        for method in given.methods:
            weight = 0.0 if method == "ipo" else 1 / 3
            loops = (1, 6 * given.outer) if method == "inpo" else (given.outer, 6)
            settings = replace(EXACT, ref_weight=weight, tau=None, seed=seed, anchor_nll=given.anchor)
            settings = replace(settings, outer_steps=loops[0], inner_steps=loops[1])
            policy = copy_of(start)

            def look(step: Any, policy: Any = policy, method: str = method, seed: int = seed) -> None:
                if step.inner % 6:
                    return
                outer = step.inner // 6 if method == "inpo" else step.outer
                p, mass = distribution(policy)
                exact = predicted(method, outer)
                row = {
                    "seed": seed,
                    "method": method,
                    "outer": outer,
                    "anchor": given.anchor,
                    **measure(p),
                    "mass": mass.tolist(),
                }
                row["predicted"] = measure(exact)
                row["difference"] = float(np.abs(p - np.array(exact)).max())
                rows.append(row)
                kl, said = row["kl"], row["predicted"]["kl"]
                print(
                    f"seed {seed} {method:5} outer {outer}  KL {kl[0]:.3f} {kl[1]:.3f}  predicted {said[0]:.3f} "
                    f"{said[1]:.3f}  largest difference {row['difference']:.3f}  mass {min(mass):.3f}",
                    flush=True,
                )

            began = time.process_time()
            with tempfile.TemporaryDirectory() as folder:
                run_comal(policy, EXAMPLES, from_table(GAME), settings, Path(folder) / "run", on_step=look)
            print(f"seed {seed} {method:5} {time.process_time() - began:.0f} s of CPU", flush=True)
    table(rows, given.methods, given.outer)
    print(json.dumps(rows))


def table(rows: list[dict[str, Any]], methods: list[str], outer: int) -> None:
    """The final gap and KL by method and prompt: mean over seeds with a t interval, beside what is predicted."""
    print(f"\n| method | prompt | gap after {outer} | predicted | KL(Nash, policy) | predicted | smallest mass |")
    print("|---|---|---|---|---|---|---|")
    for method in methods:
        last = [row for row in rows if row["method"] == method and row["outer"] == outer]
        for i in range(2):
            cells = []
            for what in ("gap", "kl"):
                found = mean_estimate([row[what][i] for row in last])
                bounds = "" if len(last) < 2 else f" [{max(0.0, found.low):.3f}, {found.high:.3f}]"
                cells += [f"{found.value:.3f}{bounds}", f"{last[0]['predicted'][what][i]:.3f}"]
            print(f"| {method} | {i + 1} | {' | '.join(cells)} | {min(row['mass'][i] for row in last):.3f} |")


if __name__ == "__main__":
    main()
