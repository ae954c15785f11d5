"""Cells that train no weight of the model: the unguided base, features, and convex heads on them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from coala.compare.cell_context import (
    PER_TOKEN,
    SUM,
    CellContext,
    Costs,
    compiling,
    keep_compiled,
    measured_margins,
)
from coala.compare.every_layer import every_layer, extracted, joined, loaded
from coala.compare.matrix import features_method, prompt_features
from coala.compare.study import StudyMethod
from coala.compare.writing import Writer, guided_policy, replies_of
from coala.store import save_features, save_head, scratch
from coala.values import FeatureSet

if TYPE_CHECKING:
    from coala.alignment.layer_choice import LayerChoice
    from coala.backbone import LanguageModel
    from coala.convex import Fit


def base_cell(context: CellContext, costs: Costs) -> dict[str, Any]:
    """The model nothing was done to: its own likelihoods as a reward, and its replies, which others are judged by."""
    from coala.baselines import TrainSettings, log_likelihoods

    base = context.backbone
    settings = TrainSettings(max_length=context.model.max_tokens, ends_with_eos=context.model.ends_with_eos)
    batch = context.model.batch_tokens

    def margins(pairs: Any, average: bool) -> Any:
        found = log_likelihoods(base, pairs, settings, batch_tokens=batch)
        return found.average_ratio if average else found.ratio

    validation, test = context.part("validation"), context.part("test")
    by_validation = {
        average: measured_margins(margins(validation, average), validation)["accuracy"]["value"]
        for average in (False, True)
    }
    average = by_validation[True] > by_validation[False]
    found = log_likelihoods(base, test, settings, batch_tokens=batch)
    result = measured_margins(found.average_ratio if average else found.ratio, test)
    return {
        "reward": PER_TOKEN if average else SUM,
        **result,
        # Of the test pairs, for whatever is compared with the start.
        "likelihoods": {name: values.tolist() for name, values in vars(found).items()},
        **replies_of(context, costs),
    }


# --- features ----------------------------------------------------------------------------------------------------


def features_cell(context: CellContext, costs: Costs) -> dict[str, Any]:
    """Features of training and test pairs by the frozen model; the layer chosen on a sample of the training pairs."""
    from coala.costs import extraction_flops, head_flops

    method = features_method(context.study, context.cell)
    if context.dataset.joins:
        return joined(context, costs, method)
    if method.all_layers:
        return every_layer(context, costs)
    backbone = context.backbone
    layers: list[dict[str, Any]] = []
    layer: int = -1 if method.layer == "auto" else method.layer
    if method.layer == "auto":
        with costs.of("search") as about:
            choice, about["flops"] = _chosen_layer(context, method, backbone)
        layer, layers = choice.layer, choice.to_dict()["scores"]
    spec = backbone.spec(layer, method.pooling, context.model.ends_with_eos, context.model.max_tokens)
    facts: dict[str, Any] = {}
    for part in ("train", "test"):
        pairs = context.part(part)
        prefixes = method.prefixes if part == "train" else 1
        with costs.of("features" if part == "train" else "evaluation") as about:
            reads = {"prompt_features": prompt_features(method), "log_ratios": method.log_ratios}
            with extracted(context, part, pairs, [spec], prefixes=prefixes, **reads) as ((features,), plan):
                save_features(context.folder / part, features)
            top = None if method.log_ratios else spec.layer
            about["flops"] = extraction_flops(backbone.shape, plan.lengths, own=plan.own_lengths, layer=top) + (
                head_flops(backbone.shape, plan.reply_lengths) if method.log_ratios else 0
            )
            about["pair_by_pair"] = extraction_flops(backbone.shape, plan.lengths[plan.index.reshape(-1)], layer=top)
            about["pairs"], about["tokens"] = len(pairs), plan.facts["tokens"]
        if part == "train":
            facts = {"spec": asdict(spec), "n_layers": backbone.n_layers, **plan.facts}
    return {**facts, "layers": layers}


def _chosen_layer(context: CellContext, method: StudyMethod, backbone: LanguageModel) -> tuple[LayerChoice, int]:
    """The layer that a sample speaks for, and the FLOPs of reading that sample at full depth."""
    from coala.alignment.layer_choice import choose_layer
    from coala.costs import extraction_flops
    from coala.features import survey

    sample = context.part("train")
    most = context.study.evaluation.layer_sample
    spec = backbone.spec(-1, method.pooling, context.model.ends_with_eos, context.model.max_tokens)
    seed = context.study.split.seed
    plan = survey(sample, backbone, spec)
    choice = choose_layer(
        sample, backbone, spec, plan=plan, most_pairs=most, batch_tokens=context.model.batch_tokens, seed=seed
    )
    whole = extraction_flops(backbone.shape, plan.lengths, own=plan.own_lengths)
    return choice, round(whole * choice.share)


# --- convex heads ------------------------------------------------------------------------------------------------


def head_cell(context: CellContext, costs: Costs) -> dict[str, Any]:
    """Fit the head, rank the test pairs, and answer the held-out prompts guided by it."""
    method, train, test = context.method, loaded(context, "train"), loaded(context, "test")
    keep_compiled(context)
    with costs.of("head") as about, compiling() as seconds:
        fitted = _fit(context, train)
        about["pairs"] = len(train)
        # XLA's work for shapes it has not seen, which no longer depends on how many pairs there are.
        about["measured"] = {"compiling": sum(seconds)}
    save_head(context.folder / "head", fitted.head)
    pairs = context.part("test")
    result = measured_margins(fitted.head.margins(test).astype(float), pairs)
    certificate = fitted.head.certificate
    result |= {
        "reward": "score of the head",
        "curve": _curve(fitted),
        "neurons": fitted.head.n_neurons,
        "relative_gap": None if certificate is None else certificate.relative_gap,
        "program": None if certificate is None else certificate.program,
        "phase_one": _phase_one(fitted),
        "layer": train.spec.layer,
        "pooling": train.spec.pooling,
    }
    if method.guidance is not None and method.guidance.mode != "none":
        from coala.decoding import Guidance

        guidance = Guidance(**asdict(method.guidance))
        result |= replies_of(context, costs, Writer(head=fitted.head, guidance=guidance))
        result |= guided_policy(context, costs, fitted.head, guidance)
    return result


def _fit(context: CellContext, features: FeatureSet) -> Fit:
    from coala.alignment.fitting import fit_options
    from coala.convex import Logistic, Pointwise, fit

    method, beta = context.method, context.study.beta
    options: dict[str, Any] = fit_options(method.head)
    reference = None
    if method.reference != "none":
        assert features.log_ratio is not None
        if method.reference == "paper":
            # The last display of CVX-DPO's Appendix A, for both rows of a pair.
            options["loss"] = Pointwise(beta, beta * features.log_ratio)
        elif method.head.method == "two-phase":
            options["loss"] = Logistic.with_reference(features.log_ratio, beta)
        reference = beta
    if method.head.reference_scale is not None:
        reference = method.head.reference_scale
    return fit(
        features,
        reference_scale=reference,
        tolerance=method.head.tolerance,
        seed=context.cell.seed or 0,
        scratch=scratch(context.folder / "scratch"),
        on_step=lambda stage, step, total, info: context.show("head", step, total, stage),
        **options,
    )


def _curve(fitted: Fit) -> list[dict[str, float]]:
    """Held-out mean margin by solver step; of pairs fitted where nothing is held out."""
    rows = []
    for row in fitted.history:
        value = row["margin_held_out"] if row.get("margin_held_out") is not None else row.get("margin_train")
        if value is not None:
            rows.append({"step": float(row["step"]), "margin": float(value)})
    return rows


def _phase_one(fitted: Fit) -> dict[str, Any] | None:
    found = fitted.solutions.get("phase-one")
    if found is None:
        return None
    return {"relative_gap": found.relative_gap, "steps": found.steps, "status": found.status.value}


def count_head(context: CellContext) -> dict[str, Any]:
    """FLOPs of extraction and of one fit by counters: PyTorch's, and one for JAX's matrix products."""
    from coala.compare.flop_counter import jax_products, standardisation_flops, torch_flops
    from coala.features import extract

    method, backbone, pairs = context.method, context.backbone, context.part("train")
    train = loaded(context, "train")

    def read() -> FeatureSet:
        return extract(
            pairs,
            backbone,
            train.spec,
            prefixes=method.prefixes,
            prompt_features=prompt_features(method),
            log_ratios=method.log_ratios,
            batch_tokens=context.model.batch_tokens,
        )

    _, extraction = torch_flops(read)
    with jax_products() as products:
        _fit(context, train)
    return {
        "features": extraction,
        "head": products.flops + standardisation_flops(len(train), train.width),
        "pairs": len(pairs),
        "counter": "torch.utils.flop_counter; matrix products of JAX as carried out",
    }
