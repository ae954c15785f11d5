"""The second vehicle: a LoRA adapter trained by TRL on the replies that the convex program is fitted to.

RUN/distilled-adapter/adapter_model.safetensors  adapter_config.json     the adapter, as peft reads it
RUN/distilled-adapter/adapter.json                                       all else that is known of it
RUN/distilled-adapter/training-.../                                      while it is trained: a folder for each rate
RUN/distilled-adapter/weights/                                           of a GGUF model: its weights, to train from

No loss is written here. The convex program has a certificate, no learning rate and no backward pass; this has none of
them, and changes every layer.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from coala.callbacks import OnNote, OnProgress, quiet, silent
from coala.costs import Shape, peak_memory, states_flops, teacher_flops
from coala.decoding.adapted import step_log_probs
from coala.distil.accounts import dpo_flops
from coala.distil.settings import AdapterSettings
from coala.distil.stage import Work, teacher_replies
from coala.distil.states import Lesson, guided_lessons
from coala.policies import DistilledAdapter
from coala.recipe import Recipe, recipe_of
from coala.settings import DistilSettings
from coala.statistics.intervals import clustered
from coala.store import RunFolder, digest, discard, load_json, save_adapter, save_json
from coala.values import CoalaError

if TYPE_CHECKING:
    from coala.backbone import LanguageModel
    from coala.baselines import Trained, TrainSettings

Rows = list[tuple[list[int], list[int]]]  # of each reply: the prompt's tokens and its own
FOLDER, WEIGHTS = "distilled-adapter", "weights"


def distil_adapter(
    path: Path | str,
    settings: DistilSettings | None = None,
    adapter: AdapterSettings = AdapterSettings(),  # noqa: B008 - frozen
    *,
    on_progress: OnProgress = silent,
    on_note: OnNote = quiet,
    trust_remote_code: bool = False,
    download: bool = False,
) -> DistilledAdapter:
    """Train an adapter on the replies that the head of the run ``path`` guides; written to RUN/distilled-adapter.

    The replies, and the fifth of their prompts that is held out, are those of :func:`coala.distil.stage.distil` with
    the same settings. Called again it takes up what is there; a killed training goes on from its last epoch. Raises
    ``CoalaError`` for another teacher than ``guided``, whose replies have weights or targets that a likelihood of texts
    lacks, for a model that already has an adapter or is quantised, and without the extra ``baselines``.
    """
    run = RunFolder.open(path)
    recipe = recipe_of(run.settings, run.path / "run.json")
    settings = recipe.distil if settings is None else settings
    _check(recipe, settings, adapter)
    with run.held():
        work = Work.of(run, settings, on_progress, on_note, trust_remote_code=trust_remote_code, download=download)
        work.check_evidence()
        backbone, guidance, sampled_at = work.backbone, work.guidance, work.sampled_at
        taught = teacher_replies(work)
        lessons = guided_lessons(backbone, taught.prompts, taught.replies, work.longest)
        plan = {
            "lessons": digest([asdict(lesson) for lesson in lessons]),
            "weights": backbone.weights,
            "template": backbone.template,
            "settings": {**asdict(adapter), "rates": sorted(adapter.rates), "seed": settings.seed},
        }
        folder = run.path / FOLDER
        if (folder / "adapter.json").is_file():
            there = DistilledAdapter.load(folder)
            if there.facts["plan"] == plan:
                return there
        rows = [rendered(backbone, lesson) for lesson in lessons]
        part = _Part(lessons, rows, held_out(lessons, rows, settings.seed))
        base = part.losses(backbone)
        spec, shape = backbone.spec(), backbone.shape
        lengths = [len(prompt) for prompt, _ in rows], [len(reply) for _, reply in rows]
        flops = {"teacher": teacher_flops(shape, *lengths, candidates=guidance.candidates)}
        flops["dpo_sweep"] = dpo_flops(run, backbone)
        job = _Job.of(recipe, backbone, adapter, settings.seed, folder, plan, trust_remote_code, on_progress)
        # Training loads the model anew: two of them need not lie in memory.
        del backbone, work, taught
        gc.collect()
        runs: dict[float, Trained] = {}
        trials: list[dict[str, Any]] = []
        for rate in sorted(set(adapter.rates)):
            runs[rate] = job.train(rate, part)
            trials += job.measured(rate, runs[rate], part, base)
        best = min(trials, key=lambda row: (row["held_out"], row["rate"], row["epoch"]))
        if best["held_out"] >= 0:
            on_note("No rate lowers the loss on held-out replies: the adapter is worse than none there.")
        if sampled_at != 1:
            on_note(
                f"The replies were sampled at temperature {sampled_at:g}; the adapter learns them as they are: at 1."
            )
        kept = runs[best["rate"]]
        facts = {
            "plan": plan,
            "epochs": adapter.epochs,
            "guidance": str(guidance),
            # What SFT learns is the text as it is: sampled at 1, whatever the teacher was sampled at.
            "temperature": 1.0,
            "sampling": {"top_k": guidance.top_k, "top_p": guidance.top_p},
            **part.facts(),
            "flops": {**flops, **_flops(shape, part, list(runs.values()), adapter)},
            "seconds": {f"{rate:g}": one.seconds for rate, one in runs.items()},
            "peak_bytes": peak_memory(),
            "versions": kept.facts["versions"],
        }
        found = DistilledAdapter(
            dict(_epochs(kept))[best["epoch"]],
            spec,
            settings.teacher,
            adapter.adapter_rank,
            best["rate"],
            best["epoch"],
            float(base.mean()),
            tuple(trials),
            facts,
        )
        found = save_adapter(folder, found)
        for left in (folder / WEIGHTS, *folder.glob("training-*")):
            discard(left)
    return found


@dataclass(frozen=True)
class _Job:
    """What the rates have in common: the weights ``start`` to train from, the folder ``work``, and who watches."""

    start: Path | str
    revision: str | None
    work: Path
    adapter: AdapterSettings
    seed: int
    on_gpu: bool
    options: Mapping[str, Any]
    show: OnProgress

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        backbone: LanguageModel,
        adapter: AdapterSettings,
        seed: int,
        folder: Path,
        plan: Mapping[str, Any],
        trust_remote_code: bool,
        show: OnProgress,
    ) -> _Job:
        from coala.baselines import trainable

        options = {"template": backbone.template.partition(":")[0], "trust_remote_code": trust_remote_code}
        options |= {"device": str(backbone.device), "dtype": str(backbone.dtype).removeprefix("torch.")}
        # TRL trains no GGUF: of such a model it is a copy of the weights.
        start = trainable(recipe.model.name, folder / WEIGHTS)
        revision = recipe.model.revision if start == recipe.model.name else None
        work = folder / f"training-{digest(plan)[:12]}"
        return cls(start, revision, work, adapter, seed, backbone.device.type == "cuda", options, show)

    def train(self, rate: float, part: _Part) -> Trained:
        from coala.baselines import Demonstration, train

        shown = [Demonstration(one.prompt, one.text, one.ended) for one in part.shown]
        return train(
            "sft",
            shown,
            self.start,
            out=self.work / f"{rate:g}",
            settings=train_settings(rate, self.adapter, len(shown), self.seed, self.on_gpu),
            on_step=lambda step, steps, logs: self.show(f"adapter at {rate:g}", step, steps, "steps"),
            revision=self.revision,
            template=self.options["template"],
            device="auto" if self.on_gpu else "cpu",
            trust_remote_code=self.options["trust_remote_code"],
            n_checkpoints=None,
        )

    def measured(self, rate: float, trained: Trained, part: _Part, base: NDArray[np.float64]) -> list[dict[str, Any]]:
        """A row for each epoch, with its loss on the replies held out; kept beside the training."""
        from coala.backbone import load_backbone

        kept = self.work / f"{rate:g}.json"
        if kept.is_file():
            found: list[dict[str, Any]] = load_json(kept)
            return found
        rows = []
        for epoch, adapter in _epochs(trained):
            model = load_backbone(self.start, revision=self.revision, adapter=adapter, download=False, **self.options)
            mean, error, _ = clustered(part.losses(model) - base, part.groups)
            rows.append({"rate": rate, "epoch": epoch, "held_out": mean, "se": error})
            self.show(f"held out at {rate:g}", epoch, self.adapter.epochs, f"{mean:+.4f} nats a token")
        save_json(kept, rows)
        return rows


def held_out(lessons: Sequence[Lesson], rows: Rows, seed: int) -> NDArray[np.bool_]:
    """Which lessons (n,) the convex program holds out: those of one fold of whole prompts, balanced by their tokens."""
    from coala.convex.output_fit import FOLDS
    from coala.convex.validation import grouped_folds

    sizes = [len(reply) for _, reply in rows]
    group = np.repeat([lesson.group for lesson in lessons], sizes)
    folds = grouped_folds(group, FOLDS, seed)
    if folds is None:
        raise CoalaError(
            "Found replies to one prompt; expected several, for a fifth is held out to choose the rate. Fix: give more "
            "--prompts."
        )
    groups = set(group[folds == 0].tolist())
    return np.array([lesson.group in groups for lesson in lessons])


class _Part:
    """The replies, and which of them (n,) are held out."""

    def __init__(self, lessons: Sequence[Lesson], rows: Rows, out: NDArray[np.bool_]) -> None:
        self.shown = [lesson for lesson, held in zip(lessons, out, strict=True) if not held]
        self.learnt = [row for row, held in zip(rows, out, strict=True) if not held]
        self.held = [row for row, held in zip(rows, out, strict=True) if held]
        groups = [lesson.group for lesson, held in zip(lessons, out, strict=True) if held]
        self.groups = np.repeat(groups, [len(reply) for _, reply in self.held])

    def losses(self, model: LanguageModel) -> NDArray[np.float64]:
        """-log p of every token of the replies held out, in nats, over the whole vocabulary."""
        found = []
        for prompt, reply in self.held:
            log_probs = step_log_probs(model, prompt, reply[:-1], len(reply))
            at = torch.tensor(reply, device=log_probs.device)[:, None]
            found.append(-log_probs.gather(1, at)[:, 0].double().cpu().numpy())
        return np.concatenate(found)

    def facts(self) -> dict[str, Any]:
        return {
            "n_replies": len(self.learnt),
            "n_held_out": len(self.held),
            "n_tokens": sum(len(reply) for _, reply in self.learnt),
            "held_out_prompts": np.unique(self.groups).tolist(),
        }


def _check(recipe: Recipe, settings: DistilSettings, adapter: AdapterSettings) -> None:
    """CoalaError, before any work, for what cannot be trained."""
    from coala.baselines import trl, trl_adapter

    trl_adapter.require(trl("sft"))
    if settings.teacher != "guided":
        raise CoalaError(
            f"Found the teacher {settings.teacher!r}; expected 'guided', for TRL imitates texts as they are, without "
            "weights or distributions. Fix: --teacher guided, or --into output."
        )
    if recipe.model.adapter is not None or recipe.model.quantise is not None:
        raise CoalaError(
            "Found a run whose model has an adapter or is quantised; expected plain weights to train an adapter from. "
            "Fix: --into output, or align on the merged model in full precision."
        )
    if not adapter.rates or min(adapter.rates) <= 0:
        raise CoalaError(f"Found the learning rates {adapter.rates}; expected at least one, each above 0.")


def rendered(backbone: LanguageModel, lesson: Lesson) -> tuple[list[int], list[int]]:
    """Tokens of the prompt and of the reply."""
    row = backbone.render(lesson.prompt, lesson.text, ends_with_eos=lesson.ended)
    return row.tokens[: row.start], row.tokens[row.start : row.stop]


def train_settings(rate: float, adapter: AdapterSettings, n_replies: int, seed: int, on_gpu: bool) -> TrainSettings:
    """How one rate is trained: AdamW, a linear schedule, a checkpoint at the end of each epoch."""
    from coala.baselines import Lora, trl

    return replace(
        trl("sft"),
        learning_rate=rate,
        epochs=float(adapter.epochs),
        batch_size=adapter.batch,
        lora=Lora(rank=adapter.adapter_rank, alpha=2 * adapter.adapter_rank, dropout=0.0),
        # Mixed precision and recomputed activations pay on a GPU only; on a CPU the first would train something else.
        bf16=on_gpu,
        gradient_checkpointing=on_gpu,
        max_length=None,
        seed=seed,
        save_every=-(-n_replies // adapter.batch),
        log_every=1,
    )


def _epochs(trained: Trained) -> list[tuple[int, Path]]:
    """The epochs, counted from 1, and their adapters."""
    return [(number + 1, folder) for number, (_, folder) in enumerate(trained.checkpoints())]


def _flops(shape: Shape, part: _Part, runs: Sequence[Trained], adapter: AdapterSettings) -> dict[str, int]:
    """Of training, over all rates, and of the losses on the replies held out."""
    whole, replies = (
        [len(prompt) + len(reply) - 1 for prompt, reply in part.held],
        [len(reply) for _, reply in part.held],
    )
    once = states_flops(shape, whole, replies)
    return {
        "training": sum(trained.flops for trained in runs),
        "held_out": once * (1 + len(runs) * adapter.epochs),
    }
