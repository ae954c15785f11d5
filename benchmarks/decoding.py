"""What guidance costs: seconds a token beside plain decoding with a cache, with a copied cache, and without a cache.

    python benchmarks/decoding.py --tokenizer GPT2_TOKENIZER     # GPT-2-small's shape, random weights
    python benchmarks/decoding.py --model FOLDER                 # any model

One thread, random linear head on the final state, the paper's five candidates, batch 1 unless ``--batch``. Seconds are
of processor time, prompt included; all ways to decode take turns, and each keeps the fastest of ``--rounds`` rounds: on
a machine that others use too the minimum is what the work takes. Guided texts must be the same with every memory. The
row of `transformers` samples with its own `generate`. Prints a table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coala.backbone import LanguageModel, load_backbone
from coala.decoding import Guidance, generate
from coala.values import ConvexHead, Generation, user

PROMPT = "Once upon a time there was a little girl who"


class Anew:
    """A prefix without a cache, App. H.3 read literally: every row is encoded from its first token."""

    def __init__(
        self, backbone: LanguageModel, rows: Sequence[Sequence[int]], layer: int, *, scored: bool = False
    ) -> None:
        self.backbone, self.rows, self.layer = backbone, [list(row) for row in rows], layer
        self.prompt_lengths = torch.tensor([len(row) for row in rows])
        self._read()

    def _encode(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        reading = self.backbone.read(rows, (self.layer,), to_end=True)
        assert reading.final is not None
        last = torch.tensor([len(row) - 1 for row in rows])
        at = torch.arange(len(rows))
        return reading.states[0][at, last].float(), reading.final[at, last]

    def _read(self) -> None:
        self._state, self._final = self._encode(self.rows)

    def log_probs(self) -> torch.Tensor:
        return self.backbone._network.log_probs(self._final)

    def state(self) -> torch.Tensor:
        return self._state

    def peek(self, tokens: torch.Tensor) -> torch.Tensor:
        rows = [[*row, token] for row, some in zip(self.rows, tokens.tolist(), strict=True) for token in some]
        return self._encode(rows)[0].reshape(*tokens.shape, -1)

    def push(self, tokens: torch.Tensor) -> None:
        self.rows = [[*row, token] for row, token in zip(self.rows, tokens.tolist(), strict=True)]
        self._read()

    def select(self, rows: Sequence[int]) -> Anew:
        return Anew(self.backbone, [self.rows[row] for row in rows], self.layer)


def products(width: int, columns: int, weights: int = 24) -> dict[str, float]:
    """Milliseconds of products of one row and of ``columns`` rows with d x 4 d weights larger than the cache."""
    some = [torch.randn(4 * width, width) for _ in range(weights)]
    kernels: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"torch": torch.nn.functional.linear}
    if torch.backends.mkldnn.is_available():
        # What torch itself calls once a graph is compiled; there is no public name for it.
        kernels["oneDNN"] = lambda x, w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    found = {}
    for name, kernel in kernels.items():
        for rows in (1, columns):
            x, times = torch.randn(rows, width), []
            for _ in range(8):
                began = time.process_time()
                for weight in some:
                    kernel(x, weight)
                times.append(1e3 * (time.process_time() - began))
            found[f"{name}, {rows}"] = min(times)
    return found


def small_gpt2(tokenizer: Path, folder: Path) -> Path:
    """GPT-2-small with random weights."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="GPT-2's tokenizer, for its shape with random weights")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--strength", type=float, default=2.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.model is None and args.tokenizer is None:
        print("give --model, a folder, or --tokenizer, the folder of GPT-2's tokenizer")
        print(json.dumps({"skipped": "no model"}))
        return
    with tempfile.TemporaryDirectory() as folder:
        source = args.model or small_gpt2(args.tokenizer, Path(folder))
        backbone = load_backbone(source, device="cpu", template="continuation")
    d = backbone.width
    linear = np.random.default_rng(0).normal(size=d + 1)
    head = ConvexHead(np.zeros((0, d + 1)), np.zeros((0, d + 1)), linear, backbone.spec(-1, "mean"))
    prompts = [user(PROMPT)] * args.batch
    start = backbone.start

    def decode(rule: Guidance, seed: int, *, guided: bool = True, **memory: Any) -> list[Generation]:
        backbone.start = memory.get("start", partial(start, **memory))  # type: ignore[method-assign]
        try:
            return generate(
                prompts,
                backbone,
                head if guided else None,
                rule,
                max_new_tokens=args.tokens,
                seed=seed,
                batch_size=args.batch,
            )
        finally:
            del backbone.start

    def transformers(seed: int) -> list[Generation]:
        torch.manual_seed(seed)
        row = torch.tensor([backbone.render(prompt).tokens for prompt in prompts])
        with torch.no_grad():
            out = backbone._network.causal.generate(  # type: ignore[operator]
                row,
                attention_mask=torch.ones_like(row),
                do_sample=True,
                top_k=50,
                top_p=0.9,
                max_new_tokens=args.tokens,
                pad_token_id=0,
            )
        return [Generation("", "", "", out.shape[1] - row.shape[1], seed, 0.0, 0.0)]

    every, fifth = (Guidance(mode, strength=args.strength, rule="min-max") for mode in ("token", "prefix"))
    shift = Guidance("shift", rule="min-max", budget=args.tokens / 4)
    anew = partial(Anew, backbone)
    ways: dict[str, Callable[[int], list[Generation]]] = {
        "plain": lambda seed: decode(Guidance("none"), seed, guided=False),
        "transformers, plain": transformers,
        "every 5 tokens": lambda seed: decode(fifth, seed),
        "every token": lambda seed: decode(every, seed),
        "shift": lambda seed: decode(shift, seed),
        "every 5 tokens, copied cache": lambda seed: decode(fifth, seed, tree="never"),
        "every token, copied cache": lambda seed: decode(every, seed, tree="never"),
        "every 5 tokens, no cache": lambda seed: decode(fifth, seed, start=anew),
        "every token, no cache": lambda seed: decode(every, seed, start=anew),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.rounds + 1):
        seed = turn % 2
        texts = {}
        for name, way in ways.items():
            if "no cache" in name and turn > 2:  # slow, and far from any limit
                continue
            began = time.process_time()
            found = way(seed)
            spent = (time.process_time() - began) / max(g.n_tokens for g in found)
            texts[name] = [g.text for g in found]
            if turn:  # the first warms up
                seconds[name].append(spent)
                ratios[name].append(spent / seconds["plain"][-1])
        for how in ("every 5 tokens", "every token"):
            assert all(texts[name] == texts[how] for name in texts if name.startswith(how)), "memories differ"
    rows = []
    for name, some in seconds.items():
        row = {
            "way": name,
            "n": len(some),
            "ms_per_token": 1e3 * min(some),
            "ratio": min(some) / min(seconds["plain"]),
            "median_ratio": statistics.median(ratios[name]),
        }
        rows.append(row)
        print(
            f"{name:32} {row['ms_per_token']:9.2f} ms a token   {row['ratio']:6.2f} of plain   "
            f"median of {len(some)} rounds {row['median_ratio']:6.2f}"
        )
    kernels = products(d, every.candidates)
    for name, ms in kernels.items():
        print(f"products of {d} x {4 * d} weights, {name} rows: {ms:.1f} ms")
    print(
        json.dumps(
            {"model": backbone.name, "kernels_ms": kernels, "tokens": args.tokens, "batch": args.batch, "rows": rows}
        )
    )


if __name__ == "__main__":
    main()
