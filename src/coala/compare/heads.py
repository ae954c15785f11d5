"""Cells that train no weight of the model: the unguided base, features, convex heads on them, and an AdamW control."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from coala.compare.cell_context import PER_TOKEN, SUM, CellContext, Costs, calibrated_nll, measured_margins, replies_of
from coala.compare.matrix import features_key, features_method, prompt_features
from coala.compare.study import StudyMethod
from coala.store import FeatureStore, load_features, save_features, save_head, scratch
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
    result = measured_margins(margins(test, average), test)
    return {"reward": PER_TOKEN if average else SUM, **result, **replies_of(context, base, base, costs)}


# --- features ----------------------------------------------------------------------------------------------------


def features_cell(context: CellContext, costs: Costs) -> dict[str, Any]:
    """Features of training and test pairs by the frozen model; the layer chosen on a sample of the training pairs."""
    from coala.costs import extraction_flops, head_flops
    from coala.features import extract, survey

    method, backbone = features_method(context.study, context.cell), context.backbone
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
            plan = survey(pairs, backbone, spec, prompt_features=prompt_features(method))
            shards = FeatureStore(context.folder / part / "shards")
            features = extract(
                pairs,
                backbone,
                spec,
                prefixes=prefixes,
                prompt_features=prompt_features(method),
                log_ratios=method.log_ratios,
                batch_tokens=context.model.batch_tokens,
                store=shards,
                plan=plan,
                on_batch=_told(context, part, plan.facts["tokens"]),
            )
            save_features(context.folder / part, features)
            shards.discard()
            top = None if method.log_ratios else spec.layer
            about["flops"] = extraction_flops(backbone.shape, plan.lengths, own=plan.own_lengths, layer=top) + (
                head_flops(backbone.shape, plan.reply_lengths) if method.log_ratios else 0
            )
            about["pair_by_pair"] = extraction_flops(backbone.shape, plan.lengths[plan.index.reshape(-1)], layer=top)
            about["pairs"], about["tokens"] = len(pairs), plan.facts["tokens"]
        if part == "train":
            facts = {"spec": asdict(spec), "n_layers": backbone.n_layers, **plan.facts}
    return {**facts, "layers": layers}


def _told(context: CellContext, part: str, most: int) -> Callable[[int, int, int], None]:
    """Tells how far the extraction of a part is, by tokens: long rows come first."""

    def tell(done: int, total: int, tokens: int) -> None:
        context.show(f"features of {part}", tokens, most, f"{done:,} of {total:,} pairs")

    return tell


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


def loaded(context: CellContext, part: str) -> FeatureSet:
    """The features this cell's method reads."""
    name = f"{'.'.join(context.cell.place)}.features-{features_key(context.method)}"
    return load_features(context.out / "cells" / name / part, mmap=True)


# --- convex heads ------------------------------------------------------------------------------------------------


def head_cell(context: CellContext, costs: Costs) -> dict[str, Any]:
    """Fit the head, rank the test pairs, and answer the held-out prompts guided by it."""
    method, train, test = context.method, loaded(context, "train"), loaded(context, "test")
    _keep_compiled(context)
    with costs.of("head") as about, _compiling() as seconds:
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
    }
    if method.guidance is not None and method.guidance.mode != "none":
        from coala.decoding import Guidance

        base = context.backbone
        result |= replies_of(context, base, base, costs, fitted.head, Guidance(**asdict(method.guidance)))
    return result


def _keep_compiled(context: CellContext) -> None:
    """What one head's cell compiles, the next reads from the comparison's folder."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(context.out / "compiled"))  # type: ignore[no-untyped-call]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # type: ignore[no-untyped-call]


@contextmanager
def _compiling() -> Iterator[list[float]]:
    """Seconds that XLA compiles for, one entry each time."""
    import jax

    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seconds


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


# --- the control of the paper's Table 7 ----------------------------------------------------------------------------


def adamw_cell(context: CellContext, costs: Costs) -> dict[str, Any]:
    """A two-layer ReLU network of 64 neurons on the same features, trained by AdamW on the pairwise logistic loss.

    What COALA's convex head stands in for: its rate is chosen on folds of whole groups among the training pairs.
    """
    from coala.convex.validation import grouped_folds

    train, test = loaded(context, "train"), loaded(context, "test")
    seed = context.cell.seed or 0
    if context.cell.seed == context.study.seeds[0]:
        fold = grouped_folds(train.group, 4, seed)
        held_out = np.ones(len(train), bool) if fold is None else fold == 0
        rows = []
        with costs.of("search", rates=len(context.method.rates)):
            for rate in context.method.rates:
                scores = _adamw(train.take(~held_out if fold is not None else held_out), rate, seed)
                margins = scores(train.take(held_out))
                rows.append({"rate": rate, "nll": calibrated_nll(margins), "accuracy": float((margins > 0).mean())})
        rate = min(rows, key=lambda row: (row["nll"], row["rate"]))["rate"]
    else:
        found = context.result(context.cell.id.rpartition(".s")[0] + f".s{context.study.seeds[0]}")
        rows, rate = [], found["rate"]
    with costs.of("head"):
        scores = _adamw(train, rate, seed)
    return {
        "rate": rate,
        "trials": rows,
        "reward": "score of the network",
        **measured_margins(scores(test), context.part("test")),
    }


def _adamw(features: FeatureSet, rate: float, seed: int, *, neurons: int = 64, epochs: int = 100) -> Any:
    """Scores of pairs' differences by a network trained on ``features``."""
    import torch

    both = np.concatenate([features.chosen, features.rejected])
    centre, spread = both.mean(0), both.std(0)
    spread = np.where(spread > 1e-6, spread, 1.0) * np.sqrt(both.shape[1])
    rng = torch.Generator().manual_seed(seed)
    width = both.shape[1]
    first = (torch.randn(width, neurons, generator=rng) * (2 / width) ** 0.5 * width**0.5).requires_grad_()
    second = (torch.randn(neurons, generator=rng) / neurons**0.5).requires_grad_()
    optimiser = torch.optim.AdamW([first, second], lr=rate)

    def rows(values: Any) -> torch.Tensor:
        return torch.tensor(np.asarray((values - centre) / spread, np.float32))

    def score(values: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(values @ first)
        return torch.mv(hidden, second)

    chosen, rejected = rows(features.chosen), rows(features.rejected)
    for _ in range(epochs):
        for batch in torch.randperm(len(chosen), generator=rng).split(256):  # type: ignore[no-untyped-call]
            loss = torch.nn.functional.softplus(score(rejected[batch]) - score(chosen[batch])).mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()

    def margins(other: FeatureSet) -> Any:
        with torch.no_grad():
            return (score(rows(other.chosen)) - score(rows(other.rejected))).double().numpy()

    return margins
