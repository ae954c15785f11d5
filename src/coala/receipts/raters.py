"""Who agrees with whom: raters, sources or groups of a head's pairs, and a head for each that deviates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from coala.callbacks import OnNote, quiet
from coala.costs import Stopwatch
from coala.receipts.opened import opened
from coala.report.receipts import add_receipt
from coala.statistics.scores import accuracy_difference
from coala.store import (
    file_digest,
    load_features,
    load_head,
    load_pairs,
    save_json,
    save_rater_heads,
)
from coala.values import Certificate, CoalaError, ConvexHead, FeatureSet, Pair, prompt_id

if TYPE_CHECKING:
    from coala.convex.raters import RaterFit, Raters

By = Literal["rater", "source", "group"]
ORDER = ("reversed", "random", "consistent", "undecided")


@dataclass(frozen=True)
class _Side:
    """Pairs with the name of who or what each is of, empty where none is known, and its prompt."""

    features: FeatureSet
    names: NDArray[np.str_]
    prompts: NDArray[np.str_]

    @classmethod
    def of(cls, features: FeatureSet, pairs: Sequence[Pair], by: By) -> _Side:
        names = [pair.rater if by == "rater" else pair.source if by == "source" else pair.group for pair in pairs]
        # Raters are compared over groups, which are of one prompt or dialogue; groups, over their prompts.
        prompts = [prompt_id(pair.prompt) for pair in pairs] if by == "group" else features.group
        return cls(features, np.array(names, dtype=object), np.asarray(prompts, dtype=str))


@dataclass(frozen=True)
class _Found:
    record: dict[str, Any]
    numbers: dict[str, int]
    heads: list[ConvexHead]


def rater_effects(path: Path | str, *, by: By = "rater", on_note: OnNote | None = None) -> dict[str, Any]:
    """Which raters, sources or groups of the run at ``path`` agree with the others, and the heads of those who deviate.

    One convex program of a shared head and a deviation for each, at the level that exchangeable raters exceed with a
    probability of at most 5 %; and for each the slope of a head of the others on its own choices, cross-fitted, with an
    interval, as a verdict that holds for all at once. Heads are kept beside the run's (``guidance.rater``), the record
    in RUN/receipts and in the report.

    Raises:
        CoalaError: for pairs that name nobody or one only, and as :func:`~coala.receipts.pair_influence` does.
    """
    note = quiet if on_note is None else on_note
    with Stopwatch() as watch:
        run = opened(path)
        if run.train.prefixes > 1:
            raise CoalaError(
                f"found {run.train.prefixes} prefixes to a pair, expected whole replies, by which raters are compared, "
                "fix: align with --prefixes 1"
            )
        with run.run.held():
            sides = [_Side.of(side.features, side.pairs, by) for side in (run.train, run.held_out)]
            scale, seed = run.recipe.head.reference_scale, run.recipe.seed
            found = _found(sides[0], sides[1], run.head, by, str(run.run.path), scale, seed)
            record = _kept(found, run.run.path / "head", watch)
            add_receipt(run.run, record, name=f"raters-by-{by}")
    _tell(record, note)
    return record


def rater_effects_of(
    features: Path, out: Path, *, by: By, pairs: Path | None = None, seed: int = 0, on_note: OnNote | None = None
) -> dict[str, Any]:
    """The same for the head in the folder ``out``, fitted on the folder ``features``; the record is kept there too.

    Names are those of ``pairs``, a file as ``coala align`` writes it, with a line for each row of features; without it
    of the run whose features they are. Groups need neither.

    Raises:
        CoalaError: also for a file of pairs that is not there or has another number of lines.
    """
    note = quiet if on_note is None else on_note
    with Stopwatch() as watch:
        data, head = load_features(features, mmap=True), load_head(out)
        beside = Path(features).resolve().parent.parent / f"pairs-{Path(features).resolve().name}.jsonl"
        source = beside if pairs is None else pairs
        if pairs is None and by == "group" and not beside.is_file():
            side = _Side(data, data.group.astype(object), np.arange(len(data)).astype(str))
        else:
            if not source.is_file():
                raise CoalaError(
                    f"{source}: found no file of pairs, expected the one the features are of, fix: give it with --pairs"
                )
            known = load_pairs(source)
            if len(known) != len(data):
                raise CoalaError(
                    f"{source}: found {len(known)} pairs, expected one for each of {len(data)} rows of {features}, "
                    "fix: give the pairs the features are of"
                )
            side = _Side.of(data, known, by)
        found = _found(side, None, head, by, str(source if side.names is not data.group else features), None, seed)
        record = _kept(found, out, watch)
        save_json(Path(out) / f"raters-by-{by}.json", record)
    _tell(record, note)
    return record


def _kept(found: _Found, folder: Path, watch: Stopwatch) -> dict[str, Any]:
    """The record with its date; the heads are saved beside that of ``folder``."""
    by = found.record["by"]
    about = {name: found.record[name] for name in ("level", "relaxation", "objective", "lower_bound")}
    unlike = [
        row["name"] for row in found.record["rows"] if row["verdict"] in ("reversed", "random") and not row["deviates"]
    ]
    save_rater_heads(folder, by, found.numbers, found.heads, unlike=unlike, about=about)
    return found.record | {
        "kind": "raters",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "head": file_digest(folder / "head.safetensors"),
        "heads_digest": file_digest(folder / f"{by}s.safetensors"),
        "seconds": watch.seconds,
    }


def _tell(record: Mapping[str, Any], note: OnNote) -> None:
    if record["unnamed"]:
        note(
            f"{record['unnamed']} of {record['pairs'] + record['held_out']} pairs name no {record['by']}: they count "
            "among the others"
        )
    if record["at_chance"]:
        note("the head of the others is not distinguishable from chance, so raters cannot be compared")


# --- the computation -----------------------------------------------------------------------------------------------


def _found(
    train: _Side, held_out: _Side | None, head: ConvexHead, by: By, where: str, scale: float | None, seed: int
) -> _Found:
    everyone = train.names if held_out is None else np.concatenate([train.names, held_out.names])
    names = sorted(set(everyone.tolist()) - {""})
    if not names:
        raise CoalaError(f"{where}: found no pair that names its {by}, expected some, fix: {_columns(by)}")
    if len(names) < 2:
        raise CoalaError(f"{where}: found one {by} only, expected two or more to compare, fix: {_columns(by)}")
    number = {name: k for k, name in enumerate(names)}

    def members(side: _Side) -> NDArray[np.intp]:
        return np.array([number.get(name, -1) for name in side.names.tolist()], np.intp)

    from coala.convex.held import HeldProgram
    from coala.convex.raters import DRAWS, Raters
    from coala.convex.raters_agreement import MISS, HeldRows, agreements

    held = HeldProgram.of(train.features, head, reference_scale=scale)
    raters = Raters.of(held, members(train), len(names))
    places = np.unique(train.prompts, return_inverse=True)[1]
    level, within = raters.null_level(places, seed=seed)
    fit = raters.fit(level)
    rest = None
    if held_out is not None and len(held_out.features):
        rows = raters.compared(held.design.compared(held_out.features))
        rest = HeldRows(rows, members(held_out), held_out.prompts)
    judged = agreements(raters, train.prompts, rest, seed=seed)
    weighed, margins = raters.relaxed(fit, train.prompts, seed)
    heads, gains = _heads(raters, weighed, margins, head, train.prompts, seed)
    size = float(np.linalg.norm(weighed.weights))
    others = [0] * len(names) if rest is None else np.bincount(rest.member[rest.member >= 0], minlength=len(names))
    rows_told = []
    for k, (name, one) in enumerate(zip(names, judged, strict=True)):
        deviates = k in fit.own
        told = {"name": name, "pairs": int(raters.sizes[k]), "held_out": int(others[k]), **asdict(one)}
        told |= {"deviates": deviates, "gradient_over_level": float(fit.norms[k])}
        told["deviation"] = float(np.linalg.norm(weighed.of(k) - weighed.weights) / size) if deviates and size else 0.0
        rows_told.append(told | ({"own_head": gains[k]} if k in gains else {}))
    rows_told.sort(key=lambda row: (ORDER.index(row["verdict"]), not row["deviates"], -row["n"], row["name"]))
    record = {
        "by": by,
        "rows": rows_told,
        "verdicts": {verdict: sum(row["verdict"] == verdict for row in rows_told) for verdict in ORDER},
        "pairs": len(train.names),
        "held_out": 0 if rest is None else len(rest.rows),
        "unnamed": int((everyone == "").sum()),
        "at_chance": all(np.isnan(one.slope) for one in judged),
        "judged": sum(one.n > 0 for one in judged),
        "miss": MISS,
        "level": level,
        "draws": DRAWS,
        "exchanged_within": within,
        "deviating": len(fit.own),
        "relaxation": weighed.level / level if level else 1.0,
        "objective": weighed.objective,
        "lower_bound": weighed.lower,
        "relative_gap": max(fit.relative_gap, weighed.relative_gap),
    }
    numbers = {name: 1 + int(np.flatnonzero(fit.own == k)[0]) if k in fit.own else 0 for k, name in enumerate(names)}
    return _Found(record, numbers, heads)


def _heads(
    raters: Raters,
    fit: RaterFit,
    margins: NDArray[np.float64] | None,
    head: ConvexHead,
    prompts: NDArray[np.str_],
    seed: int,
) -> tuple[list[ConvexHead], dict[int, dict[str, Any]]]:
    """The shared head and those of the raters that may deviate, with their own temperatures; none where nobody does.

    And by rater what the own head ranks right of the own pairs, with their prompts left out, beside the shared one.
    """
    from coala.convex.calibration import fit_temperature, least_slope

    if fit.only is None or not len(fit.only):
        return [], {}
    made, gains = [], {}
    for rater in (-1, *fit.only.tolist()):
        mine = raters.member == rater if rater >= 0 else ~np.isin(raters.member, fit.only)
        temperature, slope = 1.0, None
        if margins is not None and mine.any():
            own = margins[int(rater >= 0), mine]
            temperature = fit_temperature(own)
            slope = min(least_slope(own, prompts[mine]), 1 / temperature)
        one = replace(raters.head(fit.of(rater)), temperature=temperature, least_slope=slope)
        made.append(replace(one, certificate=_certificate(raters, fit, head, rater >= 0, seed)))
        if margins is not None and rater >= 0:
            shared, own = margins[:, mine]
            right = [float(((x > 0) + (x == 0) / 2).mean()) for x in (shared, own)]
            difference = accuracy_difference(own, shared, prompts[mine])
            gains[rater] = {"accuracy": right[1], "accuracy_shared": right[0], "difference": difference}
    return made, gains


def _certificate(raters: Raters, fit: RaterFit, head: ConvexHead, own: bool, seed: int) -> Certificate:
    whose = "the shared head and this rater's deviation" if own else "the shared head, deviations set apart"
    facts = {} if head.certificate is None else head.certificate.facts
    return Certificate(
        program=f"shared head, {len(fit.own)} deviations of {raters.count} raters, {raters.held.n_neurons} gates held",
        statement=(
            f"Weights of {whose}: no other shared head and deviations lower the objective of all raters together by "
            f"more than {fit.relative_gap:.1e} of it, proved by duality, in double precision, gates and ridge held."
        ),
        objective=fit.objective,
        lower_bound=fit.lower,
        violation=0.0,
        n_patterns=raters.held.n_neurons,
        status="converged" if fit.relative_gap <= 1e-6 else "stalled",
        tolerance=1e-6,
        precision="float64",
        seed=seed,
        versions={name: version(name) for name in ("jax", "numpy")},
        facts={**{name: facts.get(name) for name in ("method", "gate_on", "ridge", "sparsity")}, "level": fit.level},
    )


def _columns(by: By) -> str:
    if by == "group":
        return "name groups in a column `group`"
    fields = {"rater": "`rater`, `annotator` or `worker_id`", "source": "`dataset`, `domain` or `source`"}
    return f"name them in a column {fields[by]}, or use --by group"
