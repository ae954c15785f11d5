"""Guidance modes on the bundled film task: win rate against unguided text by the independent judge, and perplexity.

    coala demo --out runs/demo && python benchmarks/guidance.py --run runs/demo

Uses the head and the held-out prompts of a finished demo. Prints a table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from coala.align import load_run
from coala.align.stages import prompt_id
from coala.decoding import Guidance, generate
from coala.evaluation import WordJudge, judge, perplexity, win_rate
from coala.store import load_pairs
from coala.values import Generation

ROOT = Path(__file__).resolve().parent.parent
RULES = (Guidance("token"), Guidance("token", strength=4), Guidance("block"), Guidance.paper())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--prompts", type=int, default=200)
    args = parser.parse_args()
    if not (args.run / "head" / "head.json").exists():
        print(f"{args.run} is not a finished demo: run `coala demo --out {args.run}` first")
        print(json.dumps({"skipped": f"{args.run} is not a finished demo"}))
        return
    backbone, head, _ = load_run(args.run)
    by_prompt = {pair.prompt: pair for pair in load_pairs(args.run / "pairs-eval.jsonl")}
    chosen = list(by_prompt.values())[: args.prompts]
    film_judge = WordJudge.load(ROOT / "src" / "coala" / "assets" / "film-judge.json")

    def replies(rule: Guidance) -> list[Generation]:
        ids = [prompt_id(pair) for pair in chosen]
        prompts = [pair.prompt for pair in chosen]
        return generate(prompts, backbone, head, rule, max_new_tokens=48, seed=0, prompt_ids=ids, batch_size=32)

    unguided = replies(Guidance("none"))
    rows = []
    for rule in RULES:
        guided = replies(rule)
        wins = win_rate(judge(guided, unguided, film_judge))
        cost = perplexity([g.log_prob for g in guided], [g.n_tokens for g in guided])
        rows.append({"guidance": str(rule), "win_rate": asdict(wins), "perplexity": asdict(cost)})
        print(f"{rule!s:<45} wins {wins}  perplexity {cost.value:.2f} [{cost.low:.2f}, {cost.high:.2f}]", flush=True)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
