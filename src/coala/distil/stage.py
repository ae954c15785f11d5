"""The stage: from a finished run to RUN/distilled, a policy that any program can serve.

RUN/distilled/replies.jsonl         what the teacher wrote (programs `guided`)
RUN/distilled/states/               the states of its steps
RUN/distilled/policy.safetensors  policy.json  path.json
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coala.alignment import load_parts
from coala.callbacks import OnNote, OnProgress, quiet, silent
from coala.decoding import Guidance, generate
from coala.distil.matrix import output_matrix
from coala.distil.settings import DistilSettings
from coala.distil.shift import shift_states
from coala.distil.states import Lesson, guided_lessons, teacher_states, weighted_lessons
from coala.policies import DistilledPolicy, DistilStates
from coala.recipe import Recipe, recipe_of
from coala.store import RunFolder, digest, load_features, load_pairs, save_json
from coala.values import CoalaError, FeatureSet, Pair, Turn, conversation_text, prompt_id

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.values import ConvexHead

ROWS = 60  # of the model that the teacher's replies take together, candidates included


def distil(
    path: Path | str,
    settings: DistilSettings = DistilSettings(),  # noqa: B008 - frozen
    *,
    on_progress: OnProgress = silent,
    on_note: OnNote = quiet,
    trust_remote_code: bool = False,
    download: bool = False,
) -> DistilledPolicy:
    """Distil the guidance of the run ``path`` into a change of its model's output layer; written to RUN/distilled.

    Called again with the same settings it takes up the replies and states that are there. Raises ``CoalaError`` for a
    model whose logits are not a matrix times its final state, and for a run that another process is at work in.
    """
    from coala.convex import fit_output

    run = RunFolder.open(path)
    recipe = recipe_of(run.settings, run.path / "run.json")
    with run.held():
        backbone, head, _ = load_parts(run.path, trust_remote_code=trust_remote_code, download=download)
        output, guidance = output_matrix(backbone), _teacher_of(recipe, settings)
        temperature = recipe.evaluation.temperature or 1.0
        told: dict[str, Any] = {
            "temperature": temperature,
            "on_reply": lambda n, total: on_progress("states", n, total, f"{n} of {total} replies"),
            "on_note": on_note,
        }
        if settings.teacher != "weighted":
            _check_evidence(head, guidance)
        if settings.teacher == "shift":
            states = _shifted(recipe, run, backbone, head, guidance, settings, told)
        else:
            guided = settings.teacher == "guided"
            lessons = (
                _guided(recipe, run, backbone, head, guidance, settings, on_progress)
                if guided
                else weighted_lessons(*_pairs(run), head, settings.beta)
            )
            folder = run.path / "distilled" / f"states-{digest([asdict(lesson) for lesson in lessons])[:12]}"
            states = teacher_states(backbone, output, lessons, folder, guidance, **told)
        if outside := int((~states.in_nucleus).sum()):
            where = "left out" if settings.support == "nucleus" else "kept"
            on_note(f"{outside} of {len(states)} tokens lie outside their step's nucleus: {where}")
        # Sampled at a temperature, the policy is the softmax of logits over it.
        found = fit_output(
            states,
            output / np.float32(temperature),
            support=settings.support,
            ridge=settings.ridge,
            rank=settings.rank,
            tolerance=settings.tolerance,
            seed=settings.seed,
            progress=lambda what, n, total, row: on_progress(f"distil {what}", n, total, _told(row)),
        )
        policy = DistilledPolicy(
            found.left,
            found.right,
            backbone.spec(),
            settings.teacher,
            settings.support,
            found.ridge,
            found.certificate,
        )
        policy.save(run.path / "distilled")
        about = {
            "settings": settings,
            "guidance": str(guidance),
            "n_replies": len(np.unique(states.group)),
            "path": found.path,
        }
        save_json(run.path / "distilled" / "path.json", about)
    return policy


def _teacher_of(recipe: Recipe, settings: DistilSettings) -> Guidance:
    chosen = recipe.guidance
    return Guidance(
        "shift" if settings.teacher == "shift" else "block",
        rule=chosen.rule,
        candidates=settings.candidates,
        block_tokens=settings.block_tokens,
        top_k=chosen.top_k,
        top_p=chosen.top_p,
    )


def _check_evidence(head: ConvexHead, guidance: Guidance) -> None:
    if guidance.weighs and head.evidence == 0:
        raise CoalaError(
            "Found a head that is no better than chance on held-out pairs, so that it guides nothing; expected one "
            "with evidence. Fix: give `coala align` more pairs, or another --rule."
        )


def _shifted(
    recipe: Recipe,
    run: RunFolder,
    backbone: LanguageModel,
    head: ConvexHead,
    guidance: Guidance,
    settings: DistilSettings,
    told: dict[str, Any],
) -> DistilStates:
    prompts, longest = _prompts(run)[: settings.prompts], recipe.evaluation.max_new_tokens
    named = digest([prompt_id(prompt) for prompt in prompts], asdict(guidance), longest, settings.seed)[:12]
    folder = run.path / "distilled" / f"states-{named}"
    return shift_states(backbone, head, prompts, folder, guidance, max_new_tokens=longest, seed=settings.seed, **told)


def _guided(
    recipe: Recipe,
    run: RunFolder,
    backbone: LanguageModel,
    head: ConvexHead,
    guidance: Guidance,
    settings: DistilSettings,
    on_progress: OnProgress,
) -> list[Lesson]:
    prompts = _prompts(run)[: settings.prompts]
    longest, temperature = recipe.evaluation.max_new_tokens, recipe.evaluation.temperature
    ids = [prompt_id(prompt) for prompt in prompts]
    named = digest(ids, asdict(guidance), longest, temperature, settings.seed)[:12]
    replies = generate(
        prompts,
        backbone,
        head,
        guidance,
        max_new_tokens=longest,
        temperature=temperature,
        seed=settings.seed,
        prompt_ids=ids,
        batch_size=max(1, ROWS // guidance.rows),
        kept=run.path / "distilled" / f"replies-{named}.jsonl",
        on_reply=lambda n, total: on_progress("guided replies", n, total, f"{n} of {total} replies"),
    )
    return guided_lessons(backbone, prompts, replies, longest)


def _pairs(run: RunFolder) -> tuple[list[Pair], FeatureSet]:
    return load_pairs(run.path / "pairs-train.jsonl"), load_features(run.path / "features" / "train")


def _prompts(run: RunFolder) -> Sequence[tuple[Turn, ...]]:
    pairs = load_pairs(run.path / "pairs-train.jsonl")
    return list({conversation_text(pair.prompt): pair.prompt for pair in pairs}.values())


def _told(row: dict[str, Any]) -> str:
    return f"held-out change {row['held_out']:+.4f} nats a token" if "held_out" in row else ""
