"""What receipts are worth: times, agreement with refits, planted faults found, and bounds beside attacks.

    python benchmarks/influence.py --data ../shared/data            # all parts
    python benchmarks/influence.py --part times --pairs 10000 --width 576

``times`` draws features. ``sets`` reads film pairs (bundled) and, where ``--data`` has them, harmless dialogues and
tutors, with small models; linear heads. Prints tables; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np

from coala.backbone import load_backbone
from coala.convex import fit
from coala.convex.forgetting import forget
from coala.convex.held import HeldProgram
from coala.convex.influence import HeldOutEffect, copies, influence
from coala.convex.optimum import Optimum
from coala.convex.poison import Poisoning
from coala.data import check
from coala.features import extract
from coala.statistics.intervals import wilson
from coala.values import Certificate, ConvexHead, FeatureSet, FeatureSpec

ASSETS = Path(__file__).resolve().parent.parent / "src" / "coala" / "assets"
SMALL = "models/stories260K-hf"
ATTACKED = (1, 2, 5, 10, 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--part", choices=("times", "sets"), nargs="+", default=["times", "sets"])
    parser.add_argument("--pairs", type=int, default=10_000, help="of the part times")
    parser.add_argument("--width", type=int, default=576, help="of the part times")
    parser.add_argument("--sets", choices=("film", "harmless", "tutors"), nargs="+", help="of the part sets")
    parser.add_argument("--most", type=int, default=600, help="pairs to fit on, of the part sets")
    parser.add_argument("--refits", type=int, default=300, help="pairs left out one by one, by brute force")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    if "times" in args.part:
        found["times"] = times(args.pairs, args.width)
    if "sets" in args.part:
        found["sets"] = {
            name: one_set(name, *both, args.refits) for name, both in sets(args.data, args.most, args.sets)
        }
    print(json.dumps(found))


# --- times -------------------------------------------------------------------------------------------------------


def times(n: int, d: int, held_out: int = 1000) -> dict[str, Any]:
    """Seconds of the influence of n pairs of width d, and of forgetting one group of four."""
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((d, d)) / np.sqrt(d) * (np.linspace(1, 0.02, d) ** 2)[:, None]
    first, second = (rng.standard_normal((n + held_out, d)) @ mixed for _ in range(2))
    margins = (first - second) @ rng.standard_normal(d)
    better = rng.random(n + held_out) < 1 / (1 + np.exp(-1.5 * margins / margins.std()))
    chosen, rejected = (np.where(b[:, None], first, second) for b in (better, ~better))
    spec = FeatureSpec("drawn", "", "w", "dialogue:0", -1, "mean", False, 64)
    group = np.array([f"g{i // 4}" for i in range(n + held_out)])
    both = FeatureSet(chosen.astype(np.float32), rejected.astype(np.float32), group, spec)
    train, test = both.take(np.arange(n)), both.take(np.arange(n, n + held_out))
    head = at_ridge(train, 0.03)
    found: dict[str, Any] = {"pairs": n, "width": d, "held_out": held_out}
    wall, own = perf_counter(), process_time()
    optimum = Optimum.of(HeldProgram.of(train, head))
    effect = HeldOutEffect(optimum, optimum.program.design.compared(test), 1.0)
    result = influence(optimum, effect)
    found |= {"influence_seconds": perf_counter() - wall, "influence_cpu_seconds": process_time() - own}
    found |= {"refits": result.refits, "proved": [result.lowers.proved, result.raises.proved]}
    wall, own = perf_counter(), process_time()
    forget(train.take(np.arange(n) >= 4), head)
    found |= {"forget_seconds": perf_counter() - wall, "forget_cpu_seconds": process_time() - own}
    for name, value in found.items():
        print(f"{name:<24}{value}")
    return found


def at_ridge(features: FeatureSet, relative: float) -> ConvexHead:
    """The linear head at a relative ridge, without validation."""
    facts = {"method": "linear", "ridge": 1.0, "ridge_relative": relative}
    certificate = Certificate("linear", "", 1.0, 1.0, 0.0, 0, "converged", 1e-4, "float64", 0, {}, facts)
    none = np.zeros((0, features.width + 1))
    head = ConvexHead(none, none, np.zeros(features.width + 1), features.spec, certificate=certificate)
    held = HeldProgram.of(features, head, ridge_relative=relative)
    solved = held.design.folded(held.solve(np.zeros(held.rows.shape[1])))
    return replace(solved, certificate=replace(certificate, facts={**facts, "ridge": held.ridge}))


# --- real pairs --------------------------------------------------------------------------------------------------


def sets(data: Path, most: int, wanted: list[str] | None) -> Iterator[tuple[str, tuple[FeatureSet, FeatureSet]]]:
    """Features of the sets that are there, or of those ``wanted``."""
    named = {"film": (ASSETS / "film-lm", ASSETS / "film_pairs.jsonl.gz", ASSETS / "film_pairs_test.jsonl.gz")}
    for name, folder, files in (
        ("harmless", "hh_rlhf_harmless", ("train", "test")),
        ("tutors", "mrbench", ("pairs_train", "pairs_test")),
    ):
        if (data / folder).is_dir():
            named[name] = (data / SMALL, *(data / folder / f"{part}.jsonl.gz" for part in files))
    for name, (model, *files) in named.items():
        if name not in (wanted or named):
            continue
        backbone = load_backbone(str(model), device="cpu")
        spec = backbone.spec(-1, "mean", True, None)
        fit_on, test = (list(check([str(file)]).pairs)[:count] for file, count in zip(files, (most, 300), strict=True))
        yield name, (extract(fit_on, backbone, spec), extract(test, backbone, spec))


def one_set(name: str, train: FeatureSet, test: FeatureSet, refits: int) -> dict[str, Any]:
    head = fit(train, method="linear").head
    assert head.certificate is not None
    relative = float(head.certificate.facts["ridge_relative"])
    optimum = Optimum.of(HeldProgram.of(train, head))
    rows = optimum.program.design.compared(test)
    accuracy = float((rows @ optimum.weights > 0).mean())
    print(
        f"\n{name}: {len(train)} pairs, {len(test)} held out, width {train.width}, ridge {relative:.2g}, {accuracy:.3f}"
    )
    found = {"pairs": len(train), "held_out": len(test), "ridge_relative": relative, "accuracy": accuracy}
    found |= {"brute_force": brute_force(optimum, rows, head.temperature, refits)}
    found |= {"planted": planted(train, test, head, relative)}
    found |= {"poison": poison(optimum, rows, head.temperature)}
    return found


def brute_force(optimum: Optimum, rows: np.ndarray, temperature: float, refits: int) -> dict[str, Any]:
    """Refits without one pair each, beside what was said of them beforehand."""
    effect = HeldOutEffect(optimum, rows, temperature)
    result = influence(optimum, effect)
    held, n = optimum.program, len(optimum)
    some = np.arange(min(n, refits))
    true, moved = np.zeros(len(some)), np.zeros(len(some))
    for j in some:
        weight = np.full(n, 1 / (n - 1))
        weight[j] = 0
        weights = held.solve(optimum.weights, weight)
        true[j] = effect.exactly(weights)
        moved[j] = np.linalg.norm(weights - optimum.weights)
    error = np.abs(true - result.change[some])
    found = {
        "refits": len(some),
        "largest_effect": float(np.abs(true).max()),
        "largest_error": float(error.max()),
        "outside_bound": int((error > result.slack[some] + 1e-12).sum()),
        "median_slack_over_largest_effect": float(np.median(result.slack) / np.abs(result.change).max()),
        "median_distance_bound_over_distance": float(np.median(result.distance[some] / np.maximum(moved, 1e-300))),
        "proved": [result.lowers.proved, result.raises.proved],
        "refits_for_the_lists": result.refits,
    }
    print(
        "  leave one out:",
        ", ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items()
        ),
    )
    return found


def planted(train: FeatureSet, test: FeatureSet, head: ConvexHead, relative: float, seeds: int = 5) -> dict[str, Any]:
    """Recall of flips, 5 % of the pairs, among as many pairs as were planted, twice and four times as many."""
    n = len(train)
    count = max(1, n // 20)
    recall: dict[str, dict[int, int]] = {"harm": {}, "the others' margin": {}}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        flipped = rng.choice(n, count, replace=False)
        chosen, rejected = np.array(train.chosen), np.array(train.rejected)
        chosen[flipped], rejected[flipped] = train.rejected[flipped], train.chosen[flipped]
        faulty = replace(train, chosen=chosen, rejected=rejected)
        optimum = Optimum.of(HeldProgram.of(faulty, at_ridge(faulty, relative)))
        effect = HeldOutEffect(optimum, optimum.program.design.compared(test), head.temperature)
        harm, _ = effect.along(optimum.without_each())
        for how, order in (("harm", np.argsort(harm)), ("the others' margin", np.argsort(optimum.left_out_margins))):
            for times_as_many in (1, 2, 4):
                hits = len(set(order[: times_as_many * count].tolist()) & set(flipped.tolist()))
                recall[how][times_as_many] = recall[how].get(times_as_many, 0) + hits
    in_all = seeds * count
    found: dict[str, Any] = {"flips": in_all, "share": count / n}
    for how, hits in recall.items():
        told = {k: (value / in_all, *wilson(value / in_all, in_all)) for k, value in hits.items()}
        found[how] = told
        chance = {k: k * count / n for k in told}
        print(
            f"  flips found by {how}:",
            ", ".join(
                f"x{k} {100 * v:.0f} % [{100 * a:.0f}, {100 * b:.0f}] (chance {100 * chance[k]:.0f} %)"
                for k, (v, a, b) in told.items()
            ),
        )
    twice = train.take(np.concatenate([np.arange(n), np.arange(count)]))
    together, _ = copies(HeldProgram.of(twice, head).rows)
    seen = {j for some in together for j in some}
    found["copies_found"] = sum(n + j in seen and j in seen for j in range(count)) / count
    print(f"  copies found: {100 * found['copies_found']:.0f} % of {count}")
    return found


def poison(optimum: Optimum, rows: np.ndarray, temperature: float) -> dict[str, Any]:
    """Bounds beside the worst flips that a greedy search finds."""
    poisoning = Poisoning.of(optimum, rows)
    before = rows @ optimum.weights
    found: dict[str, Any] = {"largest": {kind: poisoning.largest(kind) for kind in ("flip", "remove", "add")}}
    taken, accuracies = poisoning.attack(max(ATTACKED), temperature=temperature)
    steps = []
    for k in ATTACKED:
        bound = poisoning.bound("flip", k)
        moved = float(np.abs(poisoning.margins_if_flipped(taken[:k].tolist()) - before).max())
        # For each held-out margin the flips that move it most, by the first step: the worst of these.
        pulls = np.abs(
            optimum.rows @ (optimum.basis.T @ rows[np.argsort(-np.linalg.norm(rows @ optimum.basis, axis=1))[:10]].T)
        )
        signed = [np.argsort(-pulls[:, i])[:k] for i in range(pulls.shape[1])]
        most = max(float(np.abs(poisoning.margins_if_flipped(some.tolist()) - before).max()) for some in signed)
        steps.append(
            {
                "k": k,
                "bound": bound.margin,
                "found": max(moved, most),
                "accuracy_kept": bound.accuracy,
                "accuracy_attacked": accuracies[k - 1],
                "by": bound.by,
            }
        )
    found["flips"] = steps
    print("  not vacuous up to:", found["largest"])
    print(f"  {'k':>4}{'margin, bound':>15}{'found':>9}{'accuracy kept':>15}{'attacked':>10}  by")
    for row in steps:
        told = f"  {row['k']:>4}{row['bound']:>15.3g}{row['found']:>9.3g}{row['accuracy_kept']:>15.3f}"
        print(f"{told}{row['accuracy_attacked']:>10.3f}  {row['by']}")
    return found


if __name__ == "__main__":
    main()
