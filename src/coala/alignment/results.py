"""What a finished run holds, put together: its model and head for decoding, its values for the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coala import evaluation
from coala.recipe import Recipe, recipe_of
from coala.report import write_report
from coala.statistics import scores
from coala.store import (
    DISTILLED,
    RunFolder,
    StoreError,
    file_digest,
    load_features,
    load_generations,
    load_head,
    load_json,
    load_judgements,
    load_object,
    load_pairs,
    read_as,
)
from coala.values import CoalaError, Estimate, prompt_id

if TYPE_CHECKING:
    from coala.values import ConvexHead, Judgement


def make_report(run: RunFolder) -> dict[str, Any]:
    """Put the run's saved values together as a report, write it, and return its content (see ``coala.report``)."""
    recipe = recipe_of(run.settings, run.path / "run.json")
    train, held_out = load_features(run.path / "features/train"), load_features(run.path / "features/eval")
    head, fitted = load_head(run.path / "head"), load_json(run.path / "head/fit.json")
    pairs = load_pairs(run.path / "pairs-eval.jsonl")
    if len(pairs) != len(held_out):
        raise StoreError(
            f"{run.path}: pairs-eval.jsonl has {len(pairs)} pairs, features/eval {len(held_out)}: align again."
        )
    certificate = head.certificate
    margins = head.margins(held_out)
    preferences = head.preference(held_out.chosen, held_out.rejected, held_out.prompt)
    reliable = scores.reliability(preferences, held_out.group, seed=recipe.seed)
    with read_as("what a fit reports", run.path / "head/fit.json"):
        linear = np.asarray(fitted["linear"], np.float32)
        curves, path = _curves(fitted["history"]), fitted["path"]
    linear_margins = (held_out.chosen - held_out.rejected) @ linear[:-1]
    facts = {stage: run.facts(stage) for stage in _recorded(run)}
    if "pairs" not in facts:
        raise StoreError(f"{run.path}: stages/pairs.json is missing, so its stages are unknown. Fix: align again.")
    lengths = [len(pair.chosen) - len(pair.rejected) for pair in pairs]
    accuracy = scores.accuracy_of_margins
    seconds = sum(fact["seconds"] for fact in facts.values())
    summary: dict[str, Any] = {
        "n_train": len(train) // recipe.model.prefixes,
        "n_eval": len(held_out),
        "accuracy_eval": accuracy(margins, held_out.group),
        "accuracy_train": accuracy(head.margins(train), train.group),
        "linear_accuracy_eval": accuracy(linear_margins, held_out.group),
        "gain_over_linear": scores.accuracy_difference(margins, linear_margins, held_out.group),
        "nll_eval": scores.pairwise_nll(margins / head.temperature, held_out.group),
        "calibration_error": reliable.error,
        "program": None if certificate is None else certificate.program,
        "certified_gap": None if certificate is None else certificate.relative_gap,
        "statement": None if certificate is None else certificate.statement,
        "seconds": seconds,
        "gflops": sum(fact.get("flops", 0) for fact in facts.values()) / 1e9,
    }
    choice = _layer_choice(run) if recipe.model.layer == "auto" else {}
    if choice:
        summary["layer"] = choice["told"]
    content: dict[str, Any] = {
        "title": f"{Path(recipe.model.name).name}: {len(train)} pairs",
        "command": f"coala align --recipe {run.path / 'run.json'} --out NEW",
        "run": run.path,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": run.settings,
        "summary": summary,
        "reads": facts.get("features-train", {}).get("reads", []),
        "data_findings": facts["pairs"]["findings"],
        "head": {
            "certificate": None
            if certificate is None
            else {**asdict(certificate), "gap": certificate.gap, "relative_gap": certificate.relative_gap},
            "n_neurons": head.n_neurons,
            "gate_on": head.gate_on,
            "temperature": head.temperature,
            "least_slope": head.least_slope,
            "spec": asdict(head.spec),
        },
        "curves": curves,
        "layers": choice.get("scores", []),
        "path": _marked(path, {} if certificate is None else certificate.facts),
        "scores": {name: head.score(getattr(held_out, name), held_out.prompt) for name in ("chosen", "rejected")},
        "reliability": reliable,
        "by_length": scores.by_length_difference(margins, lengths, held_out.group),
        "costs": [
            {"stage": stage, **{k: fact[k] for k in ("seconds", "flops", "flops_bound", "peak_bytes") if k in fact}}
            for stage, fact in facts.items()
        ],
    }
    replies = {name: run.path / f"generations-{name}.jsonl" for name in ("unguided", "guided")}
    if all(path.exists() for path in replies.values()):
        texts = {name: load_generations(path) for name, path in replies.items()}
        content["perplexity"] = {
            name: scores.perplexity([g.log_prob for g in some], [g.n_tokens for g in some])
            for name, some in texts.items()
            if some
        }
        if [g.prompt_id for g in texts["unguided"]] != [g.prompt_id for g in texts["guided"]]:
            raise StoreError(
                f"{run.path}: its files of generations answer different prompts. Fix: delete them and align again."
            )
        prompts = {prompt_id(pair.prompt): pair.prompt for pair in pairs}
        content["samples"] = [
            {
                "prompt": prompts[plain.prompt_id],
                "unguided": plain.text,
                "guided": guided.text,
                "scores": {"unguided": plain.score, "guided": guided.score},
            }
            for plain, guided in zip(texts["unguided"], texts["guided"], strict=True)
        ][:10]
    rates = []
    for name, text in (("judge", recipe.evaluation.judge), ("labeller", recipe.evaluation.labeller)):
        if text is not None and (path := run.path / f"judgements-{name}.jsonl").exists():
            judgements = load_judgements(path)
            called, about = _judge_name(text, judgements)
            comment = f"{ROLES[name]}. {about}".strip()
            rates.append({"judge": called, "estimate": evaluation.win_rate(judgements), "comment": comment})
    content["win_rates"] = rates
    content["policy"] = _policy(run, recipe, head)
    content["distilled"] = distilled_beside(run)
    write_report(run, content)
    return content


ROLES = {
    "judge": "The judge named in the settings",
    "labeller": "The scorer that labelled the training pairs: shows only whether guidance reached its goal",
}


def _layer_choice(run: RunFolder) -> dict[str, Any]:
    """How the layer was chosen; of a run of before that kept its table alone, that."""
    path = run.path / "layer.json"
    found = load_json(path) if path.exists() else {}
    if isinstance(found, list):
        return {"scores": found, "told": "--layer auto"}
    return load_object(path, "scores", "told") if found else {}


def _policy(run: RunFolder, recipe: Recipe, head: ConvexHead) -> dict[str, Any] | None:
    """Policy accuracy with what it rests on, or why it is ``unknown``; None where replies were not asked for."""
    from coala.alignment.parts import guidance_of
    from coala.alignment.policy import Guided

    path = run.path / "policy.json"
    if path.exists():
        return load_object(path, "accuracy", "note")
    guidance = guidance_of(recipe)
    if not recipe.evaluation.prompts:
        return None
    if not (guidance.active or guidance.change) and guidance.samples:
        return {"unknown": "guidance is off, so every log-ratio is 0"}
    unknown = Guided(head, guidance, recipe.evaluation.temperature).unknown
    return {"unknown": unknown} if unknown else None


def distilled_beside(run: RunFolder) -> dict[str, Any]:
    """The distilled policy beside the run's replies, ``stale`` if another policy has taken its place since."""
    path = run.path / DISTILLED / "side_by_side.json"
    if not path.exists():
        return {}
    found: dict[str, Any] = load_object(path)
    there = run.path / DISTILLED / "policy.safetensors"
    return {**found, "stale": "policy" in found and not (there.exists() and file_digest(there) == found["policy"])}


def _judge_name(text: str, judgements: Sequence[Judgement]) -> tuple[str, str]:
    """The judge's name and what its file says about it; the file may be gone by now, and then its verdicts tell."""
    from coala.alignment.judges import judge_name

    try:
        return judge_name(text)
    except CoalaError:
        return judgements[0].judge if judgements else text, ""


def _marked(path: list[dict[str, Any]], facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The path with the row that the head was fitted with ``selected``; a linear row speaks of no gates."""
    names = {"tau": "ridge", "gate_on": "gate_on", "relaxation": "relaxation"}

    def selected(row: Mapping[str, Any]) -> bool:
        same = row.get("beta_rel") == facts.get("sparsity_relative")
        return same and all(row[key] == facts.get(fact) for key, fact in names.items() if row.get(key) is not None)

    return [{**row, "selected": selected(row)} for row in path]


def _curves(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Reward margins in units of their own standard deviation, and the gap, by solver step."""
    margins = [
        {"step": row["step"], "train": row["margin_ratio_train"], "eval": row["margin_ratio_held_out"]}
        for row in history
        if "margin_ratio_train" in row
    ]
    solver = [{"step": i, "gap": row["gap"], "objective": row["objective"]} for i, row in enumerate(history)]
    return {"margin": margins, "solver": solver}


def summary_rows(content: dict[str, Any]) -> list[list[str]]:
    """The short table a command prints."""
    summary = content["summary"]

    rows = [
        ["pairs", f"{summary['n_train']} to fit, {summary['n_eval']} held out"],
        ["ranking accuracy", against_chance(summary["accuracy_eval"])],
        ["a linear head", against_chance(summary["linear_accuracy_eval"])],
        ["NLL per pair", _nll(summary["nll_eval"])],
        [
            "calibration error",
            calibration(summary["calibration_error"], getattr(content.get("reliability"), "error_by_chance", math.nan)),
        ],
        ["neurons", f"{content['head']['n_neurons']}{_gates(content['head'])}"],
        ["certified gap", _gap(summary["certified_gap"])],
        ["seconds", f"{summary['seconds']:.1f}"],
        ["GFLOPs", f"{summary['gflops']:,.1f}"],
    ]
    if "layer" in summary:
        rows.insert(1, ["layer", summary["layer"].removeprefix("--layer auto: layer ")])
    rows += [[f"guided wins ({r['judge']})", against_chance(r["estimate"])] for r in content.get("win_rates", [])]
    for name, value in content.get("perplexity", {}).items():
        rows.append([f"perplexity, {name}", f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}], n = {value.n}"])
    if policy := content.get("policy"):
        rows.append(["policy accuracy", policy.get("unknown") or against_chance(Estimate(**policy["accuracy"]))])
        rows += [["ranked by what", policy["note"]]] if policy.get("note") else []
    return rows


def _percent(estimate: Estimate) -> str:
    """``46.7 % [24.8, 69.9], n = 15``, or that nothing is known and why."""
    if not estimate.n or not math.isfinite(estimate.value):
        return "unknown: there is nothing to compare it with" + (f" ({estimate.method})" if estimate.method else "")
    value, low, high = (100 * end for end in (estimate.value, estimate.low, estimate.high))
    groups = ", all of one group" if "one group" in estimate.method else ""
    return f"{value:.1f} % [{low:.1f}, {high:.1f}], n = {estimate.n}{groups}"


def against_chance(estimate: Estimate) -> str:
    """The same of a share that a coin would have at one half."""
    told = _percent(estimate)
    if told.startswith("unknown"):
        return told
    if estimate.low > 0.5:
        return f"{told}: better than chance"
    if estimate.high < 0.5:
        return f"{told}: worse than chance"
    return f"{told}: not distinguishable from chance (50 %)"


def calibration(error: Estimate, by_chance: float) -> str:
    """The error beside 0, and beside what faultless probabilities would have by chance on so few pairs."""
    told = _percent(error)
    if told.startswith("unknown") or not math.isfinite(by_chance):
        return told
    return f"{told} (perfect: 0 %; on so few pairs {100 * by_chance:.1f} % by chance alone)"


def _nll(loss: Estimate) -> str:
    if not loss.n or not math.isfinite(loss.value):
        return "unknown"
    coin = math.log(2)
    told = f"{loss.value:.3f} [{loss.low:.3f}, {loss.high:.3f}] (perfect: 0; a coin: {coin:.3f}"
    return f"{told}, within the interval)" if loss.low <= coin <= loss.high else f"{told})"


def _gates(head: Mapping[str, Any]) -> str:
    return f", gates on the {head['gate_on']}" if head["n_neurons"] else " (linear)"


def _gap(gap: float | None) -> str:
    return "none" if gap is None else f"{gap:.1e} of the objective"


def _recorded(run: RunFolder) -> list[str]:
    order = (
        "pairs",
        "layer",
        "features-train",
        "features-eval",
        "head",
        "replies-unguided",
        "replies-guided",
        "policy",
        "distil",
    )
    return [stage for stage in order if (run.path / "stages" / f"{stage}.json").exists()]
