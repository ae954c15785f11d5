"""Cells of the baselines: try learning rates on held-out training pairs, train at the best, measure on the test pairs.

The rate is chosen by the ranking accuracy of the method's own reward on validation pairs (of equals by the calibrated
loss, then the lower rate), with the first seed; other seeds train at it. Of SFT on guided replies it is the one under
which guided replies to other prompts are likeliest. Test pairs decide nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from coala.compare.cell_context import PER_TOKEN, SUM, CellContext, Costs, measured_margins
from coala.compare.lessons import guided_pairs, teaching
from coala.compare.study import Study, StudySetting
from coala.compare.writing import Writer, drift_of, policy_of, replies_of
from coala.store import load_json, save_json
from coala.values import CoalaError, Pair

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.baselines import BaselineMethod, Trained, TrainSettings

# Of TRL's logs, the held-out margin of each method.
_MARGINS = ("eval_rewards/margins", "eval_margin")


def settings_for(study: Study, setting: StudySetting, kind: str, *, max_tokens: int | None, ends_with_eos: bool) -> Any:
    """The baseline's settings in one ``setting`` of the study, but for rate and seed."""
    from coala.baselines import Lora, paper, trl

    found: TrainSettings = (paper if setting.source == "paper" else trl)(cast("BaselineMethod", kind))
    if setting.adapter is not None:
        found = replace(found, lora=(found.lora or Lora()) if setting.adapter else None)
    change = dict(setting.change)
    if isinstance(change.get("lora"), dict):
        change["lora"] = Lora(**change["lora"])
    unknown = sorted(set(change) - set(asdict(found)))
    if unknown:
        raise CoalaError(f"A setting changes {', '.join(unknown)}; expected fields of coala.baselines.TrainSettings.")
    return replace(found, **{"max_length": max_tokens, "ends_with_eos": ends_with_eos, **change})


def train_cell(context: CellContext, costs: Costs) -> dict[str, Any]:
    """Sweep (first seed) or look up the rate, train, and measure."""
    study, cell = context.study, context.cell
    kind, test = context.method.kind, context.part("test")
    settings = _settings(context)
    first = cell.seed == study.seeds[0]
    trials, rate, average = _chosen(context, settings) if first else _as_first(context)
    settings = replace(settings, learning_rate=rate, seed=cell.seed or 0)
    curve = context.part("validation")[: study.evaluation.curve_pairs] if study.evaluation.curve_points else None
    pairs = _pairs(context, "train")
    if curve and kind != "sft":
        steps = int(np.ceil(len(pairs) / (settings.batch_size * settings.accumulation)) * settings.epochs)
        settings = replace(settings, eval_every=max(1, round(steps / study.evaluation.curve_points)), log_every=1)
    else:
        curve = None
    with costs.of("train") as about:
        trained = _train(context, pairs, settings, context.folder / "run", curve)
        about["flops"] = trained.flops
        about["pairs"] = trained.facts["pairs"]
        about["tokens"] = trained.facts["tokens"]
        # Without what the evaluations along the curve took, which are ours and not the method's.
        spent = sum(float(entry.get("eval_runtime", 0.0)) for entry in trained.history)
        about["measured"] = {"seconds": trained.seconds - spent, "peak_bytes": dict(trained.peak_bytes)}
    if context.method.of is not None:
        costs.parts["lessons"] = teaching(context)
    if first:
        about_search = {"flops": sum(t["flops"] for t in trials), "rates": len(trials)}
        seconds = sum(t["measured"]["seconds"] for t in trials)
        peaks = [t["measured"]["peak_bytes"] for t in trials]
        costs.parts["search"] = {**about_search, "measured": {"seconds": seconds}}
        # A process's peak only grows: that of the first training in it is the training's own.
        lowest = min((*peaks, dict(trained.peak_bytes)), key=lambda peak: (peak.get("device", 0), peak.get("host", 0)))
        costs.parts["train"]["measured"]["peak_bytes"] = lowest
    result = _measure(context, trained, test, average, costs)
    return {
        "rate": rate,
        "reward": PER_TOKEN if average else SUM,
        "trials": [{k: v for k, v in trial.items() if k != "measured"} for trial in trials],
        "curve": _curve(trained),
        **result,
    }


def _chosen(context: CellContext, settings: TrainSettings) -> tuple[list[dict[str, Any]], float, bool]:
    """Every trial, the rate that ranks validation pairs best, and whether its reward counts per token there."""
    setting, kind = context.study.settings[context.cell.setting], context.method.kind
    rates = setting.tried(kind)
    if not rates:
        return [], setting.rates_for(kind)[0], False
    trials = [_trial(context, settings, rate) for rate in rates]
    sound = [trial for trial in trials if trial["accuracy"] is not None and trial.get("held_out", 0.0) is not None]
    if not sound:
        raise CoalaError(f"{context.cell.id}: training diverged at every rate of {', '.join(f'{r:g}' for r in rates)}.")
    best = max(sound, key=lambda trial: (trial["accuracy"]["value"], -trial["nll"], -trial["rate"]))
    if context.method.of is not None:
        best = min(sound, key=lambda trial: (trial["held_out"], trial["rate"]))
    return trials, best["rate"], bool(best["average"])


def _as_first(context: CellContext) -> tuple[list[dict[str, Any]], float, bool]:
    """What the first seed's cell chose."""
    found = context.result(context.cell.id.rpartition(".s")[0] + f".s{context.study.seeds[0]}")
    return [], found["rate"], found["reward"] == PER_TOKEN


def count_training(context: CellContext) -> dict[str, Any]:
    """FLOPs of one epoch on all training pairs at the chosen rate, by PyTorch's counter and by formula."""
    from coala.compare.flop_counter import torch_flops

    found = context.result(context.cell.id.removesuffix(".count") + f".s{context.study.seeds[0]}")
    settings = replace(
        _settings(context), learning_rate=found["rate"], seed=context.cell.seed or 0, epochs=1.0, steps=None
    )
    pairs, target = _pairs(context, "train"), context.folder / "run"
    # A counter that was cut off has not counted all: begin again.
    shutil.rmtree(target, ignore_errors=True)
    trained, flops = torch_flops(lambda: _train(context, pairs, settings, target, None, "counting"))
    shutil.rmtree(target, ignore_errors=True)
    return {"train": flops, "formula": trained.flops, "pairs": len(pairs), "counter": "torch.utils.flop_counter"}


def _settings(context: CellContext) -> TrainSettings:
    import torch

    model = context.model
    found: TrainSettings = settings_for(
        context.study,
        context.study.settings[context.cell.setting],
        context.method.kind,
        max_tokens=model.max_tokens,
        ends_with_eos=model.ends_with_eos,
    )
    on_gpu = context.study.device == "auto" and torch.cuda.is_available()
    # Mixed precision pays on a GPU only; on a CPU it would train something else, more slowly.
    return found if on_gpu else replace(found, bf16=False)


def _pairs(context: CellContext, part: str) -> list[Pair]:
    """What is trained on: pairs, or guided replies to their prompts."""
    return guided_pairs(context, part) if context.method.of is not None else context.part(part)


def _train(
    context: CellContext,
    pairs: Sequence[Pair],
    settings: TrainSettings,
    out: Path,
    evaluated: Sequence[Pair] | None,
    stage: str = "training",
) -> Trained:
    from coala.baselines import train

    context.show(stage, 0, None)
    return train(
        cast("BaselineMethod", context.method.kind),
        pairs,
        context.start,
        out=out,
        settings=settings,
        eval_pairs=evaluated,
        revision=context.revision,
        template=context.model.template,
        device=context.study.device,
        on_step=lambda step, steps, logs: context.show(stage, step, steps, "steps"),
    )


def _trial(context: CellContext, settings: TrainSettings, rate: float) -> dict[str, Any]:
    """Train on the ``fit`` part at ``rate`` and measure on ``validation``; read back if it is there."""
    from coala.baselines import log_likelihoods
    from coala.baselines.likelihoods import loaded_like

    done = context.folder / "trials" / f"{rate:g}.json"
    if done.is_file():
        found: dict[str, Any] = load_json(done)
        return found
    folder = context.folder / "trials" / f"{rate:g}"
    settings = replace(settings, learning_rate=rate, seed=context.study.seeds[0])
    trained = _train(context, _pairs(context, "fit"), settings, folder, None, f"training at rate {rate:g}")
    validation = context.part("validation")
    about: dict[str, Any] = {
        "rate": rate,
        "flops": trained.flops,
        "measured": {"seconds": trained.seconds, "peak_bytes": dict(trained.peak_bytes)},
        "accuracy": None,
        "nll": None,
        "average": False,
    }
    if context.method.of is not None:
        # Of replies that are learned from, how likely the others are decides.
        guided = guided_pairs(context, "validation")
        likelihoods = log_likelihoods(
            loaded_like(trained, context.backbone), guided, settings, batch_tokens=context.model.batch_tokens
        )
        loss = -float(likelihoods.chosen.sum() / likelihoods.chosen_tokens.sum())
        about |= {"held_out": loss if np.isfinite(loss) else None}
    # An SFT model's reward may be its log-likelihood or that per token: whichever ranks validation pairs better.
    for average in (False, True) if trained.method == "sft" else (False,):
        try:
            found = measured_margins(_margins(context, trained, validation, average), validation)
        except CoalaError:
            continue
        here = (found["accuracy"]["value"], -found["nll"])
        if about["accuracy"] is None or here > (about["accuracy"]["value"], -about["nll"]):
            about |= {"accuracy": found["accuracy"], "nll": found["nll"], "average": average}
    save_json(done, about)
    shutil.rmtree(folder, ignore_errors=True)
    return about


def _margins(
    context: CellContext,
    trained: Trained,
    pairs: Sequence[Pair],
    average: bool,
    policy: LanguageModel | None = None,
) -> Any:
    from coala.baselines import reward_margins

    return reward_margins(
        trained, pairs, context.backbone, policy=policy, average=average, batch_tokens=context.model.batch_tokens
    )


def _measure(
    context: CellContext, trained: Trained, test: Sequence[Pair], average: bool, costs: Costs
) -> dict[str, Any]:
    from coala.baselines import log_likelihoods

    # The base is first loaded here or after a trial's training, so that the peak of the first training is its own.
    base = context.backbone
    policy = trained.backbone(device=str(base.device), dtype=str(base.dtype).removeprefix("torch."))
    with costs.of("evaluation"):
        result = measured_margins(_margins(context, trained, test, average, policy), test)
    if trained.method == "reward":
        return result
    with costs.of("policy"):
        if trained.method == "dpo":
            # Its own reward is the log-ratio.
            result["policy_accuracy"] = result["accuracy"]
        else:
            ours, theirs = (
                log_likelihoods(model, test, trained.settings, batch_tokens=context.model.batch_tokens)
                for model in (policy, base)
            )
            result |= policy_of(ours, theirs, test)
    return {**result, **replies_of(context, costs, Writer(policy)), **drift_of(context, costs, policy)}


def _curve(trained: Trained) -> list[dict[str, float]]:
    """Held-out mean margin by step, on the scale of the method's own reward."""
    rows = []
    for entry in trained.history:
        value = next((entry[name] for name in _MARGINS if name in entry), None)
        if value is not None:
            rows.append({"step": float(entry["step"]), "margin": float(value)})
    return rows


def tidy(context: CellContext) -> None:
    """Drop what only training needed, once the cell is written; the model too, unless another cell starts from it."""
    wanted = context.method == context.study.sft and context.cell.seed == context.study.seeds[0]
    shutil.rmtree(context.folder / "trials", ignore_errors=True)
    shutil.rmtree(context.folder / "run" / "checkpoints", ignore_errors=True)
    if not (wanted or context.study.keep_models):
        shutil.rmtree(context.folder / "run", ignore_errors=True)
