"""The stage: from a finished run to RUN/distilled, a policy that any program can serve.

RUN/distilled/replies.jsonl         what the teacher wrote (programs `guided`)
RUN/distilled/states/               the states of its steps
RUN/distilled/policy.safetensors  policy.json  path.json
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coala.alignment import load_parts
from coala.alignment.talking import settled
from coala.callbacks import OnNote, OnProgress, quiet, silent
from coala.decoding import Guidance, generate
from coala.distil.accounts import dpo_flops, fit_flops, pair_states_flops, reply_states_flops
from coala.distil.matrix import output_matrix
from coala.distil.own_score import OwnScore
from coala.distil.shift import shift_states
from coala.distil.states import LIGHT, Lesson, guided_lessons, teacher_states, weighted_lessons
from coala.policies import DistilledPolicy, DistilStates
from coala.recipe import Recipe, overlay, recipe_of
from coala.settings import DistilSettings
from coala.store import (
    DISTILLED,
    RunFolder,
    digest,
    discard,
    file_digest,
    load_features,
    load_json,
    load_pairs,
    save_json,
)
from coala.values import CoalaError, Estimate, Turn, conversation_text, one_per_prompt, prompt_id

if TYPE_CHECKING:
    from coala.alignment.parts import LoadParts
    from coala.backbone import LanguageModel
    from coala.values import ConvexHead, Float32, Generation

ROWS = 60  # of the model that the teacher's replies take together, candidates included


def distil(
    path: Path | str,
    settings: DistilSettings | None = None,
    *,
    on_progress: OnProgress = silent,
    on_note: OnNote = quiet,
    trust_remote_code: bool = False,
    download: bool = False,
) -> DistilledPolicy:
    """Distil the guidance of the run ``path`` into a change of its model's output layer; written to RUN/distilled.

    ``settings`` are by default those of the run's recipe, its section ``distil``. Called again with the same settings
    it returns the policy that is there; after a kill it takes up the replies and states that are there. Raises
    ``CoalaError`` for a model whose logits are not a matrix times its final state, and for a run that another process
    is at work in.
    """
    run = RunFolder.open(path)
    with run.held():
        work = Work.of(run, settings, on_progress, on_note, trust_remote_code=trust_remote_code, download=download)
        return carry_out(work)


def settings_of(path: Path | str, given: Mapping[str, Any]) -> DistilSettings:
    """Those of the recipe of the run ``path``, with what is ``given`` over them; ``RecipeError`` for what cannot be."""
    run = RunFolder.open(path)
    return recipe_of(overlay(run.settings, {"distil": dict(given)}), run.path / "run.json").distil


def carry_out(work: Work) -> DistilledPolicy:
    """The policy of ``work``, written to its run, which the caller holds."""
    settings = work.settings
    if settings.teacher != "weighted":
        work.check_evidence()
    if work.head.evidence == 0:
        work.on_note(
            "the head is at chance on held-out pairs: there is no evidence for the preference that is distilled"
        )
    plan, made = work.plan(), work.folder / "path.json"
    if made.is_file() and (there := load_json(made)).get("plan") == plan:
        work.on_note(f"{work.folder} already has the policy of these settings; delete it to fit it again")
        _say_learnt(there["held_out"] and Estimate(**there["held_out"]), work)
        return DistilledPolicy.load(work.folder)
    discard(made)  # a kill between the files that follow leaves no record of another policy
    if settings.rounds > 1:
        from coala.distil.rounds import held_out_prompts, in_rounds

        policy, about = in_rounds(work, held_out_prompts(work))
    else:
        states, taught = work.states()
        policy, about = project(work, states, taught)
        about |= {"n_replies": len(np.unique(states.group)), "flops": {**work.teaching_flops(states), **about["flops"]}}
    about["flops"]["dpo_sweep"] = dpo_flops(work.run, work.backbone)  # for comparison
    policy.save(work.folder)
    common = {
        "plan": plan,
        "temperature": work.temperature,
        "sampling": {"top_k": work.guidance.top_k, "top_p": work.guidance.top_p},
        "settings": settings,
        "guidance": str(work.guidance),
    }
    save_json(made, {**common, **about})
    return policy


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """What every step of a distillation is given: who teaches which ``prompts``, how it samples, who hears of it.

    Replies are sampled at ``sampled_at`` and have at most ``longest`` tokens; ``folder`` is where steps are written.
    """

    settings: DistilSettings
    backbone: LanguageModel
    head: ConvexHead
    guidance: Guidance
    sampled_at: float
    longest: int
    prompts: Sequence[tuple[Turn, ...]]
    folder: Path
    on_progress: OnProgress = silent
    on_note: OnNote = quiet

    @cached_property
    def output(self) -> Float32:
        """W (V, d); refuses a model whose logits are not W times its final state."""
        return output_matrix(self.backbone)

    @property
    def temperature(self) -> float:
        """That of the policy: greedy text has none of its own."""
        return self.sampled_at or 1.0

    def check_evidence(self) -> None:
        if self.guidance.weighs and self.head.evidence == 0:
            raise NothingToDistil(
                "Found a head that is no better than chance on held-out pairs, so that it guides nothing; expected one "
                "with evidence. Fix: more pairs, or another rule of guidance (--rule)."
            )

    def own_score(self, taught: Taught) -> OwnScore:
        """What a change's own replies to the teacher's prompts score beside the teacher's."""
        return OwnScore(
            self.backbone,
            self.head,
            taught.prompts,
            [reply.score for reply in taught.replies],
            self.guidance,
            max_new_tokens=self.longest,
            temperature=self.sampled_at,
            seed=self.settings.seed,
            most=self.settings.held_out,
        )

    def states_of(self, lessons: Sequence[Lesson], before: DistilledPolicy | None = None) -> DistilStates:
        """The states of ``lessons``; of replies drawn from the policy ``before`` nuclei are that policy's."""
        change: dict[str, Any] = {} if before is None else {"change": before.change}
        named = digest([asdict(lesson) for lesson in lessons], *change.values())[:12]
        folder = self.folder / f"states-{named}"
        found = teacher_states(self.backbone, self.output, lessons, folder, self.guidance, **self.told, **change)
        return self.noted(found)

    def noted(self, states: DistilStates) -> DistilStates:
        if outside := int((~states.in_nucleus).sum()):
            where = "left out" if self.settings.support == "nucleus" else "kept"
            self.on_note(f"{outside} of {len(states)} tokens are outside their step's nucleus: {where}")
        return states

    @property
    def told(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "on_reply": lambda n, total: self.on_progress("states", n, total, f"{n} of {total} replies"),
            "on_note": self.on_note,
        }


@dataclass(frozen=True, kw_only=True)
class Work(Teaching):
    """The distillation of a finished run.

    Temperature, top-k and top-p are those of the run's own replies, which the model may have suggested.
    """

    run: RunFolder
    recipe: Recipe

    @classmethod
    def of(
        cls,
        run: RunFolder,
        settings: DistilSettings | None,
        on_progress: OnProgress,
        on_note: OnNote,
        parts: LoadParts | None = None,
        **permitted: Any,
    ) -> Work:
        """Of a finished run; ``parts``, if not given, are :func:`load_parts` with what is ``permitted``."""
        recipe = recipe_of(run.settings, run.path / "run.json")
        settings = recipe.distil if settings is None else settings
        backbone, head, _ = load_parts(run.path, **permitted) if parts is None else parts()
        teacher = Guidance(
            "shift" if settings.teacher == "shift" else "block",
            rule=recipe.guidance.rule,
            candidates=settings.candidates,
            block_tokens=settings.block_tokens,
        )
        guidance, temperature = settled(run.path, backbone, teacher, {}, on_note)
        pairs = one_per_prompt(load_pairs(run.path / "pairs-train.jsonl"))
        return cls(
            settings=settings,
            backbone=backbone,
            head=head,
            guidance=guidance,
            sampled_at=temperature,
            longest=recipe.evaluation.max_new_tokens,
            prompts=[pair.prompt for pair in pairs][: settings.prompts],
            folder=run.path / DISTILLED,
            on_progress=on_progress,
            on_note=on_note,
            run=run,
            recipe=recipe,
        )

    def plan(self) -> str:
        """The digest of everything that decides the policy."""
        head, files = self.head, [self.run.path / f"pairs-{part}.jsonl" for part in ("train", "eval")]
        return digest(
            [asdict(self.settings), asdict(self.guidance), self.sampled_at, self.longest],
            [self.backbone.weights, self.backbone.template, head.evidence],
            *(head.linear, head.gates, head.weights),
            *(file_digest(path) for path in files if path.is_file()),
        )

    def states(self) -> tuple[DistilStates, Taught]:
        """The states of what the settings' teacher teaches."""
        if self.settings.teacher == "guided":
            return guided_states(self)
        if self.settings.teacher == "shift":
            return self.noted(_shifted(self)), Taught()
        return self.states_of(_weighted(self)), Taught()

    def teaching_flops(self, states: DistilStates) -> dict[str, int]:
        """FLOPs of the teacher's replies and of ``states``."""
        if self.settings.teacher == "weighted":
            return {"states": pair_states_flops(self.run, self.backbone, states)}
        return reply_states_flops(self.backbone, self.head, self.guidance, self.prompts, states)


@dataclass(frozen=True)
class Taught:
    """Of a teacher that wrote what there is to learn, by group, its ``replies`` to ``prompts``."""

    prompts: Sequence[tuple[Turn, ...]] = ()
    replies: Sequence[Generation] = ()


def guided_states(
    work: Teaching, before: DistilledPolicy | None = None, *, seed: int | None = None
) -> tuple[DistilStates, Taught]:
    """The states of guided replies; in a later round the head guides the policy of the round ``before``."""
    taught = teacher_replies(work, before, seed=seed)
    return work.states_of(guided_lessons(work.backbone, taught.prompts, taught.replies, work.longest), before), taught


def project(work: Teaching, states: DistilStates, taught: Taught) -> tuple[DistilledPolicy, dict[str, Any]]:
    """The convex program: the policy whose steps come nearest to ``states``; what was tried and the FLOPs it took.

    ``flops`` are those of the solver and, where a strength is chosen, of that choice; ``fit_flops`` of the last fit.
    """
    from coala.convex import fit_output

    settings = work.settings
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
    _say_learnt(found.held_out, work)
    made = settings.teacher, settings.support, found.ridge, found.certificate
    search, fit = fit_flops(found, states.width, work.backbone.shape.vocabulary)
    flops = {"solver": search + fit, **({} if own is None else {"choice": own.flops})}
    policy = DistilledPolicy(found.left, found.right, work.backbone.spec(), *made)
    return policy, {"path": found.path, "held_out": found.held_out, "flops": flops, "fit_flops": fit}


def _say_learnt(held_out: Estimate | None, work: Teaching) -> None:
    """Say so where held-out prompts do not show that the change is nearer to the teacher than none."""
    if held_out is not None and not held_out.high < 0:
        work.on_note(
            f"held-out prompts do not show that the change comes nearer to the teacher: {held_out.value:+.4f} "
            f"[{held_out.low:+.4f}, {held_out.high:+.4f}] nats a token from no change. Fix: "
            + ("more pairs" if work.settings.teacher == "weighted" else "more --prompts, or --teacher weighted")
        )


class NothingToDistil(CoalaError):
    """A head that held-out pairs do not tell from chance guides nothing."""


def _shifted(work: Work) -> DistilStates:
    prompts, guidance, seed = work.prompts, work.guidance, work.settings.seed
    decides = [[prompt_id(prompt) for prompt in prompts], asdict(guidance), work.longest, work.temperature, seed]
    folder = work.folder / f"states-{digest(*decides)[:12]}"
    return shift_states(
        work.backbone, work.head, prompts, folder, guidance, max_new_tokens=work.longest, seed=seed, **work.told
    )


def teacher_replies(
    work: Teaching, before: DistilledPolicy | None = None, *, seed: int | None = None, kept: Path | None = None
) -> Taught:
    """The teacher's reply to each training prompt; of a later round, by the head over the policy ``before``.

    ``kept`` is the file they are written to, by default one of the work's folder that is named by what decides them.
    """
    backbone, guidance, head = work.backbone, work.guidance, work.head
    if before is not None:
        backbone, guidance = backbone.with_policy(before), replace(guidance, over="distilled")
    prompts, seed = work.prompts, work.settings.seed if seed is None else seed
    ids = [prompt_id(prompt) for prompt in prompts]
    decides = [ids, asdict(guidance), work.longest, work.sampled_at, seed, head.linear, head.gates, head.weights]
    named = digest(*decides, head.evidence, *([] if before is None else [before.change]))[:12]
    replies = generate(
        prompts,
        backbone,
        head,
        guidance,
        max_new_tokens=work.longest,
        temperature=work.sampled_at,
        seed=seed,
        prompt_ids=ids,
        batch_size=max(1, ROWS // guidance.rows),
        kept=kept or work.folder / f"replies-{named}.jsonl",
        on_reply=lambda n, total: work.on_progress("guided replies", n, total, f"{n} of {total} replies"),
    )
    return Taught(prompts, replies)


def _weighted(work: Work) -> list[Lesson]:
    pairs, features = load_pairs(work.run.path / "pairs-train.jsonl"), load_features(work.run.path / "features/train")
    lessons = weighted_lessons(work.backbone, pairs, features, work.head, work.settings.beta, work.longest)
    n = len({(conversation_text(pair.prompt), text) for pair in pairs for text in (pair.chosen, pair.rejected) if text})
    whole = sum(lesson.ended for lesson in lessons)
    left = f" (the others weigh at most {100 * LIGHT:g} % together)" if len(lessons) < n else ""
    work.on_note(f"{len(lessons)} of {n} replies of the pairs teach{left}, {whole} of them with their end")
    return lessons


def _told(row: dict[str, Any]) -> str:
    if "lead" in row:
        lead = row["lead"]
        return f"strength {row['strength']:g}: head score {lead.value:+.3g} against the teacher's, n = {lead.n}"
    return f"held-out loss {row['held_out']:+.4f} nats a token against the base model's" if "held_out" in row else ""
