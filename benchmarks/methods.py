"""Which head to fit: every method on real preference pairs and on constructed preferences, over seeds.

    python benchmarks/methods.py --part real --features runs/ranking --out runs/methods
    python benchmarks/methods.py --part constructed --out runs/methods

``real`` needs the features that `benchmarks/ranking.py` leaves behind, one folder SET-MODEL/features/{train,eval} for
every cell. Seed 0 is the published split; the others deal whole groups anew in the same proportion, for a fit and for a
test set of their own. ``constructed`` draws Gaussian features and preferences whose truth is known. Finished fits are
kept in --out and not repeated. Prints tables in Markdown; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import torch
from scipy.stats import t as student

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from coala.convex import Pointwise, fit  # noqa: E402
from coala.convex.calibration import fit_temperature  # noqa: E402
from coala.convex.validation import grouped_folds  # noqa: E402
from coala.store import load_features, write_atomic  # noqa: E402
from coala.values import FeatureSet, FeatureSpec  # noqa: E402

SETS = ("hh_rlhf_harmless", "mrbench", "alpaca_eval_pairs", "ultrafeedback_sample")
MODELS = ("stories260K-hf", "craftgpt-5m-hf", "film-lm")
SEEDS = 5
Margins = tuple[np.ndarray, float, int]


# --- methods: features to fit and test on, a seed -> test margins, temperature, neurons ------------------------------


def convex(**options: Any) -> Callable[[FeatureSet, FeatureSet, int], Margins]:
    def run(train: FeatureSet, test: FeatureSet, seed: int) -> Margins:
        head = fit(train, seed=seed, **options).head
        return head.margins(test).astype(float), head.temperature, head.n_neurons

    return run


def mlp(train: FeatureSet, test: FeatureSet, seed: int, *, width: int = 64, epochs: int = 100) -> Margins:
    """A two-layer ReLU network on the pairwise loss by AdamW, stopped early on a held-out fold; the best of three
    weight decays by that fold's loss.
    """
    torch.set_num_threads(1)
    rows = np.concatenate([train.chosen, train.rejected])
    if train.prompt is not None and test.prompt is not None:
        chosen, rejected, tested_c, tested_r = (
            np.concatenate([side, prompt], axis=1)
            for side, prompt in (
                (train.chosen, train.prompt),
                (train.rejected, train.prompt),
                (test.chosen, test.prompt),
                (test.rejected, test.prompt),
            )
        )
        rows = np.concatenate([chosen, rejected])
    else:
        chosen, rejected, tested_c, tested_r = train.chosen, train.rejected, test.chosen, test.rejected
    center, spread = rows.mean(axis=0), rows.std(axis=0) + 1e-8
    c, r, tc, tr = (
        torch.tensor((a - center) / spread, dtype=torch.float32) for a in (chosen, rejected, tested_c, tested_r)
    )
    fold = grouped_folds(train.group, 5, seed)
    held = torch.tensor(fold == 0 if fold is not None else np.arange(len(c)) % 5 == 0)
    inside, outside = torch.nonzero(~held).squeeze(1), torch.nonzero(held).squeeze(1)
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for decay in (0.01, 0.1, 1.0):
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        network = torch.nn.Sequential(torch.nn.Linear(c.shape[1], width), torch.nn.ReLU(), torch.nn.Linear(width, 1))
        optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=decay)
        patience, lowest = 0, np.inf
        for _ in range(epochs):
            for batch in inside[torch.randperm(len(inside), generator=generator)].split(128):
                loss = torch.nn.functional.softplus(network(r[batch]) - network(c[batch])).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            with torch.no_grad():
                margins = (network(c[outside]) - network(r[outside])).squeeze(1).numpy()
                value = float(np.logaddexp(0, -margins).mean())
                if value < lowest:
                    lowest, patience = value, 0
                    if best is None or value < best[0]:
                        best = value, (network(tc) - network(tr)).squeeze(1).numpy().astype(float), margins
                else:
                    patience += 1
            if patience == 15:
                break
    assert best is not None
    return best[1], fit_temperature(best[2]), width


METHODS: dict[str, Callable[[FeatureSet, FeatureSet, int], Margins]] = {
    "linear": convex(method="linear"),
    "mlp": mlp,
    "two-phase (Eq. 9)": convex(method="two-phase", loss=Pointwise()),
    "two-phase, pairwise": convex(method="two-phase"),
    "direct": convex(method="direct", gate_on="reply"),
    "learnt": convex(method="learnt", gate_on="reply"),
}


# --- real pairs ------------------------------------------------------------------------------------------------------


def cell(folder: Path, name: str, model: str) -> tuple[FeatureSet, int]:
    """All pairs of a cell, the published training pairs first, and how many those are."""
    train, test = (load_features(folder / f"{name}-{model}" / "features" / part) for part in ("train", "eval"))
    both = FeatureSet(
        np.concatenate([train.chosen, test.chosen]),
        np.concatenate([train.rejected, test.rejected]),
        np.concatenate([train.group, test.group]),
        train.spec,
    )
    return both, len(train)


def deal(features: FeatureSet, n_train: int, seed: int) -> tuple[FeatureSet, FeatureSet]:
    """The published split for seed 0, else whole groups dealt anew until the test side has as many pairs."""
    if seed == 0:
        return features.take(np.arange(n_train)), features.take(np.arange(n_train, len(features)))
    names, sizes = np.unique(features.group, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    out = order[np.cumsum(sizes[order]) - sizes[order] < len(features) - n_train]
    tested = np.isin(features.group, names[out])
    return features.take(~tested), features.take(tested)


# --- constructed preferences -----------------------------------------------------------------------------------------

Reward = Callable[[np.ndarray, np.ndarray], np.ndarray]
SPEC = FeatureSpec("constructed", "", "", "", 0, "", False, 0)


def rewards(d: int, rng: np.random.Generator) -> dict[str, Reward]:
    """Rewards of a reply x and its prompt p, all invisible or half visible to a linear head, and a linear one."""
    a, b, c = (v / np.linalg.norm(v) for v in rng.standard_normal((3, d)))
    return {
        "linear": lambda x, p: 3 * x @ a,
        "either attribute, not both (XOR)": lambda x, p: -4 * (x @ a) * (x @ b),
        "more is better, up to a point": lambda x, p: 6 * np.minimum(x @ a, 0) - 1.5 * np.maximum(x @ a, 0) + x @ b,
        "far from the middle": lambda x, p: 4 * np.abs(x @ a) + 2 * x @ b,
        "the prompt decides": lambda x, p: 4 * np.sign(p @ c) * (x @ a),
    }


REWARDS = tuple(rewards(4, np.random.default_rng(0)))


def constructed(name: str, n: int, seed: int, d: int = 32, n_test: int = 6000) -> tuple[FeatureSet, FeatureSet, float]:
    """Training pairs, test pairs, and the share of test pairs that the truth itself ranks right."""
    rng = np.random.default_rng(seed)
    reward = rewards(d, rng)[name]
    sets, right = [], 0.0
    for size in (n, n_test):
        first, second, prompt = rng.standard_normal((3, size, d))
        difference = reward(first, prompt) - reward(second, prompt)
        better = rng.random(size) < 1 / (1 + np.exp(-difference))
        sides = (np.where(better[:, None], *pair) for pair in ((first, second), (second, first)))
        group = np.arange(size).astype(str)
        sets.append(FeatureSet(*sides, group, SPEC, prompt=prompt))
        right = float(((difference > 0) == better).mean())
    return sets[0], sets[1], right


# --- measures --------------------------------------------------------------------------------------------------------


def calibration_error(probability: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error of preferences folded to [0.5, 1], in bins of equal size."""
    wins, sure = probability >= 0.5, np.maximum(probability, 1 - probability)
    parts = np.array_split(np.argsort(sure), bins)
    return float(sum(len(part) * abs(wins[part].mean() - sure[part].mean()) for part in parts) / len(sure))


def measure(run: Callable[[], Margins]) -> dict[str, float]:
    begun = time.perf_counter()
    margins, temperature, neurons = run()
    seconds = time.perf_counter() - begun
    probability = 1 / (1 + np.exp(-np.clip(margins / temperature, -60, 60)))
    return {
        "accuracy": float((margins > 0).mean() + (margins == 0).mean() / 2),
        "nll": float(np.logaddexp(0, -margins / temperature).mean()),
        "ece": calibration_error(probability),
        "neurons": neurons,
        "seconds": seconds,
    }


def kept(path: Path, run: Callable[[], Margins]) -> dict[str, float]:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(measure(run)))
    found: dict[str, float] = json.loads(path.read_text())
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % t-interval."""
    n = len(values)
    half = student.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n) if n > 1 else np.nan
    return float(np.mean(values)), float(half)


def shown(values: list[float], digits: int = 3) -> str:
    mean, half = interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


# --- parts -----------------------------------------------------------------------------------------------------------


def real(args: argparse.Namespace) -> dict[str, Any]:
    cells: dict[str, dict[str, list[dict[str, float]]]] = {}
    for model in args.models:
        for name in SETS:
            features, n_train = cell(args.features, name, model)
            for seed in range(args.seeds):
                train, test = deal(features, n_train, seed)
                for method in args.methods:
                    path = args.out / "real" / f"{name}-{model}-{method}-{seed}.json"
                    found = kept(path, lambda m=method, a=train, b=test, s=seed: METHODS[m](a, b, s))
                    cells.setdefault(f"{name}, {model}", {}).setdefault(method, []).append(found)
                print(
                    f"{name} {model} seed {seed}",
                    {m: round(v[-1]["accuracy"], 3) for m, v in cells[f"{name}, {model}"].items()},
                    file=sys.stderr,
                    flush=True,
                )
    for key, digits in (("accuracy", 3), ("nll", 3), ("ece", 3)):
        print(f"\n{key}, mean ± 95 % t-interval over {args.seeds} seeds\n")
        print("| data, features | " + " | ".join(args.methods) + " |\n|" + "---|" * (len(args.methods) + 1))
        for name, by_method in cells.items():
            row = (shown([entry[key] for entry in by_method[m]], digits) for m in args.methods)
            print(f"| {name} | " + " | ".join(row) + " |")
    print("\ndifference to the linear head, paired by seed, in points of accuracy and in NLL\n")
    print("| data, features | " + " | ".join(args.methods[1:]) + " |\n|" + "---|" * len(args.methods))
    differences: dict[str, dict[str, list[float]]] = {}
    for name, by_method in cells.items():
        texts = []
        for m in args.methods[1:]:
            points, nll = (
                [scale * (x[key] - y[key]) for x, y in zip(by_method[m], by_method["linear"], strict=True)]
                for key, scale in (("accuracy", 100), ("nll", 1))
            )
            differences.setdefault(m, {})[name] = points
            texts.append(f"{shown(points, 1)}; {shown(nll)}")
        print(f"| {name} | " + " | ".join(texts) + " |")
    by_set = {
        m: {
            s: interval([float(np.mean(x)) for x in zip(*(v for k, v in d.items() if k.startswith(s)), strict=True)])
            for s in SETS
        }
        for m, d in differences.items()
    }
    print("\n| points against linear, models together | " + " | ".join(SETS) + " |\n|" + "---|" * (len(SETS) + 1))
    for m, sets in by_set.items():
        print(f"| {m} | " + " | ".join(f"{mean:+.2f} ± {half:.2f}" for mean, half in sets.values()) + " |")
    return {
        "seeds": args.seeds,
        "by_set": by_set,
        "cells": {k: {m: [e["accuracy"] for e in v] for m, v in d.items()} for k, d in cells.items()},
    }


def constructed_part(args: argparse.Namespace) -> dict[str, Any]:
    names = [name for name in REWARDS if not args.rewards or any(part in name for part in args.rewards)]
    sizes = {250: 5, 500: 5, 1000: 5, 2000: 5, 20000: 2}  # pairs, and seeds at most
    methods = {"linear": METHODS["linear"], "learnt": convex(method="learnt"), "mlp": mlp}
    out: dict[str, Any] = {}
    for name in names:
        print(
            f"\n{name}: accuracy on 6,000 new pairs, mean ± 95 % t-interval over {args.seeds} seeds, "
            "2 at 20,000 pairs (d = 32)\n"
        )
        print(
            "| pairs | truth | "
            + " | ".join(methods)
            + " | learnt - linear, points | neurons |\n|---|---|"
            + "---|" * (len(methods) + 2)
        )
        for n, most in sizes.items():
            if n > args.most:
                continue
            seeds = min(args.seeds, most)
            rows: dict[str, list[dict[str, float]]] = {m: [] for m in methods}
            truths = []
            for seed in range(seeds):
                train, test, right = constructed(name, n, seed)
                truths.append(right)
                for m, method in methods.items():
                    path = args.out / "constructed" / f"{name.split(',')[0]}-{n}-{m}-{seed}.json"
                    rows[m].append(kept(path, lambda f=method, a=train, b=test, s=seed: f(a, b, s)))
            gain = [100 * (x["accuracy"] - y["accuracy"]) for x, y in zip(rows["learnt"], rows["linear"], strict=True)]
            cells = " | ".join(shown([e["accuracy"] for e in rows[m]]) for m in methods)
            neurons = "/".join(str(int(e["neurons"])) for e in rows["learnt"])
            print(f"| {n} | {np.mean(truths):.3f} | {cells} | {shown(gain, 1)} | {neurons} |", flush=True)
            out.setdefault(name, {})[n] = {
                "gain": interval(gain),
                **{m: [e["accuracy"] for e in v] for m, v in rows.items()},
            }
    return {"seeds": args.seeds, "constructed": out}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("real", "constructed"), default="real")
    parser.add_argument("--features", type=Path, default=ROOT / "runs" / "ranking")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "methods")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rewards", nargs="+", help="of the constructed part, those whose name has one of these words")
    parser.add_argument("--most", type=int, default=20000, help="of the constructed part, pairs at most")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    args = parser.parse_args()
    if args.part == "real" and not (args.features / f"{SETS[0]}-{MODELS[0]}").exists():
        print(f"{args.features} holds no features: run benchmarks/ranking.py first")
        print(json.dumps({"skipped": f"no features in {args.features}"}))
        return
    print(json.dumps(real(args) if args.part == "real" else constructed_part(args)))


if __name__ == "__main__":
    main()
