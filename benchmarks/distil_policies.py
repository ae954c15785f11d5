"""How much of guidance survives distillation? Win rate, perplexity and divergence of policies on the bundled film task.

    python benchmarks/distil_policies.py --out runs/distil-film

Makes the run (or takes it up), writes its teacher's replies and distils them in several ways. Every reply to a held-out
prompt is compared with ``--references`` unguided ones by the film task's judge, in both orders; intervals are over
prompts. Perplexity is the base model's, over that of unguided replies; divergence is the exact KL(policy || base) of a
reply over the whole vocabulary (of mode shift: within the nucleus). Last comes an adapter that is trained on the same
replies, with the FLOPs of both vehicles (needs the extra `baselines`; leave it out by --only guided). Prints a table;
the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import coala
from coala.alignment.parts import load_parts
from coala.data import read_pairs
from coala.decoding import Guidance, generate, generate_distilled
from coala.decoding.adapted import generate_adapted, load_adapted
from coala.distil.adapter import distil_adapter
from coala.distil.settings import AdapterSettings, DistilSettings
from coala.distil.stage import distil
from coala.evaluation import WordJudge, win_rate
from coala.statistics.intervals import mean_estimate
from coala.statistics.scores import perplexity
from coala.values import Generation, conversation_text, prompt_id

ASSETS = Path(__file__).resolve().parent.parent / "src" / "coala" / "assets"
# name -> settings, and the strengths at which the policy is sampled
POLICIES: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "guided, ridge and rank by held-out prompts": ({}, (1.0, 0.5, 1.5)),
    "guided, that ridge, full rank": ({"rank": "full"}, (1.0,)),
    "guided, ridge 0.02, full rank": ({"ridge": 0.02, "rank": "full"}, (1.0,)),
    "guided, ridge 0.02, rank 16": ({"ridge": 0.02, "rank": 16}, (1.0,)),
    "guided, ridge 0.02, full rank, vocabulary": ({"ridge": 0.02, "rank": "full", "support": "vocabulary"}, (1.0,)),
    "weighted, ridge and rank by held-out prompts": ({"teacher": "weighted"}, (1.0,)),
    "shift, ridge and rank by held-out prompts": ({"teacher": "shift"}, (1.0, 1.5)),
}

ADAPTER = "adapter, rate and epoch by held-out prompts"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    parser.add_argument("--pairs", type=int, default=1200, help="training pairs")
    parser.add_argument("--teacher-prompts", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--references", type=int, default=4)
    parser.add_argument("--only", default="", help="policies that have this in their name")
    args = parser.parse_args()
    test = list(read_pairs(ASSETS / "film_pairs_test.jsonl.gz"))
    coala.align(
        list(read_pairs(ASSETS / "film_pairs.jsonl.gz"))[: args.pairs],
        model=ASSETS / "film-lm",
        out=args.out,
        model_settings={"template": "chat"},
        evaluation={"prompts": 0, "max_new_tokens": args.tokens},
    )
    backbone, head, _ = load_parts(args.out)
    prompts = list({conversation_text(pair.prompt): pair.prompt for pair in test}.values())[: args.prompts]
    judge = WordJudge.load(ASSETS / "film-judge.json")
    common: dict[str, Any] = {"max_new_tokens": args.tokens, "prompt_ids": [prompt_id(p) for p in prompts]}

    def plain(seed: int, name: str) -> list[Generation]:
        found = generate(prompts, backbone, seed=seed, batch_size=50, **common)
        return [replace(one, method=name) for one in found]

    reference = [one for k in range(args.references) for one in plain(1000 + k, "reference")]
    base, rows = plain(0, "unguided"), []

    def log(found: Sequence[Generation]) -> float:
        return perplexity([one.log_prob for one in found], [one.n_tokens for one in found]).value

    def measure(name: str, found: list[Generation], seconds: float, **more: Any) -> None:
        several = [one for _ in range(args.references) for one in found]
        judged = [
            j
            for a, b in zip(several, reference, strict=True)
            for j in (judge.compare((), a, b), judge.compare((), b, a))
        ]
        spent = [one.divergence for one in found if one.divergence is not None]
        kl = mean_estimate(spent) if spent else None
        win = win_rate(judged, of=found[0].method)
        rows.append(
            {"name": name, "win": asdict(win), "perplexity_ratio": log(found) / log(base), "seconds": seconds, **more}
        )
        rows[-1]["divergence"] = None if kl is None else asdict(kl)
        print(
            f"| {name} | {win} | {rows[-1]['perplexity_ratio']:.2f} | {'' if kl is None else kl} | {seconds:.0f} |",
            flush=True,
        )

    print("| policy | wins against unguided | perplexity, ratio | KL a reply, nats | s |\n|---|---|---|---|---|")
    measure("unguided", base, 0.0)
    for rule in (Guidance("block", candidates=10, block_tokens=5), Guidance("shift", candidates=10)):
        clock = time.perf_counter()
        taught = generate(prompts, backbone, head, rule, seed=0, batch_size=60 // rule.rows, **common)
        measure(f"teacher: {rule}", taught, time.perf_counter() - clock)
    for name, (settings, strengths) in POLICIES.items():
        if args.only not in name:
            continue
        policy = distil(args.out, DistilSettings(prompts=args.teacher_prompts, **settings))
        assert policy.certificate is not None
        facts = {"rank": policy.rank, "ridge": policy.ridge, "certificate": dict(policy.certificate.facts)}
        for strength in strengths:
            clock = time.perf_counter()
            found = generate_distilled(prompts, backbone, policy, seed=0, strength=strength, batch_size=50, **common)
            told = f"{name} (rank {policy.rank}, ridge {policy.ridge:.2g}), strength {strength:g}"
            measure(told, found, time.perf_counter() - clock, **facts)
    if args.only in ADAPTER:
        trained = distil_adapter(args.out, DistilSettings(prompts=args.teacher_prompts), AdapterSettings())
        model, clock = load_adapted(trained), time.perf_counter()
        found = generate_adapted(prompts, model, seed=0, batch_size=50, **common)
        facts = {"rate": trained.rate, "epoch": trained.epoch, "trials": list(trained.trials), **trained.facts}
        told = f"{ADAPTER} (rank {trained.rank}, rate {trained.rate:g}, epoch {trained.epoch})"
        measure(told, found, time.perf_counter() - clock, facts=facts)
    print(json.dumps({"prompts": len(prompts), "references": args.references, "rows": rows}))


if __name__ == "__main__":
    main()
