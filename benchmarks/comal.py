"""COMAL against iterative IPO on a language model whose every probability is known, beside the closed form.

    python benchmarks/comal.py                 # 4 outer updates of 6 steps, both methods; about a minute of CPU
    python benchmarks/comal.py --seeds 0 1 2 --anchor 0.1

A Llama of two layers and eight words answers two prompts with one word each; the judge is a table: the paper's game
and a weighted rock-paper-scissors, both without a best answer. Every step samples 500 answers a prompt, judges,
scores and trains by the same stages as a run on a real model. ``ipo`` is the same with ref_weight 0. Prints KL(Nash,
policy) and the duality gap after every outer update, measured and predicted (population updates in double precision);
the last line is JSON.
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

from coala.nash import duality_gap, kl_divergence, solve
from coala.nash.comal import run_comal
from coala.nash.oracles import from_table
from tests.tiny_game import EXACT, EXAMPLES, GAME, START, copy_of, distribution, supervised_start


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
    else:
        found = solve(GAME, start, inner="md", eta=2.0, tau=1 / 6, inner_steps=6, outer=outer).policy
    return [found["q1"], found["q2"]]  # type: ignore[call-overload]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outer", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--anchor", type=float, default=0.0, help="weight of the sampled answers' likelihood")
    given = parser.parse_args()
    start = supervised_start()
    rows = []
    for seed in given.seeds:
        for method, weight in (("comal", 1 / 3), ("ipo", 0.0)):
            settings = replace(EXACT, ref_weight=weight, tau=None, outer_steps=given.outer, seed=seed)
            settings = replace(settings, anchor_nll=given.anchor)
            policy = copy_of(start)

            def look(step: Any, policy: Any = policy, method: str = method, seed: int = seed) -> None:
                if step.inner < EXACT.inner_steps:
                    return
                p, mass = distribution(policy)
                exact = predicted(method, step.outer)
                row = {
                    "seed": seed,
                    "method": method,
                    "outer": step.outer,
                    "anchor": given.anchor,
                    **measure(p),
                    "mass": mass.tolist(),
                }
                row["predicted"] = measure(exact)
                row["difference"] = float(np.abs(p - np.array(exact)).max())
                rows.append(row)
                kl, said = row["kl"], row["predicted"]["kl"]
                print(
                    f"seed {seed} {method:5} outer {step.outer}  KL {kl[0]:.3f} {kl[1]:.3f}  predicted {said[0]:.3f} "
                    f"{said[1]:.3f}  largest difference {row['difference']:.3f}  mass {min(mass):.3f}",
                    flush=True,
                )

            began = time.process_time()
            with tempfile.TemporaryDirectory() as folder:
                run_comal(policy, EXAMPLES, from_table(GAME), settings, Path(folder) / "run", on_step=look)
            print(f"seed {seed} {method:5} {time.process_time() - began:.0f} s of CPU")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
