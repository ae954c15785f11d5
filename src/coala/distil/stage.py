"""The stage: from a finished run to RUN/distilled, a policy that any program can serve.

RUN/distilled/replies.jsonl         what the teacher wrote (programs `guided`)
RUN/distilled/states/               the states of its steps
RUN/distilled/policy.safetensors  policy.json  path.json
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coala.alignment import load_parts
from coala.callbacks import OnNote, OnProgress, quiet, silent
from coala.decoding import Guidance, generate
from coala.distil.accounts import output_flops
from coala.distil.matrix import output_matrix
from coala.distil.own_score import OwnScore
from coala.distil.settings import DistilSettings
from coala.distil.shift import shift_states
from coala.distil.states import guided_lessons, teacher_states, weighted_lessons
from coala.policies import DistilledPolicy, DistilStates
from coala.recipe import Recipe, recipe_of
from coala.store import DISTILLED, RunFolder, digest, load_features, load_pairs, save_json
from coala.values import CoalaError, FeatureSet, Pair, Turn, conversation_text, prompt_id

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.values import ConvexHead, Float32, Generation

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
    run = RunFolder.open(path)
    recipe = recipe_of(run.settings, run.path / "run.json")
    with run.held():
        backbone, head, _ = load_parts(run.path, trust_remote_code=trust_remote_code, download=download)
        guidance = teacher_of(recipe, settings)
        if settings.teacher != "weighted":
            check_evidence(head, guidance)
        if head.evidence == 0:
            on_note(
                "the head is at chance on held-out pairs: what is distilled of it is no preference that they vouch for"
            )
        work = Work(run, recipe, settings, backbone, head, guidance, output_matrix(backbone), on_progress, on_note)
        if settings.rounds > 1:
            from coala.distil.rounds import in_rounds

            policy, about = in_rounds(work)
        else:
            taught = taught_states(work)
            policy, tried = project(work, taught)
            about = {"n_replies": len(np.unique(taught.states.group)), **tried}
        policy.save(run.path / DISTILLED)
        common = {
            "temperature": work.temperature,
            "sampling": {"top_k": guidance.top_k, "top_p": guidance.top_p},
            "settings": settings,
            "guidance": str(guidance),
        }
        save_json(run.path / DISTILLED / "path.json", {**common, **about})
    return policy


@dataclass(frozen=True)
class Work:
    """What every step of a distillation is given: the run, its parts, who teaches, W (V, d), and who hears of it."""

    run: RunFolder
    recipe: Recipe
    settings: DistilSettings
    backbone: LanguageModel
    head: ConvexHead
    guidance: Guidance
    output: Float32
    on_progress: OnProgress
    on_note: OnNote

    @property
    def folder(self) -> Path:
        return self.run.path / DISTILLED

    @property
    def temperature(self) -> float:
        """That of the policy: greedy text has none of its own."""
        return self.recipe.evaluation.temperature or 1.0

    def own_score(self, taught: Taught) -> OwnScore:
        """What a change's own replies to the teacher's prompts score beside the teacher's."""
        evaluation = self.recipe.evaluation
        return OwnScore(
            self.backbone,
            self.head,
            taught.prompts,
            taught.replies,
            self.guidance,
            max_new_tokens=evaluation.max_new_tokens,
            temperature=evaluation.temperature,
            seed=self.settings.seed,
        )


@dataclass(frozen=True)
class Taught:
    """The states of the teacher's replies; by group those that it wrote itself, ``replies`` to ``prompts``."""

    states: DistilStates
    prompts: Sequence[tuple[Turn, ...]] = ()
    replies: Sequence[Generation] = ()


def taught_states(work: Work, before: DistilledPolicy | None = None, *, seed: int | None = None) -> Taught:
    """What the teacher teaches; in a later round the head guides the policy of the round ``before``."""
    settings, run, guidance = work.settings, work.run, work.guidance
    told: dict[str, Any] = {
        "temperature": work.temperature,
        "on_reply": lambda n, total: work.on_progress("states", n, total, f"{n} of {total} replies"),
        "on_note": work.on_note,
    }
    prompts: Sequence[tuple[Turn, ...]] = ()
    replies: Sequence[Generation] = ()
    if settings.teacher == "shift":
        states = _shifted(work.recipe, run, work.backbone, work.head, guidance, settings, told)
    else:
        backbone = work.backbone
        if before is not None:
            backbone, guidance = backbone.with_policy(before), replace(guidance, over="distilled")
            told["change"] = before.change
        settings = settings if seed is None else replace(settings, seed=seed)
        if settings.teacher == "guided":
            of = work.recipe, run, backbone, work.head, guidance, settings, work.on_progress
            prompts, replies = teacher_replies(*of)
            lessons = guided_lessons(backbone, prompts, replies, work.recipe.evaluation.max_new_tokens)
        else:
            lessons = weighted_lessons(*_pairs(run), work.head, settings.beta)
        named = digest([asdict(lesson) for lesson in lessons], *([] if before is None else [before.change]))
        states = teacher_states(
            work.backbone, work.output, lessons, work.folder / f"states-{named[:12]}", guidance, **told
        )
    if outside := int((~states.in_nucleus).sum()):
        where = "left out" if settings.support == "nucleus" else "kept"
        work.on_note(f"{outside} of {len(states)} tokens lie outside their step's nucleus: {where}")
    return Taught(states, prompts, replies)


def project(work: Work, taught: Taught) -> tuple[DistilledPolicy, dict[str, Any]]:
    """The convex program: the policy whose steps come nearest to ``states``; what was tried and the FLOPs it took."""
    from coala.convex import fit_output

    settings, states = work.settings, taught.states
    own = work.own_score(taught) if settings.strength == "auto" and taught.replies else None
    # Sampled at a temperature, the policy is the softmax of logits over it.
    found = fit_output(
        states,
        work.output / np.float32(work.temperature),
        support=settings.support,
        ridge=settings.ridge,
        rank=settings.rank,
        tolerance=settings.tolerance,
        seed=settings.seed,
        strength=1.0 if settings.strength == "auto" else settings.strength,
        lead=own,
        progress=lambda what, n, total, row: work.on_progress(f"distil {what}", n, total, _told(row)),
    )
    made = settings.teacher, settings.support, found.ridge, found.certificate
    guidance = None if settings.teacher == "weighted" else work.guidance
    flops = output_flops(work.run, work.backbone, work.head, guidance, states, found)
    if own is not None:
        flops["choice"] = own.flops
    return DistilledPolicy(found.left, found.right, work.backbone.spec(), *made), {"path": found.path, "flops": flops}


class NothingToDistil(CoalaError):
    """A head that held-out pairs do not tell from chance guides nothing."""


def teacher_of(recipe: Recipe, settings: DistilSettings) -> Guidance:
    chosen = recipe.guidance
    return Guidance(
        "shift" if settings.teacher == "shift" else "block",
        rule=chosen.rule,
        candidates=settings.candidates,
        block_tokens=settings.block_tokens,
        top_k=chosen.top_k,
        top_p=chosen.top_p,
    )


def check_evidence(head: ConvexHead, guidance: Guidance) -> None:
    if guidance.weighs and head.evidence == 0:
        raise NothingToDistil(
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
    folder = run.path / DISTILLED / f"states-{named}"
    return shift_states(backbone, head, prompts, folder, guidance, max_new_tokens=longest, seed=settings.seed, **told)


def teacher_replies(
    recipe: Recipe,
    run: RunFolder,
    backbone: LanguageModel,
    head: ConvexHead,
    guidance: Guidance,
    settings: DistilSettings,
    on_progress: OnProgress,
) -> tuple[Sequence[tuple[Turn, ...]], list[Generation]]:
    """The teacher's reply to each of the first training prompts, and the prompts."""
    prompts = _prompts(run)[: settings.prompts]
    longest, temperature = recipe.evaluation.max_new_tokens, recipe.evaluation.temperature
    ids = [prompt_id(prompt) for prompt in prompts]
    over = [backbone.policy.change] if guidance.change else []
    decides = [ids, asdict(guidance), longest, temperature, settings.seed, head.linear, head.gates, head.weights]
    named = digest(*decides, head.evidence, *over)[:12]
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
        kept=run.path / DISTILLED / f"replies-{named}.jsonl",
        on_reply=lambda n, total: on_progress("guided replies", n, total, f"{n} of {total} replies"),
    )
    return prompts, replies


def _pairs(run: RunFolder) -> tuple[list[Pair], FeatureSet]:
    return load_pairs(run.path / "pairs-train.jsonl"), load_features(run.path / "features" / "train")


def _prompts(run: RunFolder) -> Sequence[tuple[Turn, ...]]:
    pairs = load_pairs(run.path / "pairs-train.jsonl")
    return list({conversation_text(pair.prompt): pair.prompt for pair in pairs}.values())


def _told(row: dict[str, Any]) -> str:
    if "lead" in row:
        lead = row["lead"]
        return f"strength {row['strength']:g}: head score {lead.value:+.3g} against the teacher's, n = {lead.n}"
    return f"held-out change {row['held_out']:+.4f} nats a token" if "held_out" in row else ""
