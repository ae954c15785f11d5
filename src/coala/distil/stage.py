"""The stage: from a finished run to RUN/distilled, a policy that any program can serve.

RUN/distilled/replies.jsonl         what the teacher wrote (programs `guided`)
RUN/distilled/states/               the states of its steps
RUN/distilled/policy.safetensors  policy.json  path.json
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from coala.alignment import load_parts
from coala.callbacks import OnNote, OnProgress, quiet, silent
from coala.decoding import Guidance, generate
from coala.distil.matrix import output_matrix
from coala.distil.states import Lesson, teacher_states
from coala.policies import DistilledPolicy, Teacher
from coala.recipe import Recipe, recipe_of
from coala.store import RunFolder, digest, load_features, load_pairs, save_json
from coala.values import CoalaError, Turn, conversation_text, prompt_id

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.values import ConvexHead

CANDIDATES = 10  # blocks of the teacher: more than one would serve with
BLOCK_TOKENS = 5
BATCH = 30  # rows of guided replies, candidates included


def distil(
    path: Path | str,
    *,
    teacher: Teacher = "guided",
    n_prompts: int = 300,
    candidates: int = CANDIDATES,
    beta: float = 1.0,
    support: Literal["nucleus", "vocabulary"] = "nucleus",
    ridge: float | None = None,
    rank: int | Literal["auto", "full"] = "auto",
    tolerance: float = 1e-3,
    seed: int = 0,
    on_progress: OnProgress = silent,
    on_note: OnNote = quiet,
) -> DistilledPolicy:
    """Distil the guidance of the run ``path`` into a change of its model's output layer; written to RUN/distilled.

    ``guided``: the likelihood of replies to ``n_prompts`` training prompts that the head guides, choosing among
    ``candidates`` blocks. ``weighted``: the likelihood of the training pairs' own replies, weighted by exp(r / beta)
    for scores r in standard deviations; nothing is generated. Ridge and rank are chosen on held-out prompts unless
    given. Called again with the same settings it takes up what is there.
    """
    from coala.convex import fit_output

    run = RunFolder.open(path)
    recipe = recipe_of(run.settings, run.path / "run.json")
    backbone, head, _ = load_parts(run.path)
    output = output_matrix(backbone)
    folder = run.path / "distilled"
    guidance = _teacher_of(recipe, candidates)
    temperature = recipe.evaluation.temperature or 1.0
    with run.held():
        if teacher == "guided":
            lessons = _guided(recipe, run, backbone, head, guidance, folder, n_prompts, temperature, seed, on_progress)
        elif teacher == "weighted":
            lessons = _weighted(run, head, beta)
        else:
            raise CoalaError(f"Found the teacher {teacher!r}; expected 'guided' or 'weighted'.")
        states = teacher_states(
            backbone,
            output,
            lessons,
            folder / f"states-{teacher}-{digest([asdict(lesson) for lesson in lessons])[:12]}",
            guidance,
            temperature=temperature,
            on_reply=lambda n, total: on_progress("states", n, total, f"{n} of {total} replies"),
            on_note=on_note,
        )
        if outside := int((~states.in_nucleus).sum()):
            where = "left out" if support == "nucleus" else "kept"
            on_note(f"{outside} of {len(states)} tokens lie outside their step's nucleus: {where}")
        # Sampled at a temperature, the policy is the softmax of logits over it.
        found = fit_output(
            states,
            output / np.float32(temperature),
            support=support,
            ridge=ridge,
            rank=rank,
            tolerance=tolerance,
            seed=seed,
            progress=lambda what, n, total, row: on_progress(f"distil {what}", n, total, _told(row)),
        )
        policy = DistilledPolicy(
            found.left, found.right, backbone.spec(), teacher, support, found.ridge, found.certificate
        )
        policy.save(folder)
        save_json(folder / "path.json", {"path": found.path, "n_lessons": len(lessons), "guidance": str(guidance)})
    return policy


def _teacher_of(recipe: Recipe, candidates: int) -> Guidance:
    chosen = recipe.guidance
    return Guidance(
        "block",
        rule=chosen.rule,
        candidates=candidates,
        block_tokens=BLOCK_TOKENS,
        top_k=chosen.top_k,
        top_p=chosen.top_p,
    )


def _guided(
    recipe: Recipe,
    run: RunFolder,
    backbone: LanguageModel,
    head: ConvexHead,
    guidance: Guidance,
    folder: Path,
    n_prompts: int,
    temperature: float,
    seed: int,
    on_progress: OnProgress,
) -> list[Lesson]:
    prompts = _prompts(run)[:n_prompts]
    longest = recipe.evaluation.max_new_tokens
    named = digest([prompt_id(prompt) for prompt in prompts], str(guidance), longest, temperature, seed)[:12]
    replies = generate(
        prompts,
        backbone,
        head,
        guidance,
        max_new_tokens=longest,
        temperature=temperature,
        seed=seed,
        prompt_ids=[prompt_id(prompt) for prompt in prompts],
        batch_size=max(1, BATCH // guidance.rows * 2),
        kept=folder / f"replies-{named}.jsonl",
        on_reply=lambda n, total: on_progress("guided replies", n, total, f"{n} of {total} replies"),
    )
    # A reply that a stop string ended did not end by a token.
    tells = not backbone.stop_texts
    return [
        Lesson(prompt, reply.text, number, ended=tells and reply.n_tokens < longest)
        for number, (prompt, reply) in enumerate(zip(prompts, replies, strict=True))
        if reply.text
    ]


def _weighted(run: RunFolder, head: ConvexHead, beta: float) -> list[Lesson]:
    if not 0 < beta < float("inf"):
        raise CoalaError(f"Found beta {beta}; expected a positive number.")
    pairs, features = load_pairs(run.path / "pairs-train.jsonl"), load_features(run.path / "features" / "train")
    if len(features) != len(pairs):
        raise CoalaError(
            f"Found {len(features)} rows of features of {len(pairs)} pairs: the head was fitted on prefixes, whose "
            "scores are not those of replies. Fix: use the teacher 'guided', or fit on whole replies."
        )
    scores = [head.score(side, features.prompt) for side in (features.chosen, features.rejected)]
    numbers = {text: n for n, text in enumerate(dict.fromkeys(conversation_text(pair.prompt) for pair in pairs))}
    found: dict[tuple[int, str], tuple[tuple[Turn, ...], float]] = {}
    for pair, chosen, rejected in zip(pairs, *scores, strict=True):
        group = numbers[conversation_text(pair.prompt)]
        for text, score in ((pair.chosen, chosen), (pair.rejected, rejected)):
            found.setdefault((group, text), (pair.prompt, float(score)))
    rewards = np.array([score for _, score in found.values()])
    scaled = (rewards - rewards.max()) / (beta * max(float(rewards.std()), 1e-12))
    return [
        Lesson(prompt, text, group, weight=float(weight), ended=False)
        for ((group, text), (prompt, _)), weight in zip(found.items(), np.exp(scaled), strict=True)
        if text
    ]


def _prompts(run: RunFolder) -> Sequence[tuple[Turn, ...]]:
    pairs = load_pairs(run.path / "pairs-train.jsonl")
    return list({conversation_text(pair.prompt): pair.prompt for pair in pairs}.values())


def _told(row: dict[str, Any]) -> str:
    return f"held-out change {row['held_out']:+.4f} nats a token" if "held_out" in row else ""
