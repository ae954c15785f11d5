"""One self-contained HTML page for a solved game, and one for the paper's experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float64

from coala.nash import plots
from coala.nash.criteria import Note
from coala.nash.game import Series, Vector
from coala.nash.paper import PAPER_GAME, PaperStudy, StudyRow, first_below
from coala.nash.selection import FixedPoint
from coala.nash.solvers import Result
from coala.pages.drawing import Drawing
from coala.pages.parts import Part, Table, element, gallery, headed, page, paragraphs, section

BRAND = "COALA preference games"


def game_page(result: Result, title: str) -> str:
    """The page of one run: Nash policy, where the method went, gap and distance by update, the game itself."""
    game, history, nash = result.game, result.history, result.nash
    alone = "It is the only one." if nash.unique else "It is one of many; judge by the gap, not by the distance to it."
    gap = plots.curves(
        {"gap": history.gap},
        "duality gap",
        f"Duality gap by update, from {history.gap[0]:.3g} to {history.gap[-1]:.3g}.",
        "What the best answer wins against the policy, beyond what the policy wins at worst.",
    )
    parts = [
        section(
            "Result",
            paragraphs(
                f"{result.method}: {result.reason}. {'Converged.' if result.converged else 'Not converged.'}",
                f"The Nash policy (linear program) guarantees a win rate of {nash.value:.6f}. {alone}",
            ),
            *noted(result.notes),
            gallery(gap, _distance(history.kl)),
        )
    ]
    strategies = game.parts(nash.strategy)
    for prompt, P, names, strategy, z in zip(
        game.prompts, game.matrices, game.names, strategies, history.log_policy, strict=True
    ):
        policies = np.exp(z)
        shown = (strategy, policies[-1], policies[0], P @ policies[-1])
        rows = [(name, *(f"{values[i]:.6f}" for values in shown)) for i, name in enumerate(names)]
        words = f"Path of the policy, from {_worded(names, policies[0])} to {_worded(names, policies[-1])}."
        if len(names) == 3:
            caption = "A hollow dot is the start, a full one the end, the cross the Nash policy."
            drawn = plots.simplex_plot(
                result.method, policies, names, strategy, key=prompt, words=words, caption=caption
            )
        else:
            caption = "The largest at the end, ten at most."
            drawn = plots.probability_curves(policies, names, key=prompt, words=words, caption=caption)
        table = Table("Answers", ("Answer", "Nash", "Last", "Start", "Wins against last"), rows)
        parts.append(section(f"Prompt: {prompt}" if prompt else "Policy", gallery(drawn), headed(table)))
    return page(title, BRAND, *parts)


def paper_page(study: PaperStudy, selections: Mapping[tuple[str, int, bool], FixedPoint] | None = None) -> str:
    """The paper's Figures 1 and 2 with the numbers behind them; ``selections`` by game, candidates, hard judge."""
    parts = [
        section(
            "The game",
            paragraphs(
                "Three answers in a cycle: b beats a and c beats b nine times of ten, a beats c eight times of ten. No "
                "answer is best; the Nash policy (4, 3, 4)/11 is beaten by none. All methods start at (0.2, 0.5, 0.3) "
                "with step size 0.3 and tau 0.1 where nothing else is said, and make 5000 proximal steps: 200 updates "
                "of 25 for COMAL, 2500 of two for Mirror-Prox and OMWU, else 5000 of one. Exact inner games: 200.",
                "The duality gap is twice what the best answer wins beyond one half; 0 exactly at the Nash policy.",
            ),
        ),
        section(
            "Without noise",
            paragraphs(
                "Methods without a moving reference go around the Nash policy and outwards (DPO, IPO, SPPO), or to the "
                "Nash policy of another, regularised game (INPO). COMAL, Mirror-Prox and OMWU converge.",
            ),
            gallery(*_triangles(study.noiseless), *_lines(study.noiseless), small=True),
            headed(_numbers(study.noiseless)),
        ),
        section(
            "From drawn pairs",
            paragraphs(
                f"Each proximal step sees {study.pairs:,} pairs drawn from the current policy (DPO, IPO and INPO their "
                f"labels, the others win rates) and finds the minimiser of that sample's loss. Of {study.seeds} seeds "
                "the first is shown. Noise leaves a floor under the gap that falls with the root of the number of "
                "pairs.",
            ),
            gallery(*_triangles(study.sampled), *_lines(study.sampled), small=True),
            headed(_sampled_numbers(study.sampled)),
        ),
    ]
    if selections:
        rows = [
            (
                game,
                str(n),
                "hard" if hard else "probabilities",
                " ".join(f"{p:.3f}" for p in found.policy),
                f"{found.gap:.4f}",
            )
            for (game, n, hard), found in selections.items()
        ]
        parts.append(
            section(
                "What best-versus-worst pairs optimise",
                paragraphs(
                    "Training on the best against the worst of N candidates with a fixed margin converges, to the Nash "
                    "policy of another game than the one that was asked."
                ),
                headed(Table("Limits", ("Game", "N", "Judge", "Limit", "Gap in the game asked"), rows)),
            )
        )
    return page("COMAL: the paper's game", BRAND, *parts)


def noted(notes: Sequence[Note]) -> list[Part]:
    """Remarks on settings; warnings stand out."""
    return [element("p", str(note), class_="warning" if note.level == "warning" else None) for note in notes]


def _distance(kl: Series) -> Drawing | None:
    if not np.isfinite(kl).all():
        return None
    words = f"KL(Nash, policy) by update, from {kl[0]:.3g} to {kl[-1]:.3g}."
    return plots.curves({"KL": kl}, "KL(Nash, policy)", words, "Distance to the Nash policy.")


def _triangles(rows: Sequence[StudyRow]) -> list[Drawing]:
    (strategy,) = PAPER_GAME.parts(PAPER_GAME.nash().strategy)
    names = PAPER_GAME.names[0]
    drawn = []
    for row in rows:
        policies = np.exp(row.first.history.log_policy[0])
        # The two figures of a method share a page: their ids must differ.
        kind, name = "sampled" if row.tail_gap else "noiseless", row.entry.name
        words = f"{name}, {kind}: from {_worded(names, policies[0])} to {_worded(names, policies[-1])}, "
        words += f"gap {row.first.gap:.3g}."
        drawn.append(plots.simplex_plot(name, policies, names, strategy, title=name, key=kind, words=words))
    return drawn


def _lines(rows: Sequence[StudyRow]) -> list[Drawing]:
    kind = "from drawn pairs" if rows[0].tail_gap else "without noise"
    drawn = []
    for what, name in (("gap", "duality gap"), ("kl", "KL(Nash, policy)")):
        series = {row.entry.name: getattr(row.first.history, what) for row in rows}
        # Methods differ in steps per update; all are drawn over the same 5000 proximal steps.
        ends = "; ".join(f"{label} {values[-1]:.2g}" for label, values in series.items())
        longest = max(map(len, series.values()))
        spread = {label: _spread(values, longest) for label, values in series.items()}
        words = f"{name} by update, {kind}, at the end: {ends}."
        steps = "proximal step (exact inner games: 25 per update)"
        drawn.append(plots.curves(spread, f"{name}, {kind}", words, xlabel=steps, wide=True))
    return drawn


def _spread(values: Series, length: int) -> Float64[np.ndarray, "points"]:
    """A history of fewer rows over the axis of the longest, each value held until the next."""
    return values[np.minimum(np.arange(length) * (len(values) - 1) // (length - 1), len(values) - 1)]


def _numbers(rows: Sequence[StudyRow]) -> Table:
    cells = []
    for row in rows:
        last = row.first
        (policy,) = last.game.parts(last.policy)
        cells.append(
            [
                row.entry.name + (f" (also {row.entry.also})" if row.entry.also else ""),
                " ".join(f"{p:.6f}" for p in policy),
                f"{last.gap:.2e}",
                f"{last.history.kl[-1]:.2e}",
                f"{last.game.gap(last.average):.2e}",
                " / ".join(str(first_below(last, bound) or "-") for bound in (1e-3, 1e-6, 1e-9)),
            ]
        )
    head = [
        "Method",
        "Last policy a b c",
        "Gap",
        "KL(Nash, last)",
        "Gap of the average",
        "Gap stays below 1e-3 / 1e-6 / 1e-9 from update",
    ]
    return Table("After 5000 proximal steps, population losses", head, cells)


def _sampled_numbers(rows: Sequence[StudyRow]) -> Table:
    cells = []
    for row in rows:
        strategy = row.first.nash.strategy
        distances = [run.kl_to(strategy) for run in row.runs]
        largest = max(float(np.exp(run.history.log_policy[0]).max()) for run in row.runs)
        cells.append([row.entry.name, str(row.tail_gap), f"{np.median(distances):.2e}", f"{largest:.4f}"])
    head = [
        "Method",
        "Gap, last fifth of updates: mean [95 %] (n seeds)",
        "KL(Nash, last), median",
        "Largest probability seen",
    ]
    return Table("Sampled, exact minimiser of each sample's loss", head, cells)


def _worded(names: Sequence[str], policy: Vector) -> str:
    order = np.argsort(-policy, kind="stable")[:5]
    return ", ".join(f"{names[i]} {policy[i]:.3f}" for i in order)
