"""Does a changed model answer better where it is served? Replies of llama.cpp to held-out prompts, before and after.

    python benchmarks/served.py BASE.gguf CHANGED.gguf [--pairs FILE] [--judge rule:house-style] [--seeds 1]

Both files are served by llama.cpp in this process (`pip install xllamacpp`), one after the other; each prompt of the
pairs, by default the bundled held-out ones of the house style, is answered once per seed by each through its chat
endpoint, sampled at temperature 1, top-k 50, top-p 0.9, without any penalty. The judge, which reads no label, compares
the two replies of a prompt; the interval is over prompts. Prints a table and a few replies; the last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from coala.data import read_pairs
from coala.evaluation.judges.named import local_judge
from coala.statistics.intervals import paired_difference, share_estimate
from coala.values import Turn, conversation_text

ASSETS = Path(__file__).resolve().parent.parent / "src" / "coala" / "assets"
SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "min_p": 0.0, "repeat_penalty": 1.0}
SHOWN = 3


def replies(
    file: Path, prompts: list[tuple[Turn, ...]], tokens: int, seeds: int, threads: int
) -> tuple[list[str], list[float]]:
    """A reply to each prompt for each seed, prompt by prompt, and the milliseconds of each request a token."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel, settings.verbosity = 2048, 1, -1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(settings)
    texts, took = [], []
    for prompt in prompts:
        for seed in range(seeds):
            messages = [{"role": turn.role, "content": turn.text} for turn in prompt]
            asked = {"messages": messages, "max_tokens": tokens, "seed": seed, **SAMPLING}
            request = urllib.request.Request(
                f"{server.listening_address}/v1/chat/completions",
                json.dumps(asked).encode(),
                {"content-type": "application/json"},
            )
            start = time.perf_counter()
            with urllib.request.urlopen(request) as answer:
                found = json.load(answer)
            texts.append(found["choices"][0]["message"]["content"].strip())
            took.append(1000 * (time.perf_counter() - start) / max(1, found["usage"]["completion_tokens"]))
    return texts, took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("changed", type=Path)
    parser.add_argument("--pairs", default=str(ASSETS / "chat" / "pairs_test.jsonl.gz"), help="whose prompts are asked")
    parser.add_argument("--judge", default="rule:house-style", help="rule:NAME or a word-judge file")
    parser.add_argument("--prompts", type=int, default=None, help="of them, the first so many")
    parser.add_argument("--tokens", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=1)
    # Its threads wait for each other by spinning: where other work shares the cores, more than one is far slower.
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if importlib.util.find_spec("xllamacpp") is None:
        print(json.dumps({"skipped": "xllamacpp is not installed (pip install xllamacpp)"}))
        return
    prompts = list({conversation_text(pair.prompt): pair.prompt for pair in read_pairs(args.pairs)}.values())
    prompts = prompts[: args.prompts]
    judge = local_judge(args.judge).scorer()
    sides = {
        name: replies(getattr(args, name), prompts, args.tokens, args.seeds, args.threads)
        for name in ("base", "changed")
    }
    group = [str(number) for number in range(len(prompts)) for _ in range(args.seeds)]
    scores = {name: np.array([judge.score(text) for text in texts]) for name, (texts, _) in sides.items()}
    ahead = scores["changed"] - scores["base"]
    wins = share_estimate((ahead > 0) + 0.5 * (ahead == 0), group, "share of replies that win, a tie one half")
    gain = paired_difference(scores["changed"], scores["base"], group)
    speed = {name: float(np.median(took)) for name, (_, took) in sides.items()}
    for prompt, base, changed in list(
        zip(prompts, *(texts[:: args.seeds] for texts, _ in sides.values()), strict=True)
    )[:SHOWN]:
        print(f"prompt   {prompt[-1].text}\nbase     {base}\nchanged  {changed}\n")
    print(f"{judge.name}, {len(prompts)} prompts x {args.seeds}, llama.cpp, at most {args.tokens} tokens")
    print(f"wins of {args.changed.name}: {100 * wins.value:.1f} % [{100 * wins.low:.1f}, {100 * wins.high:.1f}]")
    print(f"score: base {scores['base'].mean():.3g}, changed {scores['changed'].mean():.3g}, ", end="")
    print(f"difference {gain.value:+.3g} [{gain.low:+.3g}, {gain.high:+.3g}]")
    print(f"milliseconds a token, median of requests: base {speed['base']:.1f}, changed {speed['changed']:.1f}")
    told: dict[str, Any] = {
        "wins": vars(wins),
        "gain": vars(gain),
        "milliseconds": speed,
        "ties": int((ahead == 0).sum()),
    }
    print(json.dumps({"judge": judge.name, "prompts": len(prompts), "seeds": args.seeds, **told}))


if __name__ == "__main__":
    main()
