"""The stages after the head: replies to held-out prompts, unguided and guided, policy accuracy, judgements.

RUN/generations-unguided.jsonl  generations-guided.jsonl  policy.json  judgements-judge.jsonl  judgements-labeller.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from coala.alignment.context import StageContext
from coala.alignment.parts import guidance_of
from coala.alignment.talking import settled
from coala.callbacks import quiet
from coala.costs import decoding_flops
from coala.recipe import Recipe
from coala.store import (
    RunFolder,
    digest,
    discard,
    file_digest,
    head_for,
    head_stamp,
    load_generations,
    load_pairs,
    run_policy,
    save_generations,
    save_json,
    save_judgements,
)
from coala.values import Generation, Pair, one_per_prompt, prompt_id

if TYPE_CHECKING:
    from coala.backbone import LanguageModel


PORTION = 32  # rows decoded together
# On a CPU as many rows of a large model take long, and progress and what a kill costs go by portions. Of a small one
# a step takes hardly longer for all of them: it reads the weights once.
SLOW_PORTION = 8
SMALL = 1 << 28  # weights of such a model's layers
PORTIONS = "portions"  # folder of replies that are not all written yet


def write_replies(context: StageContext) -> None:
    """Stages ``replies-unguided`` and ``replies-guided``, with the same noise, and ``policy``."""
    from coala.decoding import generate

    settings = context.recipe.evaluation
    pairs = load_pairs(context.path("pairs-eval.jsonl"))
    chosen = one_per_prompt(pairs)[: settings.prompts]
    for method in ("unguided", "guided"):
        stage = f"replies-{method}"
        inputs = {
            **_sampling(context, chosen),
            "head": head_stamp(context.path("head"), context.recipe.guidance.rater),
            "guidance": asdict(context.recipe.guidance),
            **_distilled(context),
        }

        def work(method: str = method, stage: str = stage, inputs: dict[str, Any] = inputs) -> dict[str, Any]:
            context.show(stage, 0, None, "loading the model")
            backbone, guidance = context.backbone(), guidance_of(context.recipe)
            head = head_for(context.path("head"), guidance.rater)
            told = context.note if method == "unguided" else quiet
            guidance, temperature = settled(context.run.path, backbone, guidance, {}, told)
            guidance = guidance.at(temperature)
            rule = guidance.plain if method == "unguided" else guidance
            written = generate(
                [pair.prompt for pair in chosen],
                backbone,
                head,
                rule,
                max_new_tokens=settings.max_new_tokens,
                temperature=temperature,
                seed=context.recipe.seed,
                prompt_ids=[prompt_id(pair.prompt) for pair in chosen],
                batch_size=max(1, rows_at_once(backbone) // rule.rows),
                kept=context.path(f"{PORTIONS}/{stage}-{digest(inputs)[:12]}.jsonl"),
                on_reply=lambda n, total: context.show(stage, n, total, f"{n} of {total} replies"),
                with_base=True,
            )
            prompts = {prompt_id(pair.prompt): pair.prompt for pair in chosen}
            save_generations(context.path(f"generations-{method}.jsonl"), written, prompts)
            flops: int = sum(
                decoding_flops(
                    backbone.shape,
                    len(backbone.render(pair.prompt).tokens),
                    reply.n_tokens,
                    candidates=rule.looked_at,
                    every=rule.interval,
                    n_neurons=0 if head.needs_prompt else head.n_neurons,  # for one prompt such a head is linear
                )
                for pair, reply in zip(chosen, written, strict=True)
            )
            return {"n": len(written), "flops": flops * rule.written}

        context.once(stage, inputs, [f"generations-{method}.jsonl"], work)
    discard(context.path(PORTIONS))
    _policy(context, pairs)


def _sampling(context: StageContext, chosen: Sequence[Pair]) -> dict[str, Any]:
    """What decides unguided replies, but for top-k and top-p."""
    settings = context.recipe.evaluation
    return {
        "prompts": digest([asdict(pair)["prompt"] for pair in chosen]),
        "model": context.model_stamp(),
        "settings": [settings.max_new_tokens, settings.temperature, context.recipe.seed],
    }


def unguided_replies(run: RunFolder, recipe: Recipe) -> list[Generation] | None:
    """The run's unguided replies to its first held-out prompts, if they are those that would be written now.

    None where there are none, or they are of other prompts, another model, length, sampling or seed, or changed since.
    """
    record, name = run.record("replies-unguided"), "generations-unguided.jsonl"
    if record is None:
        return None
    chosen = one_per_prompt(load_pairs(run.path / "pairs-eval.jsonl"))[: recipe.evaluation.prompts]
    now = {**record["inputs"], **_sampling(StageContext(recipe, run), chosen)}
    now["guidance"] = {**now["guidance"], "top_k": recipe.guidance.top_k, "top_p": recipe.guidance.top_p}
    return load_generations(run.path / name) if run.done("replies-unguided", now) else None


def _distilled(context: StageContext) -> dict[str, str]:
    """What decides replies of the distilled policy, where guidance is of it or goes over it."""
    if not guidance_of(context.recipe).change:
        return {}
    return {"policy": digest(run_policy(context.run).change)}


def _policy(context: StageContext, pairs: Sequence[Pair]) -> None:
    """How well the guided policy's log-ratio ranks held-out pairs, where its mode has likelihoods."""
    from coala.alignment.policy import Guided, policy_accuracy

    settings, guidance = context.recipe.evaluation, guidance_of(context.recipe)
    path = context.path("head/head.safetensors")
    if not settings.prompts or not (guidance.active or guidance.change):
        return
    policy = Guided(head_for(path.parent, guidance.rater), guidance, settings.temperature, settings.max_new_tokens)
    if policy.unknown:
        return
    inputs = {
        "pairs": file_digest(context.path("pairs-eval.jsonl")),
        "head": head_stamp(path.parent, guidance.rater),
        "model": context.model_stamp(),
        "guidance": asdict(context.recipe.guidance),
        "settings": [settings.prompts, settings.max_new_tokens, settings.temperature],
        **_distilled(context),
    }

    def work() -> dict[str, Any]:
        context.show("policy", 0, None, "loading the model")
        backbone = context.backbone()
        found = policy_accuracy(
            pairs,
            backbone,
            policy,
            limit=settings.prompts,
            batch_size=rows_at_once(backbone),
            on_texts=lambda n, total: context.show("policy", n, total, "replies of held-out pairs"),
        )
        save_json(context.path("policy.json"), {**asdict(found), "note": found.note})
        return {"n": found.accuracy.n}

    context.once("policy", inputs, ["policy.json"], work)


def judge_replies(context: StageContext) -> None:
    """Stages ``judgements-judge`` and ``judgements-labeller``: guided replies against unguided ones."""
    from coala.alignment.judges import judge_stamp, open_judge
    from coala.evaluation import judge_many

    settings = context.recipe.evaluation
    for name, text in (("judge", settings.judge), ("labeller", settings.labeller)):
        if text is None:
            continue
        inputs = {
            "judge": judge_stamp(text),
            "guided": file_digest(context.path("generations-guided.jsonl")),
            "unguided": file_digest(context.path("generations-unguided.jsonl")),
        }
        stage = f"judgements-{name}"

        def work(name: str = name, text: str = text, stage: str = stage) -> None:
            guided = load_generations(context.path("generations-guided.jsonl"))
            unguided = load_generations(context.path("generations-unguided.jsonl"))
            prompts = {prompt_id(pair.prompt): pair.prompt for pair in load_pairs(context.path("pairs-eval.jsonl"))}
            context.show(stage, 0, 2 * len(guided))
            found = judge_many(
                guided,
                unguided,
                open_judge(text),
                prompts=prompts,
                on_progress=lambda done, total: context.show(stage, done, total, "verdicts"),
                on_failure=lambda prompt, error: context.note(f"{stage}: no verdict on prompt {prompt}: {error}"),
            )
            save_judgements(context.path(f"judgements-{name}.jsonl"), found.judgements)

        context.once(stage, inputs, [f"judgements-{name}.jsonl"], work)


def rows_at_once(backbone: LanguageModel) -> int:
    """Rows that are decoded together."""
    slow = backbone.device.type == "cpu" and backbone.shape.body_matmul_parameters > SMALL
    return SLOW_PORTION if slow else PORTION
