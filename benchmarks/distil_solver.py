"""How long does it take to distil? The output-layer program on a model's own states, to a certified relative gap.

    python benchmarks/distil_solver.py film                     # the bundled model, d = 192
    python benchmarks/distil_solver.py folder --model FOLDER    # any model: states of its own replies to --prompts
    python benchmarks/distil_solver.py film --support vocabulary

States are those of unguided replies of the model, each to become the token that it wrote: as hard a program as that of
guided replies, and it needs no head. Prints a line for each ridge (as a share of the Hessian's trace): steps, what the
change gains in nats a token, the certified gap over that gain, seconds on the clock and of all cores, compilation
included. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from coala.backbone import load_backbone
from coala.convex.output_data import OutputData
from coala.convex.output_fit import trace_of
from coala.convex.solvers import solve
from coala.data import read_pairs
from coala.decoding import Guidance, generate
from coala.distil.matrix import output_matrix
from coala.distil.states import Lesson, teacher_states
from coala.values import conversation_text

ASSETS = Path(__file__).resolve().parent.parent / "src" / "coala" / "assets"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("film", "folder"))
    parser.add_argument("--model", type=Path, default=ASSETS / "film-lm")
    parser.add_argument("--pairs", type=Path, default=ASSETS / "film_pairs.jsonl.gz", help="whose prompts are answered")
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--support", choices=("nucleus", "vocabulary"), default="nucleus")
    parser.add_argument("--ridges", type=float, nargs="+", default=[1e-3, 1e-4])
    parser.add_argument("--tolerance", type=float, default=1e-3)
    args = parser.parse_args()
    backbone = load_backbone(str(args.model), device="cpu")
    unique = {conversation_text(pair.prompt): pair.prompt for pair in read_pairs(args.pairs)}
    prompts = list(unique.values())[: args.prompts]
    replies = generate(prompts, backbone, max_new_tokens=args.tokens, seed=0, batch_size=30)
    lessons = [Lesson(p, r.text, n) for n, (p, r) in enumerate(zip(prompts, replies, strict=True)) if r.text]
    output, rows = output_matrix(backbone), []
    with tempfile.TemporaryDirectory() as folder:
        states = teacher_states(backbone, output, lessons, Path(folder), Guidance.unguided())
        data = OutputData(states, output, args.support)
        trace = trace_of(data)
        for relative in args.ridges:
            clock, used = time.perf_counter(), time.process_time()
            program, solver = data.problem(relative * trace)
            found = solve(program, solver, tolerance=args.tolerance)
            row = {
                "ridge": relative,
                "status": found.status.value,
                "steps": found.steps,
                "gain": -found.objective,
                "relative_gap": found.relative_gap,
                "seconds": time.perf_counter() - clock,
                "core_seconds": time.process_time() - used,
            }
            rows.append(row)
            print(
                f"ridge {relative:.0e}: {row['status']}, {row['steps']} steps, gains {row['gain']:.4f} nats a token, "
                f"gap {row['relative_gap']:.1e} of it; {row['seconds']:.1f} s, {row['core_seconds']:.1f} s of cores"
            )
    facts = {"states": len(states), "counted": int(data.counted.sum()), "d": states.width, "V": len(output)}
    facts["mean_nucleus"] = float(np.mean(states.size))
    print(
        json.dumps({"support": args.support, **facts, "cores": os.cpu_count(), "load": os.getloadavg(), "rows": rows})
    )


if __name__ == "__main__":
    main()
