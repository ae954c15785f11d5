"""The frozen start made to write otherwise: asked in words, shown examples, or guided by a head fitted elsewhere."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np

from coala.compare.cell_context import CellContext, Costs, measured_margins
from coala.compare.writing import Asked, Writer, drift_of, guided_policy, policy_of, replies_of
from coala.store import load_head
from coala.values import CoalaError, Pair, Turn, one_per_prompt


def guided_cell(context: CellContext, costs: Costs) -> dict[str, Any]:
    """Replies guided by the head of another method, in a mode of its own; the ranking is that head's."""
    from coala.decoding import Guidance

    assert context.method.guidance is not None
    of = f"{'.'.join(context.cell.place)}.{context.method.of}.s{context.cell.seed}"
    ranked = context.result(of)
    names = ("reward", "margins", "accuracy", "margin_ratio", "margin_sd", "ties", "nll", "layer", "pooling", "neurons")
    head = load_head(context.out / "cells" / of / "head")
    guidance = Guidance(**asdict(context.method.guidance))
    return {
        **{name: ranked[name] for name in names},
        "curve": [],
        **replies_of(context, costs, Writer(head=head, guidance=guidance)),
        **guided_policy(context, costs, head, guidance),
    }


def prompt_cell(context: CellContext, costs: Costs) -> dict[str, Any]:
    """Replies of the start asked by a system prompt, shown examples, or both; what its likelihoods then prefer.

    As a reward it has what DPO's policy has: log pi(reply | prompt as asked) - log pi(reply | prompt as it is).
    """
    from coala.baselines import TrainSettings, log_likelihoods

    base, test, asked = context.backbone, context.part("test"), asked_by(context)
    # Examples may take more than the pairs are cut to: the whole context is theirs.
    settings = TrainSettings(max_length=None, ends_with_eos=context.model.ends_with_eos)
    with costs.of("evaluation"):
        plain, steered = (
            log_likelihoods(base, pairs, settings, batch_tokens=context.model.batch_tokens)
            for pairs in (test, [replace(pair, prompt=asked(pair.prompt)) for pair in test])
        )
    return {
        "reward": "log-likelihood as asked, above that of the plain prompt",
        **measured_margins(steered.ratio - plain.ratio, test),
        **policy_of(steered, plain, test),
        **replies_of(context, costs, Writer(asked=asked)),
        **drift_of(context, costs, base, asked),
    }


def asked_by(context: CellContext) -> Asked:
    """What the start is given for a prompt: the dataset's system prompt and examples, each where the method has it."""
    method, system = context.method, context.dataset.system
    if method.system and not system:
        raise CoalaError(
            f"Method {method.name!r} asks by a system prompt, and dataset {context.cell.dataset!r} has none. Fix: give "
            f"datasets.{context.cell.dataset}.system, or keep the method to other datasets."
        )
    shown = examples(context.part("train"), method.examples, context.cell.seed or 0)
    before = (Turn("system", system),) if method.system and system else ()
    turns = tuple(turn for pair in shown for turn in (*_said(pair.prompt), Turn("assistant", pair.chosen)))

    def asked(prompt: tuple[Turn, ...]) -> tuple[Turn, ...]:
        own = tuple(turn for turn in prompt if turn.role == "system")
        return (*(before or own), *turns, *_said(prompt))

    return asked


def examples(pairs: list[Pair], number: int, seed: int) -> list[Pair]:
    """``number`` training pairs of different prompts, drawn with ``seed``; more with it begin with the same ones."""
    distinct = one_per_prompt(pairs)
    if number > len(distinct):
        raise CoalaError(
            f"Found {len(distinct)} prompts among the training pairs, expected {number}, one for each example. "
            "Fix: ask for fewer examples."
        )
    return [distinct[i] for i in np.random.default_rng(seed).permutation(len(distinct))[:number]]


def _said(prompt: tuple[Turn, ...]) -> tuple[Turn, ...]:
    return tuple(turn for turn in prompt if turn.role != "system")
