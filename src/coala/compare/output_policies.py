"""Cells that change the output layer of the frozen model: distilled guidance, LM-Steer, a mean difference, a constant.

Each is a policy whose likelihoods and steps are known, so that all are measured alike, at several strengths.

CELL/policy/              of a distilled one, as `coala distil` writes it
CELL/change.safetensors   of the others
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save

from coala.compare.cell_context import CellContext, Costs, compiling, keep_compiled, measured_margins
from coala.compare.lessons import choosing_prompts, states_of, taught_by, taught_replies, teaching
from coala.compare.output_change import counted_rows, fit_bias, fit_by_adam, mean_loss
from coala.compare.reply_plan import reply_flops
from coala.compare.writing import Writer, along, policy_of, prompts_of, replies_of
from coala.costs import adam_fit_flops
from coala.store import load_head, write_atomic
from coala.values import CoalaError, Float32, Pair, one_per_prompt

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.baselines import PairLikelihoods
    from coala.policies import DistilStates
    from coala.settings import Support
    from coala.values import Generation

# Multiples of a mean difference that are tried, and on how many held-out prompts of the training pairs.
MULTIPLES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
TUNED_ON = 16


def distilled_cell(context: CellContext, costs: Costs) -> dict[str, Any]:
    """Guidance as a change of the output layer, by one convex program, or one a round, as the settings say."""
    from coala.distil.rounds import in_rounds
    from coala.distil.stage import project

    work, first = taught_by(context), (states_of(context), taught_replies(context))
    keep_compiled(context)
    lessons = costs.parts["lessons"] = teaching(context)
    more: dict[str, Any] = {}
    with costs.of("fit") as about, compiling() as seconds:
        if work.settings.rounds > 1:
            prompts, parts = choosing_prompts(context)
            policy, found = in_rounds(work, prompts, first)
            more = {"rounds": found["rounds"], "round": found["kept_round"], "chosen_on": parts}
            # The first round's replies are the teacher's cell's; the seconds of the others are the fit's.
            for row in found["rounds"][1:]:
                lessons["replies"] += row["flops"]["teacher"]
                lessons["states"] += row["flops"]["states"]
        else:
            policy, found = project(work, *first)
        flops, fit = found["flops"], found["fit_flops"]
        others = sum(flops.get(name, 0) for name in ("choice", "own"))
        about |= {"flops": fit, "search_flops": flops["solver"] - fit + others}
        about["measured"] = {"compiling": sum(seconds)}
    policy.save(context.folder / "policy")
    certificate = policy.certificate
    assert certificate is not None
    return {
        "ridge": policy.ridge,
        "rank": policy.rank,
        "strength": certificate.facts["strength"],
        "relative_gap": certificate.facts["relative_gap_of_full_change"],
        "gain": -certificate.objective,
        "path": found["path"],
        **more,
        **_policy(context, costs, left=policy.left, right=policy.right),
    }


def lm_steer_cell(context: CellContext, costs: Costs) -> dict[str, Any]:
    """A by Adam to the likelihood of replies (LM-Steer, arXiv:2305.12798); rate and passes by held-out prompts."""
    from coala.convex.output_fit import FOLDS
    from coala.convex.validation import grouped_folds

    method, seed = context.method, context.cell.seed or 0
    support, states, output = method.distil_settings.support, states_of(context), _output(context)
    folds = grouped_folds(np.asarray(states.group), FOLDS, seed)
    if folds is None:
        raise CoalaError(f"{context.cell.id}: found replies to one prompt, expected several. Fix: more prompts.")
    costs.parts["lessons"] = teaching(context)
    kept, out = states.held_to(folds != 0), states.held_to(folds == 0)
    trials: list[dict[str, Any]] = []
    none = mean_loss(out, output, np.zeros((states.width, states.width), np.float32), support)
    with costs.of("search", rates=len(method.rates)) as about:
        for rate in method.rates:

            def look(epoch: int, change: Any, rate: float = rate) -> None:
                context.show(f"Adam at rate {rate:g}", epoch, method.epochs, "passes")
                held_out = mean_loss(out, output, change, support) - none
                trials.append({"rate": rate, "epochs": epoch, "held_out": held_out})

            try:
                fit_by_adam(kept, output, support=support, rate=rate, epochs=method.epochs, seed=seed, on_epoch=look)
            except CoalaError:
                continue  # it diverged: what it told before counts
        about["flops"] = _adam_flops(kept, output, support, method.epochs * len(method.rates))
    sound = [trial for trial in trials if np.isfinite(trial["held_out"])]
    if not sound:
        raise CoalaError(f"{context.cell.id}: Adam diverged at every rate of {method.rates}. Fix: lower rates.")
    best = min(sound, key=lambda trial: (trial["held_out"], trial["rate"]))
    with costs.of("fit") as about:
        change = fit_by_adam(
            states, output, support=support, rate=best["rate"], epochs=best["epochs"], seed=seed
        ).astype(np.float32)
        about["flops"] = _adam_flops(states, output, support, best["epochs"])
    _save(context, change=change)
    return {
        "rate": best["rate"],
        "epochs": best["epochs"],
        "path": trials,
        **_policy(context, costs, left=change),
    }


def bias_cell(context: CellContext, costs: Costs) -> dict[str, Any]:
    """The best constant added to every state, by the convex program; ridge by held-out prompts."""
    keep_compiled(context)
    settings, states, output = context.method.distil_settings, states_of(context), _output(context)
    costs.parts["lessons"] = teaching(context)
    with costs.of("fit") as about, compiling() as seconds:
        found = fit_bias(
            states, output, ridge=settings.ridge, tolerance=settings.tolerance, seed=context.cell.seed or 0
        )
        about["flops"] = found.flops
        about["measured"] = {"compiling": sum(seconds)}
    _save(context, bias=found.bias)
    return {
        "ridge": found.ridge,
        "relative_gap": found.relative_gap,
        "path": found.path,
        **_policy(context, costs, bias=found.bias),
    }


def mean_difference_cell(context: CellContext, costs: Costs) -> dict[str, Any]:
    """The mean final state of chosen minus rejected replies, added to every state.

    How many times it is added is what the head scores highest on replies to held-out prompts of the training pairs,
    among the multiples whose replies keep to the bound on perplexity.
    """
    from coala.compare.every_layer import loaded, of_layer

    method = context.method
    features = loaded(context, "train")
    if method.all_layers:
        features = of_layer(context, context.features_result()["n_layers"], "mean", "train")
    bias = (features.chosen.mean(0, dtype=np.float64) - features.rejected.mean(0, dtype=np.float64)).astype(np.float32)
    read = context.costs(context.features_folder().name)["features"]
    # A mean takes no product; the features are what it is of.
    own = {"seconds": read["measured"]["seconds"], "joules": None}
    costs.parts["lessons"] = {"replies": 0, "states": read["flops"], "measured": own}
    costs.parts["fit"] = {"flops": 0, "measured": {"seconds": 0.0, "peak_bytes": {}, "joules": None}}
    with costs.of("search") as about:
        multiple, trials = _multiple(context, bias)
        about["flops"] = sum(trial.pop("flops") for trial in trials)
    bias = np.float32(multiple) * bias
    _save(context, bias=bias)
    return {
        "multiple": multiple,
        "norm": float(np.linalg.norm(bias)) / multiple,
        "path": trials,
        **_policy(context, costs, bias=bias),
    }


def _multiple(context: CellContext, bias: Float32) -> tuple[float, list[dict[str, Any]]]:
    pairs = one_per_prompt(context.part("validation"))[:TUNED_ON]
    name = f"{'.'.join(context.cell.place)}.{context.method.of}.s{context.cell.seed}"
    head = load_head(context.out / "cells" / name / "head")
    trials = [
        {"multiple": multiple, **_tried(context, pairs, np.float32(multiple) * bias, head)}
        for multiple in (0.0, *MULTIPLES)
    ]
    most = context.method.perplexity * trials[0]["perplexity"]
    within = [trial for trial in trials[1:] if trial["perplexity"] <= most]
    if not within:
        raise CoalaError(
            f"{context.cell.id}: even the mean difference itself takes replies beyond {context.method.perplexity:g} "
            "times the start's perplexity. Fix: raise the method's perplexity."
        )
    return float(max(within, key=lambda trial: float(trial["score"]))["multiple"]), trials


def _tried(context: CellContext, pairs: list[Pair], bias: Float32, head: Any) -> dict[str, Any]:
    """Mean score by the head, and perplexity under the start, of replies with ``bias`` to the prompts of ``pairs``."""
    from coala.alignment.judges import HeadScorer
    from coala.backbone import OutputChange
    from coala.baselines import TrainSettings, log_likelihoods
    from coala.decoding import Guidance, generate
    from coala.values import prompt_id

    settings, base = context.evaluation, context.backbone
    replies: list[Generation] = generate(
        [pair.prompt for pair in pairs],
        base.with_output(OutputChange.of(bias=bias, device=base.device)),
        None,
        Guidance(mode="none"),
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=context.cell.seed or 0,
        prompt_ids=[prompt_id(pair.prompt) for pair in pairs],
    )
    scorer = HeadScorer(head, base)
    texts = [Pair(pair.prompt, reply.text, reply.text, "") for pair, reply in zip(pairs, replies, strict=True)]
    found = log_likelihoods(base, texts, TrainSettings(max_length=context.model.max_tokens))
    written = [
        reply_flops(base.shape, len(base.render(pair.prompt).tokens), reply.n_tokens, None)
        for pair, reply in zip(pairs, replies, strict=True)
    ]
    return {
        "flops": sum(written),
        "score": float(np.mean([scorer(pair.prompt, reply) for pair, reply in zip(pairs, replies, strict=True)])),
        "perplexity": float(np.exp(-found.chosen.sum() / found.chosen_tokens.sum())),
    }


# --- what they have in common ----------------------------------------------------------------------------------------


def _output(context: CellContext) -> Float32:
    """The output layer, over the temperature that is sampled at."""
    from coala.distil.matrix import output_matrix

    found: Float32 = output_matrix(context.backbone) / np.float32(context.evaluation.temperature or 1.0)
    return found


def _adam_flops(states: DistilStates, output: Float32, support: Support, epochs: int) -> int:
    n = len(counted_rows(states, support))
    return adam_fit_flops(
        n, n * (states.tokens.shape[1] if support == "nucleus" else len(output)), states.width, epochs
    )


def _save(context: CellContext, **arrays: Float32) -> None:
    write_atomic(context.folder / "change.safetensors", save(arrays))


def _policy(context: CellContext, costs: Costs, **parts: Float32 | None) -> dict[str, Any]:
    """What the policy prefers and writes; its reward is log pi(reply) - log pi_0(reply), as DPO's.

    ``parts``: ``left``, ``right`` and ``bias`` of its change.
    """
    from coala.backbone import OutputChange

    test, base = context.part("test"), context.backbone
    writer = Writer(change=OutputChange.of(**parts, device=base.device))
    with costs.of("evaluation"):
        theirs = _start_likelihoods(context, test)
        ours = _likelihoods(context, writer.of(base), test)
    return {
        "reward": "log-likelihood above the start's",
        **measured_margins(ours.ratio - theirs.ratio, test),
        **policy_of(ours, theirs, test),
        **replies_of(context, costs, writer),
        "along": along(context, costs, writer, context.method.strengths) if prompts_of(context) else [],
    }


def _likelihoods(context: CellContext, model: LanguageModel, pairs: list[Pair]) -> PairLikelihoods:
    from coala.baselines import TrainSettings, log_likelihoods

    settings = TrainSettings(max_length=context.model.max_tokens, ends_with_eos=context.model.ends_with_eos)
    return log_likelihoods(model, pairs, settings, batch_tokens=context.model.batch_tokens)


def _start_likelihoods(context: CellContext, pairs: list[Pair]) -> PairLikelihoods:
    """Those of the test pairs under the start, which its own cell has where it is a row."""
    from coala.baselines import PairLikelihoods

    base = f"{'.'.join(context.cell.place)}.base"
    if context.dataset.base and "likelihoods" in (found := context.result(base)):
        return PairLikelihoods(**{name: np.array(values) for name, values in found["likelihoods"].items()})
    return _likelihoods(context, context.backbone, pairs)
