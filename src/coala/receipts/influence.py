"""What each pair, group or rater did to the head of a run: from its folder to a record in its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from coala.callbacks import OnNote, quiet
from coala.costs import Stopwatch
from coala.receipts.opened import Opened, opened, quoted
from coala.report.receipts import add_receipt
from coala.store import file_digest, save_lines
from coala.values import CoalaError, Pair, turns

if TYPE_CHECKING:
    from coala.convex.influence import Influence, Left, Measured
    from coala.convex.optimum import Optimum

By = Literal["pair", "group", "rater"]
Metric = Literal["loss", "accuracy"]
POISONED = (1, 2, 5, 10, 20, 50)
HELD = "gates, ridge, sparsity, coordinates and temperature stay fixed"


@dataclass(frozen=True)
class _Unit:
    """What is left out: rows of the features, and how it is named."""

    name: str
    rows: np.ndarray
    pairs: list[int]


def pair_influence(
    path: Path | str,
    *,
    metric: Metric = "loss",
    reply: str | None = None,
    prompt: Any = None,
    pair: int | None = None,
    by: By = "pair",
    top: int = 10,
    attack: int = 0,
    out: Path | None = None,
    trust_remote_code: bool = False,
    download: bool = False,
    on_note: OnNote | None = None,
) -> dict[str, Any]:
    """The pairs, groups or raters of the run at ``path`` whose absence would change a measure most.

    The measure is the ``metric`` of the held-out pairs; the score of ``reply`` to ``prompt``, for which the model is
    loaded; or the margin of the held-out ``pair`` of that line. The ``top`` of each sign are refitted exactly, and the
    lists come with a proof of how far they are complete. With it goes the bound on poisoned pairs, and with ``attack``
    the harm of that many flips that a greedy search finds. The record is kept in RUN/receipts and shown in the report;
    ``out`` gets a line for every unit.

    Raises:
        CoalaError: for a run without features, a head of another program, or a line that is not there.
    """
    note = quiet if on_note is None else on_note
    with Stopwatch() as watch:
        run = opened(path)
        if run.train.prefixes > 1:
            raise CoalaError(
                f"found {run.train.prefixes} prefixes to a pair, expected whole replies, of which influence is known, "
                "fix: align with --prefixes 1"
            )
        if len(run.train.pairs) < 2 or not run.held_out.pairs:
            raise CoalaError(
                f"found {len(run.train.pairs)} pairs to fit and {len(run.held_out.pairs)} held out, expected two "
                "of one and one of the other at least, fix: align more pairs"
            )
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "download": download}
        from coala.convex.held import HeldProgram
        from coala.convex.influence import influence
        from coala.convex.optimum import Optimum

        held = HeldProgram.of(run.train.features, run.head, reference_scale=run.recipe.head.reference_scale)
        optimum = Optimum.of(held)
        effect, about = _measured(run, optimum, metric, reply, prompt, pair, options)
        units = _units(run, by)
        found = influence(optimum, effect, None if by == "pair" else [unit.rows for unit in units], top=top)
        record = {**about, **_told(run, optimum, units, found, by), "poison": _poison(run, optimum, attack)}
    if not held.linear:
        note(
            "the bounds hold for the gates as they are; `coala forget --from-scratch` fits them again without the pairs"
        )
    record |= {
        "kind": "influence",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "head": file_digest(run.run.path / "head" / "head.safetensors"),
        "seconds": watch.seconds,
    }
    if out is not None:
        save_lines(out, _lines(units, found))
    add_receipt(run.run, record, name=f"influence-{about['name']}-by-{by}")
    return record


def _measured(
    run: Opened,
    optimum: Optimum,
    metric: Metric,
    reply: str | None,
    prompt: Any,
    pair: int | None,
    options: dict[str, Any],
) -> tuple[Measured, dict[str, Any]]:
    """What is measured, and how it is told: name, title, value now, and which sign of a change is good."""
    from coala.convex.influence import HeldOutEffect, LinearEffect

    held = optimum.program
    if reply is not None and pair is not None:
        raise CoalaError("found both a reply and a pair, expected one of them, fix: remove one")
    if reply is not None:
        if prompt is None:
            raise CoalaError("found a reply without its prompt, expected both, fix: give --prompt")
        said = Pair(turns(prompt), reply, reply, "")
        row = _reply_row(run, optimum, said, options)
        title = "score of the reply"
        about = {
            "name": "score",
            "title": title,
            "value": float(row @ optimum.weights),
            "good": 0,
            "reply": quoted(said),
        }
        return LinearEffect(optimum, row), about
    rows = held.design.compared(run.held_out.features)
    if pair is not None:
        if not 1 <= pair <= len(rows):
            raise CoalaError(
                f"found pair {pair}, expected a line of pairs-eval.jsonl, 1 to {len(rows)}, fix: choose one of these"
            )
        row = rows[pair - 1]
        title = f"margin of held-out pair {pair}"
        value = float(row @ optimum.weights)
        about = {
            "name": "margin",
            "title": title,
            "value": value,
            "good": 1,
            "pair": quoted(run.held_out.pairs[pair - 1]),
        }
        return LinearEffect(optimum, row), about
    margins = rows @ optimum.weights
    if metric == "loss":
        value = float(np.logaddexp(0, -margins / run.head.temperature).mean())
        about = {"name": "loss", "title": "held-out log loss, in nats", "value": value, "good": -1}
    else:
        value = float(((margins > 0) + (margins == 0) / 2).mean())
        about = {"name": "accuracy", "title": "held-out ranking accuracy", "value": value, "good": 1}
    return HeldOutEffect(optimum, rows, run.head.temperature, metric), about


def _reply_row(run: Opened, optimum: Optimum, said: Pair, options: dict[str, Any]) -> np.ndarray:
    from coala.alignment import load_parts
    from coala.features import extract

    backbone, head, _ = load_parts(run.run.path, **options)
    features = extract([said], backbone, head.spec, prompt_features=head.needs_prompt)
    return np.asarray(optimum.program.design.scored(features.chosen, features.prompt)[0])


def _units(run: Opened, by: By) -> list[_Unit]:
    """Every pair, or all pairs of a group or a rater, by name."""
    pairs = run.train.pairs
    if by == "pair":
        return [_Unit(f"line {j + 1}", np.array([j]), [j]) for j in range(len(pairs))]
    members: dict[str, list[int]] = {}
    for j, one in enumerate(pairs):
        members.setdefault(one.group if by == "group" else one.rater, []).append(j)
    if by == "rater":
        members.pop("", None)
        if not members:
            raise CoalaError(f"{run.run.path}: found no pair that names its rater, expected some, fix: use --by group")
    if len(members) < 2:
        raise CoalaError(f"{run.run.path}: found one {by} only, without which no pair remains, fix: use --by pair")
    return [_Unit(name, np.array(rows), rows) for name, rows in sorted(members.items())]


def _told(run: Opened, optimum: Optimum, units: Sequence[_Unit], found: Influence, by: By) -> dict[str, Any]:
    from coala.convex.influence import copies

    def row(left: Left) -> dict[str, Any]:
        unit = units[left.unit]
        first = run.train.pairs[unit.pairs[0]]
        lines = [j + 1 for j in unit.pairs]
        return {
            "name": unit.name,
            "lines": lines[:20],
            "pairs": len(lines),
            "group": first.group,
            "effect": left.effect,
            "estimate": left.estimate,
            **quoted(first),
        }

    together, contrary = copies(optimum.program.rows)
    others = optimum.left_out_margins
    contrary_to_all = np.argsort(others, kind="stable")[: max(len(found.raises.rows), len(found.lowers.rows))]
    slack = found.slack[np.isfinite(found.slack)]
    return {
        "by": by,
        "units": len(units),
        "pairs": len(run.train.pairs),
        "held_out": len(run.held_out.pairs),
        "lists": {
            side: {
                "rows": [row(one) for one in ranked.rows],
                "proved": ranked.proved,
                "outside": ranked.outside,
            }
            for side, ranked in (("raises", found.raises), ("lowers", found.lowers))
        },
        "contradicted": [
            {"line": int(j) + 1, "margin": float(others[j]), **quoted(run.train.pairs[j])}
            for j in contrary_to_all
            if others[j] < 0
        ],
        "bounds": {
            "bounded": len(slack),
            "median_slack": float(np.median(slack)) if len(slack) else None,
            "largest_slack": float(slack.max()) if len(slack) else None,
            "largest_distance": float(found.distance.max(initial=0.0)),
            "head_from_optimum": optimum.own_distance,
            "gradient_left": optimum.residual,
            "modulus": optimum.program.ridge,
        },
        "copies": {
            "sets": len(together),
            "pairs": sum(map(len, together)),
            "contrary": int(contrary.sum()),
            "lines": [[j + 1 for j in some] for some in together[:10]],
        },
        "refits": found.refits,
        "held": HELD,
        "n_neurons": run.head.n_neurons,
    }


def _poison(run: Opened, optimum: Optimum, attack: int) -> dict[str, Any]:
    """The bounds for a few numbers of pairs, the most pairs that leave a guarantee, and what flips were found to do."""
    from coala.convex.poison import ATTACKS, Poisoning

    rows = optimum.program.design.compared(run.held_out.features)
    poisoning = Poisoning.of(optimum, rows)
    margins = rows @ optimum.weights
    found: dict[str, Any] = {
        "accuracy": float(((margins > 0) + (margins == 0) / 2).mean()),
        "cap": poisoning.cap,
        "bounds": [asdict(poisoning.bound(kind, k)) for kind in ATTACKS for k in POISONED if k < len(optimum)],
        "largest": {kind: poisoning.largest(kind) for kind in ATTACKS},
    }
    if attack:
        if not optimum.program.linear:
            raise CoalaError(
                "found a head with gates, expected a linear one, for which attacks are searched, fix: --attack 0"
            )
        if not 0 < attack < len(optimum):
            raise CoalaError(f"found --attack {attack}, expected less than the {len(optimum)} pairs, fix: use fewer")
        batch = max(1, attack // 50)
        _, accuracies = poisoning.attack(attack, batch=batch, temperature=run.head.temperature)
        found["attack"] = {"k": attack, "batch": batch, "accuracy": accuracies}
    return found


def _lines(units: Sequence[_Unit], found: Influence) -> list[dict[str, Any]]:
    return [
        {
            "name": unit.name,
            "lines": [j + 1 for j in unit.pairs],
            "change": float(found.change[k]),
            "within": float(found.slack[k]) if np.isfinite(found.slack[k]) else None,
            "weights_move_at_most": float(found.distance[k]) if np.isfinite(found.distance[k]) else None,
        }
        for k, unit in enumerate(units)
    ]
