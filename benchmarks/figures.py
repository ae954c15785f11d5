"""The figures of the documentation.

    python benchmarks/figures.py --out docs/figures

Of docs/guarantees.md: margins over iterations, and the rates of ADMM and of Nesterov's method, on data drawn here, one
seed. Of docs/results/distil.md: wins by KL, from that page's own tables. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")
import jax
import jax.numpy as jnp
import numpy as np
import torch
from matplotlib.figure import Figure

from coala.convex import GatedNewton, Program, largest_sparsity, sample_patterns, solve
from coala.convex.papers.barrier import Barrier
from coala.convex.papers.cronos import Cronos, CronosState
from coala.convex.papers.losses import Logistic, SecondLayer
from coala.convex.papers.minimisers import DampedNewton, Nesterov


def preferences(n: int, d: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows (2, n, d), chosen and rejected, of mean norm 1 with a constant; the reward is 4 |a.x| + 2 b.x."""
    x = rng.standard_normal((2, n, d))
    a, b = (v / np.linalg.norm(v) for v in rng.standard_normal((2, d)))
    reward = 4 * np.abs(x @ a) + 2 * x @ b
    better = rng.random(n) < 1 / (1 + np.exp(-(reward[0] - reward[1])))
    x = np.where(better[:, None], x, x[::-1]) / np.sqrt(d)
    rows = np.concatenate([x, np.full((2, n, 1), 1 / np.sqrt(d))], axis=-1)
    return rows, np.concatenate([np.ones(n), -np.ones(n)])


def ratio(scores: np.ndarray) -> float:
    """Mean over standard deviation of the margins chosen - rejected, from scores of all rows (2n,)."""
    margins = np.subtract(*np.split(scores, 2))
    return float(margins.mean() / margins.std()) if margins.std() > 0 else 0.0


def margins(out: Path) -> dict[str, Any]:
    """Phase I on one data set by three methods: the ratio of mean margin to its deviation, per iteration."""
    rows, y = preferences(600, 16, np.random.default_rng(0))
    X = rows.reshape(-1, rows.shape[-1])
    patterns, _ = sample_patterns(X, 16, jax.random.key(0))
    traces: dict[str, list[float]] = {}
    with jax.enable_x64(True):
        program = Program(jnp.asarray(X), jnp.asarray(y), jnp.asarray(patterns), jnp.ones(()))
        level = 0.03 * largest_sparsity(program)
        program = Program(program.X, program.y, program.patterns, level)
        relaxed = program.relaxation
        for name, target, solver, steps in (
            ("Newton, gated program", relaxed, GatedNewton(), 20),
            ("CRONOS, cone program", program, Cronos(), 400),
        ):
            trace: list[float] = []

            def watch(step: int, u: np.ndarray, row: Any, target: Any = target, trace: list[float] = trace) -> None:
                trace.append(ratio(np.asarray(target.predict(jnp.asarray(u)))))

            solve(target, solver, tolerance=1e-8, max_steps=steps, patience=None, on_step=watch)
            traces[name] = trace
    torch.manual_seed(0)
    for rate in (1e-3, 3e-2):
        network = torch.nn.Sequential(torch.nn.Linear(X.shape[1], 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
        optimiser = torch.optim.AdamW(network.parameters(), lr=rate)
        inputs, labels = torch.tensor(X, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        trace = []
        for _ in range(400):
            with torch.no_grad():
                trace.append(ratio(network(inputs).squeeze(1).numpy()))
            batch = torch.randint(len(X), (64,), generator=generator)
            loss = ((network(inputs[batch]).squeeze(1) - labels[batch]) ** 2).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        traces[f"AdamW, rate {rate:g}, ReLU network"] = trace
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, trace in traces.items():
        axes.plot(np.arange(1, len(trace) + 1), trace, label=name)
    axes.set(xscale="log", xlabel="iteration", ylabel="mean margin / deviation")
    axes.legend(frameon=False)
    save(figure, out / "margins.svg")
    falls = {name: float(-np.minimum(np.diff(trace), 0).sum()) for name, trace in traces.items()}
    return {"last": {name: trace[-1] for name, trace in traces.items()}, "total_fall": falls}


def rates(out: Path) -> dict[str, Any]:
    """ADMM's ergodic averages against 1/k, and Nesterov's method against 2 L ||theta*||^2 / (k + 1)^2."""
    rows, y = preferences(60, 5, np.random.default_rng(1))
    X = rows.reshape(-1, rows.shape[-1])
    patterns, _ = sample_patterns(X, 5, jax.random.key(0))
    with jax.enable_x64(True):
        program = Program(jnp.asarray(X), jnp.asarray(y), jnp.asarray(patterns), jnp.ones(()))
        program = Program(program.X, program.y, program.patterns, 0.05 * largest_sparsity(program))
        best = solve(program, Barrier(), tolerance=1e-9).objective
        solver = Cronos(relaxation=1.0, balance=False)
        state: CronosState = solver.init(program)
        total = jnp.zeros_like(state.iterate.v)
        gaps, last = [], []
        for k in range(1, 1001):
            state = solver.step(program, state)
            total = total + state.iterate.v
            for trace, v in ((gaps, total / k), (last, state.iterate.v)):
                value = float(state.rotated.objective(v)) + float(
                    np.linalg.norm(np.minimum(np.asarray(state.rotated.cone(v)), 0))
                )
                trace.append(abs(value - best) / best)
        rng = np.random.default_rng(2)
        # Features of very unequal size: what makes first-order methods slow.
        hidden = rng.standard_normal((2, 400, 30)) * np.logspace(0, -2, 30)
        theta = 10 * rng.standard_normal(30)
        swap = ((hidden[0] - hidden[1]) @ theta < 0)[:, None]
        chosen, rejected = np.where(swap, hidden[::-1], hidden)
        second = SecondLayer.of(jnp.asarray(chosen), jnp.asarray(rejected), Logistic(), ridge=1e-6)
        exact = solve(second, DampedNewton(), tolerance=1e-13, exact=False)
        trace = []
        solve(
            second,
            Nesterov(restart=False),
            tolerance=1e-14,
            max_steps=1000,
            patience=None,
            exact=False,
            on_step=lambda step, u, row: trace.append(row["objective"] - exact.objective),
        )
        bound = 2 * float(second.smoothness()) * float((exact.value**2).sum())
    steps = np.arange(1, 1001)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.loglog(steps, gaps, label="average of the iterates")
    left.loglog(steps, last, label="last iterate")
    constant = float((steps * gaps)[9:].max())
    left.loglog(steps, constant / steps, "k--", label=f"{constant:.1f} / k")
    left.set(xlabel="ADMM step k", ylabel="|penalised value - optimum| / optimum")
    right.loglog(np.arange(1, len(trace)), np.maximum(trace[1:], 1e-16), label="Nesterov")
    right.loglog(
        np.arange(1, len(trace)),
        bound / (np.arange(1, len(trace)) + 1) ** 2,
        "k--",
        label="2 L ||theta*||^2 / (k + 1)^2",
    )
    right.set(xlabel="step k", ylabel="objective - optimum")
    for axes in (left, right):
        axes.legend(frameon=False)
    save(figure, out / "rates.svg")
    worst = float(max(np.array(trace[1:]) * (np.arange(1, len(trace)) + 1) ** 2) / bound)
    return {
        "admm_k_times_gap": {"at_10": 10 * gaps[9], "largest_after_10": constant},
        "nesterov_largest_share_of_bound": worst,
    }


SETS = {
    "film": "film: words",
    "stories": "stories: words",
    "film-sentences": "film, short sentences: form",
    "house-style": "house style, 56 pairs: words and form",
    "house-style-all": "house style, 239 pairs: words and form",
    "sentences": "short sentences: form",
}
LINES = {  # policies with strengths to choose, and the colour of each
    "distilled": ("distilled (convex, certified)", "#1b6ca8"),
    "distilled-weighted-half": ("distilled, weighted pairs (convex, certified)", "#17a398"),
    "lm-steer": ("LM-Steer (Adam)", "#c17d11"),
    "best-bias": ("best constant", "#8f5da2"),
    "mean-difference": ("mean difference", "#777777"),
}
SINGLE = {  # what has one point each, by the beginning of its name
    "dpo": ("DPO", "#b3261e", "s"),
    "sft-guided": ("SFT on guided replies", "#2e7d32", "D"),
    "system-prompt": ("system prompt", "black", "^"),
    "five-examples": ("five examples in the prompt", "black", "v"),
}
FURTHEST = 60.0  # nats; what spends more is outside of the figure


def wins_by_kl(page: Path, out: Path) -> dict[str, Any]:
    """Wins against the unguided model by KL a reply, of each policy along its strengths, from the page's tables."""
    tables = dict(_tables(page.read_text()))
    shown = [name for name in SETS if (name, "Weaker and stronger") in tables]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.3 * columns + 0.4, 3.9 * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, name in itertools.zip_longest(panels.flat, shown):
        if name is None:
            axes.set_axis_off()
            continue
        _panel(axes, tables[name, "Replies to held-out prompts"], tables[name, "Weaker and stronger"])
        axes.set(title=SETS[name], xlabel="KL a reply, nats", ylim=(40, 101))
    for axes in panels[:, 0]:
        axes.set(ylabel="wins against the unguided model, %")
    known = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(known.values(), known, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    save(figure, out / "wins_by_kl.svg")
    return {"sets": shown}


def _panel(axes: Any, replies: list[dict[str, str]], strengths: list[dict[str, str]]) -> None:
    axes.axhline(50, color="#999999", linewidth=1, linestyle=":")
    # By a head of the mean over the reply where there is one: of the last token heads guide less.
    guided = max((row["method"] for row in replies if row["method"] in ("block-10", "block-10-mean")), default="")
    for row in replies:
        wins, kl = _figure(row["wins against the unguided start, %"]), _figure(row["KL to the start, nats"])
        plain = row["method"].partition(" (")[0]
        single = next((one for name, one in SINGLE.items() if plain.startswith(name)), None)
        if row["method"] == guided:
            axes.axhline(wins, color="#1b6ca8", linewidth=1, linestyle="--", label="guided, ten forwards a token")
        elif single is not None and kl <= FURTHEST:
            label, colour, mark = single
            axes.plot(kl, wins, mark, color=colour, ms=5, label=label)
    for policy, (label, colour) in LINES.items():
        found = [f"{policy}-mean", f"{policy}-chat", policy]
        name = next((one for one in found if any(row["policy"] == one for row in strengths)), None)
        rows = [row for row in strengths if row["policy"] == name]
        points = [(_figure(row["KL a reply, nats"]), _figure(row["wins, % [95 %]"])) for row in rows]
        points = [(0.0, 50.0), *(point for point in points if point[0] <= FURTHEST)]
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, ms=3.5, linewidth=1.3, label=label)


def _figure(cell: str) -> float:
    found = re.match(r"-?[\d.]+", cell)
    return float(found[0]) if found else float("nan")


def _tables(text: str) -> Iterator[tuple[tuple[str, str], list[dict[str, str]]]]:
    """The tables of a page of results, by data set and name."""
    for part in text.split("\n### ")[1:]:
        place = part.partition(" with ")[0]
        for name, body in re.findall(r"\n\*\*([^*\n]+)\*\*\n\n((?:\|.*\n)+)", part):
            head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines())
            yield (place, name), [dict(zip(head, row, strict=True)) for row in rows]


def save(figure: Figure, path: Path) -> None:
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "coala", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    docs = Path(__file__).resolve().parent.parent / "docs"
    parser.add_argument("--out", type=Path, default=docs / "figures")
    parser.add_argument("--part", choices=("margins", "rates", "wins"), nargs="+", default=["margins", "rates", "wins"])
    given = parser.parse_args()
    found: dict[str, Any] = {}
    if "margins" in given.part:
        found["margins"] = margins(given.out)
    if "rates" in given.part:
        found["rates"] = rates(given.out)
    if "wins" in given.part:
        found["wins"] = wins_by_kl(docs / "results" / "distil.md", given.out)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
