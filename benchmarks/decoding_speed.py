"""What a token costs beside the products of weights that it cannot do without, and what 8 bits make of it.

    python benchmarks/decoding_speed.py --model FOLDER [--head RUN/head] [--threads 1]

On a CPU. In every round all ways take turns and each is divided by the first of its group in the same round, so that
what else the machine does weighs on both alike; ratios are geometric means of rounds with t intervals of 95 %.
Seconds are of processor time, from the first token on: the prompt is read before. The floor is every product of
weights of one step, the head's among them, and nothing else. "In torch's order" is the same model without oneDNN's
layout of its weights, which transformers' `generate` has too. Guided blocks are 5 candidates of 5 tokens, plain rows
as many, all behind the same prompt; without ``--head`` the head is random, which costs as much. Distilled is the mode
of that name, its change of the output layer random, of rank 8 and of full rank. Of a GGUF model the one of full rank
is also exported and decoded by llama.cpp (`pip install xllamacpp`), in this process and so by the same clock, the
HTTP request included. Errors of 8 bits are those of next-token log-probabilities over replies that the whole weights
wrote, groups being replies. Prints tables; the last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from coala.backbone import LanguageModel, blocked, load_backbone
from coala.backbone.blocked import BlockedLinear
from coala.backbone.gguf import is_gguf
from coala.backbone.packed import PackedLinear
from coala.decoding import Engine, Guidance, Request, generate
from coala.export.policy_gguf import export_gguf
from coala.policies import DistilledPolicy
from coala.statistics.intervals import bounded_mean, mean_estimate
from coala.store import load_head
from coala.values import ConvexHead, user

PROMPTS = (
    "Tell me a long story about the sea.",
    "How do I bake bread? Explain every step.",
    "Why is the sky blue in the day and red in the evening?",
    "Describe a walk through an old town in winter.",
    "What should I know before I buy a bicycle?",
    "Explain how a bill becomes a law.",
)
ROWS = 5
# Names under which the profiler counts products of weights, and attention.
PRODUCTS = (
    "mkldnn::_linear_pointwise",
    "aten::mm",
    "aten::addmm",
    "quantized::linear_with_input_q_dq_qweight_dq_output_fp32",
)
ATTENTION = ("scaled_dot_product", "aten::bmm")


def floor(backbone: LanguageModel, rows: int) -> Callable[[], None]:
    """The products of one step of so many rows."""
    model = backbone.transformer
    pairs = [
        (module, torch.randn(rows, module.in_features)) for module in model.modules() if isinstance(module, nn.Linear)
    ]

    @torch.no_grad()
    def run() -> None:
        for module, x in pairs:
            module(x)

    return run


def ratio(found: list[float], base: list[float]) -> str:
    estimate = mean_estimate(np.log(np.array(found) / np.array(base)))
    return f"{math.exp(estimate.value):.2f} [{math.exp(estimate.low):.2f}, {math.exp(estimate.high):.2f}]"


def attribution(decode: Callable[[], float]) -> dict[str, float]:
    """Shares of decoding by what they go to; what no kernel of torch accounts for is Python's, the profiler's too."""
    with profile(activities=[ProfilerActivity.CPU]) as made:
        began = time.perf_counter()
        decode()
        span = time.perf_counter() - began
    found = {"products of weights": 0.0, "attention": 0.0, "other kernels": 0.0}
    for event in made.key_averages():
        kind = (
            "products of weights"
            if event.key in PRODUCTS
            else "attention"
            if any(name in event.key for name in ATTENTION)
            else "other kernels"
        )
        found[kind] += event.self_cpu_time_total / 1e6 / span
    found["Python"] = 1 - sum(found.values())
    return found


def by_llama(file: Path, prompt: list[int], threads: int, tokens: int) -> Callable[[int], float]:
    """llama.cpp on ``file``: processor seconds a token of one reply, its prompt read before."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel, settings.verbosity = 1024, 1, -1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(settings)

    def ask(seed: int, many: int) -> int:
        body = {"prompt": prompt, "n_predict": many, "seed": seed, "ignore_eos": True, "cache_prompt": True}
        body |= {"temperature": 1, "top_k": 50, "top_p": 0.9, "min_p": 0}
        request = urllib.request.Request(
            f"{server.listening_address}/completion", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            found: dict[str, Any] = json.load(answer)
            return int(found["tokens_predicted"])

    def run(seed: int) -> float:
        ask(seed, 1)  # reads the prompt
        began = time.process_time()
        predicted = ask(seed, tokens)
        return (time.process_time() - began) / predicted

    return run


def weight_bytes(backbone: LanguageModel) -> int:
    model = backbone.transformer
    size = {PackedLinear: 1, BlockedLinear: 4}
    packed = sum(size.get(type(m), 0) * m.in_features * m.out_features for m in model.modules() if type(m) in size)
    return packed + sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())


def error(whole: LanguageModel, small: LanguageModel, tokens: int) -> dict[str, Any]:
    """What the small weights make of the whole ones' next-token log-probabilities, over replies of the whole ones."""
    distances, agree, divergence, group = [], [], [], []
    for index, prompt in enumerate(PROMPTS):
        (reply,) = generate([user(prompt)], whole, None, Guidance("none"), max_new_tokens=tokens, seed=index)
        row = whole.render(user(prompt), reply.text)
        found = []
        for model in (whole, small):
            reading = model.read([row.tokens], (-1,), to_end=True)
            assert reading.final is not None
            found.append(model._network.log_probs(reading.final[0, row.start - 1 : row.stop - 1]))
        there = torch.tensor(row.tokens[row.start : row.stop])[:, None]
        distances += (found[1] - found[0]).gather(1, there).abs()[:, 0].tolist()
        agree += (found[0].argmax(1) == found[1].argmax(1)).double().tolist()
        divergence += (found[0].exp() * (found[0] - found[1])).sum(1).tolist()
        group += [index] * len(there)
    groups = np.array(group)
    estimates = {
        "mean |difference of log-probability|, nats": mean_estimate(distances, groups),
        "KL(whole || 8 bits), nats": mean_estimate(divergence, groups),
        "likeliest token the same": bounded_mean(agree, groups),
    }
    return {"n": len(group)} | {
        name: f"{one.value:.4f} [{one.low:.4f}, {one.high:.4f}]" for name, one in estimates.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--head", type=Path, help="the folder of a fitted head")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    whole, small = (load_backbone(args.model, device="cpu", quantise=how) for how in (None, "8bit"))
    blocked.FEWEST = 1 << 62
    usual = load_backbone(args.model, device="cpu")
    d = whole.width
    fitted = load_head(args.head) if args.head else None
    linear = np.random.default_rng(0).normal(size=d + 1).astype(np.float32)
    none = np.zeros((0, d + 1), np.float32)
    head = fitted or ConvexHead(none, none, linear, whole.spec(-1, "mean"))

    factors = (1e-3 * np.random.default_rng(1).normal(size=(d, d))).astype(np.float32)
    about: Any = (whole.spec(), "guided", "nucleus", 1.0)
    policies = {
        "rank 8": DistilledPolicy(factors[:, :8].copy(), factors[:8].copy(), *about),
        "full rank": DistilledPolicy(factors, None, *about),
    }
    changed = {name: whole.with_policy(policy) for name, policy in policies.items()}

    def decode(
        backbone: LanguageModel,
        rows: int,
        seed: int,
        *,
        guided: bool = False,
        mode: Literal["none", "distilled"] = "none",
    ) -> float:
        # The head of whole weights would be refused on others; its work is what is timed.
        spec = backbone.spec(head.spec.layer, head.spec.pooling, head.spec.ends_with_eos, head.spec.max_tokens)
        rule = Guidance("block", rule="min-max", candidates=ROWS) if guided else Guidance(mode)
        engine = Engine(backbone, replace(head, spec=spec) if guided else None)
        jobs = [
            engine.submit(Request(user(PROMPTS[0]), rule, args.tokens, seed, prompt_id=str(row)))
            for row in range(1 if guided else rows)
        ]
        engine.step()  # reads the prompt
        began = time.process_time()
        while engine.running:
            engine.step()
        forwards = max(len(job.tokens) + (job.finish == "stop") for job in jobs) - 1
        return (time.process_time() - began) / max(forwards, 1)

    def theirs(rows: int, seed: int) -> float:
        torch.manual_seed(seed)
        row = torch.tensor([whole.render(user(PROMPTS[0])).tokens] * rows)
        options: dict[str, Any] = {"do_sample": True, "top_k": 50, "top_p": 0.9, "max_new_tokens": args.tokens}
        moments: list[float] = []

        def watch(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            moments.append(time.process_time())
            return scores

        with torch.no_grad():
            usual.transformer.generate(
                row, attention_mask=torch.ones_like(row), pad_token_id=0, logits_processor=[watch], **options
            )
        return (time.process_time() - moments[0]) / len(moments)

    def bare(run: Callable[[], None], _: int) -> float:
        began = time.process_time()
        run()
        return time.process_time() - began

    ways: dict[str, Callable[[int], float]] = {}
    for rows in (1, ROWS):
        some = f"{rows} row{'s' if rows > 1 else ''}"
        ways[f"plain, {some}"] = partial(decode, whole, rows)
        ways[f"plain, in torch's order, {some}"] = partial(decode, usual, rows)
        ways[f"transformers' generate, {some}"] = partial(theirs, rows)
        ways[f"products of weights alone, {some}"] = partial(bare, floor(whole, rows))
        ways[f"plain, 8 bits, {some}"] = partial(decode, small, rows)
        for name, model in changed.items():
            ways[f"distilled, {name}, {some}"] = partial(decode, model, rows, mode="distilled")
    ways[f"guided blocks, {ROWS} rows"] = partial(decode, whole, ROWS, guided=True)
    ways[f"guided blocks, 8 bits, {ROWS} rows"] = partial(decode, small, ROWS, guided=True)
    folder = tempfile.TemporaryDirectory()  # of exported files, while llama.cpp has them mapped
    if is_gguf(Path(args.model)) and importlib.util.find_spec("xllamacpp"):
        prompt = whole.render(user(PROMPTS[0])).tokens
        for precision in ("f16", "q8_0"):
            made = export_gguf(
                policies["full rank"], whole, Path(folder.name) / f"{precision}.gguf", precision=precision
            )
            ways[f"llama.cpp, exported, {precision}, 1 row"] = by_llama(made.path, prompt, args.threads, args.tokens)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.rounds + 1):
        for name, way in ways.items():
            spent = way(turn)
            if turn:  # the first warms up
                seconds[name].append(spent)
    report: dict[str, Any] = {"model": whole.name, "threads": args.threads, "rounds": args.rounds, "ratios": {}}
    for rows in (1, ROWS):
        base = f"plain, {rows} row{'s' if rows > 1 else ''}"
        for name, found in seconds.items():
            if name.endswith(base.removeprefix("plain")):
                report["ratios"][name] = ratio(found, seconds[base])
                print(f"{name:44} {1e3 * min(found):8.2f} ms a token at least   {report['ratios'][name]} of {base}")
    for name, plain in (("guided blocks", "plain"), ("guided blocks, 8 bits", "plain, 8 bits")):
        found = ratio(seconds[f"{name}, {ROWS} rows"], seconds[f"{plain}, {ROWS} rows"])
        report["ratios"][f"{name} / {plain}, {ROWS} rows"] = found
        print(f"{name} / {plain}, {ROWS} rows: {found}")
    for name in ("plain, 1 row", "plain, 8 bits, 1 row"):
        shares = report[f"shares, {name}"] = attribution(partial(ways[name], 1))
        print(f"{name}: " + ", ".join(f"{part} {share:.0%}" for part, share in shares.items()))
    report["bytes"] = {
        "float32": weight_bytes(whole),
        "in torch's order": weight_bytes(usual),
        "8 bits": weight_bytes(small),
    }
    report["error"] = error(whole, small, args.tokens)
    print(f"bytes of the weights: {report['bytes']}")
    print(f"error of 8 bits: {report['error']}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
