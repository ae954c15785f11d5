"""Feature extraction beside the two passes one would write or run instead, on real pairs.

    python benchmarks/features.py [--data ../shared/data] [--pairs 200] [--repeats 2]

- naive: a Hugging Face loop over the pairs, both replies in full, padded to the longest of the batch, with
  ``output_hidden_states=True``, pooled over the reply: the same features;
- trl: what ``DPOTrainer(precompute_ref_log_probs=True)`` does before it trains (needs the extra ``baselines``);
- ours: :func:`coala.features.extract`.

Every method runs in a process of its own, one after the other, ``--repeats`` times round; the fastest round counts,
model loading and tokenisation excluded. FLOPs are counted from the shapes of the forward passes as they happen, padding
included; the bound computes what the rows have in common once, without padding. The GPT-2 shape has random weights.
Prints a table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parent.parent
SETS = {
    "alpaca_eval_pairs": ("alpaca_eval_pairs/train.jsonl.gz", "auto"),
    "hh_rlhf_harmless": ("hh_rlhf_harmless/train.jsonl.gz", "auto"),
    "mathdial": ("mathdial/dialogues.jsonl.gz", "conversations"),
}
MODELS = ("stories260K-hf", "craftgpt-5m-hf", "gpt2-small, random weights")
METHODS = ("naive", "trl", "ours")
BATCH = 8  # pairs a batch of the naive loop and of TRL, TRL's default


def some_pairs(data: Path, name: str, n: int, backbone: Any) -> list[Any]:
    """The first pairs that are sound and fit the model's context whole: TRL leaves out what it has to cut."""
    from coala.data import check

    source, format = SETS[name]
    fitting = (p for p in check([str(data / source)], format).pairs if backbone.count_tokens(p) <= backbone.max_tokens)
    return list(islice(fitting, n))


def load(model: str, data: Path) -> Any:
    """The backbone and its folder."""
    from coala.backbone import load_backbone

    if not model.startswith("gpt2"):
        return load_backbone(data / "models" / model, device="cpu"), data / "models" / model
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = Path(tempfile.gettempdir()) / "coala-benchmark-gpt2"
    if not (folder / "model.safetensors").exists():
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
        AutoTokenizer.from_pretrained(data / "models" / "gpt2-tokenizer").save_pretrained(folder)
    return load_backbone(folder, device="cpu"), folder


@contextmanager
def counted(model: Any, shape: Any) -> Iterator[list[int]]:
    """FLOPs of every forward of ``model``'s layers while it lasts, from the shapes of what they read."""
    from coala.backbone.network import Network
    from coala.costs import body_flops

    found: list[int] = []
    run = Network.run

    def wrapped(self: Any, tokens: Any, layers: Any, **options: Any) -> Any:
        rows, width = tokens.shape
        cache = options.get("cache")
        before = 0 if cache is None else int(cache.layers[0].get_seq_length())
        layer = None if options.get("to_end") else max(layers)
        found.append(rows * body_flops(shape, [before + width], own=[width], layer=layer))
        return run(self, tokens, layers, **options)

    Network.run = wrapped  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Network.run = run  # type: ignore[method-assign]


def naive(pairs: list[Any], backbone: Any, spec: Any) -> tuple[float, int, Any]:
    """Seconds, FLOPs and features (2 n, d), chosen and rejected in turn."""
    import numpy as np
    import torch

    from coala.costs import full_flops

    model = backbone._network.causal
    rows = [backbone.render(p.prompt, r, max_tokens=spec.max_tokens) for p in pairs for r in (p.chosen, p.rejected)]
    flops, out = 0, []
    begun = time.perf_counter()
    with torch.no_grad():
        for first in range(0, len(rows), 2 * BATCH):
            batch = rows[first : first + 2 * BATCH]
            longest = max(len(row.tokens) for row in batch)
            tokens = torch.tensor([[*row.tokens, *[0] * (longest - len(row.tokens))] for row in batch])
            mask = torch.tensor([[1] * len(row.tokens) + [0] * (longest - len(row.tokens)) for row in batch])
            states = model(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states[spec.layer]
            for row, hidden in zip(batch, states, strict=True):
                # A reply without tokens is read from the last of the prompt.
                start = min(row.start, row.stop - 1)
                out.append(hidden[start : row.stop].float().mean(0).numpy())
            flops += len(batch) * full_flops(backbone.shape, [longest])
    return time.perf_counter() - begun, flops, np.array(out)


def trl(pairs: list[Any], folder: Path, spec: Any, shape: Any) -> tuple[float, int, Any]:
    """Seconds and FLOPs of the reference pass alone."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from coala.costs import full_flops
    from coala.values import conversation_text

    found = {"seconds": 0.0, "flops": 0}

    class Timed(DPOTrainer):  # type: ignore[misc]
        def _precompute_ref_logps(self, *args: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            done = super()._precompute_ref_logps(*args, **options)
            found["seconds"] += time.perf_counter() - begun
            return done

        def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
            rows, width = inputs["input_ids"].shape
            found["flops"] += rows * full_flops(shape, [width])
            return super().compute_ref_log_probs(model, inputs)

    table = Dataset.from_list(
        [
            {
                "prompt": conversation_text(p.prompt) + "\n\nAssistant:",
                "chosen": f" {p.chosen}",
                "rejected": f" {p.rejected}",
            }
            for p in pairs
        ]
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    with tempfile.TemporaryDirectory() as out:
        Timed(
            model=AutoModelForCausalLM.from_pretrained(folder),
            args=DPOConfig(
                output_dir=out,
                precompute_ref_log_probs=True,
                per_device_train_batch_size=BATCH,
                max_length=spec.max_tokens,
                report_to=[],
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
            ),
            train_dataset=table,
            processing_class=tokenizer,
        )
    return found["seconds"], int(found["flops"]), None


def one(method: str, name: str, model: str, n: int, data: Path, out: Path | None) -> dict[str, Any]:
    """What one method takes on one data set and model, in this process."""
    import numpy as np

    from coala.costs import body_flops, peak_memory
    from coala.features import distinct_lengths, extract, survey

    backbone, folder = load(model, data)
    pairs, spec = some_pairs(data, name, n, backbone), backbone.spec()
    plan = survey(pairs, backbone, spec)
    before = peak_memory().get("host", 0)
    if method == "ours":
        with counted(backbone, backbone.shape) as flops:
            begun = time.perf_counter()
            found = extract(pairs, backbone, spec, plan=plan)
            seconds = time.perf_counter() - begun
        total, features = sum(flops), np.stack([found.chosen, found.rejected], axis=1).reshape(2 * len(pairs), -1)
    elif method == "naive":
        seconds, total, features = naive(pairs, backbone, spec)
    else:
        seconds, total, features = trl(pairs, folder, spec, backbone.shape)
    if out is not None and features is not None:
        np.save(out, features)
    lengths, own = distinct_lengths(plan.tokens)
    return {
        "data": name,
        "model": model,
        "method": method,
        "pairs": len(pairs),
        "seconds": seconds,
        "flops": int(total),
        "bound": int(body_flops(backbone.shape, lengths, own=own, layer=spec.layer)),
        "reply_tokens": plan.facts["reply_tokens"],
        "distinct_tokens": plan.facts["distinct_tokens"],
        "tokens": plan.facts["tokens"],
        "peak_bytes": peak_memory().get("host", 0),
        "peak_above_start": peak_memory().get("host", 0) - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--pairs", type=int, default=200, help="pairs of a set; a quarter for the GPT-2 shape")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--one", nargs=3, metavar=("METHOD", "SET", "MODEL"), help="one method, in this process")
    parser.add_argument("--save", type=Path, help="with --one: where to write the features")
    args = parser.parse_args()
    if not args.data.exists():
        print(f"{args.data} is not there: nothing to measure")
        print(json.dumps({"skipped": f"{args.data} is not there"}))
        return
    if args.one:
        print(json.dumps(one(*args.one, args.pairs, args.data, args.save)))
        return
    import numpy as np

    results = []
    print(
        f"{'data':<19}{'model':<27}{'method':<7}{'seconds':>8}{'x ours':>7}{'FLOPs/bound':>12}{'peak MB':>9}  features"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in args.sets:
            for model in args.models:
                n = args.pairs // 4 if model.startswith("gpt2") else args.pairs
                best: dict[str, dict[str, Any]] = {}
                for _ in range(args.repeats):
                    for method in METHODS:
                        command = [sys.executable, __file__, "--data", str(args.data), "--pairs", str(n)]
                        command += ["--one", method, name, model, "--save", f"{folder}/{method}.npy"]
                        done = subprocess.run(command, capture_output=True, text=True, check=False)
                        if done.returncode:
                            print(f"{name} {model} {method}: {done.stderr.strip().splitlines()[-1]}")
                            continue
                        row = json.loads(done.stdout.splitlines()[-1])
                        if method not in best or row["seconds"] < best[method]["seconds"]:
                            best[method] = row
                ours, theirs = np.load(f"{folder}/ours.npy"), np.load(f"{folder}/naive.npy")
                apart = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
                for method, row in best.items():
                    row["against_ours"] = row["seconds"] / best["ours"]["seconds"]
                    row["features_apart"] = apart
                    note = f"{apart:.0e} apart" if method == "ours" else ""
                    print(
                        f"{name:<19}{model:<27}{method:<7}{row['seconds']:>8.2f}{row['against_ours']:>7.2f}"
                        f"{row['flops'] / row['bound']:>12.3f}{row['peak_bytes'] / 1e6:>9.0f}  {note}",
                        flush=True,
                    )
                    results.append(row)
    print(json.dumps({"benchmark": "features", "rows": results}))


if __name__ == "__main__":
    main()
