"""What a click is worth: seconds of a refit, coverage of the accuracy shown, clicks that active selection saves.

    python benchmarks/live.py                                        # all parts, on the bundled film model
    python benchmarks/live.py --part clicks --model MODEL --prompts FILE --tokens 60
    python benchmarks/live.py --part times --pairs 5000 --width 577

``times`` draws features and adds pairs one by one. ``coverage`` runs learners on drawn tastes and counts how often the
confidence sequence misses the running accuracy at any time. ``clicks`` lets raters of known tastes click over a pool of
the model's own replies, at random and actively, and counts clicks until held-out accuracy is 90 % of what all pairs of
the pool attain. Prints tables; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

from coala.alignment.answers import read_prompts
from coala.convex.sequential import SequentialProgram, choose_ridge, solved, unit_of
from coala.evaluation.judges.scorers import RULES, WordJudge
from coala.live.journal import LivePrompt
from coala.live.learner import Learner, coordinates
from coala.live.pool import CONSIDERED, SHARE_ACTIVE, TO_COME, set_aside
from coala.live.settings import Selection
from coala.live.writer import Backbone
from coala.statistics.anytime import log_wealth
from coala.statistics.intervals import percentiles, wilson
from coala.values import prompt_id

ASSETS = Path(__file__).resolve().parent.parent / "src" / "coala" / "assets"
EVERY = 5  # clicks between two looks at the held-out accuracy
TASTES: dict[str, Callable[[str], float]] = {
    "house-style": lambda text: RULES["house-style"](text, ""),
    "shorter": lambda text: RULES["shorter"](text, ""),
    "words": WordJudge.load(ASSETS / "film-labeller.json").score,
}
RATERS = {
    "house style": ("house-style", 0.0, False),
    "shorter": ("shorter", 0.0, False),
    "words": ("words", 0.0, False),
    "words, 20 % wrong": ("words", 0.2, False),
    "words, turning": ("words", 0.0, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("times", "coverage", "clicks"), nargs="+")
    parser.add_argument("--pairs", type=int, default=5000, help="of the part times")
    parser.add_argument("--width", type=int, default=577, help="of the part times")
    parser.add_argument("--runs", type=int, default=1000, help="of the part coverage")
    parser.add_argument("--model", default=str(ASSETS / "film-lm"), help="of the part clicks")
    parser.add_argument("--prompts", type=Path, default=ASSETS / "film_pairs.jsonl.gz")
    parser.add_argument("--most", type=int, default=100, help="prompts")
    parser.add_argument("--replies", type=int, default=8, help="to each prompt")
    parser.add_argument("--tokens", type=int, default=32, help="of a reply")
    parser.add_argument("--clicks", type=int, default=200, help="that a rater gives")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--raters", choices=tuple(RATERS), nargs="+", default=list(RATERS))
    parser.add_argument("--ways", choices=("random", "mixed", "active"), nargs="+", default=["random", "active"])
    parser.add_argument("--gain", choices=("determinant", "variance"), default="variance")
    args = parser.parse_args()
    parts = args.part or ["times", "coverage", "clicks"]
    found: dict[str, Any] = {}
    if "times" in parts:
        found["times"] = times(args.pairs, args.width)
    if "coverage" in parts:
        found["coverage"] = coverage(args.runs)
    if "clicks" in parts:
        found["clicks"] = clicks(args)
    print(json.dumps(found))


# --- times -------------------------------------------------------------------------------------------------------


def drawn(n: int, width: int, rng: np.random.Generator, taste: np.ndarray | None = None) -> np.ndarray:
    """Rows (n, width) of pairs, the preferred side first, of one taste; their spectrum falls."""
    taste = rng.standard_normal(width) if taste is None else taste
    mixed = np.random.default_rng(1).standard_normal((width, width)) / np.sqrt(width)
    rows = rng.standard_normal((n, width)) @ (mixed * (np.linspace(1, 0.02, width) ** 2)[:, None])
    rows *= np.sqrt(2 / max(1e-300, float((rows**2).sum(axis=1).mean())))
    margins = rows @ taste
    first = rng.random(n) < 1 / (1 + np.exp(-3 * margins / max(1e-300, float(margins.std()))))
    return rows * np.where(first, 1.0, -1.0)[:, None]


def times(n: int, width: int) -> dict[str, Any]:
    """Processor seconds of each refit while pairs come one by one, at the ridge that the first 100 choose; then
    of taking some back."""
    rows = drawn(n, width, np.random.default_rng(0))
    ridge = choose_ridge(rows[:100], np.arange(min(n, 100)))
    program = SequentialProgram(width, ridge)
    seconds, gaps = np.zeros(n), np.zeros(n)
    for key in range(n):
        began = process_time()
        program.add(key, rows[key])
        gaps[key] = program.refit().relative_gap
        seconds[key] = process_time() - began
    back = []
    for key in range(0, n, max(1, n // 50)):
        began = process_time()
        program.remove(key)
        program.refit()
        back.append(process_time() - began)
    kept = np.array([key for key in range(n) if key in program], int)
    afresh = solved(rows[kept], ridge)
    apart = float(np.linalg.norm(program.weights - afresh.weights))
    radius = program.optimality.radius + afresh.optimality.radius
    print(f"{'pairs':<16}{'p50, ms':>10}{'p95, ms':>10}{'most, ms':>10}")
    parts: dict[str, Any] = {}
    for name, part in (("all", slice(0, n)), ("last tenth", slice(n - max(1, n // 10), n))):
        some = 1000 * seconds[part]
        parts[name] = [float(np.median(some)), float(np.quantile(some, 0.95)), float(some.max())]
        print(f"{name:<16}" + "".join(f"{one:>10.1f}" for one in parts[name]))
    print(f"taking one back, median: {1000 * float(np.median(back)):.1f} ms")
    print(f"largest certified relative gap: {gaps.max():.1e}")
    print(f"weights after removals from a fit that never had the pairs: {apart:.1e} (proved at most {radius:.1e})")
    return {"pairs": n, "width": width, "ridge_relative": ridge / unit_of(rows), **parts, "apart": apart}


# --- coverage ----------------------------------------------------------------------------------------------------


def coverage(runs: int, n: int = 100, width: int = 8) -> dict[str, Any]:
    """How often the sequence misses at any time, over learners on drawn tastes, half of whose raters turn half way.

    The chance of each outcome is known, as the rater's probabilities are; its running mean is what is to be covered.
    """
    bound = np.log(2 / 0.05)
    misses = 0
    for run in range(runs):
        rng = np.random.default_rng([run, 7])
        taste, noise = rng.standard_normal(width) * rng.choice([0.0, 1.0, 3.0]), rng.random() < 0.5
        program = SequentialProgram(width, 0.05)
        total = truth = 0.0
        missed = False
        for i in range(n):
            wanted = -taste if noise and i > n // 2 else taste
            rows = rng.standard_normal((2, width))
            chance = 1 / (1 + np.exp(-(rows @ wanted)))
            said = rng.random(2) < chance
            margin = float(rows[1] @ program.weights)
            right = 0.5 if margin == 0 else float((margin > 0) == said[1])
            mean = 0.5 if margin == 0 else float(chance[1] if margin > 0 else 1 - chance[1])
            total, truth = total + right, truth + mean
            sides = log_wealth([total, i + 1 - total], i + 1, [truth / (i + 1), 1 - truth / (i + 1)])
            missed |= bool((sides >= bound).any())
            program.add(i, rows[0] if said[0] else -rows[0])
            program.refit()
        misses += missed
    low, high = wilson(misses / runs, runs)
    print(
        f"missed at any of {n} times: {100 * misses / runs:.1f} % [{100 * low:.1f}, {100 * high:.1f}] (n = {runs} runs)"
    )
    return {"runs": runs, "length": n, "misses": misses}


# --- clicks ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Pairs of the pool: rows (k, p), the texts of both sides, and the number of their prompt."""

    rows: np.ndarray
    texts: list[tuple[str, str]]
    prompt: np.ndarray


def clicks(args: argparse.Namespace) -> dict[str, Any]:
    from coala.backbone import load_backbone

    prompts = list({row.id: row.prompt for row in read_prompts(args.prompts)}.values())[: args.most]
    backbone = load_backbone(args.model, device="cpu", template="chat" if "film" in Path(args.model).name else "auto")
    model = Backbone(backbone, backbone.spec(), args.tokens, 1.0, 0)
    asked = [LivePrompt(prompt_id(turns), turns, set_aside(i, 0.2, 0)) for i, turns in enumerate(prompts)]
    draws = [(prompt, k) for prompt in asked for k in range(args.replies)]
    texts = [text for text, _ in model.write(draws, None, lambda: None)]
    full = [i for i, text in enumerate(texts) if text.strip()]
    features = np.stack(model.features([(draws[i][0], texts[i]) for i in full]))
    standardisation = coordinates(features[:32])
    place = {at: i for i, at in enumerate(full)}
    sides: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
    for number, prompt in enumerate(asked):
        here = [at for at in range(number * args.replies, (number + 1) * args.replies) if at in place]
        sides[prompt.aside] += [(a, b) for a, b in combinations(here, 2) if texts[a] != texts[b]]
    made = {}
    for aside, both in sides.items():
        first, second = (features[[place[one[k]] for one in both]] for k in (0, 1))
        rows = standardisation.differences(first, second)
        made[aside] = Pairs(
            rows, [(texts[a], texts[b]) for a, b in both], np.array([a // args.replies for a, _ in both])
        )
    print(
        f"{len(asked)} prompts, {len(full)} replies, {len(sides[False])} pairs to ask about, {len(sides[True])} aside"
    )
    found: dict[str, Any] = {"model": Path(args.model).name, "prompts": len(asked), "replies": len(full)}
    head = f"{'rater':<20}{'attained':>10}{'goal':>7}  " + "".join(f"{f'{way}: median':>18}" for way in args.ways)
    print(head + f"{'fewer, times (95 %)':>26}")
    for rater in args.raters:
        found[rater] = one_rater(rater, made[False], made[True], standardisation, args)
    return found


def one_rater(
    rater: str, pool: Pairs, held_out: Pairs, standardisation: Any, args: argparse.Namespace
) -> dict[str, Any]:
    name, wrong, turning = RATERS[rater]
    taste = TASTES[name]
    better, wanted = (np.array([np.sign(taste(a) - taste(b)) for a, b in some.texts]) for some in (pool, held_out))
    if not better.any() or not wanted.any():
        print(f"{rater:<20} orders no pair of these")
        return {"attained": None}
    some = np.flatnonzero(better)[np.random.default_rng(0).permutation(int((better != 0).sum()))[:3000]]
    signed = pool.rows[some] * better[some][:, None]
    attained = accuracy(solved(signed, choose_ridge(signed, pool.prompt[some])).weights, held_out.rows, wanted)
    # 90 % of the accuracy, and, which is harder, 90 % of what it has over chance.
    goals = {"accuracy": 0.9 * attained, "gain": 0.5 + 0.9 * (attained - 0.5)}
    start = args.clicks // 2 // EVERY if turning else 0
    curves = {
        way: [
            one_run(pool, better, held_out.rows, wanted, standardisation, way, seed, wrong, turning, args)
            for seed in range(args.seeds)
        ]
        for way in args.ways
    }
    result: dict[str, Any] = {"attained": attained}
    result["last"] = {way: float(np.mean([run[-1] for run in runs])) for way, runs in curves.items()}
    for which, goal in goals.items():
        counts = {way: [until(run[start:], goal) for run in runs] for way, runs in curves.items()}
        result[which] = {"goal": goal, "clicks": counts}
        told = "".join(f"{show(float(np.median(counts[way])), args.clicks):>18}" for way in args.ways)
        line = f"{rater if which == 'accuracy' else '':<20}{100 * attained:>9.1f}%{100 * goal:>6.1f}%  {told}"
        for way in args.ways[1:]:
            ratio, low, high = fewer(counts[args.ways[0]], counts[way], args.clicks)
            result[which][f"{args.ways[0]} / {way}"] = [ratio, low, high]
            line += f"{f'{ratio:.2f} [{low:.2f}, {high:.2f}]':>26}"
        print(line)
    return result


def one_run(
    pool: Pairs,
    better: np.ndarray,
    rows: np.ndarray,
    wanted: np.ndarray,
    standardisation: Any,
    way: Selection,
    seed: int,
    wrong: float,
    turning: bool,
    args: argparse.Namespace,
) -> list[float]:
    """Held-out accuracy by the taste of the time after every few clicks; replies that the rater likes alike cost a
    click and teach nothing."""
    rng = np.random.default_rng([seed, 11])
    learner = Learner(standardisation)
    open_ = np.ones(len(better), bool)
    curve = [0.5]
    for click in range(1, args.clicks + 1):
        left = np.flatnonzero(open_)
        at = int(left[rng.integers(len(left))])
        if len(learner) and rng.random() < SHARE_ACTIVE[way]:
            some = rng.permutation(left)[:CONSIDERED]
            to_come = pool.rows[rng.permutation(len(better))[:TO_COME]]
            at = int(some[np.argmax(learner.worth(pool.rows[some], to_come, by=args.gain))])
        open_[at] = False
        turned = -1 if turning and click > args.clicks // 2 else 1
        said = better[at] * turned * (-1 if rng.random() < wrong else 1)
        if said:
            learner.teach(f"{click}", click, pool.rows[at] * said, str(pool.prompt[at]))
            learner.settle()
        if click % EVERY == 0:
            curve.append(accuracy(learner.program.weights, rows, wanted * turned))
    return curve


def accuracy(weights: np.ndarray, rows: np.ndarray, wanted: np.ndarray) -> float:
    """Share of the pairs that the taste orders which the weights order alike."""
    margins = (rows @ weights) * wanted
    ordered = wanted != 0
    return float(((margins > 0) + (margins == 0) / 2)[ordered].mean())


def until(curve: Sequence[float], goal: float) -> float:
    """Clicks after which two looks in a row reach the goal; inf if none do."""
    reached = np.array(curve) >= goal
    both = np.flatnonzero(reached[:-1] & reached[1:])
    return float(EVERY * both[0]) if len(both) else np.inf


def fewer(plain: Sequence[float], active: Sequence[float], most: int) -> tuple[float, float, float]:
    """Ratio of mean clicks, seeds drawn again for the interval; who never came there counts as ``most``."""
    first, second = (np.minimum(np.array(one), most) for one in (plain, active))
    rng = np.random.default_rng(0)
    picks = rng.integers(len(first), size=(2000, len(first)))
    low, high = percentiles(first[picks].mean(axis=1) / np.maximum(1, second[picks].mean(axis=1)))
    return float(first.mean() / max(1.0, second.mean())), low, high


def show(count: float, most: int) -> str:
    return f"{count:.0f}" if np.isfinite(count) else f"over {most}"


if __name__ == "__main__":
    main()
