"""Pairs taken out of a finished run: an exact refit of its head, their features destroyed, and a receipt.

All new files are prepared beside the run's and then put in their places at once (``coala.store.replacing``): killed at
any moment, the run is the old one or the new one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coala.alignment import make_report
from coala.alignment.fitting import fit_settings
from coala.callbacks import OnNote, quiet
from coala.costs import Stopwatch
from coala.receipts.claims import NOT_CLAIMED, WRITTEN, claimed, remnants, shared, stale
from coala.receipts.opened import Opened, chosen_pairs, opened, require_known
from coala.store import (
    Replacement,
    RunFolder,
    file_digest,
    load_object,
    pair_digest,
    replacing,
    save_features,
    save_head,
    save_json,
    save_pairs,
)
from coala.store.run import FORGOTTEN
from coala.values import CoalaError, ConvexHead, FeatureSet, Pair

RECORDED = (
    *("pairs-train.jsonl", "pairs-eval.jsonl", "features/train/features.safetensors", "features/train/features.json"),
    *("features/eval/features.safetensors", "features/eval/features.json", "head/head.safetensors", "head/head.json"),
    "head/fit.json",
)


@dataclass(frozen=True)
class _Refit:
    """A new head with what ``head/fit.json`` says of it, and what became of the weights."""

    head: ConvexHead
    fitted: dict[str, Any]
    facts: dict[str, Any]


def forget_pairs(
    path: Path | str,
    *,
    groups: Sequence[str] = (),
    raters: Sequence[str] = (),
    pairs: Iterable[Pair] = (),
    lines: Sequence[int] = (),
    from_scratch: bool = False,
    cache: Path | None = None,
    on_note: OnNote | None = None,
) -> dict[str, Any]:
    """Take pairs out of the run at ``path`` for good, and return the receipt, kept in RUN/receipts.

    All pairs of ``groups`` and ``raters``, those that say what one of ``pairs`` says, to fit and held out alike, and
    the ``lines`` of pairs-train.jsonl. The head is refitted exactly on the others, at the ridge and with the gates that
    validation chose before; with ``from_scratch`` validation chooses again, as a fit would that never saw the pairs.
    Features of the folder ``cache`` that hold the pairs are deleted as well.

    Raises:
        CoalaError: for names and pairs that are not there, for nothing to forget, for a side that would be left empty,
            and as :func:`pair_influence` does.
    """
    note = quiet if on_note is None else on_note
    held = RunFolder.open(path)
    with held.held(), Stopwatch() as watch:
        run = opened(path)
        asked = list(pairs)
        gone = _selected(run, groups, raters, asked, lines)
        before = _digests(run.run.path)
        refit = _refitted(run, gone["train"], from_scratch) if gone["train"].any() else None
        receipt = _receipt(run, gone, refit, from_scratch, before)
        entries = _cached(cache, before)
        receipt["not_claimed"] += shared(run.run.path, entries)
        with replacing(run.run.path) as new:
            _write(new, run, gone, refit, receipt, watch)
        for entry in entries:
            _delete_entry(entry)
        make_report(run.run)
    for line in receipt["stale_files"]:
        note(f"stale: {line}")
    return receipt


def _selected(
    run: Opened, groups: Sequence[str], raters: Sequence[str], pairs: Sequence[Pair], lines: Sequence[int]
) -> dict[str, NDArray[np.bool_]]:
    """Which pairs of each side go."""
    require_known(run, groups, raters, pairs)
    gone = {side.name: chosen_pairs(side, groups, raters, pairs) for side in (run.train, run.held_out)}
    for line in lines:
        if not 1 <= line <= len(run.train.pairs):
            raise CoalaError(
                f"found line {line}, expected one of pairs-train.jsonl, 1 to {len(run.train.pairs)}, fix: choose one "
                "of these"
            )
        gone["train"][line - 1] = True
    if not any(some.any() for some in gone.values()):
        raise CoalaError("found nothing to forget, expected a group, a rater or pairs, fix: name some")
    for side, what in ((run.train, "to fit on"), (run.held_out, "to measure on")):
        if len(side.pairs) and gone[side.name].all():
            raise CoalaError(
                f"found all {len(side.pairs)} pairs {what} among those to forget, expected that some remain, fix: "
                f"delete {run.run.path} instead, and align other pairs"
            )
    return gone


# --- the head ----------------------------------------------------------------------------------------------------


def _refitted(run: Opened, gone: NDArray[np.bool_], from_scratch: bool) -> _Refit:
    remaining = run.train.features.take(~run.train.rows(gone))
    old, scale = run.head, run.recipe.head.reference_scale
    if from_scratch:
        return _fitted_from_scratch(run, remaining)
    from coala.convex.forgetting import forget

    found = forget(remaining, old, reference_scale=scale, seed=run.recipe.seed)
    linear = found.head
    if old.n_neurons:
        certificate = old.certificate
        assert certificate is not None
        none = old.gates[:0]
        alone = replace(old, gates=none, weights=none, certificate=certificate)
        linear = forget(remaining, alone, reference_scale=scale, seed=run.recipe.seed).head
    fitted = {"path": [found.row], "history": found.history, "linear": linear.linear}
    facts = {
        "how": "refitted exactly on the remaining pairs; ridge and gates are those chosen before",
        "gap_before": found.gap_before,
        "gap_after": found.gap_after,
        "distance": found.distance,
        "bound": found.bound if np.isfinite(found.bound) else None,
    }
    if old.n_neurons:
        facts["beside"] = _beside(run, remaining, found.head)
    return _Refit(found.head, fitted, facts)


def _beside(run: Opened, remaining: FeatureSet, held: ConvexHead) -> dict[str, Any]:
    """What gates that were chosen again would have come to, beside those that were held."""
    other = _fitted_from_scratch(run, remaining).head
    held_out = run.held_out.features
    apart = np.abs(other.margins(held_out) / other.temperature - held.margins(held_out) / held.temperature)
    return {
        "n_neurons": other.n_neurons,
        "accuracy": float((other.margins(held_out) > 0).mean()),
        "accuracy_held": float((held.margins(held_out) > 0).mean()),
        "log_odds_apart": float(apart.max(initial=0.0)),
    }


def _fitted_from_scratch(run: Opened, remaining: FeatureSet) -> _Refit:
    """The fit that never saw the pairs: the same features, settings and seed give the same bytes."""

    def fitted(linear: bool = False) -> Any:
        return fit_settings(
            remaining,
            run.recipe.head,
            seed=run.recipe.seed,
            near=run.run.path / "features",
            on_step=lambda stage, step, total: None,
            linear=linear,
        )

    from coala.convex.held import HeldProgram

    result = fitted()
    control = result.head if not result.head.n_neurons else fitted(linear=True).head
    facts: dict[str, Any] = {
        "how": "refitted from scratch on the remaining pairs: ridge, gates and temperature included",
        "gap_before": None,
        "gap_after": None if result.head.certificate is None else result.head.certificate.relative_gap,
        "distance": None,
        "bound": None,
    }
    if not result.head.n_neurons and not run.head.n_neurons and result.head.certificate is not None:
        program = HeldProgram.of(remaining, result.head, reference_scale=run.recipe.head.reference_scale)
        before = program.design.unfolded(run.head)
        slopes, left = (program.gradient(weights, program.even) for weights in (before, program.saved))
        objective, lower = program.bounds(before, program.even)
        facts |= {
            "gap_before": (objective - lower) / objective,
            "distance": float(np.linalg.norm(program.saved - before)),
            "bound": float(np.linalg.norm(slopes) + np.linalg.norm(left)) / program.ridge,
        }
    about = {"path": result.path, "history": result.history, "linear": control.linear}
    return _Refit(result.head, about, facts)


# --- files -------------------------------------------------------------------------------------------------------


def _write(
    new: Replacement,
    run: Opened,
    gone: dict[str, NDArray[np.bool_]],
    refit: _Refit | None,
    receipt: dict[str, Any],
    watch: Stopwatch,
) -> None:
    """All files of the new run that differ from the old one's."""
    here = run.run.path
    for side in (run.train, run.held_out):
        lost = gone[side.name]
        if lost.any():
            save_pairs(
                new.path(f"pairs-{side.name}.jsonl"), [p for p, out in zip(side.pairs, lost, strict=True) if not out]
            )
            save_features(new.path(f"features/{side.name}"), side.features.take(~side.rows(lost)))
    if refit is not None:
        save_head(new.path("head"), refit.head)
        save_json(new.path("head/fit.json"), refit.fitted)
    _write_own_source(new, run, receipt)
    for stage in ("pairs", "features-train", "features-eval", "head"):
        _write_stage(new, run, stage, receipt)
    save_json(new.path(FORGOTTEN), {"pairs": sorted({*run.run.forgotten, *receipt["pairs"]})})
    receipts = sorted((here / "receipts").glob("*.json"))
    new.delete(WRITTEN)
    new.delete(f"receipts/{p.name}" for p in receipts if p.name.startswith(("influence-", "raters-")))
    new.delete(p.relative_to(here).as_posix() for p in here.rglob(".*.tmp") if ".pending" not in p.parts)
    receipt["digests"]["after"] = {
        name: file_digest(path)
        for name in RECORDED
        for path in ([new.path(name)] if new.path(name).exists() else [here / name])
        if path.exists()
    }
    receipt["head"] = receipt["digests"]["after"]["head/head.safetensors"]
    receipt["seconds"] = watch.seconds
    number = 1 + sum(p.name.startswith("forget-") for p in receipts)
    save_json(new.path(f"receipts/forget-{number:04d}.json"), receipt)


def _write_own_source(new: Replacement, run: Opened, receipt: dict[str, Any]) -> None:
    """Pairs that ``coala.align`` was given as objects lie beside the run in a file of ours: they go there too."""
    from coala.store import load_pairs

    own = Path(f"{run.run.path}.pairs.jsonl")
    if not own.is_file() or str(own.resolve()) not in {str(Path(source).resolve()) for source in run.recipe.pairs}:
        return
    there = set(receipt["pairs"])
    target = new.elsewhere(own)
    save_pairs(target, [pair for pair in load_pairs(own) if pair_digest(pair) not in there])
    receipt["digests"]["after_source"] = file_digest(target)


def _write_stage(new: Replacement, run: Opened, stage: str, receipt: dict[str, Any]) -> None:
    """The record of a stage, done on what remains: `coala align` then does not do it again."""
    record = run.run.record(stage)
    if record is None:
        return
    here = run.run.path

    def digest_of(name: str) -> str:
        return file_digest(new.path(name) if new.path(name).exists() else here / name)

    inputs, facts = dict(record["inputs"]), dict(record["facts"] or {})
    if stage == "pairs":
        facts |= {"n_train": receipt["remaining_train"], "n_eval": receipt["remaining_held_out"]}
        told = f"{receipt['removed']} pairs were forgotten; what was found in the data before that is not kept."
        facts["findings"] = [{"severity": "note", "text": told}]
        own = receipt["digests"].get("after_source")
        if own is not None:
            inputs["pairs"] = [own if len(inputs["pairs"]) == 1 else one for one in inputs["pairs"]]
    elif stage.startswith("features-"):
        inputs["pairs"] = digest_of(f"pairs-{stage.removeprefix('features-')}.jsonl")
        # An example of how the model reads a conversation is quoted from the first pair.
        facts["reads"] = [line for line in facts.get("reads", []) if not str(line).startswith("example: ")]
        facts.pop("reused", None)
    else:
        inputs["features"] = digest_of("features/train/features.safetensors")
    outputs = {name: digest_of(name) for name in record["outputs"]}
    save_json(new.path(f"stages/{stage}.json"), {"inputs": inputs, "outputs": outputs, "facts": facts})


def _cached(cache: Path | None, before: dict[str, str]) -> list[Path]:
    """Folders of the cache of features that hold what this run's features held."""
    if cache is None:
        return []
    held = {before[f"features/{part}/features.safetensors"] for part in ("train", "eval")}
    return [
        about.parent
        for about in sorted(Path(cache).glob("*/features.json"))
        if load_object(about).get("sha256") in held
    ]


def _delete_entry(entry: Path) -> None:
    from coala.store import discard

    discard(entry / "features.json")  # first: it is what says that the others are there
    discard(entry)


# --- the receipt -------------------------------------------------------------------------------------------------


def _digests(run: Path) -> dict[str, str]:
    return {name: file_digest(run / name) for name in RECORDED if (run / name).exists()}


def _receipt(
    run: Opened, gone: dict[str, NDArray[np.bool_]], refit: _Refit | None, from_scratch: bool, before: dict[str, str]
) -> dict[str, Any]:
    left = {side.name: side.features.take(~side.rows(gone[side.name])) for side in (run.train, run.held_out)}
    removed = [
        pair for side in (run.train, run.held_out) for pair, out in zip(side.pairs, gone[side.name], strict=True) if out
    ]
    certificate = run.head.certificate
    moved = 0.0
    if refit is not None and len(left["eval"]):
        moved = float(np.abs(refit.head.margins(left["eval"]) - run.head.margins(left["eval"])).max())
    facts = (
        refit.facts
        if refit is not None
        else {"how": "held-out pairs only: the head never saw them", "gap_before": None, "gap_after": None}
        | {"distance": 0.0, "bound": 0.0}
    )
    return {
        "kind": "forget",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "removed": len(removed),
        "removed_train": int(gone["train"].sum()),
        "removed_held_out": int(gone["eval"].sum()),
        "remaining_train": int((~gone["train"]).sum()),
        "remaining_held_out": int((~gone["eval"]).sum()),
        "pairs": sorted({pair_digest(pair) for pair in removed}),
        "from_scratch": from_scratch,
        "head_changed": refit is not None,
        "certified_gap_before": None if certificate is None else certificate.relative_gap,
        **facts,
        "margins_moved": moved,
        "digests": {"before": before, "after": {}},
        "claimed": claimed(run.run.path, refit is not None, from_scratch),
        "not_claimed": [*NOT_CLAIMED, *remnants(run, refit is not None, from_scratch)],
        "stale_files": stale(run.run.path, refit is not None),
    }
