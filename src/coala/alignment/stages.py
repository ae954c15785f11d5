"""The stages of one alignment in their order, each skipped when what it reads and wrote is unchanged.

    pairs -> features -> head -> replies -> judgements

Knows which stage feeds which and where its values lie in the run folder; every computation is a call to the part that
owns it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coala.alignment.changes import DISTILLED_FILES
from coala.alignment.context import StageContext
from coala.alignment.extraction import encode, save_layer
from coala.alignment.fitting import fit_settings
from coala.alignment.replies import judge_replies, write_replies
from coala.costs import extraction_flops, head_flops
from coala.recipe import Recipe
from coala.statistics.intervals import wald
from coala.store import (
    claim,
    digest,
    discard,
    file_digest,
    link_features,
    load_features,
    load_object,
    load_pairs,
    pair_digest,
    save_head,
    save_json,
    save_pairs,
)
from coala.values import Pair, conversation_text

if TYPE_CHECKING:
    from coala.convex import Fit


MOST_WIDTH = 10.0  # points of accuracy within which held-out pairs should tell


# --- the stages --------------------------------------------------------------------------------------------------


def _pairs(context: StageContext) -> None:
    from coala.data import check, source_digest, split

    recipe = context.recipe
    inputs = {
        "pairs": [source_digest(s) for s in recipe.pairs],
        "eval_pairs": [source_digest(s) for s in recipe.eval_pairs],
        "settings": [recipe.format, recipe.skip_bad, recipe.eval_fraction, recipe.seed],
        # The model's chat template decides which rows there are.
        "model": [recipe.model.name, recipe.model.revision, recipe.model.template, recipe.model.adapter],
    }

    def work() -> dict[str, Any]:
        context.show("pairs", 0, None)
        # The tokenizer is read at the first pair, so that pairs that are not there are named first.
        as_read: dict[str, Any] = {
            "refusal": lambda pair: context.renderer().refusal_of(pair),
            "specials": lambda text: context.renderer().specials(text),
        }
        findings = [check(recipe.pairs, recipe.format, against=recipe.eval_pairs or None, **as_read)]
        if recipe.eval_pairs:
            findings.append(check(recipe.eval_pairs, recipe.format, **as_read))
        for found in findings:
            if not (recipe.skip_bad and found.pairs):
                found.raise_for_errors()
        if recipe.eval_pairs:
            train, evaluation = list(findings[0].pairs), list(findings[1].pairs)
        else:
            train, evaluation = split(findings[0].pairs, recipe.eval_fraction, seed=recipe.seed)
        if gone := context.run.forgotten:
            train, evaluation = ([one for one in some if pair_digest(one) not in gone] for some in (train, evaluation))
            context.note(f"{len(gone)} forgotten pairs of this run are skipped")
        for line in power_of(evaluation, recipe):
            context.note(line)
        save_pairs(context.path("pairs-train.jsonl"), train)
        save_pairs(context.path("pairs-eval.jsonl"), evaluation)
        return {
            "n_train": len(train),
            "n_eval": len(evaluation),
            "findings": [
                {"severity": finding.severity, "text": str(finding)}
                for found in findings
                for finding in (*found.errors, *found.warnings, *found.notes)
            ],
        }

    context.once("pairs", inputs, ["pairs-train.jsonl", "pairs-eval.jsonl"], work)


def _features(context: StageContext) -> None:
    from coala.features import distinct_lengths, survey

    model = context.recipe.model
    layer = _layer(context)
    extras: dict[str, Any] = {
        "prompt_features": context.recipe.prompt_features,
        "log_ratios": context.recipe.log_ratios,
    }
    for part in ("train", "eval"):
        stage = f"features-{part}"
        source = context.path(f"pairs-{part}.jsonl")
        # A head is fitted on prefixes if asked for; what is held out is always whole replies.
        prefixes = model.prefixes if part == "train" else 1
        inputs = {"pairs": file_digest(source), "model": context.model_stamp(), "layer": layer, **extras}

        def work(part: str = part, stage: str = stage, source: Path = source, prefixes: int = prefixes) -> Any:
            context.show(stage, 0, None, "loading the model")
            backbone = context.backbone()
            pairs = load_pairs(source)
            spec = backbone.spec(layer, model.pooling, model.ends_with_eos, model.max_tokens)
            reads = backbone.reads(spec, pairs[0] if pairs else None)
            if part == "train":
                for line in reads:
                    context.note(line)
            known = context.loaded.pop("plan", None) if part == "train" else None
            plan = known or survey(pairs, backbone, spec, prompt_features=extras["prompt_features"])
            in_all = plan.facts["tokens"]
            target = context.path(f"features/{part}")
            # All that decides the bits of the features, and so the same for every head, seed and sweep.
            decides = [
                spec,
                file_digest(source),
                prefixes,
                extras,
                model.batch_tokens,
                backbone.dtype,
                backbone.device.type,
            ]
            folder = target if context.cache is None else context.cache / digest(*map(str, decides))
            with nullcontext(True) if context.cache is None else claim(folder / "extraction.lock", wait=True):
                reused = context.cache is not None and (folder / "features.json").exists()
                if not reused:
                    encode(
                        folder,
                        pairs,
                        backbone,
                        spec,
                        model=model,
                        options={"batch_tokens": model.batch_tokens, "prefixes": prefixes, **extras},
                        plan=plan,
                        n_workers=context.n_workers,
                        on_tokens=partial(context.show, stage),
                        on_note=lambda text: context.show(stage, 0, in_all, text),
                    )
                if context.cache is not None:
                    link_features(folder, target)
            if reused:
                return {**plan.facts, "reads": reads, "reused": str(folder)}
            shape, top = backbone.shape, None if extras["log_ratios"] else spec.layer
            head = head_flops(shape, plan.reply_lengths) if extras["log_ratios"] else 0
            flops = extraction_flops(shape, plan.lengths, own=plan.own_lengths, layer=top) + head
            lengths, own = distinct_lengths(plan.tokens)
            return {
                **plan.facts,
                "reads": reads,
                "flops": flops,
                "flops_bound": extraction_flops(shape, lengths, own=own, layer=top) + head,
            }

        context.once(stage, inputs, [f"features/{part}/features.safetensors", f"features/{part}/features.json"], work)


def _layer(context: StageContext) -> int:
    """The layer asked for, or the one that a sample of the training pairs speaks for."""
    from coala.alignment.layer_choice import SHARE
    from coala.features import survey

    model = context.recipe.model
    if model.layer != "auto":
        return model.layer
    source = context.path("pairs-train.jsonl")

    def work() -> None:
        context.show("layer", 0, None)
        backbone, pairs = context.backbone(), load_pairs(source)
        spec = backbone.spec(-1, model.pooling, model.ends_with_eos, model.max_tokens)
        # The rows are those of the extraction, whatever its layer.
        context.loaded["plan"] = plan = survey(pairs, backbone, spec, prompt_features=context.recipe.prompt_features)
        path, seed = context.path("layer.json"), context.recipe.seed
        save_layer(path, pairs, backbone, spec, plan, model, seed=seed, on_progress=context.show)

    inputs = {"pairs": file_digest(source), "model": context.model_stamp(), "share": SHARE}
    context.once("layer", inputs, ["layer.json"], work)
    found = load_object(context.path("layer.json"), "layer", "told")
    context.note(found["told"])
    return int(found["layer"])


def _head(context: StageContext) -> None:
    settings = context.recipe.head
    inputs = {
        "features": file_digest(context.path("features/train/features.safetensors")),
        "settings": asdict(settings),
        "seed": context.recipe.seed,
    }

    def work() -> None:
        context.show("head", 0, None)
        features = load_features(context.path("features/train"), mmap=True)

        def fitted(linear: bool = False) -> Fit:
            return fit_settings(
                features,
                settings,
                seed=context.recipe.seed,
                near=context.path("features"),
                on_step=lambda stage, step, total: context.show("head", step, total, stage),
                linear=linear,
            )

        result = fitted()
        # Every head is shown beside the linear one, its own control (docs/departures.md).
        linear = result.head if not result.head.n_neurons else fitted(linear=True).head
        # A policy of the head before is none of this one's; gone first, so that no kill leaves it next to the new head.
        for name in DISTILLED_FILES:
            if context.path(name).exists():
                context.note(f"{context.path(name)}: deleted, for it is of another head. Fix: run coala distil again")
                discard(context.path(name))
        save_head(context.path("head"), result.head)
        save_json(
            context.path("head/fit.json"), {"path": result.path, "history": result.history, "linear": linear.linear}
        )

    context.once("head", inputs, ["head/head.safetensors", "head/head.json", "head/fit.json"], work)


def power_of(held_out: Sequence[Pair], recipe: Recipe) -> list[str]:
    """What so many held-out pairs cannot show, and what is asked for beyond what they have."""
    lines = []
    groups = len({pair.group for pair in held_out})
    # Half the width of the interval of a share near a half.
    width = 100 * (wald(0.5, max(1, groups))[1] - 0.5)
    if width > MOST_WIDTH:
        more = "" if recipe.eval_pairs else f" (--eval-fraction is {recipe.eval_fraction:g})"
        few = f"{len(held_out)} held-out pair{'' if len(held_out) == 1 else 's'} in {groups} group"
        few += "" if groups == 1 else "s"
        lines.append(f"{few} estimate accuracy only to within about {min(width, 50):.0f} points: hold out more{more}")
    prompts = len({conversation_text(pair.prompt) for pair in held_out})
    if recipe.evaluation.prompts > prompts:
        lines.append(f"{recipe.evaluation.prompts} prompts requested, {prompts} held out: all of these are answered")
    return lines


STAGES: dict[str, Callable[[StageContext], None]] = {
    "pairs": _pairs,
    "features": _features,
    "head": _head,
    "replies": write_replies,
    "judgements": judge_replies,
}
